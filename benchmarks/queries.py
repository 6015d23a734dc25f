"""What questions of a large index cost, cold and warm, beside the same rows in other layouts.

    python benchmarks/queries.py [--rows 1e9] [--share 0.25] [--units 100 --units 1000] [--out FILE]

The index is `synthetic.py`'s, compacted, made once and kept in out/bench/queries. Invariant: every question
is asked in a process of its own, so peaks of memory are its own. *Cold* is a fork that has imported all of it
and done nothing, with the index's files dropped from the file cache: opening the index and the first answer
together. *Warm* is one connection asked again and again about other features or documents, medians; the least
is given too, and processor time, for on a shared machine they say more. Features are drawn from around the
10th, 50th and 99th percentile of density. Answers of the layouts are compared before they are timed.

    feature     one feature's statistics and its 20 top contexts with text, as `corpuscope feature` has them
    document    every feature of a document, strongest first
    group by    count, sum and maximum of activations, for every feature
    by document, by token    how often each feature fires with one given feature
    diff        every feature's document frequency in documents of `lang` en against the others

The layouts: a DuckDB table and a Parquet file of (feature, token, activation) as those programs make them by
default, sorted alike; delphi's cache (files of a fifth of the features each, locations uint32 [rows, 3],
activations float16), read as its loader reads one latent. They hold the first `share` of the units.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# This file has the name of the package, so the repository comes first.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import click
import numpy as np
import pyarrow as pa

from pipelines.schema import LOCAL_MAX

Found = dict[str, Any]
OUT = Path("out/bench/queries").resolve()
LEVELS = {"low": 0.1, "median": 0.5, "high": 0.99}  # quantiles of density among living features
WARM, COLD = 20, 3
BARS = {  # question -> (of what, at most or at least)
    "feature": {"warm_ms": 30.0, "cold_ms": 150.0},
    "document": {"warm_ms": 50.0},
    "group by": {"warm_ms_per_million": 1000 / 60},
    "by document": {"warm_ms": 2000.0},
    "by token": {"warm_ms": 2000.0},
    "diff": {"warm_ms": 5000.0},
}
PEAK_MB = 2048
GROUP_BY = "SELECT feature, count(*), sum(activation), max(activation) FROM activations GROUP BY feature"
LENGTH = 256  # of a context
SPLITS = 5  # of delphi's files
_SLICES = 64  # of the features, when rows are sorted for another layout


# --- what is asked; each takes a connection and a subject


def ask_feature(con: Any, subject: int) -> Any:
    from queries import lookup

    found = lookup.feature(con, _sae(con), subject, 20)
    return found["n_tokens"], [(c["rank"], c["activation"], len(c["pieces"])) for c in found["contexts"]]


def ask_document(con: Any, subject: int) -> Any:
    return con.execute("FROM features_of($1)", [subject]).fetchall()


def ask_group_by(con: Any, subject: int) -> Any:
    return con.execute(GROUP_BY).fetchall()


def ask_by_document(con: Any, subject: int) -> Any:
    return _recipe(con, "cofiring_documents", subject)


def ask_by_token(con: Any, subject: int) -> Any:
    return _recipe(con, "cofiring_tokens", subject)


def _recipe(con: Any, name: str, subject: int) -> Any:
    """Every feature that fires where the subject does, as (feature, how often)."""
    from queries import recipe

    params = {"sae": _sae(con), "feature": str(subject), "min_both": "1", "limit": "1000000"}
    return [(row[3], row[4]) for row in recipe.run(con, name, params).fetchall()]


def ask_diff(con: Any, subject: int) -> Any:
    from queries.diff import diff

    return diff(con, "lang = 'en'", "lang <> 'en'")


QUESTIONS: dict[str, Callable[[Any, int], Any]] = {
    "feature": ask_feature,
    "document": ask_document,
    "group by": ask_group_by,
    "by document": ask_by_document,
    "by token": ask_by_token,
    "diff": ask_diff,
}
ONCE = ("group by", "diff")  # the same whatever the subject
REPEATS = {"group by": 3, "by document": 3, "by token": 3, "diff": 3}


def _sae(con: Any) -> str:
    return str(con.execute("SELECT sae FROM _declared_saes").fetchall()[0][0])


def subjects(index: str) -> tuple[dict[str, list[int]], list[int], Found]:
    """Features by level and documents to be asked about, and what is known of the index."""
    import queries

    con = queries.connect(index)
    try:
        alive = con.execute("SELECT feature FROM features WHERE n_tokens > 0 ORDER BY density, feature")
        order = [feature for (feature,) in alive.fetchall()]
        levels = {}
        for level, quantile in LEVELS.items():
            at = min(int(quantile * len(order)), max(0, len(order) - WARM))
            levels[level] = order[at : at + WARM]
        documents = con.execute("SELECT document FROM documents ORDER BY hash(document)").fetchmany(WARM)
        [(rows,)] = con.execute("SELECT sum(n_tokens)::BIGINT FROM features").fetchall()
        [(tokens,)] = con.execute("SELECT n_tokens FROM saes").fetchall()
        [(pairs,)] = con.execute("SELECT count(*) FROM document_features").fetchall()
        facts = {"rows": rows, "tokens": tokens, "document_features": pairs}
        return levels, [document for (document,) in documents], facts
    finally:
        con.close()


# --- timing


def ask(index: str, question: str, numbers: Sequence[int]) -> Found:
    """Milliseconds of a question, cold and warm, and this process's peak. Run it in one of its own."""
    import queries
    from queries import lookup  # noqa: F401  imported before anything is timed

    pa.array([0])  # imports pandas, where there is one
    answer = QUESTIONS[question]
    files = [str(path) for path in Path(index).rglob("*") if path.is_file()]
    cold = [_forked(lambda n=n: _cold(index, answer, n, files)) for n in numbers[:COLD]]  # type: ignore[misc]
    before = _peak_mb()
    con = queries.connect(index)
    answer(con, numbers[-1])
    warm, cpu = [], []
    for number in numbers[: REPEATS.get(question, WARM)]:
        began, busy = time.perf_counter(), time.process_time()
        answer(con, number)
        warm.append(1000 * (time.perf_counter() - began))
        cpu.append(1000 * (time.process_time() - busy))
    return {
        "cold_ms": statistics.median(c[1] for c in cold),
        "cold_least_ms": min(c[1] for c in cold),
        "open_ms": statistics.median(c[0] for c in cold),
        "warm_ms": statistics.median(warm),
        "warm_least_ms": min(warm),
        "cpu_ms": statistics.median(cpu),
        "peak_mb": max(_peak_mb(), *(c[2] for c in cold)),
        "before_mb": before,
    }


