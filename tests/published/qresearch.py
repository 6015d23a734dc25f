"""qresearch: a lone file of two linear layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from published import goodfire
from published.base import Published


def write(folder: Path, rng: np.random.Generator, d: int, m: int, n: int, layer: int) -> list[Published]:
    """The published file."""
    folder.mkdir()
    file, model = "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    return [goodfire.one(folder / file, rng, d, m, ("encoder", "decoder"), 19, model, torch.float32)]
