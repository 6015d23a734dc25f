"""The rows of corpus files: where to cut them into spans, and what they are as typed documents.

Invariant: rows are numbered from 0 in file order (a text file is one row; blank lines of JSON lines
are none), `index_file` and `read_documents` agree on that numbering, and documents do not depend on
how rows are cut into spans or on which spans are read. A row that cannot be a document is a row without
text for planning and comes out refused when it is read, so that spans stay where they are. Where a file
cannot be read on and nobody knows how many rows are left, the rest is one such row.

Trade-off: a span has no byte offset, so reading one of a JSON-lines file decodes from the file's start.
Measured on 2 shared cores (178 MB of JSON lines holding Python sources, 37 MB as .zst): rows before the
span are passed over at 1,010 MB/s decoded for .zst, 380 for .gz and 2,300 to 3,800 uncompressed, where
reading documents runs at 240, 170 and 300. So a span at the end of a 1 GB file waits 1 s for its first
row in .zst, and many spans of one large file cost their square; many files of moderate size do not.
Planning such a file (every line is parsed, to count text) runs at 260, 190 and 270 MB/s decoded.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any

import pyarrow as pa

from pipelines import messages, readers
from pipelines.columns import convert, schema_type, value_type, widen
from pipelines.files import SourceFile
from pipelines.quarantine import Refused, line
from pipelines.schema import METADATA_TYPES
from pipelines.spec import CorpusSource

SPAN_ROWS = 1 << 16  # most rows of a span, however little text they have
HEAD = 1000  # rows of a file that say which columns it has, and values of a column that say its type


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of a file."""

    start: int
    stop: int
    bytes: int  # UTF-8 bytes of text in it (of conversations: of the contents of messages)


@dataclass(frozen=True)
class FileIndex:
    """What one pass over a file found."""

    digest: str  # blake2b, 16 bytes, hex, of the stored bytes
    rows: int  # of the whole file
    text_bytes: int  # UTF-8 bytes of text of the whole file
    spans: tuple[Span, ...]
    types: dict[str, str]  # metadata column -> bool int64 double string timestamp date json null
    # What of the spec does not suit this file, in words, by key and column: the spec's mistake if it suits
    # none of the source's files. None where no row of the file can say.
    unsuited: dict[tuple[str, str], str] | None = None


@dataclass(frozen=True)
class Document:
    """A row, with its metadata in the order of `source.metadata`."""

    row: int  # from 0
    id: str | None
    text: str  # "" of a conversation
    metadata: tuple[Any, ...]
    messages: tuple[messages.Message, ...] | None = None  # of a conversation


# --- planning


class _Cutter:
    """Cuts rows into spans, greedily: a span closes once it holds `unit_bytes` of text."""

    def __init__(self, unit_bytes: int, start: int, rows: int | None) -> None:
        self.unit_bytes = unit_bytes
        self.stop = None if rows is None else start + rows
        self.rows = self.text_bytes = 0
        self._spans: list[Span] = []
        self._start = start  # of the open span
        self._bytes = 0

    def add(self, size: int) -> None:
        """The next row of the file, with `size` bytes of text."""
        row = self.rows
        self.rows += 1
        self.text_bytes += size
        if row < self._start or (self.stop is not None and row >= self.stop):
            return
        self._bytes += size
        if self._bytes >= self.unit_bytes or row + 1 - self._start == SPAN_ROWS:
            self._close(row + 1)

    def spans(self) -> tuple[Span, ...]:
        """All spans, the last one closed where the rows end."""
        end = self.rows if self.stop is None else min(self.rows, self.stop)
        if end > self._start:
            self._close(end)
        return tuple(self._spans)

    def _close(self, stop: int) -> None:
        self._spans.append(Span(self._start, stop, self._bytes))
        self._start, self._bytes = stop, 0


def index_file(
    file: SourceFile, source: CorpusSource, unit_bytes: int, start: int = 0, rows: int | None = None
) -> FileIndex:
    """Digest, rows and column types of a whole file, and its spans from row `start`, `rows` at most.

    `unit_bytes` are UTF-8 bytes of text. Spans are never empty and depend only on the rows from
    `start` on. JSON-lines types come from each column's first 1,000 values that are not null: a stray
    value late in a file is then one document refused, not a column turned into json, and a file that
    grows beyond them keeps its types. InputError for a file that cannot be opened; damage is no error.
    """
    cutter = _Cutter(unit_bytes, start, rows)
    with readers.reading(file.path):
        if file.format == "text":
            types, unsuited = _index_text(file, source, cutter)
        elif file.format == "jsonl":
            return _index_json(file, source, cutter)
        else:
            types, unsuited = _index_table(file, source, cutter)
        with readers.open_stored(file.uri) as stored:
            digest = readers.Hashing(stored).finish()
    return FileIndex(digest, cutter.rows, cutter.text_bytes, cutter.spans(), types, unsuited)


