"""The files of suites wherever they are: a few bytes by range for listings, whole local copies for tensors.

Invariant: a range read fetches what was asked for, rounded up to 2 kB, and nothing ahead of it. A local
copy is whole or not there; it is found again by the file's URI and stamp (etag, size, time), so that a
file that changed is fetched anew, and by whichever process comes first.
Trade-off: fsspec's own read caches fetch 5 MB for a header; with these the listing of a Gemma Scope
archive of 300 MB takes six requests and 12 kB.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import fsspec
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem

from sae_runtime import hub
from sae_runtime.cache import cache_dir

BLOCK = 2048  # bytes, the least that is fetched at once
_STAMPS = (
    "ETag", "etag", "Content-MD5", "md5Hash", "generation", "version_id",
    "LastModified", "Last-Modified", "last_modified", "updated", "mtime", "created",
)  # fmt: skip  # of fsspec's filesystems


class NoRanges(Exception):
    """The server gives whole files only."""


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
    path = here(uri)
    if path is not None:
        with open(path, "rb") as stream:
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


def has_copy(uri: str) -> bool:
    """Whether `local` would give a path without a download."""
    return here(uri) is not None or (not hub.is_hub(uri) and _target(uri).exists())


def local(uri: str) -> str:
    """The path of a local file, or of a whole local copy of a remote one."""
    if hub.is_hub(uri):
        return hub.download(hub.parse(hub.pin(uri)))
    fs, path = fsspec.core.url_to_fs(uri)
    if isinstance(fs, LocalFileSystem):
        return str(path)
    target = _target(uri)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / ".lock"):  # the other workers of a machine want the same file
            if not target.exists():
                _copy(fs, path, target)
    return str(target)


def read_bytes(uri: str, limit: int) -> bytes:
    """A whole small file, of a hub by its cache. Raises ValueError where it has more than `limit` bytes."""
    fs, path = fsspec.core.url_to_fs(local(uri) if hub.is_hub(uri) else uri)
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
    fs.invalidate_cache(fs._parent(path))  # an object store's filesystem remembers its listings
    info: dict[str, Any] = fs.info(path)
    found = [f"{key}={info[key]}" for key in ("size", *_STAMPS) if info.get(key) is not None]
    return " ".join(found) or str(time.time_ns())


def _target(uri: str) -> Path:
    """Where the copy of a file as it is now belongs."""
    digest = hashlib.blake2b(f"{uri} {stamp(uri)}".encode(), digest_size=16).hexdigest()
    return cache_dir() / "suites" / digest / uri.rsplit("/", 1)[-1].split("?")[0]


def _copy(fs: fsspec.AbstractFileSystem, path: str, target: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".part-", delete=False) as part:
        pass
    try:
        fs.get_file(path, part.name)
        size = fs.info(path).get("size")
        if size is not None and os.path.getsize(part.name) != size:
            raise OSError(f"{os.path.getsize(part.name)} bytes came for {size}")
        os.replace(part.name, target)
    finally:
        Path(part.name).unlink(missing_ok=True)
