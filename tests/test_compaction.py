"""Compaction and gc: the rows that are read never change, whatever is merged, removed, killed or dropped.

The undisturbed index is `few_index` (24 units, all as they were committed), and once `tiny_index`. FAN is
lowered, so that 24 units make two levels of tiers and a full compaction above them.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from forks import fork
from hypothesis import given
from hypothesis import strategies as st

import queries
from pipelines import compaction, contents, gc, snapshots, unit, upkeep
from pipelines.executors.base import Attempted
from pipelines.ledger import Ledger
from pipelines.ordinals import InOrder, between
from pipelines.storage import Store
from queries import lookup
from queries.verify import verify
from sae_runtime.errors import CorpuscopeError, DataError

ROOT = Path(__file__).parent.parent
UNITS = 24


@pytest.fixture(autouse=True)
def _small_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "FAN", 4)


@pytest.fixture
def index(tmp_path: Path, few_index: Path) -> Path:
    """A copy of the undisturbed index."""
    return Path(shutil.copytree(few_index, tmp_path / "index"))


@pytest.fixture(scope="module")
def wanted(few_index: Path) -> dict[str, list[tuple[Any, ...]]]:
    return tiny.views(few_index)


def same(index: Path | str, wanted: dict[str, list[tuple[Any, ...]]]) -> None:
    assert not tiny.differences(wanted, tiny.views(index))


def files(index: Path, kind: str) -> list[str]:
    found = contents.contents(Store(str(index)))
    return [record.path for record in found.files(kind)]


@pytest.mark.parametrize("all_saes", [False, True])
def test_compact_then_gc_changes_no_row(
    tmp_path: Path, few_index: Path, tiny_index: Path, all_saes: bool
) -> None:
    index = Path(shutil.copytree(tiny_index if all_saes else few_index, tmp_path / "index"))
    wanted = tiny.views(index)
    store = Store(str(index))
    before = contents.contents(store).facts.sort_by("ordinal")
    done = compaction.compact(store)
    assert (done.runs, done.nodes) == (8, 8)  # six of level 1, one of level 2, one of everything
    same(index, wanted)
    for kind in ("activations", "by_document", "documents", "features", "top_contexts", "sampled_merged"):
        assert len(files(index, kind)) == 1, kind
    assert files(index, "sampled_contexts") == []
    assert contents.contents(store).facts.sort_by("ordinal").equals(before)
    assert compaction.compact(store) == compaction.Done()

    kept = gc.collect(store)  # what was replaced may still be read by somebody
    assert (kept.removed, kept.retired) == (0, 0)
    assert kept.waiting > 100
    gone = gc.collect(store, readers=0, unfinished=0)
    assert (gone.removed, gone.bytes) == (kept.waiting, kept.waiting_bytes)
    same(index, wanted)
    assert gc.collect(store, 0, 0) == gc.Collected(0, 0, 0, 0, 0)


@pytest.mark.parametrize("all_saes", [False, True])
def test_pages_say_what_the_views_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_index: Path, tiny_index: Path, all_saes: bool
) -> None:
    """And are not read where they are of a part: SAEs of every `keep`, signed ones among them."""
    index = Path(shutil.copytree(tiny_index if all_saes else few_index, tmp_path / "index"))
    store = Store(str(index))

    def shown() -> dict[tuple[str, int], list[dict[str, Any]]]:
        con = queries.connect(str(index))
        some = con.sql("SELECT sae, feature FROM features WHERE feature % 7 = 3 ORDER BY ALL").fetchall()
        return {(sae, n): lookup.feature(con, sae, n, 5)["contexts"] for sae, n in some}

    compaction.compact(store)
    assert files(index, "pages") == [], "this index is too small for them"
    wanted = shown()
    assert sum(map(len, wanted.values())) > 20
    numbers = {int(path.stem) for path in (index / "snapshots").rglob("*.json")}
    (index / snapshots.snapshot_name(max(numbers))).unlink()  # the node is to be made once more
    monkeypatch.setattr(compaction, "PAGES_SHARE", 0)
    compaction.compact(store)
    assert files(index, "pages")
    opened: list[str] = []
    read = lookup._page
    monkeypatch.setattr(lookup, "_page", lambda *given: opened.append("") or read(*given))
    assert shown() == wanted
    assert len(opened) == len(wanted)
    found = contents.contents(store)
    [node], _ = found.summed
    part = replace(node, name="manifests/part.json", stop=node.stop - 1)
    snapshots.write_node(store, replace(part, members=contents.members(found.registered.live, 0, part.stop)))
    newest = snapshots.newest(store)
    snapshots.publish(store, replace(newest, number=newest.number + 1, nodes=(part.name,)))
    assert files(index, "pages") == [], "a node of some units does not know the best of all"
    assert len(contents.contents(store).summed[0]) == 1


def test_a_features_rows_and_a_documents_rows_lie_together(index: Path) -> None:
    compaction.compact(Store(str(index)))
    [path] = files(index, "activations")
    table = pq.read_table(index / path, columns=["sae", "feature", "token"]).to_pylist()
    keys = [(row["sae"], row["feature"], row["token"]) for row in table]
    saes = list(dict.fromkeys(sae for sae, _, _ in keys))
    assert keys == sorted(keys, key=lambda key: (saes.index(key[0]), *key[1:]))
    [path] = files(index, "by_document")
    documents = [row["document"] for row in pq.read_table(index / path, columns=["document"]).to_pylist()]
    assert documents == sorted(documents)


@pytest.mark.parametrize("compacted", [False, True])
def test_the_features_of_a_document(index: Path, compacted: bool) -> None:
    store = Store(str(index))
    found = contents.contents(store)
    if compacted:
        compaction.execute(found, compaction.RunJob(1, (), found.own[:9]))
    con = queries.connect(str(index))
    documents = [d for (d,) in con.sql("SELECT document FROM documents ORDER BY document").fetchall()]
    for document in documents[::5]:
        whole = "SELECT sae, feature, n_tokens, max, sum FROM document_features WHERE document = ?"
        rows = con.execute("FROM features_of(?)", [document]).fetchall()
        assert sorted(rows) == sorted(con.execute(whole, [document]).fetchall())
        assert [abs(row[3]) for row in rows] == sorted((abs(row[3]) for row in rows), reverse=True)


def test_the_features_of_a_document_are_not_answered_in_part(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_suites: Path
) -> None:
    saes = [
        {"uri": str(tiny_suites / suite), "keep": "none" if i else "tokens"}
        for i, suite in enumerate(tiny.SUITES)
    ]
    spec = write_spec(tmp_path, saes=saes, corpus={"limit": 3})
    scan_inline(spec)
    con = queries.connect(str(tmp_path / "index"))
    with pytest.raises(duckdb.Error, match="keep: none"):
        con.sql("FROM features_of((SELECT min(document) FROM documents))").fetchall()


@pytest.mark.parametrize(
    "point",
    [
        "merge-file:3",
        "merge-file:9",
        "compact-files:2",
        "compact-manifest:1",
        "compact-manifest:2",
        "compact-published:1",
        "compact-published:4",
    ],
)
def test_killed_at_any_point_compaction_harms_nothing(
    tmp_path: Path, index: Path, wanted: dict[str, list[tuple[Any, ...]]], point: str
) -> None:
    killed = fork(tmp_path / "logs", [["compact", str(index)]], 4, point)
    assert killed.wait() == 137, killed.log.read_text()
    same(index, wanted)
    store = Store(str(index))
    gc.collect(store, 0, 0)
    same(index, wanted)
    compaction.compact(store)
    same(index, wanted)
    gc.collect(store, 0, 0)
    same(index, wanted)
    assert len(files(index, "activations")) == 1


@pytest.mark.parametrize("point", ["gc-retired:1", "gc-removing:1", "gc-removing:2", "gc-removing:3"])
def test_killed_at_any_point_gc_harms_nothing(
    tmp_path: Path, index: Path, wanted: dict[str, list[tuple[Any, ...]]], point: str
) -> None:
    store = Store(str(index))
    compaction.compact(store)
    killed = fork(tmp_path / "logs", [["gc", str(index), "--grace", "0", "--unfinished", "0"]], 4, point)
    assert killed.wait() == 137, killed.log.read_text()
    same(index, wanted)
    gc.collect(store, 0, 0)
    same(index, wanted)


def test_readers_see_whole_units_while_it_is_compacted_and_collected(
    index: Path, wanted: dict[str, list[tuple[Any, ...]]]
) -> None:
    """Connections made at any moment answer alike; those made before a gc outlive it within its grace."""
    question = "SELECT count(*), sum(activation)::DECIMAL(18, 4), count(DISTINCT context) FROM activations"
    answer = queries.connect(str(index)).sql(question).fetchall()
    old = queries.connect(str(index))
    wrong: list[Any] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                found = queries.connect(str(index)).sql(question).fetchall()
            except Exception as error:
                wrong.append(error)
                return
            if found != answer:
                wrong.append(found)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    store = Store(str(index))
    try:
        for _ in range(3):
            compaction.compact(store)
            gc.collect(store)
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not wrong
    assert old.sql(question).fetchall() == answer
    same(index, wanted)


def test_an_index_that_is_replaced_while_it_is_opened_is_resolved_again(
    index: Path, wanted: dict[str, list[tuple[Any, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sys.modules["queries.connect"]  # the package has a function of that name
    resolved, calls = connect.resolved, []

    def slow(store: Store) -> Any:
        found = resolved(store)
        if not calls:
            compaction.compact(store)
            gc.collect(store, 0, 0)
        calls.append(found)
        return found

    monkeypatch.setattr(connect, "resolved", slow)
    same(index, wanted)
    assert len(calls) > 1
    (index / files(index, "documents")[0]).unlink()
    with pytest.raises(DataError, match="damaged"):
        queries.connect(str(index))


def test_two_compactions_at_once(index: Path, wanted: dict[str, list[tuple[Any, ...]]]) -> None:
    """Whoever is late drops his work; no unit's rows are in two runs."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            compaction.compact(Store(str(index)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    found = contents.contents(Store(str(index)))
    assert len(np.unique(found.covered)) == len(found.covered) == UNITS
    same(index, wanted)
    gc.collect(Store(str(index)), 0, 0)
    same(index, wanted)


