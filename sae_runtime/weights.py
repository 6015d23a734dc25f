"""Reading weight files: what is in them without reading it all, and tensors. No code runs from a file.

    .npz            zip of .npy     the central directory, and the header of each member
    .safetensors                    the JSON header
    .pt .pth        torch's zip     its pickle, without the tensors; files from before PyTorch 1.6 whole

Invariant: `headers` and `outline` read a few kB of a file however large and wherever it is; tensors come
from a local file, or from the local copy of a remote one, but for a few small ones of a file that is not
here, which are read by range. Floating tensors come out as float32, integers as they are, and all own
their memory, whatever happens to the file later.
"""

from __future__ import annotations

import io
import json
import pickle
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

from sae_runtime import hub, pickles, remote
from sae_runtime.errors import InputError, one_line

# numpy reads a header with `ast`, which fails in two threads at once before Python 3.13 (its issue 106905).
_ONE_HEADER = threading.Lock()
_FEW = 1 / 16  # share of a remote file's bytes up to which tensors are read by range
_SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
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
    read: Callable[[], torch.Tensor]


def headers(uri: str) -> dict[str, Header]:
    """Names, dtypes and shapes of a file's tensors. Raises InputError naming the file."""
    if hub.is_hub(uri):
        return dict(_headers_at(hub.pin(uri)))
    return _guarded(uri, lambda: _headers(uri))


def outline(uri: str) -> dict[str, Any]:
    """What `read_pickle` gives, with a `Header` for each tensor: a few kB of a file that PyTorch wrote."""
    return _guarded(uri, lambda: _by_name(_replace(_outline(uri))))


