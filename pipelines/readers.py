"""Stored bytes to rows: opening, hashing, decompressing, JSON lines and Arrow record batches.

Invariant: what comes out depends only on the stored bytes and the file's name. Compressed data that ends
early or is followed by anything but padding is damage, never a shorter file: what is before it are rows,
the unreadable rest is one more, refused. Libraries differ there (zstandard's reader ends quietly inside a
cut frame, bz2 and lzma ignore what follows the data), so one loop over their plain decoder objects
(`Decoded`) replaces their file classes.
Memory holds one line or text file of at most MOST bytes, PIECE decoded bytes beside the decoder's own window
(at most 2 GiB, and of .zst and .xz no more than the data fill), one Arrow batch or one Parquet row group's
wanted columns. Parquet and Arrow need to seek, so inside a .gz, .zst, .bz2 or .xz they are decoded to a
temporary file, of SPOOL bytes at most, each time they are opened.

Trade-off, measured (2 shared cores, 178 MB of text in 37 MB of .zst): `Decoded` gives 1,070 MB/s where
zstandard's own `stream_reader` gives 1,350; parsing JSON at some 300 MB/s hides the difference.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import hashlib
import io
import json
import lzma
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import zstandard

from pipelines import parquet
from pipelines.quarantine import Refused, line
from pipelines.storage import open_filesystem
from sae_runtime.errors import DataError, InputError, one_line

if TYPE_CHECKING:
    from pipelines.files import SourceFile

CHUNK = 1 << 12  # stored bytes decoded at once: where they are damaged, what is lost before the fault
PIECE = 1 << 20  # decoded bytes given out at once
LINE_BUFFER = 1 << 20
# Bytes of a JSON line, a text file or a text cell: some 8 million tokens. A longer one is a damaged or a
# hostile one more likely than a document, and its parse, tokens and contexts take 50 times its size.
MOST = 1 << 25
SPOOL = 1 << 32  # decoded bytes of a compressed Parquet or Arrow file, which goes to a temporary file
SPARE = 1 << 30  # bytes that a temporary file leaves free on its disk
UNKNOWN_ROWS = 1 << 24  # a damaged row group that claims more is the unreadable rest of its file
ABSURD = 1 << 40  # bytes: an allocation that only damage asks for
BATCH_ROWS = 512
BOM = b"\xef\xbb\xbf"


def split_name(path: str) -> tuple[str, str]:
    """The base name of `path` without its compression ending, and that ending ("" if none)."""
    name = PurePosixPath(path)
    ending = name.suffix.lower()
    return (name.stem, ending) if ending in DECODERS else (name.name, "")


class Damaged(Exception):
    """The stored bytes from here on are not what the file's name says; the text says why."""


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """InputError, naming the file, where it cannot be opened. Errors of the network or the disk pass
    through: those are for the caller to try again."""
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise InputError(f"corpus.uri: {path} cannot be opened: {one_line(error)}") from error


@contextlib.contextmanager
def _arrow() -> Iterator[None]:
    """Damaged for what Arrow says of bytes that it cannot read, not for what storage says."""
    try:
        yield
    except (ConnectionError, TimeoutError):
        raise
    except pa.ArrowMemoryError as error:
        asked = re.search(r"size (\d+)", str(error))
        if asked is None or int(asked[1]) < ABSURD:
            raise
        raise Damaged(one_line(error)) from error
    except OSError as error:  # without a number: Arrow's own
        if error.errno is not None:
            raise
        raise Damaged(one_line(error)) from error
    except (pa.ArrowException, ValueError, KeyError, EOFError, OverflowError) as error:
        raise Damaged(one_line(error)) from error


@contextlib.contextmanager
def open_stored(uri: str) -> Iterator[IO[bytes]]:
    """The file's bytes as stored, from the start. Raises OSError."""
    fs, path = open_filesystem(uri)
    with fs.open(path, "rb") as stream:
        yield stream


class Hashing(io.RawIOBase):
    """A stream that hashes (blake2b, 16 bytes) what is read through it."""

    def __init__(self, stored: IO[bytes]) -> None:
        self._stored = stored
        self._hash = hashlib.blake2b(digest_size=16)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stored.read(len(buffer))
        self._hash.update(data)
        buffer[: len(data)] = data
        return len(data)

    def finish(self) -> str:
        """Read what a decoder left and return the digest of everything, in hex."""
        while self.read(LINE_BUFFER):
            pass
        return self._hash.hexdigest()


