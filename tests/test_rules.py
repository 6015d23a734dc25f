"""Every rule of the common form: the encoders and the reference against the formulas, exactly.

Inputs and weights are small integers (scales are powers of two, GLU gates 0, 1/2 or 1), so float32 sums
have no error, ranks are equal all the time and a single wrong choice among equals shows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_encode import Rows, TorchEncoder, bfloat16, rows

from sae_runtime import encode, reference
from sae_runtime.encode import Encoder
from sae_runtime.sae import Input, SaeWeights

CPU = torch.device("cpu")
RANKED = ("topk", "topk_signed", "abstopk", "groupmax")
RULES = ("relu", "jumprelu", "gated", *RANKED)
BOTH = pytest.mark.parametrize("kind", [Encoder, TorchEncoder])


@dataclass(frozen=True)
class Case:
    """Inputs [tokens, d] and the tensors of an SAE by name, float64, with what is not a tensor."""

    rule: str
    x: np.ndarray
    tensors: dict[str, np.ndarray]
    k: int | None = None

    def weights(self, **more: Any) -> SaeWeights:
        given = {name: torch.from_numpy(t.astype(np.float32)) for name, t in self.tensors.items()}
        return SaeWeights(rule=self.rule, k=self.k, **given, **more)  # type: ignore[arg-type]

    def inputs(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.from_numpy(self.x).to(dtype)


def make_case(
    seed: int, rule: str, tokens: int, width: int, k: int, spread: int, extras: set[str], d: int = 6
) -> Case:
    """Integers of at most `spread`; `extras` are names of optional tensors to have."""
    rng = np.random.default_rng(seed)

    def integers(most: int, *shape: int) -> np.ndarray:
        return rng.integers(-most, most + 1, shape).astype(np.float64)

    x, t = (
        integers(spread, tokens, d),
        {"W_enc": integers(spread, d, width), "b_enc": integers(spread, width)},
    )
    if "sunk" in extras:
        t["b_enc"] -= 10 * spread * spread  # nothing is positive, or almost
    if "b_pre" in extras:
        t["b_pre"] = integers(spread, d)
    if rule == "gated":
        # u itself is met by -b_gate now and then
        t["b_gate"], t["r_mag"] = integers(4 * spread, width), np.zeros(width)
    elif "glu" in extras:
        t["W_glu"], t["b_glu"] = 256 * integers(1, d, width), np.zeros(width)
    if "scale" in extras and rule not in ("gated", "relu"):
        t["select_scale"] = 2.0 ** rng.integers(-3, 4, width)
    if rule == "jumprelu":
        found = ranks(Case(rule, x, t))
        t["threshold"] = found[rng.integers(0, tokens, width), np.arange(width)]
        t["threshold"][rng.random(width) < 0.2] = -1
    return Case(rule, x, t, k if rule in RANKED else None)


def pre(case: Case) -> np.ndarray:
    t = case.tensors
    z = case.x - t.get("b_pre", 0)
    found = z @ t["W_enc"] + t["b_enc"]
    if "W_glu" in t:
        found = found / (1 + np.exp(np.clip(-(z @ t["W_glu"] + t["b_glu"]), -700, 700)))
        found[np.abs(found) < 1e-30] = 0  # what the closed gate leaves in float64
    return found


def ranks(case: Case) -> np.ndarray:
    return pre(case) * case.tensors.get("select_scale", 1.0)


def formula(case: Case) -> np.ndarray:
    """Activations [tokens, width] in float64, token by token where a rule ranks."""
    if case.rule == "gated":
        t = case.tensors
        u = (case.x - t.get("b_pre", 0)) @ t["W_enc"]
        return np.where(u + t["b_gate"] > 0, np.maximum(np.exp(t["r_mag"]) * u + t["b_enc"], 0), 0)
    p, r = pre(case), ranks(case)
    if case.rule == "relu":
        return np.maximum(p, 0)
    if case.rule == "jumprelu":
        return np.where(r > case.tensors["threshold"], np.maximum(p, 0), 0)
    assert case.k is not None
    f = np.zeros_like(p)
    for token in range(len(p)):
        order = abs(r[token]) if case.rule == "abstopk" else r[token]
        if case.rule == "groupmax":
            size = p.shape[1] // case.k
            kept = [g + int(np.argmax(order[g : g + size])) for g in range(0, p.shape[1], size)]
        else:
            kept = sorted(range(p.shape[1]), key=lambda i, order=order: (-order[i], i))[: case.k]
        f[token, kept] = p[token, kept]
    return f if case.rule in ("topk_signed", "abstopk") else np.maximum(f, 0)


def listed(f: np.ndarray) -> Rows:
    stored = bfloat16(f)
    feature, token = np.nonzero(stored.T)
    return list(zip(feature.tolist(), token.tolist(), stored[token, feature].tolist(), strict=True))


def small_blocks(patch: pytest.MonkeyPatch, tokens: int, features: int) -> None:
    patch.setattr(encode, "TOKENS_PER_BLOCK", tokens)
    patch.setattr(encode, "FEATURES_PER_BLOCK", features)
    patch.setattr(encode, "VALUES_PER_BLOCK", 1)
    patch.setattr(encode, "_FEWEST", tokens)


@BOTH
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 12),
    groups=st.integers(1, 12),
    size=st.integers(1, 30),
    whole=st.booleans(),
    spread=st.sampled_from([1, 2, 9]),
    extras=st.sets(st.sampled_from(["sunk", "b_pre", "glu", "scale"])),
    token_block=st.integers(1, 9),
    feature_block=st.integers(1, 17),
    cut=st.integers(0, 12),
)
@example(0, 3, 12, 30, True, 1, set(), 2, 7, 1)
def test_rules(
    kind: type[Encoder], rule: str, seed: int, tokens: int, groups: int, size: int, whole: bool, spread: int,
    extras: set[str], token_block: int, feature_block: int, cut: int,
) -> None:  # fmt: skip
    """Few or many kept, all of them (`whole`), whatever the blocks and however the tokens are split."""
    width = groups * size
    case = make_case(seed, rule, tokens, width, width if whole else groups, spread, extras)
    wanted = listed(formula(case))
    assert listed(reference.encode(case.inputs(), case.weights()).double().numpy()) == wanted
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch, token_block, feature_block)
        encoder = kind(case.weights(), CPU)
        found = encoder.encode(case.inputs())
        assert found.indptr.shape == (width + 1,)
        assert rows(found) == wanted
        apart = [
            (feature, token + start, value)
            for start, stop in ((0, cut), (cut, tokens))
            for feature, token, value in rows(encoder.encode(case.inputs()[start:stop]))
        ]
        assert sorted(apart) == wanted


@BOTH
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_wide_block_of_low_precision_inputs(kind: type[Encoder], rule: str, dtype: torch.dtype) -> None:
    """Default blocks; more features than the loop passes over at once, and than a block holds."""
    case = make_case(1, rule, 70, 4104, 27, 3, {"b_pre"})
    assert rows(kind(case.weights(), CPU).encode(case.inputs(dtype))) == listed(formula(case))


@BOTH
@pytest.mark.parametrize("rule", RANKED)
def test_all_equal(kind: type[Encoder], rule: str) -> None:
    """The lowest features of equals; zeros leave no row, negative ones only under the signed rules."""
    for level in (5.0, 0.0, -5.0):
        tensors = {"W_enc": np.zeros((2, 200)), "b_enc": np.full(200, level)}
        case = Case(rule, np.ones((3, 2)), tensors, 8)
        kept = range(0, 200, 25) if rule == "groupmax" else range(8)
        signed = rule in ("topk_signed", "abstopk")
        wanted = [(f, t, level) for f in kept for t in range(3) if level > 0 or (level and signed)]
        assert rows(kind(case.weights(), CPU).encode(case.inputs())) == wanted
        assert listed(formula(case)) == wanted


@BOTH
@pytest.mark.parametrize("rule", RANKED)
def test_one_above_many_equals(kind: type[Encoder], rule: str) -> None:
    """The winner is last, so it must push out the last of the equals that were taken before it."""
    b = np.full(300, 4.0)
    b[[0, 299]] = -9, 7
    case = Case(rule, np.ones((2, 1)), {"W_enc": np.zeros((1, 300)), "b_enc": b}, 3)
    kept = {
        "topk": [(1, 4.0), (2, 4.0), (299, 7.0)],
        "topk_signed": [(1, 4.0), (2, 4.0), (299, 7.0)],
        "abstopk": [(0, -9.0), (1, 4.0), (299, 7.0)],
        "groupmax": [(1, 4.0), (100, 4.0), (299, 7.0)],
    }[rule]
    assert rows(kind(case.weights(), CPU).encode(case.inputs())) == [
        (f, t, v) for f, v in kept for t in (0, 1)
    ]


@BOTH
@pytest.mark.parametrize("rule", RULES)
def test_what_rounds_to_nothing_leaves_no_row_but_takes_its_place(kind: type[Encoder], rule: str) -> None:
    """A float32 below half the smallest bfloat16 is a zero in the index; it still is one of the k."""
    tiny = float(np.array([0x8000], np.uint32).view(np.float32)[0])
    above = float(np.array([0x8001], np.uint32).view(np.float32)[0])
    b = np.array([-tiny, tiny, above, -above])
    tensors = {"W_enc": np.zeros((1, 4)), "b_enc": b}
    if rule == "jumprelu":
        tensors["threshold"] = np.zeros(4)
    if rule == "gated":
        tensors |= {"b_gate": np.ones(4), "r_mag": np.zeros(4)}
    least = 2.0**-133
    wanted = {
        "topk_signed": [(2, 0, least), (3, 0, -least)],
        "abstopk": [(2, 0, least), (3, 0, -least)],
    }.get(rule, [(2, 0, least)])
    case = Case(rule, np.ones((1, 1)), tensors, 4 if rule in RANKED else None)
    assert rows(kind(case.weights(), CPU).encode(case.inputs())) == wanted


@BOTH
@pytest.mark.parametrize("rule", ["jumprelu", "gated", *RANKED])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.sampled_from([5, 60]))
@example(seed=60940215, k=5)  # a gated activation that a product and a sum rounded once would change
def test_scales_of_any_value_decide_as_the_reference_does(
    kind: type[Encoder], rule: str, seed: int, k: int
) -> None:
    """Products are exact, but scaling them rounds: thresholds lie on, or one float beside, rounded ranks."""
    case = make_case(seed, rule, 9, 60, k, 4, {"scale"})
    rng = np.random.default_rng(seed)
    more = {}
    if rule == "gated":
        more["r_mag"] = torch.from_numpy(rng.normal(size=60).astype(np.float32) * 3)
    else:
        scale = np.exp(rng.normal(size=60) * 3).astype(np.float32)
        scale[:3] = 0, 1e-45, 1e-30  # a scale of nothing, and ranks that round to nothing
        more["select_scale"] = torch.from_numpy(scale)
    sae = replace(case.weights(), **more)
    if rule == "jumprelu":
        rank = (case.x @ case.tensors["W_enc"] + case.tensors["b_enc"]).astype(np.float32) * scale
        threshold = rank[rng.integers(0, 9, 60), np.arange(60)]
        beside = np.nextafter(threshold, rng.choice(np.float32([-np.inf, np.inf]), 60))
        threshold = np.where(rng.random(60) < 0.5, threshold, beside)
        sae = replace(sae, threshold=torch.from_numpy(threshold))
    wanted = reference.encode(case.inputs(), sae)
    assert rows(kind(sae, CPU).encode(case.inputs())) == listed(wanted.double().numpy())


@BOTH
@pytest.mark.parametrize("rule", RANKED)
def test_ranks_of_zero_of_either_sign_are_equal(kind: type[Encoder], rule: str) -> None:
    """A scale of 0 makes -0 of a negative number; the lower feature still comes first."""
    tensors = {
        "W_enc": np.zeros((1, 4)),
        "b_enc": np.array([-3.0, 3.0, -3.0, 3.0]),
        "select_scale": np.zeros(4),
    }
    case = Case(rule, np.ones((1, 1)), tensors, 2)
    wanted = {"topk": [(1, 0, 3.0)], "groupmax": []}.get(rule, [(0, 0, -3.0), (1, 0, 3.0)])
    assert listed(reference.encode(case.inputs(), case.weights()).double().numpy()) == wanted
    assert rows(kind(case.weights(), CPU).encode(case.inputs())) == wanted


def test_a_gate_met_exactly_is_closed() -> None:
    tensors = {"W_enc": np.ones((1, 3)), "b_enc": np.full(3, 10.0)}
    tensors |= {"b_gate": np.array([-2.0, -1.5, 3.0]), "r_mag": np.zeros(3)}
    case = Case("gated", np.array([[2.0], [1.5], [-3.0], [-12.0]]), tensors)
    wanted = [(1, 0, 12.0), (2, 0, 12.0), (2, 1, 11.5)]
    for kind in (Encoder, TorchEncoder):
        assert rows(kind(case.weights(), CPU).encode(case.inputs())) == wanted


# --- what happens to an activation before it is encoded, and to the reconstruction after

NORMS: dict[str, tuple[Input, int]] = {
    "none": (Input(scale=0.25), 4),
    "constant_norm": (Input("constant_norm", 4.0), 4),
    "unit_rms": (Input("unit_rms", 0.5, eps=0.0), 4),
    "center": (Input("center", 2.0), 4),
    "layer_norm": (Input("layer_norm", 2.0, eps=0.0), 5),
}


def normalised(x: np.ndarray, how: Input) -> np.ndarray:
    mean = x.mean(axis=1, keepdims=True)
    scaled = {
        "none": lambda: x,
        "constant_norm": lambda: x * np.sqrt(x.shape[1]) / np.sqrt((x**2).sum(axis=1, keepdims=True)),
        "unit_rms": lambda: x / np.sqrt((x**2).mean(axis=1, keepdims=True) + how.eps),
        "center": lambda: x - mean,
        "layer_norm": lambda: (
            (x - mean) / (np.sqrt(((x - mean) ** 2).sum(axis=1, keepdims=True) / (x.shape[1] - 1)) + how.eps)
        ),
    }
    return scaled[how.norm]() * how.scale


def restored(y: np.ndarray, x: np.ndarray, how: Input) -> np.ndarray:
    mean = x.mean(axis=1, keepdims=True)
    y = y / how.scale
    if how.norm == "constant_norm":
        return y * np.sqrt((x**2).mean(axis=1, keepdims=True))
    if how.norm == "unit_rms":
        return y * np.sqrt((x**2).mean(axis=1, keepdims=True) + how.eps)
    if how.norm == "layer_norm":
        return y * (x.std(axis=1, ddof=1, keepdims=True) + how.eps) + mean
    return y + mean if how.norm == "center" else y


def normed_case(name: str, rule: str) -> tuple[Case, Input]:
    """Inputs whose norms, means and deviations are powers of two or integers."""
    how, d = NORMS[name]
    rng = np.random.default_rng(3)
    case = make_case(3, rule, 40, 36, 6, 4, {"b_pre"}, d)
    size = 2.0 ** rng.integers(-3, 4, (40, 1))
    if name in ("constant_norm", "unit_rms"):
        x = size * rng.choice([-1.0, 1.0], (40, d))
    elif name == "layer_norm":
        x = size * rng.permuted(np.tile([1.0, 1.0, -1.0, -1.0, 0.0], (40, 1)), axis=1) + rng.integers(
            -4, 5, (40, 1)
        )
    else:
        x = 4 * rng.integers(-5, 6, (40, d)).astype(np.float64)
    if rule == "jumprelu":
        case.tensors["threshold"] = np.full(36, 2.5)
    return replace(case, x=x), how


@BOTH
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NORMS)
def test_inputs_are_normalised_token_by_token(kind: type[Encoder], rule: str, name: str) -> None:
    case, how = normed_case(name, rule)
    z = normalised(case.x, how)
    inner = replace(case, x=z)
    sae = case.weights(input=how)
    found = kind(sae, CPU).encode(case.inputs())
    if name == "layer_norm":  # torch's deviation is off by a last bit, so ties are not met
        assert reference.inputs(case.inputs(), sae).numpy() == pytest.approx(
            z - case.tensors["b_pre"], abs=1e-6
        )
        assert rows(found) == listed(reference.encode(case.inputs(), sae).double().numpy())
        return
    assert (reference.inputs(case.inputs(), sae).double().numpy() == z - case.tensors["b_pre"]).all()
    assert rows(found) == listed(formula(inner))


@BOTH
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("transcoder", [False, True])
def test_squared_error(kind: type[Encoder], rule: str, name: str, transcoder: bool) -> None:
    """Against the raw input, un-normalised; a transcoder against another site's activation, as it is."""
    case, how = normed_case(name, rule)
    d, n = case.x.shape[1], 7 if transcoder else case.x.shape[1]
    rng = np.random.default_rng(4)
    W_dec, b_dec, W_skip = (rng.integers(-3, 4, s).astype(np.float64) for s in ((36, n), (n,), (d, n)))
    tensors = {"W_dec": W_dec, "b_dec": b_dec, **({"W_skip": W_skip} if transcoder else {})}
    sae = replace(case, tensors={**case.tensors, **tensors}).weights(input=how, restore=not transcoder)
    z = normalised(case.x, how)
    f = formula(replace(case, x=z))
    if name == "layer_norm":
        f = reference.encode(case.inputs(), sae).double().numpy()
    y = reference.stored(torch.from_numpy(f)).double().numpy() @ W_dec + b_dec
    target = rng.integers(-9, 10, (40, n)).astype(np.float64) if transcoder else case.x
    y = y + z @ W_skip if transcoder else restored(y, case.x, how)
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch, 7, 5)
        encoder = kind(sae, CPU)
        given_target = torch.from_numpy(target) if transcoder else None
        found = encoder.squared_error(case.inputs(), encoder.encode(case.inputs()), given_target)
    assert found == pytest.approx(((target - y) ** 2).sum(), rel=1e-5)


def test_no_tokens_and_no_decoder() -> None:
    for rule in RULES:
        case = make_case(0, rule, 1, 12, 3, 2, set())
        for kind in (Encoder, TorchEncoder):
            encoder = kind(case.weights(), CPU)
            nothing = encoder.encode(case.inputs()[:0])
            assert (rows(nothing), nothing.indptr.tolist()) == ([], [0] * 13)
            assert not encoder.has_decoder
