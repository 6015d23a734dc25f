"""The one storage door: every byte of an index is read and written here, on any fsspec filesystem.

Invariant: `put_if_absent` is atomic and crash-safe (a reader sees the whole object or none), and its
answer is true for exactly one caller; no name reaches outside the folder that was opened. fsspec's own
local `mode="create"` is exists-then-write, so local disk goes through a temporary sibling, fsync and
`os.link`; a filesystem without a conditional write is refused rather than degraded to last-writer-wins.
Faults of S3 are waited out below this door (`s3.py`); gcsfs (some 30 s) and adlfs have retries of their own,
without a brake, and what outlasts them is an infrastructure failure of the unit.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import importlib.util
import inspect
import io
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, TypeVar, cast

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from pipelines.faults import crash
from sae_runtime.errors import InputError, one_line

# Whose `mode="create"` is a conditional write, and by which library.
_CONDITIONAL = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_LOST = {"PreconditionFailed", "412"}  # from servers that leave out which condition, as s3fs wants it
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_LIBRARIES = {"aiohttp", "azure", "botocore", "gcsfs", "google", "requests"}
_ERRNO = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES, TimeoutError: errno.ETIMEDOUT}
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")  # of fsspec's info, best first
_SIDE_BY_SIDE = 32  # requests for small objects
_READ_AHEAD = 1 << 20  # bytes asked for at once of a remote stream; larger reads go through as they are
_memory_lock = threading.Lock()
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Entry:
    """An object of a listing."""

    name: str  # relative to the folder that was listed
    size: int  # bytes
    modified: float  # seconds, by the store's own clock


def open_filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """fsspec's filesystem and path of `uri`; of S3, one that waits faults out. ValueError, ImportError."""
    if ("s3://" in uri or "s3a://" in uri) and importlib.util.find_spec("s3fs"):
        from pipelines import s3  # noqa: F401  makes it what fsspec opens; slow to import
    fs, path = fsspec.core.url_to_fs(uri)
    return fs, cast(str, path)


class DataFile(io.RawIOBase):
    """A data file being written: counts and digests its bytes, reaches the disk when closed."""

    def __init__(self, stream: IO[Any], finish: Callable[[IO[Any]], None], drop: Callable[[IO[Any]], None]):
        """`finish` makes the object of what was written, `drop` ends without one."""
        self._stream, self._finish, self._drop = stream, finish, drop
        self._discarded = False
        self._digest = hashlib.blake2b(digest_size=16)
        self.bytes = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.bytes

    def write(self, data: Any) -> int:
        view = memoryview(data)
        if not self._discarded:  # a Parquet writer that is closed afterwards has a footer to write
            self._stream.write(view)
        self._digest.update(view)
        self.bytes += view.nbytes
        return view.nbytes

    def close(self) -> None:
        if self.closed:
            return
        if not self._discarded:
            self._finish(self._stream)
        super().close()

    def discard(self) -> None:
        """End without leaving an object. Never raises: what cannot be tidied away, no commit names."""
        if self.closed or self._discarded:
            return
        self._discarded = True
        with contextlib.suppress(Exception):  # each filesystem has errors of its own
            self._drop(self._stream)

    @property
    def digest(self) -> str:
        """blake2b-128 of everything written, hex."""
        return self._digest.hexdigest()


