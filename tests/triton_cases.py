"""The kernels of triton_encode.py in triton's interpreter, on the CPU; test_triton.py runs this file.

The interpreter must be asked for before triton is imported, and then holds for the whole process, so
these tests have a process of their own: TRITON_INTERPRET=1 pytest tests/triton_cases.py
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_encode import TorchEncoder, bfloat16, rows, weights
from test_rules import formula, listed, make_case, normed_case

from sae_runtime import reference, triton_encode
from sae_runtime.bfloat import to_float
from sae_runtime.encode import Encoder, Sparse, kernels_of
from sae_runtime.sae import SaeWeights
from sae_runtime.triton_encode import Parts

assert os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")
OVER = ("relu", "jumprelu", "gated")
RANKED = ("topk", "topk_signed", "abstopk")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonEncoder(Encoder):
    """The path of a GPU, interpreted."""

    def __init__(self, weights: SaeWeights, device: torch.device = CPU) -> None:
        super().__init__(weights, device)
        self.kernels = kernels_of(self.sae, self.cut)


def sizes(most_tokens: int) -> dict[str, Any]:
    """Odd sizes, and both sides of a tile's edge."""
    edges = st.sampled_from([1, 127, 128, 129, 257])
    tokens = edges if most_tokens > 128 else st.integers(1, most_tokens)
    return {
        "seed": st.integers(0, 2**32 - 1),
        "tokens": st.one_of(st.integers(1, most_tokens), tokens),
        "width": st.one_of(st.integers(1, 300), edges),
        "d": st.sampled_from([1, 6, 63, 64, 65, 130]),
        "spread": st.sampled_from([1, 2, 9]),
        "extras": st.sets(st.sampled_from(["sunk", "b_pre", "scale"])),
        "dtype": st.sampled_from(DTYPES),
    }


@pytest.mark.parametrize("rule", OVER)
@settings(max_examples=8, deadline=None)
@given(**sizes(300), first=st.sampled_from([0, 70000]))
def test_rules_that_compare(
    rule: str, seed: int, tokens: int, width: int, d: int, spread: int, extras: set[str], dtype: torch.dtype,
    first: int,
) -> None:  # fmt: skip
    """Integers: no sum has an error, and thresholds are met exactly all the time."""
    case = make_case(seed, rule, tokens, width, 1, spread, extras, d)
    encoder = TritonEncoder(case.weights())
    found = Sparse(*encoder.kernels.encode(case.inputs(dtype), first))
    assert found.indptr.shape == (width + 1,)
    assert (found.indptr.dtype, found.token.dtype, found.code.dtype) == (np.int64, np.int32, np.uint16)
    wanted = [(feature, token + first, value) for feature, token, value in listed(formula(case))]
    assert rows(found) == wanted


@pytest.mark.parametrize("rule", RANKED)
@settings(max_examples=8, deadline=None)
@given(**sizes(12), k=st.integers(1, 300), registers=st.booleans())
@example(0, 5, 257, 6, 1, set(), torch.float32, 300, False)
@example(1, 3, 257, 6, 1, {"scale"}, torch.float32, 9, True)
def test_rules_that_rank(
    rule: str, seed: int, tokens: int, width: int, d: int, spread: int, extras: set[str], dtype: torch.dtype,
    k: int, registers: bool,
) -> None:  # fmt: skip
    """Ranks are equal all the time; a token's ranks in registers, or read again for each digit."""
    case = make_case(seed, rule, tokens, width, min(k, width), spread, extras, d)
    with pytest.MonkeyPatch.context() as patch:
        if not registers:
            patch.setattr(triton_encode, "IN_REGISTERS", 0)
        assert rows(TritonEncoder(case.weights()).encode(case.inputs(dtype))) == listed(formula(case))