def _cold(index: str, answer: Callable[[Any, int], Any], number: int, files: Sequence[str]) -> list[float]:
    """Milliseconds to open (as the command does), and to open and answer; peak of memory."""
    import queries
    from queries.lookup import FEATURE_VIEWS

    evict(files)
    began = time.perf_counter()
    con = queries.connect(index, views=FEATURE_VIEWS if answer is ask_feature else None)
    opened = time.perf_counter()
    answer(con, number)
    return [1000 * (opened - began), 1000 * (time.perf_counter() - began), _peak_mb()]


def evict(files: Sequence[str]) -> None:
    """Drop files from the file cache; what is not on disk yet stays, so call `os.sync` after writing."""
    for file in files:
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _forked(work: Callable[[], list[float]]) -> list[float]:
    """What `work` gives in a fork of this process, which has no threads yet."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.write(write, json.dumps(work()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        said = stream.read()
    if os.waitpid(child, 0)[1]:
        raise click.ClickException("a question failed in a cold process; see above")
    return list(json.loads(said))


def _peak_mb() -> float:
    """Of this process; `ru_maxrss` would begin with its parent's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _child(*arguments: str) -> Found:
    """Run this file with some arguments in a process of its own; what it prints."""
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(arguments[:2])} ended with {done.returncode}; see above")
    return dict(json.loads(done.stdout))


