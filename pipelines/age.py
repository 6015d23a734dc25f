"""How old work is that nothing names yet: what `gc` might have taken for left over must not be published.

Invariant: never younger than it is by the store's clock, as long as one of two clocks goes on. Linux's
monotonic clock stands still while a machine sleeps; the other one may be set back.
"""

from __future__ import annotations

import time


class Age:
    """Of what was begun when this was made."""

    def __init__(self) -> None:
        self._monotonic, self._wall = time.monotonic(), time.time()

    @property
    def seconds(self) -> float:
        """By the clock that says more."""
        return max(time.monotonic() - self._monotonic, time.time() - self._wall)
