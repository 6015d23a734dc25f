"""EleutherAI sparsify (`eai-sparsify`, formerly `sae`): top-k SAEs and transcoders, a folder per hookpoint.

    config.json                              of the run: model, ...
    layers.10.mlp/{cfg.json,sae.safetensors}         [seed1/ below it]
        encoder.weight [m,d]  encoder.bias  W_dec [m,d]  b_dec  [W_skip [d,d]]

    pre = (x - b_dec) encoder.weight^T + encoder.bias        k highest, relu (signed: k highest |pre|)

A folder's name is a module's path in the base model: an SAE reads that module's output, a transcoder its
input, and gives its output. `transcode` is a late key: files without it subtract b_dec whatever they are,
and say that they are transcoders by `skip_connection`, the run's config or the repository's name. The
skip connection reads x without the subtraction. `normalize_decoder` says nothing about the encoder.
"""

from __future__ import annotations

import re
from typing import Any

from sae_runtime import weights
from sae_runtime.errors import InputError
from sae_runtime.formats.base import TOPK, Candidate, Description, boolean, matrix, need, options, whole
from sae_runtime.sae import Rule, SaeInfo, SaeWeights
from sae_runtime.sites import Site, from_hugging_face
from sae_runtime.tree import Tree, folder, read_json
from sae_runtime.weights import Header

_EMBEDDINGS = ("embed_tokens", "embed_in", "wte")
_SEED = re.compile(r"seed_?\d+")
_TENSORS = {"encoder.weight", "encoder.bias", "W_dec", "decoder.weight", "b_dec", "W_skip"}
_SIGNED = "published encoder output: pre at the k highest |pre| of a token, signed"
_GROUPMAX = "published encoder output: relu(pre) at the highest pre of each of k groups of features"
_CONVENTIONS: dict[Rule, str] = {"topk": TOPK, "abstopk": _SIGNED, "groupmax": _GROUPMAX}


def candidates(tree: Tree) -> list[Candidate]:
    """One for each sae.safetensors; the run's config is the nearest config.json above, if there is one."""
    found = []
    for file in tree.named("sae.safetensors"):
        at = folder(file)
        runs = [name for name in map(_config, _upwards(at)) if tree.has(name)]
        found.append(Candidate(at, (file, f"{at}/cfg.json" if at else "cfg.json", *runs[:1])))
    return found


def describe(tree: Tree, candidate: Candidate) -> Description:
    """From cfg.json, the run's config.json, the folder's name and the header."""
    file, config = (tree.path(name) for name in candidate.files[:2])
    cfg, found = read_json(config), weights.headers(file)
    run = read_json(tree.path(candidate.files[2])) if len(candidate.files) > 2 else {}
    width, d_in = matrix(found, "encoder.weight", file)
    if cfg.get("d_in") not in (None, d_in):
        raise InputError(f"saes: {file} has {d_in} inputs, but {config} says d_in {cfg['d_in']}")
    k, rule = whole(cfg, "k", config), _rule(cfg, config)
    if rule == "groupmax" and (k < 1 or width % k):
        raise InputError(f"saes: k {k} in {config} does not divide the {width} features into groups")
    _check_tensors(cfg, found, file, config)
    transcoder = _is_transcoder(tree, candidate, cfg, run, config)
    site, out = _sites(f"{tree.uri}/{candidate.path}", transcoder)
    return Description(
        rule + (("_skip" if "W_skip" in found else "") + "_transcoder" if transcoder else ""),
        d_in,
        width,
        _CONVENTIONS[rule],
        site,
        out,
        nominal_l0=float(k),
        trained_on=str(run["model"]) if run.get("model") else None,
        options={
            "k": k,
            "rule": rule,
            "subtract": not boolean(cfg, "transcode", config, False),
            "decoder": "W_dec" if "W_dec" in found else "decoder.weight",
        },
    )


def load(info: SaeInfo) -> SaeWeights:
    """As published; decoders of very old files are [d,m]."""
    how = options(info)
    keys = ("encoder.weight", "encoder.bias", how["decoder"], "b_dec")
    found = weights.read(info.uri, (*keys, "W_skip"))
    encoder, b_enc, W_dec, b_dec = (need(found, key, info.uri) for key in keys)
    skip = found.get("W_skip")
    return SaeWeights(
        how["rule"],
        W_enc=encoder.T.contiguous(),
        b_enc=b_enc,
        W_dec=W_dec if how["decoder"] == "W_dec" else W_dec.T.contiguous(),
        b_dec=b_dec,
        W_skip=None if skip is None else skip.T.contiguous(),
        k=how["k"],
        b_pre=b_dec if how["subtract"] else None,
        restore=info.out == info.site,
    )


def _rule(cfg: dict[str, Any], config: str) -> Rule:
    activation, signed = cfg.get("activation", "topk"), boolean(cfg, "signed", config, False)
    if activation == "topk":
        return "abstopk" if signed else "topk"
    if activation == "groupmax" and not signed:
        return "groupmax"
    raise InputError(
        f"saes: activation {activation!r}{' with signed' if signed else ''} in {config} "
        "is unknown; known are topk, signed topk and groupmax"
    )


def _check_tensors(cfg: dict[str, Any], found: dict[str, Header], file: str, config: str) -> None:
    """Refuse tensors that are not of this format, which may change the encoding, and a skip without one."""
    more = sorted(found.keys() - _TENSORS)
    if more:
        raise InputError(
            f"saes: {', '.join(more)} in {file}: what it does is not known, so it is not encoded"
        )
    if boolean(cfg, "skip_connection", config, False) and "W_skip" not in found:
        raise InputError(f"saes: skip_connection in {config}, but no W_skip in {file}")


def _is_transcoder(
    tree: Tree, candidate: Candidate, cfg: dict[str, Any], run: dict[str, Any], config: str
) -> bool:
    if cfg.get("transcode") is not None:
        return boolean(cfg, "transcode", config, False)
    repository = tree.uri
    if not repository.startswith("hf://"):  # here the folder's own name, or of a hookpoint the one above
        parts = [part for part in repository.split("/") if not _SEED.fullmatch(part)]
        own = not re.sub(r"(?:^|/)seed_?\d+$", "", candidate.path)
        repository = "/".join(parts[-2:] if own else parts[-1:])
    named = "transcoder" in f"{repository} {tree.name} {candidate.path}".lower()
    return boolean(cfg, "skip_connection", config, False) or bool(run.get("transcode")) or named


def _sites(path: str, transcoder: bool) -> tuple[Site | None, Site | None]:
    """What is read and what is given, from the last part of a path that is no seed: the hookpoint."""
    parts = [part for part in path.split("/") if part and not _SEED.fullmatch(part)]
    hookpoint = parts[-1]
    if hookpoint.rsplit(".", 1)[-1] in _EMBEDDINGS and not transcoder:
        return Site(0, "embed"), Site(0, "embed")
    out = from_hugging_face(f"{hookpoint}.output")
    return (from_hugging_face(f"{hookpoint}.input") if transcoder else out), out


def _upwards(at: str) -> list[str]:
    """A folder and those above it."""
    return [at, *_upwards(folder(at))] if at else [""]


def _config(at: str) -> str:
    return f"{at}/config.json" if at else "config.json"
