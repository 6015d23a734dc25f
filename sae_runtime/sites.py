"""Where in a model an SAE reads: sites by kind and layer, as Hugging Face module paths.

A site's public name is the module's path in `AutoModelForCausalLM` followed by `.input` or
`.output`, the convention of Gemma Scope 2's `hf_hook_point_in`. Residual sites are taken from the
decoder layer itself, never from `output_hidden_states`, whose last entry is after the final norm.
Gemma Scope's conventions (arXiv 2408.05147, section 3.1): `mlp_out` is after the post-norm where
the block has one, `attn_z` is the concatenated heads before the output projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from sae_runtime.errors import InputError

KINDS = ("resid_post", "mlp_out", "attn_z")


@dataclass(frozen=True, order=True)
class Site:
    """One place of the model: `kind` is one of KINDS, `layer` counts from zero."""

    layer: int
    kind: str


@dataclass(frozen=True)
class Tap:
    """A site resolved in a loaded model."""

    site: Site
    module: nn.Module
    side: str  # "input" or "output" of the module
    path: str  # public name, e.g. "model.layers.20.self_attn.o_proj.input"
    width: int  # length of the activation vector


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
