"""Compaction while a scan goes on: a thread of the driver merges what its commits have closed.

Invariant: a scan never waits for it before its own end, and never fails by it: what is left unmerged reads
the same, and the next scan or `compact` goes on with it. Where there is a cluster the merging is done on it.
What its own merges replaced it removes after the time that `gc` would wait for readers: a row is rewritten
once a level, and would otherwise be on disk as often.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue

from pipelines.compaction import Done, Perform, Tiers, at_once, catch_up, settle
from pipelines.contents import Registered
from pipelines.gc import READERS
from pipelines.registry import next_ordinal
from pipelines.storage import Store
from sae_runtime.errors import one_line

Closed = tuple[int, int, int]  # level, first ordinal, the one after the last


class Upkeep:
    """Use as a context manager: at a good end it waits until all that is closed is merged."""

    def __init__(
        self,
        store: Store,
        registered: Registered,
        waiting: Iterable[int],
        perform: Perform,
        notice: Callable[[str], None],
    ) -> None:
        """`waiting` are the ordinals to be committed, once for each SAE group."""
        self._store, self._registered, self._perform, self._notice = store, registered, perform, notice
        self._tiers = Tiers(next_ordinal(registered.plans), waiting)
        self._closed: SimpleQueue[Closed | None] = SimpleQueue()
        self._replaced: deque[tuple[float, tuple[str, ...]]] = deque()  # and when they may go
        self._dropped = threading.Event()
        self.bytes = 0  # written by now
        # A daemon: a scan that is stopped does not wait for it, and it may be killed at any point.
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def __enter__(self) -> Upkeep:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._dropped.set()
        self._closed.put(None)
        if kind is None:
            self._thread.join()

    def committed(self, ordinal: int) -> None:
        """One SAE group of a unit is committed."""
        for closed in self._tiers.committed(ordinal):
            self._closed.put(closed)

    def _run(self) -> None:
        try:
            self._note(catch_up(self._store, self._registered, self._perform))
            for level, spans in self._due():
                self._note(settle(self._store, self._registered, level, spans, self._perform))
                if self._dropped.is_set():
                    return
        except Exception as error:
            if not self._dropped.is_set():
                self._notice(
                    f"note: compaction stopped ({type(error).__name__}: {one_line(error)}); nothing is lost, "
                    "`corpuscope compact` goes on with it"
                )

    def _note(self, done: Done) -> None:
        now = time.monotonic()
        self.bytes += done.bytes
        self._replaced.append((now + READERS, done.replaced))
        while self._replaced and self._replaced[0][0] <= now:
            self._store.remove(self._replaced.popleft()[1])

    def _due(self) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Ranges in the order in which they closed; those of a level that wait in a row come together."""
        waiting: deque[Closed | None] = deque()
        while True:
            waiting.append(self._closed.get())
            while not self._closed.empty():
                waiting.append(self._closed.get())
            while waiting:
                closed = waiting.popleft()
                if closed is None:
                    return
                level, spans = closed[0], [closed[1:]]
                while waiting and len(spans) < at_once(level):
                    if waiting[0] is None or waiting[0][0] != level:
                        break
                    spans.append(waiting[0][1:])
                    waiting.popleft()
                yield level, spans
