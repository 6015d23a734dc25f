"""Every published format: what is found, and activations as the formula gives them."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import published
import pytest
import torch
from published.base import Published

from sae_runtime import reference, suites
from sae_runtime.encode import Encoder
from sae_runtime.sites import Site

FORMATS = [name for _, name, _ in pkgutil.iter_modules(published.__path__) if name != "base"]
SIZES = {"distinct": (6, 16, 5), "square": (8, 8, 8)}  # d, m, n: a square one shows nothing by its shape
MARGIN = 2.0**-17  # of |x||w|, float32 against float64


def made(folder: Path, name: str, sizes: str) -> tuple[Path, list[Published]]:
    module: Any = importlib.import_module(f"published.{name}")
    suite = folder / getattr(module, "name", name.replace("_", "-"))
    d, m, n = SIZES[sizes]
    return suite, module.write(suite, np.random.default_rng(3), d, m, n, 2)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_what_the_files_say_is_found(tmp_path: Path, name: str, sizes: str) -> None:
    suite, wanted = made(tmp_path, name, sizes)
    options = {sae.site_option for sae in wanted}
    assert len(options) == 1
    found = suites.find(str(suite), site=options.pop())
    assert [sae.path for sae in found] == sorted(
        (sae.path for sae in wanted), key=lambda path: next((s.site, s.path) for s in found if s.path == path)
    )
    by_path = {sae.path: sae for sae in found}
    assert sorted(by_path) == sorted(sae.path for sae in wanted)
    for sae in wanted:
        have = by_path[sae.path]
        assert have.site == Site(sae.layer, sae.kind, sae.head), sae.path
        assert have.out == (None if sae.out is None else Site(*sae.out)), sae.path
        for field in ("architecture", "d_in", "width", "nominal_l0", "trained_on", "neuronpedia"):
            assert getattr(have, field) == getattr(sae, field), (sae.path, field)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_activations_are_the_formulas(tmp_path: Path, name: str, sizes: str) -> None:
    suite, wanted = made(tmp_path, name, sizes)
    found = {sae.path: sae for sae in suites.find(str(suite), site=wanted[0].site_option)}
    for sae in wanted:
        rng = np.random.default_rng(7)
        x = (rng.normal(size=(200, sae.d_in)) * 3 + 0.5).astype(np.float32)
        weights = suites.load(found[sae.path])
        f = sae.encode(x.astype(np.float64))
        assert f.shape == (200, sae.width)
        assert (f != 0).any(), "nothing fires: this proves nothing"
        have = reference.encode(torch.from_numpy(x), weights).double().numpy()
        # Rounding may move a value a little, and a pre-activation over its threshold where it lies on it.
        close = np.isclose(have, f, rtol=1e-4, atol=1e-4)
        assert (~close).mean() < 1e-3, (sae.path, np.argwhere(~close)[:5], have[~close][:5], f[~close][:5])
        if sae.decode is not None:
            y = reference.decode(torch.from_numpy(f).float(), torch.from_numpy(x), weights).double().numpy()
            assert np.allclose(y, sae.decode(x.astype(np.float64)), rtol=1e-3, atol=1e-3), sae.path
        fast = Encoder(weights, torch.device("cpu")).encode(torch.from_numpy(x))
        feature = np.repeat(np.arange(sae.width), np.diff(fast.indptr))
        dense = np.zeros((200, sae.width))
        dense[fast.token, feature] = (fast.code.astype(np.uint32) << 16).view(np.float32)
        stored = reference.stored(torch.from_numpy(have).float()).double().numpy()
        assert (np.isclose(dense, stored, rtol=2**-7, atol=1e-6)).mean() > 0.999, sae.path
