"""`benchmarks/queries.py` at a tiny size; and what came of it: files that say which features they hold."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import pytest

import queries
from pipelines import compaction
from pipelines.contents import contents
from pipelines.snapshots import newest
from pipelines.storage import Store
from queries import lookup, pruning
from queries.verify import verify

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
WIDTH, UNITS, L0 = 300, 5, 8.0


def script(name: str) -> ModuleType:
    """A script of benchmarks/ under a name of its own: one of them is called like a package of ours."""
    if f"bench_{name}" in sys.modules:
        return sys.modules[f"bench_{name}"]
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    before = list(sys.path)
    yield script("queries")
    sys.path[:] = before


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> str:
    """100,000 rows of 100 documents in five units, merged into files of some thousand rows each."""
    synthetic = script("synthetic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "FILE_BYTES", 1 << 13)
        patch.setattr("pipelines.merge_rows.ROWS_PER_GROUP", 1 << 11)
        shape = synthetic.Shape.of(1e5, WIDTH, UNITS, L0)
        return str(synthetic.make(tmp_path_factory.mktemp("queries"), shape, processes=1))


@pytest.fixture(scope="module")
def rows(index: str) -> dict[str, np.ndarray]:
    """Columns of `activations` and of `document_features`, as d_…, and each token's document."""
    con = queries.connect(index)
    found = con.execute(
        "SELECT a.feature, a.context, a.position, a.activation, c.document "
        "FROM activations AS a JOIN contexts AS c USING (context)"
    ).fetchnumpy()
    con.close()
    return dict(found)


def sae_of(con: Any) -> str:
    return str(con.execute("SELECT sae FROM saes").fetchall()[0][0])


def test_the_index_is_what_a_scan_leaves(index: str, rows: dict[str, np.ndarray]) -> None:
    findings = verify(index)
    assert findings.whole, findings.faults
    assert "spans" in findings.names
    con = queries.connect(index)
    n = len(rows["feature"])
    assert 7e4 < n < 1.4e5
    [(documents, tokens)] = con.execute("SELECT count(*), sum(n_tokens) FROM documents").fetchall()
    assert n / tokens == pytest.approx(L0, rel=0.15)
    # Bursts: a feature fires several times in a document, and more at its beginning.
    pairs = len(np.unique(rows["feature"].astype(np.int64) << 40 | rows["document"]))
    assert n / pairs > 3
    [(dead,)] = con.execute("SELECT count(*) FROM features WHERE n_tokens = 0").fetchall()
    assert 0 < dead < WIDTH / 5
    assert documents == 100


def test_the_same_parameters_give_the_same_rows(tmp_path: Path) -> None:
    synthetic = script("synthetic")
    shape = synthetic.Shape.of(2e4, 64, 2, L0)
    answers = []
    for name, ordinals in (("one", (0, 1)), ("other", (1, 0))):
        store = Store(str(tmp_path / name))
        synthetic._register(store, shape)
        for ordinal in ordinals:
            synthetic._write_unit(store.uri, shape, ordinal)
        con = queries.connect(store.uri)
        answers.append(con.execute("FROM activations ORDER BY ALL").fetchall())
        con.close()
    assert answers[0] == answers[1]
    assert len(answers[0]) > 1e4


def test_questions_have_the_answers_of_the_rows(
    bench: ModuleType, index: str, rows: dict[str, np.ndarray]
) -> None:
    con = queries.connect(index)
    own = [set(rows["document"][rows["feature"] == f].tolist()) for f in range(WIDTH)]
    tokens = rows["context"] * 1024 + rows["position"]
    here = [set(tokens[rows["feature"] == f].tolist()) for f in range(WIDTH)]
    counts = np.bincount(rows["feature"], minlength=WIDTH)
    order = np.argsort(counts, kind="stable")
    documents = len(set(rows["document"].tolist()))
    chosen = [int(order[int(q * (WIDTH - 1))]) for q in (0.2, 0.6, 1.0)]
    assert 2 * len(own[chosen[0]]) <= documents < 2 * len(own[chosen[-1]])  # both ways of asking
    for f in chosen:
        want = {g: len(own[f] & own[g]) for g in range(WIDTH) if own[f] & own[g] and g != f}
        assert dict(bench.ask_by_document(con, f)) == want
        want = {g: len(here[f] & here[g]) for g in range(WIDTH) if here[f] & here[g] and g != f}
        assert dict(bench.ask_by_token(con, f)) == want
        n_tokens, contexts = bench.ask_feature(con, f)
        assert n_tokens == counts[f]
        assert [rank for rank, _, _ in contexts] == list(range(1, min(20, len(own[f])) + 1))
        assert contexts[0][1] == rows["activation"][rows["feature"] == f].max()
    for feature, n, total, highest in bench.ask_group_by(con, 0):
        values = rows["activation"][rows["feature"] == feature]
        assert (n, highest) == (len(values), values.max())
        assert total == pytest.approx(values.sum(dtype=float))
    document = int(rows["document"][0])
    assert {f for _, f, *_ in bench.ask_document(con, document)} == {
        f for f in range(WIDTH) if document in own[f]
    }