@pytest.mark.parametrize("registers", [1 << 15, 0])
def test_zero_is_no_higher_than_minus_zero(registers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of -3 * 0, 5 * 0 and 2 * 0 are equal: the lower features are kept, whatever they are worth."""
    monkeypatch.setattr(triton_encode, "IN_REGISTERS", registers)
    W = torch.tensor([[-3.0, 5.0, 2.0]])
    sae = SaeWeights("topk_signed", W, torch.zeros(3), k=2, select_scale=torch.zeros(3))
    assert rows(TritonEncoder(sae).encode(torch.ones(1, 1))) == [(0, 0, -3.0), (1, 0, 5.0)]
    ranked = reference.encode(torch.ones(1, 1), sae)
    assert ranked.tolist() == [[-3.0, 5.0, 0.0]]


@pytest.mark.parametrize("rule", RANKED)
def test_ranks_over_several_readings(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More features than are read at a time (1,024), with equals on both sides of the border."""
    monkeypatch.setattr(triton_encode, "IN_REGISTERS", 0)
    case = make_case(2, rule, 2, 1100, 400, 1, set(), 3)
    assert rows(TritonEncoder(case.weights()).encode(case.inputs())) == listed(formula(case))


@pytest.mark.parametrize("rule", ["jumprelu", "topk_signed"])
def test_several_passes_and_runs_of_tokens(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of tokens a pass, products of one block kept at a time: 260 tokens, 3 blocks, 2 passes."""
    monkeypatch.setattr(triton_encode, "CELLS", 2 * 256)
    monkeypatch.setattr(triton_encode, "KEPT_VALUES", 128 * 256)
    case = make_case(3, rule, 260, 140, 5, 2, set(), 6)
    encoder = TritonEncoder(case.weights())
    assert encoder.kernels.most_tokens == 256
    assert rows(encoder.encode(case.inputs())) == listed(formula(case))


@pytest.mark.parametrize("rule", ["relu", "topk"])
@pytest.mark.parametrize("room", [0, 1, 20])
def test_a_short_list_is_made_longer(rule: str, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_encode, "_ROWS_PER_TOKEN", room)
    case = make_case(4, rule, 8, 200, 120, 9, set(), 6)
    encoder = TritonEncoder(case.weights())
    for _ in range(2):
        assert rows(encoder.encode(case.inputs())) == listed(formula(case))
    assert encoder.kernels.rows_per_token * 8 >= len(listed(formula(case)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_none_and_one_everywhere(dtype: torch.dtype) -> None:
    x = torch.arange(1, 132, dtype=dtype)[:, None]
    W = np.ones((1, 140), np.float32)
    b = np.zeros(140, np.float32)
    everything = TritonEncoder(weights(W, b, b)).encode(x)
    assert rows(everything) == [(f, t, float(bfloat16(t + 1))) for f in range(140) for t in range(131)]
    nothing = TritonEncoder(weights(W, b, b + 1000)).encode(x)
    assert (rows(nothing), nothing.indptr.tolist()) == ([], [0] * 141)
    one = np.full(140, 1000.0)
    one[133] = 0
    found = TritonEncoder(weights(W, b, one)).encode(x)
    assert rows(found) == [(133, t, float(bfloat16(t + 1))) for t in range(131)]
    assert rows(TritonEncoder(weights(W, b, b)).encode(-x)) == []
    assert rows(TritonEncoder(weights(W, b, b)).encode(x[:0])) == []


def test_at_the_threshold() -> None:
    """Met exactly: inactive. One float32 above: active. Negative thresholds leave relu alone to decide."""
    above = float(np.nextafter(np.float32(2), np.float32(3)))
    x = np.array([[2.0], [above], [1.0], [0.0], [-0.5], [-2.0]], np.float32)
    threshold = np.array([2.0, 0.0, -1.0, -1e30, above], np.float32)
    found = TritonEncoder(weights(np.ones((1, 5)), np.zeros(5), threshold)).encode(torch.from_numpy(x))
    positive = [(0, 2.0), (1, 2.0), (2, 1.0)]
    assert rows(found) == [(0, 1, 2.0)] + [(f, t, value) for f in (1, 2, 3) for t, value in positive]


def test_the_rounding_of_every_kind_of_number() -> None:
    """Ties to even, and numbers so small that they leave no row. All of it is bias."""
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7F0000, 0x8000, 0x8001, 0x18000, 1])
    wanted = [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x7F7F, None, 0x0001, 0x0002, None]
    b = bits.astype(np.uint32).view(np.float32)
    found = TritonEncoder(weights(np.zeros((1, 9)), b, np.zeros(9))).encode(torch.zeros(1, 1))
    features = np.repeat(np.arange(9), np.diff(found.indptr)).tolist()
    held = dict(zip(features, found.code.tolist(), strict=True))
    assert held == {f: code for f, code in enumerate(wanted) if code is not None}


@pytest.mark.parametrize("rule", [*OVER, *RANKED])
@pytest.mark.parametrize("norm", ["constant_norm", "unit_rms", "center", "layer_norm"])
def test_inputs_are_normalised_as_the_reference_does(norm: str, rule: str) -> None:
    case, how = normed_case(norm, rule)
    sae = case.weights(input=how)
    x = case.inputs()[: 8 if rule in RANKED else 24]
    torch_rows = rows(TorchEncoder(sae, CPU).encode(x))
    found = rows(TritonEncoder(sae).encode(x))
    # A last bit of a norm decides between equal ranks and at thresholds, so a few rows may differ.
    assert len({(f, t) for f, t, _ in found} ^ {(f, t) for f, t, _ in torch_rows}) <= 0.1 * len(torch_rows)


SCALES = {"plain": 1.0, "small": 2.0**-40, "large": 2.0**30}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_random_floats_are_the_reference_but_for_float32(dtype: torch.dtype, scale: str) -> None:
    """Massive dimensions, weights of many sizes; decisions differ only within the contract's margin."""
    rng = np.random.default_rng(7)
    tokens, width, d = 150, 260, 200
    x = rng.normal(size=(tokens, d))
    x[:, 3] *= 300
    x[::7] *= 50
    if dtype == torch.float16:
        scale = "plain"
    given = torch.from_numpy(x * SCALES[scale]).to(dtype)
    W = rng.normal(size=(d, width)) * np.exp(rng.normal(size=width)) * np.exp2(rng.integers(-12, 3, (d, 1)))
    b = rng.normal(size=width) * SCALES[scale]
    W, b = W.astype(np.float32), b.astype(np.float32)
    pre = given.double().numpy() @ W.astype(np.float64) + b
    threshold = np.quantile(pre, 0.8, axis=0).astype(np.float32)
    threshold[:50] = pre[rng.integers(0, tokens, 50), np.arange(50)]
    sae = weights(W, b, threshold)
    encoder = TritonEncoder(sae)
    assert len(encoder.kernels.weight.parts) == 2
    found = encoder.encode(given)
    dense = np.zeros((tokens, width))
    dense[found.token, np.repeat(np.arange(width), np.diff(found.indptr))] = to_float(found.code)
    margin = 2.0**-19 * np.linalg.norm(given.double(), axis=1)[:, None] * np.linalg.norm(W, axis=0)
    should = (pre > threshold) & (pre > 0)
    decided = np.abs(pre - threshold) > margin
    assert ((dense > 0) == should)[decided].all()
    assert 0 < decided.sum() < decided.size
    both = (dense > 0) & should
    assert (np.abs(dense - pre)[both] <= (np.abs(pre) * 2.0**-8 + margin)[both]).all()
    exact = bfloat16(pre)
    assert (dense == exact)[both].mean() > 0.998
    # The reference itself, in the same way.
    stored = reference.stored(reference.encode(given, sae)).numpy()
    assert ((dense > 0) == (stored > 0))[decided].all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    d=st.sampled_from([1, 5, 64, 300]),
    spread=st.sampled_from([0, 3, 12, 40]),
    power=st.integers(-126, 86),
)
def test_parts_are_as_close_as_the_bound_says(seed: int, d: int, spread: int, power: int) -> None:
    """The docstring's bounds for one element, and for products of the parts, in float64."""
    rng = np.random.default_rng(seed)
    hard = [1 + 2.0**-11 - 2.0**-23, 1 + 2.0**-11 + 2.0**-22, 2 - 2.0**-23, 1.0, 0.0]
    mantissas = rng.choice(hard, (2, 9, d))
    if seed % 2:
        mantissas = rng.normal(size=(2, 9, d))
    a = np.ldexp(mantissas, rng.integers(-spread, spread + 1, mantissas.shape) + power).astype(np.float32)
    split = [Parts.of(torch.from_numpy(side), 4) for side in a]
    exact = a.astype(np.float64)
    for side, true in zip(split, exact, strict=True):
        assert side.parts.shape[1:] == (12, -(-d // 64) * 64)
        assert not side.parts[:, 9:].any()
        assert not side.parts[:, :, d:].any()
        held = side.parts.double().sum(dim=0).numpy()[:9, :d] * side.unit.double().numpy()[:9, None]
        most = np.abs(true).max(axis=1, keepdims=True)
        assert (np.abs(held - true) <= np.maximum(2.0**-23 * np.abs(true), 2.0**-39 * most)).all()
    (x, x_lo), (w, w_lo) = (
        (side.parts.double().numpy()[:, :9, :d] * side.unit.double().numpy()[:9, None]) for side in split
    )
    norms = np.linalg.norm(exact[0], axis=1)[:, None] * np.linalg.norm(exact[1], axis=1)
    off = np.abs(x @ (w + w_lo).T + x_lo @ w.T - exact[0] @ exact[1].T)
    assert (off <= (2.0**-21 + 2.0**-38 * d**0.5) * norms * (1 + 2.0**-40)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_need_one_part(dtype: torch.dtype) -> None:
    x = torch.randn(20, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    one = Parts.of(x, 128, 1)
    assert (one.parts.double().sum(dim=0)[:20, :70] * one.unit.double()[:20, None] == x.double()).all()
    assert len(Parts.of(x.float(), 128).trimmed().parts) == 1
    sae = weights(x.T.float().numpy(), np.zeros(20), np.ones(20))
    assert len(TritonEncoder(sae).kernels.weight.parts) == 1


def test_the_bound_is_nearly_met_by_what_it_is_made_for() -> None:
    """What is left out where both sides have two parts, all of one sign and as large as it gets."""
    a = np.full((1, 512), 1 + 2.0**-11 - 2.0**-23, np.float32)
    side = Parts.of(torch.from_numpy(a), 1)
    low = side.parts[1, 0, :512].double().numpy() * float(side.unit[0])
    norms = (a.astype(np.float64) ** 2).sum()
    left_out = (low * low).sum()
    assert 2.0**-23 * norms < left_out <= 2.0**-22 * norms
