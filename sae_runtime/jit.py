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
from numba.core import cgutils, types
from numba.extending import intrinsic

from sae_runtime.cache import cache_dir

_SOURCES = (
    "bfloat.py",
    "cheap.py",
    "encode.py",
    "fused.py",
    "jit.py",
    "screen.py",
    "summaries.py",
    "topk.py",
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
def number_of(context: Any, value: Any) -> Any:
    """The float32 that it is, or whose bfloat16 code it is if it is a uint16."""

    def generate(target: Any, build: Any, signature: Any, args: Any) -> Any:
        if signature.args[0] == types.float32:
            return args[0]
        wide = build.zext(args[0], ir.IntType(32))
        return build.bitcast(build.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.uint16 if value == types.uint16 else types.float32), generate


@_intrinsic
def prefetch(context: Any, array: Any, place: Any) -> Any:
    """Have the element of a flat place in a contiguous array brought near; says and changes nothing."""
    pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)

    def generate(target: Any, build: Any, signature: Any, args: Any) -> Any:
        data = target.make_array(signature.args[0])(target, build, args[0]).data
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = cgutils.get_or_insert_function(build.module, kind, "llvm.prefetch.p0")
        where = build.bitcast(build.gep(data, [args[1]]), pointer)
        build.call(function, [where, number(0), number(3), number(1)])  # to read, into every cache, data
        return target.get_dummy_value()

    return types.void(array, types.int64), generate


@_intrinsic
def over_limit(
    context: Any, products: Any, scale: Any, near: Any, off: Any, start: Any, at: Any, lost: Any, norm: Any,
    limit: Any,
) -> Any:  # fmt: skip
    """Which of 16 products plus errors are over a limit, as the low 16 bits of a uint64.

    value(products[start + i]) + lost * near[at + i] + norm * off[at + i] > limit, for 0 <= i < 16. Products
    are codes of bfloat16 (uint16) or integers (int32), whose value is times scale[at + i]; other arrays are
    float32.
    NaN, which comes of products that overflow, is over it.
    Written as vectors, because comparisons that end in bits are not made so by the compiler.
    """
    number = ir.FloatType()
    wide = ir.VectorType(ir.IntType(32), 16)
    floats = ir.VectorType(number, 16)
    coded = products.dtype == types.uint16

    def load(target: Any, build: Any, kind: Any, array: Any, first: Any, element: Any, size: int) -> Any:
        place = build.gep(target.make_array(kind)(target, build, array).data, [first])
        vector = build.load(build.bitcast(place, ir.VectorType(element, 16).as_pointer()))
        vector.align = size
        return vector

    def all_of(build: Any, value: Any) -> Any:
        lane = build.insert_element(ir.Constant(floats, ir.Undefined), value, ir.IntType(32)(0))
        return build.shuffle_vector(lane, lane, ir.Constant(wide, [0] * 16))

    def generate(target: Any, build: Any, signature: Any, args: Any) -> Any:
        def numbers(i: int) -> Any:
            return load(target, build, signature.args[i], args[i], args[5], number, 4)

        if coded:
            short = load(target, build, signature.args[0], args[0], args[4], ir.IntType(16), 2)
            bits = build.shl(build.zext(short, wide), ir.Constant(wide, [16] * 16))
            most = build.bitcast(bits, floats)
        else:
            whole = load(target, build, signature.args[0], args[0], args[4], ir.IntType(32), 4)
            most = build.fmul(build.sitofp(whole, floats), numbers(1))
        for error, factor in ((2, 6), (3, 7)):
            most = build.fadd(most, build.fmul(numbers(error), all_of(build, args[factor])))
        over = build.fcmp_unordered(">", most, all_of(build, args[8]))
        return build.zext(build.bitcast(over, ir.IntType(16)), ir.IntType(64))

    places, factors = [types.int64] * 2, [types.float32] * 3
    return types.uint64(products, scale, near, off, *places, *factors), generate
