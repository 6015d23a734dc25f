"""llamascopium 2 (OpenMOSS, formerly lm-saes; Llama Scope 2 and others): SAEs, transcoders, CLTs.

    transcoder/8x/k64/layer15_transcoder_8x_k64/config.json
    transcoder/8x/k64/layer15_transcoder_8x_k64/sae_weights.safetensors   (or .pt, nested under "sae")
        W_E [d,m]  b_E  W_D [m,n]  b_D  [W_E_glu  b_E_glu]
        activation_function.log_jumprelu_threshold [m]  dataset_average_activation_norm.{hook}

    pre = norm(x) W_E + b_E [* sigmoid(norm(x) W_E_glu + b_E_glu)]      f = act(pre * n) / n

with n_j = |W_D_j| where the config says sparsity_include_decoder_norm, else 1. norm() is `norm_activation`:
dataset-wise one factor from the file, token-wise sqrt(d) / |x|, inference none (folded when saved).

A cross-layer transcoder is one file with an encoder for each layer, W_E [L,d,m], and decoders W_D.{i}
[i+1,m,d] into layer i from those before it; each layer is an SAE here, `.../layer_{i}`, that has no decoder
of its own. Its n_j is the norm over all the layers that feature j writes to.
"""

from __future__ import annotations

import re
from typing import Any, cast

import torch

from sae_runtime import weights
from sae_runtime.errors import InputError
from sae_runtime.formats import openmoss
from sae_runtime.formats.base import (
    JUMPRELU,
    RELU,
    TOPK,
    Candidate,
    Description,
    matrix,
    need,
    options,
    whole,
)
from sae_runtime.formats.llama_scope_r1 import GATED_BY_NORM, SCALED
from sae_runtime.formats.lone_pt import tensors
from sae_runtime.hub import HubError
from sae_runtime.sae import Input, Rule, SaeInfo, SaeWeights
from sae_runtime.tree import Tree, read_json
from sae_runtime.weights import Header

_K = re.compile(r"(?:^|[/_])k(\d+)(?:[/_]|$)")
_THRESHOLD = "activation_function.log_jumprelu_threshold"
_ACTS = {"relu": ("standard", RELU), "jumprelu": ("jumprelu", JUMPRELU), "topk": ("topk", TOPK)}
_REFUSED_ACTS = {
    "batchtopk": "a token's activations depend on its batch; convert it to jumprelu with OpenMOSS",
    "batchlayertopk": "a token's activations depend on its batch",
    "layertopk": "a layer's activations depend on those of the other layers",
}
_REFUSED_TYPES = {
    "crosscoder": "its features read several layers at once, not one site",
    "lorsa": "it replaces attention and reads whole sequences, not one token's activation",
    "molt": "its features are linear maps, not directions",
}
_REFUSED_NORMS = {"batch-wise": "a token's input depends on the other tokens of its batch"}


def candidates(tree: Tree) -> list[Candidate]:
    """One for each folder with weights, and one for each layer of a cross-layer transcoder.

    Folders named layer{n}_... hold one; the config of the others says what they are.
    """
    found = []
    for at, file in openmoss.weight_files(tree).items():
        config, name = openmoss.join(at, "config.json"), openmoss.last(tree, at)
        if openmoss.R1.fullmatch(name):
            continue
        if openmoss.LLAMASCOPIUM.match(name) and "clt" not in name:
            found.append(Candidate(at, (file, config)))
            continue
        try:
            cfg = read_json(tree.path(config))
            if "sae_type" not in cfg and "expansion_factor" not in cfg:
                continue
            clt = cfg.get("sae_type") == "clt"
            layers = len(_hooks(cfg, "hook_points_in", tree.path(config))) if clt else 0
        except HubError:
            raise
        except InputError as error:  # its own fault alone: the SAEs beside it are read without it
            found.append(Candidate(at, (file, config), error=error))
            continue
        found += [Candidate(openmoss.join(at, f"layer_{i}"), (file, config), part=i) for i in range(layers)]
        if not layers:
            found.append(Candidate(at, (file, config)))
    return found


