"""What a page about a feature shows of its top contexts, in one place: windows, and the tokens around.

A full compaction writes it beside its node, where it is a small part of the index: elsewhere windows of
`keep: tokens` are looked up in a feature's rows, in several row groups of every run, and tokens in as many
row groups of `contexts` as there are top contexts.
Invariant: rows are those of `top_contexts` over all shown units, and say what the views say; they are read
where the node that has them summarises the whole index, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.ledger import DataFileRecord
from pipelines.merge_files import Cutter, Inputs, MergeRule, Output, Part
from pipelines.merge_runs import row_groups
from pipelines.schema import LOCAL_BITS, LOCAL_MAX, NEAR, WINDOW
from pipelines.storage import Store
from pipelines.writer import sae_column, windows_index
from sae_runtime.errors import DataError

_ROWS = 1 << 11  # of a row group: some 100 features
_BATCH = 1 << 18


class _Top(NamedTuple):
    """An SAE's top contexts by feature, then context; arrays of one entry a row."""

    feature: np.ndarray  # int32
    context: np.ndarray  # int64
    position: np.ndarray  # int32
    activation: np.ndarray  # float32
    windows: pa.Table  # offsets, values: NULL where they are in activations


class _Lists(NamedTuple):
    """A list for each top context, and several columns of them."""

    length: np.ndarray  # int64 [rows]
    columns: tuple[np.ndarray, ...]  # of all lists, one after the other


def merge_pages(
    store: Store, parts: Sequence[Part], saes: Sequence[str], rule: MergeRule, stem: str
) -> dict[str, list[DataFileRecord]]:
    """Write `pages` of some SAEs. The part has `top_contexts` of all shown units, `contexts`, `activations`.

    Memory is that of one SAE's top contexts with their tokens. DataError for an input that is damaged.
    """
    [part] = parts
    with Output(store, "pages", rule, stem) as output:
        for sae in saes:
            top = _top(store, part, sae)
            if not len(top.feature):
                continue
            columns = _columns(store, part, sae, rule, top)
            place = (
                rule.places[(top.context >> LOCAL_BITS) - rule.first] * LOCAL_MAX + top.context % LOCAL_MAX
            )
            order = np.lexsort((place, -np.abs(top.activation), top.feature))
            feature = top.feature[order]
            rank = np.arange(len(feature)) - np.searchsorted(feature, feature) + 1
            table = pa.table(columns).take(pa.array(order)).combine_chunks()
            table = table.append_column("rank", pa.array(rank.astype(np.int32)))
            table = table.append_column("sae", sae_column(sae, len(feature)))
            cutter = Cutter(output, _ROWS)
            cutter.add(table.select(output.schema.names).cast(output.schema), feature)
            cutter.end()
    return {"pages": output.records} if output.records else {}


def _top(store: Store, part: Part, sae: str) -> _Top:
    names = ["feature", "context", "position", "activation", "offsets", "values"]
    with Inputs(store, names) as inputs:
        batches = [
            batch
            for group in row_groups(inputs, part, "top_contexts", "sae")
            if group.sae == sae
            for batch in inputs.batches(group.file, group.number, _BATCH)
        ]
    if not batches:
        none = np.empty(0, np.int64)
        return _Top(none, none, none, none, pa.table({}))
    table = pa.Table.from_batches(batches)
    feature, context, position, activation = (table[name].to_numpy() for name in names[:4])
    return _Top(feature, context, position, activation, table.select(names[4:]))


def _columns(store: Store, part: Part, sae: str, rule: MergeRule, top: _Top) -> dict[str, Any]:
    """Columns of `pages` but for the SAE and the rank, in the order of `top`."""
    if top.windows["offsets"].null_count:
        offsets, values = _list_arrays(_windows(store, part, sae, rule.length, top), pa.int8(), pa.float32())
    else:
        offsets, values = (top.windows[name].combine_chunks() for name in ("offsets", "values"))
    first = np.maximum(top.position - NEAR, 0)
    document, found = _tokens(store, part, top, first)
    [tokens] = _list_arrays(found, pa.int32())
    return {
        "feature": top.feature,
        "context": top.context,
        "position": top.position,
        "activation": top.activation,
        "offsets": offsets,
        "values": values,
        "document": document,
        "first": first.astype(np.int32),
        "tokens": tokens,
    }


