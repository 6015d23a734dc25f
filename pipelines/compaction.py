"""Compaction: many units' files become few, while a scan or a query goes on.

Two rules say what is merged. In *tiers*, as a scan goes: once all live units of an aligned range of
FAN^level ordinals are committed, what is in it becomes one run (rows) and one node (summaries) of that level,
so that some FAN pieces a level are left however long the scan is, and a row is rewritten once a level.
*Fully*, when asked: rows become at most some PARTS runs of at least PART_ROWS, so that one feature lies in a
few row groups of each and a document's rows in one; summaries become one node.
Small ranges are merged some at a time and published together: a snapshot names every piece that there is, and
units that fail keep ranges open (of a million units one in a hundred: 22,500 runs and as many nodes).
Invariant: files are written first, a manifest names them, a snapshot names the manifest (put-if-absent);
whoever is killed before leaves files that nothing names, whoever loses a race drops his. What is read is the
same rows before and after. Memory is bounded by MAX_PIECES times a row group.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import parquet
from pipelines.age import Age
from pipelines.contents import Contents, Registered, contents, facts_of, members, resolve, resolve_each
from pipelines.faults import crash
from pipelines.ledger import Commit, DataFileRecord
from pipelines.merge import MergeRule, Part, merge_keyed, merge_pages, merge_rows, merge_summaries
from pipelines.ordinals import InOrder, Ranges, pack, unpack, without
from pipelines.schema import DATA, KEYED, PLANS, REPLACED, ROWS, UNIT_FACTS, UNITS
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
    snapshot_name,
    write_node,
    write_run,
)
from pipelines.storage import Store, names
from sae_runtime.errors import CorpuscopeError, DataError

FAN = 32
TOP = 99  # level of what a full compaction makes
PARTS = 8
PART_ROWS = 1 << 26
MAX_PIECES = 128  # merged at once
TASK_ROWS = 1 << 26  # of activations, that one task merges
FILE_BYTES = 1 << 28
PAGE_BYTES = 100  # of a top context in `pages`
PAGE_FILE_BYTES = 1 << 22  # a page is asked of one such file, whose footer is read first
PAGES_SHARE = 32  # of the index is more than they take, or there are none
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
Made = list[tuple[Contents, Job, Run | Node]]


@dataclass(frozen=True)
class Task:
    """What one worker merges: everything of one kind, or of one range of SAEs."""

    index: str
    what: str  # rows | keyed | summaries | pages
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
    if task.what == "pages":
        return merge_pages(store, task.parts, task.saes, task.rule, task.stem)
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
    replaced: tuple[str, ...] = ()  # files that nothing reads any more, but for readers that began before

    def __add__(self, other: Done) -> Done:
        return Done(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


def compact(
    store: Store, run: Perform = perform_here, told: Callable[[Job], None] = lambda job: None
) -> Done:
    """Compact an index until nothing is due: in tiers, then into a few large runs and one node.

    `told` is called before each job. Raises InputError where there is no index.
    """
    found = contents(store)
    done = catch_up(store, found.registered, run, told)
    while (job := _due_fully(found := contents(store))) is not None:
        told(job)
        done += execute(found, job, run) or Done()
    return done


def catch_up(
    store: Store,
    registered: Registered,
    run: Perform = perform_here,
    told: Callable[[Job], None] = lambda job: None,
) -> Done:
    """Merge what is due in tiers anywhere."""
    done = Done()
    level, span = 1, FAN
    while span <= len(registered.known):
        spans = [(first, first + span) for first in _closed(resolve(store, registered), level, span)]
        for i in range(0, len(spans), at_once(level)):
            done += settle(store, registered, level, spans[i : i + at_once(level)], run, told)
        level, span = level + 1, span * FAN
    return done


def at_once(level: int) -> int:
    """How many ranges of a level are merged before all are published; a kill costs that much merging."""
    return max(1, FAN // FAN ** (level - 1))


def settle(
    store: Store,
    registered: Registered,
    level: int,
    spans: Sequence[tuple[int, int]],
    run: Perform = perform_here,
    told: Callable[[Job], None] = lambda job: None,
) -> Done:
    """Merge what is due in closed ranges of a level, if anything is, and publish it all at once."""
    age, made = Age(), []
    for found in resolve_each(store, registered, spans):
        for due in (_due_run, _due_node):  # merging rows changes nothing about summaries
            job = due(found, level)
            if job is not None:
                told(job)
                made += _make(found, job, run)
    return sum((_done(*piece) for piece in _publish(store, made, age)), Done())


# --- what is due


class Tiers:
    """Tells, commit by commit, which aligned ranges have closed."""

    def __init__(self, known: int, waiting: Iterable[int]) -> None:
        """`known` ordinals there are, from 0; `waiting` those to be committed, once for each SAE group."""
        self._known, self._left = known, np.zeros(known, np.uint16)
        for ordinal in waiting:
            self._left[ordinal] += 1

    def committed(self, ordinal: int) -> list[tuple[int, int, int]]:
        """(level, first, stop) of ranges that this commit of one group closes, the lowest level first."""
        self._left[ordinal] -= 1
        closed: list[tuple[int, int, int]] = []
        if self._left[ordinal]:
            return closed
        level, span = 1, FAN
        while span <= self._known:
            first = ordinal // span * span
            if first + span > self._known or self._left[first : first + span].any():
                break
            closed.append((level, first, first + span))
            level, span = level + 1, span * FAN
        return closed


def _closed(found: Contents, level: int, span: int) -> list[int]:
    """Where the closed ranges of a level begin in which there may be something to merge."""
    known = 1 + int(found.registered.known.max(initial=-1))
    waiting = np.sort(found.live[~np.isin(found.live, found.shown)])
    nodes, alone = found.summed
    rows, summaries = np.zeros(known // span + 1, np.int64), np.zeros(known // span + 1, np.int64)
    np.add.at(rows, found.own // span, 1)
    np.add.at(rows, [r.units[0][0] // span for r in found.runs if r.level < level and r.units], 1)
    np.add.at(summaries, alone // span, 1)
    np.add.at(summaries, [node.first // span for node in nodes], 1)
    busy = np.flatnonzero((rows >= 2) | (summaries >= 2))
    busy = without(busy[busy < known // span], np.unique(waiting // span))
    return [int(number) * span for number in busy]


def _due_run(found: Contents, level: int) -> RunJob | None:
    first, stop = found.span
    # One whose units were all given up has nothing to merge.
    runs = tuple(
        r
        for r in found.runs
        if r.level < level and r.units and first <= r.units[0][0] and r.units[-1][1] <= stop
    )
    return RunJob(level, runs, found.own) if len(runs) + len(found.own) >= 2 else None


def _due_node(found: Contents, level: int) -> NodeJob | None:
    nodes, alone = found.summed
    if len(nodes) + len(alone) < 2 or _held(found):
        return None
    return NodeJob(level, *found.span)


def _held(found: Contents) -> bool:
    """Whether a node that reaches beyond the span holds."""
    return any(
        node.first <= found.span[0]
        and found.span[1] <= node.stop
        and node.members == members(found.registered.live, node.first, node.stop)
        for node in found.nodes
    )


def _due_fully(found: Contents) -> Job | None:
    """What a full compaction asks for once nothing is due in tiers."""
    pieces: list[tuple[int, int, Run | None]] = [
        (run.units[0][0], _rows(run.files.get("activations", ())), run) for run in found.runs if run.units
    ]
    own = itertools.groupby(found.commits_of(found.own), key=lambda commit: commit.ordinal)
    pieces += [(ordinal, _own_rows(list(commits), "activations"), None) for ordinal, commits in own]
    pieces.sort(key=lambda piece: piece[0])
    wanted = max(PART_ROWS, sum(rows for _, rows, _ in pieces) // PARTS)
    group: list[tuple[int, int, Run | None]] = []
    for number, piece in enumerate(pieces):
        group.append(piece)
        last = number + 1 == len(pieces)
        if sum(rows for _, rows, _ in group) < wanted and len(group) < MAX_PIECES and not last:
            continue
        runs = tuple(run for _, _, run in group if run is not None)
        units = np.array([ordinal for ordinal, _, run in group if run is None], np.int64)
        stale = any(len(np.intersect1d(unpack(run.units), found.registered.retired)) for run in runs)
        if len(group) > 1 or len(units) or stale:
            return RunJob(TOP, runs, units)
        group = []
    nodes, alone = found.summed
    if len(nodes) + len(alone) >= 2:
        return NodeJob(TOP, 0, 1 + int(found.shown.max()))
    return None


# --- doing it


def execute(found: Contents, job: Job, run: Perform = perform_here) -> Done | None:
    """Merge and publish. None if another compaction of the same pieces was first.

    DataError for an input that is damaged, OSError of the storage, CorpuscopeError where it took too long.
    """
    age = Age()
    stand = _publish(found.store, _make(found, job, run), age)
    return _done(*stand[0]) if stand else None


def _make(found: Contents, job: Job, run: Perform) -> Made:
    """Merge: what comes of it has a manifest that no snapshot names. Nothing, if others were first."""
    try:
        made = _merge_run(found, job, run) if isinstance(job, RunJob) else _merge_node(found, job, run)
    except (DataError, FileNotFoundError):
        plans = sum(1 for _ in names(found.store, PLANS, ".json"))
        if newest(found.store) == found.snapshot and plans == len(found.plans):
            raise
        return []  # inputs were replaced by another compaction, or given up with their units, and removed
    crash("compact-manifest")
    return [(found, job, made)]


def _done(found: Contents, job: Job, made: Run | Node) -> Done:
    return Done(
        int(isinstance(made, Run)),
        int(isinstance(made, Node)),
        _rows(made.files.get("activations", ())),
        sum(record.bytes for records in made.files.values() for record in records),
        _replaced(found, job) if isinstance(job, RunJob) else (),
    )


def _replaced(found: Contents, job: RunJob) -> tuple[str, ...]:
    """What a run takes the place of: data files before the manifests that name them."""
    merged = [r.path for run in job.runs for records in run.files.values() for r in records]
    commits = found.commits_of(job.units)
    own = [c.files[kind].path for c in commits for kind in REPLACED if kind in c.files]
    return (*merged, *own, *(run.name for run in job.runs))


def _merge_run(found: Contents, job: RunJob, run: Perform) -> Run:
    store, commits = found.store, found.commits_of(job.units)
    parts = sorted(
        [
            *(_part(r.units, r.files) for r in job.runs),
            *_own_parts(commits),
        ],
        key=lambda part: part.ordinals,
    )
    inside = np.sort(np.concatenate([job.units, *(unpack(r.units) for r in job.runs)]))
    retired = np.intersect1d(inside, found.registered.retired)
    omit = frozenset(retired.tolist())
    stem = f"run-{job.level:02d}-{inside[0]:09d}-{uuid.uuid4().hex[:8]}"
    rows = sum(_rows(r.files.get("activations", ())) for r in job.runs)
    rows += _own_rows(commits, "activations")
    size = sum(r.bytes for piece in job.runs for r in piece.files.get("activations", ()))
    size += sum(c.files["activations"].bytes for c in commits if "activations" in c.files)
    # Ties are between summaries alone, so the rule needs no places. A question about one feature is asked of
    # the files that may have it: of a run that fills a few files these would be a large share.
    rule = replace(_rule(found, 0, 0), target_bytes=min(FILE_BYTES, max(FILE_BYTES // 4, size // 16)))
    tasks = [
        Task(store.uri, "keyed", tuple(parts), (), rule, stem, omit),
        *(
            Task(store.uri, "rows", tuple(parts), saes, rule, f"{stem}-{number:03d}", omit)
            for number, saes in enumerate(_shares(found, rows))
        ),
    ]
    files = _collect(run(tasks))
    crash("compact-files")
    facts = [_facts(store, r) for r in job.runs] + [facts_of(commits)]
    files[UNITS] = (_write_facts(store, stem, pa.concat_tables(facts).sort_by("ordinal")),)
    gone = np.concatenate([retired, *(unpack(r.gone) for r in job.runs)])
    made = Run(
        manifest_name(stem), job.level, pack(without(inside, retired)), pack(gone.astype(np.int64)), files
    )
    write_run(store, made)
    return made


def _merge_node(found: Contents, job: NodeJob, run: Perform) -> Node:
    store, rule = found.store, _rule(found, job.first, job.stop)
    nodes, alone = found.summed
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
    shares = _shares(found, rows)
    files = _collect(
        run(
            [
                Task(store.uri, "summaries", tuple(parts), saes, rule, f"{stem}-{number:03d}")
                for number, saes in enumerate(shares)
            ]
        )
    )
    if job.level == TOP and _worth_pages(found, files):
        inputs = {
            kind: tuple(file.path for file in found.files(kind)) for kind in ("contexts", "activations")
        }
        part = Part((job.first, job.stop), {**_paths(files), **inputs}, True)
        small = replace(rule, target_bytes=PAGE_FILE_BYTES)
        tasks = [
            Task(store.uri, "pages", (part,), saes, small, f"{stem}-{number:03d}")
            for number, saes in enumerate(shares)
        ]
        files |= _collect(run(tasks))
    crash("compact-files")
    children: list[str] = []
    for node in nodes:  # what a full compaction made is replaced by the next one's, not kept below it
        children.extend(node.children if node.level == TOP else [node.name])
    digest = members(InOrder(found.shown), job.first, job.stop)
    made = Node(manifest_name(stem), job.level, job.first, job.stop, digest, files, tuple(children))
    write_node(store, made)
    return made


def _worth_pages(found: Contents, files: Files) -> bool:
    """Whether `pages` would be a small part of the index."""
    size = sum(file.bytes for kind in (*ROWS, *KEYED) for file in found.files(kind))
    return size >= PAGES_SHARE * PAGE_BYTES * _rows(files.get("top_contexts", ()))


def _publish(store: Store, made: Made, age: Age) -> Made:
    """Name what was made in one snapshot; without the runs of pieces that another compaction merged first.

    CorpuscopeError for work that is too old: done once more it would be as old.
    """
    while made:
        if age.seconds >= MAX_AGE:
            raise CorpuscopeError(
                f"index {store.uri}: merging took over {MAX_AGE / 3600:.0f} h, so `gc` might take its files "
                "for left over; nothing of it is used, take a faster machine or one nearer to the store"
            )
        now = newest(store)
        runs, stand = _with_runs(store, now.runs, made)
        nodes = _with_nodes(store, now.nodes, [node for _, _, node in made if isinstance(node, Node)])
        if not stand:
            break
        number = now.number + 1
        if publish(store, Snapshot(number, tuple(runs), tuple(nodes))):
            crash("compact-published")
            # After a sleep the number may be free because a gc has removed its snapshot: none sees this one.
            if newest(store).number == number or store.exists(snapshot_name(now.number)):
                return stand
    return []


def _with_runs(store: Store, names: Sequence[str], made: Made) -> tuple[list[str], Made]:
    """Names of a snapshot's runs after new ones have replaced theirs, and what was made that stands."""
    kept, new = dict.fromkeys(names), []
    stand: Made = []
    units = np.concatenate([np.empty(0, np.int64), *(j.units for _, j, _ in made if isinstance(j, RunJob))])
    first, stop = (units.min(), units.max() + 1) if len(units) else (0, 0)
    near = [run for run in read_runs(store, names) if run.units and _within(run, first, stop)]
    for found, job, piece in made:
        if isinstance(job, RunJob):
            replaced = {run.name for run in job.runs}
            others = [unpack(run.units) for run in near if run.name not in replaced]
            taken = np.isin(job.units, np.concatenate([np.empty(0, np.int64), *others])).any()
            if taken or not replaced <= kept.keys():
                continue
            for name in replaced:
                del kept[name]
            new.append(piece.name)
        stand.append((found, job, piece))
    return [*kept, *new], stand


