"""What a merge is given (Part, MergeRule), how its inputs are opened, and how its outputs are cut.

Invariant: nothing is written but new files of the given stem; an input that is damaged or lacks a column is a
DataError. A row group has one SAE (by_document: many) and ends where a feature does, unless that would leave
it less than half full.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import parquet
from pipelines.faults import crash
from pipelines.ledger import DataFileRecord
from pipelines.schema import BY_FEATURE, DATA, SCHEMAS, documents_schema, metadata_type
from pipelines.storage import DataFile, Store
from pipelines.writer import parquet_options
from sae_runtime.errors import DataError, one_line


@dataclass(frozen=True)
class Part:
    """Committed or merged data of a span of units."""

    ordinals: tuple[int, int]  # first, and the one after the last
    files: Mapping[str, tuple[str, ...]]  # by kind: names in the store, in the order they were written
    merged: bool  # by this module; else one unit's own files


@dataclass(frozen=True)
class MergeRule:
    """What a merge has to know of its index."""

    length: int  # tokens per context
    top_k: int
    sample_k: int
    metadata: Mapping[str, str]  # types of metadata columns, as in index.json
    places: np.ndarray  # int64 [ordinals from `first` on]: units in corpus order, which breaks ties
    target_bytes: int = 256 << 20  # of a file
    first: int = 0  # ordinal of the first of `places`

    def schema(self, kind: str) -> pa.Schema:
        """Columns of a kind."""
        if kind != "documents":
            return SCHEMAS[kind]
        return documents_schema({name: metadata_type(of) for name, of in self.metadata.items()})


def left_out(part: Part, omit: frozenset[int]) -> np.ndarray | None:
    """The part's ordinals that are omitted, int64 sorted; None if there is none."""
    found = sorted(ordinal for ordinal in omit if part.ordinals[0] <= ordinal < part.ordinals[1])
    return np.array(found, np.int64) if found else None


def present(parts: Sequence[Part], omit: frozenset[int]) -> list[Part]:
    """Parts less those whose units are all left out."""
    return [part for part in parts if not omit.issuperset(range(*part.ordinals))]


class Inputs:
    """Parquet files of one kind, each opened once; closed with the `with` block."""

    def __init__(self, store: Store, columns: Sequence[str]) -> None:
        self._store, self.columns = store, list(columns)
        self._dictionaries = ["sae"] if "sae" in columns else None
        self._open: dict[str, tuple[IO[bytes], pq.ParquetFile]] = {}

    def __enter__(self) -> Inputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every file; one that is wanted again is opened again."""
        for stream, _ in self._open.values():
            stream.close()
        self._open.clear()

    def file(self, name: str) -> pq.ParquetFile:
        """The file. DataError where it is damaged or lacks one of `columns`."""
        if name not in self._open:
            stream: IO[bytes] = self._store.open(name)
            try:
                with self._reading(name):
                    file = parquet.opened(stream, self._dictionaries)
                missing = sorted(set(self.columns) - set(file.schema_arrow.names))
                if missing:
                    raise DataError(f"{self._store.uri}/{name}: damaged: no column {', '.join(missing)}")
            except BaseException:
                stream.close()
                raise
            self._open[name] = stream, file
        return self._open[name][1]

    def batches(self, name: str, row_group: int, rows: int) -> Iterator[pa.RecordBatch]:
        """A row group's `columns`, at most so many rows at a time."""
        batches = self.file(name).iter_batches(rows, [row_group], self.columns, use_threads=False)
        while True:
            with self._reading(name):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the store's, not the reader's
                raise
            raise DataError(f"{self._store.uri}/{name}: damaged: {one_line(error)}") from error


class Output:
    """Merged files of one kind. A file ends near the target size: where a feature (or document) does, or at
    twice that size anywhere. Leaving the `with` block by an exception closes what is open, without a record.
    """

    def __init__(self, store: Store, kind: str, rule: MergeRule, stem: str) -> None:
        self.schema = rule.schema(kind)
        self._store, self._kind, self._stem = store, kind, stem
        self._target = rule.target_bytes
        self._open: tuple[DataFile, pq.ParquetWriter] | None = None
        self._rows = 0
        self._spans: dict[str, tuple[int, int]] | None = None
        self.records: list[DataFileRecord] = []

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        elif self._open is not None:
            stream, writer = self._open
            stream.discard()
            writer.close()
            stream.close()

    def write(self, table: pa.Table, boundary: bool) -> None:
        """Append a row group; `boundary` says that the next row is of another feature or SAE."""
        if self._open is None:
            stream = self._store.create(self._name)
            options = parquet_options(self._kind, self.schema)
            self._open = stream, pq.ParquetWriter(stream, self.schema, **options)
            self._rows, self._spans = 0, {} if self._kind in BY_FEATURE else None
        stream, writer = self._open
        writer.write_table(table, row_group_size=table.num_rows)
        self._rows += table.num_rows
        if self._spans is not None:
            sae, first, last = (table["sae"][0], table["feature"][0], table["feature"][-1])
            lowest, _ = self._spans.get(sae.as_py(), (first.as_py(), 0))
            self._spans[sae.as_py()] = lowest, last.as_py()
        if stream.bytes >= self._target * (1 if boundary else 2):
            self._finish()

    @property
    def _name(self) -> str:
        return f"{DATA}/{self._kind}/{self._stem}-{len(self.records)}.parquet"

    def _finish(self) -> None:
        if self._open is None:
            return
        stream, writer = self._open
        writer.close()
        stream.close()
        self._open = None
        self.records.append(DataFileRecord(self._name, self._rows, stream.bytes, stream.digest, self._spans))
        crash("merge-file")


class Cutter:
    """Cuts sorted rows into row groups: of at most `rows`, at the last boundary of the key in the upper half.

    So rows of one key that fit half a row group are never in two, and others in as few as can be, plus one.
    """

    def __init__(self, output: Output, rows: int) -> None:
        self._output, self._most = output, rows
        self._tables: list[pa.Table] = []
        self._keys: list[np.ndarray] = []
        self._held = 0

    def add(self, table: pa.Table, key: np.ndarray) -> None:
        """Append rows; `key` int [rows] does not descend, from call to call either."""
        self._tables.append(table)
        self._keys.append(key)
        self._held += table.num_rows
        if self._held > self._most:
            self._cut()

    def end(self) -> None:
        """Write what is left: rows that follow are of another SAE."""
        if self._held:
            self._output.write(pa.concat_tables(self._tables), True)
        self._tables, self._keys, self._held = [], [], 0

    def _cut(self) -> None:
        table, key = pa.concat_tables(self._tables), np.concatenate(self._keys)
        at = 0
        while len(key) - at > self._most:
            half = self._most // 2
            near = key[at + half - 1 : at + self._most + 1]
            boundaries = np.flatnonzero(near[1:] != near[:-1])
            rows = half + int(boundaries[-1]) if len(boundaries) else self._most
            self._output.write(table.slice(at, rows), len(boundaries) > 0)
            at += rows
        self._tables, self._keys, self._held = [table.slice(at)], [key[at:]], len(key) - at


def conformed(batch: pa.RecordBatch | pa.Table, schema: pa.Schema) -> Any:
    """The columns of `schema` in its order and types."""
    arrays = [batch.column(field.name).cast(field.type) for field in schema]
    return type(batch).from_arrays(arrays, schema=schema)


def without(schema: pa.Schema, *names: str) -> pa.Schema:
    """A schema less some columns."""
    return pa.schema([field for field in schema if field.name not in names])
