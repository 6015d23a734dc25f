"""Data files of one (unit, SAE group): one Parquet file a kind, written as rows come.

Invariant: a row group holds one SAE and is sorted by feature, so row-group statistics on (sae,
feature) prune; nothing is visible until the commit names the files.
Kinds may be written from threads of their own; one kind from one thread at a time.
Measured (design note, 31.7 M rows): delta-packed tokens with dictionary or byte-split bfloat16 values
under zstd 3 take 2.34 bytes a row; pyarrow's defaults take 8.85.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.faults import crash
from pipelines.ledger import DataFileRecord
from pipelines.schema import DATA, SCHEMAS, documents_schema, metadata_type
from pipelines.storage import DataFile, Store
from sae_runtime.errors import DataError

ROWS_PER_GROUP = 1 << 18
_DELTA, _SPLIT = "DELTA_BINARY_PACKED", "BYTE_STREAM_SPLIT"
_PRUNED = ("sae", "feature", "token", "document", "context")  # what queries skip row groups by
_WINDOW = {
    "feature": _DELTA,
    "context": _DELTA,
    "activation": _SPLIT,
    "offsets.list.element": _DELTA,
    "values.list.element": _SPLIT,
}
_DOCUMENT_FEATURES = {
    "feature": _DELTA,
    "document": _DELTA,
    **dict.fromkeys(("max", "sum"), _SPLIT),
}
# The smallest of each that was measured; a column that is not named has a dictionary, a list plain values.
# Bytes of integers are not split, though that takes 5 % less of most tables here: DuckDB 1.5, the last for
# Python 3.10, reads split ones of FLOAT and DOUBLE only.
_ENCODINGS = {
    "activations": {"feature": "PLAIN", "token": _DELTA, "activation": _SPLIT},  # runs are left to zstd
    "document_features": _DOCUMENT_FEATURES,
    "by_document": _DOCUMENT_FEATURES,
    "features": {
        "feature": _DELTA,
        **dict.fromkeys(("n_tokens", "n_contexts", "n_documents"), "PLAIN"),
        **dict.fromkeys(("sum_high", "sum_low", "squares_low", "bin_tokens.list.element"), "PLAIN"),
    },
    "top_contexts": _WINDOW,
    "sampled_contexts": _WINDOW,
    "sampled_merged": {**_WINDOW, "hash": "PLAIN"},
    "pages": _WINDOW,
}


class UnitWriter:
    """Opens a file when its kind first has rows; `close()` returns what a commit records."""

    def __init__(self, store: Store, unit: str, group: int, attempt: str, metadata: dict[str, str]) -> None:
        self._store = store
        self._name = f"{unit}.{group}-{attempt}.parquet"
        columns = {name: metadata_type(kind) for name, kind in metadata.items()}
        self._schemas = {**SCHEMAS, "documents": documents_schema(columns)}
        self._open: dict[str, tuple[DataFile, pq.ParquetWriter]] = {}
        self._rows: dict[str, int] = {}

    def schema(self, kind: str) -> pa.Schema:
        """Columns of a kind, metadata included."""
        return self._schemas[kind]

    def write(self, kind: str, columns: dict[str, Any]) -> None:
        """Append rows of one SAE (or of none) as row groups of their own."""
        schema = self._schemas[kind]
        arrays = [_array(columns[field.name], field) for field in schema]
        table = pa.Table.from_arrays(arrays, schema=schema)
        if not table.num_rows:
            return
        if kind not in self._open:
            stream = self._store.create(f"{DATA}/{kind}/{self._name}")
            self._open[kind] = stream, pq.ParquetWriter(stream, schema, **parquet_options(kind, schema))
            self._rows[kind] = 0
            crash("data-opened")
        self._open[kind][1].write_table(table, row_group_size=ROWS_PER_GROUP)
        self._rows[kind] += table.num_rows

    def close(self) -> dict[str, DataFileRecord]:
        """Finish every file."""
        records = {}
        for kind, (stream, writer) in self._open.items():
            writer.close()
            stream.close()
            path = f"{DATA}/{kind}/{self._name}"
            records[kind] = DataFileRecord(path, self._rows[kind], stream.bytes, stream.digest)
            crash("data-closed")
        return records

    def abandon(self) -> None:
        """End without a record and, where that is quick, without the files; `gc` removes what is left."""
        for stream, writer in self._open.values():
            stream.discard()
            writer.close()
            stream.close()


def sae_column(sae: str, rows: int) -> pa.Array:
    """The constant `sae` column."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([sae]))


def windows_column(values: np.ndarray, start: np.ndarray, length: np.ndarray, kind: pa.DataType) -> pa.Array:
    """List column whose row i is values[start[i] : start[i] + length[i]]."""
    index, bounds = windows_index(start, length)
    return pa.ListArray.from_arrays(bounds, pa.array(values[index], kind))


def windows_index(start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, pa.Array]:
    """Where a list column's entries lie, and its offsets (int32 [rows + 1])."""
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(length, dtype=np.int64)])
    if offsets[-1] >= 1 << 31:
        raise DataError("the windows of one SAE in one unit pass 2^31 entries; lower top_k or sample_k")
    index = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - start, length)
    return index, pa.array(offsets.astype(np.int32))


def _array(values: Any, field: pa.Field) -> pa.Array:
    return values if isinstance(values, pa.Array) else pa.array(values, field.type)


def parquet_options(kind: str, schema: pa.Schema) -> dict[str, Any]:
    """What a ParquetWriter of a kind's files is given."""
    encodings = _ENCODINGS.get(kind, {})
    plain = {path.split(".")[0] for path in encodings}
    return {
        "compression": "zstd",
        "compression_level": 1,  # 3 takes 7 % longer for 0.3 % less
        "write_statistics": [f.name for f in schema if f.name in _PRUNED],
        "store_schema": False,
        "write_batch_size": 1 << 16,  # rows encoded at a time; 1,024, the default, take a seventh longer
        "use_dictionary": [
            *(f.name for f in schema if f.name not in plain and not pa.types.is_nested(f.type)),
            "bins.list.element",
        ],
        "column_encoding": encodings or None,
    }
