"""Cheap products for the screen on a CPU, and by how much they may be off: in bfloat16, or in 8-bit integers.

Invariant: for every feature f and token t

    value(product[f, t]) scale[t] + lost[f] near[t] + norm[f] off[t] > limit[f]

wherever the float32 product w_f z_t + bias is over the floor. It holds by Cauchy and Schwarz,

    |w z - w' z'| <= |w - w'| |z'| + |w| |z - z'|

with w' and z' what is multiplied, `near` |z'|, `off` |z - z'| and the float32 sums' d 2^-23 |z|; what else is
rounded is taken from the limit. Norms are of what was really lost, in float64 or enlarged.

Bfloat   w' and z' are the nearest bfloat16 numbers; where z is bfloat16 itself nothing of it is lost.
Int8     z less a mean, which adds a number to each feature's limit; a scale a feature and a token. Loud
         dimensions would make a token's scale coarse, so they are repeated: their parts add up to more than
         127. Mean and repetitions are of the first tokens that are given; others cost candidates only.

Trade-off, measured (2 cores of an EPYC, d 576): int8 products take half the time, 24 ms for 4,096 tokens and
features against 48, and leave 1.8 to 3.2 candidates an active pair instead of 1.1 to 1.2 (SmolLM2, example
SAEs). Encoding takes 0.8 of the time; without instructions for bfloat16, which most processors lack, 0.1 to
0.2. Which it is, a measurement decides (`benchmarks/encode.py`, `benchmarks/candidates.py`).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from sae_runtime.bfloat import rounded, value_of
from sae_runtime.jit import bits_of_float, float_of_bits, number_of, summed
from sae_runtime.threads import alone

STEP = 64  # tokens that are compared at a time; arrays of a number a token have as many to spare
_REPEATED = 64  # columns for parts of loud dimensions
_SMALLEST = np.float32(2.0**-100)
_FEATURES = 4096
_PAYS = 0.75  # of the time of a bfloat16 product, or less
_REFINE = 3.1e-11  # seconds of a multiplication in refining: 18 ns for 576


class Tokens(NamedTuple):
    """A block of tokens, made ready."""

    columns: torch.Tensor  # [k, tokens], bfloat16 or int8
    scale: np.ndarray  # float32 [tokens + STEP]; of bfloat16 it is not read
    near: np.ndarray  # float32 [tokens + STEP]
    off: np.ndarray  # float32 [tokens + STEP]


class Products(ABC):
    """One SAE's cheap products with tokens that are alike."""

    weight: torch.Tensor  # [width, k], bfloat16 or int8
    dtype: torch.dtype  # of the products: bfloat16 or int32
    lost: np.ndarray  # float32 [width]
    norm: np.ndarray  # float32 [width]
    limit: np.ndarray  # float32 [width]

    @abstractmethod
    def tokens(self, z: np.ndarray) -> Tokens:
        """A block of z [tokens, d]: float32, or the codes of bfloat16."""

    @abstractmethod
    def multiply(self, rows: slice, columns: torch.Tensor, out: torch.Tensor) -> None:
        """Products of some features into `out` [features, tokens]."""


class Cheap(ABC):
    """One SAE's weights in a cheap type. All arguments float32 on the CPU: [width, d], [width], [width]."""

    @abstractmethod
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, floor: torch.Tensor) -> None: ...

    @abstractmethod
    def products(self, z: np.ndarray) -> Products:
        """The products with tokens of which these [tokens, d] are the first."""


class _Bound(NamedTuple):
    """Of each feature, float64 [width]."""

    lost: torch.Tensor  # |w - w'|
    norm: torch.Tensor  # |w|
    floor: torch.Tensor  # less bias and less what their sums in float32 may be off


def _bound(
    weight: torch.Tensor, near: Callable[[slice], torch.Tensor], bias: torch.Tensor, floor: torch.Tensor
) -> _Bound:
    """`near(rows)` is w' of some features, float64."""
    lost, norm = (torch.empty(len(weight), dtype=torch.float64) for _ in range(2))
    for start in range(0, len(weight), _FEATURES):
        rows = slice(start, start + _FEATURES)
        w = weight[rows].double()
        norm[rows], lost[rows] = w.norm(dim=1), (w - near(rows)).norm(dim=1)
    d = weight.shape[1]
    sums = 2.0**-22 * (floor.abs() + bias.abs()).double()
    tiny = d * 2.0**-125  # numbers under 2^-126, which may be taken for 0
    return _Bound(
        1.02 * lost + tiny, 1.02 * norm + tiny, floor.double() - bias.double() - sums - tiny * (1 + norm)
    )


