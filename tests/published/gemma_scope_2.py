"""Gemma Scope 2: folders of one SAE or transcoder each, a config beside most of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from published.base import Formula, Published, quantile_threshold

name = "gemma-scope-2-4b-it"
MODEL = "google/gemma-3-4b-it"
POST, PRE = "post_feedforward_layernorm.output", "pre_feedforward_layernorm.output"


def tensors(rng: np.random.Generator, d: int, m: int) -> tuple[dict[str, np.ndarray], Formula]:
    """The encoder of one file, float32, with a threshold below zero (it degenerates to relu)."""
    W, b = rng.normal(size=(d, m)).astype(np.float32), rng.normal(size=m).astype(np.float32)
    threshold = quantile_threshold(rng.normal(size=(500, d)) * 3 @ W + b, 0.3)
    threshold[m // 2] = -0.5

    def encode(x: np.ndarray) -> np.ndarray:
        pre = x @ W.astype(np.float64) + b
        return np.where(pre > threshold, np.maximum(pre, 0), 0)

    return {"w_enc": W, "b_enc": b, "threshold": threshold}, encode


def config(kind: str, hook_in: str, hook_out: str, width: int, l0: int, **other: Any) -> str:
    """The eight keys of a published config.json."""
    return json.dumps(
        {
            "hf_hook_point_in": hook_in,
            "hf_hook_point_out": hook_out,
            "width": width,
            "model_name": MODEL,
            "architecture": "jump_relu",
            "l0": l0,
            "affine_connection": False,
            "type": kind,
            **other,
        }
    )


def write(folder: Path, rng: np.random.Generator, d: int, m: int, n: int, layer: int) -> list[Published]:
    """Folders of all four kinds, with `_all`, `_affine` and `_seed_1`, old names, two without config."""
    stack, page = f"model.layers.{layer}", f"gemma-3-4b-it/{layer}-gemmascope-2"
    rows: tuple[tuple[str, str, str, str, int | None, dict[str, Any], str | None], ...] = (
        (f"resid_post/layer_{layer}_width_16k_l0_medium", "resid_post", "output", "output", 55,
         {}, f"{page}-res-16k"),
        (f"resid_post/layer_{layer}_width_262k_l0_medium_seed_1", "resid_post", "output", "output", 54,
         {"model_name": "gemma-v3-4b-it"}, None),
        (f"resid_post_all/layer_{layer}_width_16k_l0_small", "resid_post", "output", "output", 13,
         {"hf_hook_point_in": f"model.language_model.layers.{layer}.output",
          "hf_hook_point_out": f"model.language_model.layers.{layer}.output"}, None),
        (f"attn_out/layer_{layer}_width_16k_l0_big", "attn_z", "self_attn.o_proj.input",
         "self_attn.o_proj.input", 120, {}, None),
        (f"mlp_out_all/layer_{layer}_width_16k_l0_big", "mlp_out", POST, POST, 90, {}, None),
        (f"transcoder/layer_{layer}_width_16k_l0_medium", "mlp_in", PRE, POST, 50, {}, None),
        (f"transcoder_all/layer_{layer}_width_16k_l0_small_affine", "mlp_in", PRE, POST, 15,
         {"affine_connection": True}, f"{page}-transcoder-16k"),
        (f"mlp_out/layer_{layer}_width_65k_l0_small", "mlp_out", POST, POST, None, {}, None),
        (f"transcoder/layer_{layer}_width_65k_l0_big_affine", "mlp_in", PRE, POST, None, {}, None),
    )  # fmt: skip
    found = []
    for path, kind, hook_in, hook_out, l0, other, neuronpedia in rows:
        transcoder, affine = path.startswith("transcoder"), "_affine" in path
        to = n if transcoder else d
        parts, encode = tensors(rng, d, m)
        D, c = rng.normal(size=(m, to)).astype(np.float32), rng.normal(size=to).astype(np.float32)
        A = rng.normal(size=(d, to)).astype(np.float32) if affine else np.zeros((d, to), np.float32)
        place = folder / path
        place.mkdir(parents=True)
        save_file(
            {**parts, "w_dec": D, "b_dec": c, **({"affine_skip_connection": A} if affine else {})},
            place / "params.safetensors",
        )
        (place / "examples.safetensors").write_bytes(b"not to be opened")
        if l0 is not None:
            (place / "config.json").write_text(
                config(
                    "transcoder" if transcoder else "sae",
                    **{"hook_in": f"{stack}.{hook_in}", "hook_out": f"{stack}.{hook_out}"},
                    width=m,
                    l0=l0,
                    **other,
                )
            )

        def decode(
            x: np.ndarray, f: Formula = encode, D: np.ndarray = D, c: np.ndarray = c, A: np.ndarray = A
        ) -> np.ndarray:
            return f(x) @ D.astype(np.float64) + c + x @ A.astype(np.float64)

        suffix = ("_skip_transcoder" if affine else "_transcoder") if transcoder else ""
        found.append(
            Published(
                path,
                f"jumprelu{suffix}",
                layer,
                kind,
                d,
                m,
                encode,
                decode,
                (layer, "mlp_out" if transcoder else kind),
                nominal_l0=l0,
                trained_on=MODEL,
                neuronpedia=neuronpedia,
            )
        )
    return found
