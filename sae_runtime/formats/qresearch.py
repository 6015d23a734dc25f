"""qresearch: an SAE of the residual stream of DeepSeek-R1-Distill-Llama-8B, layer 19.

DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt
    encoder.weight [m,d]  encoder.bias  decoder.weight [d,m]  decoder.bias

f = relu(x encoder.weight^T + encoder.bias)        x: the output of layers[19]
"""

from __future__ import annotations

from sae_runtime import weights
from sae_runtime.formats import lone_pt
from sae_runtime.formats.base import RELU, Candidate, Description, matrix, need
from sae_runtime.sae import SaeInfo, SaeWeights
from sae_runtime.sites import Site
from sae_runtime.tree import Tree

_KEYS = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
_OTHERS = frozenset({"pre_bias", "latent_bias", "bias", "b_dec", "decoder_bias", "threshold", "k"})


def candidates(tree: Tree) -> list[Candidate]:
    """One for each lone file with these tensors and none that changes the formula."""
    return lone_pt.candidates(tree, frozenset({"encoder.weight", "decoder.bias"}), _OTHERS)


def describe(tree: Tree, candidate: Candidate) -> Description:
    """From the file's name and header."""
    file = tree.path(candidate.files[0])
    width, d_in = matrix(weights.headers(file), "encoder.weight", file)
    site = Site(lone_pt.layer(file), "resid_post")
    known = "R1-Distill-Llama-8B" in file
    trained_on = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B" if known else None
    return Description("standard", d_in, width, RELU, site, site, by_name=True, trained_on=trained_on)


def load(info: SaeInfo) -> SaeWeights:
    """As published: no bias is subtracted."""
    found = weights.read(info.uri, _KEYS)
    encoder, b_enc, decoder, b_dec = (need(found, key, info.uri) for key in _KEYS)
    return SaeWeights("relu", encoder.T.contiguous(), b_enc, decoder.T.contiguous(), b_dec)
