"""The Ray executor: one actor per device takes units from this driver, one at a time.

Invariant: only small dataclasses cross Ray; data go from the actor to storage. Ray restarts a dead
actor and never retries a unit: `pipelines.scheduler` decides who gets it next. An actor is given work only
after it has answered, so an actor that waits for a machine holds nothing up. A process in which memory or
the GPU failed, or that is past a unit's deadline, is killed and started anew, never used again.
Plain actors and a ledger rather than Ray Data or ActorPool: the pool drops a dead actor for good and
knows no deadlines. A local cluster costs 3 to 6 s to start and is ended when the scan ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
import time
import traceback
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipelines import logs
from pipelines.compaction import Task, perform
from pipelines.executors.base import Committed, Observer, Progress, Reason, queue, report_failure
from pipelines.executors.metrics import Meters, count_scanned
from pipelines.failures import kind_of
from pipelines.ledger import DataFileRecord
from pipelines.scheduler import Attempt, Policy, Scheduler, Tried
from pipelines.unit import Scanned, Scanner, Setup, Work
from sae_runtime.errors import CorpuscopeError, InputError, one_line

_POLL_SECONDS = 0.5
_ASK_SECONDS = 1.0  # between looks at an actor that did not answer
_SILENT_SECONDS = 10.0
_STARTS = 3  # actors in a row that end while they are made, before a worker is given up
_REACH_SECONDS = 10.0
_MERGE_TRIES = 5  # where a machine is lost


def connect(address: str | None) -> bool:
    """Join the cluster at `address`, or start one here. True if this call started or joined it.

    Raises InputError when Ray is missing or the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "--executor ray: Ray is not installed; pip install ray, or --executor inline"
        ) from error
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {"address": "local", "include_dashboard": False}
    else:
        _check_listening(address)
        options["address"] = address
    stop = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"--address: no Ray cluster at {address or 'this machine'}: {one_line(error)}"
        ) from error
    if stop is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)  # Ray put its own there, which ends the process with code 15
    return True


