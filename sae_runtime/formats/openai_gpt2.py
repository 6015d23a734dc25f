"""OpenAI's SAEs of GPT-2 small (arXiv 2406.04093): five locations, v1, v4 (ReLU) and v5 (TopK).

    resid_post_mlp_v5_32k/autoencoders/6.pt
        pre_bias [d]  latent_bias [m]  encoder.weight [m,d]  decoder.weight [d,m]
        activation "TopK"  activation_state_dict {"k": 32, "postact_fn": "ReLU"}

    z = x, or with TopK (x - mean) / (std + 1e-5) of the token, std of N - 1
    pre = (z - pre_bias) encoder.weight^T + latent_bias        f = relu(pre), of TopK at the k highest

The model must not be centred (TransformerLens center_writing_weights=False), which a plain GPT-2 is not.
"""

from __future__ import annotations

import re
from typing import Any

from sae_runtime import weights
from sae_runtime.errors import InputError
from sae_runtime.formats import lone_pt
from sae_runtime.formats.base import RELU, TOPK, Candidate, Description, matrix, need, options, whole
from sae_runtime.sae import Input, SaeInfo, SaeWeights
from sae_runtime.sites import Site
from sae_runtime.tree import Tree, stem

_KINDS = {
    "resid_delta_attn": "attn_out",
    "resid_post_attn": "resid_mid",
    "resid_delta_mlp": "mlp_out",
    "resid_post_mlp": "resid_post",
    "mlp_post_act": "mlp_hidden",
}
_PLACE = re.compile(rf"/({'|'.join(_KINDS)})(?:_v\d+(?:_\d+k)?)?/autoencoders/(\d+)\.pt$")
_KEYS = ("encoder.weight", "latent_bias", "decoder.weight", "pre_bias")


def candidates(tree: Tree) -> list[Candidate]:
    """By the published folders; of other lone files those with a pre_bias and a latent_bias."""
    named = [file for file in tree.files if _PLACE.search(f"/{tree.path(file)}")]
    found = [Candidate(stem(file, lone_pt.ENDINGS), (file,)) for file in named]
    if named:  # a suite as published: nothing else is opened
        return found
    return lone_pt.candidates(tree, frozenset({"pre_bias", "latent_bias"}))


def describe(tree: Tree, candidate: Candidate) -> Description:
    """From the path, and from the file's activation and shapes."""
    file = tree.path(candidate.files[0])
    said = weights.outline(file)
    width, d_in = matrix(lone_pt.tensors(said), "encoder.weight", file)
    k = _k(said, file)
    match = _PLACE.search(f"/{file}")
    number = re.search(r"(?:^|/)(\d+)\.pt$", file)
    site = Site(int(match[2]), _KINDS[match[1]]) if match else None
    return Description(
        "standard" if k is None else "topk",
        d_in,
        width,
        RELU if k is None else f"{TOPK}; of layer-normed inputs",
        site,
        site,
        layer=int(number[1]) if number else None,
        nominal_l0=None if k is None else float(k),
        trained_on="openai-community/gpt2",
        options={"k": k},
    )


def load(info: SaeInfo) -> SaeWeights:
    """As published; pre_bias is subtracted before the encoder and added after the decoder."""
    k = options(info)["k"]
    found = weights.read(info.uri, _KEYS)
    encoder, b_enc, decoder, bias = (need(found, key, info.uri) for key in _KEYS)
    return SaeWeights(
        "relu" if k is None else "topk",
        encoder.T.contiguous(),
        b_enc,
        decoder.T.contiguous(),
        bias,
        k=k,
        input=Input() if k is None else Input("layer_norm", eps=1e-5),
        b_pre=bias,
    )


def _k(said: dict[str, Any], file: str) -> int | None:
    """k of a TopK, None of a ReLU, which the oldest files do not name."""
    activation = said.get("activation", "ReLU")
    if activation == "ReLU":
        return None
    state = said.get("activation_state_dict")
    if activation != "TopK" or not isinstance(state, dict):
        raise InputError(f"saes: activation {activation!r} in {file} is unknown; known are ReLU and TopK")
    if state.get("postact_fn", "ReLU") != "ReLU":
        raise InputError(f"saes: postact_fn {state['postact_fn']!r} in {file} is unknown; known is ReLU")
    return whole(state, "k", f"activation_state_dict of {file}")
