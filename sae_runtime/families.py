"""Finding sites in a model: each family's decoder layers, module paths and norms.

Invariant: what a tap yields is the tensor the module saw or produced, in the model's own dtype; only a
`mlp_in_unit` site is computed from it, in float32, as the norm itself does before its gain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sae_runtime.errors import InputError
from sae_runtime.sites import KINDS, Site


@dataclass(frozen=True)
class Tap:
    """A site resolved in a loaded model."""

    site: Site
    module: nn.Module
    side: str  # "input" or "output" of the module
    path: str  # public name, e.g. "model.layers.20.self_attn.o_proj.input"
    width: int  # length of the activation vector

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        """The site's activation from what was captured, [tokens, width]: the same, or float32 computed from it."""
        return x


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of decoder layers of a bare model (`AutoModel`).

    Raises InputError for a model without one of the shape that Llama, Mistral, Qwen and Gemma share.
    """
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(layers[0], "self_attn"):
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise InputError(
            f"model.uri: model type {kind!r} has no known sites; "
            "supported are decoders laid out like Llama, Mistral, Qwen and Gemma"
        )
    return layers


def resolve(model: nn.Module, site: Site) -> Tap:
    """Find `site` in a bare model (`AutoModel`).

    Raises InputError when the layer or the module is not there.
    """
    layers = decoder_layers(model)
    if not 0 <= site.layer < len(layers):
        raise InputError(
            f"saes: layer {site.layer} does not exist in the model, which has {len(layers)} layers"
        )
    layer: Any = layers[site.layer]
    hidden = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    prefix = f"model.layers.{site.layer}"
    if site.kind == "resid_post":
        return Tap(site, layer, "output", f"{prefix}.output", hidden)
    if site.kind == "mlp_out":
        name = "post_feedforward_layernorm" if hasattr(layer, "post_feedforward_layernorm") else "mlp"
        return Tap(site, getattr(layer, name), "output", f"{prefix}.{name}.output", hidden)
    if site.kind == "attn_z":
        projection = layer.self_attn.o_proj
        path = f"{prefix}.self_attn.o_proj.input"
        return Tap(site, projection, "input", path, int(projection.in_features))
    raise InputError(f"saes: site {site.kind!r} is unknown; known are {', '.join(KINDS)}")
