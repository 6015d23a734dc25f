"""What an index holds at one moment: plans, snapshot and commits resolved to units and files.

Invariant: a unit is shown when the newest plan read has it and all its SAE groups are committed; the files
of a shown unit are named once, by a run or by its commits, and its summaries once, by a node or by its
commits. Plans are read before commits, so what is seen is the index as of that plan; a file that is gone by
the time it is read was replaced meanwhile: resolve again. Commits that runs cover are not read, and their
folders are not listed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import annotation_records, parquet
from pipelines.annotation_records import Annotations
from pipelines.ledger import Commit, DataFileRecord, Ledger
from pipelines.ordinals import InOrder, between, unpack, without
from pipelines.registry import Plan, Unit, in_corpus_order
from pipelines.schema import KEYED, KINDS, ROWS, SUMMARIES, UNIT_FACTS, UNITS
from pipelines.snapshots import Node, Run, Snapshot, newest, read_nodes, read_runs
from pipelines.storage import Store
from sae_runtime.errors import InputError

EVERYTHING = (0, 1 << 62)


@dataclass(frozen=True)
class Registered:
    """What an index is of, by its plans: it changes only when a plan is added."""

    identity: dict[str, Any]
    plans: tuple[Plan, ...]
    units: tuple[Unit, ...]  # live ones, in corpus order

    @property
    def groups(self) -> int:
        return len(self.identity["groups"])

    @cached_property
    def live(self) -> InOrder:
        """Ordinals of live units in corpus order."""
        return InOrder(np.fromiter((unit.ordinal for unit in self.units), np.int64, len(self.units)))

    @cached_property
    def known(self) -> np.ndarray:
        """int64, ascending: ordinals of all units that ever were."""
        return np.unique(np.fromiter((unit.ordinal for plan in self.plans for unit in plan.units), np.int64))

    @cached_property
    def retired(self) -> np.ndarray:
        """int64, ascending: ordinals of dropped units whose data are given up."""
        return unpack([pair for plan in self.plans for pair in plan.retired])


@dataclass(frozen=True)
class Contents:
    """An index at one moment, or the units of a span of ordinals in it."""

    store: Store
    registered: Registered
    span: tuple[int, int]
    snapshot: Snapshot
    runs: tuple[Run, ...]  # those that have units in the span
    nodes: tuple[Node, ...]  # those of the snapshot that reach into the span
    commits: dict[tuple[int, int], Commit]  # by (ordinal, group), of units that no run covers

    @property
    def identity(self) -> dict[str, Any]:
        return self.registered.identity

    @property
    def plans(self) -> tuple[Plan, ...]:
        return self.registered.plans

    @property
    def units(self) -> tuple[Unit, ...]:
        return self.registered.units

    @property
    def groups(self) -> int:
        return self.registered.groups

    @cached_property
    def live(self) -> np.ndarray:
        """int64: ordinals of live units in corpus order."""
        return self.registered.live.between(*self.span)

    @cached_property
    def covered(self) -> np.ndarray:
        """int64, ascending: ordinals whose rows are in a run."""
        inside = np.concatenate([np.empty(0, np.int64), *(unpack(run.units) for run in self.runs)])
        return between(np.sort(inside), *self.span)

    @cached_property
    def whole(self) -> np.ndarray:
        """int64, ascending: ordinals that no run covers and whose groups are all committed."""
        counts: dict[int, int] = {}
        for ordinal, _ in self.commits:
            counts[ordinal] = counts.get(ordinal, 0) + 1
        found = (ordinal for ordinal, n in counts.items() if n == self.groups)
        return np.sort(np.fromiter(found, np.int64))

    @cached_property
    def shown(self) -> np.ndarray:
        """int64: ordinals of shown units, in corpus order."""
        return self.live[np.isin(self.live, np.concatenate([self.covered, self.whole]))]

    @cached_property
    def hidden(self) -> np.ndarray:
        """int64, ascending: ordinals in runs that are not shown: dropped since they were merged."""
        return without(self.covered, np.sort(self.shown))

    @cached_property
    def own(self) -> np.ndarray:
        """int64, ascending: shown units that are read from their own files."""
        return np.intersect1d(self.shown, self.whole)

    @cached_property
    def summed(self) -> tuple[tuple[Node, ...], np.ndarray]:
        """The largest nodes that hold inside the span, and the other shown units of it, ascending."""
        first, stop = self.span
        shown = InOrder(self.shown)
        found: list[Node] = []
        level = list(self.nodes)
        while level:
            below: list[str] = []
            for node in level:
                inside = first <= node.first and node.stop <= stop
                if inside and node.members == members(shown, node.first, node.stop):
                    found.append(node)
                elif node.first < stop and first < node.stop:
                    below.extend(node.children)
            level = read_nodes(self.store, below)
        found.sort(key=lambda node: node.first)
        alone = np.sort(self.shown)
        last = np.searchsorted([node.first for node in found], alone, "right")  # the node before each, from 1
        stops = np.array([-1, *(node.stop for node in found)], np.int64)
        return tuple(found), alone[alone >= stops[last]]

    def commits_of(self, ordinals: Iterable[int]) -> list[Commit]:
        """All groups' commits of units, by ordinal and group, those that runs cover too."""
        wanted = [(int(ordinal), group) for ordinal in ordinals for group in range(self.groups)]
        missing = [pair for pair in wanted if pair not in self.commits]
        read = dict(zip(missing, Ledger(self.store).read_commits(missing), strict=True))
        return [self.commits.get(pair) or read[pair] for pair in wanted]

    def files(self, kind: str) -> list[DataFileRecord]:
        """The files that hold the rows of a kind, or its summaries, of all shown units."""
        if kind in SUMMARIES:
            nodes, alone = self.summed
            if kind == "pages" and (len(nodes) != 1 or len(alone)):
                return []  # theirs would be the best of a part
            return [*_of(nodes, kind), *_own(self.commits_of(alone), kind)]
        if kind not in (*ROWS, *KEYED):
            raise KeyError(kind)
        own = self.commits_of(self.own)
        return [*_of(self.runs, kind), *_own(own, "document_features" if kind == "by_document" else kind)]

    @cached_property
    def named(self) -> frozenset[str]:
        """The files that hold what is shown."""
        rows = frozenset(file.path for kind in KINDS for file in self.files(kind))
        return rows | self.annotations.paths

    @cached_property
    def annotations(self) -> Annotations:
        """What `annotate` added; nothing of it depends on units."""
        return annotation_records.newest(self.store)

    def merged_facts(self, columns: Sequence[str] = UNIT_FACTS.names) -> pa.Table:
        """Counts of the units that runs know of (columns of UNIT_FACTS), shown or not."""
        wanted = pa.schema([UNIT_FACTS.field(name) for name in columns])
        tables = [
            parquet.opened(self.store.read(record.path)).read(columns, use_threads=False)
            for record in _of(self.runs, UNITS)
        ]
        return pa.concat_tables([wanted.empty_table(), *tables])

    @cached_property
    def facts(self) -> pa.Table:
        """Counts of every unit that was ever committed whole (UNIT_FACTS), shown or not."""
        return pa.concat_tables([self.merged_facts(), facts_of(self.commits_of(self.whole))])


