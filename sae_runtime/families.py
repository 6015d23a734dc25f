"""Finding sites in a model: each family's decoder layers, module paths and norms.

Invariant: what a tap takes is the tensor the module saw or produced, in the model's own dtype, without a
copy. Two sites are computed: `mlp_in_unit` by `Tap.finish`, in float32, as the norm itself does before
its gain; `embed_unscaled`, rows of the embedding matrix, from the token ids that the embedding saw.

A family is a table from kinds of sites to module paths inside the decoder layer. What differs is where
the norms are: Llama's `post_attention_layernorm` is the norm before the MLP, while the Gemmas from 2 on
have four norms and add to the residual what `post_attention_layernorm` and `post_feedforward_layernorm`
give; GPT-NeoX runs attention and MLP side by side on the same residual, unless its config says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from sae_runtime.errors import InputError
from sae_runtime.sites import KINDS, Site

SUPPORTED = "Llama, Mistral, Mixtral, Qwen 2 to 3.5, gpt-oss, Gemma 1 to 3, GPT-NeoX (Pythia) and GPT-2"


@dataclass(frozen=True)
class Tap:
    """A site resolved in a loaded model."""

    site: Site
    module: nn.Module
    side: Literal["input", "output"]  # of the module
    path: str  # public name, e.g. "model.layers.20.self_attn.o_proj.input"
    width: int  # length of the activation vector, captured and finished
    norm: Literal["rms", "layer"] | None = None  # the core that `finish` applies
    eps: float = 0.0  # of that norm

    def take(self, seen: torch.Tensor) -> torch.Tensor:
        """What is captured, [contexts, length, width], from the module's tensor: itself or a view of it.

        `seen` is what the module's `side` had; of `embed_unscaled` the token ids [contexts, length]. Raises
        InputError where that is not one vector of the site's width for each token.
        """
        x = seen.detach()
        if self.site.kind == "embed_unscaled":
            weight = self.module.weight
            assert isinstance(weight, torch.Tensor)
            x = functional.embedding(x, weight)
        elif self.site.head is not None:
            x = x[..., self.site.head * self.width : (self.site.head + 1) * self.width]
        if x.ndim != 3 or x.shape[-1] != self.width:
            raise InputError(
                f"saes.site: {self.path} is {tuple(x.shape)} in the model, not {self.width} values a token"
            )
        return x

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        """The site's activation from what was captured, both [tokens, width].

        The same tensor; of `mlp_in_unit` float32: what the norm multiplies with its gain.
        """
        if self.norm is None:
            return x
        x = x.float()
        if self.norm == "layer":
            x = x - x.mean(dim=-1, keepdim=True)
        # Of a layer norm the mean is zero now, so this is its biased variance.
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)


@dataclass(frozen=True)
class Family:
    """How the models of a family are laid out. Paths of `sites` count from the decoder layer."""

    prefix: str  # of the bare model (`AutoModel`) in `AutoModelForCausalLM`
    embedding: str
    layers: str
    attention: str
    mlp_norm: str  # the norm whose input, normalised, is `mlp_in_unit`
    sites: Mapping[str, str]
    scaled: bool = False  # embeddings are multiplied by sqrt(d)


_LLAMA_SITES = {
    "resid_pre": "input",
    "resid_mid": "post_attention_layernorm.input",
    "resid_post": "output",
    "attn_z": "self_attn.o_proj.input",
    "attn_out": "self_attn.output",
    "mlp_in": "mlp.input",
    "mlp_hidden": "mlp.down_proj.input",
    "mlp_out": "mlp.output",
}
_GEMMA_2_SITES = _LLAMA_SITES | {
    "resid_mid": "pre_feedforward_layernorm.input",
    "attn_out": "post_attention_layernorm.output",
    "mlp_in": "pre_feedforward_layernorm.output",
    "mlp_out": "post_feedforward_layernorm.output",
}
_NEOX_SITES = _LLAMA_SITES | {
    "attn_z": "attention.dense.input",
    "attn_out": "attention.output",
    "mlp_hidden": "mlp.dense_4h_to_h.input",
}
_GPT_2_SITES = _LLAMA_SITES | {
    "resid_mid": "ln_2.input",
    "attn_z": "attn.c_proj.input",
    "attn_out": "attn.output",
    "mlp_hidden": "mlp.c_proj.input",
}
_LLAMA = Family("model", "embed_tokens", "layers", "self_attn", "post_attention_layernorm", _LLAMA_SITES)
_GEMMA_1 = Family(
    "model", "embed_tokens", "layers", "self_attn", "post_attention_layernorm", _LLAMA_SITES, scaled=True
)
_GEMMA_2 = Family(
    "model", "embed_tokens", "layers", "self_attn", "pre_feedforward_layernorm", _GEMMA_2_SITES, scaled=True
)
_NEOX = Family("gpt_neox", "embed_in", "layers", "attention", "post_attention_layernorm", _NEOX_SITES)
_GPT_2 = Family("transformer", "wte", "h", "attn", "ln_2", _GPT_2_SITES)
FAMILIES: dict[str, Family] = {  # by the text model's `model_type`
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_moe": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "qwen3_5_text": _LLAMA,
    "qwen3_5_moe_text": _LLAMA,
    "gpt_oss": _LLAMA,
    "gemma": _GEMMA_1,
    "gemma2": _GEMMA_2,
    "gemma3_text": _GEMMA_2,
    "gpt_neox": _NEOX,
    "gpt2": _GPT_2,
}
# Checkpoints that hold more than text: where `AutoModelForCausalLM` has their text model.
WRAPPERS = {"gemma3": "model.language_model", "qwen3_5": "model", "qwen3_5_moe": "model"}
# Modules that pass on vectors of the model's width, by their path in the layer.
DROPOUTS = ("post_attention_dropout", "post_mlp_dropout", "attn.resid_dropout", "mlp.dropout")


def family(config: Any) -> Family:
    """The family of a text model's config. Raises InputError for a model type that is not known."""
    kind = getattr(config, "model_type", "")
    if kind not in FAMILIES:
        raise InputError(f"model.uri: model type {kind!r} has no known sites; supported are {SUPPORTED}")
    return FAMILIES[kind]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a bare text model (`AutoModel`). InputError for an unknown model type."""
    layers = getattr(model, family(model.config).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def resolve(model: nn.Module, site: Site, prefix: str | None = None) -> Tap:
    """Find `site` in a bare text model (`AutoModel`).

    `prefix` is what `AutoModelForCausalLM` calls that model, where it is nested in another (`WRAPPERS`).
    Raises InputError when the layer or the module is not there, or the family has no such site.
    """
    config: Any = model.config
    found = family(config)
    layers = decoder_layers(model)
    prefix = prefix or found.prefix
    if not 0 <= site.layer < len(layers):
        raise InputError(
            f"saes: layer {site.layer} does not exist in the model, which has {len(layers)} layers"
        )
    if site.head is not None and site.kind != "attn_z":
        raise InputError(f"saes.site: head {site.head} of {site.kind}: only attn_z has heads")
    if site.kind in ("embed", "embed_unscaled"):
        return _embedding(model, found, site, prefix)
    layer = layers[site.layer]
    at = f"{prefix}.{found.layers}.{site.layer}."
    if site.kind == "mlp_in_unit":
        norm = getattr(layer, found.mlp_norm)
        core: Literal["rms", "layer"] = "layer" if isinstance(norm, nn.LayerNorm) else "rms"
        eps = float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)
        path = f"{at}{found.mlp_norm}.input, normalised"
        return Tap(site, norm, "input", path, int(config.hidden_size), core, eps)
    relative = site.kind if "." in site.kind else _relative(config, found, layer, site)
    module, name, side = _module(config, layer, relative, site)
    width = _width(config, found, layer, module, name, side)
    if width is None:
        raise _lacks(config, site, f"{relative} does not give one vector of known width for each token")
    if site.head is None:
        return Tap(site, module, side, at + relative, width)
    heads = int(config.num_attention_heads)
    if not 0 <= site.head < heads:
        raise InputError(f"saes.site: head {site.head} does not exist in the model, which has {heads} heads")
    return Tap(site, module, side, f"{at}{relative}[head {site.head}]", width // heads)


def _embedding(model: nn.Module, found: Family, site: Site, prefix: str) -> Tap:
    embedding: Any = getattr(model, found.embedding)
    width, path = int(embedding.embedding_dim), f"{prefix}.{found.embedding}"
    if site.kind == "embed_unscaled":
        return Tap(site, embedding, "input", f"{path}.weight", width)
    if found.scaled and not hasattr(embedding, "embed_scale"):
        # Early releases of transformers 5 scale in the model's body, before the first layer.
        first = decoder_layers(model)[0]
        return Tap(site, first, "input", f"{prefix}.{found.layers}.0.input", width)
    return Tap(site, embedding, "output", f"{path}.output", width)


def _relative(config: Any, found: Family, layer: nn.Module, site: Site) -> str:
    """The module path, with its side, of one of KINDS; InputError where the layer has no such site."""
    if site.kind not in found.sites:
        raise InputError(f"saes.site: {site.kind!r} is unknown; known are {', '.join(KINDS)}")
    if site.kind == "resid_mid" and getattr(config, "use_parallel_residual", False):
        raise _lacks(config, site, "attention and MLP read the same residual (use_parallel_residual)")
    if site.kind == "mlp_hidden" and _is_mixture(layer):
        raise _lacks(config, site, "its MLP is a mixture of experts, each with a hidden layer of its own")
    if not hasattr(layer, found.attention) and site.kind in ("attn_z", "attn_out"):
        # Qwen 3.5: three layers of four have linear attention, which adds to the residual as well.
        if site.kind == "attn_out" and hasattr(layer, "linear_attn"):
            return "linear_attn.output"
        raise _lacks(config, site, f"the layer has no {found.attention}")
    return found.sites[site.kind]


def _module(
    config: Any, layer: nn.Module, relative: str, site: Site
) -> tuple[nn.Module, str, Literal["input", "output"]]:
    """Module, its path in the layer, side. InputError where it is not there."""
    name, _, ending = relative.rpartition(".")
    if ending not in ("input", "output"):
        raise InputError(f"saes.site: {relative} must end in .input or .output")
    side: Literal["input", "output"] = "input" if ending == "input" else "output"
    try:
        return layer.get_submodule(name), name, side
    except AttributeError:
        there = ", ".join(child for child, _ in layer.named_children())
        raise _lacks(config, site, f"a decoder layer has no module {name!r}, only {there}") from None


def _width(config: Any, found: Family, layer: nn.Module, module: Any, name: str, side: str) -> int | None:
    """Length of the vectors at a module's side; None where it has no one vector for each token."""
    hidden = int(config.hidden_size)
    inside_mixture = name.startswith("mlp.") and _is_mixture(layer)
    if inside_mixture:  # experts and routers see the tokens that were sent to them, in another shape
        return None
    if module is layer or name in (found.attention, "linear_attn", "mlp", *DROPOUTS):
        return hidden
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return _matrix(module)[side == "output"]
    if "." not in name and name in dict(layer.named_children()) and _is_norm(module):
        return hidden  # norms inside attention see single heads
    if name in ("mlp.act", "mlp.act_fn"):
        return _matrix(layer.get_submodule(found.sites["mlp_hidden"].removesuffix(".input")))[0]
    return None


def _matrix(module: Any) -> tuple[int, int]:
    """Lengths of a linear layer's input and output; GPT-2's are `Conv1D`, transposed and named otherwise."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return int(module.nx), int(module.nf)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")


def _is_mixture(layer: nn.Module) -> bool:
    return hasattr(layer.mlp, "experts")


def _lacks(config: Any, site: Site, why: str) -> InputError:
    return InputError(
        f"saes.site: a model of type {config.model_type} has no site {site.kind} at layer {site.layer}: {why}"
    )
