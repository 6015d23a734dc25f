"""What every command of forks.py would load for itself, loaded once in the process that they are forks of.

Invariant: there is no thread afterwards that was not there before. So nothing is computed here; compiled
loops are read from where an earlier scan, which a test has to have made, left them.
Measured (2 cores, 2026-11-23): scan, compaction and collection of five units take 0.4 s of a processor in
a fork, 1.3 s without this file.
"""

from __future__ import annotations

import gc
import importlib
import os
import pkgutil

from numba.core.dispatcher import Dispatcher
from numba.core.registry import cpu_target
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import sae_runtime

NAMES = (
    "pandas",  # pyarrow asks for it
    "pyarrow.dataset",
    "pyarrow.pandas_compat",
    "transformers.convert_slow_tokenizer",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.encoder_decoder.configuration_encoder_decoder",
    "transformers.tokenization_utils_tokenizers",
)


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


before = _threads()
for name in NAMES:
    importlib.import_module(name)
get_checkpoint_conversion_mapping("gemma2")
cpu_target.target_context.refresh()
cpu_target.typing_context.refresh()
for found in pkgutil.iter_modules(sae_runtime.__path__, "sae_runtime."):
    if found.ispkg or found.name.endswith("triton_encode"):
        continue
    for loop in vars(importlib.import_module(found.name)).values():
        if isinstance(loop, Dispatcher):
            for signature, *_ in loop._cache._cache_file._load_index():
                loop.compile(signature)
assert _threads() == before, "a process with threads is none to fork"
gc.freeze()  # a fork's collections do not go through all this again
