"""Where an index stands, read from its own files: no cluster, no database, no lock.

Invariant: `committed + failed + pending = units`, over the units of the newest plan.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contents import contents
from pipelines.devices import recorded
from pipelines.failures import Failure, Failures
from pipelines.lease import running
from pipelines.names import reading
from pipelines.schema import KINDS
from pipelines.storage import Store

_COUNTS = ("documents", "quarantined", "tokens")


@dataclass(frozen=True)
class Status:
    """Counts are of units unless they say otherwise; a unit counts as committed when all groups are."""

    index: str
    state: str  # complete | running | incomplete
    runs: int
    saes: int
    units: int
    committed: int
    failed: int  # tried, given up on, not committed since
    pending: int  # not committed, not failed
    running: int  # of the pending ones, in flight now
    scan: str | None  # who is at work: run, process, host
    documents: int  # of committed units
    tokens: int  # counted, of committed units
    quarantined: int  # documents
    bytes: int  # of the data files that are read
    last_commit: float | None  # seconds ago
    devices: tuple[str, ...]  # models that units were scanned on, the first one first
    errors: tuple[str, ...]  # of the failed units, newest first


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
    errors = {f.unit: _placed(f) for f in failures if f.final}
    scan = running(store)
    flying = {unit for unit in scan[1].units if unit in open_units} if scan else set()
    facts = held.facts.filter(pc.is_in(held.facts["ordinal"], pa.array(held.shown)))
    total = {name: pc.sum(facts[name], min_count=0).as_py() for name in _COUNTS}
    last = pc.max(facts["finished"]).as_py()
    scans = sum(plan.kind == "scan" for plan in held.plans)
    failed = set(errors) - flying
    return Status(
        index=uri,
        state="running" if scan else "complete" if scans and not open_units else "incomplete",
        runs=scans,
        saes=len(held.identity["saes"]),
        units=len(held.units),
        committed=len(shown),
        failed=len(failed),
        pending=len(open_units) - len(failed),
        running=len(flying),
        scan=scan[0].words if scan else None,
        documents=total["documents"],
        tokens=total["tokens"],
        quarantined=total["quarantined"],
        bytes=sum({file.path: file.bytes for kind in KINDS for file in held.files(kind)}.values()),
        last_commit=None if last is None else time.time() - last,
        devices=recorded(store),
        errors=tuple(dict.fromkeys(errors[unit] for unit in errors if unit in failed)),
    )


def _placed(failure: Failure) -> str:
    """A failure's error with the file it is about, named once."""
    error, source = failure.error, failure.source
    return error if error.startswith(source) else f"{source}: {error}"