def _within(run: Run, first: int, stop: int) -> bool:
    """Whether a run may hold a unit in [first, stop)."""
    return run.units[0][0] < stop and first < run.units[-1][1]


def _with_nodes(store: Store, names: Sequence[str], made: Sequence[Node]) -> list[str]:
    """Names of a snapshot's nodes after new ones have replaced theirs."""
    if not made:
        return list(names)
    hull = min(node.first for node in made), max(node.stop for node in made)
    near = [node.name for node in read_nodes(store, names) if node.meets(*hull)]
    apart = set(names) - set(near)
    for node in made:
        near = [*_besides(store, near, node), node.name]
    return [*(name for name in names if name in apart), *near]


def _besides(store: Store, names: Sequence[str], made: Node) -> list[str]:
    """The nodes to keep beside a new one: those apart from it, of larger ones the children apart from it."""
    kept = []
    for node in read_nodes(store, names):
        if not node.meets(made.first, made.stop):
            kept.append(node.name)
        elif not (made.first <= node.first and node.stop <= made.stop):
            kept.extend(_besides(store, node.children, made))
    return kept


# --- pieces


def _rule(found: Contents, first: int, stop: int) -> MergeRule:
    """What to merge the units in [first, stop) by: each task takes it along, so it says no more than that."""
    fixed = found.identity["fixed"]
    live = found.registered.live.between(first, stop)
    places = np.full(stop - first, -1, np.int64)
    places[live - first] = np.arange(len(live))
    return MergeRule(
        length=fixed["context.length"],
        top_k=fixed["top_k"],
        sample_k=fixed["sample_k"],
        metadata=fixed["metadata"],
        places=places,
        target_bytes=FILE_BYTES,
        first=first,
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
        parquet.opened(store.read(record.path)).read(UNIT_FACTS.names, use_threads=False)
        for record in run.files[UNITS]
    ]
    return pa.concat_tables(tables)


def _write_facts(store: Store, stem: str, facts: pa.Table) -> DataFileRecord:
    sink = io.BytesIO()
    pq.write_table(facts, sink, compression="zstd")
    data = sink.getvalue()
    path = f"{DATA}/{UNITS}/{stem}.parquet"
    store.write(path, data)
    return DataFileRecord(path, facts.num_rows, len(data), hashlib.blake2b(data, digest_size=16).hexdigest())


def _rows(records: Sequence[DataFileRecord]) -> int:
    return sum(record.rows for record in records)


def _own_rows(commits: Sequence[Commit], kind: str) -> int:
    return sum(commit.files[kind].rows for commit in commits if kind in commit.files)
