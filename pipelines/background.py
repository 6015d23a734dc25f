"""A unit's files written by a thread of their own, while the next activations are computed.

Invariant: rows are written in the order in which they were handed over, so the files are the same as
without a thread. `flushed` is called before the next chunk's rows are made, so the rows of two chunks are
the most that are held.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pipelines.ledger import DataFileRecord
from pipelines.writer import UnitWriter

Write = Callable[[UnitWriter], None]


class BackgroundWriter:
    """Hands work to a `UnitWriter`, one piece after the other, in a thread."""

    def __init__(self, writer: UnitWriter) -> None:
        self.writer = writer
        self._pool = ThreadPoolExecutor(1)
        self._waiting: list[Future[None]] = []

    def submit(self, write: Write) -> None:
        """Have `write(writer)` called after all that was submitted before."""
        self._waiting.append(self._pool.submit(write, self.writer))

    def write(self, kind: str, columns: dict[str, Any]) -> None:
        """`UnitWriter.write`, later."""
        self.submit(lambda writer: writer.write(kind, columns))

    def flushed(self) -> None:
        """Wait until everything is written; raises the first error of a write."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            future.result()

    def close(self) -> dict[str, DataFileRecord]:
        """Finish every file."""
        self.flushed()
        self._pool.shutdown()
        return self.writer.close()

    def abandon(self) -> None:
        """Drop what has not been written and close without a record."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.writer.abandon()