class Bfloat(Cheap):
    """Products in bfloat16: float32 sums, rounded."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, floor: torch.Tensor) -> None:
        self.weight = weight.bfloat16()
        bound = _bound(weight, lambda rows: self.weight[rows].double(), bias, floor)
        self.lost, self.norm = _up(bound.lost), _up(bound.norm)
        # The relative error of rounding matters at products near the limit.
        self.limit = _down(bound.floor - 1.01 * 2.0**-8 * bound.floor.abs())

    def products(self, z: np.ndarray) -> Products:
        return _BfloatProducts(self)


class _BfloatProducts(Products):
    dtype = torch.bfloat16

    def __init__(self, of: Bfloat) -> None:
        self.weight, self.lost, self.norm, self.limit = of.weight, of.lost, of.norm, of.limit

    def tokens(self, z: np.ndarray) -> Tokens:
        near, off = np.zeros((2, len(z) + STEP), np.float32)
        _bfloat_errors(z, z.dtype == np.uint16, near, off)
        if z.dtype == np.uint16:
            narrow = torch.from_numpy(z.view(np.int16)).view(torch.bfloat16)
        else:
            narrow = torch.from_numpy(z).bfloat16()
        return Tokens(narrow.T, near, near, off)

    def multiply(self, rows: slice, columns: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(self.weight[rows], columns, out=out)


class Int8(Cheap):
    """Products in 8-bit integers, summed in 32 bits: exact."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, floor: torch.Tensor) -> None:
        self.whole = weight
        largest = weight.abs().amax(dim=1).double()
        self.step = torch.where(largest > 0, largest / 127, 1.0)  # float64 [width]
        self.weight = torch.empty(weight.shape, dtype=torch.int8)
        for start in range(0, len(weight), _FEATURES):
            rows = slice(start, start + _FEATURES)
            self.weight[rows] = (weight[rows] / self.step[rows, None]).round().to(torch.int8)
        self.bound = _bound(
            weight, lambda rows: self.weight[rows].double() * self.step[rows, None], bias, floor
        )
        self.lost, self.norm = (_up(each / self.step) for each in (self.bound.lost, self.bound.norm))

    def products(self, z: np.ndarray) -> Products:
        return _Int8Products(self, z)


class _Int8Products(Products):
    dtype = torch.int32

    def __init__(self, of: Int8, first: np.ndarray) -> None:
        d = of.weight.shape[1]
        z = torch.from_numpy(_floats(first))
        mean = z.mean(dim=0)
        self._mean, self._mean_norm = mean.numpy(), float(mean.double().norm())
        centred = z - mean
        size = centred / centred.norm(dim=1, keepdim=True).clamp(min=float(_SMALLEST))
        self._source, parts = _repetitions(size.square().mean(dim=0).sqrt().numpy(), _REPEATED + -d % 64)
        self._most = np.int32(steps() or 127)
        self._room = np.float32(1) / (np.float32(self._most) * parts.astype(np.float32))
        self.weight = torch.cat([of.weight, of.weight[:, torch.from_numpy(self._source)]], dim=1)
        self.lost, self.norm = of.lost, of.norm
        base = torch.mv(of.whole, mean).double()
        limit = of.bound.floor - base - d * 2.0**-22 * of.bound.norm * self._mean_norm
        self.limit = _down((limit - 2.0**-20 * limit.abs()) / of.step)

    def tokens(self, z: np.ndarray) -> Tokens:
        scale, near, off = np.zeros((3, len(z) + STEP), np.float32)
        codes = np.empty((len(z), self.weight.shape[1]), np.int8)
        _quantise(
            z, self._mean, self._mean_norm, self._most, self._room, self._source, codes, scale, near, off
        )
        return Tokens(torch.from_numpy(codes).T, scale, near, off)

    def multiply(self, rows: slice, columns: torch.Tensor, out: torch.Tensor) -> None:
        torch._int_mm(self.weight[rows], columns, out=out)