class _Gzip:
    """zlib's decoder with the interface of bz2's and lzma's."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(wbits=31)

    def decompress(self, data: bytes, most: int) -> bytes:
        return self._decoder.decompress(self._decoder.unconsumed_tail + data, most)

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def needs_input(self) -> bool:
        return not self._decoder.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data


class _Zstd:
    """The same over zstandard's decoder, which has no bound: it is given so many blocks at a time that they
    cannot decode to more. A block is 128 KiB at most, of a frame that says where each ends."""

    _BLOCK = 1 << 17

    def __init__(self) -> None:
        # As much as `--long=31` asks for, with which Reddit's dumps are made.
        self._decoder = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self._left = b""  # what the decoder has not had
        self._at = -1  # of the next block's header in `_left`; -1 before the frame's header
        self._last = False  # the last block's header has been seen: what follows decodes to no more
        self.needs_input = True

    def decompress(self, data: bytes, most: int) -> bytes:
        self._left += data
        stop = self._walk(max(1, most // self._BLOCK))
        piece, self._left = self._left[:stop], self._left[stop:]
        if self._at >= 0:
            self._at -= min(stop, self._at)
        self.needs_input = not self._left or not piece
        return self._decoder.decompress(piece) if piece else b""

    def _walk(self, blocks: int) -> int:
        """Where in `_left` so many blocks end; less where it ends before."""
        left = self._left
        if self._last:
            return len(left)
        if self._at < 0:
            if len(left) < 5:  # the header's length is not known yet
                return 0
            self._last = left[1:4] == b"\x2a\x4d\x18"  # a frame to be skipped
            self._at = 0 if self._last else zstandard.frame_header_size(left[:18])
        while blocks and not self._last and self._at + 3 <= len(left):
            header = int.from_bytes(left[self._at : self._at + 3], "little")
            self._last, run, size = bool(header & 1), header >> 1 & 3 == 1, header >> 3
            self._at += 4 if run else 3 + size
            blocks -= 1
        return len(left) if self._last else min(len(left), self._at)

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data + self._left


DECODERS: dict[str, Callable[[], Any]] = {
    ".gz": _Gzip,
    ".zst": _Zstd,
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lambda: lzma.LZMADecompressor(memlimit=1 << 31),
}


class Decoded(io.RawIOBase):
    """The decoded bytes of concatenated compressed streams, with zero padding between or after them.

    Raises Damaged where the data ends inside a stream, or cannot be decoded.
    """

    def __init__(self, stored: Any, new_decoder: Callable[[], Any]) -> None:
        self._stored = stored
        self._new_decoder = new_decoder
        self._decoder = new_decoder()
        self._inside = True  # a file of no bytes is cut short too
        self._left = b""  # stored bytes after the end of a stream
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._decode():
                return 0
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _decode(self) -> bool:
        """Decode one more piece; False when there is none."""
        piece = b""
        if not self._inside or self._decoder.needs_input:
            piece = self._left or _full(self._stored, CHUNK)
            self._left = b""
            if not piece:
                if self._inside:
                    raise Damaged("the compressed data is cut short")
                return False
        if not self._inside:
            piece = piece.lstrip(b"\0")
            if not piece:
                return True
            self._decoder, self._inside = self._new_decoder(), True
        try:
            self._ready = memoryview(self._decoder.decompress(piece, PIECE))
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
            raise Damaged(f"the compressed data is damaged: {one_line(error)}") from error
        if self._decoder.eof:
            self._left, self._inside = self._decoder.unused_data, False
        return True


def _full(stored: Any, size: int) -> bytes:
    """The next `size` bytes, fewer only at the end: where damage shows must not depend on how they came."""
    piece = stored.read(size)
    while len(piece) < size and (more := stored.read(size - len(piece))):
        piece += more
    return bytes(piece)


def decoded(stored: Any, path: str) -> io.BufferedReader:
    """`stored` read through the compression that the file's name says, buffered for lines."""
    compression = split_name(path)[1]
    raw = Decoded(stored, DECODERS[compression]) if compression else stored
    return io.BufferedReader(raw, LINE_BUFFER)


def whole(stored: Any, path: str) -> bytes | Refused:
    """A text file's decoded bytes, without a byte order mark at the start; or why it is no document."""
    try:
        data = _full(decoded(stored, path), MOST + 1)
    except Damaged as error:
        return Refused(0, line(f"the file cannot be read: {error}"))
    return too_long(0, "file") if len(data) > MOST else data.removeprefix(BOM)


def too_long(row: int, what: str) -> Refused:
    """The refusal of a line, file or cell of more than MOST bytes."""
    return Refused(row, f"a {what} of more than {MOST >> 20} MiB, which is not read")