def test_other_layouts_hold_the_same_rows(
    bench: ModuleType, index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_SLICES", 4)
    made = bench.make_others(index, tmp_path / "others", 0.6)
    con = queries.connect(index)
    [(want,)] = con.execute("SELECT count(*) FROM activations WHERE context < 3 << 20").fetchall()
    assert made["rows"] == want
    assert made["delphi"] == pytest.approx(14, rel=0.01)
    alive = [f for (f,) in con.execute("SELECT feature FROM features WHERE density > 0.01").fetchall()]
    bench.check_others(index, tmp_path / "others", 0.6, alive[:3])
    duckdb, delphi = (
        bench.Rows(str(tmp_path / "others"), "duckdb"),
        bench.Delphi(str(tmp_path / "others"), ""),
    )
    theirs = np.concatenate([counts for counts, _, _ in sorted(delphi.group_by(0), key=len)]).sum()
    assert theirs == want == sum(n for _, n, *_ in duckdb.group_by(0))
    duckdb.con.close()
    del duckdb
    (tmp_path / "others" / "done").unlink()
    bench.make_others(index, tmp_path / "others", 0.2)
    with pytest.raises(click.ClickException, match="the index"):
        bench.check_others(index, tmp_path / "others", 0.6, alive[:1])


def test_the_command(bench: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [
        sys.executable,
        str(BENCHMARKS / "queries.py"),
        "--rows",
        "4e4",
        "--width",
        "64",
        "--share",
        "0",
    ]
    command += ["--units", "3", "--few", "2e4", "--question", "document"]
    command += ["--folder", str(tmp_path), "--out", str(out), "--processes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert set(found["indexes"]) == {"large", "3 units"}
    for each in found["indexes"].values():
        assert set(each["questions"]) == {"document"}
        assert each["facts"]["bytes_per_row"]["all"] > each["facts"]["bytes_per_row"]["activations"] > 1
        for said in each["questions"].values():
            assert 0 < said["open_ms"] < said["cold_ms"]
            assert 0 < said["warm_least_ms"] <= said["warm_ms"]
            assert 20 < said["before_mb"] <= said["peak_mb"] < 1000
    assert "MISSED" not in "\n".join(bench.misses(found["indexes"]["large"]))
    said = {"question": "feature", "warm_ms": 31.0, "cold_ms": 149.0, "peak_mb": 3000.0}
    missed = bench.misses({"facts": {"rows": 1}, "questions": {"feature low": said}})
    assert [line.split(",")[0] for line in missed] == ["feature low: warm_ms 31.0", "feature low: peak 3"]


# --- files that say which features they hold


def test_a_feature_is_read_from_the_files_that_have_it(index: str, rows: dict[str, np.ndarray]) -> None:
    con = queries.connect(index)
    sae = sae_of(con)
    held = pruning.held(con, sae)
    assert held is not None
    paths = {name: f"{index}/{name.removeprefix('corpuscope://0/')}" for name, _ in held.files}
    assert len(paths) > 8
    import pyarrow.parquet as pq

    inside = {name: set(pq.read_table(path)["feature"].to_pylist()) for name, path in paths.items()}
    for feature in range(WIDTH):
        chosen = set(held.of(sae, feature))
        assert chosen >= {name for name, features in inside.items() if feature in features}
        assert len(chosen) < len(paths)
        if chosen and not (rows["feature"] == feature).any():
            assert all(min(inside[name]) < feature < max(inside[name]) for name in chosen)
    assert held.of("another", 5) == []
    con.close()


def test_contexts_found_so_are_those_of_the_view(index: str, rows: dict[str, np.ndarray]) -> None:
    con = queries.connect(index)
    sae = sae_of(con)
    for feature in range(0, WIDTH, 7):
        found = lookup._top(con, sae, feature, 20)
        want = con.execute(
            "SELECT rank, context, position, activation, positions, values FROM top_contexts "
            "WHERE sae = $1 AND feature = $2 ORDER BY rank",
            [sae, feature],
        ).fetchall()
        keys = ("rank", "context", "position", "activation", "positions", "values")
        assert [tuple(row[key] for key in keys) for row in found] == want
        for row in found:
            near = (rows["feature"] == feature) & (rows["context"] == row["context"])
            near &= abs(rows["position"] - row["position"]) <= 64
            at = np.argsort(rows["position"][near])
            assert row["positions"] == rows["position"][near][at].tolist()
            assert row["values"] == rows["activation"][near][at].tolist()
    con.close()


def test_a_damaged_span_is_found(index: str, tmp_path: Path) -> None:
    store = Store(index)
    run = contents(store).runs[0]
    manifest = Path(index) / run.name
    whole = manifest.read_bytes()
    said = json.loads(whole)
    [(sae, (first, last))] = said["files"]["activations"][0]["spans"].items()
    try:
        said["files"]["activations"][0]["spans"][sae] = [first, last - 1]
        manifest.write_text(json.dumps(said))
        assert verify(index, quick=True).whole  # read before, and kept: manifests never change
        code = "import sys; from queries.verify import verify; print(verify(sys.argv[1], quick=True).faults)"
        told = subprocess.run([sys.executable, "-c", code, index], capture_output=True, text=True, check=True)
        assert "spans" in told.stdout
        assert said["files"]["activations"][0]["path"] in told.stdout
    finally:
        manifest.write_bytes(whole)
    assert newest(store).runs
