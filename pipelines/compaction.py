"""Compaction: many units' files become few, while a scan or a query goes on.

Two rules say what is merged. In *tiers*, as a scan goes: once all live units of an aligned range of
FAN^level ordinals are committed, what is in it becomes one run (rows) and one node (summaries) of that level,
so that some FAN pieces a level are left however long the scan is, and a row is rewritten once a level.
*Fully*, when asked: rows become at most some PARTS runs of at least PART_ROWS, so that one feature lies in a
few row groups of each and a document's rows in one; summaries become one node.
Invariant: files are written first, a manifest names them, a snapshot names the manifest (put-if-absent);
whoever is killed before leaves files that nothing names, whoever loses a race drops his. What is read is the
same rows before and after. Memory is bounded by MAX_PIECES times a row group.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.contents import Contents, contents, facts_of
from pipelines.faults import crash
from pipelines.ledger import Commit, DataFileRecord
from pipelines.merge import MergeRule, Part, merge_keyed, merge_rows, merge_summaries
from pipelines.ordinals import Ranges, pack, unpack, without
from pipelines.schema import DATA, UNIT_FACTS, UNITS
from pipelines.snapshots import (
    Files,
    Node,
    Run,
    Snapshot,
    manifest_name,
    newest,
    publish,
    read_nodes,
    read_runs,
    write_node,
    write_run,
)
from pipelines.storage import Store

FAN = 32
TOP = 99  # level of what a full compaction makes
PARTS = 8
PART_ROWS = 1 << 26
MAX_PIECES = 128  # merged at once
TASK_ROWS = 1 << 26  # of activations, that one task merges
FILE_BYTES = 1 << 28
MAX_AGE = 6 * 3600.0  # seconds after which work is dropped; gc leaves it alone for four times that


@dataclass(frozen=True)
class RunJob:
    """Pieces whose rows are to become one run: runs, and units by ordinal (ascending)."""

    level: int
    runs: tuple[Run, ...]
    units: np.ndarray

    @property
    def words(self) -> str:
        return f"merging the rows of {len(self.runs) + len(self.units):,} runs and units"


@dataclass(frozen=True)
class NodeJob:
    """Shown units whose summaries are to become one node."""

    level: int
    first: int
    stop: int

    @property
    def words(self) -> str:
        return f"merging the summaries of units {self.first:,} to {self.stop - 1:,}"


Job = RunJob | NodeJob


@dataclass(frozen=True)
class Task:
    """What one worker merges: everything of one kind, or of one range of SAEs."""

    index: str
    what: str  # rows | keyed | summaries
    parts: tuple[Part, ...]
    saes: tuple[str, ...]
    rule: MergeRule
    stem: str
    omit: frozenset[int] = frozenset()


Perform = Callable[[Sequence[Task]], list[dict[str, list[DataFileRecord]]]]


def perform(task: Task) -> dict[str, list[DataFileRecord]]:
    """Do a task: its files are written, and named by nothing yet."""
    store = Store(task.index)
    if task.what == "keyed":
        return merge_keyed(store, task.parts, task.rule, task.stem, task.omit)
    if task.what == "rows":
        return merge_rows(store, task.parts, task.saes, task.rule, task.stem, task.omit)
    return merge_summaries(store, task.parts, task.saes, task.rule, task.stem)


def perform_here(tasks: Sequence[Task]) -> list[dict[str, list[DataFileRecord]]]:
    """Do tasks one after the other in this process."""
    return [perform(task) for task in tasks]


@dataclass(frozen=True)
class Done:
    """What a compaction did."""

    runs: int = 0
    nodes: int = 0
    rows: int = 0  # of activations, rewritten
    bytes: int = 0  # written


def compact(
    store: Store, full: bool = True, run: Perform = perform_here, told: Callable[[Job], None] = lambda j: None
) -> Done:
    """Compact an index until nothing is due: in tiers, then, if `full`, into a few large runs and one node.

    `told` is called before each job. Raises InputError where there is no index.
    """
    done = Done()
    while True:
        found = contents(store)
        job = next(due(found), None) or (next(due_fully(found), None) if full else None)
        if job is None:
            return done
        told(job)
        files = execute(found, job, run)
        if files is not None:
            written = [record for records in files.values() for record in records]
            done = Done(
                done.runs + isinstance(job, RunJob),
                done.nodes + isinstance(job, NodeJob),
                done.rows + sum(record.rows for record in files.get("activations", ())),
                done.bytes + sum(record.bytes for record in written),
            )


# --- what is due


def due(found: Contents) -> Iterator[Job]:
    """What tiers ask for, lowest level first; only the first is sure to be due still once it is done."""
    known = 1 + max((unit.ordinal for plan in found.plans for unit in plan.units), default=-1)
    waiting = without(np.sort(found.live), np.sort(found.shown))
    nodes, alone = found.summed
    level, span = 1, FAN
    while span <= known:
        is_open = np.isin(np.arange(known // span), waiting // span)
        for number in np.flatnonzero(~is_open).tolist():
            first, stop = number * span, (number + 1) * span
            runs = tuple(r for r in found.runs if r.level < level and _inside(r.units, first, stop))
            units = _between(found.own, first, stop)
            if len(runs) + len(units) >= 2:
                yield RunJob(level, runs, units)
            pieces = sum(first <= node.first and node.stop <= stop for node in nodes)
            if pieces + len(_between(alone, first, stop)) >= 2:
                yield NodeJob(level, first, stop)
        level, span = level + 1, span * FAN


def due_fully(found: Contents) -> Iterator[Job]:
    """What a full compaction asks for once nothing is due in tiers."""
    pieces: list[tuple[int, int, Run | None]] = [
        (run.units[0][0], _rows(run.files.get("activations", ())), run) for run in found.runs if run.units
    ]
    own = itertools.groupby(found.commits_of(found.own), key=lambda commit: commit.ordinal)
    pieces += [(ordinal, _own_rows(list(commits), "activations"), None) for ordinal, commits in own]
    pieces.sort(key=lambda piece: piece[0])
    wanted = max(PART_ROWS, sum(rows for _, rows, _ in pieces) // PARTS)
    retired = _retired(found)
    group: list[tuple[int, int, Run | None]] = []
    for number, piece in enumerate(pieces):
        group.append(piece)
        last = number + 1 == len(pieces)
        if sum(rows for _, rows, _ in group) < wanted and len(group) < MAX_PIECES and not last:
            continue
        runs = tuple(run for _, _, run in group if run is not None)
        units = np.array([ordinal for ordinal, _, run in group if run is None], np.int64)
        stale = len(units) or any(len(np.intersect1d(unpack(run.units), retired)) for run in runs)
        if len(group) > 1 or stale:
            yield RunJob(TOP, runs, units)
        group = []
    nodes, alone = found.summed
    if len(nodes) + len(alone) >= 2:
        stop = 1 + int(found.shown.max())
        yield NodeJob(TOP, 0, stop)


# --- doing it


def execute(found: Contents, job: Job, run: Perform = perform_here) -> Files | None:
    """Merge and publish. None if another compaction of the same pieces was first."""
    return _merge_run(found, job, run) if isinstance(job, RunJob) else _merge_node(found, job, run)


def _merge_run(found: Contents, job: RunJob, run: Perform) -> Files | None:
    store, rule, began = found.store, _rule(found), time.monotonic()
    parts = sorted(
        [
            *(_part(r.units, r.files) for r in job.runs),
            *_own_parts(found.commits_of(job.units)),
        ],
        key=lambda part: part.ordinals,
    )
    inside = np.sort(np.concatenate([job.units, *(unpack(r.units) for r in job.runs)]))
    retired = np.intersect1d(inside, _retired(found))
    omit = frozenset(retired.tolist())
    stem = f"run-{job.level:02d}-{inside[0]:09d}-{uuid.uuid4().hex[:8]}"
    rows = sum(_rows(r.files.get("activations", ())) for r in job.runs)
    rows += sum(c.files["activations"].rows for c in found.commits_of(job.units) if "activations" in c.files)
    tasks = [
        Task(store.uri, "keyed", tuple(parts), (), rule, stem, omit),
        *(
            Task(store.uri, "rows", tuple(parts), saes, rule, f"{stem}-{number:03d}", omit)
            for number, saes in enumerate(_shares(found, rows))
        ),
    ]
    files = _collect(run(tasks))
    crash("compact-files")
    facts = [_facts(store, r) for r in job.runs] + [facts_of(found.commits_of(job.units))]
    files[UNITS] = (_write_facts(store, stem, pa.concat_tables(facts).sort_by("ordinal")),)
    gone = np.concatenate([retired, *(unpack(r.gone) for r in job.runs)])
    made = Run(
        manifest_name(stem), job.level, pack(without(inside, retired)), pack(gone.astype(np.int64)), files
    )
    write_run(store, made)
    crash("compact-manifest")
    return files if _publish_run(store, made, job, began) else None


def _publish_run(store: Store, made: Run, job: RunJob, began: float) -> bool:
    replaced = {run.name for run in job.runs}
    while time.monotonic() - began < MAX_AGE:
        now = newest(store)
        others = [name for name in now.runs if name not in replaced]
        taken = np.concatenate([np.empty(0, np.int64), *(unpack(r.units) for r in read_runs(store, others))])
        if not replaced <= set(now.runs) or len(np.intersect1d(taken, job.units)):
            return False
        if publish(store, Snapshot(now.number + 1, (*others, made.name), now.nodes)):
            crash("compact-published")
            return True
    return False


def _merge_node(found: Contents, job: NodeJob, run: Perform) -> Files | None:
    store, rule, began = found.store, _rule(found), time.monotonic()
    nodes, alone = found.cover(job.first, job.stop)
    commits = found.commits_of(alone)
    parts = sorted(
        [
            *(Part((n.first, n.stop), _paths(n.files), True) for n in nodes),
            *_own_parts(commits),
        ],
        key=lambda part: part.ordinals,
    )
    stem = f"node-{job.level:02d}-{job.first:09d}-{uuid.uuid4().hex[:8]}"
    rows = sum(_rows(n.files.get("top_contexts", ())) for n in nodes)
    rows += _own_rows(commits, "top_contexts")
    files = _collect(
        run(
            [
                Task(store.uri, "summaries", tuple(parts), saes, rule, f"{stem}-{number:03d}")
                for number, saes in enumerate(_shares(found, rows))
            ]
        )
    )
    crash("compact-files")
    children: list[str] = []
    for node in nodes:  # what a full compaction made is replaced by the next one's, not kept below it
        children.extend(node.children if node.level == TOP else [node.name])
    members = found.members(job.first, job.stop)
    made = Node(manifest_name(stem), job.level, job.first, job.stop, members, files, tuple(children))
    write_node(store, made)
    crash("compact-manifest")
    while time.monotonic() - began < MAX_AGE:
        now = newest(store)
        nodes_now = (*_besides(store, now.nodes, made), made.name)
        if publish(store, Snapshot(now.number + 1, now.runs, nodes_now)):
            crash("compact-published")
            return files
    return None


def _besides(store: Store, names: Sequence[str], made: Node) -> list[str]:
    """The nodes to keep beside a new one: those apart from it, of larger ones the children apart from it."""
    kept = []
    for node in read_nodes(store, names):
        if node.stop <= made.first or made.stop <= node.first:
            kept.append(node.name)
        elif not (made.first <= node.first and node.stop <= made.stop):
            kept.extend(_besides(store, node.children, made))
    return kept


# --- pieces


def _rule(found: Contents) -> MergeRule:
    fixed = found.identity["fixed"]
    places = np.full(1 + int(found.live.max(initial=-1)), -1, np.int64)
    places[found.live] = np.arange(len(found.live))
    return MergeRule(
        length=fixed["context.length"],
        top_k=fixed["top_k"],
        sample_k=fixed["sample_k"],
        metadata=fixed["metadata"],
        places=places,
        target_bytes=FILE_BYTES,
    )


def _part(units: Ranges, files: Files) -> Part:
    return Part((units[0][0], units[-1][1]), _paths(files), True)


def _own_parts(commits: Sequence[Commit]) -> list[Part]:
    """A part for each unit; `commits` are all groups' of each."""
    parts = []
    for ordinal, group in itertools.groupby(commits, key=lambda commit: commit.ordinal):
        files: dict[str, tuple[str, ...]] = {}
        for commit in group:
            for kind, record in commit.files.items():
                files[kind] = (*files.get(kind, ()), record.path)
        parts.append(Part((ordinal, ordinal + 1), files, False))
    return parts


