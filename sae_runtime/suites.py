"""Suites: finding the SAEs under a URI, in whatever published format, and reading their weights.

Invariant: listing reads names first and then, of the SAEs selected, configs and headers only; widths
come from the tensors, never from a folder's name. Every tensor that is loaded has the shape that the
format says and finite values, or the SAE is refused by name.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import ModuleType
from typing import Any

import torch

from sae_runtime import hub, weights
from sae_runtime.errors import InputError, one_line
from sae_runtime.formats import FORMATS, by_name, format_name
from sae_runtime.formats.base import Candidate, Description
from sae_runtime.sae import SaeInfo, SaeWeights
from sae_runtime.sites import KINDS, Site
from sae_runtime.tree import Tree, open_tree

_READERS = 16  # threads that read headers: on an object store each is a round trip


def find(
    uri: str,
    name: str | None = None,
    select: Sequence[str] | None = None,
    site: str | None = None,
    keep: str | float = "tokens",
    refused: Callable[[InputError], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[SaeInfo]:
    """The SAEs of a suite, sorted by layer and path.

    `select` holds globs over ids or paths, or the word `canonical`. Raises InputError when there is
    nothing, and for an SAE that cannot be read exactly; with `refused` that is told instead. `progress`
    is told how many of how many have been looked at.
    """
    if site is not None and site not in KINDS:
        raise InputError(f"saes.site: {site!r} is unknown; known are {', '.join(KINDS)}")
    tree = open_tree(uri, name)
    known = _candidates(tree)
    if not known:
        raise InputError(
            f"saes.uri: no SAEs of a known format under {uri}; docs/FORMATS.md lists the formats"
        )
    chosen = _select(tree, known, select)

    def describe(path: str) -> SaeInfo | InputError:
        module, candidate = known[path]
        try:
            if candidate.error is not None:
                raise candidate.error
            _check_name(tree, path)
            file = tree.path(candidate.files[0])
            described = _guarded(file, lambda: module.describe(tree, candidate))
            return _info(tree, module, candidate, described, site, keep)
        except InputError as error:
            return error

    found = []
    pool = ThreadPoolExecutor(_READERS)
    try:
        for done, info in enumerate(pool.map(describe, chosen), start=1):
            if isinstance(info, SaeInfo):
                found.append(info)
            elif refused is None or isinstance(info, hub.HubError):
                raise info
            else:
                refused(info)
            if progress is not None:
                progress(done, len(chosen))
    finally:
        pool.shutdown(cancel_futures=True)
    return sorted(found, key=lambda sae: (sae.site, sae.path))


def load(info: SaeInfo) -> SaeWeights:
    """The tensors of an SAE, as float32. InputError names a tensor that is not as it should be."""
    sae: SaeWeights = _guarded(info.uri, lambda: by_name(info.format).load(info))
    d, m = info.d_in, info.width
    n = None if sae.b_dec is None else d if sae.restore else sae.b_dec.numel()
    shapes = {
        "W_enc": (d, m), "b_enc": (m,), "W_dec": (m, n), "b_dec": (n,), "W_skip": (d, n), "threshold": (m,),
        "b_pre": (d,), "b_gate": (m,), "r_mag": (m,), "select_scale": (m,), "W_glu": (d, m), "b_glu": (m,),
    }  # fmt: skip
    for key, tensor in sae.tensors().items():
        if tuple(tensor.shape) != shapes[key]:
            raise InputError(f"saes: {key} in {info.uri} is {tuple(tensor.shape)}, not {shapes[key]}")
        if tensor.dtype != torch.float32:
            raise InputError(f"saes: {key} in {info.uri} holds {str(tensor.dtype)[6:]}, not floating numbers")
        if not torch.isfinite(tensor).all():
            raise InputError(f"saes: {key} in {info.uri} has values that are not finite")
    if sae.k is not None and not 0 < sae.k <= m:
        raise InputError(f"saes: k is {sae.k} in {info.uri}, which has {m} features")
    if sae.rule == "groupmax" and m % (sae.k or 1):
        raise InputError(f"saes: k is {sae.k} in {info.uri}, which does not divide its {m} features")
    if sae.select_scale is not None and (sae.select_scale < 0).any():
        raise InputError(f"saes: select_scale of {info.uri} is negative somewhere")
    if sae.threshold is not None and bool((sae.threshold == -1).all()):
        raise InputError(
            f"saes: threshold in {info.uri} is -1 throughout, the mark of one that was never calibrated; "
            "leave this SAE out"
        )
    return sae


def _guarded(file: str, reader: Callable[[], Any]) -> Any:
    """What a format's module gives; whatever its reader trips over in a file's contents names the file."""
    try:
        return reader()
    except InputError:
        raise
    except Exception as error:  # a list where a name belongs, a scalar where a vector does
        raise InputError(
            f"saes: {file} or its config is not as its format has it: {type(error).__name__}: "
            f"{one_line(error)}"
        ) from error


def duplicates(infos: Sequence[SaeInfo]) -> dict[str, str]:
    """SAEs that another one stands for: id -> id of the first with the same tensors, sites and options.

    Few bytes decide most: digests of the files where the hub has them, else a bias of each; only SAEs
    whose biases are equal are loaded and compared whole.
    """
    alike: dict[object, list[SaeInfo]] = {}
    for info in infos:
        key = info.format, info.architecture, info.site, info.out, info.d_in, info.width, info.options
        alike.setdefault(key, []).append(info)
    groups = [group for group in alike.values() if len(group) > 1]
    digests = _digests(file for group in groups for info in group for file in _weight_files(info))
    found: dict[str, str] = {}
    for group in groups:
        first: dict[object, SaeInfo] = {}
        unknown: dict[bytes, list[SaeInfo]] = {}
        for info in group:
            known = tuple(digests.get(file) for file in _weight_files(info))
            if known and None not in known:
                other = first.setdefault(known, info)
                if other is not info:
                    found[info.id] = other.id
            else:
                unknown.setdefault(_bias(info), []).append(info)
        for same in unknown.values():
            found.update(_equal(same))
    return found


def _equal(infos: Sequence[SaeInfo]) -> dict[str, str]:
    from sae_runtime.fingerprints import fingerprint  # which loads by this module

    first: dict[str, str] = {}
    if len(infos) > 1:
        pairs = [(info.id, first.setdefault(fingerprint(info).digest, info.id)) for info in infos]
        return {one: other for one, other in pairs if one != other}
    return {}


def _weight_files(info: SaeInfo) -> list[str]:
    return [file for file in info.files if file.endswith((".npz", ".safetensors", ".pt", ".pth", ".bin"))]


def _digests(files: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files, by URI, where a listing says it: of the hub's large files."""
    places = {file: hub.parse(hub.pin(file)) for file in files if hub.is_hub(file)}
    entries = hub.entries(places.values()) if places else {}
    return {file: sha for file, place in places.items() if (sha := entries[place].sha256) is not None}


