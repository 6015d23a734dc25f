"""Where in a model an SAE reads: the kinds of sites and the names that other libraries give them.

A site's public name is the module's path in `AutoModelForCausalLM` followed by `.input` or `.output`,
the convention of Gemma Scope 2's `hf_hook_point_in`; `families.py` finds them in a model. Residual
sites are taken from the decoder layer itself, never from `output_hidden_states`, whose last entry is
after the final norm. Gemma Scope's conventions (arXiv 2408.05147, section 3.1) name the kinds:

    embed              token embeddings as the model uses them (Gemma: times sqrt(d))
    embed_unscaled     rows of the embedding matrix
    resid_pre          input of the decoder layer           resid_post   its output
    resid_mid          the residual between attention and MLP
    attn_z             concatenated heads, before the output projection; with `head`, one of them
    attn_out           what attention adds to the residual, after the post-norm where the block has one
    mlp_in             input of the MLP, after its norm and the norm's gain
    mlp_in_unit        the same normalised but without the gain, in float32
    mlp_hidden         input of the MLP's down projection
    mlp_out            what the MLP adds to the residual, after the post-norm where the block has one
    a.b.input          any module of the decoder layer by its path, with .input or .output
"""

from __future__ import annotations

import re
from dataclasses import dataclass

KINDS = (
    "embed", "embed_unscaled", "resid_pre", "resid_mid", "resid_post",
    "attn_z", "attn_out", "mlp_in", "mlp_in_unit", "mlp_hidden", "mlp_out",
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One place of the model. `layer` counts from zero (0 for embeddings); `kind` as above."""

    layer: int
    kind: str
    head: int | None = None  # attn_z only: this head's slice

    def __lt__(self, other: Site) -> bool:
        return self._order < other._order

    @property
    def _order(self) -> tuple[int, str, int]:
        return self.layer, self.kind, -1 if self.head is None else self.head


_TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "attn.hook_z": "attn_z",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "ln2.hook_normalized": "mlp_in_unit",
    "hook_mlp_in": "resid_mid",  # TransformerLens means the residual before the norm
    "mlp.hook_in": "mlp_in",  # an addition of circuit-tracer and SAELens: after the norm and its gain
    "mlp.hook_pre_in": "mlp_in",
    "mlp.hook_post": "mlp_hidden",
    "mlp.hook_out": "mlp_out",
}
_HUGGING_FACE = {  # inside a decoder layer, of all families that have the module
    "input": "resid_pre",
    "output": "resid_post",
    "self_attn.o_proj.input": "attn_z",
    "attention.dense.input": "attn_z",
    "attn.c_proj.input": "attn_z",
    "pre_feedforward_layernorm.input": "resid_mid",
    "ln_2.input": "resid_mid",
    "pre_feedforward_layernorm.output": "mlp_in",
    "ln_2.output": "mlp_in",
    "mlp.input": "mlp_in",
    "mlp.down_proj.input": "mlp_hidden",
    "mlp.dense_4h_to_h.input": "mlp_hidden",
    "mlp.c_proj.input": "mlp_hidden",
    "post_feedforward_layernorm.output": "mlp_out",
}


def from_transformer_lens(name: str, head: int | None = None) -> Site | None:
    """The site of a TransformerLens hook, e.g. "blocks.12.hook_resid_post"; None for an unknown one."""
    if name == "hook_embed":
        return Site(0, "embed")
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    kind = _TRANSFORMER_LENS.get(match[2]) if match else None
    return Site(int(match[1]), kind, head if kind == "attn_z" else None) if match and kind else None


def from_hugging_face(name: str) -> Site | None:
    """The site of a module path with .input or .output, e.g. "model.layers.7.output"; None if there is none.

    Prefixes of any wrapper are accepted: the path counts from the decoder layer on.
    """
    match = re.search(r"(?:^|\.)(?:layers|h)\.(\d+)\.((?:.+\.)?(?:input|output))$", name)
    return Site(int(match[1]), _HUGGING_FACE.get(match[2], match[2])) if match else None
