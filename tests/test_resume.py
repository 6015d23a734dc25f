"""Invariant 1: the index depends on no executor, worker count, crash or resumption, on history in keys only.

The undisturbed index is `tiny_index` (inline, once through, 24 units). Everything else is compared with it
row for row and key for key, or joined on (corpus, source, row, start) where the history differs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from forks import fork

from sae_runtime.errors import InputError

ROOT = Path(__file__).parent.parent
UNITS = 24


def command(spec: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "jobs.cli", "scan", str(spec), *options]


def environment(home: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "HOME": str(home), "RAY_AUTH_MODE": "disabled", "PYTHONUNBUFFERED": "1", **more}


def commits(index: Path) -> dict[str, dict[str, Any]]:
    """Commit objects by name, as a reader sees them."""
    folder = index / "commits"
    if not folder.is_dir():
        return {}
    return {f.name: json.loads(f.read_text()) for f in folder.rglob("[!.]*.json")}


def kill_after(process: subprocess.Popen[str], index: Path, wanted: int) -> None:
    """SIGKILL the driver as soon as `wanted` units are committed."""
    while committed(index) < wanted:
        if process.poll() is not None:
            pytest.fail(f"the scan ended before it could be killed: {process.communicate()}")
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL


def committed(index: Path) -> int:
    """Units that are committed, without a look into their commits."""
    folder = index / "commits" / "000000"
    return sum(n.endswith(".json") and n[0] != "." for n in os.listdir(folder)) if folder.is_dir() else 0


def data_files(index: Path) -> set[str]:
    return {str(f.relative_to(index)) for f in (index / "data").rglob("*.parquet")}


def check_resumed(index: Path, before: dict[str, dict[str, Any]], undisturbed: Path) -> None:
    """The index is whole and equal; what was committed before is untouched, orphans are not seen."""
    after = commits(index)
    assert len(after) == UNITS
    for name, commit in before.items():
        assert after[name] == commit, "a committed unit was scanned again"
    named = {record["path"] for commit in after.values() for record in commit["files"].values()}
    assert named <= data_files(index)
    assert not tiny.differences(tiny.views(undisturbed), tiny.views(index))


def test_sigkill_part_way_and_run_again(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_index: Path
) -> None:
    spec, index = write_spec(tmp_path), tmp_path / "index"
    # First a crash at the worst moment: all data of a unit written, its commit not.
    scan = [["scan", str(spec), "--executor", "inline"]]
    crashed = fork(tmp_path / "logs", scan, 32, "before-commit")
    assert crashed.wait() == 137, crashed.log.read_text()
    assert commits(index) == {}
    orphans = data_files(index)
    assert orphans
    assert [len(tiny.views(index)[view]) for view in ("documents", "contexts", "activations")] == [0, 0, 0]

    going = fork(tmp_path / "logs", scan, 32)
    while committed(index) < 6:
        assert going.process.is_alive(), going.log.read_text()
        time.sleep(0.001)
    going.process.kill()
    assert going.wait() == -signal.SIGKILL
    before = commits(index)
    assert 6 <= len(before) < UNITS
    shown = tiny.views(index)
    assert len({row[2:4] for row in shown["documents"]}) == len(before)  # whole units, no orphan

    items: list[int] = []
    outcome = scan_inline(spec, observe=lambda e: items.append(e.items) if hasattr(e, "items_done") else None)
    assert items == [UNITS - len(before)] == [outcome.items]
    assert not outcome.failed
    check_resumed(index, before, tiny_index)
    named = {r["path"] for commit in commits(index).values() for r in commit["files"].values()}
    assert orphans <= data_files(index) - named, "workers never delete; gc does"


def test_a_finished_scan_again_does_no_model_work(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_index: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copytree(tiny_index, tmp_path / "index")
    spec = write_spec(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("pipelines.unit.LanguageModel", refuse)
    monkeypatch.setattr("pipelines.unit.Encoder", refuse)
    files = {f: f.stat().st_mtime_ns for f in (tmp_path / "index").rglob("*") if f.is_file()}
    assert scan_inline(spec).items == 0
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "index").rglob("*") if f.is_file()} == files

    from jobs.cli import main

    monkeypatch.setattr(sys, "argv", ["corpuscope", "scan", str(spec)])  # not even Ray is started
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert ended.value.code == 0
    printed = capsys.readouterr()
    assert "nothing to" in printed.err
    assert "run 1" in printed.err
    assert printed.out == ""
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "index").rglob("*") if f.is_file()} == files


# --- other histories


def test_an_added_file_alone_is_scanned(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_corpus: Path,
    few: list[dict[str, str]], few_index: Path,
) -> None:  # fmt: skip
    """Files that sort before, between and after the known ones; a touched one; then moved, as a whole."""
    corpus = tmp_path / "corpus"
    shutil.copytree(tiny_corpus, corpus)
    late = ["part_00.jsonl", "part_11.jsonl", "part_12.jsonl", "part_23.jsonl"]
    for name in late:
        (corpus / name).rename(tmp_path / name)
    spec, index = write_spec(tmp_path, corpus={"uri": "corpus/*.jsonl"}, saes=few), tmp_path / "index"
    assert scan_inline(spec).items == UNITS - len(late)
    old, first = tiny.views(index), commits(index)
    for name in late:
        (tmp_path / name).rename(corpus / name)
    os.utime(corpus / "part_05.jsonl", (1, 1))
    assert scan_inline(spec).items == len(late)
    new = tiny.views(index)
    assert {name: commits(index)[name] for name in first} == first

    # Old rows keep their keys and values; only what depends on the whole corpus moves.
    for view in ("documents", "segments", "contexts", "activations", "document_features"):
        assert set(map(repr, old[view])) < set(map(repr, new[view])), view
    added = {row[:2] for row in map(repr_row, new["documents"])} - {
        row[:2] for row in map(repr_row, old["documents"])
    }
    assert {source for _, source in added} == set(late)
    assert [row[0] for row in new["runs"]] == [1, 2]
    assert sum(row[1] for row in new["runs"]) == len(new["documents"])

    # Another history, another place: the same content, ties, ranks and samples included.
    assert not tiny.differences(tiny.content(few_index), tiny.content(index))
    assert scan_inline(spec).items == 0

    # The corpus and the index move; nothing is scanned again, nothing changes.
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copytree(corpus, moved / "texts")  # new times, so every file is read again
    index.rename(moved / "index")
    again = write_spec(moved, corpus={"uri": "texts/*.jsonl"}, saes=few)
    assert scan_inline(again).items == 0
    assert not tiny.differences(new, tiny.views(moved / "index"))


def repr_row(row: tuple[Any, ...]) -> tuple[Any, str]:
    """(document, source) of a row of `documents`."""
    return row[0], row[3]


def test_files_one_by_one_in_reverse(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_corpus: Path,
    few: list[dict[str, str]],
) -> None:  # fmt: skip
    """Six scans of one more file each, last file first, against one scan of all six."""
    names = sorted(f.name for f in tiny_corpus.iterdir())[:6]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    for name in names:
        shutil.copy(tiny_corpus / name, tmp_path / "a" / name)
    one = write_spec(tmp_path / "one", corpus={"uri": "../a/*.jsonl"}, saes=few)
    assert scan_inline(one).items == 6
    two = write_spec(tmp_path / "two", corpus={"uri": "../b/*.jsonl"}, saes=few)
    for name in reversed(names):
        shutil.copy(tiny_corpus / name, tmp_path / "b" / name)
        assert scan_inline(two).items == 1
    whole, grown = tmp_path / "one" / "index", tmp_path / "two" / "index"
    assert tiny.views(whole)["documents"] != tiny.views(grown)["documents"]  # other keys
    assert not tiny.differences(tiny.content(whole), tiny.content(grown))


def test_a_changed_file_replaces_its_old_self(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_corpus: Path,
    few: list[dict[str, str]],
) -> None:  # fmt: skip
    names = sorted(f.name for f in tiny_corpus.iterdir())[:12]
    (tmp_path / "c").mkdir()
    for name in names:
        shutil.copy(tiny_corpus / name, tmp_path / "c" / name)
    rows = tiny.texts_by_file()[4]
    rows[0]["text"] = "quite another text " + rows[1]["text"]
    changed = tiny.write_rows(tmp_path / "part_04.jsonl", rows)
    spec = write_spec(tmp_path / "x", corpus={"uri": "../c/*.jsonl"}, saes=few)
    assert scan_inline(spec).items == 12
    shutil.copy(changed, tmp_path / "c" / "part_04.jsonl")
    assert scan_inline(spec).items == 1
    fresh = write_spec(tmp_path / "y", corpus={"uri": "../c/*.jsonl"}, saes=few)
    assert scan_inline(fresh).items == 12
    wanted = tiny.content(tmp_path / "y" / "index")
    assert not tiny.differences(wanted, tiny.content(tmp_path / "x" / "index"))
    # A file that shrinks loses documents too: refused where they are many.
    kept = (tmp_path / "c" / names[1]).read_bytes()
    big = tiny.write_rows(tmp_path / "big.jsonl", [row for rows in tiny.texts_by_file()[:9] for row in rows])
    shutil.copy(big, tmp_path / "c" / names[1])
    assert scan_inline(spec).items == 1
    shutil.copy(tmp_path / "c" / names[2], tmp_path / "c" / names[1])
    with pytest.raises(InputError, match=r"documents are gone \(part_01.jsonl\).*--allow-removal"):
        scan_inline(spec)
    (tmp_path / "c" / names[1]).write_bytes(kept)
    scan_inline(spec, allow_removal=True)
    assert not tiny.differences(wanted, tiny.content(tmp_path / "x" / "index"))
    # A file that goes: refused where it is more than a tenth of the documents, unless that is meant.
    for name in names[:3]:
        (tmp_path / "c" / name).unlink()
    with pytest.raises(InputError, match="allow-removal"):
        scan_inline(spec)
    assert not tiny.differences(wanted, tiny.content(tmp_path / "x" / "index"))
    assert scan_inline(spec, allow_removal=True).items == 0
    last = write_spec(tmp_path / "z", corpus={"uri": "../c/*.jsonl"}, saes=few)
    assert scan_inline(last).items == 9
    assert not tiny.differences(
        tiny.content(tmp_path / "z" / "index"), tiny.content(tmp_path / "x" / "index")
    )


def test_a_limit_that_grows(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_corpus: Path
) -> None:
    """`limit` may change between scans: the first 3 documents, then 10, then all of them."""
    (tmp_path / "c").mkdir()
    for name in sorted(f.name for f in tiny_corpus.iterdir())[2:8]:
        shutil.copy(tiny_corpus / name, tmp_path / "c" / name)
    index, seen = tmp_path / "index", []
    for limit in (3, 10, 10, None):
        outcome = scan_inline(write_spec(tmp_path, corpus={"uri": "c/*.jsonl", "limit": limit}))
        assert not outcome.failed
        seen.append((outcome.items > 0, len(tiny.views(index)["documents"])))
    total = sum(len(rows) for rows in tiny.texts_by_file()[2:8])
    assert seen == [(True, 3), (True, 10), (False, 10), (True, total)]
    assert not scan_inline(write_spec(tmp_path / "once", corpus={"uri": "../c/*.jsonl"})).failed
    whole, grown = tiny.content(tmp_path / "once" / "index"), tiny.content(index)
    for view in ("documents", "contexts", "vocabulary"):
        assert whole[view] == grown[view], view
    # Units end where the limit was, so batches have other shapes: the model's float32 rounding may differ.
    one, other = ({row[:-1]: row[-1] for row in found["activations"]} for found in (whole, grown))
    assert len(one.keys() ^ other.keys()) <= 0.001 * len(one)
    assert all(other[key] == pytest.approx(one[key], rel=2**-7) for key in one.keys() & other.keys())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"context": {"length": 95}}, "context.length"),
        ({"context": {"exclude": ["special"]}}, "context.exclude"),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype"),
        ({"model": {"threads": 2}}, "model.threads"),
        ({"top_k": 5}, "top_k"),
        ({"sample_k": 4}, "sample_k"),
        ({"corpus": {"metadata": ["lang", "score"]}}, "metadata"),
    ],
)
def test_what_fixes_the_values_may_not_change(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_index: Path,
    change: dict[str, Any], named: str,
) -> None:  # fmt: skip
    shutil.copytree(tiny_index, tmp_path / "index")
    spec = write_spec(tmp_path, **change)
    files = set((tmp_path / "index").rglob("*"))
    with pytest.raises(InputError, match=named) as refused:
        scan_inline(spec)
    assert "\n" not in str(refused.value)
    assert set((tmp_path / "index").rglob("*")) == files


def test_fewer_saes_or_another_keep_are_refused(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_index: Path,
    tiny_suites: Path,
) -> None:  # fmt: skip
    shutil.copytree(tiny_index, tmp_path / "index")
    for saes in (
        [{"uri": str(tiny_suites / "tiny-res")}],
        [{"uri": str(tiny_suites / suite), "keep": "documents"} for suite in tiny.SUITES],
    ):
        with pytest.raises(InputError, match="saes"):
            scan_inline(write_spec(tmp_path, saes=saes))


# --- Ray


@contextlib.contextmanager
def marked(home: Path) -> Iterator[dict[str, str]]:
    """An environment whose processes can be told; none of them may be left when the `with` ends."""
    mark = f"corpuscope-test-{uuid.uuid4().hex}"
    try:
        yield environment(home, CORPUSCOPE_TEST_MARK=mark)
        deadline = time.monotonic() + 60
        while left := processes(mark):
            assert time.monotonic() < deadline, f"left behind: {[p.name() for p in left]}"
            time.sleep(0.2)
    finally:
        for process in processes(mark):
            with contextlib.suppress(psutil.Error):
                process.kill()


def processes(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get("CORPUSCOPE_TEST_MARK") == mark:
                found.append(process)
    return found


@pytest.mark.cluster
@pytest.mark.parametrize("workers", [1, 2])
def test_ray_gives_what_inline_gives(
    tmp_path: Path, write_spec: Callable[..., Path], tiny_index: Path, workers: int
) -> None:
    spec = write_spec(tmp_path)
    with marked(tmp_path) as env:
        done = subprocess.run(
            command(spec, "--workers", str(workers)), cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert f"{workers} worker" in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert not tiny.differences(tiny.views(tiny_index), tiny.views(tmp_path / "index"))


BUSY = """
import sys
from threading import Thread
import numpy as np
from jobs import cli
from pipelines import scan, upkeep
from sae_runtime.errors import Interrupted

