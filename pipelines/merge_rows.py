"""Merging rows: activations and document_features by feature, document_features once more by document.

Invariant: every value is copied as it is; an SAE's rows come out in order of (feature, token or document).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from pipelines.ledger import DataFileRecord
from pipelines.merge_files import (
    Cutter,
    Inputs,
    MergeRule,
    Output,
    Part,
    conformed,
    left_out,
    present,
    without,
)
from pipelines.merge_runs import Budget, Prepare, RowGroup, Run, in_runs, row_groups, windows
from pipelines.schema import LOCAL_BITS, SCHEMAS
from pipelines.storage import Store
from pipelines.writer import ROWS_PER_GROUP, sae_column

_BUDGET = Budget(1 << 20, 1 << 13)
_DOCUMENT_ROWS = 1 << 17  # of a row group by document: a query for one document reads one or two


def merge_rows(
    store: Store,
    parts: Sequence[Part],
    saes: Sequence[str],
    rule: MergeRule,
    stem: str,
    omit: frozenset[int] = frozenset(),
) -> dict[str, list[DataFileRecord]]:
    """Merge activations, document_features and by_document of some SAEs, units of `omit` left out.

    Parts are of different units, in order of their first ordinals. Kinds without rows are not in the
    answer. DataError for an input that is damaged.
    """
    found = {}
    for kind, column, tokens in (("activations", "token", rule.length), ("document_features", "document", 1)):
        found[kind] = _by_feature(store, parts, saes, rule, stem, omit, kind, column, tokens)
    found["by_document"] = _by_document(store, parts, saes, rule, stem, omit)
    return {kind: records for kind, records in found.items() if records}


def _by_feature(
    store: Store,
    parts: Sequence[Part],
    saes: Sequence[str],
    rule: MergeRule,
    stem: str,
    omit: frozenset[int],
    kind: str,
    column: str,
    tokens: int,
) -> list[DataFileRecord]:
    """`column` is the one whose keys tell the unit, `tokens` how many of them a document or context has."""
    schema = rule.schema(kind)
    inner = without(schema, "sae")
    with Inputs(store, inner.names) as inputs, Output(store, kind, rule, stem) as output:
        found = [
            (_omitting(part, omit, inner, column, tokens), row_groups(inputs, part, kind, "sae", "feature"))
            for part in present(parts, omit)
        ]
        cutter = Cutter(output, ROWS_PER_GROUP)
        for sae in saes:
            runs = [
                Run.of(inputs, run, "feature", prepare)
                for prepare, groups in found
                for run in in_runs([group for group in groups if group.sae == sae], "feature")
            ]
            for batches, _ in windows(runs, _BUDGET, column):
                if batches:
                    columns = _sorted(batches, column)
                    feature = columns["feature"]
                    arrays = [sae_column(sae, len(feature)), *map(pa.array, columns.values())]
                    cutter.add(pa.Table.from_arrays(arrays, schema=schema), feature)
            cutter.end()
    return output.records


def _omitting(part: Part, omit: frozenset[int], schema: pa.Schema, column: str, tokens: int) -> Prepare:
    """What gives a batch its columns, without rows of omitted units."""
    ordinals = left_out(part, omit)

    def prepare(batch: pa.RecordBatch) -> pa.RecordBatch:
        batch = conformed(batch, schema)
        if ordinals is None:
            return batch
        unit = batch.column(column).to_numpy() // (tokens << LOCAL_BITS)
        return batch.filter(pa.array(~np.isin(unit, ordinals)))

    return prepare


def _sorted(batches: Sequence[pa.RecordBatch], column: str) -> dict[str, np.ndarray]:
    """Columns of all batches, sorted by feature, then `column`.

    Batches are so already. What is moved are stretches of equal features, of earlier batches first: sorting
    those costs little beside a sort of the rows, which is left to parts whose units interlace.
    """
    columns = _columns(batches)
    key = columns["feature"]
    start = np.concatenate([np.zeros(1, np.int64), np.flatnonzero(key[1:] != key[:-1]) + 1])
    feature = key[start]
    if not (feature[1:] > feature[:-1]).all():
        order = np.argsort(feature, kind="stable")
        length = np.diff(start, append=len(key))[order]
        index = np.arange(len(key)) + np.repeat(start[order] - (np.cumsum(length) - length), length)
        columns = {
            name: np.repeat(feature[order], length) if name == "feature" else values[index]
            for name, values in columns.items()
        }
    then = columns[column]
    below = np.flatnonzero(then[1:] < then[:-1])
    if (columns["feature"][below] == columns["feature"][below + 1]).any():
        order = np.lexsort((then, columns["feature"]))
        columns = {name: values[order] for name, values in columns.items()}
    return columns


def _by_document(
    store: Store,
    parts: Sequence[Part],
    saes: Sequence[str],
    rule: MergeRule,
    stem: str,
    omit: frozenset[int],
) -> list[DataFileRecord]:
    schema = rule.schema("by_document")
    names = pa.array(saes, pa.string())
    with Inputs(store, schema.names) as inputs, Output(store, "by_document", rule, stem) as output:
        runs: list[Run] = []
        for part in present(parts, omit):
            prepare = _numbered(schema, saes, left_out(part, omit))
            if part.merged:
                groups = row_groups(inputs, part, "by_document", "sae", "document")
                wanted = [group for group in groups if _meets(group, saes)]
                runs.extend(Run.of(inputs, run, "document", prepare) for run in in_runs(wanted, "document"))
            elif own := part.files.get("document_features"):
                lowest = part.ordinals[0] << LOCAL_BITS
                runs.append(Run(own[0], "document", lowest, partial(_unit, store, part, saes, prepare)))
        cutter = Cutter(output, _DOCUMENT_ROWS)
        for batches, _ in windows(runs, _BUDGET):
            if batches:
                columns = _columns(batches)
                if len(batches) > 1:  # of other SAEs, or of units that interlace
                    order = np.lexsort((columns["feature"], columns["sae"], columns["document"]))
                    columns = {name: values[order] for name, values in columns.items()}
                sae = pa.DictionaryArray.from_arrays(pa.array(columns.pop("sae")), names)
                table = pa.Table.from_arrays([sae, *map(pa.array, columns.values())], schema=schema)
                cutter.add(table, columns["document"])
        cutter.end()
    return output.records


def _meets(group: RowGroup, saes: Sequence[str]) -> bool:
    """Whether a row group may have rows of some of the SAEs."""
    first, last = group.spans["sae"]
    return any(first <= sae <= last for sae in saes)


def _unit(
    store: Store, part: Part, saes: Sequence[str], prepare: Prepare, rows: int
) -> Iterator[pa.RecordBatch]:
    """A unit's document_features by (document, SAE, feature), in one batch.

    Read SAE by SAE they are so but for the document: an SAE has a document's rows in one run.
    """
    with Inputs(store, SCHEMAS["document_features"].names) as inputs:
        groups = row_groups(inputs, part, "document_features", "sae")
        wanted = [group for sae in saes for group in groups if group.sae == sae]
        batches = [
            prepare(batch)
            for group in wanted
            for batch in inputs.batches(group.file, group.number, ROWS_PER_GROUP)
        ]
    if not batches:
        return
    columns = _columns(batches)
    local = columns["document"] & ((1 << LOCAL_BITS) - 1)
    if local.max(initial=0) < 1 << 16:  # which numpy sorts by radix
        local = local.astype(np.uint16)
    order = np.argsort(local, kind="stable")
    yield pa.RecordBatch.from_arrays(
        [pa.array(values[order]) for values in columns.values()], schema=batches[0].schema
    )


def _numbered(schema: pa.Schema, saes: Sequence[str], ordinals: np.ndarray | None) -> Prepare:
    """What gives a batch its columns, `sae` as int32 number in `saes`, without other SAEs and `ordinals`."""
    number = {sae: i for i, sae in enumerate(saes)}
    others = without(schema, "sae")
    inner = pa.schema([pa.field("sae", pa.int32()), *others])

    def prepare(batch: pa.RecordBatch) -> pa.RecordBatch:
        sae = batch.column("sae")
        code = np.array([number.get(name, -1) for name in sae.dictionary.to_pylist()], np.int32)
        code = code[sae.indices.to_numpy()]
        kept = code >= 0
        if ordinals is not None:
            kept &= ~np.isin(batch.column("document").to_numpy() >> LOCAL_BITS, ordinals)
        columns = conformed(batch, others).columns
        batch = pa.RecordBatch.from_arrays([pa.array(code), *columns], schema=inner)
        return batch if kept.all() else batch.filter(pa.array(kept))

    return prepare


def _columns(batches: Sequence[pa.RecordBatch]) -> dict[str, np.ndarray]:
    """Columns of all batches, one after the other."""
    return {
        name: np.concatenate([batch.column(name).to_numpy() for batch in batches])
        for name in batches[0].schema.names
    }
