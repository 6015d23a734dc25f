"""The inline executor: units one after the other in this process, without Ray.

Invariant: the values are those of any other executor, because batch shapes and threads are the unit's
and the spec's, not the executor's. Retries and their caps are the same too; only what another process
would be needed for is not to be had: deadlines, and going on after memory or a GPU has failed.
"""

from __future__ import annotations

import socket
import time
import traceback
from collections.abc import Hashable, Iterable, Mapping, Sequence

from pipelines.admission import Admission, introduce
from pipelines.compaction import Task, perform_here
from pipelines.executors.base import (
    Attempted,
    Committed,
    Observer,
    Progress,
    Reason,
    exhausted,
    queue,
    report_failure,
)
from pipelines.failures import kind_of
from pipelines.ledger import DataFileRecord
from pipelines.scheduler import Attempt, Policy, Scheduler, Tried
from pipelines.unit import Scanner, Setup, Work
from sae_runtime.errors import CorpuscopeError, DataError, InputError, one_line

_HERE = 0
_NAP = 1.0  # seconds between looks at the clock while everything waits to be tried again


class InlineExecutor:
    """One scanner in this process."""

    workers = planned = 1
    elastic = False

    def __init__(self, setup: Setup, admission: Admission, policy: Policy | None = None) -> None:
        """InputError if this machine may not scan."""
        why = admission.refusal(introduce(setup.device))
        if why is not None:
            raise InputError(f"this machine may not scan: {why}")
        self.scanner = Scanner(setup)
        self.policy = policy

    def run(
        self, items: Iterable[Work], observe: Observer, tried: Mapping[Hashable, Tried] | None = None
    ) -> None:
        scheduler: Scheduler[Work, int] = Scheduler(queue(items), self.policy, tried)
        scheduler.join(_HERE, time.monotonic())
        while not scheduler.done:
            now = time.monotonic()
            attempt = scheduler.assign(now)
            if attempt is None:
                due = scheduler.wake(now)
                time.sleep(min(_NAP, max(0.0, (now if due is None else due) - now)))
            else:
                self._one(scheduler, attempt, observe)

    def merge(self, tasks: Sequence[Task]) -> list[dict[str, list[DataFileRecord]]]:
        return perform_here(tasks)

    def close(self) -> None:
        pass

    def _one(self, scheduler: Scheduler[Work, int], attempt: Attempt[Work, int], observe: Observer) -> None:
        work = attempt.item.payload
        done = [0, 0]

        def progress(documents: int, tokens: int) -> None:
            done[0] += documents
            done[1] += tokens
            observe(Progress(work, *done))

        self.scanner.progress = progress
        try:
            scanned = self.scanner.scan(work)
        except DataError as error:
            reason = Reason("task", str(error), hopeless=True)
        except CorpuscopeError:
            raise
        except Exception as error:
            reason = Reason(
                kind_of(error), f"{type(error).__name__}: {one_line(error)}", traceback.format_exc()
            )
        else:
            scheduler.committed(attempt.number, time.monotonic())
            observe(Committed(work, scanned.commit, scanned.own, scanned.measured, scanned.stages))
            return
        host = socket.gethostname()
        if reason.kind == "memory":  # this process is not to be trusted any more
            observe(Attempted(work, reason.kind, reason.error, reason.detail, host, final=True))
            raise exhausted(work, reason.error, 1)
        report_failure(scheduler, attempt, reason, host, time.monotonic(), observe)
