"""What compaction does for reading: the same questions of an index of many small units, before and after.

    python benchmarks/compact.py [--tokens 131072] [--units 64] [--repeat 5]

Invariant: both sides are asked through `queries.connect`, connections and files warm, medians of `repeat`
random features and documents (the same ones before and after); answers are compared. Bytes are those of the
files that are read. The scan is our own, its compaction switched off, so that `compact` does all of it.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `queries` is a script's name here too

import click
import compare
import world

import queries
from jobs.specfile import load_spec
from pipelines import compaction, planning
from pipelines.contents import contents
from pipelines.scan import ScanOptions, run_scan
from pipelines.schema import KINDS
from pipelines.storage import Store
from pipelines.upkeep import Upkeep

OUT = Path("out/bench").resolve()
_ONE = "WHERE sae = $sae AND feature = $feature"
QUESTIONS = {
    "a feature's activations": f"SELECT count(*), max(activation) FROM activations {_ONE}",
    "a feature's statistics": f"SELECT * FROM features {_ONE}",
    "a feature's top contexts": f"SELECT * FROM top_contexts {_ONE} ORDER BY rank",
    "a feature's samples": f"SELECT * FROM sampled_contexts {_ONE} ORDER BY ALL",
    "a document's features": "FROM features_of($document) ORDER BY ALL",
    "a document's activations": "SELECT count(*), sum(activation)::DECIMAL(18, 3) FROM activations "
    "WHERE context IN (SELECT context FROM contexts WHERE document = $document)",
}


def ask(index: str, subjects: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[Any]]:
    """Median milliseconds of each question over the subjects, and the answers."""
    began = time.perf_counter()
    con = queries.connect(index)
    found: dict[str, Any] = {"connect": round(1000 * (time.perf_counter() - began), 1)}
    answers = []
    for name, statement in QUESTIONS.items():
        times = []
        for subject in subjects:
            values = {key: value for key, value in subject.items() if f"${key}" in statement}
            began = time.perf_counter()
            answers.append(con.execute(statement, values).fetchall())
            times.append(1000 * (time.perf_counter() - began))
        found[name] = round(statistics.median(times), 1)
    return found, answers


def sizes(index: str) -> dict[str, Any]:
    """Files that are read, and bytes per activation row, of the rows' files and of all."""
    held = contents(Store(index))
    files = {kind: {file.path: file for file in held.files(kind)} for kind in KINDS}
    rows = sum(file.rows for file in files["activations"].values())
    every = {path: file for each in files.values() for path, file in each.items()}
    return {
        "files": len(every),
        "rows": rows,
        "bytes_per_row_activations": round(sum(f.bytes for f in files["activations"].values()) / rows, 3),
        "bytes_per_row_all": round(sum(f.bytes for f in every.values()) / rows, 3),
        "bytes_per_row": {
            kind: round(sum(f.bytes for f in each.values()) / rows, 3) for kind, each in files.items()
        },
    }


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    done = work()
    return time.perf_counter() - began, done


@click.command(context_settings={"show_default": True})
@click.option("--tokens", default=131072, help="Counted tokens of the corpus.")
@click.option("--units", default=64, help="Units that they are cut into.")
@click.option("--saes", default=16)
@click.option("--repeat", default=9, help="Random features and documents that are asked for.")
@click.option("--model", default=None, help="A spec's model; default the demo's.")
def main(tokens: int, units: int, saes: int, repeat: int, model: str | None) -> None:
    """Ask an index before and after `compact`."""
    work = world.make(OUT / "worlds", model or compare.demo_model(), saes, tokens, 4096, 80.0, 256, 2)
    folder = Path(tempfile.mkdtemp(dir=OUT))
    try:
        index = str(folder / "index")
        spec, text = load_spec(work.spec("run"), index)
        size = sum(Path(uri).stat().st_size for uri in spec.corpus[0].uri) // units
        with mock.patch.dict(planning.UNIT_BYTES, cpu=size), mock.patch.object(Upkeep, "committed"):
            scan, outcome = seconds(
                lambda: run_scan(spec, text, ScanOptions("inline"), lambda event: None, lambda line: None)
            )
        generator = random.Random(0)
        con = queries.connect(index)
        documents = [d for (d,) in con.sql("SELECT document FROM documents ORDER BY ALL").fetchall()]
        names = [s for (s,) in con.sql("SELECT sae FROM _declared_saes ORDER BY ALL").fetchall()]
        con.close()
        subjects = [
            {
                "sae": generator.choice(names),
                "feature": generator.randrange(4096),
                "document": generator.choice(documents),
            }
            for _ in range(repeat)
        ]
        ask(index, subjects[:2])  # files into memory
        before, answers = ask(index, subjects)
        sizes_before = sizes(index)
        spent, done = seconds(lambda: compaction.compact(Store(index)))
        ask(index, subjects[:2])
        after, same = ask(index, subjects)
        if answers != same:
            raise click.ClickException("compaction changed an answer")
        found = {
            "hardware": compare.here(2),
            "units": outcome.items,
            "tokens": outcome.tokens,
            "scan_seconds": round(scan, 1),
            "compact_seconds": round(spent, 1),
            "rows_rewritten": done.rows,
            "rows_per_second": round(done.rows / spent),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "before": sizes_before | {"milliseconds": before},
            "after": sizes(index) | {"milliseconds": after},
            "compaction": {key: value for key, value in asdict(done).items() if key != "replaced"},
        }
        click.echo(json.dumps(found, indent=1))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
