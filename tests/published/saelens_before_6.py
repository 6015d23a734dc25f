"""SAELens, configs from before version 6: flat, some keys under other names, and defaults of that time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from published.base import Published
from published.saelens import published, put, tensors


def write(folder: Path, rng: np.random.Generator, d: int, m: int, n: int, layer: int) -> list[Published]:
    """Flat configs; the first says "standard" and is top-k."""
    found = []
    hook = f"blocks.{layer}.hook_resid_pre"
    topk = {"activation_fn_kwargs": {"k": 3}, "normalize_activations": "layer_norm"}
    centred = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    for path, architecture, written, keys, kind, more in (
        ("disguised", "topk", "standard", {"activation_fn_str": "topk", **topk}, "resid_pre",
         {"k": 3, "norm": "layer_norm"}),
        ("disguised_v5", "topk", "standard", {"activation_fn": "topk", "sae_lens_version": "5.10.2", **topk},
         "resid_pre", {"k": 3, "norm": "layer_norm"}),
        ("topk", "topk", "topk", {"k": 9, **topk}, "resid_pre", {"k": 3, "norm": "layer_norm"}),
        ("unnamed", "standard", None, {"normalize_activations": False}, "resid_pre", {}),
        ("ones", "standard", "standard", {}, "resid_pre", {"scale": 1.0}),
        ("finetuned", "standard", "standard", {"finetuning_scaling_factor": True}, "resid_pre",
         {"scale": 2.5}),
        ("kept", "standard", "standard", {"apply_b_dec_to_input": False}, "resid_pre", {"subtract": False}),
        ("centred", "standard", "standard", centred, "resid_pre", {"norm": "center"}),
        ("attention", "standard", "standard", {"hook_point": f"blocks.{layer}.attn.hook_z"}, "attn_z", {}),
        ("head", "standard", "standard",
         {"hook_point": f"blocks.{layer}.attn.hook_z", "hook_point_head_index": 1}, "attn_z", {"head": 1}),
        ("gated", "gated", "gated", {"neuronpedia_id": "gpt2-small/x"}, "resid_pre",
         {"neuronpedia": "gpt2-small/x"}),
        ("jumprelu", "jumprelu", "jumprelu", {"activation_fn_str": "relu"}, "resid_pre", {}),
        ("log", "jumprelu", "jumprelu", {}, "resid_pre", {"log": True}),
    ):  # fmt: skip
        options: dict[str, Any] = {"trained_on": "openai-community/gpt2", **more}
        T = tensors(rng, architecture, d, m, d, log=options.pop("log", False))
        cfg = {
            "hook_point": hook,
            "hook_point_layer": 99,  # says nothing: the hook's name does
            "model_name": "gpt2-small",
            "d_in": d,
            "d_sae": m,
            "dtype": "torch.float32",
            "architecture": written,
            "l1_coefficient": 0.1,
            **keys,
        }
        scale = options.pop("scale", None)
        factor = np.ones(m, np.float32) if scale is None else np.linspace(1, scale, m, dtype=np.float32)
        put(folder / path, cfg, T if scale is None else {**T, "scaling_factor": factor})
        T = {**T, "W_dec": T["W_dec"] * factor[:, None]}  # the factor is between activations and decoder
        found.append(published(path, T, architecture, layer, kind, **options))
    return found
