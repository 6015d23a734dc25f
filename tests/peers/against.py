"""What the peers' tests share: a fixture's SAEs as we load them, inputs, and what agreement is.

Invariant: both sides read the same bytes. Ours is `reference.encode` of `suites.load`, the definition of an
activation; a peer's is its own code, in float32.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from published.base import Published

from sae_runtime import reference, suites
from sae_runtime.sae import SaeInfo, SaeWeights

SIZES = {"distinct": (6, 16, 5), "square": (8, 8, 8)}  # d, m, n: a square one shows nothing by its shape
MODEL = (6, 16, 6)  # for a peer whose outputs are as wide as its inputs


@dataclass(frozen=True)
class Ours:
    """One SAE of a fixture as we read it."""

    suite: Path
    published: Published
    info: SaeInfo
    weights: SaeWeights
    x: torch.Tensor  # float32 [200, d_in]

    @property
    def path(self) -> str:
        return self.info.path

    @property
    def file(self) -> Path:
        """The weights."""
        return Path(self.info.uri.removeprefix("file://"))

    def encode(self, x: torch.Tensor | None = None) -> torch.Tensor:
        return reference.encode(self.x if x is None else x, self.weights)

    def decode(self) -> torch.Tensor:
        """The reconstruction from our activations."""
        return reference.decode(self.encode(), self.x, self.weights)

    @property
    def d_out(self) -> int:
        assert self.weights.b_dec is not None
        return len(self.weights.b_dec)


def fixture(folder: Path, name: str, sizes: str, suite: str | None = None) -> list[Ours]:
    """The SAEs that `tests/published/<name>.py` writes, each found and loaded by us."""
    module: Any = importlib.import_module(f"published.{name}")
    at = folder / (suite or getattr(module, "name", name.replace("_", "-")))
    d, m, n = MODEL if sizes == "model" else SIZES[sizes]
    wanted = module.write(at, np.random.default_rng(3), d, m, n, 2)
    found = {sae.path: sae for sae in suites.find(str(at), site=wanted[0].site_option)}
    saes = []
    for sae in wanted:
        info = found[sae.path]
        saes.append(Ours(at, sae, info, suites.load(info), inputs(info.d_in)))
    return saes


def inputs(d: int) -> torch.Tensor:
    """Activations float32 [200, d], of a mean that is not 0."""
    x = np.random.default_rng(7).normal(size=(200, d)) * 3 + 0.5
    return torch.from_numpy(x.astype(np.float32))


def same(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """Equal up to float32 rounding, which may also decide a gate that a pre-activation lies on."""
    theirs = theirs.detach().float()
    assert ours.shape == theirs.shape, what
    assert (ours != 0).any(), f"{what}: nothing is active, this proves nothing"
    close = torch.isclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (~close).float().mean() < 1e-3, (what, ours[~close][:5], theirs[~close][:5])


def different(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """Not the same: a peer's difference that we know of is still there."""
    theirs = theirs.detach().float()
    assert ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2), (
        f"{what}: the difference that this test states is gone; read the peer's changes"
    )
