"""Our reader against llamascopium, OpenMOSS's own library."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from against import SIZES, Ours, different, fixture, same

pytestmark = pytest.mark.peers
sizes = pytest.mark.parametrize("sizes", SIZES)


@sizes
def test_saes_and_transcoders(tmp_path: Path, llamascopium: ModuleType, sizes: str) -> None:
    saes = fixture(tmp_path, "llamascopium", sizes)
    for sae in saes:
        peer, cfg = read(llamascopium, sae)
        hook_in, hook_out = cfg["hook_point_in"], cfg["hook_point_out"]
        # The library normalises outside of its encoder, and gives reconstructions of the normalised output.
        f = peer.encode(peer.normalize_activations({hook_in: sae.x})[hook_in])
        same(sae.encode(), f, sae.path)
        if sae.info.out is not None:  # the factor of a token-wise transcoder's output is not known
            same(sae.decode(), peer.decode(f) / peer.compute_norm_factor(sae.x, hook_out), sae.path)
        if cfg["norm_activation"] == "dataset-wise" and cfg["act_fn"] == "jumprelu":
            # Folded into the weights (an option of loading) activations have the scale of raw ones, and a
            # threshold that is not folded with them gates elsewhere. An index holds those of the file.
            folded, _ = read(llamascopium, sae, fold_activation_scale=True)
            different(sae.encode(), folded.encode(sae.x), sae.path)
    assert len(saes) >= 10


@sizes
def test_cross_layer(tmp_path: Path, llamascopium: ModuleType, sizes: str) -> None:
    """Each layer of a CLT beside all of them at once."""
    saes = fixture(tmp_path, "llamascopium_clt", sizes)
    for sae in saes:
        peer, cfg = read(llamascopium, sae)
        hooks, layer = cfg["hook_points_in"], sae.info.site.layer
        z = peer.normalize_activations(dict.fromkeys(hooks, sae.x))
        f = peer.encode(torch.stack([z[hook] for hook in hooks], dim=1))[:, layer]
        same(sae.encode(), f, sae.path)
    assert len(saes) >= 9


def read(llamascopium: ModuleType, sae: Ours, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The library's own and its config, whose `TopK` and type `transcoder` this version spells otherwise."""
    config = sae.file.parent / "config.json"
    cfg = json.loads(config.read_text())
    cfg |= {"act_fn": cfg["act_fn"].lower(), "sae_type": cfg["sae_type"].replace("transcoder", "sae")}
    config.write_text(json.dumps(cfg))
    return llamascopium.SparseDictionary.from_pretrained(str(sae.file.parent), **options), cfg
