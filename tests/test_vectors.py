"""The loops written as vectors give what plain numpy gives, at every place and for every pattern of bits."""

from __future__ import annotations

import numpy as np
import pytest

from sae_runtime.jit import jit
from sae_runtime.screen import _halves, _paired, _rest
from sae_runtime.vectors import LANES, four_products, over_floor, put_places


@jit
def _all_places(words: np.ndarray, out: np.ndarray) -> int:
    n = 0
    for i in range(len(words)):
        n = put_places(words[i], i * 16, out, n)
    return n


@jit
def _over(values: np.ndarray, at: int, floor: np.float32) -> int:
    return over_floor(values, at, floor)


@jit
def _products(
    weight: np.ndarray, row: int, pairs: np.ndarray, columns: int, apart: int, token: np.ndarray, at: int,
    out: np.ndarray,
) -> None:  # fmt: skip
    four_products(weight, row, pairs, columns, apart, token, at, out)


def test_places_of_every_word_of_16_bits() -> None:
    words = np.arange(1 << 16, dtype=np.uint64)
    bits = (words[:, None] >> np.arange(16, dtype=np.uint64)) & np.uint64(1)
    wanted = np.flatnonzero(bits)
    out = np.full(len(wanted) + LANES, -1, np.int32)
    assert _all_places(words, out) == len(wanted)
    np.testing.assert_array_equal(out[: len(wanted)], wanted)


def test_only_the_lowest_16_bits_of_a_word_count() -> None:
    out = np.zeros(2 * LANES, np.int32)
    assert _all_places(np.array([0xFFFF0000_00000000 | 0x10002], np.uint64), out) == 1
    assert out[0] == 1


def test_over_a_floor_from_any_place_and_nan_is_not() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=64).astype(np.float32)
    values[[3, 20, 33]] = np.nan, np.inf, -np.inf
    values[[7, 8]] = 0.5, np.nextafter(np.float32(0.5), np.float32(1))
    for at in range(len(values) - LANES):
        with np.errstate(invalid="ignore"):
            wanted = sum(1 << i for i in range(LANES) if values[at + i] > 0.5)
        assert _over(values, at, np.float32(0.5)) == wanted


@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize("d", [1, 31, 32, 33, 63, 64, 65, 95, 576, 577])
def test_products_of_pairs_and_of_the_rest_are_the_whole(d: int, coded: bool) -> None:
    """Small integers, so that every order of summing is exact and a column taken twice or never shows."""
    rng = np.random.default_rng(d)
    weight = rng.integers(-8, 9, (5, d)).astype(np.float32)
    values = rng.integers(-8, 9, (9, d)).astype(np.float32)
    codes = (values.view(np.uint32) >> 16).astype(np.uint16)
    z = codes if coded else values
    columns, apart = _halves(d)
    assert 2 * columns <= d
    pairs = _paired(codes, columns, apart) if coded else values
    token = np.array([8, 0, 3, 3, 7, 1], np.int32)
    for row in range(5):
        for at in (0, 1, 2):
            out = np.full(8, 99, np.float32)
            _products(weight, row, pairs, columns, apart, token, at, out)
            assert (out[:at] == 99).all()
            assert (out[at + 4 :] == 99).all()
            which = token[at : at + 4]
            rest = [_rest(weight[row], z[t], columns, apart) for t in which]
            np.testing.assert_array_equal(out[at : at + 4] + rest, values[which] @ weight[row])
