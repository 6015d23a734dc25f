"""What encoding costs beside its matrix product, rule by rule, and what a chunk's summary costs.

Random weights and inputs: thresholds let about 80 of 4,096 features through, ranking rules keep 64.
Milliseconds, the least of `--repeat` rounds; the product is `addmm` of the same shape alone.

    python benchmarks/encode.py [--tokens 4096] [--width 4096] [--d 576] [--device cpu] [--repeat 9]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import torch

from sae_runtime.encode import Encoder, Sparse
from sae_runtime.sae import SaeWeights
from sae_runtime.summaries import Chunk, Summary

CONTEXT = 256


def rules(width: int) -> dict[str, dict[str, Any]]:
    """Arguments of SaeWeights beside the matrices; what follows a space only tells rows apart."""
    ones = torch.ones(width)
    return {
        "jumprelu": {"threshold": 2.05 * ones},
        "gated": {"b_gate": -2.05 * ones, "r_mag": 0.1 * ones},
        "topk": {"k": 64},
        "topk scaled": {"k": 64, "select_scale": 1.1 * ones},
        "topk_signed": {"k": 64},
        "abstopk": {"k": 64},
        "groupmax": {"k": 64},
    }


def least(run: Callable[[], object], repeat: int, device: torch.device) -> float:
    """Milliseconds of the fastest of `repeat` rounds, after one that compiles."""
    found = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(1000 * (time.perf_counter() - began))
    return min(found[1:])


def summarise(sparse: Sparse, tokens: int, width: int) -> None:
    """Take the rows in as one chunk of contexts of 256, two to a document."""
    index = np.arange(tokens, dtype=np.int32)
    contexts = -(-tokens // CONTEXT)
    numbers = np.arange(contexts, dtype=np.int32)
    offset = np.minimum(np.arange(contexts + 1, dtype=np.int64) * CONTEXT, tokens)
    place = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    chunk = Chunk(index // CONTEXT, index % CONTEXT, 0, numbers // 2, place, index, offset, -1, -1)
    Summary.empty("benchmark", width, 20, 10).update(sparse, chunk)


@click.command()
@click.option("--tokens", default=4096, show_default=True)
@click.option("--width", default=4096, show_default=True)
@click.option("--d", default=576, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--repeat", default=9, show_default=True)
def main(tokens: int, width: int, d: int, device: str, repeat: int) -> None:
    """Print a line for each rule."""
    at = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    W_enc = torch.randn(d, width, generator=generator) / d**0.5
    x = torch.randn(tokens, d, generator=generator).to(at)
    click.echo(f"{tokens:,} tokens x {width:,} features x d {d}, {device}, torch {torch.__version__}")
    for name, more in rules(width).items():
        sae = SaeWeights(name.split()[0], W_enc, torch.zeros(width), **more)  # type: ignore[arg-type]
        encoder = Encoder(sae, at)
        sparse = encoder.encode(x)
        encode_ms = least(lambda encoder=encoder: encoder.encode(x), repeat, at)  # type: ignore[misc]
        bare = least(lambda e=encoder: torch.addmm(e.bias, e.weight, x.T), repeat, at)  # type: ignore[misc]
        summary = least(lambda s=sparse: summarise(s, tokens, width), repeat, at)  # type: ignore[misc]
        click.echo(
            f"  {name:12} L0 {sparse.rows / tokens:5.1f}   encode {encode_ms:7.1f} ms   "
            f"product alone {bare:7.1f} ms   summary {summary:7.1f} ms"
        )


if __name__ == "__main__":
    main()
