"""Attention SAEs of Kissane and Krzyzanowski: NAME.pt with NAME_cfg.json."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from published.base import Published

name = "attn-saes-gpt2-small-all-layers"


def write(folder: Path, rng: np.random.Generator, d: int, m: int, n: int, layer: int) -> list[Published]:
    """Two layers; the names have dots that are no endings. A .pt without a config is something else."""
    found = []
    folder.mkdir(parents=True)
    torch.save({"W": torch.zeros(2, 2)}, folder / "other.pt")
    for at in (layer, layer + 1):
        path = f"gpt2-small_L{at}_Hcat_z_lr1.20e-03_l11.80e+00_v9"
        W_enc, W_dec, b_enc, b_dec = (
            rng.normal(size=size).astype(np.float32) for size in ((d, m), (m, d), m, d)
        )
        tensors = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
        torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, folder / f"{path}.pt")
        cfg = {
            "act_name": f"blocks.{at}.attn.hook_z",
            "act_size": d,
            "dict_size": m,
            "model_name": "gpt2-small",
        }
        (folder / f"{path}_cfg.json").write_text(json.dumps(cfg))

        def encode(x: np.ndarray, T: dict[str, np.ndarray] = tensors) -> np.ndarray:
            return np.maximum((x - T["b_dec"]) @ T["W_enc"].astype(np.float64) + T["b_enc"], 0)

        def decode(x: np.ndarray, T: dict[str, np.ndarray] = tensors, f: object = encode) -> np.ndarray:
            return f(x) @ T["W_dec"].astype(np.float64) + T["b_dec"]  # type: ignore[operator]

        found.append(
            Published(
                path,
                "standard",
                at,
                "attn_z",
                d,
                m,
                encode,
                decode,
                (at, "attn_z"),
                trained_on="openai-community/gpt2",
                neuronpedia=f"gpt2-small/{at}-att-kk",
            )
        )
    return found
