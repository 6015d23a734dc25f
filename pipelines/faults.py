"""Fault points for tests: where a process can be made to end as SIGKILL would end it, without clean-up.

Invariant: a real scan never sets $CORPUSCOPE_CRASH, and then nothing here does anything.
"""

from __future__ import annotations

import os
from collections import Counter

_reached: Counter[str] = Counter()


def crash(point: str) -> None:
    """End the process if $CORPUSCOPE_CRASH is `point`, or `point:n` and this is the n-th time it is here."""
    plan = os.environ.get("CORPUSCOPE_CRASH")
    if plan is None:
        return
    wanted, _, times = plan.partition(":")
    if wanted != point:
        return
    _reached[point] += 1
    if _reached[point] == int(times or 1):
        os._exit(137)