def _bias(info: SaeInfo) -> bytes:
    """Bytes of the encoder's bias, or of the smallest floating vector; b"" where there is none."""
    vectors = {
        name: header.shape[0]
        for name, header in weights.headers(info.uri).items()
        if len(header.shape) == 1
        and header.shape[0] > 1
        and not header.dtype.lower().startswith(("i", "u", "b1"))
    }
    named = [name for name in vectors if name.lower() in ("b_enc", "encoder.bias", "latent_bias", "b_e")]
    name = named[0] if named else min(vectors, key=lambda name: (vectors[name], name), default=None)
    return b"" if name is None else weights.read(info.uri, [name])[name].numpy().tobytes()


def _candidates(tree: Tree) -> dict[str, tuple[ModuleType, Candidate]]:
    """Every SAE by its path; a file belongs to the first format that knows it."""
    known: dict[str, tuple[ModuleType, Candidate]] = {}
    taken: set[str] = set()
    for module in FORMATS:
        listed = _guarded(tree.uri, partial(module.candidates, tree))
        own = [c for c in listed if c.files[0] not in taken]
        for candidate in own:
            if candidate.path in known:
                raise InputError(f"saes.uri: {tree.uri} has two SAEs at {candidate.path}")
            known[candidate.path] = module, candidate
        taken.update(candidate.files[0] for candidate in own)
    return known


def _info(
    tree: Tree,
    module: ModuleType,
    candidate: Candidate,
    found: Description,
    site: str | None,
    keep: str | float,
) -> SaeInfo:
    at, out = found.site, found.out
    if at is None:
        if found.layer is None:
            raise InputError(
                f"saes.site: nothing says which layer {tree.path(candidate.files[0])} reads; "
                "its folder or its config has to be named as published"
            )
        if site is None:
            raise InputError(
                f"saes.site: neither {tree.path(candidate.files[0])} nor the suite's name {tree.name!r} "
                f"says its site; set `site: resid_post` or another of {', '.join(KINDS)}"
            )
        at = out = Site(found.layer, site)
        if site == "mlp_in_unit":  # nothing but transcoders reads there, and what they give is not said
            out = None
    elif site is not None and site != at.kind:
        if not found.by_name:
            raise InputError(f"saes.site: {site}, but {tree.path(candidate.files[0])} is for {at.kind}")
        at = out = Site(at.layer, site)
    return SaeInfo(
        id=_id(tree, candidate.path),
        suite=tree.name,
        path=candidate.path,
        format=format_name(module),
        files=tuple(tree.path(file) for file in candidate.files),
        site=at,
        out=out,
        architecture=found.architecture,
        d_in=found.d_in,
        width=found.width,
        nominal_l0=found.nominal_l0,
        trained_on=found.trained_on,
        convention=found.convention,
        neuronpedia=found.neuronpedia,
        options=json.dumps(found.options, sort_keys=True),
        keep=keep,
    )


def _check_name(tree: Tree, path: str) -> None:
    """InputError for an id that neither JSON nor Parquet can hold."""
    try:
        _id(tree, path).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"saes: the name of {tree.uri}/{path} is not UTF-8, and it is the SAE's id; rename it"
        ) from error


def _id(tree: Tree, path: str) -> str:
    return f"{tree.name}/{path}" if path else tree.name


def _select(
    tree: Tree, known: dict[str, tuple[ModuleType, Candidate]], select: Sequence[str] | None
) -> list[str]:
    """Paths that any of the patterns names. Every pattern must name one."""
    if not select:
        return list(known)
    chosen: set[str] = set()
    for pattern in select:
        if pattern == "canonical":
            if all(candidate.canonical is None for _, candidate in known.values()):
                raise InputError(
                    f"saes.select: {tree.name} has no canonical SAEs, only Gemma Scope 1 has; give a glob"
                )
            named = [path for path, (_, candidate) in known.items() if candidate.canonical]
        else:
            named = [
                path
                for path in known
                if fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(_id(tree, path), pattern)
            ]
        if not named:
            raise InputError(
                f"saes.select: {pattern!r} matches none of {len(known)} SAEs of {tree.name}, "
                f"e.g. {', '.join(list(known)[:3])}"
            )
        chosen.update(named)
    return [path for path in known if path in chosen]
