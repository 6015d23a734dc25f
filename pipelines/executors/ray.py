"""The Ray executor: one actor per device takes units from this driver, one at a time.

Invariant: only small dataclasses cross Ray; data go from the actor to storage. Ray restarts a dead
actor, this file hands its unit out again (at most INFRASTRUCTURE_TRIES times), Ray itself never retries.
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
import traceback
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from pipelines.executors.base import Committed, Failed, Observer, Progress
from pipelines.unit import Scanner, Setup, Work
from sae_runtime.errors import CorpuscopeError, InputError, one_line

INFRASTRUCTURE_TRIES = 20
TASK_TRIES = 3
_POLL_SECONDS = 0.5
_REACH_SECONDS = 10.0


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
    """The actor. `run` and `progress` are called side by side (max_concurrency 2)."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.scanner: Scanner | None = None
        self.done = (0, 0)

    def run(self, work: Work) -> Any:
        """What `Scanner.scan` returns, or (kind, message, traceback) of what went wrong."""
        self.done = (0, 0)
        try:
            if self.scanner is None:
                self.scanner = Scanner(self.setup, self._add)
            return self.scanner.scan(work)
        except CorpuscopeError as error:
            return ("input" if isinstance(error, InputError) else "data", str(error), "")
        except Exception as error:
            return ("task", f"{type(error).__name__}: {one_line(error)}", traceback.format_exc())

    def progress(self) -> tuple[int, int]:
        """(documents, counted tokens) done of the unit in hand."""
        return self.done

    def _add(self, documents: int, tokens: int) -> None:
        self.done = (self.done[0] + documents, self.done[1] + tokens)


class RayExecutor:
    """A fixed set of actors and the queue in front of them."""

    def __init__(self, setup: Setup, workers: int, local: bool) -> None:
        import ray

        self._ray = ray
        self.workers = workers
        gpu = torch.device(setup.device).type == "cuda"
        # On a cluster of our own nothing competes for the cores; elsewhere ask for what is used.
        cpus = 0 if local else setup.spec.model.threads
        actor = ray.remote(ScanWorker).options(
            num_cpus=cpus,
            num_gpus=1 if gpu else 0,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=2,
        )
        self._actors: list[Any] = [actor.remote(setup) for _ in range(workers)]

    def run(self, items: Sequence[Work], observe: Observer) -> None:
        queue = deque((work, 1) for work in items)
        idle = list(self._actors)
        flying: dict[Any, tuple[Work, int, Any]] = {}
        while queue or flying:
            while queue and idle:
                actor, (work, attempt) = idle.pop(), queue.popleft()
                flying[actor.run.remote(work)] = work, attempt, actor
            ready, _ = self._ray.wait(list(flying), num_returns=1, timeout=_POLL_SECONDS)
            if not ready:
                self._report(flying, observe)
            for reference in ready:
                work, attempt, actor = flying.pop(reference)
                idle.append(actor)
                again = self._settle(reference, work, attempt, observe)
                if again:
                    queue.append((work, attempt + 1))

    def close(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(Exception):  # the cluster may be gone already
                self._ray.kill(actor, no_restart=True)

    def _settle(self, reference: Any, work: Work, attempt: int, observe: Observer) -> bool:
        """Report how an attempt ended; True if it is to be tried again."""
        try:
            result = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            if attempt < INFRASTRUCTURE_TRIES:
                return True
            observe(Failed(work, f"worker lost {attempt} times: {one_line(error)}"))
            return False
        if not isinstance(result, tuple):
            observe(Committed(work, result.commit, result.own, result.measured))
            return False
        kind, message, detail = result
        if kind == "input":
            raise InputError(message)
        if kind == "task" and attempt < TASK_TRIES:
            return True
        observe(Failed(work, message, detail))
        return False

    def _report(self, flying: dict[Any, tuple[Work, int, Any]], observe: Observer) -> None:
        asked = {actor.progress.remote(): work for work, _, actor in flying.values()}
        ready, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=_POLL_SECONDS)
        for reference in ready:
            with contextlib.suppress(self._ray.exceptions.RayError):  # a dead actor shows in `run`
                observe(Progress(asked[reference], *self._ray.get(reference)))
