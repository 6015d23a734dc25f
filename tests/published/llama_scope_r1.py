"""Llama Scope R1: log thresholds, the average norm in the file, gates on decoder norms or not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from published.base import Published, quantile_threshold

name = "Llama-Scope-R1-Distill"
NORM = 9.5


def write(folder: Path, rng: np.random.Generator, d: int, m: int, n: int, layer: int) -> list[Published]:
    """Two mixtures: one gates on pre * |W_dec_j|, one does not and names its norm by the hook."""
    found = []
    for mixture, gated in (
        ("0-Slimpajama-800M-OpenR1-Math-220k", True),
        ("800M-Slimpajama-0-OpenR1-Math-220k", False),
    ):
        path, hook = f"{mixture}/L{layer}R", f"blocks.{layer}.hook_resid_post"
        E, b = rng.normal(size=(m, d)).astype(np.float32), rng.normal(size=m).astype(np.float32)
        D, c = rng.normal(size=(d, m)).astype(np.float32) * 2, rng.normal(size=d).astype(np.float32)
        s = np.sqrt(d) / NORM
        column = np.linalg.norm(D.astype(np.float64), axis=0) if gated else np.ones(m)
        pre = (rng.normal(size=(500, d)) * 3 * s @ E.T + b) * column
        log = np.log(quantile_threshold(pre, 0.3)).astype(np.float32)
        norms = {key: torch.tensor(NORM) for key in (("in", "out") if gated else (hook,))}
        (folder / path).mkdir(parents=True)
        save_file(
            {
                "encoder.weight": torch.from_numpy(E), "encoder.bias": torch.from_numpy(b),
                "decoder.weight": torch.from_numpy(D), "decoder.bias": torch.from_numpy(c),
                "log_jumprelu_threshold": torch.from_numpy(log),
                **{f"dataset_average_activation_norm.{key}": value for key, value in norms.items()},
            },
            folder / path / "sae_weights.safetensors",
        )  # fmt: skip
        config = {
            "sae_type": "sae", "hook_point_in": hook, "hook_point_out": hook, "d_model": d,
            "expansion_factor": m / d,
            "act_fn": "jumprelu", "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": gated,
            "use_decoder_bias": True, "top_k": 50, "model_name": "meta-llama/Llama-3.1-8B",
        }  # fmt: skip
        (folder / path / "config.json").write_text(json.dumps(config))

        def encode(
            x: np.ndarray, E: np.ndarray = E, b: np.ndarray = b, log: np.ndarray = log, s: float = s,
            column: np.ndarray = column,
        ) -> np.ndarray:  # fmt: skip
            pre = (x * s) @ E.T.astype(np.float64) + b
            return np.where(pre * column > np.exp(log.astype(np.float64)), np.maximum(pre, 0), 0)

        def decode(
            x: np.ndarray, f: object = encode, D: np.ndarray = D, c: np.ndarray = c, s: float = s
        ) -> np.ndarray:
            return (f(x) @ D.T.astype(np.float64) + c) / s  # type: ignore[operator]

        found.append(
            Published(
                path,
                "jumprelu",
                layer,
                "resid_post",
                d,
                m,
                encode,
                decode,
                (layer, "resid_post"),
                trained_on="deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
            )
        )
    return found
