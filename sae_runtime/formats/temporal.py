"""Temporal SAEs (canrager/temporalSAEs): recognised, and refused.

    <folder>/latest_ckpt.safetensors  <folder>/conf.yaml

A temporal SAE predicts a token's code from the tokens before it by attention over the features, and
encodes what is left. Its features are not a function of one token's activation, which all of an index is
about: rows would depend on where a context begins, and the reference (reference.py) cannot say them.
"""

from __future__ import annotations

from sae_runtime.errors import InputError
from sae_runtime.formats.base import Candidate, Description
from sae_runtime.sae import SaeInfo, SaeWeights
from sae_runtime.tree import Tree, folder

WEIGHTS = "latest_ckpt.safetensors"


def candidates(tree: Tree) -> list[Candidate]:
    """One for each latest_ckpt.safetensors with a conf.yaml beside it."""
    there = set(tree.files)
    pairs = [(file, f"{file[: -len(WEIGHTS)]}conf.yaml") for file in tree.named(WEIGHTS)]
    return [Candidate(folder(file), (file, config)) for file, config in pairs if config in there]


def describe(tree: Tree, candidate: Candidate) -> Description:
    """Raises InputError: there is no temporal SAE that can be read."""
    raise _refusal(tree.path(candidate.files[0]))


def load(info: SaeInfo) -> SaeWeights:
    """Raises InputError, as `describe` does before."""
    raise _refusal(info.uri)


def _refusal(file: str) -> InputError:
    return InputError(
        f"saes: {file} is a temporal SAE: its features depend on the tokens before, so that a token alone "
        "has no activation; leave it out with saes.select"
    )
