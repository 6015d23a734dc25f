"""One run of a Ray executor: what is in flight between the scheduler and the workers.

Invariant: an attempt in flight is settled once, by its answer or by its deadline. A process in which memory
or the GPU failed, or that is past a unit's deadline, is killed and started anew, never used again. Ray itself
comes as an argument: tests have one of their own.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from pipelines.executors.base import Committed, Observer, Progress, Reason, report_failure
from pipelines.executors.crew import Crew
from pipelines.scheduler import Attempt, Scheduler
from pipelines.unit import Work
from sae_runtime.errors import InputError, one_line

_POLL_SECONDS = 0.5
_SILENT_SECONDS = 10.0


class Drive:
    """Hands items to workers until all have ended."""

    def __init__(
        self, ray: Any, crew: Crew, scheduler: Scheduler[Work, int], items: int, observe: Observer
    ) -> None:
        """`items` is how many the scheduler has; `observe` is told what happens to them."""
        self._ray, self._crew, self._scheduler, self._observe = ray, crew, scheduler, observe
        self._items = items
        self._flying: dict[Any, Attempt[Work, int]] = {}
        self._dropped: set[int] = set()  # attempts that were asked to stop
        self._asked: dict[Any, Attempt[Work, int]] = {}  # progress that is awaited
        self._ask_at = 0.0

    def run(self) -> None:
        scheduler = self._scheduler
        while not scheduler.done:
            now = time.monotonic()
            for late in scheduler.overdue(now):
                self._expired(late, now)
            left = self._items - scheduler.committed_items - scheduler.given_up_items
            self._crew.keep(scheduler.useful(left), now)
            while (attempt := scheduler.assign(now)) is not None:
                actor = self._crew.actor(attempt.worker)
                self._flying[actor.run.remote(attempt.item.payload, attempt.number)] = attempt
            for worker in scheduler.surplus():
                scheduler.leave(worker)
                self._crew.end(worker)
            self._wait()

    def _wait(self) -> None:
        """Until something was answered, half a second at most; take in all that was."""
        waiting = self._crew.waiting
        pending = [*self._flying, *waiting]
        if not pending:
            time.sleep(_POLL_SECONDS / 10)
            return
        ready, _ = self._ray.wait(pending, num_returns=1, timeout=_POLL_SECONDS)
        if ready:
            ready, _ = self._ray.wait(pending, num_returns=len(pending), timeout=0)
        for reference in ready:
            if reference in waiting:
                now = time.monotonic()
                if self._crew.answered(waiting[reference], now):
                    self._scheduler.join(waiting[reference], now)
            elif reference in self._flying:
                self._settle(reference, self._flying.pop(reference))
        self._report()

    def _gone(self, worker: int, kill: bool) -> None:
        """A worker's process has ended, or is to end."""
        self._scheduler.leave(worker)
        self._crew.gone(worker, kill, time.monotonic())

    # --- attempts

    def _settle(self, reference: Any, attempt: Attempt[Work, int]) -> None:
        """Take in how an attempt ended."""
        lost = False
        try:
            result = self._ray.get(reference)
        except self._ray.exceptions.OutOfMemoryError as error:
            result, lost = Reason("memory", f"out of memory: {one_line(error)}"), True
        except self._ray.exceptions.RayError as error:
            result, lost = Reason("infra", f"worker lost: {one_line(error)}"), True
        if isinstance(result, InputError):
            raise result
        if isinstance(result, Reason):
            self._failed(attempt, result, lost)
            return
        now, work = time.monotonic(), attempt.item.payload
        if result is None:
            self._scheduler.dropped(attempt.number, now)
            return
        others = self._scheduler.committed(attempt.number, now)
        if others is None:
            return
        for other in others:
            self._dropped.add(other.number)
            self._crew.actor(other.worker).cancel.remote(other.number)
        self._observe(Committed(work, result.commit, result.own, result.measured, result.stages))

    def _failed(self, attempt: Attempt[Work, int], reason: Reason, lost: bool) -> None:
        host = self._crew.host(attempt.worker)
        verdict = report_failure(self._scheduler, attempt, reason, host, time.monotonic(), self._observe)
        if lost or verdict.restart or reason.kind == "memory":
            self._gone(attempt.worker, kill=not lost)

    def _expired(self, attempt: Attempt[Work, int], now: float) -> None:
        """A worker is past its deadline: nobody waits for it any longer."""
        reference = next(r for r, a in self._flying.items() if a.number == attempt.number)
        del self._flying[reference]
        reason = Reason("timeout", f"not done within {now - attempt.started:,.0f} s")
        host = self._crew.host(attempt.worker)
        report_failure(self._scheduler, attempt, reason, host, now, self._observe)
        self._gone(attempt.worker, kill=True)

    def _report(self) -> None:
        """Tell how far the attempts in flight are; never waits."""
        if self._asked:
            ready, _ = self._ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)
            for reference in ready:
                attempt = self._asked.pop(reference)
                with contextlib.suppress(self._ray.exceptions.RayError):  # a dead actor shows in `run`
                    done = self._ray.get(reference)
                    if attempt in self._flying.values():
                        self._observe(Progress(attempt.item.payload, *done))
        now = time.monotonic()
        # What a hung worker does not answer must not silence the others.
        if now >= self._ask_at + (_SILENT_SECONDS if self._asked else 0.0):
            self._ask_at = now + _POLL_SECONDS
            self._asked = {
                self._crew.actor(attempt.worker).progress.remote(): attempt
                for attempt in self._flying.values()
                if not attempt.copy and attempt.number not in self._dropped
            }
