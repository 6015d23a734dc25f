"""The bfloat16 screen never hides what the float32 product shows: adversarial roundings, scales and tokens.

The truth is float64. Between it and the encoder stands the contract's margin, 2^-19 |x||w|, in which float32
rounding itself decides; outside of it every decision and, up to one bfloat16 step, every value must agree.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sae_runtime.encode import Encoder
from sae_runtime.sae import Input, SaeWeights

MARGIN = 2.0**-19


def sae(W: np.ndarray, b: np.ndarray, threshold: np.ndarray) -> SaeWeights:
    W, b, threshold = (torch.from_numpy(np.asarray(a, np.float32)) for a in (W, b, threshold))
    return SaeWeights("jumprelu", W.contiguous(), b, threshold=threshold)


def table(weights: SaeWeights, x: torch.Tensor) -> np.ndarray:
    """Activations as they are stored, dense float64 [tokens, width]."""
    found = Encoder(weights, torch.device("cpu")).encode(x)
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
