"""One scan at a time: `leases/<term>.json` says who holds the index, `heartbeat.json` that they live.

Invariant: the holder of the highest term holds, and a term is taken by put-if-absent, so one of any number
of newcomers wins. Nobody's clock is compared with anybody else's: whether a holder elsewhere lives is
seen by watching its counter move. Only work is saved by this, never correctness: of two scans that run at
once both finish, and of each unit the first commit stands.

A holder on this machine is asked after by its process (Linux: boot, pid namespace, process and its start
time), so a scan that was killed can be run again at once; elsewhere, and on systems without /proc, it
takes STALE seconds of watching.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from pipelines.faults import crash
from pipelines.registry import dump
from pipelines.storage import Store, names
from sae_runtime.errors import DataError, Interrupted, one_line

LEASES, HEARTBEAT = "leases", "heartbeat.json"
EVERY = 3.0  # seconds between beats
STALE = 30.0  # seconds without a beat after which a holder elsewhere is taken for dead
_RECENT = 120.0  # `status`, which does not watch, believes a beat as old as this by the clocks
_R = TypeVar("_R")


@dataclass(frozen=True)
class Holder:
    """Who took a term."""

    term: int  # from 1
    run: int
    host: str
    process: int
    boot: str  # id of the machine's boot; empty where there is none to be had
    namespace: str  # of process ids
    born: str  # when the process started, in ticks since boot
    attempt: str  # no two are the same, so that a put-if-absent whose answer was lost can be told

    @property
    def words(self) -> str:
        return f"run {self.run}, process {self.process} on {self.host}"


@dataclass(frozen=True)
class Done:
    """How far a scan is since it began, units in flight included."""

    seconds: float  # since its workers were asked for
    units: int  # of one SAE group each, to do
    committed: int
    given_up: int
    documents: int
    tokens: int  # counted, for each SAE group again
    share: float  # of the text that was to do
    failures: Mapping[str, int]  # failed attempts at units by kind
    error: str  # the newest of them, one line


@dataclass(frozen=True)
class Beat:
    """The holder's newest sign of life."""

    term: int
    counter: int
    time: float  # seconds since 1970 by the holder's clock, for people
    workers: int
    ended: bool  # the lease was given back
    units: Mapping[str, int]  # in flight, with counted tokens done
    done: Done | None = None  # None before the first unit

    @property
    def age(self) -> float:
        """Seconds since it by this machine's clock; another one's may differ."""
        return abs(time.time() - self.time)


