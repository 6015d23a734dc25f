"""A note in the index that a scan is at work, so that `status` can tell without a cluster.

Invariant: nothing depends on it; it is overwritten every few seconds and says when. A scan that was
killed leaves the last note behind, whose age tells.
"""

from __future__ import annotations

import json
import time
from typing import Any

from pipelines.ledger import dump
from pipelines.storage import Store

NAME = "heartbeat.json"
EVERY = 5.0  # seconds between notes
STALE = 60.0  # seconds after which a note says nothing


class Heartbeat:
    """Writes a note at most every EVERY seconds."""

    def __init__(self, store: Store, run: int, workers: int) -> None:
        self._store, self._run, self._workers = store, run, workers
        self._last = 0.0

    def beat(self, in_flight: dict[str, int], ended: bool = False) -> None:
        """Note the units in flight, as {unit: counted tokens done}."""
        now = time.time()
        if now - self._last < EVERY and not ended:
            return
        self._last = now
        note = {
            "run": self._run,
            "workers": self._workers,
            "time": now,
            "running": not ended,
            "units": in_flight,
        }
        self._store.write(NAME, dump(note))


def running(store: Store) -> dict[str, Any] | None:
    """The newest note of a scan that is at work, or None."""
    try:
        note = json.loads(store.read(NAME))
    except FileNotFoundError:
        return None
    return dict(note) if note["running"] and time.time() - note["time"] < STALE else None
