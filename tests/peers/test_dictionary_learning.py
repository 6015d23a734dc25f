"""Our reader against dictionary_learning's own classes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from against import SIZES, Ours, different, fixture, same

from sae_runtime.formats.base import options

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("sizes", SIZES)
def test_each_class(tmp_path: Path, dictionary_learning: ModuleType, sizes: str) -> None:
    seen = set()
    for sae in fixture(tmp_path, "dictionary_learning", sizes):
        name = options(sae.info)["dict_class"]
        if "step" in sae.path:
            # An older file, without the tensors k and threshold: the library of today does not take it.
            with pytest.raises(RuntimeError, match="Missing key"):
                read(dictionary_learning, sae)
            continue
        peer = read(dictionary_learning, sae)
        seen.add(name)
        same(sae.encode(), peer.encode(sae.x), sae.path)
        same(sae.decode(), peer(sae.x), sae.path)
        if name == "AutoEncoder":
            # The library's default brings decoder columns to norm 1 and multiplies activations by that norm;
            # an index holds the activations of the file. What fires is the same.
            normed = peer_class(dictionary_learning, sae).from_pretrained(str(sae.file)).encode(sae.x)
            assert sae.weights.W_dec is not None
            same(sae.encode() * sae.weights.W_dec.norm(dim=1), normed, sae.path)
            different(sae.encode(), normed, sae.path)
        if name == "AutoEncoderTopK":
            # Beside its top-k the class can use a threshold; its default, and ours, is the top-k of a token.
            assert torch.equal(peer.encode(sae.x), peer.encode(sae.x, use_threshold=False))
        if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            # Over a batch what fires depends on the batch; the default, and ours, is the stored threshold.
            different(sae.encode(), peer.encode(sae.x, use_threshold=False), sae.path)
    assert len(seen) == 7


def peer_class(utils: ModuleType, sae: Ours) -> type:
    """The library's class that a trainer's config names."""
    found: type = getattr(utils, options(sae.info)["dict_class"])
    return found


def read(utils: ModuleType, sae: Ours) -> torch.nn.Module:
    """As the library loads it, but for an AutoEncoder's decoder, which is left as it is."""
    if options(sae.info)["dict_class"] == "AutoEncoder":
        return peer_class(utils, sae).from_pretrained(str(sae.file), normalize_decoder=False)
    peer: torch.nn.Module = utils.load_dictionary(str(sae.file.parent), "cpu")[0]
    return peer
