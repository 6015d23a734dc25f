"""The forward pass of a model on a CPU: transformers' operators, and our loops (sae_runtime/fused.py).

Both over the same tokens, turn by turn: the plain model as one batch on all threads, which is what it is
fastest with; the fused one as a scan has it, a batch a thread. The activations must be the same bits.

    python benchmarks/forward.py MODEL [--tokens 4096] [--length 256] [--threads 2] [--repeat 7]
"""

from __future__ import annotations

import platform
import statistics
import time

import click
import torch

from sae_runtime.model import LanguageModel, load_config, locate
from sae_runtime.sites import Site
from sae_runtime.threads import Threads, keep_freed_memory


@click.command()
@click.argument("model")
@click.option("--tokens", default=4096, show_default=True)
@click.option("--length", default=256, show_default=True, help="Tokens of a context.")
@click.option("--threads", default=2, show_default=True)
@click.option("--repeat", default=7, show_default=True)
def main(model: str, tokens: int, length: int, threads: int, repeat: int) -> None:
    """Print milliseconds of both and their ratio."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    source = locate(model)
    config = load_config(source)
    site = Site(config.num_hidden_layers - 1, "resid_post")
    plain, fused = (LanguageModel(source, [site], "bfloat16", fused=f) for f in (False, True))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (tokens // length, length), generator=generator)
    parts = ids.chunk(threads)
    pool = Threads(threads)
    ways = {
        "plain": lambda: [plain.run(ids)[site]],
        "fused": lambda: [found[site] for found in pool.map(fused.run, parts)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeat + 1):
        for name, run in ways.items():
            began = time.perf_counter()
            run()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
    alike = all(torch.equal(plain.run(part)[site], fused.run(part)[site]) for part in parts)
    plain_s, fused_s = (statistics.median(seconds[name]) for name in ways)
    click.echo(
        f"{platform.machine()}, {threads} threads, torch {torch.__version__}: {ids.numel():,} tokens, "
        f"contexts of {length}\nplain {plain_s * 1e3:.0f} ms   fused {fused_s * 1e3:.0f} ms   "
        f"ratio {fused_s / plain_s:.2f}   {'the same bits' if alike else 'OTHER BITS'}"
    )


if __name__ == "__main__":
    main()
