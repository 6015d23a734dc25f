"""What encoding costs beside its matrix product, rule by rule, and what a chunk's summary costs.

Random weights and inputs: thresholds let about 80 of 4,096 features through, ranking rules keep 64.
Milliseconds, the least of `--repeat` rounds; the product is `addmm` of the same shape alone.

    python benchmarks/encode.py [--tokens 4096] [--width 4096] [--d 576] [--device cpu] [--repeat 9] [--l0 80]

On a CPU also what the screen costs in either of its cheap types, one encoder on each of `--threads` at once,
activations in bfloat16 as models leave them: the median round.

With `--summaries` only summaries: chunks of random rows taken in one after the other, as a unit does.
Milliseconds of processor time a chunk, the least of the rounds, of the first, the last and on average.

    python benchmarks/encode.py --summaries [--tokens 16384] [--width 4096] [--repeat 5]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click
import numpy as np
import torch

from sae_runtime.cheap import Bfloat, Cheap, Int8, fastest
from sae_runtime.encode import Encoder, Sparse
from sae_runtime.sae import SaeWeights
from sae_runtime.screen import Screen
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


def chunk_of(tokens: int, number: int) -> Chunk:
    """A chunk of contexts of 256, two to a document."""
    index = np.arange(tokens, dtype=np.int32)
    contexts = -(-tokens // CONTEXT)
    first = number * contexts
    numbers = np.arange(first, first + contexts, dtype=np.int32)
    offset = np.minimum(np.arange(contexts + 1, dtype=np.int64) * CONTEXT, tokens)
    place = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    context = first + index // CONTEXT
    ids = (index * 7919 + number * 104729) % 50021  # endings differ
    return Chunk(context, index % CONTEXT, first, numbers // 2, place, ids, offset, -1, -1)


def time_screens(tokens: int, width: int, d: int, l0: float, threads: int, repeat: int) -> None:
    """Print a line for each cheap type: milliseconds of `threads` encoders side by side."""
    generator = torch.Generator().manual_seed(0)
    W_enc = torch.randn(d, width, generator=generator) / d**0.5
    x = torch.randn(tokens, d, generator=generator).bfloat16()
    threshold = float(torch.special.ndtri(torch.tensor(1 - l0 / width, dtype=torch.float64)))
    sae = SaeWeights("jumprelu", W_enc, torch.zeros(width), threshold=torch.full((width,), threshold))
    with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
        kinds: dict[type[Cheap], tuple[list[Encoder], list[float]]] = {}
        for kind in (Bfloat, Int8):
            encoders = [Encoder(sae, torch.device("cpu")) for _ in range(threads)]
            for encoder in encoders:
                assert encoder.cut is not None
                encoder.screen = Screen(encoder.weight, encoder.bias[:, 0], encoder.cut.floor, kind)
            kinds[kind] = encoders, []
        for _ in range(repeat + 1):
            for encoders, times in kinds.values():
                began = time.perf_counter()
                list(pool.map(lambda encoder: encoder.encode(x), encoders))
                times.append(1000 * (time.perf_counter() - began))
    for kind, (encoders, times) in kinds.items():
        screen = encoders[0].screen
        left = "" if screen is None or type(screen.cheap) is kind else ", left for Bfloat"
        chosen = ", chosen here" if kind is fastest() else ""
        click.echo(f"  {kind.__name__:12} {np.median(times[1:]):7.1f} ms on {threads} threads{chosen}{left}")


def summarise(sparse: Sparse, tokens: int, width: int) -> None:
    """Take the rows in as one chunk."""
    Summary.empty("benchmark", width, 20, 10).update(sparse, chunk_of(tokens, 0))


def random_rows(rng: np.random.Generator, share: np.ndarray, tokens: int) -> Sparse:
    """Rows of features that are active in these shares of tokens, in 30 % of the contexts where that fits."""
    where, counts = [], []
    for p in share:
        inside = max(0.3, min(1, 1.5 * p)) if p < 1 else 1
        contexts = rng.random(-(-tokens // CONTEXT)) < inside
        active = np.repeat(contexts, CONTEXT)[:tokens] & (rng.random(tokens) < p / inside)
        where.append(np.flatnonzero(active).astype(np.int32))
        counts.append(len(where[-1]))
    rows = sum(counts)
    values = (
        np.repeat(np.exp(rng.normal(size=len(share))), counts) * np.exp(0.7 * rng.normal(size=rows)) + 0.3
    )
    codes = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return Sparse(np.concatenate([[0], np.cumsum(counts)]), np.concatenate(where), codes)


def time_summaries(tokens: int, width: int, repeat: int, chunks: int = 8) -> None:
    """Print a line for features of unequal shares and L0 91, for L0 1, and for L0 20 with a dense feature."""
    rng = np.random.default_rng(0)
    unequal = np.exp(1.5 * rng.normal(size=width))
    one_dense = np.full(width, 20 / width)
    one_dense[7] = 1
    shares = {
        "L0 91": np.minimum(unequal * 91 / unequal.sum(), 0.9),
        "L0 1": np.full(width, 1 / width),
        "L0 20, one dense": one_dense,
    }
    for name, share in shares.items():
        taken = [(random_rows(rng, share, tokens), chunk_of(tokens, i)) for i in range(chunks)]
        rounds = []
        for _ in range(repeat + 1):  # the first one compiles
            summary, times = Summary.empty("benchmark", width, 20, 10), []
            for sparse, chunk in taken:
                began = time.thread_time()
                summary.update(sparse, chunk)
                times.append(1000 * (time.thread_time() - began))
            rounds.append(times)
        ms = np.array(rounds[1:]).min(axis=0)
        rows = np.mean([sparse.rows for sparse, _ in taken])
        click.echo(
            f"  {name:16} {rows:11,.0f} rows   first {ms[0]:6.1f} ms   last {ms[-1]:6.1f}   "
            f"mean {ms.mean():6.1f}   {1e6 * ms.mean() / rows:6.1f} ns a row"
        )


@click.command()
@click.option("--tokens", default=4096, show_default=True)
@click.option("--width", default=4096, show_default=True)
@click.option("--d", default=576, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--repeat", default=9, show_default=True)
@click.option("--l0", default=80.0, show_default=True, help="Active features of a token, of the screens.")
@click.option("--threads", default=2, show_default=True)
@click.option("--summaries", is_flag=True, help="Time summaries of random rows instead.")
def main(
    tokens: int, width: int, d: int, device: str, repeat: int, l0: float, threads: int, summaries: bool
) -> None:
    """Print a line for each rule."""
    if summaries:
        click.echo(f"summaries, chunks of {tokens:,} tokens, {width:,} features")
        time_summaries(tokens, width, repeat)
        return
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
    if device == "cpu":
        time_screens(tokens, width, d, l0, threads, repeat)


if __name__ == "__main__":
    main()
