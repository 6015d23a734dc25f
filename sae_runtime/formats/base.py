"""What a format's module gives, and the checks that all share.

A module of this folder reads one published format. It has

    candidates(tree) -> list[Candidate]      SAEs by file names (and small configs where names are shared)
    describe(tree, candidate) -> Description    from the config and the headers; refuses what is unknown
    load(info) -> SaeWeights                 tensors as published, in the common form

Invariant: a format is recognised from its files, never from the shape of a tensor; what a loader does
not know it refuses by name, with the reason, instead of encoding on a guess.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any

from sae_runtime.errors import InputError
from sae_runtime.sae import SaeInfo
from sae_runtime.sites import Site
from sae_runtime.weights import Header

JUMPRELU = "published encoder output: relu(pre) * (pre > threshold)"
RELU = "published encoder output: relu(pre)"
TOPK = "published encoder output: relu(pre) at the k highest pre of a token"


@dataclass(frozen=True)
class Candidate:
    """One SAE by its files' names."""

    path: str  # inside the suite, without file endings: the tail of its id
    files: tuple[str, ...]  # paths in the tree (or URIs); the weights first
    part: int | None = None  # which one, where a file holds several
    canonical: bool | None = None  # whether `canonical` takes it; None where a format has no such choice
    error: InputError | None = None  # why a file that names alone do not tell could not be read


@dataclass(frozen=True)
class Description:
    """What config and headers say of a candidate."""

    architecture: str
    d_in: int
    width: int
    convention: str
    site: Site | None  # None: the files do not say the kind of site; `layer` then says the layer
    out: Site | None = None  # of the decoder's output; None where there is no decoder of its own
    layer: int | None = None
    by_name: bool = False  # `site` is from the suite's name alone, so `site:` of the spec outranks it
    nominal_l0: float | None = None
    trained_on: str | None = None
    neuronpedia: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # for `load`, as JSON


def options(info: SaeInfo) -> dict[str, Any]:
    """What `describe` left for `load`."""
    found: dict[str, Any] = json.loads(info.options)
    return found


def matrix(found: dict[str, Header], name: str, file: str) -> tuple[int, int]:
    """The shape of a matrix in a file's headers. Raises InputError naming the tensor."""
    header = found.get(name)
    if header is None:
        raise InputError(f"saes: no tensor {name} in {file}; it has {', '.join(sorted(found)) or 'none'}")
    if len(header.shape) != 2:
        raise InputError(f"saes: {name} in {file} has shape {header.shape}, not two dimensions")
    return header.shape[0], header.shape[1]


def need(found: dict[str, Any], name: str, file: str) -> Any:
    """An entry of a file's tensors or config. Raises InputError naming it."""
    if name not in found:
        raise InputError(f"saes: no {name} in {file}")
    return found[name]


def number(found: dict[str, Any], name: str, file: str) -> float:
    """A config's number. Raises InputError where it is missing, something else or not finite."""
    value = need(found, name, file)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise InputError(f"saes: {name} in {file} is {value!r}, not a number")
    return float(value)


def boolean(found: dict[str, Any], name: str, file: str, default: bool) -> bool:
    """A config's true or false, `default` where missing or null. Raises InputError for anything else."""
    value = found.get(name)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"saes: {name} in {file} is {value!r}, not true or false")
    return default if value is None else value


def whole(found: dict[str, Any], name: str, file: str) -> int:
    """A config's whole number. Raises InputError where it is missing or something else."""
    value = number(found, name, file)
    if value != int(value):
        raise InputError(f"saes: {name} in {file} is {value!r}, not a whole number")
    return int(value)