def _windows(store: Store, part: Part, sae: str, length: int, top: _Top) -> _Lists:
    """(offset, activation) of each top context's active tokens within WINDOW, from the SAE's rows."""
    middle = top.context * length + top.position
    lowest = top.context * length + np.maximum(top.position - WINDOW, 0)
    highest = top.context * length + np.minimum(top.position + WINDOW, length - 1)
    pieces = []
    with Inputs(store, ["feature", "token", "activation"]) as inputs:
        for group in row_groups(inputs, part, "activations", "sae", "feature"):
            first, last = (int(end) for end in group.spans["feature"])
            wanted = slice(*np.searchsorted(top.feature, (first, last + 1)))
            if group.sae != sae or wanted.start == wanted.stop:
                continue
            for batch in inputs.batches(group.file, group.number, _BATCH):
                feature, token, activation = (batch.column(name).to_numpy() for name in inputs.columns)
                own, start, stop = _found(
                    top.feature[wanted], lowest[wanted], highest[wanted], feature, token
                )
                own = own + wanted.start
                index, _ = windows_index(start, stop - start)
                row = np.repeat(own, stop - start)
                pieces.append((row, token[index] - middle[row], activation[index]))
    row, offset, value = _joined(pieces, (np.int64, np.int64, np.float32))
    order = np.lexsort((offset, row))
    row, offset, value = row[order], offset[order], value[order]
    whole = offset == 0
    if not np.array_equal(row[whole], np.arange(len(middle))) or (value[whole] != top.activation).any():
        raise DataError(f"{store.uri}: damaged: activations of {sae} do not have its top contexts")
    return _Lists(np.bincount(row, minlength=len(middle)), (offset, value))


def _found(
    wanted: np.ndarray, lowest: np.ndarray, highest: np.ndarray, feature: np.ndarray, token: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which windows (by feature, tokens lowest to highest) have rows here, and the span of those rows.

    Rows are by feature, then token.
    """
    start, stop = np.zeros(len(wanted), np.int64), np.zeros(len(wanted), np.int64)
    features, begin = np.unique(wanted, return_index=True)
    ends = np.append(begin[1:], len(wanted))
    bounds = np.searchsorted(feature, features), np.searchsorted(feature, features, "right")
    for a, b, low, high in zip(begin, ends, *bounds, strict=True):
        start[a:b] = low + np.searchsorted(token[low:high], lowest[a:b])
        stop[a:b] = low + np.searchsorted(token[low:high], highest[a:b], "right")
    own = np.flatnonzero(stop > start)
    return own, start[own], stop[own]


def _tokens(store: Store, part: Part, top: _Top, first: np.ndarray) -> tuple[np.ndarray, _Lists]:
    """Documents, and the tokens from `first` to NEAR after each position; fewer where the context ends."""
    order = np.argsort(top.context, kind="stable")
    context = top.context[order]
    pieces, length, document = [], np.zeros(len(order), np.int64), np.zeros(len(order), np.int64)
    with Inputs(store, ["context", "document", "tokens"]) as inputs:
        for group in row_groups(inputs, part, "contexts", "context"):
            lowest, highest = (int(end) for end in group.spans["context"])
            if np.searchsorted(context, lowest) == np.searchsorted(context, highest, "right"):
                continue
            for batch in inputs.batches(group.file, group.number, 1 << 12):
                key, lists = batch.column("context").to_numpy(), batch.column("tokens")
                low, high = np.searchsorted(context, key), np.searchsorted(context, key, "right")
                index, _ = windows_index(low, high - low)
                row, at = order[index], np.repeat(np.arange(len(key)), high - low)
                document[row] = batch.column("document").to_numpy()[at]
                starts, sizes = lists.offsets.to_numpy()[:-1][at], lists.value_lengths().to_numpy()[at]
                length[row] = np.minimum(top.position[row] + NEAR + 1, sizes) - first[row]
                index, _ = windows_index(starts + first[row], length[row])
                pieces.append((np.repeat(row, length[row]), lists.values.to_numpy()[index]))
    if (length <= 0).any():
        raise DataError(f"{store.uri}: damaged: top contexts are of contexts that are not there")
    row, token = _joined(pieces, (np.int64, np.int32))
    return document, _Lists(length, (token[np.argsort(row, kind="stable")],))


def _joined(pieces: Sequence[tuple[np.ndarray, ...]], types: Sequence[type]) -> list[np.ndarray]:
    """Columns of pieces one after the other."""
    empty: tuple[np.ndarray, ...] = tuple(np.empty(0, kind) for kind in types)
    return [np.concatenate(column) for column in zip(*pieces, empty, strict=True)]


def _list_arrays(lists: _Lists, *types: pa.DataType) -> list[pa.ListArray]:
    bounds = pa.array(np.concatenate([[0], np.cumsum(lists.length)]).astype(np.int32))
    columns = zip(lists.columns, types, strict=True)
    return [pa.ListArray.from_arrays(bounds, pa.array(column).cast(kind)) for column, kind in columns]
