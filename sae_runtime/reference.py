"""The definition of an activation: JumpReLU in dense float32, straight from the formula. Slow.

    pre = x W_enc + b_enc            f = relu(pre) * [pre > threshold]        x_hat = f W_dec + b_dec

(Gemma Scope, arXiv 2408.05147, equations 1 to 3, with the published convention that neither a
decoder bias is subtracted nor the input normalised at run time.) A threshold met exactly is
inactive. Every fast path is tested against this file; nothing else decides what is right.
"""

from __future__ import annotations

import torch

from sae_runtime.sae import SaeWeights


def encode(x: torch.Tensor, sae: SaeWeights) -> torch.Tensor:
    """Activations float32 [tokens, width] of `x` [tokens, d_in] (any float dtype)."""
    pre = x.float() @ sae.W_enc + sae.b_enc
    return torch.relu(pre) * (pre > sae.threshold)


def decode(f: torch.Tensor, sae: SaeWeights) -> torch.Tensor:
    """The reconstruction float32 [tokens, d_in] from activations `f` [tokens, width]."""
    return f @ sae.W_dec + sae.b_dec


def stored(f: torch.Tensor) -> torch.Tensor:
    """What an index holds of activations: rounded to bfloat16 (nearest even), as float32."""
    return f.to(torch.bfloat16).float()
