"""Merging the tables that have no SAE: rows of units one after the other, in larger row groups.

Invariant: rows keep their order and values; a document's or context's row group is found by its key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import pyarrow as pa

from pipelines.ledger import DataFileRecord
from pipelines.merge_files import (
    Inputs,
    MergeRule,
    Output,
    Part,
    conformed,
    left_out,
    present,
)
from pipelines.merge_runs import Budget, Run, windows
from pipelines.schema import KEYED, LOCAL_BITS
from pipelines.storage import Store

# Of a row group, whichever comes first; bytes as in memory. Contexts are looked up some 20 at a time, and
# decoding 500 of them takes 0.6 ms.
_ROWS, _BYTES = 1 << 14, 1 << 18
_BUDGET = Budget(1 << 10, 1 << 10)


def merge_keyed(
    store: Store,
    parts: Sequence[Part],
    rule: MergeRule,
    stem: str,
    omit: frozenset[int] = frozenset(),
) -> dict[str, list[DataFileRecord]]:
    """Merge the kinds of KEYED that the parts have, units of `omit` left out.

    Parts are of different units, in order of their first ordinals. Kinds without rows are not in the
    answer. DataError for an input that is damaged.
    """
    kinds = [kind for kind in KEYED if any(part.files.get(kind) for part in parts)]
    found = {kind: _merge(store, parts, rule, stem, omit, kind) for kind in kinds}
    return {kind: records for kind, records in found.items() if records}


def _merge(
    store: Store, parts: Sequence[Part], rule: MergeRule, stem: str, omit: frozenset[int], kind: str
) -> list[DataFileRecord]:
    schema = rule.schema(kind)
    key = "context" if "context" in schema.names else "document"
    with Output(store, kind, rule, stem) as output:
        runs = [
            Run(
                files[0],
                key,
                part.ordinals[0] << LOCAL_BITS,
                partial(_rows_of, store, part, kind, schema, key, omit),
            )
            for part in present(parts, omit)
            if (files := part.files.get(kind))
        ]
        held: list[pa.RecordBatch] = []
        rows = size = 0
        for batches, _ in windows(runs, _BUDGET):
            for batch in _in_order(batches, key):
                held.append(batch)
                rows, size = rows + batch.num_rows, size + batch.nbytes
            if rows >= _ROWS or size >= _BYTES:
                table = pa.Table.from_batches(held, schema).combine_chunks()
                step = min(_ROWS, max(1, rows * _BYTES // max(size, 1)))
                for at in range(0, rows - step + 1, step):
                    output.write(table.slice(at, step), True)
                held = table.slice(rows - rows % step).to_batches()
                rows, size = rows % step, sum(batch.nbytes for batch in held)
        if rows:
            output.write(pa.Table.from_batches(held, schema).combine_chunks(), True)
    return output.records


def _rows_of(
    store: Store, part: Part, kind: str, schema: pa.Schema, key: str, omit: frozenset[int], rows: int
) -> Iterator[pa.RecordBatch]:
    """A part's rows of a kind, less those of omitted units."""
    ordinals = left_out(part, omit)
    with Inputs(store, schema.names) as inputs:
        for name in part.files.get(kind, ()):
            for number in range(inputs.file(name).metadata.num_row_groups):
                for batch in inputs.batches(name, number, rows):
                    batch = conformed(batch, schema)
                    if ordinals is not None:
                        unit = batch.column(key).to_numpy() >> LOCAL_BITS
                        batch = batch.filter(pa.array(~np.isin(unit, ordinals)))
                    yield batch


def _in_order(batches: list[pa.RecordBatch], key: str) -> list[pa.RecordBatch]:
    """The batches of a window, sorted by key together where units of one part lie between another's."""
    if all(one.column(key)[-1].as_py() <= other.column(key)[0].as_py() for one, other in pairwise(batches)):
        return batches
    table = pa.Table.from_batches(batches)
    order = np.argsort(table.column(key).to_numpy(), kind="stable")
    return table.take(pa.array(order)).combine_chunks().to_batches()
