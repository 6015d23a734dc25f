"""circuit-tracer's transcoder sets and cross-layer transcoders (CLTs), as it and its users publish them.

    config.yaml            model_name, model_kind, feature_input_hook, feature_output_hook, [activation, k]
    layer_{i}.safetensors  W_enc [m,d]  b_enc [m]  W_dec [m,n]  b_dec [n]  [W_skip [n,d]]
                           [activation_function.threshold, [m] or one]  [k]
    W_enc_{i}.safetensors  W_enc_{i} [m,d]  b_enc_{i} [m]  b_dec_{i} [d]  [threshold_{i} [m]]      (CLT)

config.yaml may instead list `transcoders`, one file a layer, in other repositories too: files of this
format, or Gemma Scope's (.npz; .safetensors with `w_enc`). The input site is what `feature_input_hook`
says, never a default; mwhanna's sets of no config.yaml but a wandb-config.yaml (once wanb-config.yaml) are
all of Qwen3 and read `mlp.hook_in`. b_dec is never subtracted from the input.

A CLT's layer i is one encoder here, of its own; its decoders write to layers i and after, so that it has
none of its own (`out` is None). Source: circuit-tracer's loaders; what differs from them: a threshold
below 0 acts as relu, where theirs lets negative values through.

Where m equals n, no shape tells W_dec's [m,n] from the [n,m] of the old mntss/skip-transcoder-* files;
[m,n], the format's own, is then assumed. Published sets have m many times n.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, quote

import torch

from sae_runtime import weights
from sae_runtime.errors import InputError
from sae_runtime.formats.base import JUMPRELU, RELU, Candidate, Description, matrix, need, options, whole
from sae_runtime.formats.hub_names import hub_id
from sae_runtime.hub import HubError
from sae_runtime.sae import Rule, SaeInfo, SaeWeights
from sae_runtime.sites import KINDS, Site, from_transformer_lens
from sae_runtime.tree import Tree, folder, read_yaml, stem
from sae_runtime.weights import Header

TOPK_SIGNED = "published encoder output: pre at the k highest pre of a token, negative ones too"

_FILE = re.compile(r"(?:^|/)(?:layer_|W_enc_)(\d+)(?:\.safetensors)?$")
_WEIGHTS = (".safetensors", ".npz", ".pt", ".pth", ".bin")
_WANDB = ("wandb-config.yaml", "wanb-config.yaml")
_KINDS = ("transcoder_set", "cross_layer_transcoder")
_FIXED_K = {"crv-8b-instruct-transcoders": 128}  # circuit-tracer's own; its config.yaml has none
_CONVENTIONS: dict[Rule, str] = {"relu": RELU, "jumprelu": JUMPRELU, "topk_signed": TOPK_SIGNED}
_NAMES: dict[Rule, str] = {"relu": "", "jumprelu": "jumprelu_", "topk_signed": "topk_"}


@dataclass(frozen=True)
class _Layout:
    """How a file names its tensors, and which way its matrices lie. "" for what it has none of."""

    W_enc: str
    b_enc: str
    threshold: str
    W_dec: str = ""
    b_dec: str = ""
    W_skip: str = ""
    rows: bool = True  # W_enc is [m,d] and the skip x @ W_skip.T; else [d,m] and x @ W_skip


_OWN = _Layout("W_enc", "b_enc", "activation_function.threshold", "W_dec", "b_dec", "W_skip")
_GEMMA_SCOPE = _Layout("W_enc", "b_enc", "threshold", "W_dec", "b_dec", rows=False)
_GEMMA_SCOPE_2 = _Layout(
    "w_enc", "b_enc", "threshold", "w_dec", "b_dec", "affine_skip_connection", rows=False
)


def candidates(tree: Tree) -> list[Candidate]:
    """One for each layer's file; of a config.yaml in a folder without weights, one for each it lists."""
    found, full = [], {folder(file) for file in tree.files if file.endswith(_WEIGHTS)}
    for file in tree.files:
        if file.endswith(".safetensors") and _FILE.search(file):
            found.append(Candidate(stem(file, (".safetensors",)), (file,)))
    for file in tree.named("config.yaml"):
        if folder(file) not in full:
            found += _listed(tree, file)
    return found


