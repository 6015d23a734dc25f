"""Gemma Scope 1 (Google DeepMind, Gemma 2): SAEs, embedding SAEs and transcoders in .npz files.

    layer_20/width_16k/average_l0_71/params.npz        W_enc [d,m] W_dec [m,n] b_enc b_dec threshold
    embedding/width_4k/average_l0_6/params.npz

There is no config: the site is in the repository's name (`-res`, `-mlp`, `-att`, `-transcoders`), so the
suite's name decides. Transcoders read the MLP's input normalised without the norm's gain; embedding SAEs
the unscaled rows of the embedding matrix. Source: arXiv 2408.05147 and Google DeepMind's tutorial.

`canonical` is, as in SAELens, the SAE of nominal L0 nearest 100 of each layer and width; a tie goes to
the smaller, but for the one tie that SAELens broke the other way (_TIES).
"""

from __future__ import annotations

import re
from dataclasses import replace

from sae_runtime import weights
from sae_runtime.errors import InputError
from sae_runtime.formats.base import JUMPRELU, Candidate, Description, matrix, need
from sae_runtime.sae import SaeInfo, SaeWeights
from sae_runtime.sites import Site
from sae_runtime.tree import Tree, folder

_PATH = re.compile(r"(?:^|/)(?:layer_(\d+)|embedding)/width_([^/]+)/average_l0_([\d.]+)$")
_SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z", "transcoders": "mlp_in_unit"}
_NEURONPEDIA = {"res": "res", "mlp": "mlp", "att": "att", "transcoders": "transcoder"}
_REPOSITORY = re.compile(r"gemma-scope-[\w-]+-(?:res|mlp|att|transcoders)")
_KEYS = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")
_TIES = {("gemma-scope-9b-pt-att", "layer_27/width_16k"): 136.0}


def candidates(tree: Tree) -> list[Candidate]:
    """One for each params.npz whose folders are named as Gemma Scope names them."""
    paths = {folder(file): file for file in tree.named("params.npz")}
    known = {path: match for path in paths if (match := _PATH.search(f"{tree.uri}/{path}".rstrip("/")))}
    groups: dict[str, list[tuple[float, float, str]]] = {}
    for path, match in known.items():
        if match[1] is not None and path:  # what is beside a suite of one folder is not known
            group, l0 = folder(path), float(match[3])
            distance = -1.0 if _TIES.get((tree.name, group)) == l0 else abs(l0 - 100)
            groups.setdefault(group, []).append((distance, l0, path))
    canonical = {min(members)[2] for members in groups.values()}
    return [Candidate(path, (paths[path],), canonical=path in canonical if path else None) for path in known]


def describe(tree: Tree, candidate: Candidate) -> Description:
    """From the path, the suite's name and the header of the archive."""
    file = tree.path(candidate.files[0])
    match = _PATH.search(f"{tree.uri}/{candidate.path}".rstrip("/"))
    assert match is not None
    d_in, width = matrix(weights.headers(file), "W_enc", file)
    found = Description(
        "jumprelu",
        d_in,
        width,
        JUMPRELU,
        None,
        nominal_l0=float(match[3]),
        trained_on=_trained_on(_repository(tree, candidate)),
    )
    if match[1] is None:
        site = Site(0, "embed_unscaled")
        return replace(found, site=site, out=site)
    layer, ending = int(match[1]), _ending(_repository(tree, candidate))
    if ending not in _SITES:
        return replace(found, layer=layer)
    site, neuronpedia = Site(layer, _SITES[ending]), _neuronpedia(tree, candidate, match)
    if ending == "transcoders":
        out = Site(layer, "mlp_out")
        return replace(
            found,
            architecture="jumprelu_transcoder",
            site=site,
            out=out,
            by_name=True,
            neuronpedia=neuronpedia,
        )
    return replace(found, site=site, out=site, by_name=True, neuronpedia=neuronpedia)


def load(info: SaeInfo) -> SaeWeights:
    """The five tensors as they are: no bias is subtracted and nothing normalised at run time."""
    found = weights.read(info.uri, _KEYS)
    tensors = {key: need(found, key, info.uri) for key in _KEYS}
    return SaeWeights("jumprelu", restore=info.out == info.site, **tensors)


def _repository(tree: Tree, candidate: Candidate) -> str:
    """The suite's name, if that ends as a repository's does; else the innermost folder's that is named so.

    Raises InputError where a folder inside the suite is of another site than the suite's name.
    """
    inside = [part for part in candidate.path.split("/") if _REPOSITORY.fullmatch(part)]
    if _ending(tree.name) not in _SITES:
        above = (part.partition("@")[0] for part in tree.uri.split("/"))
        return [tree.name, *filter(_REPOSITORY.fullmatch, above), *inside][-1]
    if inside and _ending(inside[-1]) != _ending(tree.name):
        raise InputError(
            f"saes.site: {tree.uri}/{candidate.path} is of {inside[-1]}, but the suite's name {tree.name!r} "
            f"says {_SITES[_ending(tree.name)]}; make that folder the uri, or give the suite another name"
        )
    return tree.name


def _ending(name: str) -> str:
    return name.rsplit("-", 1)[-1]


def _trained_on(suite: str) -> str | None:
    match = re.match(r"gemma-scope-(2b|9b|27b)-(pt|it)-", suite)
    return f"google/gemma-2-{match[1]}{'-it' if match[2] == 'it' else ''}" if match else None


def _neuronpedia(tree: Tree, candidate: Candidate, match: re.Match[str]) -> str | None:
    """The canonical ones have the short name, the others carry their L0."""
    repository = _repository(tree, candidate)
    model, ending = _trained_on(repository), _ending(repository)
    if model is None or candidate.canonical is None or (ending == "transcoders" and not candidate.canonical):
        return None
    name = f"{model.split('/')[-1]}/{match[1]}-gemmascope-{_NEURONPEDIA[ending]}-{match[2]}"
    return name if candidate.canonical else f"{name}__l0-{match[3]}"
