"""Qwen Scope (Qwen): top-k SAEs of the residual stream, one .pt file per layer and one config per repository.

    config.json {model_type: topk_sae, base_model, d_model, d_sae, k, hook_point: resid_post}
    layer12.sae.pt {W_enc [m,d], W_dec [d,m], b_enc [m], b_dec [d]}       both transposed on loading

No bias is subtracted. The code of the model cards keeps the k highest pre-activations as they are, so
where fewer than k are positive the rest are negative activations; SAELens drops those. The published
encoder is followed. `d_model` and `d_sae` are checked against the tensors: a square one has no telling shape.
"""

from __future__ import annotations

import re

from sae_runtime import weights
from sae_runtime.errors import InputError
from sae_runtime.formats.base import Candidate, Description, matrix, need, options, whole
from sae_runtime.sae import SaeInfo, SaeWeights
from sae_runtime.sites import Site
from sae_runtime.tree import Tree, folder, read_json, stem

_FILE = re.compile(r"(?:^|/)layer(\d+)\.sae\.pt$")
_CONVENTION = "published encoder output: the k highest pre of a token, the negative of them too"


def candidates(tree: Tree) -> list[Candidate]:
    """One for each layer{n}.sae.pt, with the config beside it or, failing that, at the top."""
    found = []
    for file in tree.files:
        if _FILE.search(file) is not None:
            beside = f"{folder(file)}/config.json".lstrip("/")
            config = next(filter(tree.has, (beside, "config.json")), None)
            found.append(Candidate(stem(file, (".sae.pt",)), (file, config) if config else (file,)))
    return found


def describe(tree: Tree, candidate: Candidate) -> Description:
    """From the config, the file's name and its header."""
    file = tree.path(candidate.files[0])
    if len(candidate.files) == 1:
        raise InputError(f"saes: no config.json beside {file}; k is in it, so copy it there")
    place = tree.path(candidate.files[1])
    config = read_json(place)
    if (kind := config.get("model_type")) != "topk_sae":
        raise InputError(f"saes: model_type {kind!r} in {place}; Qwen Scope is topk_sae")
    if (hook := config.get("hook_point")) != "resid_post":
        raise InputError(f"saes: hook_point {hook!r} in {place}; Qwen Scope is resid_post")
    width, d_in = matrix(weights.headers(file), "W_enc", file)
    if (width, d_in) != (need(config, "d_sae", place), need(config, "d_model", place)):
        raise InputError(
            f"saes: W_enc in {file} is {(width, d_in)}, but {place} says d_sae {config['d_sae']} and "
            f"d_model {config['d_model']}"
        )
    match = _FILE.search(candidate.files[0])
    assert match is not None
    site, k = Site(int(match[1]), "resid_post"), whole(config, "k", place)
    return Description(
        architecture="topk",
        d_in=d_in,
        width=width,
        convention=_CONVENTION,
        site=site,
        out=site,
        nominal_l0=float(k),
        trained_on=config.get("base_model"),
        options={"k": k},
    )


def load(info: SaeInfo) -> SaeWeights:
    """Both matrices transposed, nothing folded."""
    found = weights.read(info.uri)
    W_enc, W_dec, b_enc, b_dec = (need(found, key, info.uri) for key in ("W_enc", "W_dec", "b_enc", "b_dec"))
    return SaeWeights(
        "topk_signed", W_enc.T.contiguous(), b_enc, W_dec.T.contiguous(), b_dec, k=options(info)["k"]
    )
