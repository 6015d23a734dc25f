"""The jumprelu encoder against the formula, exactly: small integers, so that float32 sums have no error.

With integers every order of summation gives the same pre-activation, thresholds are met exactly all the
time, and a single wrong row, value or position shows. Blocks are made so small that widths and token
counts are rarely multiples of them. test_rules.py has the other rules.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_runtime import encode, reference
from sae_runtime.encode import Cut, Encoder, Sparse, compact_loops, compact_torch
from sae_runtime.sae import SaeWeights

Rows = list[tuple[int, int, float]]


def weights(W: np.ndarray, b: np.ndarray, threshold: np.ndarray) -> SaeWeights:
    d, m = W.shape
    tensors = [torch.from_numpy(np.asarray(a, np.float32)) for a in (W, b, threshold)]
    return SaeWeights(
        "jumprelu", tensors[0], tensors[1], torch.ones(m, d), torch.zeros(d), threshold=tensors[2]
    )


def formula(x: np.ndarray, W: np.ndarray, b: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """[tokens, width] in float64: relu(pre) where pre is strictly above the threshold."""
    pre = x.astype(np.float64) @ W.astype(np.float64) + b.astype(np.float64)
    return np.where(pre > threshold.astype(np.float64), np.maximum(pre, 0), 0)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to nearest even, by scaling to eight significant bits."""
    mantissa, exponent = np.frexp(np.asarray(values, np.float64))
    return np.ldexp(np.round(mantissa * 256), exponent - 8)


def listed(f: np.ndarray) -> Rows:
    return [
        (int(feature), int(token), float(f[token, feature]))
        for feature in range(f.shape[1])
        for token in range(len(f))
        if f[token, feature] > 0
    ]


def rows(sparse: Sparse) -> Rows:
    """(feature, token, value) in the order in which they are held."""
    feature = np.repeat(np.arange(len(sparse.indptr) - 1), np.diff(sparse.indptr))
    value = (sparse.code.astype(np.uint32) << 16).view(np.float32)
    assert sparse.indptr[0] == 0
    assert sparse.indptr[-1] == sparse.rows == len(sparse.code)
    return list(zip(feature.tolist(), sparse.token.tolist(), value.tolist(), strict=True))


def case(seed: int, tokens: int, width: int, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.integers(-9, 10, (tokens, d)).astype(np.float32)
    W = rng.integers(-9, 10, (d, width)).astype(np.float32)
    b = rng.integers(-40, 41, width).astype(np.float32)
    pre = x @ W + b
    # Thresholds that are pre-activations themselves, and a few that are negative, zero or never met.
    threshold = pre[rng.integers(0, tokens, width), np.arange(width)]
    kind = rng.random(width)
    threshold[kind < 0.1] = 0
    threshold[kind > 0.9] = 1e30
    return x, W, b, threshold


class TorchEncoder(Encoder):
    """The path of other devices, on the CPU."""

    def __init__(self, weights: SaeWeights, device: torch.device) -> None:
        super().__init__(weights, device)
        self.loops, self.screen = False, None


@pytest.mark.parametrize("kind", [Encoder, TorchEncoder])
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 40),
    width=st.integers(1, 40),
    d=st.integers(1, 24),
    token_block=st.integers(1, 17),
    feature_block=st.integers(1, 17),
)
def test_encoders_equal_the_formula(
    kind: type[Encoder], seed: int, tokens: int, width: int, d: int, token_block: int, feature_block: int
) -> None:
    x, W, b, threshold = case(seed, tokens, width, d)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "TOKENS_PER_BLOCK", token_block)
        patch.setattr(encode, "FEATURES_PER_BLOCK", feature_block)
        found = kind(weights(W, b, threshold), torch.device("cpu")).encode(torch.from_numpy(x))
    wanted = bfloat16(formula(x, W, b, threshold))
    assert found.indptr.shape == (width + 1,)
    assert rows(found) == listed(wanted)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(1, 30), width=st.integers(1, 30))
def test_the_reference_equals_the_formula(seed: int, tokens: int, width: int) -> None:
    x, W, b, threshold = case(seed, tokens, width, 7)
    f = reference.encode(torch.from_numpy(x), weights(W, b, threshold))
    assert (f.double().numpy() == formula(x, W, b, threshold)).all()
    assert (reference.stored(f).double().numpy() == bfloat16(formula(x, W, b, threshold))).all()
    decoded = reference.decode(f, torch.from_numpy(x), weights(W, b, threshold))
    assert (decoded.double().numpy() == f.double().sum(dim=1, keepdim=True).numpy()).all()


