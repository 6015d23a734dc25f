"""The screen never hides what the float32 product shows: adversarial roundings, scales and tokens.

The truth is float64. Between it and the encoder stands the contract's margin, 2^-19 |x||w|, in which float32
rounding itself decides; outside of it every decision and, up to one bfloat16 step, every value must agree.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sae_runtime import cheap as choose
from sae_runtime import screen
from sae_runtime.cheap import Bfloat, Cheap, Int8
from sae_runtime.encode import Encoder
from sae_runtime.sae import Input, SaeWeights
from sae_runtime.screen import Screen

MARGIN = 2.0**-19
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, params=[Bfloat, Int8])
def cheap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Cheap]:
    """What the screen multiplies in; whatever is chosen on this machine."""
    if request.param is Int8 and not choose.steps():
        pytest.skip("8-bit products are wrong here")
    monkeypatch.setattr(screen, "fastest", lambda: request.param)
    monkeypatch.setattr(screen, "worth_refining", lambda: 1.0)
    return request.param


def sae(W: np.ndarray, b: np.ndarray, threshold: np.ndarray) -> SaeWeights:
    W, b, threshold = (torch.from_numpy(np.asarray(a, np.float32)) for a in (W, b, threshold))
    return SaeWeights("jumprelu", W.contiguous(), b, threshold=threshold)


def table(weights: SaeWeights, x: torch.Tensor) -> np.ndarray:
    """Activations as they are stored, dense float64 [tokens, width]."""
    found = Encoder(weights, CPU).encode(x)
    feature = np.repeat(np.arange(len(found.indptr) - 1), np.diff(found.indptr))
    assert all(
        (np.diff(found.token[a:b]) > 0).all() for a, b in zip(found.indptr, found.indptr[1:], strict=False)
    )
    dense = np.zeros((len(x), len(found.indptr) - 1))
    dense[found.token, feature] = (found.code.astype(np.uint32) << 16).view(np.float32)
    return dense


def check(weights: SaeWeights, x: torch.Tensor, z: np.ndarray | None = None) -> int:
    """Compare with float64; `z` is what is multiplied with W_enc, if it is not `x`. How many were active."""
    assert weights.threshold is not None
    z = x.double().numpy() if z is None else z
    W, b = weights.W_enc.double().numpy(), weights.b_enc.double().numpy()
    floor = np.maximum(weights.threshold.double().numpy(), 0)
    pre = z @ W + b
    margin = MARGIN * np.linalg.norm(z, axis=1)[:, None] * np.linalg.norm(W, axis=0) + 2.0**-23 * np.abs(b)
    found = table(weights, x)
    wrong = ((found > 0) != (pre > floor)) & (np.abs(pre - floor) > margin)
    assert not wrong.any(), f"{wrong.sum()} wrong, first {np.argwhere(wrong)[0]}"
    both = (found > 0) & (pre > floor)
    assert (np.abs(found - pre)[both] <= pre[both] * 2.0**-7.9 + margin[both]).all()
    return int(both.sum())


@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_roundings_that_all_go_one_way(down: bool, exact: bool) -> None:
    """Weights (and activations) half a bfloat16 step off, all on the same side; so is the sum of them.

    514 ones are 512 in bfloat16, so the screen is off by 2^-7, or by 3 times 2^-8.
    """
    d = 514
    off = 2.0**-7 * (0.499 if down else -0.249)
    w, z = np.full((d, 3), 1 + off), np.full((40, d), 1.0 if exact else 1 + off)
    product = float(np.float32(w[0, 0])) * float(np.float32(z[0, 0])) * d
    threshold = np.array([product * (1 - 2.0**-18), product * (1 + 2.0**-18), product * (1 - 2.0**-10)])
    x = torch.from_numpy(z.astype(np.float32))
    assert check(sae(w, np.zeros(3), threshold), x.bfloat16() if exact else x) == 80


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("seed", range(4))
def test_thresholds_on_the_activations_themselves(seed: int, dtype: torch.dtype) -> None:
    """Every threshold is some token's own pre-activation; a few tokens are 300 times as loud as the rest."""
    rng = np.random.default_rng(seed)
    tokens, d, m = 700, 96, 530
    x = rng.normal(size=(tokens, d)) + rng.normal(size=d) * 4
    x[rng.integers(0, tokens, 9)] *= 300
    x = torch.from_numpy(x).to(dtype)
    W, b = rng.normal(size=(d, m)) * np.exp(rng.normal(size=m)), rng.normal(size=m) * 5
    pre = x.double().numpy() @ np.asarray(W, np.float32).astype(np.float64) + b
    threshold = pre[rng.integers(0, tokens, m), np.arange(m)]
    threshold[:20] = -1.0  # a relu
    assert check(sae(W, b, threshold), x) > 10_000


