"""Goodfire: one SAE of the residual stream of Llama 3.1 8B and one of Llama 3.3 70B, bfloat16.

    Llama-3.1-8B-Instruct-SAE-l19.pth        Llama-3.3-70B-Instruct-SAE-l50.pt
        encoder_linear.weight [m,d]  encoder_linear.bias  decoder_linear.weight [d,m]  decoder_linear.bias

    f = relu(x encoder_linear.weight^T + encoder_linear.bias)        x: the output of layers[19], layers[50]

A gpt-oss variant with `decoder.weight` in the place of decoder_linear is refused: nothing in it says its
activation function (top-k elsewhere) or the orientation of its decoder.
"""

from __future__ import annotations

import re

from sae_runtime import weights
from sae_runtime.errors import InputError
from sae_runtime.formats import lone_pt
from sae_runtime.formats.base import RELU, Candidate, Description, matrix, need
from sae_runtime.sae import SaeInfo, SaeWeights
from sae_runtime.sites import Site
from sae_runtime.tree import Tree

_KEYS = ("encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias")


def candidates(tree: Tree) -> list[Candidate]:
    """One for each lone file with an encoder_linear."""
    return lone_pt.candidates(tree, frozenset({"encoder_linear.weight"}))


def describe(tree: Tree, candidate: Candidate) -> Description:
    """From the file's name and header."""
    file = tree.path(candidate.files[0])
    found = weights.headers(file)
    width, d_in = matrix(found, "encoder_linear.weight", file)
    if "decoder_linear.weight" not in found:
        raise InputError(
            f"saes: {file} has no decoder_linear.weight, as the SAEs for Llama have: its activation function "
            "and its decoder's orientation are not in the file, so it cannot be read exactly"
        )
    site = Site(lone_pt.layer(file), "resid_post")
    model = re.match(r"(Llama-3[.\w]*-\d+B-Instruct)-SAE", file.rsplit("/", 1)[-1])
    trained_on = f"meta-llama/{model[1]}" if model else None
    return Description("standard", d_in, width, RELU, site, site, by_name=True, trained_on=trained_on)


def load(info: SaeInfo) -> SaeWeights:
    """As published: no bias is subtracted."""
    found = weights.read(info.uri, _KEYS)
    encoder, b_enc, decoder, b_dec = (need(found, key, info.uri) for key in _KEYS)
    return SaeWeights("relu", encoder.T.contiguous(), b_enc, decoder.T.contiguous(), b_dec)