def json_lines(stored: Any, path: str) -> Iterator[bytes | Refused]:
    """The lines that are rows: those that are not blank, without a byte order mark at the start.

    Only a line feed ends a line: JSON may hold U+2028 or a form feed inside a string. A line over MOST is
    refused, its rest passed over in pieces; where the data are damaged, so is what is left, as one row.
    """
    stream = decoded(stored, path)
    row = 0
    start = True
    try:
        while text := stream.readline(MOST + 1):
            if start:
                text, start = text.removeprefix(BOM), False
            if len(text) > MOST and not text.endswith(b"\n"):
                while (rest := stream.readline(LINE_BUFFER)) and not rest.endswith(b"\n"):
                    pass
                yield too_long(row, "line")
            elif text.strip():
                yield text
            else:
                continue
            row += 1
    except Damaged as error:
        yield Refused(row, line(f"the file cannot be read from here on: {error}"))


def parse(text: bytes | Refused) -> Any:
    """The value of a line, or the error or refusal that says why there is none."""
    if isinstance(text, Refused):
        return text
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        return error


@contextlib.contextmanager
def _seekable(uri: str, path: str) -> Iterator[IO[bytes]]:
    with contextlib.ExitStack() as stack:
        stored = stack.enter_context(open_stored(uri))
        if not split_name(path)[1]:
            yield stored
            return
        spool = stack.enter_context(tempfile.TemporaryFile())
        _decode_to(spool, decoded(stored, path))
        yield spool


def _decode_to(spool: IO[bytes], stream: IO[bytes]) -> None:
    """Damaged where there is more than SPOOL; OSError before the disk is full, which is no file's fault."""
    size = 0
    while piece := stream.read(LINE_BUFFER):
        size += len(piece)
        if size > SPOOL:
            raise Damaged(f"decodes to more than {SPOOL >> 20} MiB, which is not read; store it uncompressed")
        if shutil.disk_usage(tempfile.gettempdir()).free < SPARE + len(piece):
            raise OSError(errno.ENOSPC, "no room to decode a corpus file; set TMPDIR", tempfile.gettempdir())
        spool.write(piece)
    spool.seek(0)


@dataclass(frozen=True)
class Part:
    """Rows [first, first + rows) of a table: a batch of them, or why they cannot be read."""

    first: int
    rows: int
    batch: pa.RecordBatch | str
    rest: bool = False  # nobody knows how many rows there are from `first` on: they count as one


class Table:
    """A Parquet or Arrow file: its `schema`, and record batches of chosen columns in row order."""

    def __init__(self, stream: IO[bytes], format: str) -> None:
        self._stream = stream
        with _arrow():
            self._parquet = parquet.opened(stream) if format == "parquet" else None
            self.schema: pa.Schema = self._parquet.schema_arrow if self._parquet else self._open_ipc().schema
            self.names: list[str] = self.schema.names

    def parts(self, columns: Sequence[str], start: int = 0) -> Iterator[Part]:
        """The table's rows, of those columns that it has; parts that end before row `start` may be left out.

        Of a damaged row group those rows that come before the damage are read, as are the groups after it.
        """
        present = [name for name in columns if name in self.names] or self.names[:1]
        if present:
            yield from self._parquet_parts(present, start) if self._parquet else self._ipc_parts(present)

    def _parquet_parts(self, columns: Sequence[str], start: int) -> Iterator[Part]:
        assert self._parquet is not None
        first = 0
        for group in range(self._parquet.num_row_groups):
            with _arrow():
                rows = self._parquet.metadata.row_group(group).num_rows
            at, end = first, first + rows
            first = end
            if end <= start:
                continue
            try:
                for batch in self._group(group, columns):
                    if at < end:
                        yield Part(at, min(batch.num_rows, end - at), batch)
                        at += batch.num_rows
                error = "it has fewer rows than it says"
            except Damaged as damage:
                error = str(damage)
            if end - at > UNKNOWN_ROWS or rows < 0:
                yield Part(at, 1, _unreadable("file", error), rest=True)
                return
            if at < end:
                yield Part(at, end - at, _unreadable("row group", error))

    def _group(self, group: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        assert self._parquet is not None
        with _arrow():
            yield from self._parquet.iter_batches(BATCH_ROWS, [group], list(columns), use_threads=False)

    def _seeks(self) -> bool:
        """Whether an Arrow file is of the random-access format, by its magic; else it is a stream."""
        self._stream.seek(0)
        magic = self._stream.read(6)
        self._stream.seek(0)
        return magic == b"ARROW1"

    def _open_ipc(self, options: pa.ipc.IpcReadOptions | None = None) -> Any:
        read = pa.ipc.open_file if self._seeks() else pa.ipc.open_stream
        return read(self._stream, options=options)

    def _ipc_batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch | Damaged]:
        """Batches of those columns, or why one cannot be read; after that nothing more of a stream."""
        wanted = [number for number, name in enumerate(self.names) if name in columns]
        try:
            with _arrow():
                reader = self._open_ipc(pa.ipc.IpcReadOptions(included_fields=wanted))
                if not hasattr(reader, "num_record_batches"):
                    yield from reader
                    return
        except Damaged as error:
            yield error
            return
        for number in range(reader.num_record_batches):
            try:
                with _arrow():
                    batch = reader.get_batch(number)
            except Damaged as error:
                yield error
            else:
                yield batch

    def _ipc_parts(self, columns: Sequence[str]) -> Iterator[Part]:
        at = 0
        for number, found in enumerate(self._ipc_batches(columns)):
            counted = found
            # A file says where its next batch is, and the column that planning reads how many rows this has.
            if isinstance(found, Damaged) and len(columns) > 1 and self._seeks():
                counted = next(islice(self._ipc_batches(columns[:1]), number, None), found)
            if isinstance(counted, Damaged):
                yield Part(at, 1, _unreadable("file", str(counted)), rest=True)
                return
            for offset in range(0, counted.num_rows, BATCH_ROWS):
                rows = min(BATCH_ROWS, counted.num_rows - offset)
                yield Part(at + offset, rows, _sound(found, offset, rows))
            at += counted.num_rows