class Store:
    """A folder on a filesystem. Names are relative to it, with forward slashes.

    A name that is absolute, or has `..` or an empty part, is an InputError wherever one is given: names
    come out of files too. Objects whose last part begins with a dot are in no listing.
    """

    def __init__(self, uri: str) -> None:
        """Open the folder at `uri`, which need not exist. InputError for an unknown scheme."""
        try:
            self.fs, root = open_filesystem(uri)
        except (ValueError, ImportError) as error:
            raise InputError(f"index {uri}: {one_line(error)}") from error
        self.uri = uri
        self.root = root.rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """The filesystem's own path of `name`."""
        # s3fs reads a version out of a key; no object of ours has one.
        if "\0" in name or "?versionId=" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise InputError(f"index {self.uri}: {name!r} cannot be a name inside an index")
        return f"{self.root}/{name}"

    def url(self, name: str) -> str:
        """`name` as DuckDB opens it: a plain path on local disk, else with its scheme."""
        return self.path(name) if self.local else cast(str, self.fs.unstrip_protocol(self.path(name)))

    # --- reading

    def read(self, name: str) -> bytes:
        """The whole object. Raises FileNotFoundError."""
        path = self.path(name)
        if self.local:
            with open(path, "rb") as stream:
                return stream.read()
        with self._naming(name):
            return cast(bytes, self.fs.cat_file(path))

    def read_many(self, items: Sequence[str]) -> list[bytes]:
        """Whole objects, fetched side by side from a remote store. Raises FileNotFoundError."""
        return [self.read(name) for name in items] if self.local else _side_by_side(self.read, items)

    def open(self, name: str) -> IO[bytes]:
        """A seekable stream for one thread at a time. Raises FileNotFoundError."""
        if self.local:
            return open(self.path(name), "rb")
        raw = _Ranges(lambda start, stop: self.read_range(name, start, stop), self.size(name))
        return cast(IO[bytes], io.BufferedReader(raw, _READ_AHEAD))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of an object. Raises FileNotFoundError."""
        with self._naming(name):
            return bytes(self.fs.cat_file(self.path(name), start=start, end=stop))

    def exists(self, name: str) -> bool:
        """Whether there is such an object or folder."""
        path = self.path(name)
        self.fs.invalidate_cache()
        with self._naming(name):
            return bool(self.fs.exists(path))

    def size(self, name: str) -> int:
        """Bytes of an object. Raises FileNotFoundError."""
        return int(self._info(name)["size"])

    def modified(self, name: str) -> float:
        """When an object was written: seconds, by the store's own clock. Raises FileNotFoundError."""
        return _time(self._info(name))

    def now(self) -> float:
        """The store's own clock: seconds since the epoch, as `modified` has them; S3 drops the fraction.

        It is read off an object that is written for it, hidden from listings.
        """
        probe = f".clock-{uuid.uuid4().hex}"
        self.write(probe, b"")
        try:
            return self.modified(probe)
        finally:
            self.remove([probe])

    def _info(self, name: str) -> dict[str, Any]:
        path = self.path(name)
        self.fs.invalidate_cache()
        with self._naming(name):
            found: dict[str, Any] = self.fs.info(path)
            if found["type"] == "directory":
                raise FileNotFoundError(errno.ENOENT, "there is a folder, not an object", path)
            return found

    # --- listing; `folder` may be "", the whole store

    def entries(self, folder: str) -> list[str]:
        """Names of the objects under `folder` (relative to it), sorted; empty if there is none."""
        return sorted(self._walk(folder)) if self.local else [entry.name for entry in self._find(folder)]

    def details(self, folder: str, hidden: bool = False) -> list[Entry]:
        """The same objects with their size and time; or, with `hidden`, those that are in no listing.

        Hidden ones are of a moment: what is old of them was left by a process that was killed.
        """
        if not self.local:
            return self._find(folder, hidden)
        found = []
        for name in sorted(self._walk(folder, hidden)):
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                state = os.stat(os.path.join(self._folder(folder), name))
                found.append(Entry(name, state.st_size, state.st_mtime))
        return found

    def folders(self, folder: str) -> list[str]:
        """Names of the folders directly inside `folder`, sorted; local disk knows empty ones too."""
        base = self._folder(folder)
        self.fs.invalidate_cache()
        try:
            with self._naming(folder):
                found = self.fs.ls(base, detail=True)
        except FileNotFoundError:
            return []
        names = {item["name"].rstrip("/").rsplit("/", 1)[-1] for item in found if item["type"] == "directory"}
        return sorted(name for name in names if not name.startswith("."))

    def _folder(self, folder: str) -> str:
        return self.path(folder) if folder else self.root

    def _walk(self, folder: str, hidden: bool = False) -> Iterator[str]:
        """Local objects under `folder`; a file or folder that goes away meanwhile is left out."""

        def failed(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        base = self._folder(folder)
        for place, _, files in os.walk(base, onerror=failed):
            inside = place[len(base) + 1 :].replace(os.sep, "/")
            for file in files:
                if file.startswith(".") == hidden:
                    yield f"{inside}/{file}" if inside else file

    def _find(self, folder: str, hidden: bool = False) -> list[Entry]:
        base = self._folder(folder)
        self.fs.invalidate_cache()
        try:
            with self._naming(folder):
                found = self.fs.find(base, detail=True)
        except FileNotFoundError:
            return []
        entries = [
            Entry(path[len(base) + 1 :], int(info["size"]), _time(info))
            for path, info in found.items()
            if path.startswith(f"{base}/") and path.rsplit("/", 1)[-1].startswith(".") == hidden
        ]
        return sorted(entries, key=lambda entry: entry.name)

    # --- writing

    def write(self, name: str, data: bytes) -> None:
        """Write or replace an object; on local disk by rename, so no reader sees half of it."""
        path = self.path(name)
        if self.local:
            with self._sibling(path, data) as temporary:
                os.replace(temporary, path)
            return
        with self._naming(name):
            self.fs.pipe_file(path, data)

    def create(self, name: str) -> DataFile:
        """A stream for a new object of an attempt-unique name."""
        path = self.path(name)
        if self.local:
            _make_folder(os.path.dirname(path))
            return DataFile(open(path, "xb"), _to_disk, _off_disk)

        def finish(stream: IO[Any]) -> None:
            with self._naming(name):
                stream.close()

        def drop(stream: Any) -> None:
            if not isinstance(stream, AbstractBufferedFile):  # in memory: it is there from its opening
                stream.close()
                self.fs.rm_file(path)
                return
            try:
                stream.discard()  # an upload in parts is called off
            finally:
                stream.closed = True  # else it is uploaded when it is collected

        with self._naming(name):
            return DataFile(self.fs.open(path, "wb"), finish, drop)

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects, many at once where the filesystem can. One that is missing is no error."""
        paths = [self.path(name) for name in names]
        if not paths:
            return
        if hasattr(self.fs, "remove_objects"):
            with self._naming(names[0]):
                self.fs.remove_objects(paths)
            return

        def remove(name: str) -> None:
            with contextlib.suppress(FileNotFoundError), self._naming(name):
                (os.unlink if self.local else self.fs.rm_file)(self.path(name))

        if self.local:
            for name in names:
                remove(name)
                crash("object-removed")
        else:
            _side_by_side(remove, names)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Create the object unless one is there. True for the caller who created it, and only for that one.

        A lost answer (the write was applied, the reply was not received) is told apart from a lost race
        by reading the object back, so `data` must be like no other caller's: put an attempt id in. When
        several write the same bytes and an answer is lost, each of them may be told True.
        Raises InputError where the filesystem cannot do this, and an OSError where no answer came in time:
        the object may be there then.
        """
        path = self.path(name)
        if self.local:
            return self._link_if_absent(path, data)
        protocol = _protocol(self.fs)
        if protocol == "memory":
            with _memory_lock:
                if self.fs.exists(path):
                    return False
                self.fs.pipe_file(path, data)
                return True
        if protocol not in _CONDITIONAL:
            raise InputError(
                f"index: {protocol}:// has no atomic create, so commits would not be safe; "
                "use local disk, s3://, gs:// or abfs://"
            )
        parameters = inspect.signature(getattr(self.fs, "_pipe_file", self.fs.pipe_file)).parameters
        if not {"mode", "overwrite"} & set(parameters):  # adlfs takes `mode` among its `kwargs`
            library = _CONDITIONAL[protocol]
            raise InputError(
                f"index {self.uri}: {library} is too old to create objects atomically; upgrade it"
            )
        with self._naming(name):
            try:
                self.fs.pipe_file(path, data, mode="create")
                return True
            except FileExistsError:
                pass
            except OSError as error:
                answer = getattr(error.__cause__, "response", None) or {}  # botocore's
                if answer.get("Error", {}).get("Code") not in _LOST:
                    raise
            return self.read(name) == data

    def _link_if_absent(self, path: str, data: bytes) -> bool:
        with self._sibling(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                # An NFS client asks again when an answer is lost, and finds the link that it made.
                return os.stat(temporary).st_nlink > 1
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                raise InputError(
                    f"index {self.uri}: this disk has no hard links, so commits would not be safe; "
                    "use another disk, s3://, gs:// or abfs://"
                ) from error
            crash("put-linked")
        _sync_folder(os.path.dirname(path))
        return True

    @contextlib.contextmanager
    def _sibling(self, path: str, data: bytes) -> Iterator[str]:
        """A hidden file with `data`, on the disk, in the folder of `path`; it is gone afterwards."""
        folder = os.path.dirname(path)
        _make_folder(folder)
        temporary = os.path.join(folder, f".{uuid.uuid4().hex}")
        try:
            with open(temporary, "xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            crash("temporary-written")
            yield temporary
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Make what a remote filesystem raises an OSError that names the object, as local disk does.

        Errors of the libraries below that are none become a ConnectionError here, or a PermissionError where
        credentials are at fault; what they try again themselves has been tried by then.
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
            if self.local or type(error).__module__.split(".")[0] not in _LIBRARIES:
                raise
            kind = PermissionError if _refused(error) else ConnectionError
            raise kind(f"index {self.uri}: {one_line(error)}") from error


class _Ranges(io.RawIOBase):
    """A remote object as a seekable stream: each read asks for its bytes."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        self._fetch, self._size, self._at = fetch, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, (0, self._at, self._size)[whence] + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._size, self._at + len(buffer))
        data = self._fetch(self._at, stop) if stop > self._at else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _side_by_side(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    if not items:
        return []
    with ThreadPoolExecutor(min(_SIDE_BY_SIDE, len(items))) as pool:
        return list(pool.map(function, items))


def _refused(error: Exception) -> bool:
    """Whether an error of those libraries is of credentials: by its class, or the status of the answer."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(error, "status_code", None) or getattr(error, "code", None)  # azure-core's, gcsfs's
    if "TransportError" in kinds:  # google-auth's own way of saying that there is no network
        return False
    named = kinds & {"ClientAuthenticationError", "GoogleAuthError"} or "Credential" in type(error).__name__
    return bool(named) or str(status) in ("401", "403")


def _protocol(fs: AbstractFileSystem) -> str:
    return cast(str, fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0])


def _time(info: dict[str, Any]) -> float:
    """When an object was written, of fsspec's info: seconds since the epoch."""
    found = next(info[key] for key in _TIMES if info.get(key))
    if isinstance(found, str):  # gcsfs
        found = datetime.datetime.fromisoformat(found.replace("Z", "+00:00"))
    return float(found.timestamp() if isinstance(found, datetime.datetime) else found)


def _to_disk(stream: IO[Any]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
    _sync_folder(os.path.dirname(stream.name))


def _off_disk(stream: IO[Any]) -> None:
    stream.close()
    os.unlink(stream.name)


def _make_folder(folder: str) -> None:
    """Make a folder and those above it, each on the disk: what is in it is no safer than its own entry."""
    if os.path.isdir(folder):
        return
    above = os.path.dirname(folder)
    _make_folder(above)
    os.makedirs(folder, exist_ok=True)  # somebody else may have made it meanwhile
    _sync_folder(above)


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def names(store: Store, folder: str, suffix: str) -> Iterator[str]:
    """Objects of `folder` that end with `suffix`, without it."""
    return (name[: -len(suffix)] for name in store.entries(folder) if name.endswith(suffix))