Found = tuple[dict[str, str], dict[tuple[str, str], str] | None]  # types, what is unsuited


def _wanted(source: CorpusSource) -> Iterator[tuple[str, str]]:
    """(key of the spec, column) of every column a source needs."""
    yield source.column
    if source.id is not None:
        yield "id", source.id
    yield from (("metadata", column) for column in source.metadata)


def _missing(file: SourceFile, source: CorpusSource, has: Sequence[str]) -> dict[tuple[str, str], str]:
    listed = ", ".join(has[:20]) + (", …" if len(has) > 20 else "")
    return {
        (key, column): f"corpus.{key}: no column {column!r} in {file.path}; it has: {listed}"
        for key, column in _wanted(source)
        if column not in has
    }


def _index_text(file: SourceFile, source: CorpusSource, cutter: _Cutter) -> Found:
    unsuited = {
        (key, column): f"corpus.{key}: {file.path} is a text file, without columns; leave `{key}` out"
        for key, column in _wanted(source)
        if key != "text"
    }
    with readers.open_stored(file.uri) as stored:
        data = readers.whole(stored, file.path)
    cutter.add(0 if isinstance(data, Refused) or source.messages is not None else len(data))
    return dict.fromkeys(source.metadata, "null"), unsuited


def _index_json(file: SourceFile, source: CorpusSource, cutter: _Cutter) -> FileIndex:
    columns = _JsonColumns(file, source)
    with readers.open_stored(file.uri) as stored:
        hashing = readers.Hashing(stored)
        for text in readers.json_lines(hashing, file.path):
            row = readers.parse(text)
            value = row.get(source.column[1]) if isinstance(row, dict) else None
            if source.messages is not None:
                cutter.add(messages.text_bytes(value))
            else:
                cutter.add(_utf8_bytes(value) if isinstance(value, str) else 0)
            columns.add(row)
        digest = hashing.finish()
    return FileIndex(
        digest, cutter.rows, cutter.text_bytes, cutter.spans(), columns.types, columns.unsuited()
    )


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


class _JsonColumns:
    """Which columns the first rows of a JSON-lines file have, and of which types."""

    def __init__(self, file: SourceFile, source: CorpusSource) -> None:
        self.types = dict.fromkeys(source.metadata, "null")
        self._file, self._source = file, source
        self._rows = 0
        self._seen: dict[str, None] = {}  # an ordered set
        self._open = dict.fromkeys(source.metadata, HEAD)  # values still to look at

    def add(self, row: Any) -> None:
        """The next row: its value, or why there is none."""
        if isinstance(row, Refused):  # too long, or the unreadable rest
            return
        self._rows += 1
        if isinstance(row, dict):
            if self._rows <= HEAD:
                self._seen.update(dict.fromkeys(row))
            for column in list(self._open):
                self._look(column, row.get(column))

    def _look(self, column: str, value: Any) -> None:
        if value is None:
            return
        self.types[column] = widen(self.types[column], value_type(value))
        self._open[column] -= 1
        if not self._open[column]:
            del self._open[column]

    def unsuited(self) -> dict[tuple[str, str], str] | None:
        """Which wanted columns are in none of the first rows; None if there are no rows."""
        if not self._rows:
            return None
        if not self._seen:
            why = (f"corpus.format: no JSON object on the first lines of {self._file.path}; "
                   "JSON lines hold one each; set `format:` if it is something else")  # fmt: skip
            return dict.fromkeys(_wanted(self._source), why)
        return _missing(self._file, self._source, list(self._seen))


def _index_table(file: SourceFile, source: CorpusSource, cutter: _Cutter) -> Found:
    key, column = source.column
    try:
        with readers.open_table(file.uri, file.path, file.format) as table:
            types, unsuited = _schema(file, source, table.schema)
            for part in table.parts([column]):
                if isinstance(part.batch, str) or (key, column) in unsuited:
                    sizes: Iterable[int] = repeat(0, part.rows)
                else:
                    sizes = _table_bytes(readers.plain(part.batch.column(column)), key == "messages")
                for size in islice(sizes, part.rows):
                    cutter.add(size)
            return types, unsuited
    except readers.Damaged:
        cutter.add(0)
        return dict.fromkeys(source.metadata, "null"), None


