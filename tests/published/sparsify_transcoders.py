"""EleutherAI sparsify: transcoders, of which only the late ones say so with `transcode`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from published import sparsify
from published.base import Published

name = "skip-transcoder-Llama-3.2-1B-131k"


def write(folder: Path, rng: np.random.Generator, d: int, m: int, n: int, layer: int) -> list[Published]:
    """By `transcode`, by skip_connection without it, and by the repository's name alone. No run config."""

    def one(path: str, **how: object) -> Published:
        return sparsify.one(folder, rng, d, m, layer, path, model=None, **{"kind": "mlp_in", **how})  # type: ignore[arg-type]

    at = f"layers.{layer}"
    return [
        one(f"late/{at}.mlp", transcode=True, skip=True, out="mlp.output"),
        one(f"groupmax/{at}.mlp/seed0", transcode=True, rule="groupmax", out="mlp.output"),
        one(f"early/{at}.mlp", skip=True, out="mlp.output"),
        one(f"named/{at}.mlp", out="mlp.output"),
        one(f"named/{at}.self_attn", kind="self_attn.input", out="self_attn.output"),
        one(f"an_sae/{at}.mlp", kind="mlp.output", transcode=False),
    ]
