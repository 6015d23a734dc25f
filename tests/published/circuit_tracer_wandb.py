"""mwhanna's Qwen3 sets that have a wandb-config.yaml of either spelling and no config.yaml; bfloat16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from published.base import Published
from published.circuit_tracer import published, tensors

name = "qwen3-14b-transcoders-lowl0"


def write(folder: Path, rng: np.random.Generator, d: int, m: int, n: int, layer: int) -> list[Published]:
    """The set at the top of the suite, and another in a folder."""
    found = []
    for path, config in (("", "wandb-config.yaml"), ("more/", "wanb-config.yaml")):
        T = tensors(rng, d, m, d)
        stored = {key: torch.from_numpy(value).to(torch.bfloat16) for key, value in T.items()}
        T = {key: value.float().numpy() for key, value in stored.items()}
        (folder / path).mkdir(parents=True)
        save_file(stored, folder / path / f"layer_{layer}.safetensors")
        (folder / path / config).write_text(f"d_model:\n  value: {d}\nd_feature:\n  value: {m}\n")
        found.append(
            published(
                f"{path}layer_{layer}",
                T,
                "transcoder",
                layer,
                trained_on="Qwen/Qwen3-14B",
                neuronpedia=f"qwen3-14b/{layer}-transcoder-hp-lowl0",
            )
        )
    return found
