"""A unit's files written by threads of their own, while the next activations are computed.

Invariant: what goes to one lane is written in the order in which it was handed over, and a kind of file is
written in one lane only, so the files are the same as without threads. Whoever makes rows waits for `room`
first, so that few are held and little is left to write when the last are made: 2 % of a unit's time where the
processors are as many as the threads that make them (2 cores; docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Condition
from typing import Any

from pipelines.ledger import DataFileRecord
from pipelines.writer import UnitWriter

Write = Callable[[UnitWriter], None]
_BEHIND = 2


class BackgroundWriter:
    """Hands work to a `UnitWriter` in two lanes, a thread each: of token and document rows, of the rest."""

    def __init__(self, writer: UnitWriter) -> None:
        self.writer = writer
        self._rows, self._rest = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._waiting: list[Future[None]] = []
        self._behind, self._changed = 0, Condition()  # rows of so many SAEs are not yet written

    def submit_rows(self, write: Write) -> None:
        """Have `write(writer)` called after all rows that were submitted before."""
        future = self._rows.submit(write, self.writer)
        with self._changed:
            self._behind += 1
        future.add_done_callback(self._written)
        self._waiting.append(future)

    def room(self) -> None:
        """Wait until rows of at most one SAE wait to be written, besides those that are being written."""
        with self._changed:
            self._changed.wait_for(lambda: self._behind <= _BEHIND)

    def _written(self, done: Future[None]) -> None:
        with self._changed:
            self._behind -= 1
            self._changed.notify_all()

    def submit(self, write: Write) -> None:
        """Have `write(writer)`, which writes no rows, called after all such that were submitted before."""
        self._waiting.append(self._rest.submit(write, self.writer))

    def write(self, kind: str, columns: dict[str, Any]) -> None:
        """`UnitWriter.write` of a kind that has no rows of tokens or documents, later."""
        self.submit(lambda writer: writer.write(kind, columns))

    def flushed(self) -> None:
        """Wait until everything is written; raises the first error of a write."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            future.result()

    def close(self) -> dict[str, DataFileRecord]:
        """Finish every file."""
        self.flushed()
        for pool in (self._rows, self._rest):
            pool.shutdown()
        return self.writer.close()

    def abandon(self) -> None:
        """Drop what has not been written and close without a record."""
        for pool in (self._rows, self._rest):
            pool.shutdown(wait=True, cancel_futures=True)
        self.writer.abandon()