def describe(tree: Tree, candidate: Candidate) -> Description:
    """From config.yaml and the header. Raises InputError where the site or the activation is not known."""
    match = _FILE.search(candidate.path)
    assert match is not None
    layer, file = int(match[1]), tree.path(candidate.files[0])
    config, where = _config(tree, folder(candidate.path))
    if len(candidate.files) == 1 and any("://" in str(entry) for entry in config.get("transcoders") or ()):
        raise InputError(
            f"saes: {where} lists transcoders elsewhere, but there are weights beside it; remove one"
        )
    clt = (
        candidate.path.rsplit("/", 1)[-1].startswith("W_enc_")
        or config.get("model_kind") == "cross_layer_transcoder"
    )
    found = weights.headers(file)
    layout = _layout(found, file, layer)
    shape = matrix(found, layout.W_enc, file)
    d_in, width = (shape[1], shape[0]) if layout.rows else shape
    bias = need(found, layout.b_enc, file).shape
    if bias != (width,):
        raise InputError(f"saes: {layout.W_enc} in {file} is {shape}, but {layout.b_enc} {tuple(bias)}")
    rule, k = _rule(config, where, found, layout, clt, tree.name)
    site = _site(config, "feature_input_hook", layer, where)
    skip = bool(layout.W_skip) and layout.W_skip in found
    kind = {"relu": "standard_", "jumprelu": "jumprelu_"}[rule] + "clt" if clt else None
    return Description(
        kind or f"{_NAMES[rule]}{'skip_' if skip else ''}transcoder",
        d_in,
        width,
        _CONVENTIONS[rule],
        site,
        out=None if clt else _site(config, "feature_output_hook", layer, where, strict=False),
        nominal_l0=None if k is None else float(k),
        trained_on=hub_id(config.get("model_name")),
        neuronpedia=_neuronpedia(tree.name, layer),
        options={"layer": layer, "rule": rule, "k": k},
    )


def load(info: SaeInfo) -> SaeWeights:
    """The tensors in the orientation of `x @ W_enc`; of a CLT, its encoder only."""
    how, file = options(info), info.uri
    layout = _layout(weights.headers(file), file, how["layer"])
    clt = info.architecture.endswith("_clt")
    wanted = [layout.W_enc, layout.b_enc, layout.threshold, "k"]
    found = weights.read(file, wanted if clt else [*wanted, layout.W_dec, layout.b_dec, layout.W_skip])
    W_enc, b_enc = need(found, layout.W_enc, file), need(found, layout.b_enc, file)
    threshold = None
    if how["rule"] == "jumprelu":
        threshold = need(found, layout.threshold, file).reshape(-1)
        threshold = threshold.expand(len(b_enc)).contiguous() if len(threshold) == 1 else threshold
    W_dec = b_dec = W_skip = None
    if not clt:
        b_dec = need(found, layout.b_dec, file)
        W_dec = need(found, layout.W_dec, file)
        if tuple(W_dec.shape) == (len(b_dec), len(b_enc)) and len(b_dec) != len(b_enc):
            W_dec = W_dec.T.contiguous()
        W_skip = found.get(layout.W_skip)
    return SaeWeights(
        how["rule"],
        W_enc.T.contiguous() if layout.rows else W_enc,
        b_enc,
        W_dec,
        b_dec,
        W_skip=W_skip.T.contiguous() if W_skip is not None and layout.rows else W_skip,
        threshold=threshold,
        k=_k(how["k"], found.get("k"), file) if how["rule"] == "topk_signed" else None,
        restore=False,
    )


def _listed(tree: Tree, file: str) -> list[Candidate]:
    """The files that a config.yaml lists by layer. None of a config.yaml of something else."""
    top = folder(file)
    try:
        config = read_yaml(tree.path(file))
    except HubError:
        raise
    except InputError as error:  # its own fault alone: the SAEs beside it are read without it
        return [Candidate(top or "config", (file,), error=error)]
    listed = config.get("transcoders")
    ours = config.get("model_kind") in _KINDS or "feature_input_hook" in config
    if not ours or not isinstance(listed, list):
        return []
    found = []
    for layer, entry in enumerate(listed):
        path = f"{top}/layer_{layer}" if top else f"layer_{layer}"
        try:
            found.append(Candidate(path, (_uri(tree, file, str(entry)), file)))
        except InputError as error:
            found.append(Candidate(path, (f"{path} of {file}",), error=error))
    return found


def _uri(tree: Tree, config: str, entry: str) -> str:
    """An entry of `transcoders`: hf://org/repo/path?revision=rev as fsspec has it, or a file of the suite."""
    if "://" not in entry:
        path = f"{folder(config)}/{entry}" if folder(config) else entry
        if not tree.has(path):
            raise InputError(
                f"saes: {tree.path(config)}: transcoders lists {entry!r}, which is not in the suite"
            )
        return path
    base, _, query = entry.partition("?")
    revision = parse_qs(query).get("revision", [""])[0]
    parts = base.split("/", 5)  # hf: '' org repo path
    if base.startswith("hf://") and len(parts) < 5:
        raise InputError(
            f"saes: {tree.path(config)}: transcoders lists {entry!r}; hf://org/repo/path is wanted"
        )
    if not base.startswith("hf://") or not revision:
        return base if base.startswith("hf://") else entry
    return "/".join([*parts[:3], f"{parts[3]}@{quote(revision, safe='')}", *parts[4:]])


