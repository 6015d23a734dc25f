"""What an executor is: it takes work, tries each item, and reports what happens.

Invariant: executors know neither plans nor retries across runs; a report of `Committed` means that the
commit object stands in the index, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipelines.ledger import Commit
from pipelines.selfcheck import Measured
from pipelines.unit import Work


@dataclass(frozen=True)
class Progress:
    """An item in flight: what is done of it so far."""

    work: Work
    documents: int
    tokens: int  # counted


@dataclass(frozen=True)
class Committed:
    """An item is done; `own` if this scan did it, not another one first."""

    work: Work
    commit: Commit
    own: bool = True
    measured: tuple[Measured, ...] = ()


@dataclass(frozen=True)
class Failed:
    """An item was given up on. `error` is one line, `detail` the traceback if it was unexpected."""

    work: Work
    error: str
    detail: str = ""


Event = Progress | Committed | Failed
Observer = Callable[[Event], None]


class Executor(Protocol):
    """Runs work items; `observe` is called in the driver's thread as things happen."""

    workers: int

    def run(self, items: Sequence[Work], observe: Observer) -> None:
        """Try every item once or more; returns when each was reported Committed or Failed."""

    def close(self) -> None:
        """Let go of everything that was started here."""
