"""How far a scan is from its floor, on this machine: both on the same contexts, interleaved, in one run.

The floor is transformers' forward pass of the truncated model plus the dense encode products in bfloat16,
keeping nothing. The scan is the inline executor with `keep: tokens`, statistics, top contexts and samples,
files written and committed; loading the model is in neither. Medians of `--repeat` rounds.

Also prints bytes a row of every table and, with `--profile`, where the time of one more scan went.

    python benchmarks/scan.py SPEC.yaml [--repeat 3] [--units 1] [--profile]
"""

from __future__ import annotations

import cProfile
import platform
import pstats
import statistics
import tempfile
import time
from dataclasses import replace

import click
import torch

from jobs.specfile import load_spec
from pipelines.chunks import batches
from pipelines.contexts import contexts, strip_bos, tokenize
from pipelines.corpus import read_documents
from pipelines.ledger import Commit, Ledger
from pipelines.planning import Planned, Prepared, plan_units, prepare
from pipelines.storage import Store
from pipelines.unit import Scanner, Setup, Work
from sae_runtime import suites
from sae_runtime.model import LanguageModel

FLOOR_BATCH = 4096  # tokens: of 512 to 4,096 what transformers' own forward pass is fastest with


def loaded_scanner(spec: str, folder: str) -> tuple[Scanner, Prepared, Planned]:
    """A spec planned for an index in `folder`, model and SAEs loaded."""
    loaded, text = load_spec(spec, f"{folder}/index")
    prepared = prepare(loaded, "cpu")
    planned, metadata = plan_units(prepared, Ledger(Store(loaded.index)), text, allow_removal=False)
    scanner = Scanner(Setup(loaded, prepared.source, "cpu", (prepared.saes,), metadata, loaded.index))
    scanner.load(0)
    return scanner, prepared, planned


def plain_model(scanner: Scanner) -> LanguageModel:
    """The scan's model with transformers' own operators, none of our loops."""
    return LanguageModel(scanner.source, list(scanner.reads), scanner.setup.spec.model.dtype, fused=False)


def floor_batches(
    scanner: Scanner, prepared: Prepared, planned: Planned, units: int, budget: int = FLOOR_BATCH
) -> list[torch.Tensor]:
    """The token batches of the first units, like lengths together as the scan has them."""
    found = []
    for unit in planned.units[:units]:
        file = planned.files[unit.corpus, unit.path]
        source = prepared.spec.corpus[file.source]
        texts = [d.text for d in read_documents(file, source, scanner.setup.metadata, unit.start, unit.stop)]
        windows = [
            window.tokens
            for ids in tokenize(scanner.tokenizer, texts)
            for window in contexts(strip_bos(ids, scanner.rule), scanner.rule)
        ]
        for members in batches([len(w) for w in windows], budget):
            ids = torch.zeros(len(members), max(len(windows[m]) for m in members), dtype=torch.int64)
            for row, m in enumerate(members):
                ids[row, : len(windows[m])] = torch.from_numpy(windows[m])
            found.append(ids)
    return found


@torch.inference_mode()
def floor(
    scanner: Scanner, model: LanguageModel, weights: list[torch.Tensor], work: list[torch.Tensor]
) -> None:
    """One pass over the floor's work."""
    for ids in work:
        activations = model.run(ids)
        for info, weight in zip(scanner.infos, weights, strict=True):
            activations[info.site].flatten(0, 1).bfloat16() @ weight


@click.command()
@click.argument("spec")
@click.option("--repeat", default=3, show_default=True)
@click.option("--units", default=1, show_default=True, help="Units of the plan that are scanned.")
@click.option("--profile", is_flag=True, help="Profile one more scan.")
def main(spec: str, repeat: int, units: int, profile: bool) -> None:
    """Print seconds and tokens per second of floor and scan, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        scanner, prepared, planned = loaded_scanner(spec, folder)
        loaded = prepared.spec
        weights = [suites.load(info).W_enc.bfloat16() for info in scanner.infos]
        work = floor_batches(scanner, prepared, planned, units)
        model = plain_model(scanner)
        floor(scanner, model, weights, work[:1])
        seconds: dict[str, list[float]] = {"floor": [], "scan": []}
        for turn in range(repeat + 1):
            began = time.perf_counter()
            floor(scanner, model, weights, work)
            middle = time.perf_counter()
            commits = scan(scanner, planned, units, f"{folder}/{turn}")
            if turn:  # the first round compiles and warms up
                seconds["floor"].append(middle - began)
                seconds["scan"].append(time.perf_counter() - middle)
        if profile:
            with cProfile.Profile() as profiled:
                scan(scanner, planned, units, f"{folder}/profiled")
    tokens, rows = sum(c.tokens for c in commits), sum(c.files["activations"].rows for c in commits)
    size = sum(f.bytes for c in commits for f in c.files.values())
    floor_s, scan_s = (statistics.median(seconds[name]) for name in ("floor", "scan"))
    click.echo(
        f"{platform.machine()}, {loaded.model.threads} threads, torch {torch.__version__}: "
        f"{tokens:,} counted tokens, {len(prepared.saes)} SAEs, "
        f"L0 {rows / tokens / len(prepared.saes):.0f}, {rows:,} rows\n"
        f"floor {floor_s:.2f} s ({tokens / floor_s:,.0f} tokens/s)   "
        f"scan {scan_s:.2f} s ({tokens / scan_s:,.0f} tokens/s)   ratio {scan_s / floor_s:.2f}   "
        f"{size / rows:.2f} bytes a row, all tables"
    )
    for kind in commits[0].files:
        files = [c.files[kind] for c in commits if kind in c.files]
        written, of = sum(f.bytes for f in files), sum(f.rows for f in files)
        click.echo(f"  {kind:18} {of:>12,} rows {written / of:>9.2f} bytes each")
    if profile:
        pstats.Stats(profiled).sort_stats("cumulative").print_stats("chunks|encode|summaries|writer|unit|run")


def scan(scanner: Scanner, planned: Planned, units: int, index: str) -> list[Commit]:
    """Scan the first units into a fresh index."""
    scanner.setup, scanner.store = replace(scanner.setup, index=index), Store(index)
    return [
        scanner.scan(Work(unit, 0, planned.files[unit.corpus, unit.path], 1)).commit
        for unit in planned.units[:units]
    ]


if __name__ == "__main__":
    main()
