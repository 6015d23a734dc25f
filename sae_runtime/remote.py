"""The files of suites wherever they are: a few bytes by range for listings, whole local copies for tensors.

Invariant: a range read fetches what was asked for, rounded up to 2 kB, and nothing ahead of it. A local
copy is whole or not there; it is found again by the file's URI and stamp (etag, size, time), so that a
file that changed is fetched anew, and by whichever process comes first (`cache.py`). A file of the hub that
can be had elsewhere (`offer`) is never asked of the hub: its copy is known by its content, and checked.
Trade-off: fsspec's own read caches fetch 5 MB for a header; with these the listing of a Gemma Scope
archive of 300 MB takes six requests and 12 kB.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from sae_runtime import cache, hub

BLOCK = 2048  # bytes, the least that is fetched at once
_STAMPS = (
    "ETag", "etag", "Content-MD5", "md5Hash", "generation", "version_id",
    "LastModified", "Last-Modified", "last_modified", "updated", "mtime", "created",
)  # fmt: skip  # of fsspec's filesystems


class NoRanges(Exception):
    """The server gives whole files only."""


@dataclass(frozen=True)
class Elsewhere:
    """Where a file of the hub can be had instead of there."""

    size: int  # bytes
    digest: str  # of its content
    fetch: Callable[[Path], None]  # writes it; FileNotFoundError where it is gone, then the hub is asked


_elsewhere: dict[str, Elsewhere] = {}  # by the pinned URI


def offer(files: Mapping[str, Elsewhere]) -> None:
    """From now on this process has these files of the hub, by pinned URI, from elsewhere."""
    _elsewhere.update(files)


class Ranged(io.RawIOBase):
    """A seekable file over `fetch(start, stop)`; the last bytes come together, as zip needs them."""

    def __init__(self, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self.size, self._fetch, self._at = size, fetch, 0
        self._pieces: list[tuple[int, bytes]] = []

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, length: int | None = -1) -> bytes:
        """Bytes from here on, fewer than `length` at the end only. Raises OSError where some are missing."""
        stop = self.size if length is None or length < 0 else min(self.size, self._at + length)
        if stop <= self._at:
            return b""
        start, piece = next(
            (p for p in self._pieces if p[0] <= self._at and stop <= p[0] + len(p[1])), (0, b"")
        )
        if not piece:
            start = min(self._at, max(0, self.size - BLOCK))
            end = min(self.size, max(stop, start + BLOCK))
            piece = self._fetch(start, end)
            if len(piece) != end - start:
                raise OSError(f"{len(piece)} bytes came for {end - start}")
            self._pieces = [*self._pieces[-3:], (start, piece)] if len(piece) <= BLOCK else self._pieces
        found = piece[self._at - start : stop - start]
        self._at = stop
        return found


@contextmanager
def opened(uri: str) -> Iterator[IO[bytes]]:
    """A file for a few small reads. Raises NoRanges where only the whole file can be had."""
    if not by_range(uri):
        with held(uri) as path, open(path, "rb") as stream:
            yield stream
        return
    if hub.is_hub(uri):
        place = hub.parse(hub.pin(uri))
        (entry,) = hub.entries([place]).values()
        yield cast(IO[bytes], Ranged(entry.size, lambda start, stop: hub.fetch(place, start, stop)))
        return
    fs, path = fsspec.core.url_to_fs(uri)
    with fs.open(path, "rb", cache_type="none") as remote:
        try:
            remote.seek(0, io.SEEK_END)
        except ValueError as error:
            raise NoRanges from error
        size = remote.tell()

        def fetch(start: int, stop: int) -> bytes:
            try:
                remote.seek(start)
                return bytes(remote.read(stop - start))
            except ValueError as error:
                raise NoRanges from error

        yield cast(IO[bytes], Ranged(size, fetch))


def here(uri: str) -> str | None:
    """The path of a local file, or of the local copy of a hub's; None where bytes have to travel."""
    if hub.is_hub(uri):
        return hub.cached(hub.parse(hub.pin(uri)))
    fs, path = fsspec.core.url_to_fs(uri)
    return str(path) if isinstance(fs, LocalFileSystem) else None


def by_range(uri: str) -> bool:
    """Whether a few bytes of a file are had more cheaply than by `held`: where that would be a download."""
    if here(uri) is not None:
        return False
    return hub.pin(uri) not in _elsewhere if hub.is_hub(uri) else not cache.has(_key(uri, stamp(uri)))


@contextmanager
def held(uri: str) -> Iterator[str]:
    """The path of a local file, or of a whole local copy of a remote one, which stays while this is entered.

    InputError where there is no room for the copy.
    """
    with ExitStack() as stack:
        if hub.is_hub(uri):
            path = _of_hub(hub.parse(hub.pin(uri)), stack)
        else:
            fs, path = fsspec.core.url_to_fs(uri)
            if not isinstance(fs, LocalFileSystem):
                path = _of(uri, fs, path, stack)
        yield str(path)


def _of_hub(place: hub.Place, stack: ExitStack) -> str:
    known = _elsewhere.get(place.uri)
    if known is None or hub.cached(place) is not None:
        return hub.download(place)
    name = place.path.rsplit("/", 1)[-1]

    def fill(folder: Path) -> None:
        known.fetch(folder / name)

    try:
        return str(stack.enter_context(cache.held(known.digest, known.size, fill, place.uri)) / name)
    except FileNotFoundError:  # `gc` took it: the commit says that the hub's bytes are the same
        return hub.download(place)


def _of(uri: str, fs: fsspec.AbstractFileSystem, path: str, stack: ExitStack) -> str:
    fs.invalidate_cache(fs._parent(path))  # an object store's filesystem remembers its listings
    info = fs.info(path)
    name = uri.rsplit("/", 1)[-1].split("?")[0]

    def fill(folder: Path) -> None:
        fs.get_file(path, str(folder / name))
        came = (folder / name).stat().st_size
        if info.get("size") not in (None, came):
            raise OSError(f"{came} bytes of {uri} came for {info['size']}")

    key = _key(uri, _changes(info))
    return str(stack.enter_context(cache.held(key, info.get("size") or 0, fill, uri)) / name)


def read_bytes(uri: str, limit: int) -> bytes:
    """A whole small file, of a hub by its cache. Raises ValueError where it has more than `limit` bytes."""
    if hub.is_hub(uri):
        with held(uri) as local, open(local, "rb") as small:
            data = small.read(limit + 1)
    else:
        fs, path = fsspec.core.url_to_fs(uri)
        with fs.open(path, "rb", block_size=limit + 1) as stream:
            data = bytes(stream.read(limit + 1))
    if len(data) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return data


def stamp(uri: str) -> str:
    """What changes when the file does (of a hub, its commit), and always where its filesystem cannot tell."""
    if hub.is_hub(uri):
        return hub.pin(uri)
    fs, path = fsspec.core.url_to_fs(uri)
    if isinstance(fs, LocalFileSystem):
        status = os.stat(path)
        return f"{status.st_size} {status.st_mtime_ns}"
    fs.invalidate_cache(fs._parent(path))
    return _changes(fs.info(path))


def _changes(info: Mapping[str, Any]) -> str:
    found = [f"{key}={info[key]}" for key in ("size", *_STAMPS) if info.get(key) is not None]
    return " ".join(found) or str(time.time_ns())


def _key(uri: str, stamped: str) -> str:
    """What a copy of a file is known by."""
    return hashlib.blake2b(f"{uri} {stamped}".encode(), digest_size=16).hexdigest()
