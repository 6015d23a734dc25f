"""Qwen Scope: a config at the top and a .pt file per layer, both matrices transposed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from published.base import Formula, Published

name = "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
K = 4


def write(folder: Path, rng: np.random.Generator, d: int, m: int, n: int, layer: int) -> list[Published]:
    """Two layers; biases low enough that some tokens have fewer than k positive pre-activations."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "topk_sae",
                "base_model": "Qwen/Qwen3-1.7B-Base",
                "d_model": d,
                "d_sae": m,
                "k": K,
                "num_layers": 28,
                "hook_point": "resid_post",
                "dtype": "float32",
            }
        )
    )
    found = []
    for at in (layer, layer + 9):
        E, b = rng.normal(size=(m, d)).astype(np.float32), rng.normal(size=m).astype(np.float32) - 3
        D, c = rng.normal(size=(d, m)).astype(np.float32), rng.normal(size=d).astype(np.float32)
        state = {"W_enc": E, "W_dec": D, "b_enc": b, "b_dec": c}
        torch.save(
            {key: torch.from_numpy(value) for key, value in state.items()}, folder / f"layer{at}.sae.pt"
        )

        def encode(x: np.ndarray, E: np.ndarray = E, b: np.ndarray = b) -> np.ndarray:
            pre = np.einsum("td,md->tm", x, E.astype(np.float64)) + b
            least = np.sort(pre, axis=1)[:, -K, None]
            return np.where(pre >= least, pre, 0)  # as they are: the k highest may be negative

        def decode(x: np.ndarray, f: Formula = encode, D: np.ndarray = D, c: np.ndarray = c) -> np.ndarray:
            return np.einsum("tm,dm->td", f(x), D.astype(np.float64)) + c

        found.append(
            Published(
                f"layer{at}",
                "topk",
                at,
                "resid_post",
                d,
                m,
                encode,
                decode,
                (at, "resid_post"),
                nominal_l0=float(K),
                trained_on="Qwen/Qwen3-1.7B-Base",
            )
        )
    return found