def _check_listening(address: str) -> None:
    """InputError if nothing listens at a HOST:PORT; Ray itself would try for two minutes and more."""
    match = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if match is None:
        if address != "auto":
            raise InputError(f"--address: {address!r} is not HOST:PORT, ray://HOST:PORT or auto")
        return
    try:
        socket.create_connection((match[1].strip("[]"), int(match[2])), _REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--address: no Ray cluster at {address}: {one_line(error)}") from error


def cluster_device() -> str:
    """`cuda` where the connected cluster has GPUs, else `cpu`."""
    import ray

    return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"


def default_workers(device: str, threads: int) -> int:
    """One per GPU, or as many as the cluster's CPUs have room for."""
    import ray

    resources = ray.cluster_resources()
    if device == "cuda":
        return max(1, int(resources.get("GPU", 0)))
    return max(1, int(resources.get("CPU", 1)) // threads)


class ScanWorker:
    """The actor. `run` and the rest are called side by side (max_concurrency 2)."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.scanner: Scanner | None = None
        self.done = (0, 0)
        self.number = 0  # of the attempt in hand
        self.unwanted = 0
        self.meters = Meters("worker", setup.index)
        logs.to_stderr()

    def ready(self) -> tuple[str, int]:
        """The host that it is on, and its process."""
        return socket.gethostname(), os.getpid()

    def run(self, work: Work, number: int) -> Scanned | Reason | InputError | None:
        """Scan a unit as attempt `number`; None if it was cancelled, InputError for the driver to raise."""
        self.done, self.number = (0, 0), number
        try:
            if self.scanner is None:
                self.scanner = Scanner(self.setup, self._add)
            scanned = self.scanner.scan(work)
            count_scanned(self.meters, scanned)
            return scanned
        except _Cancelled:
            return None
        except InputError as error:
            return InputError(str(error))
        except CorpuscopeError as error:
            return Reason("task", str(error), hopeless=True)
        except Exception as error:
            what = f"{type(error).__name__}: {one_line(error)}"
            return Reason(kind_of(error), what, traceback.format_exc())

    def progress(self) -> tuple[int, int]:
        """(documents, counted tokens) done of the unit in hand."""
        return self.done

    def cancel(self, number: int) -> None:
        """Drop attempt `number` at its next chunk: its unit has been committed elsewhere."""
        self.unwanted = number

    def _add(self, documents: int, tokens: int) -> None:
        if self.number == self.unwanted:
            raise _Cancelled
        self.done = (self.done[0] + documents, self.done[1] + tokens)


class _Cancelled(BaseException):
    """Unwinds a scan that is not wanted any more; no `except Exception` on the way holds it up."""


@dataclass
class _Slot:
    """A worker as the driver knows it: the same slot goes through several processes."""

    actor: Any
    host: str = ""
    process: int = 0
    killed: int = 0  # the process that must not join again
    starts: int = 0  # actors made in a row that never answered
    asked: Any = None  # the answer that is awaited before it joins
    ask_at: float = 0.0  # when to ask next; no use where it has joined
    joined: bool = False


class RayExecutor:
    """A fixed number of actors, and a scheduler in front of them."""

    def __init__(self, setup: Setup, workers: int, local: bool, policy: Policy | None = None) -> None:
        import ray

        self._ray = ray
        self.workers, self.policy, self._setup = workers, policy, setup
        gpu = torch.device(setup.device).type == "cuda"
        # On a cluster of our own nothing competes for the cores; elsewhere ask for what is used.
        cpus = 0 if local else setup.spec.model.threads
        self._class = ray.remote(ScanWorker).options(
            num_cpus=cpus,
            num_gpus=1 if gpu else 0,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=2,
        )
        self._slots = {number: _Slot(self._class.remote(setup)) for number in range(workers)}

    def run(
        self, items: Iterable[Work], observe: Observer, tried: Mapping[Hashable, Tried] | None = None
    ) -> None:
        _Drive(
            self._ray, self._slots, self._replace, Scheduler(queue(items), self.policy, tried), observe
        ).run()

    @property
    def held(self) -> int:
        return sum(slot.joined for slot in self._slots.values())

    def merge(self, tasks: Sequence[Task]) -> list[dict[str, list[DataFileRecord]]]:
        """On the cluster, beside the actors: they may hold every core, so none is asked for."""
        remote = self._ray.remote(perform).options(num_cpus=0, max_retries=_MERGE_TRIES)
        found: list[dict[str, list[DataFileRecord]]] = self._ray.get([remote.remote(task) for task in tasks])
        return found

    def _replace(self) -> Any:
        return self._class.remote(self._setup)

    def close(self) -> None:
        for slot in self._slots.values():
            with contextlib.suppress(Exception):  # the cluster may be gone already
                self._ray.kill(slot.actor, no_restart=True)


class _Drive:
    """One run: what is in flight between the scheduler and the actors."""

    def __init__(
        self,
        ray: Any,
        slots: dict[int, _Slot],
        replace: Any,
        scheduler: Scheduler[Work, int],
        observe: Observer,
    ) -> None:
        self._ray, self._slots, self._replace = ray, slots, replace
        self._scheduler, self._observe = scheduler, observe
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
            self._ask_to_join(now)
            while (attempt := scheduler.assign(now)) is not None:
                actor = self._slots[attempt.worker].actor
                self._flying[actor.run.remote(attempt.item.payload, attempt.number)] = attempt
            for worker in scheduler.surplus():
                self._let_go(worker)
            self._wait()

    def _wait(self) -> None:
        """Until something was answered, half a second at most; take in all that was."""
        waiting = {slot.asked: number for number, slot in self._slots.items() if slot.asked is not None}
        pending = [*self._flying, *waiting]
        if not pending:
            time.sleep(_POLL_SECONDS / 10)
            return
        ready, _ = self._ray.wait(pending, num_returns=1, timeout=_POLL_SECONDS)
        if ready:
            ready, _ = self._ray.wait(pending, num_returns=len(pending), timeout=0)
        for reference in ready:
            if reference in waiting:
                self._answered(waiting[reference])
            elif reference in self._flying:
                self._settle(reference, self._flying.pop(reference))
        self._report()

    # --- workers

    def _ask_to_join(self, now: float) -> None:
        for slot in self._slots.values():
            if not slot.joined and slot.asked is None and now >= slot.ask_at:
                slot.asked = slot.actor.ready.remote()

    def _answered(self, worker: int) -> None:
        slot, now = self._slots[worker], time.monotonic()
        reference, slot.asked = slot.asked, None
        try:
            slot.host, slot.process = self._ray.get(reference)
        except self._ray.exceptions.ActorDiedError as error:  # for good: it could not be made
            slot.starts += 1
            self._ray.kill(slot.actor, no_restart=True)
            if slot.starts >= _STARTS:
                del self._slots[worker]
                if not self._slots:
                    raise CorpuscopeError(
                        f"no worker can be started: {one_line(error)}; has every machine of the cluster the "
                        "same corpuscope and Python?"
                    ) from error
                return
            slot.actor, slot.ask_at = self._replace(), now + _ASK_SECONDS
        except self._ray.exceptions.RayError:  # it is being restarted
            slot.ask_at = now + _ASK_SECONDS
        else:
            if slot.process == slot.killed:  # it answered before the kill came
                slot.ask_at = now + _ASK_SECONDS
                return
            slot.starts, slot.joined = 0, True
            self._scheduler.join(worker, now)

    def _gone(self, worker: int, kill: bool) -> None:
        """A worker's process has ended, or is to end: it joins again when the next one answers."""
        slot = self._slots[worker]
        self._scheduler.leave(worker)
        slot.joined, slot.ask_at = False, time.monotonic() + (_ASK_SECONDS if kill else 0.0)
        if kill:
            slot.killed = slot.process
            self._ray.kill(slot.actor, no_restart=False)

    def _let_go(self, worker: int) -> None:
        """End a worker that nothing is left for, so that its machine can be given back."""
        self._scheduler.leave(worker)
        self._ray.kill(self._slots.pop(worker).actor, no_restart=True)

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
            self._slots[other.worker].actor.cancel.remote(other.number)
        self._observe(Committed(work, result.commit, result.own, result.measured, result.stages))

    def _failed(self, attempt: Attempt[Work, int], reason: Reason, lost: bool) -> None:
        host = self._slots[attempt.worker].host
        verdict = report_failure(self._scheduler, attempt, reason, host, time.monotonic(), self._observe)
        if lost or verdict.restart or reason.kind == "memory":
            self._gone(attempt.worker, kill=not lost)

    def _expired(self, attempt: Attempt[Work, int], now: float) -> None:
        """A worker is past its deadline: nobody waits for it any longer."""
        reference = next(r for r, a in self._flying.items() if a.number == attempt.number)
        del self._flying[reference]
        reason = Reason("timeout", f"not done within {now - attempt.started:,.0f} s")
        host = self._slots[attempt.worker].host
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
                self._slots[attempt.worker].actor.progress.remote(): attempt
                for attempt in self._flying.values()
                if not attempt.copy and attempt.number not in self._dropped
            }
