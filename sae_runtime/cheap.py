"""Cheap products for the screen on a CPU, and by how much they may be off: in bfloat16, or in 8-bit integers.

Invariant: for every feature f and token t

    value(product[f, t]) scale[t] + lost[f] near[t] + norm[f] off[t] > limit[f]

wherever the float32 product w_f z_t + bias is over the floor. It holds by Cauchy and Schwarz,

    |w z - w' z'| <= |w - w'| |z'| + |w| |z - z'|

with w' and z' what is multiplied, `near` |z'|, `off` |z - z'| and the float32 sums' d 2^-23 |z|; what else is
rounded is taken from the limit. Norms are of what was really lost, in float64 or enlarged.

Bfloat   w' and z' are the nearest bfloat16 numbers; where z is bfloat16 itself nothing of it is lost.
Int8     z less a mean, which adds a number to each feature's limit; a scale a feature and a token. Loud
         dimensions would make those coarse, so a dimension of z is multiplied with a number that weights are
         divided by, and both are as loud there as each other (Xiao et al., SmoothQuant, 2022). Mean and
         numbers are of the first tokens that are given; others cost candidates only.

Trade-off, measured (2 cores of an EPYC, d 576): int8 products take half the time, 22 ms for 4,096 tokens and
features against 43, and leave 1.8 to 3.0 candidates an active pair instead of 1.1 to 1.2 (SmolLM2, example
SAEs). Encoding takes 0.75 of the time; without instructions for bfloat16, which most processors lack, 0.1 to
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
_MULTIPLE = 64  # of columns in 8 bits; those that are too many are 0
_FAINTEST = 2.0**-10  # of the loudest dimension; fainter ones are taken for so loud
_SMALLEST = np.float32(2.0**-100)
_FEATURES = 1024
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
    weight: torch.Tensor,
    near: Callable[[slice], torch.Tensor],
    bias: torch.Tensor,
    floor: torch.Tensor,
    room: torch.Tensor | None = None,
) -> _Bound:
    """`near(rows)` is w' of some features, float64, where w is `weight`, over `room` if that is given."""
    lost, norm, plain = (torch.empty(len(weight), dtype=torch.float64) for _ in range(3))
    for start in range(0, len(weight), _FEATURES):
        rows = slice(start, start + _FEATURES)
        w = weight[rows].double()
        plain[rows] = w.norm(dim=1)
        w = w if room is None else w / room
        norm[rows], lost[rows] = w.norm(dim=1), (w - near(rows)).norm(dim=1)
    d = weight.shape[1]
    sums = 2.0**-22 * (floor.abs() + bias.abs()).double()
    tiny = d * 2.0**-125  # numbers under 2^-126, which may be taken for 0
    return _Bound(
        1.02 * lost + tiny,
        1.02 * norm + tiny,
        floor.double() - bias.double() - sums - tiny * (1 + norm + plain),
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
        self._given = weight, bias, floor
        self._scaled: _Scaled | None = None

    def products(self, z: np.ndarray) -> Products:
        if self._scaled is None:
            self._scaled = _Scaled(*self._given, _floats(z))
        return _Int8Products(self._scaled, _floats(z))


class _Scaled:
    """Weights over a number a dimension, in 8 bits with a step a feature."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor, floor: torch.Tensor, first: torch.Tensor
    ) -> None:
        """`first` [tokens, d] float32 is like what is to be multiplied."""
        self.whole = weight
        self.room = _balance(weight, first - first.mean(dim=0))
        width, d = weight.shape
        self.step = torch.empty(width, dtype=torch.float64)
        self.weight = torch.zeros(width, d + -d % _MULTIPLE, dtype=torch.int8)
        for start in range(0, width, _FEATURES):
            rows = slice(start, start + _FEATURES)
            over = weight[rows].double() / self.room
            largest = over.abs().amax(dim=1)
            self.step[rows] = torch.where(largest > 0, largest / 127, 1.0)
            self.weight[rows, :d] = (over / self.step[rows, None]).round().to(torch.int8)
        self.bound = _bound(
            weight, lambda rows: self.weight[rows, :d] * self.step[rows, None], bias, floor, self.room
        )
        self.lost, self.norm = (_up(each / self.step) for each in (self.bound.lost, self.bound.norm))


class _Int8Products(Products):
    dtype = torch.int32

    def __init__(self, of: _Scaled, first: torch.Tensor) -> None:
        d = of.whole.shape[1]
        mean = first.mean(dim=0)
        self._mean, self._mean_norm = mean.numpy(), float((mean.double() * of.room).norm())
        self._room, self._most = of.room.float().numpy(), np.int32(steps() or 127)
        self.weight, self.lost, self.norm = of.weight, of.lost, of.norm
        base = torch.mv(of.whole, mean).double()
        limit = of.bound.floor - base - d * 2.0**-22 * of.bound.norm * self._mean_norm
        self.limit = _down((limit - 2.0**-20 * limit.abs()) / of.step)

    def tokens(self, z: np.ndarray) -> Tokens:
        scale, near, off = np.zeros((3, len(z) + STEP), np.float32)
        codes = np.zeros((len(z), self.weight.shape[1]), np.int8)
        _quantise(z, self._mean, self._mean_norm, self._most, self._room, codes, scale, near, off)
        return Tokens(torch.from_numpy(codes).T, scale, near, off)

    def multiply(self, rows: slice, columns: torch.Tensor, out: torch.Tensor) -> None:
        torch._int_mm(self.weight[rows], columns, out=out)


def _balance(weight: torch.Tensor, centred: torch.Tensor) -> torch.Tensor:
    """What a dimension of z is multiplied with, and of weights divided by, such that both are as loud as each
    other there: float64 [d], each a float32."""
    loud = []
    for x in (weight, centred):
        size = x.double().square().mean(dim=0).sqrt()
        loud.append(size.clamp(min=float(size.max()) * _FAINTEST))
    room = (loud[0] / loud[1]).sqrt()
    return room.float().double() if room.isfinite().all() and (room > 0).all() else torch.ones_like(room)


def _floats(z: np.ndarray) -> torch.Tensor:
    wide = (z.astype(np.uint32) << np.uint32(16)).view(np.float32) if z.dtype == np.uint16 else z
    return torch.from_numpy(wide)


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
    codes: np.ndarray, scale: np.ndarray, near: np.ndarray, off: np.ndarray,
) -> None:  # fmt: skip
    """(z - mean) * room / scale as integers of at most `steps` in the first columns of `codes`."""
    d = z.shape[1]
    left = np.empty(d, np.float32)
    for t in range(len(z)):
        highest = np.uint32(0)  # bits of numbers without a sign order as they do, and have vectors for it
        for j in range(d):
            left[j] = (number_of(z[t, j]) - mean[j]) * room[j]
            highest = max(highest, bits_of_float(left[j]) & np.uint32(0x7FFFFFFF))
        most = max(float_of_bits(highest) / np.float32(steps), _SMALLEST)
        inverse = np.float32(1) / most
        whole, lost = np.float32(0), np.float32(0)
        for j in range(d):
            value = left[j] * inverse
            part = min(max(np.int32(np.rint(value)), -steps), steps)
            codes[t, j] = np.int8(part)
            rest = value - np.float32(part)
            whole += value * value
            lost += rest * rest
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