def test_a_late_publisher_loses(index: Path, wanted: dict[str, list[tuple[Any, ...]]]) -> None:
    """A compaction that slept through another one's cannot publish rows a second time."""
    store = Store(str(index))
    found = contents.contents(store)
    job = compaction.RunJob(1, (), found.own[:4])
    late = compaction.RunJob(1, (), found.own[2:6])
    assert compaction.execute(found, job) is not None
    assert compaction.execute(found, late) is None
    same(index, wanted)


def test_ranges_are_published_together_and_each_for_itself(
    index: Path, wanted: dict[str, list[tuple[Any, ...]]]
) -> None:
    """One snapshot names what was made of four ranges, less the run that somebody else was first with."""
    store = Store(str(index))
    found = contents.contents(store)
    spans = [(0, 4), (4, 8), (8, 12), (12, 16)]
    rivals = [compaction.RunJob(1, (), np.arange(5, 7))]

    def slow(tasks: Any) -> Any:
        if rivals:
            assert compaction.execute(found, rivals.pop()) is not None
        return compaction.perform_here(tasks)

    done = compaction.settle(store, found.registered, 1, spans, slow)
    assert (done.runs, done.nodes) == (3, 4)
    snapshot = snapshots.newest(store)
    assert (snapshot.number, len(snapshot.runs), len(snapshot.nodes)) == (1, 4, 4)
    same(index, wanted)
    compaction.compact(store)
    same(index, wanted)


