"""Where an index stands, read from its own files: no cluster, no database, no lock.

Invariant: `committed + failed + pending = units`, over the units of the newest plan.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from pipelines.heartbeat import running
from pipelines.ledger import Ledger, live_units
from pipelines.names import reading
from pipelines.storage import Store
from sae_runtime.errors import InputError


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
    documents: int  # of committed units
    tokens: int  # counted, of committed units
    quarantined: int  # documents
    bytes: int  # of committed data files
    last_commit: float | None  # seconds ago
    errors: tuple[str, ...]  # of the failed units, newest first


def status(uri: str) -> Status:
    """The status of the index at `uri`. Raises InputError if there is none, DataError if it is damaged."""
    with reading(uri):
        return _status(uri)


def _status(uri: str) -> Status:
    store = Store(uri)
    ledger = Ledger(store)
    identity = ledger.identity()
    if identity is None:
        raise InputError(f"index {uri}: nothing here (no index.json); `corpuscope scan` makes an index")
    commits = ledger.commits()
    plans = ledger.plans()
    units = live_units(plans)
    groups = len(identity["groups"])
    done = {unit.unit for unit in units if all((unit.unit, group) in commits for group in range(groups))}
    open_units = {unit.unit for unit in units} - done
    failures = sorted(ledger.failures(), key=lambda f: -f["time"])
    errors = {f["unit"]: _placed(f) for f in reversed(failures) if f["unit"] in open_units}
    note = running(store)
    flying = {unit for unit in note["units"] if unit in open_units} if note else set()
    mine = [commit for (unit, _), commit in commits.items() if unit in done]
    first = [commit for commit in mine if commit.group == 0]
    failed = set(errors) - flying
    return Status(
        index=uri,
        state="running" if note else "complete" if plans and not open_units else "incomplete",
        runs=len(plans),
        saes=len(identity["saes"]),
        units=len(units),
        committed=len(done),
        failed=len(failed),
        pending=len(open_units) - len(failed),
        running=len(flying),
        documents=sum(commit.documents for commit in first),
        tokens=sum(commit.tokens for commit in first),
        quarantined=0,
        bytes=sum(file.bytes for commit in mine for file in commit.files.values()),
        last_commit=time.time() - max(c.finished for c in mine) if mine else None,
        errors=tuple(dict.fromkeys(errors[unit] for unit in errors if unit in failed)),
    )


def _placed(failure: dict[str, Any]) -> str:
    """A failure's error with the file it is about, named once."""
    error, source = str(failure["error"]), str(failure["source"])
    return error if error.startswith(source) else f"{source}: {error}"