def sort():
    while True:
        np.unique(np.arange(1 << 18)[::-1])

def busy(*given):
    for _ in range(7):
        Thread(target=sort, daemon=True).start()
    sort()

class Stops:
    workers, planned, elastic = 1, 1, False
    def run(self, *given):
        raise Interrupted("stopped")
    def close(self):
        pass
    merge = None

upkeep.catch_up, scan.InlineExecutor = busy, lambda *given: Stops()
sys.argv[1:] = ["scan", sys.argv[1], "--executor", "inline"]
cli.main()
"""


def test_stopped_while_compaction_is_at_work(tmp_path: Path, write_spec: Callable[..., Path]) -> None:
    """The interpreter's end, with a thread in C++, would abort: almost surely with eight of them."""
    done = subprocess.run(
        [sys.executable, "-c", BUSY, str(write_spec(tmp_path))], cwd=ROOT, env=environment(tmp_path),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr.splitlines()[-1]) == (75, "error: stopped")


@pytest.mark.cluster
def test_ray_driver_killed_and_run_again(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_index: Path
) -> None:
    """SIGKILL takes the driver; its cluster goes with it, and what was committed stays."""
    spec, index = write_spec(tmp_path), tmp_path / "index"
    with marked(tmp_path) as env:
        process = subprocess.Popen(
            command(spec, "--workers", "2"), cwd=ROOT, env=env, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        kill_after(process, index, 5)
    before = commits(index)
    assert 5 <= len(before) < UNITS
    outcome = scan_inline(spec)  # and another executor may go on
    assert outcome.items == UNITS - len(before)
    check_resumed(index, before, tiny_index)
