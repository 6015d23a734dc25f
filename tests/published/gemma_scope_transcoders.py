"""Gemma Scope 1 transcoders: they read the MLP's input without the norm's gain and write another width."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from published.base import Published, quantile_threshold

name = "gemma-scope-2b-pt-transcoders"


def write(folder: Path, rng: np.random.Generator, d: int, m: int, n: int, layer: int) -> list[Published]:
    """Two of one layer; only the canonical one, of the L0 nearer 100, has a page on Neuronpedia."""
    found = []
    for l0, neuronpedia in ((104, f"gemma-2-2b/{layer}-gemmascope-transcoder-16k"), (38, None)):
        W, b = rng.normal(size=(d, m)).astype(np.float32), rng.normal(size=m).astype(np.float32)
        W_dec, b_dec = rng.normal(size=(m, n)).astype(np.float32), rng.normal(size=n).astype(np.float32)
        threshold = quantile_threshold(rng.normal(size=(500, d)) * 3 @ W + b, 0.3)
        path = f"layer_{layer}/width_16k/average_l0_{l0}"
        file = folder / path / "params.npz"
        file.parent.mkdir(parents=True)
        np.savez(file, W_enc=W, b_enc=b, W_dec=W_dec, b_dec=b_dec, threshold=threshold)

        def encode(
            x: np.ndarray, W: np.ndarray = W, b: np.ndarray = b, t: np.ndarray = threshold
        ) -> np.ndarray:
            pre = x @ W.astype(np.float64) + b
            return np.where(pre > t, np.maximum(pre, 0), 0)

        def decode(
            x: np.ndarray, f: object = encode, D: np.ndarray = W_dec, c: np.ndarray = b_dec
        ) -> np.ndarray:
            return f(x) @ D.astype(np.float64) + c  # type: ignore[operator]

        found.append(
            Published(
                path,
                "jumprelu_transcoder",
                layer,
                "mlp_in_unit",
                d,
                m,
                encode,
                decode,
                (layer, "mlp_out"),
                nominal_l0=float(l0),
                trained_on="google/gemma-2-2b",
                neuronpedia=neuronpedia,
            )
        )
    return found
