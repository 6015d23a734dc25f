"""Which model of device this is, as far as it decides values.

Invariant: two machines of one name give the same bits for the same work and the same versions; of two names
they may not. A GPU is its product; a CPU is its product and the instructions that torch and oneDNN choose
kernels by, since a virtual machine may hide some.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from sae_runtime.errors import CorpuscopeError

_CPUINFO = Path("/proc/cpuinfo")
_CHOSEN_BY = ("avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "bf16", "sve", "sve2")  # not in the name


def device_model(device: str) -> str:
    """The model of `device` (cpu or cuda) on this machine. CorpuscopeError where torch sees none."""
    if torch.device(device).type != "cuda":
        return _cpu()
    if not torch.cuda.is_available():
        raise CorpuscopeError("torch sees no GPU there")
    return torch.cuda.get_device_name(device)


def _cpu() -> str:
    name, flags = platform.processor() or platform.machine(), set[str]()
    if _CPUINFO.is_file():
        facts = dict(_fact(line) for line in _CPUINFO.read_text(errors="replace").splitlines() if ":" in line)
        name = facts.get("model name", name)
        flags = set((facts.get("flags") or facts.get("Features") or "").split())
    chosen = [torch.backends.cpu.get_cpu_capability(), *(flag for flag in _CHOSEN_BY if flag in flags)]
    return f"{name} ({' '.join(chosen)})"


def _fact(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()
