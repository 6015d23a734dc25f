"""The definition of an activation: dense float32, straight from the publishers' formulas. Slow.

    z     = normalise(x) * scale - b_pre
    pre   = (z W_enc + b_enc) [* sigmoid(z W_glu + b_glu)]
    rank  = pre * select_scale                       (select_scale is 1 unless the format has one)

    relu      f = relu(pre)
    jumprelu  f = relu(pre) * [rank > threshold]     Gemma Scope, arXiv 2408.05147, equations 1 to 3
    gated     f = [z W_enc + b_gate > 0] * relu(exp(r_mag) * (z W_enc) + b_enc)       arXiv 2404.16014
    topk      f = relu(pre) at the k highest ranks   arXiv 2406.04093
    topk_signed        pre at the k highest ranks (negative ones too)
    abstopk   f = pre at the k highest |rank|
    groupmax  f = relu(pre) at the highest rank of each of k equal runs of features

A threshold met exactly is inactive; equal ranks go to the lower feature. Every fast path is tested
against this file; nothing else decides what is right.
"""

from __future__ import annotations

import torch

from sae_runtime.sae import Input, SaeWeights


def encode(x: torch.Tensor, sae: SaeWeights) -> torch.Tensor:
    """Activations float32 [tokens, width] of `x` [tokens, d_in] (any float dtype)."""
    z = inputs(x, sae)
    if sae.rule == "gated":
        assert sae.b_gate is not None
        assert sae.r_mag is not None
        u = z @ sae.W_enc
        return torch.relu(torch.exp(sae.r_mag) * u + sae.b_enc) * (u + sae.b_gate > 0)
    pre = z @ sae.W_enc + sae.b_enc
    if sae.W_glu is not None:
        assert sae.b_glu is not None
        pre = pre * torch.sigmoid(z @ sae.W_glu + sae.b_glu)
    rank = pre if sae.select_scale is None else pre * sae.select_scale
    if sae.rule == "relu":
        return torch.relu(pre)
    if sae.rule == "jumprelu":
        assert sae.threshold is not None
        return torch.relu(pre) * (rank > sae.threshold)
    assert sae.k is not None
    if sae.rule == "groupmax":
        groups = rank.reshape(len(rank), sae.k, -1)
        highest = groups == groups.amax(dim=2, keepdim=True)
        chosen = highest & (highest.cumsum(dim=2) == 1)  # the first of equals
        return torch.relu(pre) * chosen.reshape(rank.shape)
    order = torch.argsort(rank.abs() if sae.rule == "abstopk" else rank, dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(rank, dtype=torch.bool).scatter(1, order[:, : sae.k], True)
    return (torch.relu(pre) if sae.rule == "topk" else pre) * chosen


def decode(f: torch.Tensor, x: torch.Tensor, sae: SaeWeights) -> torch.Tensor:
    """The reconstruction float32 [tokens, d_out] from activations `f` [tokens, width] of `x` [tokens, d_in].

    An SAE's is brought back to the space of `x` (`restore`); a transcoder's is as it was trained.
    """
    assert sae.W_dec is not None
    return restored(f @ sae.W_dec, x, sae)


def restored(product: torch.Tensor, x: torch.Tensor, sae: SaeWeights) -> torch.Tensor:
    """The reconstruction from what the decoder's rows add up to, float32 [tokens, d_out]."""
    assert sae.b_dec is not None
    y = product + sae.b_dec
    if sae.W_skip is not None:
        y = y + normalised(x, sae.input) @ sae.W_skip  # without b_pre, as sparsify has it
    if not sae.restore:
        return y
    x, y = x.float(), y / sae.input.scale
    mean = x.mean(dim=1, keepdim=True)
    if sae.input.norm == "constant_norm":
        return y * (x.norm(dim=1, keepdim=True) / x.shape[1] ** 0.5)
    if sae.input.norm == "layer_norm":
        return y * (x.std(dim=1, keepdim=True) + sae.input.eps) + mean
    if sae.input.norm == "unit_rms":
        return y * torch.sqrt(x.square().mean(dim=1, keepdim=True) + sae.input.eps)
    return y + mean if sae.input.norm == "center" else y


def inputs(x: torch.Tensor, sae: SaeWeights) -> torch.Tensor:
    """What is multiplied with W_enc: float32 [tokens, d_in]."""
    z = normalised(x, sae.input)
    return z if sae.b_pre is None else z - sae.b_pre


def normalised(x: torch.Tensor, how: Input) -> torch.Tensor:
    """`x` [tokens, d_in] as `Input` has it, float32."""
    x = x.float()
    if how.norm == "constant_norm":
        x = x * (x.shape[1] ** 0.5 / x.norm(dim=1, keepdim=True))
    elif how.norm == "layer_norm":
        x = x - x.mean(dim=1, keepdim=True)
        x = x / (x.std(dim=1, keepdim=True) + how.eps)
    elif how.norm == "unit_rms":
        x = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + how.eps)
    elif how.norm == "center":
        x = x - x.mean(dim=1, keepdim=True)
    return x if how.scale == 1.0 else x * how.scale


def stored(f: torch.Tensor) -> torch.Tensor:
    """What an index holds of activations: rounded to bfloat16 (nearest even), as float32."""
    return f.to(torch.bfloat16).float()
