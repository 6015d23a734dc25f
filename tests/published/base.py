"""What every fixture module of this folder gives: `write(folder, rng, d, m, n, layer) -> list[Published]`.

`folder` is the suite's (its name may matter: `name` of the module, if it has one, is the name to use). The
formulas are numpy float64, written from the papers and publishers' code, and import nothing of the product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Formula = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Published:
    """One SAE on disk and what a reader must find."""

    path: str  # inside the suite, without file endings: the tail of its id
    architecture: str
    layer: int
    kind: str  # of its site, as sae_runtime.sites names it
    d_in: int
    width: int
    encode: Formula  # x float64 [tokens, d_in] (as the site gives it) -> activations float64 [tokens, width]
    decode: Formula | None = None  # x -> the reconstruction [tokens, d_out] of encode(x), in the raw space
    out: tuple[int, str] | None = None  # (layer, kind) of what it reconstructs
    head: int | None = None
    nominal_l0: float | None = None
    trained_on: str | None = None
    neuronpedia: str | None = None
    site_option: str | None = None  # `site:` that the spec must give, where the files do not say


def quantile_threshold(pre: np.ndarray, share: float) -> np.ndarray:
    """float32 [m]: thresholds that about `share` of the rows of `pre` [tokens, m] exceed, all positive."""
    return np.maximum(np.quantile(pre, 1 - share, axis=0), 1e-3).astype(np.float32)
