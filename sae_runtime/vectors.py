"""Inner loops of screen and attention as vectors of 16, where the compiler makes slower code of plain ones.

Invariant: nothing here names a processor; where registers are shorter, the compiler takes several for a
vector, and results are the same. Arrays are contiguous and places are not checked: callers leave room.

Trade-off, measured (one core of an EPYC, 16,320 tokens x 4,096 features x d 576, L0 80, 2.3 candidates an
active pair): comparing, finding and refining take 59 ms, as plain loops 75. Of the 59 comparing takes 6,
finding what bits are set 11 and the products 40, two fifths of that waiting for the second-level cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

from sae_runtime.jit import intrinsic

LANES = 16
_BIT, _BYTE, _SHORT, _INT, _LONG = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_NUMBER = ir.FloatType()
_INTS, _NUMBERS = ir.VectorType(_INT, LANES), ir.VectorType(_NUMBER, LANES)


def _places() -> bytes:
    """Of each byte the places of its set bits, lowest first, then zeros: 256 times 8 bytes."""
    found = np.zeros((256, 8), np.uint8)
    for byte in range(256):
        bits = [bit for bit in range(8) if byte >> bit & 1]
        found[byte, : len(bits)] = bits
    return found.tobytes()


def _data(target: Any, build: Any, kind: Any, array: Any) -> Any:
    return target.make_array(kind)(target, build, array).data


def _columns(target: Any, build: Any, kind: Any, array: Any) -> Any:
    """The second dimension of an array of two."""
    return build.extract_value(target.make_array(kind)(target, build, array).shape, 1)


def _load(build: Any, data: Any, first: Any, kind: Any) -> Any:
    """A vector from a place on."""
    vector = build.load(build.bitcast(build.gep(data, [first]), kind.as_pointer()))
    vector.align = max(1, getattr(kind.element, "width", 32) // 8)
    return vector


def _all_of(build: Any, value: Any, kind: Any) -> Any:
    """One number in all lanes."""
    lane = build.insert_element(ir.Constant(kind, ir.Undefined), value, _INT(0))
    return build.shuffle_vector(lane, lane, ir.Constant(ir.VectorType(_INT, kind.count), [0] * kind.count))


def _bits(build: Any, compared: Any) -> Any:
    """Comparisons as the low bits of a uint64."""
    return build.zext(build.bitcast(compared, _SHORT), _LONG)


@intrinsic
def prefetch(context: Any, array: Any, place: Any) -> Any:
    """Have the element of a flat place in a contiguous array brought near; says and changes nothing."""
    pointer = _BYTE.as_pointer()

    def generate(target: Any, build: Any, signature: Any, args: Any) -> Any:
        data = _data(target, build, signature.args[0], args[0])
        kind = ir.FunctionType(ir.VoidType(), [pointer, _INT, _INT, _INT])
        function = cgutils.get_or_insert_function(build.module, kind, "llvm.prefetch.p0")
        where = build.bitcast(build.gep(data, [args[1]]), pointer)
        build.call(function, [where, _INT(0), _INT(3), _INT(1)])  # to read, into every cache, data
        return target.get_dummy_value()

    return types.void(array, types.int64), generate


@intrinsic
def over_limit(
    context: Any, products: Any, scale: Any, near: Any, off: Any, start: Any, at: Any, lost: Any, norm: Any,
    limit: Any,
) -> Any:  # fmt: skip
    """Which of 16 products plus errors are over a limit, as the low 16 bits of a uint64.

    value(products[start + i]) + lost * near[at + i] + norm * off[at + i] > limit, for 0 <= i < 16. Products
    are codes of bfloat16 (uint16) or integers (int32), whose value is times scale[at + i]; other arrays are
    float32. NaN, which comes of products that overflow, is over it.
    """
    coded = products.dtype == types.uint16

    def generate(target: Any, build: Any, signature: Any, args: Any) -> Any:
        data = [_data(target, build, signature.args[i], args[i]) for i in range(4)]

        def numbers(i: int) -> Any:
            return _load(build, data[i], args[5], _NUMBERS)

        if coded:
            short = _load(build, data[0], args[4], ir.VectorType(_SHORT, LANES))
            bits = build.shl(build.zext(short, _INTS), ir.Constant(_INTS, [16] * LANES))
            most = build.bitcast(bits, _NUMBERS)
        else:
            most = build.fmul(build.sitofp(_load(build, data[0], args[4], _INTS), _NUMBERS), numbers(1))
        for error, factor in ((2, 6), (3, 7)):
            most = build.fadd(most, build.fmul(numbers(error), _all_of(build, args[factor], _NUMBERS)))
        return _bits(build, build.fcmp_unordered(">", most, _all_of(build, args[8], _NUMBERS)))

    return types.uint64(products, scale, near, off, *[types.int64] * 2, *[types.float32] * 3), generate


@intrinsic
def over_floor(context: Any, values: Any, at: Any, floor: Any) -> Any:
    """Which of values[at : at + 16], float32, are over a floor: the low 16 bits of a uint64. NaN is not."""

    def generate(target: Any, build: Any, signature: Any, args: Any) -> Any:
        found = _load(build, _data(target, build, signature.args[0], args[0]), args[1], _NUMBERS)
        return _bits(build, build.fcmp_ordered(">", found, _all_of(build, args[2], _NUMBERS)))

    return types.uint64(values, types.int64, types.float32), generate


@intrinsic
def put_places(context: Any, word: Any, base: Any, out: Any, n: Any) -> Any:
    """Write base + i for every set bit i of the lowest 16 of a word to out[n:], int32; gives the next n.

    Of the 16 elements of out[n:] all may be changed. No bit is branched on, which would be guessed wrong.
    """
    bytes_, wide = ir.VectorType(_BYTE, 8), ir.VectorType(_INT, 8)

    def generate(target: Any, build: Any, signature: Any, args: Any) -> Any:
        word, base, _, n = args
        data = _data(target, build, signature.args[2], args[2])
        table = cgutils.global_constant(build, "places", cgutils.make_bytearray(_places()))
        for part in range(0, 16, 8):
            byte = build.and_(build.lshr(word, _LONG(part)), _LONG(255))
            place = build.gep(build.bitcast(table, _BYTE.as_pointer()), [build.mul(byte, _LONG(8))])
            found = build.load(build.bitcast(place, bytes_.as_pointer()))
            found.align = 1
            first = _all_of(build, build.trunc(build.add(base, _LONG(part)), _INT), wide)
            store = build.store(
                build.add(build.zext(found, wide), first),
                build.bitcast(build.gep(data, [n]), wide.as_pointer()),
            )
            store.align = 4
            n = build.add(n, build.ctpop(byte))
        return n

    return types.int64(types.uint64, types.int64, out, types.int64), generate


@intrinsic
def four_products(
    context: Any, weight: Any, row: Any, pairs: Any, columns: Any, apart: Any, token: Any, at: Any, out: Any
) -> Any:  # fmt: skip
    """out[at + i], float32, are products of weight[row] with the tokens token[at + i], for 0 <= i < 4.

    Over the columns j and apart + j, for j < `columns`, a multiple of 16. `pairs` [tokens, n] has them in
    bfloat16 codes, those of j in the low half of a uint32, of apart + j in the high one; or as float32.
    """
    coded = pairs.dtype == types.uint32
    high = ir.Constant(_INTS, [0xFFFF0000] * LANES)

    def generate(target: Any, build: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        row, columns, apart, at = (args[i] for i in (1, 3, 4, 6))
        d, stride = (_columns(target, build, kinds[i], args[i]) for i in (0, 2))
        weights = build.gep(_data(target, build, kinds[0], args[0]), [build.mul(row, d)])
        token, all_z, out = (_data(target, build, kinds[i], args[i]) for i in (5, 2, 7))
        z = []
        for i in range(4):
            number = build.sext(build.load(build.gep(token, [build.add(at, _LONG(i))])), _LONG)
            z.append(build.gep(all_z, [build.mul(number, stride)]))
        sums = [cgutils.alloca_once_value(build, ir.Constant(_NUMBERS, [0.0] * LANES)) for _ in range(8)]
        with cgutils.for_range(build, build.udiv(columns, _LONG(LANES))) as loop:
            j = build.mul(loop.index, _LONG(LANES))
            w = [_load(build, weights, start, _NUMBERS) for start in (j, build.add(j, apart))]
            for i in range(4):
                if coded:
                    both = _load(build, z[i], j, _INTS)
                    halves = build.shl(both, ir.Constant(_INTS, [16] * LANES)), build.and_(both, high)
                    values = [build.bitcast(half, _NUMBERS) for half in halves]
                else:
                    values = [_load(build, z[i], start, _NUMBERS) for start in (j, build.add(j, apart))]
                for k in range(2):
                    product = build.fmul(w[k], values[k], flags=("contract",))
                    total = build.fadd(build.load(sums[2 * i + k]), product, flags=("contract",))
                    build.store(total, sums[2 * i + k])
        whole = [build.fadd(build.load(sums[2 * i]), build.load(sums[2 * i + 1])) for i in range(4)]
        _store(build, _sums(build, whole), out, at)
        return target.get_dummy_value()

    kind = types.void(weight, types.int64, pairs, types.int64, types.int64, token, types.int64, out)
    return kind, generate


@intrinsic
def tile(
    context: Any, a: Any, b: Any, first: Any, n: Any, column: Any, out: Any, added: Any
) -> Any:  # fmt: skip
    """out[:4, column : column + 32] = a[:4, first : first + n] b[first : first + n, column : column + 32].

    All float32. Each number is summed in the order of the columns of `a`, with one rounding a step where the
    processor has that; if `added`, that sum is added to what is there.
    """

    def generate(target: Any, build: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        first, n, column, added = (args[i] for i in (2, 3, 4, 6))
        datas = [_data(target, build, kinds[i], args[i]) for i in (0, 1, 5)]
        strides = [_columns(target, build, kinds[i], args[i]) for i in (0, 1, 5)]
        rows = [build.gep(datas[0], [build.add(build.mul(_LONG(r), strides[0]), first)]) for r in range(4)]
        b_first = build.gep(datas[1], [build.add(build.mul(first, strides[1]), column)])
        zero = ir.Constant(_NUMBERS, [0.0] * LANES)
        sums = [cgutils.alloca_once_value(build, zero) for _ in range(8)]
        for each in sums:
            build.store(zero, each)
        with cgutils.for_range(build, n) as loop:
            line = build.gep(b_first, [build.mul(loop.index, strides[1])])
            both = [_load(build, line, _LONG(LANES * i), _NUMBERS) for i in range(2)]
            for r in range(4):
                factor = _all_of(build, build.load(build.gep(rows[r], [loop.index])), _NUMBERS)
                for i in range(2):
                    product = build.fmul(factor, both[i], flags=("contract",))
                    at = sums[2 * r + i]
                    build.store(build.fadd(build.load(at), product, flags=("contract",)), at)
        more = build.icmp_signed("!=", added, _LONG(0))
        for r in range(4):
            for i in range(2):
                place = build.add(build.add(build.mul(_LONG(r), strides[2]), column), _LONG(LANES * i))
                found = build.load(sums[2 * r + i])
                there = build.fadd(_load(build, datas[2], place, _NUMBERS), found)
                _store(build, build.select(more, there, found), datas[2], place)
        return target.get_dummy_value()

    return types.void(a, b, types.int64, types.int64, types.int64, out, types.int64), generate


@intrinsic
def highest(context: Any, row: Any, n: Any, scale: Any, most: Any) -> Any:
    """Multiplies row[:n], n a multiple of 32; gives the highest of those numbers and `most`. All float32."""

    def generate(target: Any, build: Any, signature: Any, args: Any) -> Any:
        data = _data(target, build, signature.args[0], args[0])
        factor = _all_of(build, args[2], _NUMBERS)
        found = [cgutils.alloca_once_value(build, _all_of(build, args[3], _NUMBERS)) for _ in range(2)]
        with cgutils.for_range(build, build.lshr(args[1], _LONG(5))) as loop:
            for i in range(2):
                at = build.add(build.shl(loop.index, _LONG(5)), _LONG(LANES * i))
                value = build.fmul(_load(build, data, at, _NUMBERS), factor)
                _store(build, value, data, at)
                build.store(_larger(build, value, build.load(found[i])), found[i])
        return _number(build, _halves(build, _larger, [build.load(each) for each in found]))

    return types.float32(row, types.int64, types.float32, types.float32), generate


# Malossi et al., Fast Exponential Computation on SIMD Architectures (2015), with the cubic that torch has.
_LOG2_E, _LOWEST = 1.44269504, -87.33654  # the logarithm of the smallest normal number
_CUBIC = (-0.079204240219773236, -0.22433836478672356, 0.30354260500649682, 0.00010703434948458272)


@intrinsic
def powers(context: Any, row: Any, n: Any, most: Any) -> Any:
    """e^(row[i] - most) for i < n, a multiple of 16, in their places, rounded to bfloat16; gives their sum,
    which is of the numbers before rounding. All float32; exponents of at most 0.

    Numbers go to 32 sums in turn; then halves of the sums are added until one is left.
    """

    def generate(target: Any, build: Any, signature: Any, args: Any) -> Any:
        data = _data(target, build, signature.args[0], args[0])
        most = _all_of(build, args[2], _NUMBERS)
        zero = ir.Constant(_NUMBERS, [0.0] * LANES)
        sums = [cgutils.alloca_once_value(build, zero) for _ in range(2)]

        def one(at: Any, total: Any) -> None:
            found = _power(build, build.fsub(_load(build, data, at, _NUMBERS), most))
            build.store(build.fadd(build.load(total), found), total)
            bits = build.bitcast(found, _INTS)
            odd = build.and_(build.lshr(bits, _integer(16)), _integer(1))
            near = build.and_(build.add(build.add(bits, _integer(0x7FFF)), odd), _integer(0xFFFF0000))
            _store(build, build.bitcast(near, _NUMBERS), data, at)

        with cgutils.for_range(build, build.lshr(args[1], _LONG(5))) as loop:
            for i in range(2):
                one(build.add(build.shl(loop.index, _LONG(5)), _LONG(LANES * i)), sums[i])
        with build.if_then(build.icmp_signed("!=", build.and_(args[1], _LONG(LANES)), _LONG(0))):
            one(build.and_(args[1], _LONG(-2 * LANES)), sums[0])
        return _number(build, _halves(build, _added, [build.load(each) for each in sums]))

    return types.float32(row, types.int64, types.float32), generate


def _power(build: Any, x: Any) -> Any:
    """e^x of a vector: 2^y has the bits of y + 127 in units of 2^-23, less a polynomial of its fraction."""
    floor, fused = (
        cgutils.get_or_insert_function(
            build.module, ir.FunctionType(_NUMBERS, [_NUMBERS] * n), f"llvm.{name}.v{LANES}f32"
        )
        for name, n in (("floor", 1), ("fma", 3))
    )
    y = build.fmul(x, _number_of(_LOG2_E))
    part = build.fsub(y, build.call(floor, [y]))
    off = _number_of(_CUBIC[0])
    for factor in _CUBIC[1:]:
        off = build.call(fused, [part, off, _number_of(factor)])
    units = build.fadd(build.fmul(build.fsub(y, off), _number_of(2.0**23)), _number_of(127 * 2.0**23))
    found = build.bitcast(build.fptosi(units, _INTS), _NUMBERS)
    return build.select(build.fcmp_ordered(">=", x, _number_of(_LOWEST)), found, _number_of(0))


def _number_of(value: float) -> Any:
    return ir.Constant(_NUMBERS, [float(np.float32(value))] * LANES)


def _integer(value: int) -> Any:
    return ir.Constant(_INTS, [value] * LANES)


def _store(build: Any, vector: Any, data: Any, first: Any) -> None:
    """A vector to a place and those after it."""
    build.store(vector, build.bitcast(build.gep(data, [first]), vector.type.as_pointer())).align = 4


def _number(build: Any, vector: Any) -> Any:
    return build.extract_element(vector, _INT(0))


def _added(build: Any, one: Any, other: Any) -> Any:
    return build.fadd(one, other)


def _larger(build: Any, one: Any, other: Any) -> Any:
    return build.select(build.fcmp_ordered(">", one, other), one, other)


def _sums(build: Any, vectors: list[Any]) -> Any:
    """The sums of the lanes of each of four vectors, as a vector of four."""
    one, other = (_halved(build, _added, LANES, *two) for two in (vectors[:2], vectors[2:]))
    four = _halved(build, _added, LANES // 2, one, other)
    return _halved(build, _added, LANES // 8, _halved(build, _added, LANES // 4, four))


def _halves(build: Any, operator: Any, vectors: list[Any]) -> Any:
    """All lanes of two vectors as one: the first vector with the second, then half with half."""
    whole = operator(build, *vectors)
    while whole.type.count > 1:
        whole = _halved(build, operator, whole.type.count, whole)
    return whole


def _halved(build: Any, operator: Any, run: int, *vectors: Any) -> Any:
    """Of each run of so many lanes of one vector or two, its first half with its second, run after run."""
    lanes = len(vectors) * vectors[0].type.count
    first = [start + i for start in range(0, lanes, run) for i in range(run // 2)]
    kind = ir.VectorType(_INT, len(first))
    parts = (
        build.shuffle_vector(vectors[0], vectors[-1], ir.Constant(kind, [place + by for place in first]))
        for by in (0, run // 2)
    )
    return operator(build, *parts)
