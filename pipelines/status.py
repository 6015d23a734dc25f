"""Where an index stands, read from its own files: no cluster, no database, no lock.

Invariant: `committed + failed + pending = units`, over the units of the newest plan. What a scan that is at
work says of itself is as old as its heartbeat, whose age is told.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import summary
from pipelines.contents import contents
from pipelines.devices import recorded
from pipelines.failures import Failures
from pipelines.lease import EVERY, STALE, Beat, Done, Holder, running, unended
from pipelines.names import reading
from pipelines.schema import KINDS
from pipelines.storage import Store
from pipelines.words import left, placed

_COUNTS = ("documents", "quarantined", "tokens")
State = Literal[
    "complete",  # every unit is committed, no scan is at work
    "running",  # a scan is at work
    "stale",  # a scan holds the lease, and its heartbeat stands still
    "failed",  # no scan is at work; what is not committed was given up
    "incomplete",  # no scan is at work; there are units to do
]
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class Status:
    """Counts are of units unless they say otherwise; a unit counts as committed when all groups are."""

    index: str
    state: State
    runs: int
    run: int | None  # the newest
    saes: int
    units: int
    committed: int
    failed: int  # tried, given up on, not committed since
    pending: int  # not committed, not failed
    running: int  # of the pending ones, in flight now
    scan: str | None  # who is at work: run, process, host
    heartbeat: float | None  # seconds since it, of a scan that has not given its lease back
    workers: int  # of the scan that is at work
    progress: float | None  # share of the text that is done of what that scan has to do
    progress_documents: int | None  # done by it
    progress_tokens: int | None  # counted, for each SAE group again
    tokens_per_second: float | None
    seconds_left: float | None
    documents: int  # of committed units
    tokens: int  # counted, of committed units
    quarantined: int  # documents
    bytes: int  # of the data files that are read
    last_commit: float | None  # seconds ago
    failures: dict[str, int]  # attempts at units that failed, by kind: of that scan, else of the newest run
    error: str | None  # the newest of those
    devices: tuple[str, ...]  # models that units were scanned on, the first one first
    errors: tuple[str, ...]  # of the failed units, newest first
    last_run: dict[str, Any] | None  # what the newest run with a summary did and cost (pipelines/summary.py)
    next: str  # what to do, one line


def status(uri: str) -> Status:
    """The status of the index at `uri`. Raises InputError if there is none, DataError if it is damaged."""
    with reading(uri):
        return _status(uri)


def _status(uri: str) -> Status:
    store = Store(uri)
    held = contents(store)
    shown = set(held.shown.tolist())
    open_units = {unit.unit for unit in held.units if unit.ordinal not in shown}
    failures = sorted(Failures(store).last(open_units), key=lambda f: -f.time)
    errors = {f.unit: placed(f.source, f.error) for f in failures if f.final}
    silent, scan = unended(store), running(store)
    flying = {unit for unit in scan[1].units if unit in open_units} if scan else set()
    facts = held.facts.filter(pc.is_in(held.facts["ordinal"], pa.array(held.shown)))
    total = {name: pc.sum(facts[name], min_count=0).as_py() for name in _COUNTS}
    last = pc.max(facts["finished"]).as_py()
    scans = [plan.run for plan in held.plans if plan.kind == "scan"]
    failed = set(errors) - flying
    before = summary.newest(store)
    if before and scan and scan[0].run == before.run:  # it has not come to its summary
        before = replace(before, unaccounted=max(0, before.unaccounted - 1))
    done = scan[1].done if scan else None
    if scan:
        state: State = "running" if scan[1].age <= STALE else "stale"
    elif scans and not open_units:
        state = "complete"
    else:
        state = "failed" if open_units and len(failed) == len(open_units) else "incomplete"
    return Status(
        index=uri,
        state=state,
        runs=len(scans),
        run=max(scans, default=None),
        saes=len(held.identity["saes"]),
        units=len(held.units),
        committed=len(shown),
        failed=len(failed),
        pending=len(open_units) - len(failed),
        running=len(flying),
        scan=scan[0].words if scan else None,
        heartbeat=silent[1].age if silent else None,
        workers=scan[1].workers if scan else 0,
        progress=done.share if done else None,
        progress_documents=done.documents if done else None,
        progress_tokens=done.tokens if done else None,
        tokens_per_second=done.tokens / done.seconds if done and done.seconds > 0 else None,
        seconds_left=left(done.seconds, done.share) if done else None,
        documents=total["documents"],
        tokens=total["tokens"],
        quarantined=total["quarantined"],
        bytes=sum({file.path: file.bytes for kind in KINDS for file in held.files(kind)}.values()),
        last_commit=None if last is None else time.time() - last,
        failures=_failures(done, before),
        error=(done.error if done else before.error if before else "") or None,
        devices=recorded(store),
        errors=tuple(dict.fromkeys(errors[unit] for unit in errors if unit in failed)),
        last_run=before.facts if before else None,
        next=_next(state, silent, total["quarantined"], before),
    )


def _failures(done: Done | None, before: summary.RunSummary | None) -> dict[str, int]:
    if done is not None:
        return dict(done.failures)
    return dict(before.failures) if before else {}


def _next(
    state: State, silent: tuple[Holder, Beat] | None, quarantined: int, before: summary.RunSummary | None
) -> str:
    """What to do, one line."""
    if state == "complete":
        return "nothing; `quarantine` of SQL names the documents left out" if quarantined else "nothing"
    if state == "running":
        return f"nothing; the heartbeat comes every {EVERY:.0f} s"
    again = "run the same scan again; it goes on where it stopped"
    if state == "stale":
        assert silent is not None
        return (
            f"see whether process {silent[0].process} on {silent[0].host} is at work; if it is gone, {again}"
        )
    if state == "failed":
        return f"mend what the errors name, and {again}"
    if silent is not None:
        return f"the last scan ({silent[0].words}) was killed: {again}"
    return f"the last scan ended with {before.exit_code} ({before.reason}): {again}" if before else again
