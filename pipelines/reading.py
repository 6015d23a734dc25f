"""Reads passages in a thread of its own, one at a time, and remembers the last ones.

Invariant: nothing heavy is imported before the first passage is asked for.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.passage import Passage, PassageModel

_READ = 32  # passages that are remembered
_FAILED = 10.0  # seconds that a failure is: who asks again meanwhile waited for it


class _Read:
    """A passage that is read, or was; `ended` is when."""

    def __init__(self, future: Future[Passage]) -> None:
        self.future = future
        self.ended = math.inf
        future.add_done_callback(self._end)

    def _end(self, future: Future[Passage]) -> None:
        self.ended = time.monotonic()

    @property
    def is_forgotten(self) -> bool:
        if not self.future.done() or self.future.exception() is None:
            return False
        return time.monotonic() - self.ended >= _FAILED


class Reader:
    """Reads passages with the weights of indexes. `doing` says what it is at."""

    def __init__(self, model: str | None = None, suites: Sequence[str] = ()) -> None:
        """`model` and `suites` say where an index's model and SAEs are now, if they moved."""
        self.doing = ""
        self._moved = model, tuple(suites)
        self._thread = ThreadPoolExecutor(1, "passage")
        self._lock = Lock()
        self._read: OrderedDict[tuple[str, str, str], _Read] = OrderedDict()
        self._loaded: tuple[str, PassageModel] | None = None

    def read(self, identity: dict[str, Any], sae: str, text: str) -> Future[Passage]:
        """What an SAE of an index (by what `index.json` says) has on a text, once it has been read.

        The future's errors are InputErrors: weights that are not there or not those that were scanned, a
        text of over MOST_TOKENS tokens or one that the model cannot run.
        """
        key = (repr(identity["fixed"]), sae, text)
        with self._lock:
            found = self._read.pop(key, None)
            if found is None or found.is_forgotten:
                found = _Read(self._thread.submit(self._of, identity, sae, text))
            self._read[key] = found
            while len(self._read) > _READ:
                self._read.popitem(last=False)
            return found.future

    def close(self) -> None:
        """Read no more; what is being read is waited for."""
        self._thread.shutdown(cancel_futures=True)

    def _of(self, identity: dict[str, Any], sae: str, text: str) -> Passage:
        self.doing = "starting"
        from pipelines.passage import PassageModel

        key = repr(identity["fixed"])
        try:
            if self._loaded is None or self._loaded[0] != key:
                self._loaded = None
                self.doing = "loading the model"
                self._loaded = key, PassageModel(identity, *self._moved)
            self.doing = f"loading {sae}"
            self._loaded[1].encoder(sae)
            self.doing = "running the model"
            return self._loaded[1].passage(sae, text)
        finally:
            self.doing = ""
