"""Every fault point of the product, walked: the command dies there, is run again, and no row differs.

Two stories: `first` scans, compacts and collects from nothing; `second` does so again after files were
removed, changed and added. Each is told undisturbed once. Units are merged two by two, so that there are
several levels. Between the fault and the second try a reader looks, who must see whole units.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
from forks import Fork, fork

from pipelines import compaction, gc
from pipelines.faults import POINTS
from pipelines.storage import Store

ROOT = Path(__file__).parent.parent
FAN = 2
NEW, SAME, LATE = (
    (2, 3, 4, 7, 12),
    (2, 4, 12),
    9,
)  # files: at first, unchanged by the second scan, added by it
Views = dict[str, list[tuple[Any, ...]]]


@dataclass(frozen=True)
class Story:
    """What is done, undisturbed."""

    before: Path | None  # the folder that it starts from: corpus, spec, index
    reached: dict[str, int]  # points of it, and how often
    after: Views
    old: Views | None  # what was there before


def lines(spec: Path) -> list[list[str]]:
    index = str(spec.parent / "index")
    return [
        ["scan", str(spec), "--executor", "inline", "--allow-removal"],
        *[["compact", index], ["gc", index, "--grace", "0", "--unfinished", "0"]] * 2,
    ]


def run(folder: Path, plan: str = "none") -> tuple[int, Fork]:
    """Do everything once; at a fault it ends. After a collection there may be given up rows to leave out."""
    done = fork(folder / "logs", lines(folder / "spec.yaml"), FAN, plan)
    return done.wait(), done


@pytest.fixture(scope="module")
def begin(
    write_spec: Callable[..., Path], tiny_corpus: Path, tiny_suites: Path
) -> Callable[[Path, str], Path]:
    """`begin(folder, story)`: corpus and spec as the story has them."""

    def make(folder: Path, story: str) -> Path:
        corpus = folder / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        for number in NEW:
            name = f"part_{number:02d}.jsonl"
            shutil.copy2(tiny_corpus / name, corpus / name)
        if story == "second":
            (corpus / "part_03.jsonl").unlink()
            (corpus / "part_07.jsonl").write_text('{"id": "new", "text": "seven red foxes"}\n')
            shutil.copy2(tiny_corpus / f"part_{LATE:02d}.jsonl", corpus)
        saes = [{"uri": str(tiny_suites / "tiny-att")}]
        write_spec(folder, corpus={"uri": "corpus/*.jsonl"}, saes=saes)
        return folder

    return make


@pytest.fixture(scope="module")
def stories(
    tmp_path_factory: pytest.TempPathFactory,
    begin: Callable[..., Path],
    few_index: Path,  # a scan here, so that there are compiled loops for all forks (warm.py)
) -> dict[str, Story]:
    folder = begin(tmp_path_factory.mktemp("undisturbed"), "first")
    code, done = run(folder)
    assert code == 0, done.log.read_text()
    old = tiny.views(folder / "index")
    first = Story(None, done.reached(), old, None)
    before = Path(shutil.copytree(folder, tmp_path_factory.mktemp("before") / "copy"))
    code, done = run(begin(folder, "second"))
    assert code == 0, done.log.read_text()
    return {"first": first, "second": Story(before, done.reached(), tiny.views(folder / "index"), old)}


@pytest.fixture(autouse=True)
def _fan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "FAN", FAN)


def prepared(folder: Path, name: str, stories: dict[str, Story], begin: Callable[..., Path]) -> Path:
    before = stories[name].before
    if before is not None:
        shutil.copytree(before, folder, dirs_exist_ok=True)
    return begin(folder, name)


def plans(index: Path) -> int:
    return len(list((index / "plans").glob("*.json")))


def whole(index: Path, story: Story) -> None:
    """What a reader sees now is what was there before, or whole units of what will be."""
    if not (index / "index.json").exists():
        return
    found = tiny.views(index)
    if story.old is not None and plans(index) == 1:
        assert not tiny.differences(story.old, found)
        return
    wanted = story.after
    documents = {row[0] for row in found["documents"]}
    sources = {row[3] for row in found["documents"]}
    contexts = {row[0] for row in found["contexts"]}
    inside: dict[str, Callable[[tuple[Any, ...]], bool]] = {
        "documents": lambda row: row[3] in sources,
        "segments": lambda row: row[0] in documents,
        "contexts": lambda row: row[1] in documents,
        "document_features": lambda row: row[2] in documents,
        "activations": lambda row: row[2] in contexts,
    }
    for view, belongs in inside.items():
        assert found[view] == [row for row in wanted[view] if belongs(row)], view


def finished(folder: Path, story: Story) -> None:
    """The index is the undisturbed one, nothing is left over and nothing left to do."""
    index, store = folder / "index", Store(str(folder / "index"))
    assert not tiny.differences(story.after, tiny.views(index))
    assert compaction.compact(store) == compaction.Done()
    assert gc.collect(store, 0, 0) == gc.Collected(0, 0, 0, 0, 0)
    assert not [f for f in index.rglob(".*") if f.is_file()]


# Story, point, whether it is the first time that the process is there; else one late in the story.
WALKS = [
    *(("first", point, True) for point in POINTS if not point.startswith("gc-")),
    *(("second", point, True) for point in POINTS if point.startswith("gc-")),
    *(("second", point, False) for point in POINTS),
]


@pytest.mark.parametrize(("name", "point", "first"), WALKS)
def test_killed_at_any_point_and_run_again(
    tmp_path: Path, stories: dict[str, Story], begin: Callable[..., Path], name: str, point: str, first: bool
) -> None:
    story = stories[name]
    folder = prepared(tmp_path, name, stories, begin)
    often = story.reached[point]  # a few times more or less, as threads have it
    code, killed = run(folder, f"{point}:{1 if first else max(min(often, 2), often * 2 // 3)}")
    assert code == 137, killed.log.read_text()
    whole(folder / "index", story)
    if name == "second":  # a collection at the worst moment
        gc.collect(Store(str(folder / "index")), 0, 0)
        whole(folder / "index", story)
    code, again = run(folder)
    assert code == 0, again.log.read_text()
    finished(folder, story)


def test_killed_before_the_first_snapshot_is_there(
    tmp_path: Path, begin: Callable[..., Path], stories: dict[str, Story]
) -> None:
    """At each temporary of a compaction up to that of the first snapshot: unit facts, manifests, it."""
    folder = begin(tmp_path, "first")
    index = folder / "index"
    scan, compact, *_ = lines(folder / "spec.yaml")
    done = fork(folder / "logs", [scan], 99)
    assert done.wait() == 0, done.log.read_text()
    for times in range(1, 30):
        killed = fork(folder / "logs", [compact], FAN, f"temporary-written:{times}")
        assert killed.wait() == 137
        last = (index / "snapshots").is_dir()
        if times < 3 or last:
            assert not tiny.differences(stories["first"].after, tiny.views(index))
        if last:
            break
    assert times > 3
    assert list((index / "snapshots").rglob("*.json")) == []
    gc.collect(Store(str(index)))
    assert [f for f in index.rglob(".*") if f.is_file()], "its writer might be alive"
    code, again = run(folder)
    assert code == 0, again.log.read_text()
    finished(folder, stories["first"])


@pytest.mark.parametrize(
    ("name", "command", "times", "expected"),
    [
        ("first", "scan", 1, 1),  # of the lease
        ("first", "scan", 2, 1),  # of index.json
        ("first", "scan", 3, 1),  # of the plan
        ("first", "scan", 4, 0),  # of the device, which is found to be recorded
        ("first", "scan", 5, 0),  # of a commit, which is found to be the attempt's own
        ("second", "scan", 2, 1),  # of another plan
        ("second", "compact", 1, 1),  # of a snapshot
        ("second", "gc", 1, 1),  # of the plan that gives dropped units up
    ],
)
def test_an_answer_is_lost_and_the_command_run_again(
    tmp_path: Path,
    stories: dict[str, Story],
    begin: Callable[..., Path],
    name: str,
    command: str,
    times: int,
    expected: int,
) -> None:
    """The object is there, and the caller was told that something failed."""
    story = stories[name]
    folder = prepared(tmp_path, name, stories, begin)
    todo = lines(folder / "spec.yaml")
    number = [line[0] for line in todo].index(command)
    before = fork(folder / "logs", todo[:number], 99)
    assert before.wait() == 0, before.log.read_text()
    told = fork(folder / "logs", [todo[number]], FAN, f"put-linked:{times}:lost")
    code, said = told.wait(), told.log.read_text()
    assert code == expected, said
    assert told.reached()["put-linked"] >= times
    assert "Traceback" not in said
    if expected:
        assert said.splitlines()[-1].startswith("error: ")
    else:
        assert f"run 1: {len(story.after['documents'])} documents" in said
        assert not (folder / "index" / "failures").exists()
    whole(folder / "index", story)
    code, again = run(folder)
    assert code == 0, again.log.read_text()
    finished(folder, story)


def test_every_point_of_the_product_is_listed_and_every_listed_one_is_reached(
    stories: dict[str, Story],
) -> None:
    """So that the walk above is a walk of them all."""
    called = set()
    for file in [
        f for room in ("sae_runtime", "pipelines", "queries", "jobs") for f in (ROOT / room).rglob("*.py")
    ]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "crash":
                [name] = node.args
                assert isinstance(name, ast.Constant), f"{file}: a point has a name"
                called.add(name.value)
    assert called == set(POINTS)
    assert {point for _, point, _ in WALKS} == set(POINTS)
    assert set(stories["first"].reached) == set(stories["second"].reached) == set(POINTS)
