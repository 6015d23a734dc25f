"""An SAE in the common form that every published format is read into: identity, and tensors with a rule.

Invariant: `SaeInfo` is small, frozen and crosses processes; `SaeWeights` holds float32 tensors in the
orientation of `x @ W_enc`, exactly as published, with the publisher's own order of operations:

    z = normalise(x) * scale - b_pre              pre = (z W_enc + b_enc) [* sigmoid(z W_glu + b_glu)]

and then `rule` decides which features are active and what their activations are (`reference.py`).
Nothing is folded into the weights except where a loader's page in docs/FORMATS.md says the publisher
does so: folding is cheap to do and rounds differently, and the float32 reference is the definition.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch

from sae_runtime.sites import Site

Rule = Literal["relu", "jumprelu", "gated", "topk", "topk_signed", "abstopk", "groupmax"]
Norm = Literal["none", "constant_norm", "layer_norm", "unit_rms", "center"]


@dataclass(frozen=True)
class SaeInfo:
    """One SAE of a suite."""

    id: str  # suite / path, e.g. "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    suite: str
    path: str  # inside the suite, without file ending
    format: str  # the module of sae_runtime.formats that reads it
    files: tuple[str, ...]  # URIs; the weights first
    site: Site  # what it reads
    out: Site | None  # what its decoder gives: `site` for an SAE; None where no decoder of its own is known
    architecture: str  # "jumprelu", "topk", "jumprelu_transcoder", ...
    d_in: int
    width: int
    nominal_l0: float | None
    trained_on: str | None
    convention: str  # what an activation is, for people
    neuronpedia: str | None = None  # "gemma-2-2b/20-gemmascope-res-16k"
    options: str = "{}"  # JSON: what the format's loader needs to know beside the tensors
    keep: str | float = "tokens"  # "tokens", "documents", "none", or the sampled fraction

    @property
    def uri(self) -> str:
        """Where the weights are."""
        return self.files[0]

    @property
    def keep_text(self) -> str:
        """`keep` as the `saes` view shows it."""
        return self.keep if isinstance(self.keep, str) else f"sample {self.keep:g}"


@dataclass(frozen=True)
class Input:
    """What happens to an activation before it is encoded, token by token, in float32.

    none           x
    constant_norm  x * sqrt(d) / |x|                           (SAELens `constant_norm_rescale`)
    layer_norm     (x - mean) / (std + eps), std of N - 1      (SAELens, OpenAI)
    unit_rms       x * rsqrt(mean(x^2) + eps), no gain
    center         x - mean over d                             (TransformerLens `center_writing_weights`)

    and then times `scale`, a constant.
    """

    norm: Norm = "none"
    scale: float = 1.0
    eps: float = 1e-5


@dataclass(frozen=True)
class SaeWeights:
    """Tensors of one SAE, float32 on the CPU, and how they are used. `None` where there is none."""

    rule: Rule
    W_enc: torch.Tensor  # [d_in, width]
    b_enc: torch.Tensor  # [width]; of a gated SAE its b_mag
    W_dec: torch.Tensor | None = None  # [width, d_out]
    b_dec: torch.Tensor | None = None  # [d_out]
    W_skip: torch.Tensor | None = (
        None  # [d_in, d_out], normalise(x) * scale @ W_skip is added to the decoder's
    )
    threshold: torch.Tensor | None = None  # [width], jumprelu
    k: int | None = None  # topk, abstopk; groups of a groupmax
    input: Input = Input()
    restore: bool = True  # whether the decoder's output is to be un-normalised: not in a transcoder
    b_pre: torch.Tensor | None = None  # [d_in], subtracted after `input`
    b_gate: torch.Tensor | None = None  # [width], gated
    r_mag: torch.Tensor | None = None  # [width], gated
    select_scale: torch.Tensor | None = None  # [width], > 0: pre * select_scale is compared, pre is the value
    W_glu: torch.Tensor | None = None  # [d_in, width]
    b_glu: torch.Tensor | None = None  # [width]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    def fingerprint(self) -> str:
        """Digest of the tensors' float32 values, names, shapes, and of how they are used (hex, 128 bits)."""
        digest = hashlib.blake2b(f"{self.rule} {self.k} {self.input} {self.restore}".encode(), digest_size=16)
        for name, tensor in self.tensors().items():
            array = np.ascontiguousarray(tensor.numpy())
            digest.update(f"{name}{array.shape}".encode())
            digest.update(array.data)
        return digest.hexdigest()