@pytest.mark.parametrize("kind", [Encoder, TorchEncoder])
def test_at_the_threshold(kind: type[Encoder]) -> None:
    """Met exactly: inactive. One float32 above: active. Negative thresholds leave relu alone to decide."""
    above = float(np.nextafter(np.float32(2), np.float32(3)))
    x = np.array([[2.0], [above], [1.0], [0.0], [-0.5], [-2.0]], np.float32)
    W = np.ones((1, 5), np.float32)
    b = np.zeros(5, np.float32)
    threshold = np.array([2.0, 0.0, -1.0, -1e30, above], np.float32)
    found = kind(weights(W, b, threshold), torch.device("cpu")).encode(torch.from_numpy(x))
    positive = [(0, 2.0), (1, 2.0), (2, 1.0)]
    wanted = [(0, 1, 2.0)] + [(f, token, value) for f in (1, 2, 3) for token, value in positive]
    assert rows(found) == wanted


@pytest.mark.parametrize("kind", [Encoder, TorchEncoder])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_none_and_one_everywhere(kind: type[Encoder], dtype: torch.dtype) -> None:
    x = torch.arange(1, 12, dtype=dtype)[:, None]
    W = np.ones((1, 4), np.float32)
    b = np.zeros(4, np.float32)
    everything = kind(weights(W, b, b), torch.device("cpu")).encode(x)
    assert rows(everything) == [(f, t, float(t + 1)) for f in range(4) for t in range(11)]
    nothing = kind(weights(W, b, b + 100), torch.device("cpu")).encode(x)
    assert (rows(nothing), nothing.indptr.tolist()) == ([], [0] * 5)
    one = kind(weights(W, b, np.array([100, 100, 0, 100])), torch.device("cpu")).encode(x)
    assert rows(one) == [(2, t, float(t + 1)) for t in range(11)]
    no_tokens_active = kind(weights(W, b, b), torch.device("cpu")).encode(-x)
    assert rows(no_tokens_active) == []


def test_the_rounding_of_every_kind_of_number() -> None:
    """Ties to even, the largest numbers, and the smallest, which may round to nothing (then no row)."""
    bits = np.array(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7F0000, 0x00008000, 0x00008001, 0x00018000, 1],
        np.uint32,
    )
    wanted = [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x7F7F, None, 0x0001, 0x0002, None]
    pre = torch.from_numpy(bits.view(np.float32)[None, :].copy())
    one = np.ones((1, 1), np.float32)
    cut = Cut.of(weights(one, np.zeros(1), np.zeros(1)))
    assert cut is not None
    expected = [(t, code) for t, code in enumerate(wanted) if code is not None]
    for found in (compact_loops(pre, cut, 0), compact_torch(pre, cut, 0)):
        assert list(zip(found.token.tolist(), found.code.tolist(), strict=True)) == expected


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(1, 50), width=st.integers(1, 50))
def test_both_compactions_agree(seed: int, tokens: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    pre = rng.normal(size=(width, tokens)).astype(np.float32)
    threshold = rng.choice(pre.ravel(), width)
    cut = Cut.of(weights(np.ones((1, width)), np.zeros(width), threshold))
    assert cut is not None
    one = compact_loops(torch.from_numpy(pre), cut, 1000)
    other = compact_torch(torch.from_numpy(pre), cut, 1000)
    wanted = [
        (f, 1000 + t, float(bfloat16(pre[f, t])))
        for f in range(width)
        for t in range(tokens)
        if pre[f, t] > threshold[f] and pre[f, t] > 0
    ]
    assert rows(one) == rows(other) == wanted


@pytest.mark.parametrize("kind", [Encoder, TorchEncoder])
def test_squared_error_is_the_formula(kind: type[Encoder]) -> None:
    x, W, b, threshold = case(5, 30, 20, 6)
    rng = np.random.default_rng(6)
    W_dec, b_dec = rng.integers(-3, 4, (20, 6)), rng.integers(-3, 4, 6)
    sae = weights(W, b, threshold)
    sae = replace(sae, W_dec=torch.from_numpy(W_dec).float(), b_dec=torch.from_numpy(b_dec).float())
    y = bfloat16(formula(x, W, b, threshold)) @ W_dec + b_dec
    encoder = kind(sae, torch.device("cpu"))
    assert encoder.has_decoder
    active = encoder.encode(torch.from_numpy(x))
    assert encoder.squared_error(torch.from_numpy(x), active) == ((x - y) ** 2).sum()
    target = rng.integers(-9, 10, x.shape)
    found = encoder.squared_error(torch.from_numpy(x), active, torch.from_numpy(target).bfloat16())
    assert found == ((target - y) ** 2).sum()
    assert not kind(replace(sae, W_dec=None, b_dec=None), torch.device("cpu")).has_decoder
