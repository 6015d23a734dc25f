"""Our readers against circuit-tracer, which has one model width: inputs and outputs of these are as wide."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from against import Ours, different, fixture, same

pytestmark = pytest.mark.peers
sizes = pytest.mark.parametrize("sizes", ["model", "square"])


@sizes
def test_sets(tmp_path: Path, circuit_tracer: ModuleType, sizes: str) -> None:
    """Each layer's file of its own format. The other entries of its config are not read by its loader."""
    seen = set()
    for name in ("circuit_tracer", "circuit_tracer_wandb"):
        for sae in fixture(tmp_path, name, sizes):
            if sae.info.architecture.endswith("_clt") or sae.path.startswith("listed"):
                continue  # below; in the listed set the files are of other formats
            kind = sae.path.split("/")[0]
            seen.add(kind)
            if kind in ("forced", "old"):
                continue  # below; with one threshold for all features
            peer = load(circuit_tracer, sae)
            f = peer.encode(sae.x)
            if kind == "topk":
                # This version knows a top-k and does not take it from the config.
                different(sae.encode(), f, sae.path)
                top = circuit_tracer.activation_functions.TopK(int(sae.published.nominal_l0 or 0))
                f = top(peer.encode(sae.x, apply_activation_function=False))
            same(sae.encode(), f, sae.path)
            same(sae.decode(), peer.decode(f, sae.x), sae.path)
    assert {"relu", "jump", "skip", "jump_skip", "topk", "template"} <= seen


@sizes
def test_one_threshold_for_all(tmp_path: Path, circuit_tracer: ModuleType, sizes: str) -> None:
    sae = next(sae for sae in fixture(tmp_path, "circuit_tracer", sizes) if sae.path.startswith("old/"))
    same(sae.encode(), load(circuit_tracer, sae).encode(sae.x), sae.path)


@sizes
def test_a_threshold_outranks_the_configs_relu(
    tmp_path: Path, circuit_tracer: ModuleType, sizes: str
) -> None:
    sae = next(sae for sae in fixture(tmp_path, "circuit_tracer", sizes) if sae.path.startswith("forced/"))
    same(sae.encode(), load(circuit_tracer, sae).encode(sae.x), sae.path)


@sizes
def test_cross_layer(tmp_path: Path, circuit_tracer: ModuleType, sizes: str) -> None:
    seen = []
    for sae in fixture(tmp_path, "circuit_tracer", sizes):
        if not sae.path.startswith(("clt/", "jump_clt/")):
            continue
        seen.append(sae.path)
        clt = circuit_tracer.cross_layer_transcoder.load_clt(
            str(sae.file.parent), dtype=torch.float32, device=torch.device("cpu")
        )
        f = clt.encode(sae.x.expand(clt.n_layers, -1, -1))[sae.info.site.layer]
        same(sae.encode(), f, sae.path)
    assert len(seen) == 6


@sizes
def test_gemma_scope_transcoders(tmp_path: Path, circuit_tracer: ModuleType, sizes: str) -> None:
    for sae in fixture(tmp_path, "gemma_scope_transcoders", sizes):
        read = circuit_tracer.single_layer_transcoder.load_gemma_scope_transcoder
        peer = read(str(sae.file), sae.info.site.layer)
        same(sae.encode(), peer.encode(sae.x), sae.path)
        same(sae.decode(), peer(sae.x), sae.path)


@sizes
def test_gemma_scope_2_transcoders(tmp_path: Path, circuit_tracer: ModuleType, sizes: str) -> None:
    seen = set()
    for sae in fixture(tmp_path, "gemma_scope_2", sizes):
        if "transcoder" not in sae.info.architecture:
            continue
        seen.add(sae.info.architecture)
        read = circuit_tracer.single_layer_transcoder.load_gemma_scope_2_transcoder
        peer = read(str(sae.file), sae.info.site.layer)
        f = peer.encode(sae.x)
        # Its JumpReLU has no relu: a feature whose threshold is below 0 has negative activations there.
        assert (f < 0).any()
        same(sae.encode(), f.relu(), sae.path)
        different(sae.encode(), f, sae.path)
        same(sae.decode(), peer.decode(f.relu(), sae.x), sae.path)
    assert len(seen) == 2


def load(circuit_tracer: ModuleType, sae: Ours) -> torch.nn.Module:
    """A file of the library's own format."""
    read = circuit_tracer.single_layer_transcoder.load_relu_transcoder
    peer: torch.nn.Module = read(str(sae.file), sae.info.site.layer)
    return peer
