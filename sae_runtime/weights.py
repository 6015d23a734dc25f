"""Reading weight files: what is in them without reading it all, and tensors. No code runs from a file.

    .npz            zip of .npy     the central directory, and the header of each member
    .safetensors                    the JSON header
    .pt .pth        torch's zip     its pickle, without the tensors; before PyTorch 1.6, pickles one by one

Invariant: `headers` and `outline` read a few kB of a file however large and wherever it is; tensors come
from a local file, or from the local copy of a remote one, but for a few small ones of a file that is not
here, which are read by range. Floating tensors come out as float32, integers as they are, and all own
their memory, whatever happens to the file later. What a file says of its tensors is held against its bytes
before memory is taken for them.
"""

from __future__ import annotations

import io
import json
import math
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any

import numpy as np
import torch

from sae_runtime import archives, hub, pickles, remote
from sae_runtime.errors import InputError, one_line

# numpy reads a header with `ast`, which fails in two threads at once before Python 3.13 (its issue 106905).
_ONE_HEADER = threading.Lock()
# What `savez_compressed` writes shrinks to a third at most, and tensors may be views of one storage.
_EXPANSION, _SMALL = 16, 2**26  # times the file's size; bytes that are always allowed
_HEADER = 2**24  # bytes of a .safetensors' header: some 100,000 tensors
_FEW = 1 / 16  # share of a remote file's bytes up to which tensors are read by range
_SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """A tensor's place in a file."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Piece:
    """A tensor of an open file: what it is, the bytes that reading it takes, and how."""

    header: Header
    size: int
    bytes: int  # of the tensor
    read: Callable[[], torch.Tensor]


def headers(uri: str) -> dict[str, Header]:
    """Names, dtypes and shapes of a file's tensors. Raises InputError naming the file."""
    if hub.is_hub(uri):
        return dict(_headers_at(hub.pin(uri)))
    return _guarded(uri, lambda: _headers(uri))


def outline(uri: str) -> dict[str, Any]:
    """What `read_pickle` gives, with a `Header` for each tensor: a few kB of a file that PyTorch wrote."""
    return _guarded(uri, lambda: _by_name(_outline(uri)))


def read(uri: str, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Tensors of a file by name, all or those of `names` that are there; floating ones as float32."""
    found = _guarded(uri, lambda: _read(uri, None if names is None else set(names)))
    return {name: t.float() if t.is_floating_point() else t for name, t in found.items()}


def read_pickle(uri: str) -> dict[str, Any]:
    """Everything in a .pt file: tensors (as stored), numbers, strings, containers."""

    def whole() -> dict[str, Any]:
        with remote.held(uri) as path:
            return _by_name(_whole(path))

    return _guarded(uri, whole)


def _guarded(uri: str, reader: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return reader()
    except InputError:
        raise
    except Exception as error:  # a damaged file raises what its reader happens to raise
        raise InputError(f"saes: cannot read {uri}: {one_line(error)}") from error


@lru_cache(maxsize=4096)
def _headers_at(uri: str) -> dict[str, Header]:
    """Of a file at a commit, which stays as it is: a file that holds several SAEs is asked about each."""
    return _guarded(uri, lambda: _headers(uri))


def _headers(uri: str) -> dict[str, Header]:
    def of(stream: IO[bytes]) -> dict[str, Header]:
        return {name: piece.header for name, piece in _pieces(uri, stream).items()}

    if _is_pickle(uri):
        return {name: value for name, value in _by_name(_outline(uri)).items() if isinstance(value, Header)}
    return _with_stream(uri, of)


def _with_stream(uri: str, use: Callable[[IO[bytes]], Any]) -> Any:
    """`use` of the file by range, or of its local copy where the server gives whole files only."""
    try:
        with remote.opened(uri) as stream:
            return use(stream)
    except remote.NoRanges:
        with remote.held(uri) as path, open(path, "rb") as stream:
            return use(stream)


def _read(uri: str, wanted: set[str] | None) -> dict[str, torch.Tensor]:
    if wanted is not None and remote.by_range(uri):
        found = _few(uri, wanted)
        if found is not None:
            return found
    with remote.held(uri) as path, open(path, "rb") as stream:
        pieces = {
            name: piece for name, piece in _pieces(uri, stream).items() if wanted is None or name in wanted
        }
        _check_expansion(stream, (piece.bytes for piece in pieces.values()))
        return {name: piece.read() for name, piece in pieces.items()}


def _few(uri: str, wanted: set[str]) -> dict[str, torch.Tensor] | None:
    """Small tensors of a remote file by range; None where that is not possible, or not small."""

    def of(stream: IO[bytes]) -> dict[str, torch.Tensor] | None:
        if _is_pickle(uri) and stream.read(4) != archives.MAGIC:
            return None
        pieces = {name: piece for name, piece in _pieces(uri, stream).items() if name in wanted}
        if sum(piece.size for piece in pieces.values()) > _FEW * stream.seek(0, io.SEEK_END):
            return None
        _check_expansion(stream, (piece.bytes for piece in pieces.values()))
        return {name: piece.read() for name, piece in pieces.items()}

    try:
        with remote.opened(uri) as stream:
            return of(stream)
    except remote.NoRanges:
        return None


def _check_expansion(stream: IO[bytes], sizes: Iterable[int]) -> None:
    """ValueError for tensors that the file's own size cannot account for."""
    total, size = sum(sizes), stream.seek(0, io.SEEK_END)
    if total > max(_SMALL, _EXPANSION * size):
        raise ValueError(f"its {size:,} bytes hold tensors of {total:,} bytes; no published SAE shrinks so")


def _is_pickle(uri: str) -> bool:
    return not uri.endswith((".npz", ".safetensors"))


def _pieces(uri: str, stream: IO[bytes]) -> dict[str, _Piece]:
    if uri.endswith(".npz"):
        return _npz(stream)
    return _torch(stream) if _is_pickle(uri) else _safetensors(stream)


def _npz(stream: IO[bytes]) -> dict[str, _Piece]:
    archive = archives.opened(stream)
    return {info.filename.removesuffix(".npy"): _npy(archive, stream, info) for info in archive.infolist()}


def _npy(archive: zipfile.ZipFile, stream: IO[bytes], info: zipfile.ZipInfo) -> _Piece:
    stream.seek(archives.start(stream, info))
    start = stream.read(min(info.compress_size, 512))
    if info.compress_type == zipfile.ZIP_DEFLATED:
        start = zlib.decompressobj(-15).decompress(start)
    member = io.BytesIO(start)
    version = np.lib.format.read_magic(member)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"{info.filename} is of version {version} of its format")
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with _ONE_HEADER:
        shape, _, dtype = header(member)
    size = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or min(shape, default=0) < 0 or size != info.file_size - member.tell():
        raise ValueError(
            f"{info.filename} is said to be {dtype} of shape {_short(shape)}, and has "
            f"{info.file_size - member.tell():,} bytes"
        )

    def read() -> torch.Tensor:
        with _ONE_HEADER, archive.open(info) as whole:
            return torch.from_numpy(np.lib.format.read_array(whole, allow_pickle=False))

    return _Piece(Header(str(dtype), shape), info.compress_size, size, read)