def contents(store: Store) -> Contents:
    """Resolve an index. Raises InputError where there is none."""
    ledger = Ledger(store)
    identity = ledger.identity()
    if identity is None:
        raise InputError(f"{store.uri}: no index here (no index.json); `corpuscope scan` makes one")
    plans = tuple(ledger.plans())
    return resolve(store, Registered(identity, plans, tuple(in_corpus_order(plans))))


def resolve(
    store: Store, registered: Registered, span: tuple[int, int] = EVERYTHING, files: bool = True
) -> Contents:
    """What is committed of the units in a span of ordinals; `files` as `resolve_each` has it."""
    return resolve_each(store, registered, [span], files)[0]


def resolve_each(
    store: Store, registered: Registered, spans: Sequence[tuple[int, int]], files: bool = True
) -> list[Contents]:
    """What is committed of the units in each of some spans that do not overlap, at one moment.

    Without `files` the commits name none, for whoever only counts them.
    """
    snapshot = newest(store)
    hull = min(first for first, _ in spans), max(stop for _, stop in spans)
    runs = [run for run in read_runs(store, snapshot.runs) if _meets(run, *hull)]
    nodes = [node for node in read_nodes(store, snapshot.nodes) if node.meets(*hull)]
    runs_of = [tuple(run for run in runs if _meets(run, *span)) for span in spans]
    open_ = [_open(registered, inside, *span) for inside, span in zip(runs_of, spans, strict=True)]
    commits = Ledger(store).commits(np.concatenate(open_), files)
    found = []
    for span, inside, ordinals in zip(spans, runs_of, open_, strict=True):
        own = commits
        if len(spans) > 1:
            pairs = [(ordinal, group) for ordinal in ordinals.tolist() for group in range(registered.groups)]
            own = {pair: commits[pair] for pair in pairs if pair in commits}
        reaching = tuple(node for node in nodes if node.meets(*span))
        found.append(Contents(store, registered, span, snapshot, inside, reaching, own))
    return found