def _repetitions(size: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Which dimension each of so many columns repeats, int64, and in how many parts each then is, int64 [d].

    One after the other they go to the dimension whose `size` is the largest for its parts.
    """
    parts = np.ones(len(size), np.int64)
    source = np.empty(columns, np.int64)
    for i in range(columns):
        source[i] = np.argmax(size / parts)
        parts[source[i]] += 1
    return source, parts


def _floats(z: np.ndarray) -> np.ndarray:
    return (z.astype(np.uint32) << np.uint32(16)).view(np.float32) if z.dtype == np.uint16 else z


def _down(values: torch.Tensor) -> np.ndarray:
    """float32 not above float64 `values`."""
    with np.errstate(over="ignore"):
        near = values.numpy().astype(np.float32)
    return np.where(near > values.numpy(), np.nextafter(near, np.float32(-np.inf)), near)


def _up(values: torch.Tensor) -> np.ndarray:
    """float32 not below float64 `values`."""
    return -_down(-values)


@summed
def _bfloat_errors(z: np.ndarray, exact: bool, near: np.ndarray, off: np.ndarray) -> None:
    """`near` and `off` of tokens in bfloat16; `exact` if `z` has the codes themselves."""
    d = z.shape[1]
    for t in range(len(z)):
        whole, lost = 0.0, 0.0
        for i in range(d):
            whole += np.float64(number_of(z[t, i])) * np.float64(number_of(z[t, i]))
        whole = np.sqrt(whole)
        if not exact:
            for i in range(d):
                value = number_of(z[t, i])
                gone = np.float64(value) - np.float64(value_of(rounded(value)))
                lost += gone * gone
            lost = np.sqrt(lost)
        near[t] = np.float32((whole + lost) * (1 + 2.0**-20))
        off[t] = np.float32((lost + d * 2.0**-23 * whole) * (1 + 2.0**-20) + d * 2.0**-125)


@summed
def _quantise(
    z: np.ndarray, mean: np.ndarray, mean_norm: float, steps: np.int32, room: np.ndarray,
    source: np.ndarray, codes: np.ndarray, scale: np.ndarray, near: np.ndarray, off: np.ndarray,
) -> None:  # fmt: skip
    """(z - mean) / scale as integers in `codes` [tokens, d + repetitions], each at most `steps`; `room` is 1
    over the most of each dimension, all its parts together."""
    d = z.shape[1]
    left = np.empty(d, np.float32)
    for t in range(len(z)):
        highest = np.uint32(0)  # bits of numbers without a sign order as they do, and have vectors for it
        for j in range(d):
            left[j] = number_of(z[t, j]) - mean[j]
            highest = max(highest, bits_of_float(left[j] * room[j]) & np.uint32(0x7FFFFFFF))
        most = max(float_of_bits(highest), _SMALLEST)
        inverse = np.float32(1) / most
        whole, lost = np.float32(0), np.float32(0)
        for j in range(d):
            value = left[j] * inverse
            whole += value * value
            part = min(max(np.int32(np.rint(value)), -steps), steps)
            left[j] = value - np.float32(part)
            codes[t, j] = np.int8(part)
        for k in range(len(source)):
            part = min(max(np.int32(np.rint(left[source[k]])), -steps), steps)
            left[source[k]] -= np.float32(part)
            codes[t, d + k] = np.int8(part)
        for j in range(d):
            lost += left[j] * left[j]
        # In units of the scale; the sums are of float32, whence 2^-10, and each number has been rounded.
        size = np.sqrt(np.float64(whole)) * (1 + 2.0**-10)
        gone = np.sqrt(np.float64(lost)) * (1 + 2.0**-10) + 2.0**-20 * size
        scale[t] = most
        near[t] = np.float32(most * (size + gone))
        off[t] = np.float32(most * gone + d * 2.0**-23 * (most * (size + gone) + mean_norm) + d * 2.0**-125)


def fastest() -> type[Cheap]:
    """What this machine multiplies in the least time; measured once, and either gives the same rows."""
    return Int8 if worth_refining() > 0 else Bfloat


def worth_refining() -> float:
    """Of the pairs, the share that may be refined in vain after int8 products until bfloat16 takes less time.

    After bfloat16 products hardly any are, but what is active has to be refined after either.
    """
    if not steps():
        return 0.0
    narrow, plain = _seconds()
    return (plain - narrow) / _REFINE if narrow < _PAYS * plain else 0.0


@cache
def steps() -> int:
    """How many steps up and down a number of z may have for `Int8` products to be right: 127, 64, or 0.

    Without instructions for them, pairs of products are added in 16 bits, which 127 overflow.
    """
    if not hasattr(torch, "_int_mm"):
        return 0
    for most in (127, 64):
        weight, z, out = _extremes(most)
        try:
            torch._int_mm(weight, z.T, out=out)
        except (RuntimeError, TypeError):
            return 0
        if torch.equal(out, (weight.double() @ z.double().T).int()):
            return most
    return 0


def _extremes(most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights and z with all that is largest beside each other, int8, and room for their product."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (1024, 640), dtype=torch.int8, generator=generator)
    z = torch.randint(-most, most + 1, (512, 640), dtype=torch.int8, generator=generator)
    weight[:9], z[:9] = 127, -most
    weight[9:18], z[9:18] = -127, most
    return weight, z, torch.empty(1024, 512, dtype=torch.int32)


@cache
def _seconds() -> tuple[float, float]:
    """Of a multiplication in int8 products, and in bfloat16 ones."""
    weight, z, out = _extremes(steps())
    wide, wide_z, products = weight.bfloat16(), z.bfloat16(), torch.empty(out.shape, dtype=torch.bfloat16)
    with ThreadPoolExecutor(1, initializer=alone) as one:  # as encoders run, side by side
        narrow, plain = one.submit(
            _least,
            lambda: torch._int_mm(weight, z.T, out=out),
            lambda: torch.mm(wide, wide_z.T, out=products),
        ).result()
    return narrow / (weight.numel() * len(z)), plain / (weight.numel() * len(z))


def _least(*runs: Callable[[], object], rounds: int = 20) -> list[float]:
    """Seconds of the fastest round of each, in turns: what threads and caches start with is nobody's."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, own in zip(runs, times, strict=True):
            began = time.perf_counter()
            run()
            own.append(time.perf_counter() - began)
    return [min(own) for own in times]
