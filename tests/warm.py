"""What every command of forks.py would load for itself, loaded once in the process that they are forks of.

Invariant: there is no thread afterwards that was not there before. So nothing is computed here; compiled
loops are read from where an earlier process left them.
"""

from __future__ import annotations

import gc
import importlib
import os
import pkgutil

import numba
import pandas  # noqa: F401  # pyarrow asks for it
import pyarrow.dataset
import pyarrow.pandas_compat
import transformers.convert_slow_tokenizer
import transformers.models.auto.tokenization_auto
import transformers.models.encoder_decoder.configuration_encoder_decoder
import transformers.tokenization_utils_tokenizers
from numba.core.registry import cpu_target
from transformers import AutoModelForCausalLM  # noqa: F401  # the name's look-up is what takes time
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import sae_runtime


def _tasks() -> int:
    return len(os.listdir("/proc/self/task"))


before = _tasks()
get_checkpoint_conversion_mapping("gemma2")
cpu_target.target_context.refresh()
cpu_target.typing_context.refresh()
for found in pkgutil.iter_modules(sae_runtime.__path__, "sae_runtime."):
    if found.ispkg or found.name.endswith("triton_encode"):
        continue
    for loop in vars(importlib.import_module(found.name)).values():
        if isinstance(loop, numba.core.dispatcher.Dispatcher):
            for signature, *_ in loop._cache._cache_file._load_index():
                loop.compile(signature)
assert _tasks() == before
gc.freeze()  # a fork's collections do not go through all this again
