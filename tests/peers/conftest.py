"""The libraries that publish SAEs, or a skip that says which is missing. `make peers` installs them.

Nothing here is imported where the `peers` tests are not run: only fixtures import a peer.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest
from saelens_hub import SaeLens


def _peer(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peers' own imports
        return pytest.importorskip(name, reason=f"{name} is not installed: run `make peers`")


@pytest.fixture
def sae_lens(monkeypatch: pytest.MonkeyPatch) -> SaeLens:
    """SAELens, reading folders of this machine as though they were Hugging Face repositories."""
    _peer("sae_lens")
    return SaeLens(monkeypatch)


@pytest.fixture
def sparsify() -> ModuleType:
    """EleutherAI's eai-sparsify."""
    return _peer("sparsify")


@pytest.fixture
def dictionary_learning() -> Iterator[ModuleType]:
    """dictionary_learning's `utils`. It imports nnsight for the name `LanguageModel`, no loader uses it."""
    before = sys.modules.get("nnsight")
    if before is None:
        stand_in = types.ModuleType("nnsight")
        stand_in.LanguageModel = object  # type: ignore[attr-defined]
        sys.modules["nnsight"] = stand_in
    _peer("dictionary_learning")
    yield _peer("dictionary_learning.utils")
    if before is None:
        sys.modules.pop("nnsight")


@pytest.fixture
def llamascopium() -> ModuleType:
    """OpenMOSS's llamascopium: the module that loads by `sae_type`, with all types known to it."""
    _peer("llamascopium.models")
    return _peer("llamascopium.models.sparse_dictionary")


@pytest.fixture
def circuit_tracer() -> ModuleType:
    """circuit-tracer's package of transcoders, with its modules."""
    _peer("circuit_tracer.transcoder.cross_layer_transcoder")
    return _peer("circuit_tracer.transcoder")