# --- other layouts of the same rows


def make_others(index: str, folder: Path, share: float) -> Found:
    """The layouts, of the rows of the first `share` of the units. Bytes a row of each, and how many rows."""
    import queries

    if (folder / "done").exists():
        return dict(json.loads((folder / "done").read_text()))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    con = queries.connect(index)
    [(units,)] = con.execute("SELECT max(document) // $1 + 1 FROM documents", [LOCAL_MAX]).fetchall()
    [(width,)] = con.execute("SELECT width FROM _declared_saes").fetchall()
    con.execute("SET threads = 1; SET memory_limit = '2GB'")
    below = max(1, round(units * share)) * LOCAL_MAX
    rows = sum(_copy(con, folder, range(a, b), below) for a, b in _cuts(width, _SLICES))
    found: Found = {"rows": rows}
    for name, pattern in (("duckdb", "*.duckdb"), ("parquet", "*.parquet"), ("delphi", "*.safetensors")):
        found[name] = sum(path.stat().st_size for path in folder.glob(pattern)) / rows
    (folder / "done").write_text(json.dumps(found))
    return found


def _cuts(width: int, parts: int) -> list[tuple[int, int]]:
    edges = [width * i // parts for i in range(parts + 1)]
    return [(a, b) for a, b in itertools.pairwise(edges) if a < b]


def _copy(con: Any, folder: Path, features: range, below: int) -> int:
    """Append rows of some features, of documents below a key, to every layout; how many there are."""
    import duckdb
    import pyarrow.parquet as pq

    table = con.sql(
        "SELECT feature, context * $1 + position AS token, activation FROM activations "
        "WHERE feature >= $2 AND feature < $3 AND context < $4 ORDER BY feature, token",
        params=[LENGTH, features.start, features.stop, below],
    ).to_arrow_table()
    other = duckdb.connect(str(folder / "rows.duckdb"))
    other.register("_new", table)
    other.execute("CREATE TABLE IF NOT EXISTS activations AS SELECT * FROM _new LIMIT 0")
    other.execute("INSERT INTO activations SELECT * FROM _new")
    other.close()
    pq.write_table(table, folder / f"{features.start:07d}.parquet")
    [(width,)] = con.execute("SELECT width FROM _declared_saes").fetchall()
    columns = {name: table[name].to_numpy() for name in table.column_names}
    for first, stop in _cuts(width, SPLITS):
        own = (columns["feature"] >= first) & (columns["feature"] < stop)
        if own.any():
            context, position = np.divmod(columns["token"][own], LENGTH)
            locations = np.stack([context, position, columns["feature"][own] - first], 1).astype(np.uint32)
            for name, array in (("locations", locations), ("activations", columns["activation"][own])):
                with (folder / f"{first}_{stop - 1}.{name}").open("ab") as stream:
                    stream.write((array if name == "locations" else array.astype(np.float16)).tobytes())
    if features.stop == width:
        _finish_delphi(folder)
    return int(table.num_rows)


def _finish_delphi(folder: Path) -> None:
    """Safetensors files of the columns that were written one by one: an 8 byte length, a header, the data."""
    for locations in sorted(folder.glob("*.locations")):
        activations = locations.with_suffix(".activations")
        size, rest = locations.stat().st_size, activations.stat().st_size
        header = json.dumps(
            {
                "locations": {"dtype": "U32", "shape": [size // 12, 3], "data_offsets": [0, size]},
                "activations": {"dtype": "F16", "shape": [rest // 2], "data_offsets": [size, size + rest]},
            }
        ).encode()
        header += b" " * (-len(header) % 8)
        with locations.with_suffix(".safetensors").open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            for part in (locations, activations):
                with part.open("rb") as source:
                    shutil.copyfileobj(source, stream, 1 << 24)
                part.unlink()


class Rows:
    """The layout of a DuckDB table, or of Parquet files."""

    def __init__(self, folder: str, layout: str) -> None:
        import duckdb

        if layout == "duckdb":
            self.con = duckdb.connect(f"{folder}/rows.duckdb", read_only=True)
        else:
            self.con = duckdb.connect()
            self.con.execute(f"CREATE VIEW activations AS FROM read_parquet('{folder}/*.parquet')")

    def feature(self, number: int) -> tuple[int, float]:
        one = "FROM activations WHERE feature = $1"
        [(rows, highest)] = self.con.execute(f"SELECT count(*), max(activation) {one}", [number]).fetchall()
        best = f"SELECT token, activation {one} ORDER BY activation DESC, token LIMIT 20"
        self.con.execute(best, [number]).fetchall()
        return rows, highest

    def group_by(self, number: int) -> Any:
        return self.con.execute(GROUP_BY).fetchall()

    def by_token(self, number: int) -> Any:
        own = "SELECT token FROM activations WHERE feature = $1"
        statement = f"SELECT feature, count(*) FROM activations WHERE token IN ({own}) GROUP BY feature"
        return self.con.execute(statement, [number]).fetchall()


class Delphi:
    """Its cache, read as `delphi.latents.loader.TensorBuffer.load` does for one latent: the file whole."""

    def __init__(self, folder: str, layout: str) -> None:
        self.files = {
            tuple(map(int, path.stem.split("_"))): str(path) for path in Path(folder).glob("*.safetensors")
        }

    def feature(self, number: int) -> tuple[int, float]:
        import torch
        from safetensors.numpy import load_file

        [(first, file)] = [(a, file) for (a, b), file in self.files.items() if a <= number <= b]
        data = load_file(file)
        activations = torch.tensor(data["activations"])
        locations = torch.from_numpy(data["locations"].astype(np.int64))
        locations[:, 2] += first
        own = torch.isin(locations[:, 2], torch.tensor([number]))
        locations, activations = locations[own], activations[own]
        activations.float().topk(min(20, len(activations)))
        return len(activations), float(activations.max())

    def group_by(self, number: int) -> Any:
        from safetensors.numpy import load_file

        found = []
        for file in self.files.values():
            data = load_file(file)
            latent, values = data["locations"][:, 2].astype(np.int64), data["activations"].astype(np.float32)
            highest = np.zeros(latent.max() + 1, np.float32)
            np.maximum.at(highest, latent, values)
            found.append((np.bincount(latent), np.bincount(latent, weights=values), highest))
        return found


def ask_other(folder: str, layout: str, question: str, numbers: Sequence[int]) -> Found:
    """Milliseconds of a question of another layout, cold and warm, and this process's peak."""
    if layout == "delphi":
        import torch  # noqa: F401

    make = Delphi if layout == "delphi" else Rows
    method = question.replace(" ", "_")
    files = [str(path) for path in Path(folder).iterdir()]

    def cold(number: int) -> list[float]:
        evict(files)
        began = time.perf_counter()
        getattr(make(folder, layout), method)(number)
        return [1000 * (time.perf_counter() - began)]

    found = [_forked(lambda n=n: cold(n)) for n in numbers[:COLD]]  # type: ignore[misc]
    opened, warm = make(folder, layout), []
    repeats = 3 if layout == "delphi" else REPEATS.get(question, WARM)
    for number in numbers[:repeats]:
        began = time.perf_counter()
        getattr(opened, method)(number)
        warm.append(1000 * (time.perf_counter() - began))
    return {
        "cold_ms": statistics.median(c[0] for c in found),
        "warm_ms": statistics.median(warm),
        "warm_least_ms": min(warm),
        "peak_mb": _peak_mb(),
    }


def check_others(index: str, folder: Path, share: float, numbers: Sequence[int]) -> None:
    """ClickException unless the layouts have the same rows of some features as the index."""
    import queries

    con = queries.connect(index)
    [(units,)] = con.execute("SELECT max(document) // $1 + 1 FROM documents", [LOCAL_MAX]).fetchall()
    below = max(1, round(units * share)) * LOCAL_MAX
    for number in numbers:
        [want] = con.execute(
            "SELECT count(*), max(activation) FROM activations WHERE feature = $1 AND context < $2",
            [number, below],
        ).fetchall()
        for layout in ("duckdb", "parquet", "delphi"):
            have = (Delphi if layout == "delphi" else Rows)(str(folder), layout).feature(number)
            if have != want:
                raise click.ClickException(f"{layout} has {have} of feature {number}, the index {want}")


# --- the whole


def measure(index: str, questions: Sequence[str]) -> Found:
    """Every question, at every level, of an index."""
    levels, documents, facts = subjects(index)
    found: Found = {"facts": facts, "questions": {}}
    for question in questions:
        at = {"": documents} if question == "document" else levels
        if question in ONCE:
            at = {"": levels["median"]}
        for level, numbers in at.items():
            label = f"{question} {level}".strip()
            click.echo(f"asking: {label}", err=True)
            said = _child("--ask", question, "--index", index, "--numbers", json.dumps(numbers))
            found["questions"][label] = {"question": question, **said}
    return found


def misses(found: Found) -> list[str]:
    """Which bars are missed, a line each."""
    lines = []
    for label, said in found["questions"].items():
        for what, bar in BARS[said["question"]].items():
            have = (
                said["warm_ms"] / found["facts"]["rows"] * 1e6
                if what == "warm_ms_per_million"
                else said[what]
            )
            if have > bar:
                lines.append(f"{label}: {what} {have:,.1f}, at most {bar:,.1f} is wanted")
        if said["peak_mb"] > PEAK_MB:
            lines.append(f"{label}: peak {said['peak_mb']:,.0f} MB, at most {PEAK_MB:,} is wanted")
    return lines


def table(found: Found) -> str:
    """For people: a line a question."""
    lines = [
        f"{found['hardware']['date']}  {found['hardware']['processor']}, {os.cpu_count()} cores, "
        f"load {found['load']:.1f}"
    ]
    head = ("", "cold", "of it open", "warm", "least", "processor", "peak MB")
    for title, each in found["indexes"].items():
        facts = each["facts"]
        lines.append(
            f"\n{title}: {facts['rows']:,} rows, {facts['document_features']:,} of documents, "
            f"{facts['tokens']:,} tokens; bytes a row {facts['bytes_per_row']}; milliseconds"
        )
        lines.append(("{:24}" + "{:>12}" * 6).format(*head))
        for label, said in each["questions"].items():
            keys = ("cold_ms", "open_ms", "warm_ms", "warm_least_ms", "cpu_ms", "peak_mb")
            lines.append(f"{label:24}" + "".join(f"{said[key]:>12,.1f}" for key in keys))
        lines += [f"MISSED {line}" for line in misses(each)]
    for layout, each in found.get("others", {}).get("layouts", {}).items():
        others = found["others"]
        lines.append(
            f"\n{layout}: {others['rows']:,} rows, {others['share']:g} of the index; "
            f"{each['bytes_per_row']:.2f} bytes a row"
        )
        for label, said in each["questions"].items():
            values = "".join(
                f"{said[key]:>12,.1f}" for key in ("cold_ms", "warm_ms", "warm_least_ms", "peak_mb")
            )
            lines.append(f"{label:24}{values}")
    return "\n".join(lines)


def sizes(index: str) -> dict[str, float]:
    """Bytes of the files that are read, a row of activations: of activations, of all."""
    from pipelines.contents import contents
    from pipelines.schema import KINDS
    from pipelines.storage import Store

    held = contents(Store(index))
    kinds = {kind: {f.path: f for f in held.files(kind)}.values() for kind in KINDS}
    rows = sum(f.rows for f in kinds["activations"])
    return {
        "activations": round(sum(f.bytes for f in kinds["activations"]) / rows, 3),
        "all": round(sum(f.bytes for each in kinds.values() for f in each) / rows, 3),
    }


@click.command(context_settings={"show_default": True})
@click.option("--rows", default=1e9, help="Activations of the large index.")
@click.option("--width", default=16384, help="Features of its SAE.")
@click.option("--units", multiple=True, type=int, help="Also ask an index of so many units, of --few rows.")
@click.option("--few", default=5e7)
@click.option("--share", default=0.25, help="Of the units whose rows the other layouts get; 0 for none.")
@click.option("--question", "questions", multiple=True, type=click.Choice(list(QUESTIONS)))
@click.option("--folder", default=str(OUT), help="Where indexes are kept.")
@click.option("--out", default=None, help="A file for the JSON.")
@click.option("--processes", default=2, help="That make an index.")
@click.option("--ask", "asked", default=None, hidden=True)
@click.option("--layout", default=None, hidden=True)
@click.option("--index", default=None, hidden=True)
@click.option("--numbers", default=None, hidden=True)
def main(
    rows: float,
    width: int,
    units: tuple[int, ...],
    few: float,
    share: float,
    questions: tuple[str, ...],
    folder: str,
    out: str | None,
    processes: int,
    asked: str | None,
    layout: str | None,
    index: str | None,
    numbers: str | None,
) -> None:
    """Ask a large index, and other layouts of its rows."""
    if asked is not None:
        assert index is not None
        assert numbers is not None
        subject = json.loads(numbers)
        said = ask_other(index, layout, asked, subject) if layout else ask(index, asked, subject)
        click.echo(json.dumps(said))
        return
    import compare
    import synthetic

    assert synthetic.LENGTH == LENGTH
    wanted = list(questions) or [q for q in QUESTIONS if q != "diff" or _has_diff()]
    root = Path(folder)
    shapes = {"large": synthetic.Shape.of(rows, width)}
    shapes |= {f"{n} units": synthetic.Shape.of(few, width, n) for n in units}
    found: Found = {"hardware": compare.here(os.cpu_count() or 1), "load": os.getloadavg()[0], "indexes": {}}
    for title, shape in shapes.items():
        index = str(synthetic.make(root, shape, processes))
        os.sync()
        found["indexes"][title] = measure(index, wanted)
        found["indexes"][title]["facts"]["bytes_per_row"] = sizes(index)
    if share:
        index = str(synthetic.make(root, shapes["large"], processes))
        found["others"] = measure_others(index, Path(index).parent / f"others-{share:g}", share)
    click.echo(table(found))
    text = json.dumps(found, indent=1)
    if out is None:
        click.echo(text)
    else:
        Path(out).write_text(text, encoding="utf-8")


def measure_others(index: str, folder: Path, share: float) -> Found:
    """The other layouts: made, compared, asked."""
    made = make_others(index, folder, share)
    os.sync()
    levels, _, _ = subjects(index)
    numbers = levels["median"]
    check_others(index, folder, share, numbers[:2])
    found: Found = {"rows": made["rows"], "share": share, "layouts": {}}
    for layout in ("duckdb", "parquet", "delphi"):
        asked = ("feature", "group by") if layout == "delphi" else ("feature", "group by", "by token")
        said = {}
        for question in asked:
            click.echo(f"asking {layout}: {question}", err=True)
            arguments = ("--layout", layout, "--index", str(folder), "--numbers", json.dumps(numbers))
            said[question] = _child("--ask", question, *arguments)
        found["layouts"][layout] = {"bytes_per_row": made[layout], "questions": said}
    return found


def _has_diff() -> bool:
    try:
        import queries.diff  # noqa: F401
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    main()
