"""The compiler of the loops, and where its machine code is kept.

Invariant: cached code is never older than the sources it was made from. numba looks at one file's time
of change, which misses functions inlined from another, so the cache lies in a folder named after the
digest of all files with loops, and of this one. Compiling costs 6 s once, loading 0.3 s (2 cores,
2026-11-22).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numba
import numba.extending
from llvmlite import ir
from numba.core import types

from sae_runtime.cache import cache_dir

_SOURCES = (
    "attention.py",
    "bfloat.py",
    "cheap.py",
    "encode.py",
    "fused.py",
    "jit.py",
    "screen.py",
    "summaries.py",
    "topk.py",
    "vectors.py",
)


def _code_dir() -> Path:
    digest = hashlib.blake2b(digest_size=8)
    for name in _SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return cache_dir() / "numba" / digest.hexdigest()


numba.config.CACHE_DIR = str(_code_dir())  # type: ignore[attr-defined]  # before anything is decorated

# Said outright, for what is left unsaid is inherited from the function that is being compiled: called from
# a `summed` one first, products and sums would be fused into one rounding.
jit = numba.njit(cache=True, nogil=True, fastmath=False)
intrinsic: Any = numba.extending.intrinsic  # whose first argument callers do not give
inlined = numba.njit(cache=True, inline="always")
# Sums whose order the compiler may choose: one order for one machine, and any is float32's.
summed = numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})


@intrinsic
def float_of_bits(context: Any, bits: Any) -> Any:
    """The float32 of a uint32's bits."""
    return types.float32(types.uint32), lambda _, build, sig, args: build.bitcast(args[0], ir.FloatType())


@intrinsic
def bits_of_float(context: Any, value: Any) -> Any:
    """The bits of a float32 as uint32."""
    return types.uint32(types.float32), lambda _, build, sig, args: build.bitcast(args[0], ir.IntType(32))


@intrinsic
def number_of(context: Any, value: Any) -> Any:
    """The float32 that it is, or whose bfloat16 code it is if it is a uint16."""

    def generate(target: Any, build: Any, signature: Any, args: Any) -> Any:
        if signature.args[0] == types.float32:
            return args[0]
        wide = build.zext(args[0], ir.IntType(32))
        return build.bitcast(build.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.uint16 if value == types.uint16 else types.float32), generate
