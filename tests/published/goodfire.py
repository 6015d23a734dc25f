"""Goodfire: two lone files in bfloat16, whose names say model and layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from published.base import Published

FILES = {
    "Llama-3.1-8B-Instruct-SAE-l19.pth": (19, "meta-llama/Llama-3.1-8B-Instruct"),
    "Llama-3.3-70B-Instruct-SAE-l50.pt": (50, "meta-llama/Llama-3.3-70B-Instruct"),
    "my_sae_layer_7.pt": (7, None),
}
KEYS = ("encoder_linear", "decoder_linear")


def write(folder: Path, rng: np.random.Generator, d: int, m: int, n: int, layer: int) -> list[Published]:
    """All of FILES."""
    folder.mkdir()
    return [
        one(folder / file, rng, d, m, KEYS, at, model, torch.bfloat16) for file, (at, model) in FILES.items()
    ]


def one(
    file: Path, rng: np.random.Generator, d: int, m: int, keys: tuple[str, str], layer: int,
    model: str | None, dtype: torch.dtype,
) -> Published:  # fmt: skip
    """Two linear layers of a lone file."""
    encoder, decoder = keys
    shapes = {
        f"{encoder}.weight": (m, d),
        f"{encoder}.bias": (m,),
        f"{decoder}.weight": (d, m),
        f"{decoder}.bias": (d,),
    }
    state = {key: torch.from_numpy(rng.normal(size=shape)).to(dtype) for key, shape in shapes.items()}
    torch.save(state, file)
    E, b, D, c = (value.double().numpy() for value in state.values())

    def encode(x: np.ndarray) -> np.ndarray:
        return np.maximum(x @ E.T + b, 0)

    def decode(x: np.ndarray) -> np.ndarray:
        return encode(x) @ D.T + c

    return Published(
        file.stem,
        "standard",
        layer,
        "resid_post",
        d,
        m,
        encode,
        decode,
        (layer, "resid_post"),
        trained_on=model,
    )
