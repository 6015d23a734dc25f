"""SAEs as plain Parquet files with the views' columns, for readers that do not know an index.

    saes, documents, segments, contexts, vocabulary .parquet        of the corpus, and of the SAEs exported
    <sae id>/features, top_contexts, sampled_contexts, …  .parquet  of one SAE

Invariant: a file has every row of its view for that SAE, in the order of its key; what `keep` left out is no
file. Rows are written slice by slice of features (and of contexts, of a feature that alone has more), so
memory is that of some million rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from queries.export import Folder, Sae, Told, ask, per_feature, slices, stream
from queries.relations import name

_ROWS = 1_000_000  # of a slice; a row group has no more
_CONTEXTS = 20_000  # rows of top and sampled contexts, with windows, of a slice
_SHOWN = 100  # of a feature there are hardly more
_CORPUS = {
    "documents": "document",
    "segments": "document, segment",
    "contexts": "context",
    "vocabulary": "token",
}
_ANNOTATED = "feature_tokens", "feature_neighbours", "feature_decoders", "explanations"


@dataclass(frozen=True)
class Written:
    """One file."""

    file: str
    rows: int


def missing(sae: Sae) -> list[str]:
    """Views that `keep` leaves out of an SAE's export."""
    if sae.keep == "tokens":
        return []
    if sae.keep == "none":
        return ["document_features", "activations"]
    return ["activations"]


def write(con: duckdb.DuckDBPyConnection, saes: Sequence[Sae], folder: Folder, told: Told) -> list[Written]:
    """Write the corpus and the SAEs."""
    written = []
    for view, order in _CORPUS.items():
        told(view)
        columns = _columns(con, view)
        written.append(_file(con, folder, view, _spans(con, view, columns, order)))
    chosen = "SELECT * FROM saes WHERE list_contains($1, sae) ORDER BY sae"
    written.append(_file(con, folder, "saes", [(chosen, [[sae.id for sae in saes]])]))
    for sae in saes:
        for view, statements in _of(con, sae):
            told(f"{sae.id}: {view}")
            written.append(_file(con, folder, f"{sae.id}/{view}", statements))
    return written


def _columns(con: duckdb.DuckDBPyConnection, view: str) -> str:
    described = con.execute(f"DESCRIBE {view}").fetchall()
    return ", ".join(name(column) for column, *_ in described if not column.startswith("_"))


Statements = Iterable[tuple[str, list[Any]]]


def _spans(con: duckdb.DuckDBPyConnection, view: str, columns: str, order: str) -> Statements:
    """A view of the corpus in order of its key, a span of keys at a time."""
    key = order.split(",")[0]
    source = "documents" if key == "document" else view
    step = _CONTEXTS if view == "contexts" else _ROWS
    keys = ask(con, f"SELECT {key} AS key FROM {source} ORDER BY key")["key"].to_numpy()
    spans = [(keys[i], keys[min(i + step, len(keys)) - 1]) for i in range(0, len(keys), step)] or [(0, -1)]
    statement = f"SELECT {columns} FROM {view} WHERE {key} BETWEEN $1 AND $2 ORDER BY {order}"
    return ((statement, [int(low), int(high)]) for low, high in spans)


def _of(con: duckdb.DuckDBPyConnection, sae: Sae) -> Iterator[tuple[str, Statements]]:
    """What there is of one SAE: its views and the statements that give their rows in order."""
    everything = np.ones(sae.width, np.int64)
    contexts = per_feature(con, sae, "n_contexts")
    yield "features", _sliced("features", sae, "feature", slices(everything, _ROWS // 50))
    shown = np.minimum(contexts, _SHOWN)
    for view, order in (("top_contexts", "feature, rank"), ("sampled_contexts", "feature, stratum, context")):
        yield view, _sliced(view, sae, order, slices(shown, _CONTEXTS))
    if sae.keep != "none":
        parts = slices(per_feature(con, sae, "n_documents"), _ROWS)
        yield "document_features", _sliced("document_features", sae, "feature, document", parts)
    if sae.rate:
        view = "activations" if sae.rate >= 1 else "sampled_activations"
        yield view, _token_rows(con, view, sae)
    there = set(ask(con, "SELECT view_name FROM duckdb_views()")["view_name"].to_pylist())
    for view in _ANNOTATED:
        if view in there and ask(con, f"SELECT sae FROM {view} WHERE sae = $1 LIMIT 1", [sae.id]).num_rows:
            yield view, _sliced(view, sae, "ALL", slices(everything, _ROWS // 50))


def _sliced(view: str, sae: Sae, order: str, parts: Iterable[tuple[int, int]]) -> Statements:
    statement = f"SELECT * FROM {view} WHERE sae = $1 AND feature BETWEEN $2 AND $3 ORDER BY {order}"
    return ((statement, [sae.id, first, last]) for first, last in parts)


def _token_rows(con: duckdb.DuckDBPyConnection, view: str, sae: Sae) -> Statements:
    counts = per_feature(con, sae, "n_tokens")
    statement = (
        f"SELECT * FROM {view} WHERE sae = $1 AND feature BETWEEN $2 AND $3 AND context BETWEEN $4 AND $5 "
        "ORDER BY feature, context, position"
    )
    keys = np.empty(0, np.int64)
    if counts.max(initial=0) > _ROWS:
        keys = ask(con, "SELECT context FROM contexts ORDER BY context")["context"].to_numpy()
    for first, last in slices(counts, _ROWS):
        pieces = -(-int(counts[first : last + 1].sum()) // _ROWS)
        if pieces <= 1:
            yield statement, [sae.id, first, last, 0, (1 << 63) - 1]
            continue
        edges = np.linspace(0, len(keys), pieces + 1).astype(np.int64)
        for low, high in itertools.pairwise(edges):
            if low < high:
                yield statement, [sae.id, first, last, int(keys[low]), int(keys[high - 1])]


def _file(con: duckdb.DuckDBPyConnection, folder: Folder, stem: str, statements: Statements) -> Written:
    """Write the rows of statements, one after the other, in one file."""
    rows, writer, at = 0, None, f"{stem}.parquet"
    with folder.store.create(at) as sink:
        for statement, values in statements:
            schema, batches = stream(con, statement, values)
            writer = writer or pq.ParquetWriter(sink, schema, compression="zstd")
            table = pa.Table.from_batches(batches, schema)
            writer.write_table(table, _ROWS)
            rows += table.num_rows
        if writer is not None:
            writer.close()
    return Written(at, rows)
