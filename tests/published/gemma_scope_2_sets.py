"""Gemma Scope 2's CLTs and crosscoders: one file per layer, whose decoder writes to many layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from published.base import Published
from published.gemma_scope_2 import POST, PRE, config, tensors

name = "gemma-scope-2-270m-pt"


def write(folder: Path, rng: np.random.Generator, d: int, m: int, n: int, layer: int) -> list[Published]:
    """A CLT of three layers, an affine one without a config, and a crosscoder of four layers."""
    hooks = [f"model.layers.{{all}}.{hook}" for hook in (PRE, POST)]
    four = [layer, layer + 3, layer + 7, layer + 10]
    cross = f"model.layers.{{{','.join(map(str, four))}}}.output"
    old = "google/gemma-3-270m-pt"  # there is no such model on the hub
    rows = (
        ("clt/width_262k_l0_medium", "mlp_in", [0, 1, 2], False, 61.0,
         config("clt", *hooks, 3 * m, 61, model_name=old)),
        ("clt/width_262k_l0_big_affine", "mlp_in", [0, 1, 2], True, None, None),
        (f"crosscoder/layer_{'_'.join(map(str, four))}_width_65k_l0_big", "resid_post", four, False, 150.0,
         config("crosscoder", cross, cross, 4 * m, 150, model_name=old)),
    )  # fmt: skip
    found = []
    for path, kind, layers, affine, l0, text in rows:
        place = folder / path
        place.mkdir(parents=True)
        if text is not None:
            (place / "config.json").write_text(text)
        for i, at in enumerate(layers):
            width = m + i  # the parts of a set need not be equal
            parts, encode = tensors(rng, d, width)
            parts["w_dec"] = rng.normal(size=(width, len(layers), d)).astype(np.float32)
            parts["b_dec"] = rng.normal(size=d).astype(np.float32)
            if affine:
                parts["affine_skip_connection"] = rng.normal(size=(d, d)).astype(np.float32)
            save_file(parts, place / f"params_layer_{i}.safetensors")
            architecture = "jumprelu_crosscoder" if kind == "resid_post" else "jumprelu_clt"
            found.append(
                Published(
                    f"{path}/params_layer_{i}",
                    "jumprelu_skip_clt" if affine else architecture,
                    at,
                    kind,
                    d,
                    width,
                    encode,
                    nominal_l0=l0,
                    trained_on="google/gemma-3-270m",
                )
            )
    return found