def read(uri: str, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Tensors of a file by name, all or those of `names` that are there; floating ones as float32."""
    found = _guarded(uri, lambda: _read(uri, None if names is None else set(names)))
    return {name: t.float() if t.is_floating_point() else t for name, t in found.items()}


def read_pickle(uri: str) -> dict[str, Any]:
    """Everything in a .pt file: tensors (as stored), numbers, strings, containers."""
    return _guarded(uri, lambda: _pickle(remote.local(uri), "cpu"))


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
        return {
            name: value
            for name, value in _by_name(_replace(_outline(uri))).items()
            if isinstance(value, Header)
        }
    return _with_stream(uri, of)


def _with_stream(uri: str, use: Callable[[IO[bytes]], Any]) -> Any:
    """`use` of the file by range, or of its local copy where the server gives whole files only."""
    try:
        with remote.opened(uri) as stream:
            return use(stream)
    except remote.NoRanges:
        with open(remote.local(uri), "rb") as stream:
            return use(stream)


def _read(uri: str, wanted: set[str] | None) -> dict[str, torch.Tensor]:
    if wanted is not None and not remote.has_copy(uri):
        found = _few(uri, wanted)
        if found is not None:
            return found

    def take(name: str) -> bool:
        return wanted is None or name in wanted

    path = remote.local(uri)
    if uri.endswith(".npz"):
        with np.load(path, allow_pickle=False) as archive:
            found = {}
            for name in filter(take, archive.files):
                with _ONE_HEADER:
                    found[name] = torch.from_numpy(archive[name])
            return found
    if uri.endswith(".safetensors"):
        from safetensors import safe_open

        with safe_open(path, "pt") as file:  # mapped: only the named tensors are read
            return {name: file.get_tensor(name).clone() for name in file.keys() if take(name)}  # noqa: SIM118
    mapped = _pickle(path, "cpu", mapped=True)
    return {name: t.clone() for name, t in mapped.items() if isinstance(t, torch.Tensor) and take(name)}


def _few(uri: str, wanted: set[str]) -> dict[str, torch.Tensor] | None:
    """Small tensors of a remote file by range; None where that is not possible, or not small."""

    def of(stream: IO[bytes]) -> dict[str, torch.Tensor] | None:
        if _is_pickle(uri) and stream.read(4) != pickles.MAGIC:
            return None
        pieces = {name: piece for name, piece in _pieces(uri, stream).items() if name in wanted}
        if sum(piece.size for piece in pieces.values()) > _FEW * stream.seek(0, io.SEEK_END):
            return None
        return {name: piece.read() for name, piece in pieces.items()}

    try:
        with remote.opened(uri) as stream:
            return of(stream)
    except remote.NoRanges:
        return None


def _is_pickle(uri: str) -> bool:
    return not uri.endswith((".npz", ".safetensors"))


def _pieces(uri: str, stream: IO[bytes]) -> dict[str, _Piece]:
    if uri.endswith(".npz"):
        return _npz(stream)
    return _torch(stream) if _is_pickle(uri) else _safetensors(stream)


def _npz(stream: IO[bytes]) -> dict[str, _Piece]:
    archive = zipfile.ZipFile(stream)
    return {info.filename.removesuffix(".npy"): _npy(archive, stream, info) for info in archive.infolist()}


def _npy(archive: zipfile.ZipFile, stream: IO[bytes], info: zipfile.ZipInfo) -> _Piece:
    """`ZipFile.open` reads 4 kB at least, so the member's own header is read here."""
    stream.seek(info.header_offset)
    fixed = stream.read(30)
    if fixed[:4] != pickles.MAGIC:
        raise zipfile.BadZipFile(f"{info.filename} is not where the archive says")
    lengths = struct.unpack("<HH", fixed[26:])
    stream.seek(sum(lengths), io.SEEK_CUR)
    start = stream.read(min(info.compress_size, 512))
    if info.compress_type == zipfile.ZIP_DEFLATED:
        start = zlib.decompressobj(-15).decompress(start)
    member = io.BytesIO(start)
    version = np.lib.format.read_magic(member)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with _ONE_HEADER:
        shape, _, dtype = header(member)

    def read() -> torch.Tensor:
        whole = io.BytesIO(archive.read(info))
        with _ONE_HEADER:
            return torch.from_numpy(np.lib.format.read_array(whole, allow_pickle=False))

    return _Piece(Header(str(dtype), shape), info.compress_size, read)


def _safetensors(stream: IO[bytes]) -> dict[str, _Piece]:
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > 100_000_000:
        raise ValueError("its header is not one of safetensors")
    header = json.loads(stream.read(length))

    def piece(entry: dict[str, Any]) -> _Piece:
        shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]

        def read() -> torch.Tensor:
            stream.seek(8 + length + start)
            dtype = _SAFETENSORS[entry["dtype"]]
            data = bytearray(stream.read(stop - start))
            return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(
                shape
            )

        return _Piece(Header(entry["dtype"], shape), stop - start, read)

    return {name: piece(entry) for name, entry in header.items() if name != "__metadata__"}


def _torch(stream: IO[bytes]) -> dict[str, _Piece]:
    archive = zipfile.ZipFile(stream)

    def piece(stored: pickles.Stored) -> _Piece:
        info = archive.getinfo(stored.member)
        return _Piece(
            Header(stored.dtype, stored.shape), info.file_size, lambda: stored.tensor(archive.read(info))
        )

    saved = _by_name(pickles.outline(archive))
    return {name: piece(value) for name, value in saved.items() if isinstance(value, pickles.Stored)}


def _outline(uri: str) -> Any:
    def of(stream: IO[bytes]) -> Any:
        if stream.read(4) != pickles.MAGIC:
            return None
        return pickles.outline(zipfile.ZipFile(stream))

    found = _with_stream(uri, of)
    return _pickle(remote.local(uri), "meta") if found is None else found


def _replace(value: Any) -> Any:
    """Containers as they are, with a header for each tensor."""
    if isinstance(value, pickles.Stored):
        return Header(value.dtype, value.shape)
    if isinstance(value, torch.Tensor):
        return Header(str(value.dtype).removeprefix("torch."), tuple(value.shape))
    if isinstance(value, dict):
        return {key: _replace(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_replace, value))
    return value


def _pickle(path: str, device: str, mapped: bool = False) -> dict[str, Any]:
    with open(path, "rb") as stream:
        mapped = mapped and stream.read(4) == pickles.MAGIC
    try:
        found = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(
            "it is damaged, or holds more than tensors and containers, and no code is run"
        ) from error
    return _by_name(found)


def _by_name(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not tensors by name")
    return found