def test_upkeep_merges_what_waits_in_a_row_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """While something is being merged ranges close; those of a level are merged at once, in their order."""
    begun, go_on = threading.Event(), threading.Event()
    settled: list[tuple[int, list[tuple[int, int]]]] = []

    def settle(store: Any, registered: Any, level: int, spans: Any, perform: Any) -> compaction.Done:
        settled.append((level, list(spans)))
        begun.set()
        assert go_on.wait(30)
        return compaction.Done()

    monkeypatch.setattr(upkeep, "settle", settle)
    monkeypatch.setattr(upkeep, "catch_up", lambda *given: compaction.Done())
    monkeypatch.setattr(upkeep, "next_ordinal", lambda plans: 40)
    registered: Any = type("Registered", (), {"plans": ()})()
    notes: list[str] = []
    with upkeep.Upkeep(
        Store("memory://none"), registered, range(40), compaction.perform_here, notes.append
    ) as at:
        for ordinal in range(4):
            at.committed(ordinal)
        assert begun.wait(30)
        for ordinal in range(4, 40):
            at.committed(ordinal)
        go_on.set()
    ranges = [(first, first + 4) for first in range(0, 40, 4)]
    assert settled == [
        (1, ranges[:1]), (1, ranges[1:4]), (2, [(0, 16)]), (1, ranges[4:8]), (2, [(16, 32)]), (1, ranges[8:]),
    ]  # fmt: skip
    assert not notes