def _sound(batch: pa.RecordBatch | Damaged, offset: int, rows: int) -> pa.RecordBatch | str:
    """Some rows of a batch, or why they cannot be read."""
    try:
        if isinstance(batch, Damaged):
            raise batch
        for column in batch.columns:
            _check_sound(column.slice(offset, rows))
    except Damaged as error:
        return _unreadable("record batch", str(error))
    return batch.slice(offset, rows)


def _unreadable(what: str, error: str) -> str:
    return line(f"the {what} cannot be read from here on: {error}")


def _check_sound(array: pa.Array) -> None:
    """Damaged if a value would lie outside its buffers. Text need not be UTF-8: that is one row's fault."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        _check_sound(array.storage)
    elif pa.types.is_dictionary(kind):
        _check_sound(array.indices)
        _check_sound(array.dictionary)
        used = array.indices.drop_null()
        if len(used) and not 0 <= pc.min(used).as_py() <= pc.max(used).as_py() < len(array.dictionary):
            raise Damaged("indices outside their dictionary")
    elif pa.types.is_struct(kind):
        for number in range(kind.num_fields):
            _check_sound(array.field(number))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
        with _arrow():
            array.validate()
            offsets = array.offsets.to_numpy()
        if (np.diff(offsets) < 0).any() or offsets[0] < 0 or offsets[-1] > len(array.values):
            raise Damaged("lists outside their values")
        _check_sound(array.values)
    else:
        with _arrow():
            plainly = {"string": pa.binary(), "large_string": pa.large_binary()}.get(str(kind))
            (array if plainly is None else array.view(plainly)).validate(full=True)


@contextlib.contextmanager
def open_table(uri: str, path: str, format: str) -> Iterator[Table]:
    """A Parquet or Arrow file, decoded to a temporary file first if it is compressed as a whole.

    Raises Damaged where it has no rows that could be counted.
    """
    with _seekable(uri, path) as stream:
        yield Table(stream, format)


def plain(column: pa.Array) -> pa.Array:
    """A column without extension types and views, timestamps in microseconds UTC.

    Nor are there dictionaries but those of text, whose values may be few and long.
    """
    if isinstance(column, pa.ExtensionArray):
        return plain(column.storage)
    if pa.types.is_dictionary(column.type):
        return column if _is_text(column.type.value_type) else plain(column.dictionary_decode())
    if str(column.type) in ("string_view", "null"):
        return column.cast(pa.large_string())
    if pa.types.is_timestamp(column.type):  # nanoseconds are cut off; coarser units must not overflow
        return column.cast(pa.timestamp("us"), safe=column.type.unit != "ns")
    return column


def _is_text(kind: pa.DataType) -> bool:
    return str(kind) in ("string", "large_string", "binary", "large_binary")


def text_sizes(column: pa.Array) -> list[int | None]:
    """Bytes of each value of a `plain` column of text."""
    if pa.types.is_dictionary(column.type):
        return pc.binary_length(column.dictionary).take(column.indices).to_pylist()
    return pc.binary_length(column).to_pylist()


def too_large(column: pa.Array) -> list[int]:
    """Places of values of a `plain` column that take more than MOST bytes."""
    if pa.types.is_dictionary(column.type):
        return [at for at, size in enumerate(text_sizes(column)) if (size or 0) > MOST]
    if column.nbytes <= MOST:
        return []
    return [at for at in range(len(column)) if column.slice(at, 1).nbytes > MOST]


# --- rows


Rows = Iterator[tuple[int, dict[str, Any] | Refused]]  # row number from 0; values of the columns asked for
Keep = Callable[[int], bool]


def rows(file: SourceFile, columns: Sequence[str], start: int, stop: int, keep: Keep) -> Rows:
    """Rows [start, stop) that `keep` wants, in order. A text file is row 0, its text as `columns[0]`.

    A row that cannot be read is refused in its place. DataError for a file that ends before `stop`.
    """
    if start >= stop:
        return
    if file.format == "text":
        yield from _text_rows(file, columns, start, stop, keep)
    elif file.format == "jsonl":
        yield from _json_rows(file, start, stop, keep)
    else:
        yield from _table_rows(file, columns, start, stop, keep)


def _text_rows(file: SourceFile, columns: Sequence[str], start: int, stop: int, keep: Keep) -> Rows:
    if start == 0 and keep(0):
        with open_stored(file.uri) as stored:
            data = whole(stored, file.path)
        if isinstance(data, Refused):
            yield 0, data
        else:
            try:
                yield 0, {columns[0]: data.decode()}
            except UnicodeDecodeError as error:
                yield 0, Refused(0, f"not UTF-8 at byte {error.start}")
    if stop > 1:
        raise _shorter(file, 1, stop)


def _json_rows(file: SourceFile, start: int, stop: int, keep: Keep) -> Rows:
    row = -1
    with open_stored(file.uri) as stored:
        for row, text in enumerate(json_lines(stored, file.path)):
            if row >= start and keep(row):
                yield row, _json_object(row, text)
            if row == stop - 1:
                return
    raise _shorter(file, row + 1, stop)


def _json_object(row: int, text: bytes | Refused) -> dict[str, Any] | Refused:
    value = parse(text)
    if isinstance(value, UnicodeDecodeError):
        return Refused(row, f"not UTF-8 at byte {value.start} of the line")
    if isinstance(value, Exception):
        return Refused(row, f"not JSON: {one_line(value, 120)}")
    if not isinstance(value, (dict, Refused)):
        return Refused(row, f"not a JSON object but {shown(value)}")
    return value


def _table_rows(file: SourceFile, columns: Sequence[str], start: int, stop: int, keep: Keep) -> Rows:
    end = 0
    with contextlib.ExitStack() as stack:
        try:
            table = stack.enter_context(open_table(file.uri, file.path, file.format))
        except Damaged as error:
            if start == 0 and keep(0):
                yield 0, Refused(0, line(f"the file cannot be read: {error}"))
            end = 1
        else:
            for part in table.parts(columns, start):
                # What planning, which reads one column, has counted there is refused row by row.
                end = stop if part.rest else part.first + part.rows
                if end > start:
                    wanted = filter(keep, range(max(part.first, start), min(end, stop)))
                    yield from _part_rows(part, columns, wanted)
                if end >= stop:
                    return
    if end < stop:
        raise _shorter(file, end, stop)


def _part_rows(part: Part, columns: Sequence[str], wanted: Iterable[int]) -> Rows:
    """The `wanted` rows of a part."""
    if isinstance(part.batch, str):
        yield from ((row, Refused(row, part.batch)) for row in wanted)
        return
    names = part.batch.schema.names
    twice = [name for name in columns if names.count(name) > 1]
    if twice:
        yield from ((row, Refused(row, f"the file has several columns {twice[0]!r}")) for row in wanted)
        return
    arrays = {name: plain(part.batch.column(name)) for name in columns if name in names}
    long = {at for array in arrays.values() for at in too_large(array)}
    for row in wanted:
        if row - part.first in long:
            yield row, too_long(row, "cell")
        else:
            yield row, _items(row, arrays, row - part.first)


def _items(row: int, arrays: dict[str, pa.Array], at: int) -> dict[str, Any] | Refused:
    values = {}
    for name, array in arrays.items():
        try:
            values[name] = array[at].as_py()
        except (ValueError, OverflowError) as error:  # bytes that are not UTF-8, years above 9999
            return Refused(row, f"column {name!r}: {one_line(error, 120)}")
    return values


def _shorter(file: SourceFile, found: int, stop: int) -> DataError:
    return DataError(f"{file.path}: has {found} rows, but {stop} were planned; it changed, so scan again")


def shown(value: Any) -> str:
    """A value for a message, on one line."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep, or a number of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:59] + "…"
