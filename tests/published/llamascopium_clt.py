"""llamascopium 2: a cross-layer transcoder is one file; each layer's encoder is an SAE of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from published.base import Published, quantile_threshold
from published.llamascopium import config, relu, save, topk

name = "Llama-Scope-2-CLT"
K, LAYERS = 3, 3


def write(folder: Path, rng: np.random.Generator, d: int, m: int, n: int, layer: int) -> list[Published]:
    """Three layers, in files with jumprelu gated by norms, with top-k, and with relu."""
    found = []
    for act, gated in (("jumprelu", True), ("topk", True), ("relu", False)):
        path = f"clt/8x/clt_8x_{act}"
        E, b = (
            rng.normal(size=(LAYERS, d, m)).astype(np.float32),
            rng.normal(size=(LAYERS, m)).astype(np.float32),
        )
        D = [rng.normal(size=(i + 1, m, d)).astype(np.float32) for i in range(LAYERS)]
        norms = [3.0 + i for i in range(LAYERS)]
        hooks_in = [f"blocks.{i}.hook_resid_mid" for i in range(LAYERS)]
        hooks_out = [f"blocks.{i}.hook_mlp_out" for i in range(LAYERS)]
        theta = np.stack([quantile_threshold(rng.normal(size=(500, m)) * 20, 0.3) for _ in range(LAYERS)])
        log = np.log(theta).astype(np.float32)
        state = {
            "W_E": E, "b_E": b, "activation_function.log_jumprelu_threshold": log,
            **{f"W_D.{i}": value for i, value in enumerate(D)},
            **{f"b_D.{i}": rng.normal(size=d).astype(np.float32) for i in range(LAYERS)},
            **{
                f"dataset_average_activation_norm.{hook}": np.asarray(value, np.float32)
                for hook, value in zip(hooks_in + hooks_out, norms * 2, strict=True)
            },
        }  # fmt: skip
        if act != "jumprelu":
            del state["activation_function.log_jumprelu_threshold"]
        save(folder / path / "sae_weights.safetensors", state)
        said = config(
            d, m, sae_type="clt", act_fn=act, sparsity_include_decoder_norm=gated, hook_points_in=hooks_in,
            hook_points_out=hooks_out,
        )  # fmt: skip
        (folder / path / "config.json").write_text(said)
        for i in range(LAYERS):
            squares = sum((D[to][i].astype(np.float64) ** 2).sum(axis=1) for to in range(i, LAYERS))
            column = np.sqrt(squares) if gated else np.ones(m)

            def encode(
                x: np.ndarray, E: np.ndarray = E[i], b: np.ndarray = b[i], log: np.ndarray = log[i],
                column: np.ndarray = column, s: float = np.sqrt(d) / norms[i], act: str = act,
            ) -> np.ndarray:  # fmt: skip
                z = ((x * s) @ E.astype(np.float64) + b) * column
                if act == "jumprelu":
                    z = z * (z > np.exp(log.astype(np.float64)))
                return (topk(relu(z), K) if act == "topk" else relu(z)) / column

            base = "standard" if act == "relu" else act
            l0 = float(K) if act == "topk" else None
            found.append(
                Published(f"{path}/layer_{i}", f"{base}_clt", i, "resid_mid", d, m, encode, nominal_l0=l0)
            )
    return found
