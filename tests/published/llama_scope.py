"""Llama Scope: bfloat16 SAEs of three sites and a transcoder, decoder columns of any norm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from published.base import Published

SITES = {
    "R": ("hook_resid_post", "resid_post", "hook_resid_post", "resid_post", "res"),
    "A": ("hook_attn_out", "attn_out", "hook_attn_out", "attn_out", "att"),
    "M": ("hook_mlp_out", "mlp_out", "hook_mlp_out", "mlp_out", "mlp"),
    "TC": ("ln2.hook_normalized", "mlp_in_unit", "hook_mlp_out", "mlp_out", None),
}
THRESHOLD, NORM, NORM_OUT = 0.52734375, 17.125, 10.8125


def tensors(rng: np.random.Generator, d: int, m: int) -> dict[str, torch.Tensor]:
    """Of a file: encoder [m,d] and decoder [d,m] with column norms from 0.2 to 5, bfloat16."""
    decoder = rng.normal(size=(d, m))
    decoder *= np.geomspace(0.2, 5, m) / np.linalg.norm(decoder, axis=0)
    made = {
        "encoder.weight": rng.normal(size=(m, d)),
        "encoder.bias": rng.normal(size=m),
        "decoder.weight": decoder,
        "decoder.bias": rng.normal(size=d),
    }
    return {key: torch.from_numpy(value).to(torch.bfloat16) for key, value in made.items()}


def hyperparams(d: int, m: int, hook_in: str, hook_out: str, norm_out: float, **other: Any) -> str:
    """hyperparams.json, with keys as published."""
    return json.dumps(
        {
            "hook_point_in": hook_in, "hook_point_out": hook_out, "d_model": d, "d_sae": m,
            "expansion_factor": 8, "act_fn": "jumprelu", "jump_relu_threshold": THRESHOLD,
            "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True,
            "use_decoder_bias": True, "dataset_average_activation_norm": {"in": NORM, "out": norm_out},
            "apply_decoder_bias_to_pre_encoder": False, "top_k": 50, **other,
        }
    )  # fmt: skip


def write(folder: Path, rng: np.random.Generator, d: int, m: int, n: int, layer: int) -> list[Published]:
    """One of each site at 8x, and a residual one at 32x."""
    found = []
    for letter, width in (("R", 8), ("A", 8), ("M", 8), ("TC", 8), ("R", 32)):
        hook_in, kind, hook_out, kind_out, short = SITES[letter]
        path = f"Llama3_1-8B-Base-L{layer}{letter}-{width}x"
        norm_out = NORM_OUT if letter == "TC" else NORM
        stored = tensors(rng, d, m)
        (folder / path / "checkpoints").mkdir(parents=True)
        save_file(stored, folder / path / "checkpoints" / "final.safetensors")
        (folder / path / "hyperparams.json").write_text(
            hyperparams(d, m, f"blocks.{layer}.{hook_in}", f"blocks.{layer}.{hook_out}", norm_out)
        )
        E, b, D, c = (value.double().numpy() for value in stored.values())
        s, s_out = np.sqrt(d) / NORM, np.sqrt(d) / norm_out

        def encode(
            x: np.ndarray, E: np.ndarray = E, b: np.ndarray = b, D: np.ndarray = D * (s / s_out), s: float = s
        ) -> np.ndarray:
            column = np.linalg.norm(D, axis=0)
            pre = x @ (E * column[:, None]).T + b / s * column
            return np.where(pre > THRESHOLD, pre, 0)

        def decode(
            x: np.ndarray, f: Any = encode, D: np.ndarray = D * (s / s_out), c: np.ndarray = c / s_out
        ) -> np.ndarray:
            return f(x) @ (D / np.linalg.norm(D, axis=0)).T + c

        neuronpedia = f"llama3.1-8b/{layer}-llamascope-{short}-{'32k' if width == 8 else '131k'}"
        found.append(
            Published(
                path,
                "jumprelu_transcoder" if letter == "TC" else "jumprelu",
                layer,
                kind,
                d,
                m,
                encode,
                decode,
                (layer, kind_out),
                nominal_l0=50.0,
                trained_on="meta-llama/Llama-3.1-8B",
                neuronpedia=neuronpedia if short else None,
            )
        )
    return found