def describe(tree: Tree, candidate: Candidate) -> Description:
    """From the config and the header."""
    file, config = (tree.path(name) for name in candidate.files)
    cfg, part = read_json(config), candidate.part
    kind, act, norm = (str(cfg.get(key, "")) for key in ("sae_type", "act_fn", "norm_activation"))
    act = act.lower()
    _refuse("sae_type", kind, ("sae", "transcoder", "clt", ""), _REFUSED_TYPES, config)
    if file.endswith(".dcp"):
        raise InputError(
            f"saes: {file} is a distributed checkpoint, in pieces that only torch.distributed puts together; "
            "save the SAE as sae_weights.safetensors with OpenMOSS's save_pretrained"
        )
    _refuse("act_fn", act, tuple(_ACTS), _REFUSED_ACTS, config)
    _refuse("norm_activation", norm, ("dataset-wise", "token-wise", "inference"), _REFUSED_NORMS, config)
    found = _headers(file)
    if part is None:
        d_in, width = matrix(found, "W_E", file)
        hook_in, hook_out = (str(need(cfg, key, config)) for key in ("hook_point_in", "hook_point_out"))
    else:
        hooks_in, hooks_out = (_hooks(cfg, key, config) for key in ("hook_points_in", "hook_points_out"))
        if len(hooks_in) != len(hooks_out):
            raise InputError(f"saes: hook_points_in and hook_points_out in {config} differ in length")
        hook_in, hook_out = hooks_in[part], hooks_out[part]
        d_in, width = _layer_shape(found, part, file)
    openmoss.check_d_model(cfg, d_in, file)
    openmoss.check_encoder(cfg, found, config)
    site, out, layer = openmoss.sites(hook_in, hook_out, config)
    gated = openmoss.flag(cfg, "sparsity_include_decoder_norm", config)
    architecture, convention = _ACTS[act]
    k = whole(cfg, "top_k", config) if act == "topk" else None
    named = _K.search(candidate.path)
    if gated and act != "relu":
        convention += GATED_BY_NORM if act == "jumprelu" else "; ranked by pre * |W_dec_j|"
    if norm == "dataset-wise":
        convention += SCALED
    elif norm == "token-wise":
        convention += "; of inputs times sqrt(d) / |x|"
    how: dict[str, Any] = {"act": act, "k": k, "norm": norm, "gated": gated and act != "relu", "part": part}
    if norm == "dataset-wise":
        how["norm_in"] = openmoss.norm_key(found, (hook_in,), file)
        how["norm_out"] = openmoss.norm_key(found, (hook_out if part is None else hook_in,), file)
    if part is not None:
        suffix, out = "_clt", None
        how["layers"] = len(cfg["hook_points_in"])
    else:
        suffix = "_transcoder" if hook_in != hook_out or kind == "transcoder" else ""
        if suffix and norm == "token-wise":
            out = None  # its decoder gives the output divided by the output's own norm, which is not known
    return Description(
        architecture + suffix,
        d_in,
        width,
        convention,
        site,
        out,
        layer,
        nominal_l0=float(k) if k is not None else float(named[1]) if named else None,
        options=how,
    )


def load(info: SaeInfo) -> SaeWeights:
    """As published; a transcoder's decoder is brought to raw outputs."""
    how = options(info)
    part, norm = how["part"], how["norm"]
    names = ["W_E", "b_E", "W_E_glu", "b_E_glu", _THRESHOLD, *(["W_D", "b_D"] if part is None else [])]
    norms = [how["norm_in"], how["norm_out"]] if norm == "dataset-wise" else []
    found = _read(info.uri, [*names, *norms])
    s = s_out = 1.0
    if norms:
        s, s_out = (openmoss.factor(need(found, key, info.uri), info.d_in, key, info.uri) for key in norms)

    def own(name: str) -> torch.Tensor:
        tensor: torch.Tensor = need(found, name, info.uri)
        return tensor if part is None else tensor[part].contiguous()

    restore = info.out == info.site
    W_dec = b_dec = select_scale = None
    if part is None:
        W_dec = own("W_D")
        b_dec = found.get("b_D", torch.zeros(W_dec.shape[1]))  # none with use_decoder_bias: false
        select_scale = W_dec.norm(dim=1) if how["gated"] else None
        W_dec, b_dec = openmoss.raw_decoder(W_dec, b_dec, s, s_out, restore)
    elif how["gated"]:
        select_scale = _clt_norms(info.uri, part, how["layers"])
    return SaeWeights(
        cast(Rule, how["act"]),
        W_enc=own("W_E"),
        b_enc=own("b_E"),
        W_dec=W_dec,
        b_dec=b_dec,
        threshold=own(_THRESHOLD).exp() if how["act"] == "jumprelu" else None,
        k=how["k"],
        input=Input("constant_norm" if norm == "token-wise" else "none", scale=s),
        restore=restore,
        select_scale=select_scale,
        W_glu=own("W_E_glu") if "W_E_glu" in found else None,
        b_glu=own("b_E_glu") if "W_E_glu" in found else None,
    )


def _refuse(key: str, value: str, known: tuple[str, ...], reasons: dict[str, str], config: str) -> None:
    if value not in known:
        reason = reasons.get(value, f"known are {', '.join(name for name in known if name)}")
        raise InputError(f"saes: {key} {value!r} in {config} cannot be read: {reason}")


def _hooks(cfg: dict[str, Any], key: str, config: str) -> list[str]:
    found = need(cfg, key, config)
    if not isinstance(found, list) or not found:
        raise InputError(f"saes: {key} in {config} is not a list of hooks, one for each layer")
    return [str(name) for name in found]


def _headers(file: str) -> dict[str, Header]:
    if not file.endswith(".pt"):
        return weights.headers(file)
    return tensors(need(weights.outline(file), "sae", file))


def _read(file: str, names: list[str]) -> dict[str, torch.Tensor]:
    if not file.endswith(".pt"):
        return weights.read(file, names)
    found = need(weights.read_pickle(file), "sae", file)
    return {name: tensor.float() for name, tensor in found.items() if name in names}


def _layer_shape(found: dict[str, Header], part: int, file: str) -> tuple[int, int]:
    shape = need(dict(found), "W_E", file).shape
    if len(shape) != 3 or part >= shape[0]:
        raise InputError(f"saes: W_E in {file} has shape {shape}, not one matrix for each of the layers")
    return shape[1], shape[2]


def _clt_norms(file: str, part: int, layers: int) -> torch.Tensor:
    """|W_D_j| [m] of a layer's features over all layers they write to; one decoder at a time is in memory."""
    squares = []
    for to in range(part, layers):
        name = f"W_D.{to}"
        squares.append(need(_read(file, [name]), name, file)[part].square().sum(dim=1))
    return torch.stack(squares).sum(dim=0).sqrt()
