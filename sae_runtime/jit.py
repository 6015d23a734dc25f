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
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from sae_runtime.cache import cache_dir

_SOURCES = ("bfloat.py", "encode.py", "fused.py", "jit.py", "screen.py", "summaries.py", "topk.py")


def _code_dir() -> Path:
    digest = hashlib.blake2b(digest_size=8)
    for name in _SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return cache_dir() / "numba" / digest.hexdigest()


numba.config.CACHE_DIR = str(_code_dir())  # type: ignore[attr-defined]  # before anything is decorated

# Said outright, for what is left unsaid is inherited from the function that is being compiled: called from
# a `summed` one first, products and sums would be fused into one rounding.
jit = numba.njit(cache=True, nogil=True, fastmath=False)
_intrinsic: Any = intrinsic  # whose first argument callers do not give
inlined = numba.njit(cache=True, inline="always")
# Sums whose order the compiler may choose: one order for one machine, and any is float32's.
summed = numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})


@_intrinsic
def float_of_bits(context: Any, bits: Any) -> Any:
    """The float32 of a uint32's bits."""
    return types.float32(types.uint32), lambda _, build, sig, args: build.bitcast(args[0], ir.FloatType())


@_intrinsic
def bits_of_float(context: Any, value: Any) -> Any:
    """The bits of a float32 as uint32."""
    return types.uint32(types.float32), lambda _, build, sig, args: build.bitcast(args[0], ir.IntType(32))


@_intrinsic
def lowest_bit(context: Any, word: Any) -> Any:
    """The number of the lowest set bit of a uint64 that is not zero."""
    return types.int64(types.uint64), lambda _, build, sig, args: build.cttz(
        args[0], ir.Constant(ir.IntType(1), 1)
    )


@_intrinsic
def over_limit(context: Any, codes: Any, error: Any, start: Any, at: Any, factor: Any, limit: Any) -> Any:
    """Which of 16 bfloat16 numbers plus errors are over a limit, as the low 16 bits of a uint64.

    value(codes[start + i]) + factor * error[at + i] > limit, for 0 <= i < 16; arrays uint16 and float32 [n].
    NaN, which comes of products that overflow, is over it.
    Written as vectors, because comparisons that end in bits are not made so by the compiler.
    """
    number = ir.FloatType()
    wide = ir.VectorType(ir.IntType(32), 16)

    def load(target: Any, build: Any, kind: Any, array: Any, first: Any, element: Any, size: int) -> Any:
        place = build.gep(target.make_array(kind)(target, build, array).data, [first])
        vector = build.load(build.bitcast(place, ir.VectorType(element, 16).as_pointer()))
        vector.align = size
        return vector

    def all_of(build: Any, value: Any) -> Any:
        lane = build.insert_element(
            ir.Constant(ir.VectorType(number, 16), ir.Undefined), value, ir.IntType(32)(0)
        )
        return build.shuffle_vector(lane, lane, ir.Constant(wide, [0] * 16))

    def generate(target: Any, build: Any, signature: Any, args: Any) -> Any:
        short = load(target, build, signature.args[0], args[0], args[2], ir.IntType(16), 2)
        bits = build.shl(build.zext(short, wide), ir.Constant(wide, [16] * 16))
        value = build.bitcast(bits, ir.VectorType(number, 16))
        errors = load(target, build, signature.args[1], args[1], args[3], number, 4)
        most = build.fadd(value, build.fmul(errors, all_of(build, args[4])))
        over = build.fcmp_unordered(">", most, all_of(build, args[5]))
        return build.zext(build.bitcast(over, ir.IntType(16)), ir.IntType(64))

    return types.uint64(codes, error, types.int64, types.int64, types.float32, types.float32), generate
