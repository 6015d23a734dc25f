"""How far a scan is: counts of its events, units in flight included. Memory is that of what is in flight."""

from __future__ import annotations

from pipelines.executors.base import Attempted, Committed, Event, Failed, Progress

_BYTES_A_TOKEN = 4  # until a unit is done


class Counts:
    """Takes in events; `items` (unit, SAE group) pairs of `size` bytes of text are to be done."""

    def __init__(self, items: int, size: int) -> None:
        self.items, self._size = items, size
        self.done = self.failed = 0  # items
        self._documents = self._tokens = self._bytes = 0  # of items that are done
        self.flying: dict[tuple[str, int], Progress] = {}

    def take(self, event: Event) -> None:
        """Take in what happened."""
        key = event.work.unit.unit, event.work.group
        if isinstance(event, Progress):
            self.flying[key] = event
            return
        self.flying.pop(key, None)
        if isinstance(event, Committed):
            self.done += 1
            self._bytes += event.work.unit.bytes
            self._documents += 0 if event.work.group else event.commit.documents
            self._tokens += event.commit.tokens
        elif isinstance(event, Failed):
            self.failed += 1
        else:
            assert isinstance(event, Attempted)

    @property
    def ended(self) -> bool:
        """Every item is committed or given up."""
        return self.done + self.failed == self.items

    @property
    def documents(self) -> int:
        return self._documents + sum(e.documents for e in self.flying.values() if e.work.group == 0)

    @property
    def tokens(self) -> int:
        """Counted ones, for each SAE group again."""
        return self._tokens + sum(e.tokens for e in self.flying.values())

    @property
    def share(self) -> float:
        """Share of the text that is done: units that ended, and of those in flight by their tokens."""
        if self.ended:
            return 1.0
        tokens = sum(e.tokens for e in self.flying.values())
        flying = tokens * (self._bytes / self._tokens if self._tokens else _BYTES_A_TOKEN)
        return min(0.999, (self._bytes + flying) / max(1, self._size))
