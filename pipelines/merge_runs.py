"""The way through sorted runs of many files: windows of whole keys, in the order of keys.

A run is a longest sequence of row groups, over the files of one part, whose keys do not descend: a merged
part has one for an SAE, a unit's own file one or several.
Invariant: memory is some batches a run (a Budget over all runs) plus the compressed
pages of a row group a run, whatever the keys: rows of one that has more come in windows too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.merge_files import Inputs, Part
from sae_runtime.errors import DataError

Prepare = Callable[[pa.RecordBatch], pa.RecordBatch]


@dataclass(frozen=True)
class Budget:
    """Rows held at a time."""

    rows: int  # over all runs
    least: int  # of each run

    def each(self, runs: int) -> int:
        """Rows of a run's batch."""
        return max(self.least, self.rows // max(runs, 1))


@dataclass(frozen=True)
class RowGroup:
    """Where rows are, and what their file's footer says of them."""

    file: str
    number: int
    spans: dict[str, tuple[Any, Any]]  # lowest and highest value of columns that were asked for

    @property
    def sae(self) -> str:
        """Its SAE, where it has one."""
        return str(self.spans["sae"][0])


class Block(NamedTuple):
    """Rows that were read."""

    key: np.ndarray  # int [rows], not descending
    batch: pa.RecordBatch


def row_groups(inputs: Inputs, part: Part, kind: str, *columns: str) -> list[RowGroup]:
    """The row groups of a part's files, in order, with the span of `columns` in each.

    DataError where a footer does not tell.
    """
    found = []
    for name in part.files.get(kind, ()):
        metadata = inputs.file(name).metadata
        at = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
        for number in range(metadata.num_row_groups):
            group, spans = metadata.row_group(number), {}
            for column in columns:
                statistics = group.column(at[column]).statistics if column in at else None
                if statistics is None or not statistics.has_min_max:
                    raise DataError(f"{name}: damaged: row group {number} has no span of {column}")
                spans[column] = statistics.min, statistics.max
            found.append(RowGroup(name, number, spans))
    return found


def in_runs(groups: Sequence[RowGroup], key: str) -> list[list[RowGroup]]:
    """Row groups of one part and SAE cut into runs."""
    runs: list[list[RowGroup]] = []
    for group in groups:
        if runs and runs[-1][-1].spans[key][1] <= group.spans[key][0]:
            runs[-1].append(group)
        else:
            runs.append([group])
    return runs


class Run:
    """A run being read: some of its next rows are held, of one that waits none."""

    def __init__(
        self, where: str, key: str, lowest: int, read: Callable[[int], Iterator[pa.RecordBatch]]
    ) -> None:
        """`read` gives the rows, in batches of at most so many if it can; no key is below `lowest`.

        `where` is the name of the first file, for errors.
        """
        self.where, self.key, self.lowest = where, key, lowest
        self.ended = False  # what is held is all that is left
        self.rows = 0  # held
        self._read = read
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._held: deque[Block] = deque()

    @classmethod
    def of(cls, inputs: Inputs, groups: Sequence[RowGroup], key: str, prepare: Prepare) -> Run:
        """The run that these row groups are."""

        def read(rows: int) -> Iterator[pa.RecordBatch]:
            for group in groups:
                yield from map(prepare, inputs.batches(group.file, group.number, rows))

        return cls(groups[0].file, key, groups[0].spans[key][0], read)

    def fill(self, rows: int) -> None:
        """Hold at least so many rows, or all that are left. DataError where keys descend."""
        if self._batches is None:
            self._batches = self._read(rows)
        while not self.ended and self.rows < rows:
            batch = next(self._batches, None)
            if batch is None:
                self.ended = True
            elif batch.num_rows:
                key = batch.column(self.key).to_numpy()
                if (key[1:] < key[:-1]).any() or (self._held and key[0] < self.last):
                    raise DataError(f"{self.where}: damaged: rows are not in order of {self.key}")
                self._held.append(Block(key, batch))
                self.rows += len(key)

    @property
    def first(self) -> int:
        return int(self._held[0].key[0])

    @property
    def last(self) -> int:
        return int(self._held[-1].key[-1])

    def last_of(self, column: str) -> int:
        """What the last row held has in another column."""
        return int(self._held[-1].batch.column(column)[-1].as_py())

    def below(self, bound: int | None) -> Iterator[pa.RecordBatch]:
        """Give away the rows held whose keys are below `bound` (None: all)."""
        while self._held:
            key = self._held[0].key
            rows = len(key) if bound is None else int(np.searchsorted(key, bound))
            yield from self._take(rows)
            if rows < len(key):
                return

    def up_to(self, key: int, column: str, value: int) -> Iterator[pa.RecordBatch]:
        """Give away the rows held of one key, the first, whose `column` is not above `value`."""
        while self._held and self.first == key:
            block = self._held[0]
            own = block.batch.column(column).to_numpy()[: np.searchsorted(block.key, key, "right")]
            rows = int(np.searchsorted(own, value, "right"))
            yield from self._take(rows)
            if rows < len(block.key):
                return

    def _take(self, rows: int) -> Iterator[pa.RecordBatch]:
        key, batch = self._held.popleft()
        self.rows -= rows
        if rows < len(key):
            self._held.appendleft(Block(key[rows:], batch.slice(rows)))
        if rows:
            yield batch.slice(0, rows)


def windows(
    runs: Sequence[Run], budget: Budget, then: str | None = None
) -> Iterator[tuple[list[pa.RecordBatch], bool]]:
    """(rows, open): batches in the order of runs, all of whose keys are above those of the window before.

    An open window has some rows of one key, of which the next one has more (or none, and is not open): those
    that are lowest in column `then`, or without it those of the first runs. Runs wait until it is their turn.
    """
    rows = budget.each(len(runs))
    waiting = deque(sorted(runs, key=lambda run: run.lowest))
    number = {id(run): i for i, run in enumerate(runs)}
    active: list[Run] = []
    while True:
        for run in active:  # else windows would be as small as the shortest remainder
            run.fill(rows)
        active = [run for run in active if run.rows]
        if waiting and (not active or waiting[0].lowest <= min(run.last for run in active)):
            active.append(waiting.popleft())
            active.sort(key=lambda run: number[id(run)])
            continue
        if not active:
            return
        bounds = [run.last for run in active if not run.ended]
        if waiting:
            bounds.append(waiting[0].lowest)
        bound = min(bounds, default=None)
        first = min(run.first for run in active)
        if bound is None or first < bound:
            yield [batch for run in active for batch in run.below(bound)], False
        elif then is None:
            for run in active:
                while run.rows and run.first == first:
                    yield list(run.below(first + 1)), True
                    run.fill(rows)
            yield [], False
        else:
            yield from _of_one(active, first, rows, then)


def _of_one(
    active: Sequence[Run], key: int, rows: int, then: str
) -> Iterator[tuple[list[pa.RecordBatch], bool]]:
    """Windows of the first key, which has more rows than are held."""
    while True:
        for run in active:
            run.fill(rows)
        left = [run for run in active if run.rows and run.first == key]
        bounds = [run.last_of(then) for run in left if run.last == key and not run.ended]
        if not bounds:
            yield [batch for run in left for batch in run.below(key + 1)], False
            return
        bound = min(bounds)
        yield [batch for run in left for batch in run.up_to(key, then, bound)], True