def _paths(files: Files) -> dict[str, tuple[str, ...]]:
    return {kind: tuple(record.path for record in records) for kind, records in files.items()}


def _shares(found: Contents, rows: int) -> list[tuple[str, ...]]:
    """SAEs in shares of some TASK_ROWS rows each, in the order of the groups."""
    saes = [sae for group in found.identity["groups"] for sae in group]
    size = -(-len(saes) // min(len(saes), 1 + rows // TASK_ROWS))
    return [tuple(saes[i : i + size]) for i in range(0, len(saes), size)]


def _collect(done: Sequence[dict[str, list[DataFileRecord]]]) -> Files:
    files: Files = {}
    for each in done:
        for kind, records in each.items():
            files[kind] = (*files.get(kind, ()), *records)
    return files


def _facts(store: Store, run: Run) -> pa.Table:
    tables = [
        pq.read_table(io.BytesIO(store.read(record.path)), schema=UNIT_FACTS) for record in run.files[UNITS]
    ]
    return pa.concat_tables(tables)


def _write_facts(store: Store, stem: str, facts: pa.Table) -> DataFileRecord:
    sink = io.BytesIO()
    pq.write_table(facts, sink, compression="zstd")
    data = sink.getvalue()
    path = f"{DATA}/{UNITS}/{stem}.parquet"
    store.write(path, data)
    return DataFileRecord(path, facts.num_rows, len(data), hashlib.blake2b(data, digest_size=16).hexdigest())


def _retired(found: Contents) -> np.ndarray:
    ranges = [unpack(plan.retired) for plan in found.plans]
    return np.unique(np.concatenate([np.empty(0, np.int64), *ranges]))


def _rows(records: Sequence[DataFileRecord]) -> int:
    return sum(record.rows for record in records)


def _own_rows(commits: Sequence[Commit], kind: str) -> int:
    return sum(commit.files[kind].rows for commit in commits if kind in commit.files)


def _between(ordinals: np.ndarray, first: int, stop: int) -> np.ndarray:
    return ordinals[np.searchsorted(ordinals, first) : np.searchsorted(ordinals, stop)]


def _inside(units: Ranges, first: int, stop: int) -> bool:
    return bool(units) and first <= units[0][0] and units[-1][1] <= stop