def _config(tree: Tree, top: str) -> tuple[dict[str, Any], str]:
    """The set's configuration and the file it is from."""
    prefix = f"{top}/" if top else ""
    if tree.has(f"{prefix}config.yaml"):
        file = tree.path(f"{prefix}config.yaml")
        config = read_yaml(file)
        kind = config.get("model_kind", "transcoder_set")
        if kind not in _KINDS:
            raise InputError(f"saes: {file}: model_kind {kind!r} is unknown; known are {', '.join(_KINDS)}")
        return config, file
    wandb = next((name for name in _WANDB if tree.has(f"{prefix}{name}")), None)
    size = re.search(r"qwen3-(\d+(?:\.\d+)?b)", tree.name.lower())
    if wandb is None or size is None:
        raise InputError(
            f"saes: {tree.path(prefix + 'config.yaml')} is missing, so that what this folder's transcoders "
            "read is not known; add one with model_name, model_kind, feature_input_hook, feature_output_hook"
        )
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    return {"model_name": f"qwen3-{size[1]}", **hooks}, tree.path(f"{prefix}{wandb}")


def _layout(found: dict[str, Header], file: str, layer: int) -> _Layout:
    """Whose file it is, by the names of its tensors."""
    if f"W_enc_{layer}" in found:
        return _Layout(f"W_enc_{layer}", f"b_enc_{layer}", f"threshold_{layer}")
    if "w_enc" in found:
        return _GEMMA_SCOPE_2
    return _GEMMA_SCOPE if file.endswith(".npz") else _OWN


def _rule(
    config: dict[str, Any], where: str, found: dict[str, Header], layout: _Layout, clt: bool, suite: str
) -> tuple[Rule, int | None]:
    """The rule, and k where the config has it (a file's own k is known when it is loaded).

    A file's threshold makes a jumprelu even where the config says relu, as the library has it.
    """
    activation, threshold = config.get("activation"), layout.threshold in found
    if clt and (activation == "topk" or "k" in found):
        raise InputError(f"saes: {where}: activation topk of a cross-layer transcoder has no known meaning")
    if activation == "topk" or (activation is None and "k" in found):
        fixed = None if config.get("k") is None else whole(config, "k", where)
        k = _FIXED_K.get(suite) if fixed is None else fixed
        if k is None and "k" not in found:
            raise InputError(f"saes: {where}: activation topk, but no k; add it")
        return "topk_signed", k
    if activation is None and config.get("k") is not None:
        raise InputError(f"saes: {where}: k, but no activation that has one; add `activation: topk`")
    if activation in ("jumprelu", "jump_relu") and not threshold:
        raise InputError(f"saes: {where}: activation {activation}, but a file without {layout.threshold}")
    if activation not in (None, "relu", "jumprelu", "jump_relu"):
        raise InputError(
            f"saes: {where}: activation {activation!r} is unknown; known are relu, jumprelu, topk"
        )
    return ("jumprelu" if threshold else "relu"), None


def _k(configured: int | None, stored: torch.Tensor | None, file: str) -> int:
    if stored is None:
        assert configured is not None
        return configured
    if configured is not None and configured != int(stored):
        raise InputError(f"saes: k is {int(stored)} in {file}, but {configured} in its config.yaml")
    return int(stored)


def _site(config: dict[str, Any], key: str, layer: int, where: str, strict: bool = True) -> Site | None:
    """The site of a hook of this layer; None for an unknown one unless `strict`."""
    hook = config.get(key)
    if hook is None and strict:
        raise InputError(f"saes: {where}: no {key}, so that what the transcoders read is not known; add it")
    name = str(hook).replace("{layer}", str(layer))
    site = from_transformer_lens(name if name.startswith("blocks.") else f"blocks.{layer}.{name}")
    if site is None and strict:
        raise InputError(f"saes: {where}: {key} {hook!r} is no known site; known are {', '.join(KINDS)}")
    if site is not None and site.layer != layer:
        raise InputError(
            f"saes: {where}: {key} {hook!r} is of layer {site.layer}, but the file of "
            f"layer {layer}; write the hook without its block"
        )
    return site


def _neuronpedia(suite: str, layer: int) -> str | None:
    """Of the sets that SAELens' registry has."""
    if match := re.fullmatch(r"(qwen3-[\d.]+b)-transcoders(-lowl0)?", suite):
        return f"{match[1]}/{layer}-transcoder-hp{match[2] or ''}"
    return f"gemma-2-2b/{layer}-clt-hp" if suite == "clt-gemma-2-2b-2.5M" else None
