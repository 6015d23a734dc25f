"""The loops in the place of a model's elementwise operators give the same bits as those, or stay out."""

from __future__ import annotations

from typing import Any

import families
import numpy as np
import pytest
import torch
from torch import nn

from sae_runtime import fused
from sae_runtime.model import LanguageModel, locate
from sae_runtime.sites import KINDS, Site

# torch's grouped products in bfloat16 refuse the small experts of these.
MIXTURES = {"gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe"}
ALL = sorted(set(families.FAMILIES) - MIXTURES)
NONE = {"gpt2"}  # has neither RMS norms nor gates nor rotary embeddings


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.int16), other.contiguous().view(torch.int16))


@pytest.mark.parametrize("family", ALL)
def test_every_site_of_every_family(models: Any, family: str) -> None:
    sites = [Site(n, kind) for n in range(4) for kind in KINDS if families.path(family, n, kind)]
    source = locate(str(models(family)))
    plain, fast = (LanguageModel(source, sites, "bfloat16", fused=f) for f in (False, True))
    changed = sum("forward" in vars(module) for module in fast.module.modules())
    assert (changed > 0) == (family not in NONE)
    assert not any("forward" in vars(module) for module in plain.module.modules())
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (3, 24), (2, 61)):
        ids = torch.from_numpy(rng.integers(3, 300, shape))
        wanted, found = plain.run(ids), fast.run(ids)
        for site in sites:
            assert same_bits(found[site], wanted[site]), site


def test_float32_models_keep_their_own_code(models: Any) -> None:
    model = LanguageModel(locate(str(models("llama"))), [Site(1, "resid_post")], "float32")
    assert not any("forward" in vars(module) for module in model.module.modules())


@pytest.mark.parametrize("place", ["gate_proj", "up_proj", "down_proj", "act_fn"])
def test_places_inside_an_mlp_keep_what_they_hold(models: Any, place: str) -> None:
    """A site on a part of a fused MLP has what the part gave, not what the loop wrote over it."""
    site = Site(1, f"mlp.{place}.output")
    source = locate(str(models("llama")))
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 300, (2, 30)))
    plain, fast = (LanguageModel(source, [site], "bfloat16", fused=f).run(ids)[site] for f in (False, True))
    assert same_bits(plain, fast)


class Norm(nn.Module):
    """Llama's norm, or Gemma's."""

    def __init__(self, width: int, gemma: bool, eps: float = 1e-6) -> None:
        super().__init__()
        self.gemma, self.eps = gemma, eps
        self.weight = nn.Parameter(torch.randn(width).bfloat16())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.gemma:
            return (wide * (1.0 + self.weight.float())).to(x.dtype)
        return self.weight * wide.to(x.dtype)


@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize("width", [1, 7, 8, 31, 33, 64, 100, 511, 512, 545, 576, 1000, 2304, 4099, 8191])
@torch.inference_mode()
def test_norms_of_any_width(width: int, gemma: bool) -> None:
    """Also of rows that are zero, huge, tiny or not finite."""
    torch.manual_seed(width)
    norm = Norm(width, gemma)
    plain, x = Norm.forward, torch.randn(300, width).bfloat16()
    for row, value in enumerate((0.0, 3e38, 1e-38, 1e-41, float("inf"), float("nan"))):
        x[row] *= value
    x[100:200] *= torch.randn(100, 1).exp2() * 100
    assert fused.fuse(norm) == (width != 7)  # less than a vector is summed in another order
    found, wanted = norm(x), plain(norm, x)
    finite = torch.isfinite(wanted)
    assert torch.equal(finite, torch.isfinite(found))
    assert same_bits(found[finite], wanted[finite])
    others = norm(x.float()), plain(norm, x.float())
    assert all(torch.equal(a, b) for a, b in zip(*(o.nan_to_num() for o in others), strict=True))


def test_what_no_loop_matches_keeps_its_own_code() -> None:
    class Odd(Norm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.01

    assert fused.fuse(Odd(64, gemma=False)) == 0

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(32, 32).bfloat16() for _ in range(3))
            self.act_fn = nn.SiLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    assert fused.fuse(Mlp()) == 0


@torch.inference_mode()
def test_every_value_of_an_activation_function() -> None:
    class Mlp(nn.Module):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (
                nn.Linear(64, 64, bias=False).bfloat16() for _ in range(3)
            )
            for part in (self.gate_proj, self.up_proj, self.down_proj):
                part.weight.copy_(torch.eye(64))
            self.act_fn = act

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    # One value a row: a row of the identity's product has nothing but zeros beside it.
    x = torch.diag_embed(every[torch.isfinite(every)].reshape(-1, 64)).flatten(0, 1)
    for act in (nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.ReLU()):
        mlp = Mlp(act)
        assert fused.fuse(mlp) == 1
        for part in x.split(1 << 14):
            found, wanted = mlp(part), Mlp.forward(mlp, part)
            assert torch.equal(torch.isfinite(found), torch.isfinite(wanted))
            assert torch.equal(found[torch.isfinite(found)], wanted[torch.isfinite(wanted)])