@given(st.lists(st.integers(0, 40), unique=True), st.integers(-1, 41), st.integers(-1, 41))
def test_spans_of_ordinals(ordinals: list[int], first: int, stop: int) -> None:
    wanted = [ordinal for ordinal in ordinals if first <= ordinal < stop]
    assert InOrder(np.array(ordinals, np.int64)).between(first, stop).tolist() == wanted
    assert between(np.array(sorted(ordinals), np.int64), first, stop).tolist() == sorted(wanted)


def test_what_is_too_old_is_not_published_and_not_made_again(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "MAX_AGE", 0.0)
    monkeypatch.setattr(compaction, "FAN", UNITS + 1)  # nothing is due in tiers
    merges: list[int] = []

    def perform(tasks: Any) -> Any:
        assert len(merges) < 4, "the same work again and again"
        merges.append(len(tasks))
        return compaction.perform_here(tasks)

    store = Store(str(index))
    with pytest.raises(CorpuscopeError, match="took over"):
        compaction.compact(store, perform)
    assert snapshots.newest(store) == snapshots.NONE


def test_a_corpus_that_changes_between_compactions(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_corpus: Path,
    few: list[dict[str, str]],
) -> None:  # fmt: skip
    """Files come, go and come back, with compactions and collections in between, against fresh scans."""
    names = sorted(f.name for f in tiny_corpus.iterdir())[:14]
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    spec = write_spec(tmp_path, corpus={"uri": "corpus/*.jsonl"}, saes=few)
    index = tmp_path / "index"
    generator = random.Random(7)
    present: set[str] = set()
    fresh: dict[frozenset[str], dict[str, list[tuple[Any, ...]]]] = {}  # what each set of files gives

    def scan() -> int:
        return int(scan_inline(spec, allow_removal=True).items)

    def check(step: str) -> None:
        files = frozenset(f.name for f in corpus.iterdir())
        if files not in fresh:
            once = write_spec(tmp_path / f"fresh-{step}", corpus={"uri": f"{corpus}/*.jsonl"}, saes=few)
            scan_inline(once)
            fresh[files] = tiny.content(once.parent / "index")
        assert not tiny.differences(fresh[files], tiny.content(index)), step

    for name in names[2:12]:
        shutil.copy(tiny_corpus / name, corpus / name)
        present.add(name)
    assert scan() == 10
    store = Store(str(index))
    compaction.compact(store)
    check("first")

    gone = generator.sample(sorted(present), 3)
    for name in gone:
        (corpus / name).unlink()
    for name in names[:2]:  # before the others in the corpus, after them in the registry
        shutil.copy(tiny_corpus / name, corpus / name)
    assert scan() == 2
    check("gone")
    compaction.compact(store)
    check("gone and compacted")
    gc.collect(store)  # too young to be given up
    shutil.copy(tiny_corpus / gone[0], corpus / gone[0])
    assert scan() == 0, "a file that comes back finds its data"
    check("back")
    compaction.compact(store)
    check("back and compacted")

    assert gc.collect(store, 0, 0).retired == 2
    check("collected")
    shutil.copy(tiny_corpus / gone[1], corpus / gone[1])
    assert scan() == 1, "a unit that was given up is scanned anew"
    check("anew")
    compaction.compact(store)
    gc.collect(store, 0, 0)
    check("anew and compacted")
    assert gc.collect(store, 0, 0) == gc.Collected(0, 0, 0, 0, 0)
    found = contents.contents(store)
    assert not len(found.hidden), "rows of units that were given up are left out of what is merged"
    runs = queries.connect(str(index)).sql("SELECT run, documents FROM runs ORDER BY run").fetchall()
    assert [run for run, _ in runs] == [1, 2, 3, 5]  # 4 is the collection, which is no scan


