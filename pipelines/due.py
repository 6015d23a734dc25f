"""Which due times of a schedule were served: `schedules/<name>/<due>.<attempt>.*.json` in the index.

An attempt at a due time is one process that scans for it, or hands it to a cluster. `began.json` is put if
absent, so of any number that find the same time due one serves it; `ended.json` says how that went.
Invariant: a due time is served when an attempt at it ended with 0 or 3. After 75 the work goes on whenever
somebody comes; after other failures too, from the second on with pauses that double, until the next due time
takes its place. An attempt without an end is a failure, once its process is seen to be gone; of a process
elsewhere that is told `PATIENCE` seconds after it began, by whether its scan has a heartbeat. Whoever is
taken for dead and is not loses nothing: the lease keeps scans apart, and a scan of what is scanned does
nothing.

What was missed is not made up for one by one: the latest due time stands for all before it. The name is the
spec's file name, so two machines with copies of one folder serve each time once.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any, Literal

from pipelines.lease import Holder, lives_here, running, this_process
from pipelines.registry import dump
from pipelines.schema import SCHEDULES
from pipelines.storage import Store
from sae_runtime.errors import QUARANTINED, DataError, Interrupted, one_line

PATIENCE = 120.0  # seconds; then a scan has its lease, or it costs little to plan it twice
PAUSE, LONGEST_PAUSE = 300.0, 14_400.0  # seconds, after the second failure and at most
KEPT = 100  # due times of a schedule whose records `gc` keeps
SERVED = (0, QUARANTINED)
State = Literal["due", "running", "waiting", "failed"]
STATES: tuple[State, ...] = ("due", "running", "waiting", "failed")
_STAMP = "%Y%m%dT%H%M%SZ"
_RECORD = re.compile(r"(?P<due>\d{8}T\d{6}Z)\.(?P<number>\d{3,})\.(?P<what>began|ended)\.json")


@dataclass(frozen=True)
class Ended:
    """How an attempt ended."""

    time: float  # seconds since 1970, UTC
    exit_code: int
    run: int | None  # the index's newest scan run then
    job: str | None  # what a cluster was asked to do; how that went is not known here


@dataclass(frozen=True)
class Attempt:
    """One try at one due time."""

    due: datetime
    number: int  # from 1
    time: float  # when it began; seconds since 1970, UTC
    by: Holder
    ended: Ended | None


@dataclass(frozen=True)
class Standing:
    """Where a schedule stands."""

    state: State
    due: datetime | None  # the latest due time
    next_number: int  # of an attempt at it
    last: Attempt | None  # the newest attempt at any due time
    unsure: float = 0.0  # running elsewhere: seconds until it can be told whether it is
    again: datetime | None = None  # failed: when it is tried again


def standing(store: Store, name: str, due: datetime | None, now: datetime) -> Standing:
    """Where the schedule of a name stands whose latest due time is `due`: a listing and a few small objects.

    Raises DataError where a record is damaged, InputError for a name that cannot be one in an index.
    """
    found = sorted({(_due(match), int(match["number"])) for match in _records(store, name)})
    if not found:
        return Standing("waiting" if due is None else "due", due, 1, None)
    last = read(store, name, *found[-1])
    if last.ended is None:
        here = lives_here(last.by)
        unsure = 0.0 if here is not None else max(0.0, PATIENCE - abs(time.time() - last.time))
        if here or unsure or (here is None and _scans(store, last.by)):
            return Standing("running", due, 1, last, unsure)
    if due is None or last.due > due or (last.due == due and last.ended and last.ended.exit_code in SERVED):
        return Standing("waiting", due, 1, last)
    numbers = [each for at, each in found if at == due]
    number = 1 + max(numbers, default=0)
    tried = [read(store, name, due, each) for each in numbers]
    failed = [a for a in tried if a.ended is None or a.ended.exit_code != Interrupted.exit_code]
    if len(failed) > 1:
        pause = min(LONGEST_PAUSE, PAUSE * 2.0 ** (len(failed) - 2))
        ended = failed[-1].ended.time if failed[-1].ended else failed[-1].time
        again = datetime.fromtimestamp(ended + pause, timezone.utc)
        if now < again:
            return Standing("failed", due, number, last, again=again)
    return Standing("due", due, number, last)


def begin(store: Store, name: str, due: datetime, number: int) -> Attempt | None:
    """Take an attempt at a due time; None if another process was first."""
    attempt = Attempt(due, number, time.time(), this_process(), None)
    record = {"due": due.isoformat(), "number": number, "time": attempt.time, "by": asdict(attempt.by)}
    return attempt if store.put_if_absent(_name(name, due, number, "began"), dump(record)) else None


def end(store: Store, name: str, attempt: Attempt, code: int, run: int | None, job: str | None) -> None:
    """Say how an attempt ended."""
    ended = Ended(time.time(), code, run, job)
    store.write(_name(name, attempt.due, attempt.number, "ended"), dump(asdict(ended)))


def read(store: Store, name: str, due: datetime, number: int) -> Attempt:
    """One attempt. DataError if its records are damaged or the first of them is missing."""
    began = _object(store, _name(name, due, number, "began"))
    ended = _object(store, _name(name, due, number, "ended"))
    try:
        if began is None:
            raise ValueError("it is missing")
        over = None if ended is None else Ended(**ended)
        return Attempt(due, int(began["number"]), float(began["time"]), Holder(**began["by"]), over)
    except (KeyError, TypeError, ValueError) as error:
        where = f"{store.uri}/{_name(name, due, number, 'began')}"
        raise DataError(f"{where}: damaged, no record: {one_line(error)}; remove it") from error


def attempts(store: Store) -> Iterator[tuple[str, datetime, int]]:
    """(schedule, due time, number) of every attempt that there is a record of."""
    for name in store.folders(SCHEDULES):
        yield from sorted({(name, _due(match), int(match["number"])) for match in _records(store, name)})


def outdated(records: Sequence[str]) -> set[str]:
    """Of the records of all schedules, by name, those of due times so old that nothing asks for them."""
    by_name: dict[str, dict[str, list[str]]] = {}
    for record in records:
        folder, _, file = record.rpartition("/")
        if match := _RECORD.fullmatch(file):
            by_name.setdefault(folder, {}).setdefault(match["due"], []).append(record)
    return {record for dues in by_name.values() for due in sorted(dues)[:-KEPT] for record in dues[due]}


def _scans(store: Store, by: Holder) -> bool:
    """Whether the scan that is at work is of that process, by its heartbeat and the clocks."""
    scan = running(store)
    return scan is not None and (scan[0].host, scan[0].process, scan[0].boot) == (
        by.host,
        by.process,
        by.boot,
    )


def _records(store: Store, name: str) -> list[re.Match[str]]:
    found = (_RECORD.fullmatch(entry) for entry in store.entries(f"{SCHEDULES}/{name}"))
    return [match for match in found if match]


def _due(match: re.Match[str]) -> datetime:
    return datetime.strptime(match["due"], _STAMP).replace(tzinfo=timezone.utc)


def _name(name: str, due: datetime, number: int, what: str) -> str:
    return f"{SCHEDULES}/{name}/{due.astimezone(timezone.utc).strftime(_STAMP)}.{number:03d}.{what}.json"


def _object(store: Store, name: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(store.read(name)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise DataError(f"{store.uri}/{name}: damaged, not a JSON object; remove it") from error
