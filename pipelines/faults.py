"""Fault points for tests: where a process can be made to end as SIGKILL would end it, or to miss an answer.

$CORPUSCOPE_CRASH says where: `point`, or `point:n` for the n-th time that the process is there. With `:lost`
at the end (`put-linked:3:lost`) it does not end: what was done stands, and the caller gets a ConnectionError.
Invariant: a real scan never sets it, and then nothing here does anything but look for it (1 µs, some 50 times
a unit). docs/FAULTS.md says what each point stands for; tests/test_faults.py walks all of them.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from typing import Literal, get_args

Point = Literal[
    # A scan
    "before-lease",  # everything is planned, nothing is written
    "lease-taken",  # without a heartbeat yet
    "heartbeat",  # written: the first when the lease is taken, the last when it is given back
    "before-index",
    "before-vocabulary",
    "before-plan",
    "plan-files",  # the first of the plan's tables is written
    "plan-tables",  # both are, the plan itself is not
    "before-unit",
    "data-opened",  # a data file of a unit, empty yet
    "data-closed",  # one is whole, others may not be
    "before-commit",  # all data are written
    "after-commit",  # nobody has been told
    "before-summary",  # everything is done but the run's summary; the lease is held
    # The storage door, on local disk
    "temporary-written",  # of an object that is to be there whole or not at all
    "put-linked",  # put-if-absent has made the object, its caller has not been told
    "object-removed",
    # Compaction
    "merge-file",
    "compact-files",
    "compact-manifest",
    "compact-published",
    # Collection
    "gc-retired",
    "gc-listed",  # it is known what goes; the newest snapshot may change now
    "gc-removing",
]
POINTS: tuple[Point, ...] = get_args(Point)

reached: Counter[str] = Counter()  # while a fault is planned: how often the process was at each point
_lock = threading.Lock()


def crash(point: Point) -> None:
    """End the process, or raise ConnectionError, if $CORPUSCOPE_CRASH says so."""
    plan = os.environ.get("CORPUSCOPE_CRASH")
    if plan is None:
        return
    with _lock:
        reached[point] += 1
        times = reached[point]
    wanted, number, kind = [*plan.split(":"), "", ""][:3]
    if wanted != point or times != int(number or 1):
        return
    if kind == "lost":
        raise ConnectionError(errno.ECONNRESET, f"no answer: {plan} is a fault that was asked for")
    os._exit(137)