def test_what_lost_attempts_left_is_removed_at_once(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any],
    few: list[dict[str, str]], wanted: dict[str, list[tuple[Any, ...]]],
) -> None:  # fmt: skip
    spec, index = write_spec(tmp_path, saes=few), tmp_path / "index"
    crashed = fork(tmp_path / "logs", [["scan", str(spec), "--executor", "inline"]], 32, "before-commit")
    assert crashed.wait() == 137, crashed.log.read_text()
    orphans = set((index / "data").rglob("*.parquet"))
    assert orphans
    store = Store(str(index))
    assert gc.collect(store).removed == 0, "its unit has no commit: the attempt might be alive"
    scan_inline(spec)
    assert gc.collect(store).removed == len(orphans)
    assert not {f for f in orphans if f.exists()}
    same(index, wanted)


def test_what_calls_cut_short_left_is_removed(index: Path, wanted: dict[str, list[tuple[Any, ...]]]) -> None:
    store = Store(str(index))
    left = [index / "commits" / "000000" / f".{'0a' * 16}", index / f".clock-{'0a' * 16}"]
    for file in left:
        file.write_text("{")
    assert gc.collect(store).removed == 0
    os.utime(left[0], (1, 1))
    assert gc.collect(store).removed == 1
    assert [file.exists() for file in left] == [False, True]
    same(index, wanted)


def test_units_between_merged_ones_are_merged_too(
    index: Path, wanted: dict[str, list[tuple[Any, ...]]]
) -> None:
    store = Store(str(index))
    found = contents.contents(store)
    assert compaction.execute(found, compaction.RunJob(1, (), np.array([4, 6, 7]))) is not None
    compaction.compact(store)
    same(index, wanted)
    found = contents.contents(store)
    assert found.own.tolist() == []
    assert len(found.runs) == 1


def test_tiers_tell_which_ranges_close() -> None:
    generator = random.Random(3)
    waiting = [ordinal for ordinal in range(70) if ordinal % 5] * 2  # two groups; every fifth is dropped
    generator.shuffle(waiting)
    tiers = compaction.Tiers(70, waiting)
    told: list[tuple[int, int, int]] = []
    left = list(waiting)
    for ordinal in waiting:
        left.remove(ordinal)
        for level, first, stop in tiers.committed(ordinal):
            assert not [o for o in left if first <= o < stop]
            assert stop - first == 4**level
            told.append((level, first, stop))
    spans = {
        (level, first, first + 4**level)
        for level in (1, 2, 3)
        for first in range(0, 70 - 4**level + 1, 4**level)
    }
    assert len(told) == len(set(told))
    assert set(told) == spans


def test_in_memory_too(index: Path, wanted: dict[str, list[tuple[Any, ...]]]) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(index), "/compacted", recursive=True)
    try:
        store = Store("memory://compacted")
        compaction.compact(store)
        same("memory://compacted", wanted)
        assert gc.collect(store, 0, 0).removed > 100
        same("memory://compacted", wanted)
    finally:
        memory.rm("/compacted", recursive=True)


@pytest.mark.cluster
def test_on_ray_tasks_merge_ranges_of_saes(
    tmp_path: Path, write_spec: Callable[..., Path], tiny_index: Path
) -> None:
    spec = write_spec(tmp_path)
    code = (
        "import sys; from pipelines import compaction; compaction.FAN = 4; compaction.TASK_ROWS = 3000;"
        "from jobs.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "scan", str(spec), "--workers", "2"], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "compaction" not in done.stderr
    found = contents.contents(Store(str(tmp_path / "index")))
    assert sorted(run.level for run in found.runs) == [1, 1, 2]
    assert len(found.files("activations")) > len(found.runs), "no run was merged by several tasks"
    same(tmp_path / "index", tiny.views(tiny_index))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_scan_compacts_as_it_goes(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any],
    few: list[dict[str, str]], wanted: dict[str, list[tuple[Any, ...]]], monkeypatch: pytest.MonkeyPatch,
    groups: int,
) -> None:  # fmt: skip
    if groups == 2:
        halves = lambda prepared, workers: [[s.id for s in prepared.saes][i::2] for i in (0, 1)]  # noqa: E731
        monkeypatch.setattr("pipelines.scan.plan_groups", halves)
    told: list[str] = []
    outcome = scan_inline(write_spec(tmp_path, saes=few), notice=told.append)
    assert outcome.items == UNITS * groups
    assert not [line for line in told if "compaction" in line]
    found = contents.contents(Store(str(tmp_path / "index")))
    assert sorted(run.level for run in found.runs) == [1, 1, 2]  # 16 units, then twice 4
    assert not len(found.own)
    nodes, alone = found.summed
    assert (sorted(node.level for node in nodes), len(alone)) == ([1, 1, 2], 0)
    same(tmp_path / "index", wanted)


