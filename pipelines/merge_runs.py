"""The way through sorted runs of many files: windows of whole keys, in the order of keys, then of runs.

A run is a longest sequence of row groups, over the files of one part, whose keys do not descend: a merged
part has one for an SAE, a unit's own file one or several. Inside a key the rows of an earlier run come first,
because runs are in order of units and, inside a unit, of time; so no other column is compared.
Invariant: memory is some batches a run (BUDGET rows over all runs, at least LEAST each) plus the compressed
pages of a row group a run, whatever the keys: one whose rows are more than that comes run by run.
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
    """A run being read: some of its next rows are held."""

    def __init__(self, inputs: Inputs, groups: Sequence[RowGroup], key: str, prepare: Prepare) -> None:
        self._inputs, self._groups, self._key, self._prepare = inputs, groups, key, prepare
        self._held: deque[Block] = deque()
        self._blocks: Iterator[Block] | None = None
        self.rows = 0  # held
        self.ended = False  # what is held is all that is left

    def fill(self, rows: int) -> None:
        """Hold at least so many rows, or all that are left."""
        if self._blocks is None:
            self._blocks = self._read(rows)
        while not self.ended and self.rows < rows:
            block = next(self._blocks, None)
            if block is None:
                self.ended = True
            else:
                self._held.append(block)
                self.rows += len(block.key)

    @property
    def first(self) -> int:
        return int(self._held[0].key[0])

    @property
    def last(self) -> int:
        return int(self._held[-1].key[-1])

    def below(self, bound: int | None) -> Iterator[pa.RecordBatch]:
        """Give away the rows held whose keys are below `bound` (None: all)."""
        while self._held:
            key, batch = self._held[0]
            rows = len(key) if bound is None or key[-1] < bound else int(np.searchsorted(key, bound))
            if rows:
                self.rows -= rows
                yield batch.slice(0, rows)
            if rows < len(key):
                self._held[0] = Block(key[rows:], batch.slice(rows))
                return
            self._held.popleft()

    def _read(self, rows: int) -> Iterator[Block]:
        for group in self._groups:
            for batch in self._inputs.batches(group.file, group.number, rows):
                batch = self._prepare(batch)
                if batch.num_rows:
                    yield Block(batch.column(self._key).to_numpy(), batch)


def windows(runs: Sequence[Run], budget: Budget) -> Iterator[tuple[list[pa.RecordBatch], bool]]:
    """(rows, open): batches in the order of runs, keys above those of the window before.

    An open window holds some rows of one key, of which the next has more (or none, and is not open).
    """
    rows = budget.each(len(runs))
    left = list(runs)
    while True:
        for run in left:
            if run.rows < rows:  # else windows would be as small as the shortest remainder
                run.fill(rows)
        left = [run for run in left if run.rows]
        if not left:
            return
        bound = min((run.last for run in left if not run.ended), default=None)
        first = min(run.first for run in left)
        if bound is None or first < bound:
            yield [batch for run in left for batch in run.below(bound)], False
            continue
        for run in left:
            while run.rows and run.first == first:
                yield list(run.below(first + 1)), True
                run.fill(rows)
        yield [], False
