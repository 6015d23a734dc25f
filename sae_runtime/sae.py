"""An SAE in the common form: what identifies it, and the tensors that encode and decode.

Invariant: `SaeInfo` is small, frozen and crosses processes; `SaeWeights` holds float32 tensors in
the orientation of `x @ W_enc`, exactly as published (no folding), whatever file they came from.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from sae_runtime.sites import Site


@dataclass(frozen=True)
class SaeInfo:
    """One SAE of a suite."""

    id: str  # suite / path, e.g. "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    suite: str
    path: str  # inside the suite, without file ending
    uri: str  # of the weight file
    site: Site
    architecture: str  # "jumprelu"
    d_in: int
    width: int
    nominal_l0: float | None
    trained_on: str | None
    keep: str | float = "tokens"  # "tokens", "documents", "none", or the sampled fraction
    convention: str = "published encoder output: relu(pre) * (pre > threshold)"

    @property
    def keep_text(self) -> str:
        """`keep` as the `saes` view shows it."""
        return self.keep if isinstance(self.keep, str) else f"sample {self.keep:g}"


@dataclass(frozen=True)
class SaeWeights:
    """Tensors of one SAE, float32 on the CPU."""

    W_enc: torch.Tensor  # [d_in, width]
    b_enc: torch.Tensor  # [width]
    threshold: torch.Tensor  # [width]
    W_dec: torch.Tensor  # [width, d_in]
    b_dec: torch.Tensor  # [d_in]

    def fingerprint(self) -> str:
        """Digest of the tensors' float32 values, names and shapes (hex, 128 bits)."""
        digest = hashlib.blake2b(digest_size=16)
        for name in ("W_enc", "b_enc", "threshold", "W_dec", "b_dec"):
            array = np.ascontiguousarray(getattr(self, name).numpy())
            digest.update(f"{name}{array.shape}".encode())
            digest.update(array.data)
        return digest.hexdigest()
