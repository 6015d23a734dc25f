"""The CUDA path against the reference; `make gpu` runs it where there is a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from test_encode import rows
from test_rules import RULES, formula, listed, make_case, normed_case, small_blocks

import queries
from sae_runtime import reference
from sae_runtime.bfloat import to_float
from sae_runtime.encode import Encoder
from sae_runtime.sae import SaeWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def test_the_encoder_on_a_gpu_is_the_reference_up_to_float32_rounding():
    generator = torch.Generator().manual_seed(0)
    d, m, tokens = 96, 5001, 3000
    weight = torch.randn(d, m, generator=generator) / d**0.5
    zeros = torch.zeros(m)
    sae = SaeWeights("jumprelu", weight, zeros, weight.T.contiguous(), torch.zeros(d), threshold=zeros + 2.0)
    x = torch.randn(tokens, d, generator=generator).bfloat16()
    found = Encoder(sae, torch.device("cuda")).encode(x.cuda())
    dense = np.zeros((tokens, m), np.float32)
    dense[found.token, np.repeat(np.arange(m), np.diff(found.indptr))] = to_float(found.code)
    pre = x.float() @ sae.W_enc
    border = (pre - 2.0).abs() <= 2.0**-19 * x.float().norm(dim=1)[:, None] * sae.W_enc.norm(dim=0)
    wanted = reference.stored(reference.encode(x, sae)).numpy()
    wrong = ((dense > 0) != (wanted > 0)) & ~border.numpy()
    assert not wrong.any()
    both = (dense > 0) & (wanted > 0)
    assert np.abs(dense[both] / wanted[both] - 1).max() <= 2.0**-7
    assert (dense[both] != wanted[both]).mean() < 0.01


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(5))
def test_every_rule_on_a_gpu_is_exact_on_integers(
    rule: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    extras = ({"b_pre"}, {"glu"}, {"scale"}, {"sunk", "glu"}, {"scale", "b_pre", "glu"})[seed]
    case = make_case(seed, rule, 70, 4104, (27, 8, 1, 108, 513)[seed], (1, 3, 9, 1, 2)[seed], extras)
    for blocks in (None, 13):
        if blocks:
            small_blocks(monkeypatch, blocks, 1000)
        found = Encoder(case.weights(), torch.device("cuda")).encode(case.inputs().cuda())
        assert rows(found) == listed(formula(case))


KERNELS = [rule for rule in RULES if rule != "groupmax"]


@pytest.mark.parametrize("rule", KERNELS)
@pytest.mark.parametrize(
    ("tokens", "width", "d", "k"), [(1, 1, 1, 1), (129, 127, 65, 127), (1000, 40000, 64, 70)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_on_a_gpu_are_exact_on_integers(
    rule: str, tokens: int, width: int, d: int, k: int, dtype: torch.dtype
) -> None:
    """One of everything, both sides of a tile's edge, and more features than are ranked in registers."""
    case = make_case(tokens, rule, tokens, width, k, 2, set(), d)
    encoder = Encoder(case.weights(), torch.device("cuda"))
    assert encoder.kernels is not None
    assert rows(encoder.encode(case.inputs(dtype).cuda())) == listed(formula(case))


@pytest.mark.parametrize("rule", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_and_torch_operators_agree_and_do_so_each_time(
    rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random floats, float32 weights: values within the contract's margin, the same bytes again."""
    generator = torch.Generator().manual_seed(1)
    d, m, tokens, width = 2304, 4000, 3000, 4000
    x = torch.randn(tokens, d, generator=generator)
    x[:, 7] *= 300
    x = x.to(dtype).cuda()
    more = {"k": 60} if rule in ("topk", "topk_signed", "abstopk") else {}
    more |= {"threshold": torch.full((m,), 2.0)} if rule == "jumprelu" else {}
    more |= {"b_gate": torch.full((m,), -2.0), "r_mag": torch.zeros(m)} if rule == "gated" else {}
    W = torch.randn(d, m, generator=generator) / d**0.5
    sae = SaeWeights(rule, W, torch.randn(m, generator=generator), **more)
    encoder = Encoder(sae, torch.device("cuda"))
    monkeypatch.setattr("sae_runtime.triton_encode._ROWS_PER_TOKEN", 1)
    found, again = encoder.encode(x), Encoder(sae, torch.device("cuda")).encode(x)
    for column in ("indptr", "token", "code"):
        assert (getattr(found, column) == getattr(again, column)).all()
    encoder.kernels = None
    other = encoder.encode(x)
    dense = [np.zeros((tokens, width), np.float32) for _ in range(2)]
    for f, at in zip((found, other), dense, strict=True):
        at[f.token, np.repeat(np.arange(width), np.diff(f.indptr))] = to_float(f.code)
    both = (dense[0] != 0) & (dense[1] != 0)
    assert both.sum() >= 0.9995 * max(found.rows, other.rows)
    margin = 2.0**-19 * (x.float().norm(dim=1)[:, None].cpu() * W.norm(dim=0)).numpy()
    allowed = np.abs(dense[1]) * 2.0**-7 + margin
    assert (np.abs(dense[0] - dense[1])[both] <= allowed[both]).all()
    assert (dense[0] == dense[1])[both].mean() > 0.99
    if rule == "jumprelu":
        exact = (x.double() @ W.cuda().double()).cpu().numpy() + sae.b_enc.double().numpy()
        assert ((dense[0] > 0) == (exact > 2.0))[np.abs(exact - 2.0) > margin].all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("norm", ["none", "constant_norm", "unit_rms", "center", "layer_norm"])
def test_the_reconstruction_on_a_gpu(rule: str, norm: str) -> None:
    case, how = normed_case(norm, rule)
    d = case.x.shape[1]
    rng = np.random.default_rng(0)
    case.tensors["W_dec"] = rng.integers(-3, 4, (36, d)).astype(np.float64)
    case.tensors["b_dec"] = rng.integers(-3, 4, d).astype(np.float64)
    sae = case.weights(input=how)
    cpu, cuda = Encoder(sae, torch.device("cpu")), Encoder(sae, torch.device("cuda"))
    wanted = cpu.squared_error(case.inputs(), cpu.encode(case.inputs()))
    found = cuda.squared_error(case.inputs().cuda(), cuda.encode(case.inputs().cuda()))
    # A last bit of a norm decides between equal ranks, so a few tokens may differ.
    assert found == pytest.approx(wanted, rel=1e-5 if norm == "none" else 0.05)


def test_a_scan_on_a_gpu_gives_the_same_documents_and_nearly_the_same_rows(
    tmp_path, write_spec, scan_inline, tiny_index
):
    assert not scan_inline(write_spec(tmp_path, model={"device": "cuda"})).failed
    cpu, gpu = queries.connect(str(tiny_index)), queries.connect(str(tmp_path / "index"))
    assert not tiny.differences(
        {view: cpu.sql(f"FROM {view} ORDER BY ALL").fetchall() for view in ("contexts", "vocabulary")},
        {view: gpu.sql(f"FROM {view} ORDER BY ALL").fetchall() for view in ("contexts", "vocabulary")},
    )
    rows = "SELECT sum(n_tokens) FROM features"
    a, b = (con.sql(rows).fetchall()[0][0] for con in (cpu, gpu))
    assert abs(a - b) <= 0.001 * a
