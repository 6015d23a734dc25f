"""A note in the index that a scan is at work: `status` shows it, and a second scan stops with 75.

Invariant: only work is saved by it, never correctness; two scans that miss each other's notes both
finish, and of each unit the first commit stands. A note is believed for a minute, and not at all when
its process has ended on this machine, so that a scan that was killed can be run again at once.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from pipelines.registry import dump
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
            "host": socket.gethostname(),
            "process": os.getpid(),
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
    if not note["running"] or time.time() - note["time"] >= STALE:
        return None
    return None if note["host"] == socket.gethostname() and _has_ended(note["process"]) else dict(note)


def _has_ended(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    try:  # killed, but not yet waited for by its parent
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False