class Lease:
    """`look`, plan, `take`, work with `check` now and then; leaving the `with` gives it back."""

    def __init__(self, store: Store, notice: Callable[[str], None]) -> None:
        self._store, self._notice = store, notice
        self._seen: Holder | None = None
        self._beat: Beat | None = None  # as seen, then as written
        self._mine: Holder | None = None
        self._workers = 0
        self._units: dict[str, int] = {}
        self._done: Done | None = None
        self._lock = threading.Lock()
        self._stop, self._lost = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._live, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mine is not None:
            self._release()

    def look(self) -> None:
        """Raises Interrupted when another scan is at work; may take STALE seconds to find out."""
        self._seen, self._beat = newest(self._store), beat(self._store)
        if self._seen is None or _given_back(self._seen, self._beat):
            return
        alive = lives_here(self._seen)
        if alive:
            raise _busy(self._store, self._seen)
        if alive is None:
            self._watch(self._seen)

    def _watch(self, holder: Holder) -> None:
        self._notice(
            f"note: {holder.words} has not ended its scan of this index; watching for {STALE:.0f} s whether "
            "it lives"
        )
        before, until = self._beat, time.monotonic() + STALE
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(1.0, left))
            self._beat = beat(self._store)
            if _given_back(holder, self._beat):
                return
            if self._beat != before:
                raise _busy(self._store, newest(self._store) or holder)

    def take(self, run: int) -> None:
        """Hold the index from now on. Raises Interrupted if another scan was faster since `look`."""
        now = beat(self._store)
        if self._seen is not None and now != self._beat and not _given_back(self._seen, now):
            raise _busy(self._store, newest(self._store) or self._seen)
        term = 1 + (self._seen.term if self._seen else 0)
        mine = replace(this_process(), term=term, run=run)
        if not self._store.put_if_absent(_name(term), dump(asdict(mine))):
            raise _busy(self._store, newest(self._store) or mine)
        crash("lease-taken")
        self._mine = mine
        self._beat = Beat(term, 0, 0.0, 0, False, {})
        self._sign()
        self._thread.start()

    def note(self, units: Mapping[str, int], workers: int, done: Done | None = None) -> None:
        """What is in flight and done: the next beat says so."""
        with self._lock:
            self._units, self._workers, self._done = dict(units), workers, done

    @property
    def term(self) -> int:
        """The term that this scan took; ValueError before that."""
        if self._mine is None:
            raise ValueError("no lease is held")
        return self._mine.term

    @property
    def lost(self) -> bool:
        """Another scan took the lease."""
        return self._lost.is_set()

    def check(self) -> None:
        """Raises Interrupted when another scan has taken the lease."""
        if self.lost:
            raise Interrupted(
                f"index {self._store.uri}: this scan was taken for dead and another one has begun "
                f"({_words(self._store)}); it goes on, committed units stay"
            )

    def _live(self) -> None:
        while not self._stop.wait(EVERY):
            try:
                self._sign()
            except OSError:
                continue  # a beat that is missed says nothing yet; storage that stays away fails the work
            if self.lost:
                return

    def _sign(self, ended: bool = False) -> None:
        assert self._mine is not None
        assert self._beat is not None
        if self._store.exists(_name(self._mine.term + 1)):
            self._lost.set()
            return
        with self._lock:
            units, workers, done = {} if ended else self._units, self._workers, self._done
        self._beat = Beat(self._mine.term, self._beat.counter + 1, time.time(), workers, ended, units, done)
        self._store.write(HEARTBEAT, dump(asdict(self._beat)))
        crash("heartbeat")

    def _release(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            self._sign(ended=True)
        except OSError as error:
            self._notice(f"note: the lease could not be given back, the next scan waits: {one_line(error)}")


def newest(store: Store) -> Holder | None:
    """Who took the highest term."""
    taken = terms(store)
    return holders(store, taken[-1:])[0] if taken else None


def terms(store: Store) -> list[int]:
    """Every term that was taken, ascending."""
    return sorted(int(name) for name in names(store, LEASES, ".json") if name.isdecimal())


def holders(store: Store, taken: Sequence[int]) -> list[Holder]:
    """Who took some terms."""
    found = zip(taken, store.read_many([_name(term) for term in taken]), strict=True)
    return [_parsed(store, _name(term), data, lambda found: Holder(**found)) for term, data in found]


def beat(store: Store) -> Beat | None:
    """The newest sign of life, of whichever term."""
    try:
        data = store.read(HEARTBEAT)
    except FileNotFoundError:
        return None
    return _parsed(store, HEARTBEAT, data, _beat)


def _beat(found: dict[str, Any]) -> Beat:
    done = found.get("done")
    return Beat(**{**found, "done": None if done is None else Done(**done)})


def running(store: Store) -> tuple[Holder, Beat] | None:
    """The scan that seems to be at work, without waiting: a hint, as another machine's clock is asked."""
    found = unended(store)
    if found is None:
        return None
    alive = lives_here(found[0])
    if alive is None:
        alive = found[1].age < _RECENT
    return found if alive else None


def unended(store: Store) -> tuple[Holder, Beat] | None:
    """The scan that has not given its lease back, whether it lives or not."""
    holder, sign = newest(store), beat(store)
    if holder is None or sign is None or sign.term != holder.term or sign.ended:
        return None
    return holder, sign


def lives_here(holder: Holder) -> bool | None:
    """Whether the process lives, if it is one of this boot and pid namespace; None if it is not."""
    here = this_process()
    if not here.boot or (here.boot, here.namespace) != (holder.boot, holder.namespace):
        return None
    return _born(holder.process) == holder.born


def this_process() -> Holder:
    """This process, of no term and no run."""
    return Holder(
        term=0,
        run=0,
        host=socket.gethostname(),
        process=os.getpid(),
        boot=_boot(),
        namespace=_namespace(),
        born=_born(os.getpid()) or "",
        attempt=uuid.uuid4().hex,
    )


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _born(process: int) -> str | None:
    """A process's start time, or None if it has ended (killed but not yet waited for is ended)."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def _given_back(holder: Holder, sign: Beat | None) -> bool:
    return sign is not None and sign.term == holder.term and sign.ended


def _busy(store: Store, holder: Holder) -> Interrupted:
    return Interrupted(
        f"index {store.uri}: another scan is running ({holder.words}); run again when it has ended"
    )


def _words(store: Store) -> str:
    holder = newest(store)
    return holder.words if holder else "unknown"


def _name(term: int) -> str:
    return f"{LEASES}/{term:06d}.json"


def _parsed(store: Store, name: str, data: bytes, make: Callable[[dict[str, Any]], _R]) -> _R:
    try:
        return make(json.loads(data))
    except (ValueError, TypeError) as error:
        raise DataError(f"{store.uri}/{name}: damaged; remove that file when no scan is running") from error