def _table_bytes(column: pa.Array, conversations: bool) -> Iterator[int]:
    """UTF-8 bytes of text of each value."""
    if not conversations:
        yield from (0 if size is None or size > readers.MOST else size for size in readers.text_sizes(column))
        return
    large = set(readers.too_large(column))
    for at, value in enumerate(column):
        try:
            item = None if at in large else value.as_py()
        except (ValueError, OverflowError):  # such as bytes that are not UTF-8
            item = None
        yield messages.text_bytes(item)


def _schema(
    file: SourceFile, source: CorpusSource, schema: pa.Schema
) -> tuple[dict[str, str], dict[tuple[str, str], str]]:
    """The metadata types, and what is missing or of a type that will not do."""
    unsuited = _missing(file, source, schema.names)
    types = dict.fromkeys(source.metadata, "null")
    allowed: dict[str, tuple[str, ...]] = {
        "text": ("string", "null"),
        "messages": ("json", "string", "null"),
        "id": ("string", "int64", "null"),
    }
    for key, column in _wanted(source):
        if (key, column) in unsuited:
            continue
        if schema.names.count(column) > 1:
            why = f"{file.path} has several columns {column!r}; rename all but one"
        else:
            name = schema_type(schema.field(column).type)
            if name is not None and name in allowed.get(key, METADATA_TYPES):
                if key == "metadata":
                    types[column] = name
                continue
            why = (f"column {column!r} of {file.path} is of type {schema.field(column).type}, "
                   f"which cannot be kept as {key}")  # fmt: skip
        unsuited[key, column] = f"corpus.{key}: {why}"
    return types, unsuited


# --- documents


def read_documents(
    file: SourceFile, source: CorpusSource, types: dict[str, str], start: int, stop: int
) -> Iterator[Document | Refused]:
    """The documents of rows [start, stop), in order, with metadata as the frozen `types`.

    With `source.sample`, those rows whose blake2b-8 of "corpus NUL path NUL row", as a big-endian
    number over 2^64, is below the fraction; others are not looked at. A row that cannot be read, has no
    text or has values that do not fit is refused; an id or metadata that it lacks are None. DataError
    for a file that ends before `stop`: it has changed since it was planned.
    """
    keep = _sampler(file, source.sample)
    columns = list(dict.fromkeys(column for _, column in _wanted(source)))
    with readers.reading(file.path):
        for row, values in readers.rows(file, columns, start, stop, keep):
            yield values if isinstance(values, Refused) else _document(file, source, types, row, values)


def _sampler(file: SourceFile, fraction: float | None) -> Callable[[int], bool]:
    if fraction is None:
        return lambda row: True
    bound = fraction * 2.0**64
    base = hashlib.blake2b(f"{file.corpus}\0{file.path}\0".encode("utf-8", "surrogateescape"), digest_size=8)

    def keep(row: int) -> bool:
        place = base.copy()
        place.update(str(row).encode())
        return int.from_bytes(place.digest(), "big") < bound

    return keep


class _Unfit(Exception):
    """Why a row is no document."""


def _document(
    file: SourceFile, source: CorpusSource, types: dict[str, str], row: int, values: dict[str, Any]
) -> Document | Refused:
    id = None
    try:
        id = _id(source, values)
        metadata = tuple(_fit(name, values.get(name), types[name]) for name in source.metadata)
        text, turns = _content(file, source, values)
    except _Unfit as error:
        return Refused(row, line(str(error)), id)
    return Document(row, id, text, metadata, turns)


def _content(
    file: SourceFile, source: CorpusSource, values: dict[str, Any]
) -> tuple[str, tuple[messages.Message, ...] | None]:
    """Text and messages of a row."""
    key, column = source.column
    if file.format == "text" and key == "messages":
        raise _Unfit("a text file has no messages")
    if column not in values:
        raise _Unfit(f"{key} column {column!r} is missing")
    value = values[column]
    if key == "messages":
        try:
            return "", messages.conversation(value)
        except (ValueError, RecursionError) as error:
            raise _Unfit(f"messages column {column!r} {error}") from error
    if not isinstance(value, str):
        raise _Unfit(f"text column {column!r} is {readers.shown(value)}, not a string")
    return str(_fit(column, value, "string")), None


def _id(source: CorpusSource, values: dict[str, Any]) -> str | None:
    if source.id is None:
        return None
    value = values.get(source.id)
    if isinstance(value, int) and not isinstance(value, bool):
        return _digits(value)
    return None if value is None else str(_fit(source.id, value, "string"))


def _digits(value: int) -> str:
    try:
        return str(value)
    except ValueError as error:  # thousands of digits
        raise _Unfit(line(error)) from error


def _fit(column: str, value: Any, type: str) -> Any:
    with contextlib.suppress(ValueError, TypeError, OverflowError, RecursionError):
        return convert(value, type)
    raise _Unfit(f"column {column!r} holds {readers.shown(value)}, which is not {type}")
