"""A unit's files written by threads of their own, while the next activations are computed.

Invariant: what goes to one lane is written in the order in which it was handed over, and a kind of file is
written in one lane only, so the files are the same as without threads. `flushed` is called before the next
chunk's rows are made, so the rows of two chunks are the most that are held.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pipelines.ledger import DataFileRecord
from pipelines.writer import UnitWriter

Write = Callable[[UnitWriter], None]


class BackgroundWriter:
    """Hands work to a `UnitWriter` in two lanes, a thread each: of token and document rows, and of the rest."""

    def __init__(self, writer: UnitWriter) -> None:
        self.writer = writer
        self._rows, self._rest = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._waiting: list[Future[None]] = []

    def submit_rows(self, write: Write) -> None:
        """Have `write(writer)` called after all rows that were submitted before."""
        self._waiting.append(self._rows.submit(write, self.writer))

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
