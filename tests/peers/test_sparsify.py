"""Our reader against eai-sparsify's `SparseCoder.load_from_disk`."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from against import SIZES, Ours, different, fixture, same

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("name", "count"), [("sparsify", 7), ("sparsify_transcoders", 6)])
def test_sparse_coders(tmp_path: Path, sparsify: ModuleType, name: str, count: int, sizes: str) -> None:
    saes = fixture(tmp_path, name, sizes)
    assert len(saes) == count
    for sae in saes:
        if sae.weights.rule == "abstopk":
            continue  # below
        peer = read(sparsify, sae)
        same(sae.encode(), dense(peer.encode(sae.x), sae), sae.path)
        same(sae.decode(), peer(sae.x).sae_out, sae.path)


@pytest.mark.parametrize("sizes", SIZES)
def test_signed(tmp_path: Path, sparsify: ModuleType, sizes: str) -> None:
    """The library dropped `signed` and its first files' decoder.weight: it no longer reads such a file.

    Its encoder alone can be loaded, and then keeps the k highest of the positive, not of the absolute values.
    """
    sae = next(sae for sae in fixture(tmp_path, "sparsify", sizes) if sae.weights.rule == "abstopk")
    with pytest.raises(RuntimeError, match="W_dec"):
        read(sparsify, sae)
    peer = read(sparsify, sae, decoder=False)
    theirs, ours = dense(peer.encode(sae.x), sae), sae.encode()
    different(ours, theirs, sae.path)
    pre = peer.encoder(sae.x - peer.b_dec).detach()
    kept = torch.zeros_like(pre).scatter(1, pre.abs().topk(peer.cfg.k, dim=1).indices, 1.0)
    same(ours, pre * kept, sae.path)


def read(sparsify: ModuleType, sae: Ours, decoder: bool = True) -> Any:
    """The library's own, in float32.

    The fixtures' width is not expansion_factor * d_in, as a published one's without num_latents is.
    """
    config = sae.file.parent / "cfg.json"
    cfg = json.loads(config.read_text())
    config.write_text(json.dumps({**cfg, "num_latents": cfg.get("num_latents") or sae.info.width}))
    return sparsify.SparseCoder.load_from_disk(sae.file.parent, decoder=decoder).float()


def dense(encoded: Any, sae: Ours) -> torch.Tensor:
    """[tokens, width] from the values and indices that the library gives."""
    zero = torch.zeros(len(sae.x), sae.info.width)
    return zero.scatter(1, encoded.top_indices, encoded.top_acts.detach())
