"""What an index holds at one moment: plans, snapshot and commits resolved to units and files.

Invariant: a unit is shown when the newest plan read has it and all its SAE groups are committed; the files
of a shown unit are named once, by a run or by its commits, and its summaries once, by a node or by its
commits. Plans are read before commits, so what is seen is the index as of that plan; a file that is gone by
the time it is read was replaced meanwhile: resolve again. Commits that runs cover are not read, and their
folders are not listed.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.ledger import Commit, DataFileRecord, Ledger
from pipelines.ordinals import unpack, without
from pipelines.registry import Plan, Unit, in_corpus_order
from pipelines.schema import KEYED, ROWS, SUMMARIES, UNIT_FACTS, UNITS
from pipelines.snapshots import Node, Run, Snapshot, newest, read_nodes, read_runs
from pipelines.storage import Store
from sae_runtime.errors import InputError


@dataclass(frozen=True)
class Contents:
    """An index at one moment."""

    store: Store
    identity: dict[str, Any]
    plans: tuple[Plan, ...]
    units: tuple[Unit, ...]  # live ones, in corpus order
    snapshot: Snapshot
    runs: tuple[Run, ...]
    commits: dict[tuple[int, int], Commit]  # by (ordinal, group), of units that no run covers

    @property
    def groups(self) -> int:
        return len(self.identity["groups"])

    @cached_property
    def live(self) -> np.ndarray:
        """int64: ordinals of live units in corpus order."""
        return np.fromiter((unit.ordinal for unit in self.units), np.int64, len(self.units))

    @cached_property
    def covered(self) -> np.ndarray:
        """int64, ascending: ordinals whose rows are in a run."""
        return np.sort(np.concatenate([np.empty(0, np.int64), *(unpack(run.units) for run in self.runs)]))

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
        """The largest nodes that hold, and the shown units (ascending) whose summaries are read singly."""
        return self.cover()

    def cover(self, first: int = 0, stop: int = 1 << 62) -> tuple[tuple[Node, ...], np.ndarray]:
        """The largest nodes within [first, stop) that hold, and the other shown units of it, ascending."""
        found: list[Node] = []
        level = list(self.snapshot.nodes)
        while level:
            below: list[str] = []
            for node in read_nodes(self.store, level):
                inside = first <= node.first and node.stop <= stop
                if inside and node.members == self.members(node.first, node.stop):
                    found.append(node)
                elif node.first < stop and first < node.stop:
                    below.extend(node.children)
            level = below
        alone = np.sort(self.shown)
        alone = alone[(alone >= first) & (alone < stop)]
        for node in found:
            alone = alone[(alone < node.first) | (alone >= node.stop)]
        return tuple(sorted(found, key=lambda node: node.first)), alone

    def members(self, first: int, stop: int) -> str:
        """Digest of the shown units in [first, stop) in corpus order: what a node's summaries depend on."""
        inside = self.shown[(self.shown >= first) & (self.shown < stop)]
        return hashlib.blake2b(inside.astype("<i8").tobytes(), digest_size=12).hexdigest()

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
            return [*_of(nodes, kind), *_own(self.commits_of(alone), kind)]
        if kind not in (*ROWS, *KEYED):
            raise KeyError(kind)
        alone = self.commits_of(self.own)
        return [*_of(self.runs, kind), *_own(alone, "document_features" if kind == "by_document" else kind)]

    @cached_property
    def facts(self) -> pa.Table:
        """Counts of every unit that was ever committed whole (UNIT_FACTS), shown or not."""
        tables = [
            pq.read_table(io.BytesIO(self.store.read(record.path)), schema=UNIT_FACTS)
            for record in _of(self.runs, UNITS)
        ]
        return pa.concat_tables([*tables, facts_of(self.commits_of(self.whole))])


def contents(store: Store) -> Contents:
    """Resolve an index. Raises InputError where there is none."""
    ledger = Ledger(store)
    identity = ledger.identity()
    if identity is None:
        several = "; several indexes at once are not supported yet" if "," in store.uri else ""
        raise InputError(f"{store.uri}: no index here (no index.json){several}; `corpuscope scan` makes one")
    plans = tuple(ledger.plans())
    return resolve(store, identity, plans, in_corpus_order(plans))


def resolve(
    store: Store, identity: dict[str, Any], plans: tuple[Plan, ...], units: Sequence[Unit]
) -> Contents:
    """Resolve an index whose plans have been read; `units` are the live ones in corpus order."""
    snapshot = newest(store)
    runs = tuple(read_runs(store, snapshot.runs))
    known = np.unique(np.fromiter((unit.ordinal for plan in plans for unit in plan.units), np.int64))
    settled = [unpack(ranges) for run in runs for ranges in (run.units, run.gone)]
    open_ = without(known, np.sort(np.concatenate([np.empty(0, np.int64), *settled])))
    return Contents(store, identity, plans, tuple(units), snapshot, runs, Ledger(store).commits(open_))


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


def _of(merged: Iterable[Run | Node], kind: str) -> list[DataFileRecord]:
    return [record for each in merged for record in each.files.get(kind, ())]


def _own(commits: Iterable[Commit], kind: str) -> list[DataFileRecord]:
    return [commit.files[kind] for commit in commits if kind in commit.files]