def test_a_compaction_that_fails_is_told_and_harms_nothing(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any],
    few: list[dict[str, str]], wanted: dict[str, list[tuple[Any, ...]]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("pipelines.compaction.merge_rows", fail)
    told: list[str] = []
    outcome = scan_inline(write_spec(tmp_path, saes=few), notice=told.append)
    assert (outcome.items, outcome.failed) == (UNITS, ())
    assert [line for line in told if "compaction stopped" in line and "no space left" in line]
    same(tmp_path / "index", wanted)


def test_a_scan_removes_what_its_compaction_replaced(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any],
    few: list[dict[str, str]], wanted: dict[str, list[tuple[Any, ...]]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("pipelines.upkeep.READERS", 0.0)
    scan_inline(write_spec(tmp_path, saes=few))
    index = tmp_path / "index"
    store = Store(str(index))
    assert {f"data/activations/{f.name}" for f in (index / "data" / "activations").iterdir()} == set(
        files(index, "activations")
    )
    same(index, wanted)
    left = {*store.entries("data"), *store.entries("manifests")}
    gc.collect(store, 0, 0)
    assert {*store.entries("data"), *store.entries("manifests")} == left, "gc found more to remove"


def test_inputs_that_another_compaction_replaced_are_no_damage(
    index: Path, wanted: dict[str, list[tuple[Any, ...]]]
) -> None:
    store = Store(str(index))
    found = contents.contents(store)
    late = compaction.RunJob(1, (), found.own[:6])
    compaction.compact(store)
    gc.collect(store, 0, 0)
    assert compaction.execute(found, late) is None
    same(index, wanted)
    gone = files(index, "activations")[0]
    (index / gone).unlink()
    found = contents.contents(store)
    with pytest.raises((DataError, FileNotFoundError), match="activations"):
        compaction.execute(found, compaction.RunJob(compaction.TOP, found.runs, found.own))


@pytest.fixture
def growing(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_corpus: Path,
    few: list[dict[str, str]],
) -> Callable[[str], None]:  # fmt: skip
    """An index of six files, and a function that takes a file away, or brings it back, and scans again."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in sorted(f.name for f in tiny_corpus.iterdir())[:6]:
        shutil.copy(tiny_corpus / name, corpus / name)
    spec = write_spec(tmp_path, corpus={"uri": "corpus/*.jsonl"}, saes=few)
    scan_inline(spec)

    def toggle(name: str) -> None:
        if (corpus / name).exists():
            (corpus / name).unlink()
        else:
            shutil.copy(tiny_corpus / name, corpus / name)
        assert not scan_inline(spec, allow_removal=True).failed

    return toggle


def test_a_unit_that_comes_back_while_gc_looks_keeps_its_files(
    tmp_path: Path, growing: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was given up, and has the id of then: what is written for it is no lost attempt's."""
    store = Store(str(tmp_path / "index"))
    growing("part_01.jsonl")
    assert gc.collect(store, readers=0).retired == 1
    look = gc._annotations

    def late(*given: Any) -> Any:  # the index has been resolved, its data are not listed yet
        growing("part_01.jsonl")
        return look(*given)

    monkeypatch.setattr(gc, "_annotations", late)
    gc.collect(store)
    assert not verify(store.uri).faults


def test_a_unit_that_was_dropped_once_more_waits_once_more(
    tmp_path: Path, growing: Callable[[str], None]
) -> None:
    index = tmp_path / "index"
    for _ in range(2):
        growing("part_01.jsonl")
    for file in (index / "plans").iterdir():
        os.utime(file, (1, 1))
    growing("part_01.jsonl")
    assert gc.collect(Store(str(index))).retired == 0, "queries that began before it may read it"
    os.utime(index / "plans" / "000003.json", (1, 1))
    assert gc.collect(Store(str(index))).retired == 1


def test_what_a_slow_batch_replaced_stays_for_readers(
    index: Path, wanted: dict[str, list[tuple[Any, ...]]]
) -> None:
    """The first of its manifests is older than readers are waited for when the snapshot names it."""
    store = Store(str(index))

    def slow(tasks: Any) -> Any:
        for file in (index / "manifests").glob("*.json"):
            os.utime(file, (1, 1))
        return compaction.perform_here(tasks)

    before = queries.connect(str(index))
    found = contents.contents(store)
    assert compaction.settle(store, found.registered, 1, [(0, 4), (4, 8)], slow).runs == 2
    assert gc.collect(store).removed == 0
    assert before.sql("SELECT * FROM documents ORDER BY ALL").fetchall() == wanted["documents"]


def test_a_run_whose_units_were_all_given_up_is_in_nobodys_way(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "FAN", 2)
    store = Store(str(index))
    for first in (0, 2):
        found = contents.contents(store)
        assert compaction.settle(store, found.registered, 1, [(first, first + 2)]).runs == 1
    newest = found.plans[-1]
    dropped = replace(newest, run=2, files=newest.files[4:], units=(), dropped=((0, 4),))
    assert Ledger(store).add_plan(dropped)
    assert gc.collect(store, readers=0).retired == 4
    assert compaction.settle(store, contents.contents(store).registered, 2, [(0, 4)]).runs == 1
    assert [run.units for run in contents.contents(store).runs] == [()]
    wanted = tiny.views(index)
    compaction.compact(store)
    same(index, wanted)
    assert not verify(store.uri).faults


def test_units_that_are_given_up_while_they_are_merged(
    tmp_path: Path, growing: Callable[[str], None]
) -> None:
    store = Store(str(tmp_path / "index"))
    going = ["part_05.jsonl"]

    def perform(tasks: Any) -> Any:
        if going:
            growing(going.pop())
            assert gc.collect(store, readers=0).retired == 1
        return compaction.perform_here(tasks)

    compaction.compact(store, perform)
    found = contents.contents(store)
    assert (len(found.shown), len(found.own), len(found.runs)) == (5, 0, 1)
    assert not verify(store.uri).faults


def test_a_machine_that_slept_publishes_nothing(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its monotonic clock stood still; elsewhere a gc has taken the files for left over."""
    store = Store(str(index))
    found = contents.contents(store)
    now = time.time

    def sleeping(tasks: Any) -> Any:
        done = compaction.perform_here(tasks)
        monkeypatch.setattr(time, "time", lambda: now() + gc.UNFINISHED)
        return done

    with pytest.raises(CorpuscopeError, match="took over"):
        compaction.execute(found, compaction.RunJob(1, (), found.own[:4]), sleeping)
    assert snapshots.newest(store) == snapshots.NONE


def test_a_machine_that_slept_commits_nothing(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any],
    few: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The unit is scanned again."""
    now, slept = time.time, [0.0]
    check = unit.check_unchanged

    def sleeping(*given: Any) -> None:
        slept[0] = slept[0] or gc.UNFINISHED
        check(*given)

    monkeypatch.setattr(time, "time", lambda: now() + slept[0])
    monkeypatch.setattr(unit, "check_unchanged", sleeping)
    spec = write_spec(tmp_path, corpus={"limit": 2}, saes=few)
    told: list[Any] = []
    assert not scan_inline(spec, observe=told.append).failed
    assert [event.kind for event in told if isinstance(event, Attempted)] == ["infra"]
    assert not verify(str(tmp_path / "index")).faults


def test_a_snapshot_that_comes_after_its_number_was_removed_replaces_nothing(
    index: Path, wanted: dict[str, list[tuple[Any, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it would have replaced is in use, and would be removed by whoever thinks that it holds."""
    store = Store(str(index))
    publish = compaction.publish

    def late(store: Store, snapshot: snapshots.Snapshot) -> bool:
        monkeypatch.setattr(compaction, "publish", publish)
        for first in (8, 12, 16):
            rival = compaction.RunJob(1, (), np.arange(first, first + 4))
            assert compaction.execute(contents.contents(store), rival) is not None
        for name in store.entries("snapshots")[:-1]:
            store.remove([f"snapshots/{name}"])
        return publish(store, snapshot)

    monkeypatch.setattr(compaction, "publish", late)
    done = compaction.execute(contents.contents(store), compaction.RunJob(1, (), np.arange(4)))
    assert done is not None
    assert len(contents.contents(store).runs) == 4
    store.remove(done.replaced)
    same(index, wanted)
