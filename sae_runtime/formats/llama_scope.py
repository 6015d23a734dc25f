"""Llama Scope (OpenMOSS, 2024; Llama 3.1 8B): SAEs of three sites and transcoders, bfloat16.

    Llama3_1-8B-Base-L15R-8x/hyperparams.json
    Llama3_1-8B-Base-L15R-8x/checkpoints/final.safetensors
        encoder.weight [m,d]  encoder.bias  decoder.weight [n,m]  decoder.bias

R is the residual, M what the MLP and A what attention adds to it, TC a transcoder of the MLP. The
activation is that of the publisher's own loader, whose three steps are done here, in float32:

    1  b_enc /= s    b_dec /= s_out    W_dec *= s / s_out         s = sqrt(d) / average norm of the input
    2  n_j = |W_dec_j|    W_dec_j /= n_j    W_enc_j *= n_j    b_enc_j *= n_j
    3  f = relu(pre) * (pre > threshold), one scalar that no step scales

SAELens, and Neuronpedia with it, leaves step 2 out and reports p_j = f_j * s / n_j: other values, and
the same ones active only where the file's decoder columns have norm 1. Source: arXiv 2410.20526 and
OpenMOSS's Language-Model-SAEs of November 2024.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from sae_runtime import weights
from sae_runtime.errors import InputError
from sae_runtime.formats import openmoss
from sae_runtime.formats.base import JUMPRELU, Candidate, Description, matrix, need, number, options
from sae_runtime.sae import SaeInfo, SaeWeights
from sae_runtime.tree import Tree, folder, read_json

_WEIGHTS = "checkpoints/final.safetensors"
_NAME = re.compile(r"Llama3_1-8B-Base-L(\d+)(R|A|M|TC)-(8|32)x")
_NEURONPEDIA = {"R": "res", "A": "att", "M": "mlp"}
_WIDTHS = {"8": "32k", "32": "131k"}
_FOLDED = (
    "; decoder norms folded as the publisher's loader does: Neuronpedia and SAELens report "
    "p_j = f_j * s / n_j, s = sqrt(d) / {norm:g}, n_j the norm of W_dec_j * s / s_out in the file"
)


def candidates(tree: Tree) -> list[Candidate]:
    """One for each checkpoints/final.safetensors beside a hyperparams.json."""
    found = []
    for file in tree.files:
        if file == _WEIGHTS or file.endswith(f"/{_WEIGHTS}"):
            at = folder(folder(file))
            if tree.has(config := openmoss.join(at, "hyperparams.json")):
                found.append(Candidate(at, (file, config)))
    return found


def describe(tree: Tree, candidate: Candidate) -> Description:
    """From hyperparams.json, all of which is checked that changes an activation, and the header."""
    file, config = (tree.path(name) for name in candidate.files)
    cfg = read_json(config)
    width, d_in = matrix(weights.headers(file), "encoder.weight", file)
    openmoss.check_d_model(cfg, d_in, file)
    for key, value in _EXPECTED.items():
        if cfg.get(key, value) != value:
            raise InputError(f"saes: {key} in {config} is {cfg[key]!r}; only {value!r} is known")
    norms = need(cfg, "dataset_average_activation_norm", config)
    if not isinstance(norms, dict):
        raise InputError(f"saes: dataset_average_activation_norm in {config} holds no norms by in and out")
    norm_in, norm_out = (number(norms, key, config) for key in ("in", "out"))
    hook_in, hook_out = (str(need(cfg, key, config)) for key in ("hook_point_in", "hook_point_out"))
    site, out, layer = openmoss.sites(hook_in, hook_out, config)
    match = _NAME.fullmatch(openmoss.last(tree, candidate.path))
    trained_on = "meta-llama/Llama-3.1-8B" if match else None
    neuronpedia = None
    if match and match[2] in _NEURONPEDIA:
        neuronpedia = f"llama3.1-8b/{match[1]}-llamascope-{_NEURONPEDIA[match[2]]}-{_WIDTHS[match[3]]}"
    return Description(
        "jumprelu" if hook_in == hook_out else "jumprelu_transcoder",
        d_in,
        width,
        JUMPRELU + _FOLDED.format(norm=norm_in),
        site,
        out,
        layer,
        nominal_l0=number(cfg, "top_k", config) if cfg.get("top_k") else None,
        trained_on=trained_on,
        neuronpedia=neuronpedia,
        options={
            "threshold": number(cfg, "jump_relu_threshold", config),
            "s": openmoss.factor(norm_in, d_in, "dataset_average_activation_norm.in", config),
            "s_out": openmoss.factor(norm_out, d_in, "dataset_average_activation_norm.out", config),
        },
    )


def load(info: SaeInfo) -> SaeWeights:
    """The three steps. A decoder column of norm 0 stays 0: its feature never fires."""
    found, how = weights.read(info.uri), options(info)
    tensors: dict[str, Any] = {key: need(found, key, info.uri) for key in _KEYS}
    W_enc, b_enc, W_dec, b_dec = tensors.values()
    s, s_out = how["s"], how["s_out"]
    b_enc, b_dec, W_dec = b_enc / s, b_dec / s_out, W_dec * (s / s_out)
    n = W_dec.norm(dim=0)
    W_dec = W_dec / torch.where(n > 0, n, 1.0)
    return SaeWeights(
        "jumprelu",
        W_enc=(W_enc * n[:, None]).T.contiguous(),
        b_enc=b_enc * n,
        W_dec=W_dec.T.contiguous(),
        b_dec=b_dec,
        threshold=torch.full_like(n, how["threshold"]),
        restore=info.out == info.site,
    )


_KEYS = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
_EXPECTED = {  # what every published one says; another value would be another formula
    "act_fn": "jumprelu",
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "use_decoder_bias": True,
    "apply_decoder_bias_to_pre_encoder": False,
    "use_glu_encoder": False,
}