def _safetensors(stream: IO[bytes]) -> dict[str, _Piece]:
    whole = stream.seek(0, io.SEEK_END) - 8
    stream.seek(0)
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > min(whole, _HEADER):
        raise ValueError(f"its header is not one of safetensors, or larger than {_HEADER:,} bytes")
    header = json.loads(stream.read(length), object_pairs_hook=_each_once)
    if not isinstance(header, dict):
        raise ValueError("its header is not one of safetensors")

    def piece(name: str, entry: dict[str, Any]) -> _Piece:
        shape, (start, stop), dtype = tuple(entry["shape"]), entry["data_offsets"], entry["dtype"]
        if dtype not in _SAFETENSORS:
            raise ValueError(f"{name} is of dtype {dtype}; known are {', '.join(_SAFETENSORS)}")
        numbers = (*shape, start, stop)
        if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"{name} is said to be of shape {_short(shape)}, at {start} to {stop}")
        kind = _SAFETENSORS[dtype]
        if stop > whole - length or stop - start != math.prod(shape) * kind.itemsize:
            raise ValueError(
                f"{name} is said to be {dtype} of shape {_short(shape)}, at {start:,} to {stop:,} of "
                f"{whole - length:,} bytes"
            )

        def read() -> torch.Tensor:
            stream.seek(8 + length + start)
            data = pickles.filled(stream, stop - start)
            flat = torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)
            return flat.reshape(shape)

        return _Piece(Header(dtype, shape), stop - start, stop - start, read)

    return {name: piece(name, entry) for name, entry in header.items() if name != "__metadata__"}


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header has a key twice")
    return found


def _torch(stream: IO[bytes]) -> dict[str, _Piece]:
    saved = pickles.saved(stream)

    def piece(stored: pickles.Stored) -> _Piece:
        saved.check(stored)
        return _Piece(
            Header(stored.dtype, stored.shape), stored.span[1], stored.size, lambda: saved.read(stored)
        )

    named = _by_name(saved.value)
    return {name: piece(value) for name, value in named.items() if isinstance(value, pickles.Stored)}


def _outline(uri: str) -> Any:
    def of(stream: IO[bytes]) -> Any:
        saved = pickles.saved(stream)

        def header(stored: pickles.Stored) -> Header:
            saved.check(stored)
            return Header(stored.dtype, stored.shape)

        return _replace(saved.value, header)

    return _with_stream(uri, of)


def _whole(path: str) -> Any:
    with open(path, "rb") as stream:
        saved = pickles.saved(stream)
        sizes: list[int] = []

        def size(stored: pickles.Stored) -> None:
            saved.check(stored)
            sizes.append(stored.size)

        _replace(saved.value, size)
        _check_expansion(stream, sizes)
        return _replace(saved.value, saved.read)


def _replace(value: Any, of: Callable[[pickles.Stored], Any]) -> Any:
    """Containers as they are, with `of` each tensor in its place."""
    if isinstance(value, pickles.Stored):
        return of(value)
    if isinstance(value, dict):
        return {key: _replace(item, of) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_replace(item, of) for item in value)
    return value


def _by_name(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not tensors by name")
    return found


def _short(shape: tuple[int, ...]) -> str:
    text = str(shape)
    return text if len(text) <= 60 else f"{text[:59]}…"
