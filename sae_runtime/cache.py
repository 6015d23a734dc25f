"""Where Corpuscope keeps what it can make again: copies of remote files, converted models, compiled loops.

    copies/<key>/            files as they were when they were fetched; .bytes says how many bytes they are
    copies/.part-<key>/      the same while they come
    locks/<key>              held shared by whoever uses a copy, alone by whoever fetches or removes it

Invariant: a copy is whole or not there, is fetched by one process of a machine, and never goes while a live
process uses it. Locks are the kernel's, so a process that is killed holds none; what it left is removed by
the next one that makes room. The folder is this machine's: locks on network disks are not to be relied on.
Budget: what does not fit into $CORPUSCOPE_CACHE_BYTES, or onto the disk, sends the copies away that were
longest not used. Converted models and compiled loops are neither counted nor removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sae_runtime.errors import InputError

_SIZE = ".bytes"
_NEXT_LOOK = 0.2  # seconds between looks whether others have ended with their copies
_for_good = contextlib.ExitStack()  # what this process uses until it ends


def cache_dir() -> Path:
    """$CORPUSCOPE_CACHE, else ~/.cache/corpuscope."""
    return Path(os.environ.get("CORPUSCOPE_CACHE") or Path.home() / ".cache" / "corpuscope")


def budget() -> int | None:
    """$CORPUSCOPE_CACHE_BYTES: most bytes that copies may take, e.g. 200GB; None without one."""
    text = os.environ.get("CORPUSCOPE_CACHE_BYTES")
    if not text:
        return None
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise InputError(f"CORPUSCOPE_CACHE_BYTES: {text!r} is no size; write e.g. 200GB") from error


@contextlib.contextmanager
def held(
    key: str, size: int, fill: Callable[[Path], None], what: str, patience: float = 60.0
) -> Iterator[Path]:
    """The folder of a copy, which `fill(folder)` makes unless it is there; it stays while this is entered.

    `size` is what the files will take in bytes, 0 if nobody knows. InputError where they do not fit after
    `patience` seconds of waiting for other processes to end with theirs; `what` names the copy there.
    Raises what `fill` raises, and then there is no copy.
    """
    place, lock = cache_dir() / "copies", cache_dir() / "locks" / key
    for folder in (place, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    while True:
        with _locked(lock, fcntl.LOCK_SH):
            if (place / key).is_dir():
                os.utime(lock)
                yield place / key
                return
        with _locked(lock, fcntl.LOCK_EX):
            if not (place / key).is_dir():
                _fetch(place, key, size, fill, what, patience)


def has(key: str) -> bool:
    """Whether `held` would give a copy without making it."""
    return (cache_dir() / "copies" / key).is_dir()


def kept(key: str, size: int, fill: Callable[[Path], None], what: str) -> Path:
    """As `held`, for as long as this process lives."""
    return _for_good.enter_context(held(key, size, fill, what))


def _fetch(
    place: Path, key: str, size: int, fill: Callable[[Path], None], what: str, patience: float
) -> None:
    part = place / f".part-{key}"
    until = time.monotonic() + patience
    while not _reserved(part, size, what, time.monotonic() >= until):
        time.sleep(_NEXT_LOOK)
    try:
        fill(part)
        files = [file for file in part.iterdir() if file.name != _SIZE]
        for file in files:
            with file.open("rb") as stream:
                os.fsync(stream.fileno())  # a machine may fail between the rename and the data
        (part / _SIZE).write_text(str(sum(file.stat().st_size for file in files)))
        os.rename(part, place / key)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _reserved(part: Path, size: int, what: str, last: bool) -> bool:
    """Make room for `part` and say how much it will take; False, or at `last` InputError, without room."""
    place = part.parent
    with _locked(place.parent / "locks" / ".room", fcntl.LOCK_EX):  # two that come share what is free
        shutil.rmtree(part, ignore_errors=True)
        for gone in place.glob(".gone-*"):
            shutil.rmtree(gone)
        copies = {folder: _bytes(folder) for folder in place.iterdir() if folder.is_dir()}
        used, allowed = sum(copies.values()), budget()
        free = shutil.disk_usage(place).free
        limit = used + free if allowed is None else min(allowed, used + free)
        for folder in sorted(copies, key=_last_used):
            if used + size <= limit or size > limit:
                break
            if _removed(folder):
                used -= copies[folder]
        if used + size <= limit:
            part.mkdir()
            (part / _SIZE).write_text(str(size))
            return True
    if size > limit or last:
        raise InputError(_no_room(place, size, 0 if size > limit else used, allowed, what))
    return False


def _no_room(place: Path, size: int, busy: int, allowed: int | None, what: str) -> str:
    host = socket.gethostname()
    inside = f", of which live processes use {busy / 1e9:.3g} GB" if busy else ""
    if allowed is None:
        return (
            f"{host}: no room for {what} ({size / 1e9:.3g} GB) on the disk of {place}; free some, or set "
            "CORPUSCOPE_CACHE to a folder on another disk"
        )
    return (
        f"{host}: no room for {what} ({size / 1e9:.3g} GB) in the budget of {allowed / 1e9:.3g} GB for copies"
        f"{inside}; raise CORPUSCOPE_CACHE_BYTES where workers are started"
    )


def _removed(folder: Path) -> bool:
    """Remove a copy, or what a killed process left of one, unless somebody uses it."""
    with _locked(_lock_of(folder), fcntl.LOCK_EX, wait=False) as mine:
        if not mine or not folder.is_dir():  # in use, or whole meanwhile
            return False
        gone = folder.with_name(f".gone-{folder.name}")
        os.rename(folder, gone)
        shutil.rmtree(gone)
        return True


def _last_used(folder: Path) -> tuple[bool, float]:
    """What was left half done goes first, then what was longest not used."""
    try:
        return not folder.name.startswith(".part-"), _lock_of(folder).stat().st_mtime
    except FileNotFoundError:
        return False, 0.0


def _lock_of(folder: Path) -> Path:
    return folder.parent.parent / "locks" / folder.name.removeprefix(".part-")


def _bytes(folder: Path) -> int:
    try:
        return int((folder / _SIZE).read_text())
    except (FileNotFoundError, ValueError):  # it is being renamed, or its process ended between two steps
        return 0


@contextlib.contextmanager
def _locked(path: Path, kind: int, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file, which is never removed; False where it is taken and `wait` is not asked for."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, kind | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(handle)
