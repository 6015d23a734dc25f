"""The one storage door: every byte of an index is read and written here, on any fsspec filesystem.

Invariant: `put_if_absent` is atomic and crash-safe (a reader sees the whole object or none), and its
answer is true for exactly one caller. fsspec's own local `mode="create"` is exists-then-write, so
local disk goes through a temporary sibling, fsync and `os.link`; a filesystem without a conditional
write is refused rather than degraded to last-writer-wins.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import inspect
import io
import os
import threading
import time
import uuid
from collections.abc import Iterator
from typing import IO, Any, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from sae_runtime.errors import InputError, one_line

_CONDITIONAL = {"s3", "s3a", "gs", "gcs", "abfs", "az"}  # their `mode="create"` is a conditional write
_LOST = {"PreconditionFailed", "412"}  # from servers that leave out which condition, as s3fs wants it
_CONFLICT = {"ConditionalRequestConflict", "409"}  # S3: two creations met, neither is done; try again
_CONFLICT_TRIES = 8
_ERRNO = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES, TimeoutError: errno.ETIMEDOUT}
_memory_lock = threading.Lock()


class DataFile(io.RawIOBase):
    """A data file being written: counts and digests its bytes, reaches the disk when closed."""

    def __init__(self, stream: IO[Any], sync: bool) -> None:
        self._stream, self._sync = stream, sync
        self._digest = hashlib.blake2b(digest_size=16)
        self.bytes = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.bytes

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._stream.write(view)
        self._digest.update(view)
        self.bytes += view.nbytes
        return view.nbytes

    def close(self) -> None:
        if self.closed:
            return
        if self._sync:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self._stream.close()
        super().close()

    @property
    def digest(self) -> str:
        """blake2b-128 of everything written, hex."""
        return self._digest.hexdigest()


class Store:
    """A folder on a filesystem. Paths are relative to it, with forward slashes."""

    def __init__(self, uri: str) -> None:
        """Open the folder at `uri`, which need not exist. InputError for an unknown scheme."""
        try:
            self.fs, root = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise InputError(f"index {uri}: {one_line(error)}") from error
        self.uri = uri
        self.root = cast(str, root).rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """The filesystem's own path of `name`."""
        return f"{self.root}/{name}"

    def url(self, name: str) -> str:
        """`name` as DuckDB opens it: a plain path on local disk, else with its scheme."""
        return self.path(name) if self.local else self.fs.unstrip_protocol(self.path(name))

    def read(self, name: str) -> bytes:
        """The whole object. Raises FileNotFoundError."""
        self.fs.invalidate_cache()
        with self._naming(name):
            return cast(bytes, self.fs.cat_file(self.path(name)))

    def exists(self, name: str) -> bool:
        self.fs.invalidate_cache()
        with self._naming(name):
            return bool(self.fs.exists(self.path(name)))

    def entries(self, folder: str) -> list[str]:
        """Names of the objects under `folder` (relative to it), sorted; empty if there is none."""
        self.fs.invalidate_cache()
        base = self.path(folder)
        try:
            with self._naming(folder):
                found = self.fs.find(base)
        except FileNotFoundError:
            return []
        skip = len(base) + 1
        return sorted(p[skip:] for p in found if not p.rsplit("/", 1)[-1].startswith("."))

    def write(self, name: str, data: bytes) -> None:
        """Write or replace an object; on local disk by rename, so no reader sees half of it."""
        if not self.local:
            with self._naming(name):
                self.fs.pipe_file(self.path(name), data)
            return
        temporary = self._write_sibling(name, data)
        os.replace(temporary, self.path(name))

    def read_many(self, items: list[str]) -> list[bytes]:
        """Whole objects, fetched side by side where the filesystem can."""
        if not items:
            return []
        with self._naming(items[0]):
            found = self.fs.cat([self.path(name) for name in items])
        return [cast(bytes, found[self.path(name)]) for name in items]

    def create(self, name: str) -> DataFile:
        """A stream for a new object of an attempt-unique name."""
        if self.local:
            os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
            return DataFile(open(self.path(name), "xb"), sync=True)
        with self._naming(name):
            return DataFile(self.fs.open(self.path(name), "wb"), sync=False)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Create the object unless one is there. True for the caller who created it.

        A lost answer (the write was applied, the reply was not received) is told apart from a lost
        race by reading the object back. Raises InputError where the filesystem cannot do this.
        """
        if self.local:
            return self._link_if_absent(name, data)
        protocol = self.fs.protocol if isinstance(self.fs.protocol, str) else self.fs.protocol[0]
        if protocol == "memory":
            with _memory_lock:
                if self.fs.exists(self.path(name)):
                    return False
                self.fs.pipe_file(self.path(name), data)
                return True
        if protocol not in _CONDITIONAL:
            raise InputError(
                f"index: {protocol}:// has no atomic create, so commits would not be safe; "
                "use local disk, s3://, gs:// or abfs://"
            )
        parameters = inspect.signature(getattr(self.fs, "_pipe_file", self.fs.pipe_file)).parameters
        if not {"mode", "overwrite"} & set(parameters):  # adlfs takes `mode` among its `kwargs`
            raise InputError(
                f"index {self.uri}: {type(self.fs).__module__.split('.')[0]} is too old to create objects "
                "atomically; upgrade it"
            )
        with self._naming(name):
            return self._create_remote(name, data)

    def _create_remote(self, name: str, data: bytes) -> bool:
        for attempt in range(_CONFLICT_TRIES):
            try:
                self.fs.pipe_file(self.path(name), data, mode="create")
                return True
            except FileExistsError:
                break
            except OSError as error:
                code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
                if code in _LOST:
                    break
                if code not in _CONFLICT or attempt + 1 == _CONFLICT_TRIES:
                    raise
                time.sleep(0.05 * 2**attempt)
        return self.read(name) == data

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Make what a remote filesystem raises an OSError that names the object, as local disk does.

        botocore's errors are none: no connection is a ConnectionError here, no credentials a
        PermissionError.
        """
        try:
            yield
        except OSError as error:
            if not self.local and error.filename is None:
                error.strerror = error.strerror or one_line(error)
                error.errno = error.errno or _ERRNO.get(type(error), errno.EIO)
                error.filename = f"{self.uri.rstrip('/')}/{name}"
            raise
        except Exception as error:
            if self.local or not type(error).__module__.startswith("botocore."):
                raise
            kind = PermissionError if "Credential" in type(error).__name__ else ConnectionError
            raise kind(f"index {self.uri}: {one_line(error)}") from error

    def _link_if_absent(self, name: str, data: bytes) -> bool:
        temporary = self._write_sibling(name, data)
        try:
            os.link(temporary, self.path(name))
        except FileExistsError:
            return False
        finally:
            os.unlink(temporary)
        _sync_folder(os.path.dirname(self.path(name)))
        return True

    def _write_sibling(self, name: str, data: bytes) -> str:
        folder, base = os.path.split(self.path(name))
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, f".{base}.{uuid.uuid4().hex[:8]}")
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        return temporary


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def names(store: Store, folder: str, suffix: str) -> Iterator[str]:
    """Objects of `folder` that end with `suffix`, without it."""
    return (name[: -len(suffix)] for name in store.entries(folder) if name.endswith(suffix))