@pytest.mark.parametrize("power", [-120, -60, 0, 60, 100])
def test_any_scale(power: int) -> None:
    """Weights near both ends of float32; products under 2^-126 may be lost only where float32 loses them."""
    rng = np.random.default_rng(5)
    x = torch.from_numpy(rng.normal(size=(600, 64))).bfloat16()
    W = rng.normal(size=(64, 40)) * 2.0**power
    pre = x.double().numpy() @ W
    assert check(sae(W, np.zeros(40), np.quantile(pre, 0.9, axis=0)), x) > 1_000


def test_a_transform_is_no_exact_input() -> None:
    """After a subtraction or a scale z is not bfloat16, whatever the model has: the wider bound."""
    rng = np.random.default_rng(6)
    x = torch.from_numpy(rng.normal(size=(600, 64)) + 3).bfloat16()
    W, b, pre_bias = rng.normal(size=(64, 200)), rng.normal(size=200), rng.normal(size=64) + 3
    base = sae(W, b, np.zeros(200))
    for change, z in (
        ({"b_pre": torch.from_numpy(pre_bias.astype(np.float32))}, None),
        ({"input": Input("none", scale=1 / 3)}, None),
    ):
        weights = replace(base, **change)
        z = x.double().numpy()
        z = z - pre_bias.astype(np.float32).astype(np.float64) if "b_pre" in change else z / 3
        pre = z @ weights.W_enc.double().numpy() + b
        cut = pre[rng.integers(0, 600, 200), np.arange(200)]
        weights = replace(weights, threshold=torch.from_numpy(cut.astype(np.float32)))
        # Subtracting in float32 rounds |x| - and |b| - sized numbers: as the reference does.
        assert check(weights, x, z) > 10_000


def test_all_none_and_one_feature_everywhere() -> None:
    rng = np.random.default_rng(7)
    x = torch.from_numpy(rng.normal(size=(1100, 32))).bfloat16()
    W = rng.normal(size=(32, 77))
    always = sae(W, np.full(77, 1e4), np.ones(77))
    assert check(always, x) == 1100 * 77
    assert check(sae(W, np.full(77, -1e4), np.ones(77)), x) == 0
    one = np.full(77, -1e4)
    one[33] = 1e4
    assert check(sae(W, one, np.ones(77)), x) == 1100


def test_halves_of_integers_that_are_all_lost_one_way() -> None:
    """Weights and activations half a step of their integers off, on the same side.

    Tokens come with their opposites, that their mean is 0; the largest of each is 127 steps. Weights and
    activations are in proportion, so that nothing is gained by balancing them.
    """
    d, tokens = 320, 40
    off = np.full(d, 40.499)
    off[:65] = 127
    z = np.outer(np.where(np.arange(tokens) % 2, -1.0, 1.0), off) / 64
    w = off / 1024
    x = torch.from_numpy(z.astype(np.float32))
    product = float(w.astype(np.float32).astype(np.float64) @ x[0].double().numpy())
    threshold = np.array([product * (1 - 2.0**-18), product * (1 + 2.0**-18), product * 0.99, product * 1.01])
    assert check(sae(np.outer(w, np.ones(4)), np.zeros(4), threshold), x) == tokens // 2 * 2


