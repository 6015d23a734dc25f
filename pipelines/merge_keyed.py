"""Merging the tables that have no SAE: rows of units one after the other, in larger row groups.

Invariant: rows keep their order and values; a document's or context's row group is found by its key.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipelines.ledger import DataFileRecord
from pipelines.merge_files import (
    Inputs,
    MergeRule,
    Output,
    Part,
    check_order,
    conformed,
    left_out,
    present,
)
from pipelines.schema import KEYED, LOCAL_BITS
from pipelines.storage import Store

_ROWS, _BYTES = 1 << 17, 16 << 20  # of a row group, whichever comes first; bytes as in memory
_READ = 1 << 10  # rows at a time


def merge_keyed(
    store: Store,
    parts: Sequence[Part],
    rule: MergeRule,
    stem: str,
    omit: frozenset[int] = frozenset(),
) -> dict[str, list[DataFileRecord]]:
    """Merge the kinds of KEYED that the parts have, units of `omit` left out.

    Parts are in order of their ordinals. Kinds without rows are not in the answer. DataError for an input
    that is damaged.
    """
    check_order(parts)
    kinds = [kind for kind in KEYED if any(part.files.get(kind) for part in parts)]
    found = {kind: _merge(store, parts, rule, stem, omit, kind) for kind in kinds}
    return {kind: records for kind, records in found.items() if records}


def _merge(
    store: Store,
    parts: Sequence[Part],
    rule: MergeRule,
    stem: str,
    omit: frozenset[int],
    kind: str,
) -> list[DataFileRecord]:
    schema = rule.schema(kind)
    held: list[pa.RecordBatch] = []
    rows = size = 0
    with Inputs(store, schema.names) as inputs, Output(store, kind, rule, stem) as output:
        for part in present(parts, omit):
            ordinals = left_out(part, omit)
            for name in part.files.get(kind, ()):
                for number in range(inputs.file(name).metadata.num_row_groups):
                    for batch in inputs.batches(name, number, _READ):
                        held.append(_without_units(conformed(batch, schema), ordinals))
                        rows, size = rows + held[-1].num_rows, size + held[-1].nbytes
                        if rows >= _ROWS or size >= _BYTES:
                            output.write(pa.Table.from_batches(held, schema), True)
                            held, rows, size = [], 0, 0
            inputs.close()
        if rows:
            output.write(pa.Table.from_batches(held, schema), True)
    return output.records


def _without_units(batch: pa.RecordBatch, ordinals: np.ndarray | None) -> pa.RecordBatch:
    if ordinals is None:
        return batch
    key = "context" if "context" in batch.schema.names else "document"
    unit = batch.column(key).to_numpy() >> LOCAL_BITS
    return batch.filter(pa.array(~np.isin(unit, ordinals)))
