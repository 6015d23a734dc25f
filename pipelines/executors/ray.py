"""The Ray executor: one actor per device takes units from this driver, one at a time.

Invariant: only small dataclasses cross Ray; data go from the actor to storage. Ray restarts a dead
actor and never retries a unit: `drive.py` hands units out, `crew.py` knows the actors.
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
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch

from pipelines import logs
from pipelines.admission import introduce
from pipelines.compaction import Task, perform
from pipelines.elastic import Machine, Need, room
from pipelines.executors.base import Observer, Reason, queue
from pipelines.executors.crew import Crew, Gate
from pipelines.executors.drive import Drive
from pipelines.executors.metrics import Meters, count_scanned
from pipelines.failures import kind_of
from pipelines.ledger import DataFileRecord
from pipelines.scheduler import Policy, Scheduler, Tried
from pipelines.unit import Scanned, Scanner, Setup, Work
from sae_runtime.errors import CorpuscopeError, InputError, one_line

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
    if address == "auto":
        return
    if address.startswith(("http://", "https://")):
        raise InputError(
            f"--address: {address.partition('://')[0]}:// means a dashboard, to which scans are submitted "
            "(corpuscope submit); here the cluster's own HOST:PORT is wanted, usually of port 6379"
        )
    match = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if match is None:
        raise InputError(f"--address: {address!r} is not HOST:PORT, ray://HOST:PORT or auto")
    try:
        socket.create_connection((match[1].strip("[]"), int(match[2])), _REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--address: no Ray cluster at {address}: {one_line(error)}; `ray start --head` says which "
            "HOST:PORT its machines join by"
        ) from error


def cluster_device() -> str:
    """`cuda` where the connected cluster has GPUs, else `cpu`."""
    import ray

    return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"


def default_workers(device: str, threads: int) -> int:
    """How many a cluster of our own is to have: one per GPU, or as many as its cores have room for."""
    return max(1, room(machines(), worker_need(device, threads)))


def machines() -> list[Machine]:
    """The machines of the connected cluster that are alive."""
    import ray

    have = ((node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"])
    names = ("CPU", "GPU", "memory")
    return [Machine(node, *(found.get(name, 0.0) for name in names)) for node, found in have]


def worker_need(device: str, threads: int) -> Need:
    """What one worker takes of a machine."""
    return Need(threads, int(torch.device(device).type == "cuda"))


class ScanWorker:
    """The actor. `run` and the rest are called side by side (max_concurrency 2)."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.scanner: Scanner | None = None
        self.judged = False  # what it is was told
        self.done = (0, 0)
        self.number = 0  # of the attempt in hand
        self.unwanted = 0
        self.meters = Meters("worker", setup.index)
        logs.to_stderr()

    def ready(self) -> dict[str, str]:
        """What it tells of itself before it is given work: `introduce`, and the `node` that it is on."""
        import ray

        self.judged = True
        return introduce(self.setup.device) | {"node": ray.get_runtime_context().get_node_id()}

    def run(self, work: Work, number: int) -> Scanned | Reason | InputError | None:
        """Scan a unit as attempt `number`; None if it was cancelled, InputError for the driver to raise.

        RuntimeError in a process that nobody has judged: Ray made it in place of one that was idle.
        """
        if not self.judged:
            raise RuntimeError("it was started anew while it was idle")
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


class RayExecutor:
    """Actors that follow the cluster, or a number of them, and a scheduler in front."""

    def __init__(
        self,
        setup: Setup,
        gate: Gate,
        notice: Callable[[str], None],
        items: int,
        workers: int | None,
        local: bool,
        policy: Policy | None = None,
    ) -> None:
        """`workers` at most, for `items` to do. `local`: on a cluster of our own, which has room for them."""
        import ray

        self._ray, self._setup, self._items, self._policy = ray, setup, items, policy
        self.elastic = not local
        need = worker_need(setup.device, setup.spec.model.threads)
        # On a cluster of our own nothing competes for the cores; elsewhere ask for what is used.
        self._class = ray.remote(ScanWorker)
        self._options = {
            "num_cpus": 0 if local else need.cpus,
            "num_gpus": need.gpus,
            "max_restarts": -1,
            "max_task_retries": 0,
            "max_concurrency": 2,
        }
        self._crew = Crew(ray, self._hire, gate, notice, need, workers, None if local else machines)
        self._crew.keep(items, time.monotonic())
        self.planned = min(items, self._crew.room, items if workers is None else workers)

    @property
    def workers(self) -> int:
        return self._crew.joined

    def run(
        self, items: Iterable[Work], observe: Observer, tried: Mapping[Hashable, Tried] | None = None
    ) -> None:
        scheduler: Scheduler[Work, int] = Scheduler(queue(items), self._policy, tried)
        Drive(self._ray, self._crew, scheduler, self._items, observe).run()

    def merge(self, tasks: Sequence[Task]) -> list[dict[str, list[DataFileRecord]]]:
        """On the cluster, beside the actors: they may hold every core, so none is asked for."""
        options = {"num_cpus": 0, "max_retries": _MERGE_TRIES, **_elsewhere(self._crew.refused)}
        remote = self._ray.remote(perform).options(**options)
        found: list[dict[str, list[DataFileRecord]]] = self._ray.get([remote.remote(task) for task in tasks])
        return found

    def close(self) -> None:
        with contextlib.suppress(Exception):  # the cluster may be gone already
            self._crew.close()

    def _hire(self, refused: frozenset[str]) -> Any:
        return self._class.options(**self._options, **_elsewhere(refused)).remote(self._setup)


def _elsewhere(nodes: frozenset[str]) -> dict[str, Any]:
    """Options of an actor or a task that keep it off some nodes."""
    return {"label_selector": {"ray.io/node-id": f"!in({','.join(sorted(nodes))})"}} if nodes else {}