@pytest.mark.parametrize("first", [0.0, 1.0, 1000.0])
def test_later_tokens_are_unlike_the_first(first: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is learnt of the first block, a mean and loud dimensions, is wrong of all that follow.

    Some dimensions of it are silent, and some weights.
    """
    monkeypatch.setattr(screen, "TOKENS", 128)
    rng = np.random.default_rng(8)
    x = rng.normal(size=(1000, 70)) * np.exp(2 * rng.normal(size=70))
    x[:128] = rng.normal(size=(128, 70)) * first + rng.normal(size=70) * 50 * first
    x[:128, ::9] = 0
    x[700:720] = 0
    x = torch.from_numpy(x).bfloat16()
    W = rng.standard_cauchy(size=(70, 300))
    W[:, 7] = 0
    W[3::9] = 0
    b = rng.normal(size=300) * 3
    pre = x.double().numpy() @ W.astype(np.float32).astype(np.float64) + b
    assert check(sae(W, b, pre[rng.integers(128, 1000, 300), np.arange(300)]), x) > 10_000


def test_tokens_that_are_all_alike() -> None:
    """Less their mean they are nothing but its rounding."""
    rng = np.random.default_rng(9)
    x = torch.from_numpy(np.repeat(rng.normal(size=(1, 65)) * 100, 200, axis=0)).bfloat16()
    W = rng.normal(size=(65, 60)).astype(np.float32)
    pre = x[0].double().numpy() @ W.astype(np.float64)
    off = np.where(np.arange(60) % 2, 1 - 2.0**-16, 1 + 2.0**-16)
    threshold = np.abs(pre) * off
    assert check(sae(W * np.sign(pre), np.zeros(60), threshold), x) == 200 * 30


def refined(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and candidates of every call of `_refine` from now on."""
    seen: list[tuple[int, int]] = []
    inner = screen._refine

    def outer(*args: object) -> tuple[int, int]:
        seen.append(inner(*args))
        return seen[-1]

    monkeypatch.setattr(screen, "_refine", outer)
    return seen


def test_few_are_refined(cheap: type[Cheap], monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound that is too wide would show in speed only; loud dimensions and a mean do not make it so."""
    seen = refined(monkeypatch)
    rng = np.random.default_rng(10)
    x = rng.normal(size=(2048, 576)) * np.where(np.arange(576) % 50, 1, 20) + rng.normal(size=576) * 5
    x = torch.from_numpy(x).bfloat16()
    W = rng.normal(size=(576, 500)) * np.where(np.arange(576) % 40, 1, 10)[:, None]
    pre = x.double().numpy() @ W
    weights = sae(W, np.zeros(500), np.quantile(pre, 0.98, axis=0))
    active = check(weights, x)
    rows, candidates = np.sum(seen, axis=0)
    assert active <= rows < 1.01 * active
    assert 1 < candidates / active < (1.5 if cheap is Bfloat else 3.2)


def test_where_many_are_refined_bfloat16_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = refined(monkeypatch)
    monkeypatch.setattr(screen, "TOKENS", 128)
    monkeypatch.setattr(screen, "worth_refining", lambda: 0.01)
    rng = np.random.default_rng(11)
    x = torch.from_numpy(rng.normal(size=(640, 64))).bfloat16()
    W = rng.normal(size=(64, 90))
    few, many = (np.quantile(x.double().numpy() @ W, q, axis=0) for q in (0.999, 0.8))
    for threshold, kind in ((few, Int8), (many, Bfloat)):
        weights = sae(W, np.zeros(90), threshold)
        encoder = Encoder(weights, CPU)
        assert encoder.cut is not None
        encoder.screen = Screen(encoder.weight, encoder.bias[:, 0], encoder.cut.floor, Int8)
        seen.clear()
        encoder.encode(x)
        assert type(encoder.screen.cheap) is kind
        assert check(weights, x) > 0
    assert seen[1][1] < seen[0][1]


def test_int8_only_where_it_is_right_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that saturate, as on processors without instructions for them, are found out."""
    seconds = [1.0, 10.0]
    monkeypatch.setattr(choose, "_least", lambda *runs: seconds)

    def said() -> tuple[int, type[Cheap]]:
        choose.steps.cache_clear()
        choose._seconds.cache_clear()
        return choose.steps(), choose.fastest()

    def saturating(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """As without such instructions: a + 128 unsigned, pairs added up in 16 bits."""
        total = torch.zeros_like(out)
        for i in range(0, len(b), 2):
            total += ((a[:, i : i + 2].int() + 128) @ b[i : i + 2].int()).clamp(-(2**15), 2**15 - 1)
        return out.copy_(total - 128 * b.int().sum(dim=0))

    def refusing(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such product")

    def exact(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(a.double() @ b.double())

    for product, found in (
        (exact, (127, Int8)),
        (saturating, (64, Int8)),
        (refusing, (0, Bfloat)),
        (lambda a, b, out: exact(a, b, out).add_(1), (0, Bfloat)),
    ):
        monkeypatch.setattr(torch, "_int_mm", product)
        assert said() == found
    monkeypatch.setattr(torch, "_int_mm", exact)
    seconds[0] = 9.0
    assert said() == (127, Bfloat)
    monkeypatch.delattr(torch, "_int_mm")
    seconds[0] = 1.0
    assert said() == (0, Bfloat)
    choose.steps.cache_clear()
    choose._seconds.cache_clear()


def test_fewer_steps(cheap: type[Cheap], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on processors on which more would overflow."""
    monkeypatch.setattr(choose, "steps", lambda: 64)
    products = screen.Int8(torch.eye(8), torch.zeros(8), torch.ones(8)).products(np.eye(8, dtype=np.float32))
    assert products.tokens(-np.eye(8, dtype=np.float32)).columns.abs().max() == 64
    rng = np.random.default_rng(12)
    x = torch.from_numpy(rng.normal(size=(700, 96)) + rng.normal(size=96)).bfloat16()
    W = rng.normal(size=(96, 300))
    pre = x.double().numpy() @ np.asarray(W, np.float32).astype(np.float64)
    assert check(sae(W, np.zeros(300), pre[rng.integers(0, 700, 300), np.arange(300)]), x) > 10_000
