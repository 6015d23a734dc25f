"""What an executor is: it takes work, tries each item, and reports what happens.

Invariant: executors decide nothing about retries themselves, `pipelines.scheduler` does; a report of
`Committed` means that the commit object stands in the index, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from pipelines.compaction import Task
from pipelines.ledger import Commit, DataFileRecord
from pipelines.scheduler import Attempt, Item, Kind, Scheduler, Tried, Verdict
from pipelines.selfcheck import Measured
from pipelines.unit import Work
from sae_runtime.errors import Interrupted

W = TypeVar("W", bound=Hashable)


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
    stages: Mapping[str, float] = field(default_factory=dict)  # seconds of the attempt by stage


@dataclass(frozen=True)
class Attempted:
    """An attempt failed. `final`: the item is not tried again by this scan."""

    work: Work
    kind: Kind
    error: str  # one line
    detail: str  # the traceback if it was unexpected
    host: str
    final: bool


@dataclass(frozen=True)
class Failed:
    """An item was given up on. `error` is one line, `detail` the traceback if it was unexpected."""

    work: Work
    error: str
    detail: str = ""


Event = Progress | Committed | Attempted | Failed
Observer = Callable[[Event], None]


class Executor(Protocol):
    """Runs work items; `observe` is called in the driver's thread as things happen."""

    planned: int  # workers at the start
    elastic: bool  # whether more may come

    @property
    def workers(self) -> int:
        """How many there are now and are paid for, at work or not."""

    def run(
        self, items: Iterable[Work], observe: Observer, tried: Mapping[Hashable, Tried] | None = None
    ) -> None:
        """Try every item once or more; returns when each was reported Committed or Failed.

        `items` are made as they are needed; `tried` are failures on record by (unit, group). Raises
        InputError when workers cannot start, Interrupted when memory or a GPU fails too often.
        """

    def merge(self, tasks: Sequence[Task]) -> list[dict[str, list[DataFileRecord]]]:
        """Merge data files where there is room for it; called from a thread of its own, while `run` runs."""

    def close(self) -> None:
        """Let go of everything that was started here."""


@dataclass(frozen=True)
class Reason:
    """Why an attempt failed."""

    kind: Kind
    error: str  # one line
    detail: str = ""
    hopeless: bool = False  # it would fail again


def queue(items: Iterable[Work]) -> Iterator[Item[Work]]:
    """Work as the scheduler takes it."""
    for work in items:
        yield Item((work.unit.unit, work.group), work.unit.bytes, work.group, work)


def report_failure(
    scheduler: Scheduler[Work, W],
    attempt: Attempt[Work, W],
    reason: Reason,
    host: str,
    now: float,
    observe: Observer,
) -> Verdict:
    """Tell the scheduler and the observer of a failed attempt. Interrupted where the scan has to stop."""
    work = attempt.item.payload
    verdict = scheduler.failed(attempt.number, reason.kind, now, reason.hopeless)
    if verdict.action == "ignored":
        return verdict
    final = verdict.action in ("given_up", "stop")
    observe(Attempted(work, reason.kind, reason.error, reason.detail, host, final))
    times = verdict.tried.total
    if verdict.action == "given_up":
        error = reason.error if reason.hopeless or times == 1 else f"{reason.error} ({times} attempts)"
        observe(Failed(work, error, reason.detail))
    elif verdict.action == "stop":
        raise exhausted(work, reason.error, times)
    return verdict


def exhausted(work: Work, error: str, times: int) -> Interrupted:
    """What to say when memory or a GPU fails: never that batches be smaller, as values would change."""
    often = f"{times} times " if times > 1 else ""
    if "memory" in error.lower():
        remedy = "take fewer --workers, a machine with more memory, or fewer SAEs in an index of their own"
    else:
        remedy = "see what the machine's log says of it, or take another machine"
    return Interrupted(
        f"{work.unit.path} rows {work.unit.start:,} to {work.unit.stop:,}: failed {often}on {error}; "
        f"{remedy}, and run again; committed units stay"
    )
