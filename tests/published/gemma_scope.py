"""Gemma Scope 1: layer_*/width_*/average_l0_*/params.npz in a repository named after its site."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from published.base import Published, quantile_threshold

name = "gemma-scope-2b-pt-res"


def write(folder: Path, rng: np.random.Generator, d: int, m: int, n: int, layer: int) -> list[Published]:
    """Two SAEs of one layer and width (one is canonical), one of the embeddings."""
    found = []
    folder_, page = f"layer_{layer}/width_16k", f"gemma-2-2b/{layer}-gemmascope-res-16k"
    for path, kind, at, l0, neuronpedia in (
        (f"{folder_}/average_l0_71", "resid_post", layer, 71.0, page),
        (f"{folder_}/average_l0_22", "resid_post", layer, 22.0, f"{page}__l0-22"),
        ("embedding/width_4k/average_l0_6", "embed_unscaled", 0, 6.0, None),
    ):
        W, b = rng.normal(size=(d, m)).astype(np.float32), rng.normal(size=m).astype(np.float32)
        W_dec, b_dec = rng.normal(size=(m, d)).astype(np.float32), rng.normal(size=d).astype(np.float32)
        threshold = quantile_threshold(rng.normal(size=(500, d)) * 3 @ W + b, 0.3)
        threshold[1] = -2.0  # degenerates to relu
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
                "jumprelu",
                at,
                kind,
                d,
                m,
                encode,
                decode,
                (at, kind),
                nominal_l0=l0,
                trained_on="google/gemma-2-2b",
                neuronpedia=neuronpedia,
            )
        )
    return found