def members(shown: InOrder, first: int, stop: int) -> str:
    """Digest of the shown units (in corpus order) in [first, stop): what a node's summaries depend on."""
    return hashlib.blake2b(shown.between(first, stop).astype("<i8").tobytes(), digest_size=12).hexdigest()


def facts_of(commits: Sequence[Commit]) -> pa.Table:
    """The counts of units from all their groups' commits, by ordinal."""
    rows: dict[int, dict[str, Any]] = {}
    for commit in commits:
        row = rows.setdefault(
            commit.ordinal,
            {
                "ordinal": commit.ordinal,
                "run": commit.run,
                "documents": commit.documents,
                "quarantined": commit.quarantined,
                "contexts": commit.contexts,
                "tokens": commit.tokens,
                "started": commit.started,
                "finished": commit.finished,
                "bytes": 0,
            },
        )
        row["started"] = min(row["started"], commit.started)
        row["finished"] = max(row["finished"], commit.finished)
        row["bytes"] += sum(file.bytes for file in commit.files.values())
    return pa.Table.from_pylist([rows[ordinal] for ordinal in sorted(rows)], schema=UNIT_FACTS)


def places(ordinals: np.ndarray) -> list[tuple[int, int, int]]:
    """(first, stop, place) of runs of ordinals that follow each other in corpus order as in number."""
    if not len(ordinals):
        return []
    cuts = np.r_[0, np.flatnonzero(np.diff(ordinals) != 1) + 1]
    stops = np.r_[cuts[1:], len(ordinals)]
    return [(int(ordinals[a]), int(ordinals[b - 1]) + 1, int(a)) for a, b in zip(cuts, stops, strict=True)]


def _open(registered: Registered, runs: Sequence[Run], first: int, stop: int) -> np.ndarray:
    """Ordinals of a span that no run says anything of, ascending."""
    settled = [unpack(ranges) for run in runs for ranges in (run.units, run.gone)]
    return without(between(registered.known, first, stop), np.concatenate([np.empty(0, np.int64), *settled]))


def _meets(run: Run, first: int, stop: int) -> bool:
    return any(a < stop and first < b for a, b in (*run.units, *run.gone))


def _of(merged: Iterable[Run | Node], kind: str) -> list[DataFileRecord]:
    return [record for each in merged for record in each.files.get(kind, ())]


def _own(commits: Iterable[Commit], kind: str) -> list[DataFileRecord]:
    return [commit.files[kind] for commit in commits if kind in commit.files]
