"""What each run did and cost: `runs/<run>/summary-<term>.json`, one object for each attempt at the run.

Invariant: the summary of a run is the sum over its attempts. An attempt is one driver that held the lease,
and the lease's term, which no two have, is its number, so summaries are put-if-absent and never change. They
are told, not proved: data never depend on them, and an attempt that was killed leaves none. Whatever can be
counted in commits is counted there (`runs` of SQL, `status`); what is here is of attempts: a driver that goes
on with an older run's units counts them as its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from pipelines.lease import holders, terms
from pipelines.registry import dump, objects
from pipelines.schema import RUNS
from pipelines.stages import DEVICE
from pipelines.storage import Store, names
from sae_runtime.errors import DataError

_NAME = re.compile(r"(\d{6,})/summary-(\d{6,})")
# What follows from the fields: written for people, not read.
_DERIVED = ("worker_hours", "gpu_hours", "tokens_per_second", "idle_share")
# How two attempts' fields become one's; those that are in neither are the later attempt's.
_ADDED = ("attempts", "seconds", "committed", "documents", "quarantined", "tokens", "tokens_run", "retries",
          "given_up", "merged_bytes", "worker_seconds", "gpu_seconds", "unaccounted")  # fmt: skip
_BY_KEY = ("devices", "failures", "rows", "bytes", "stages")


@dataclass(frozen=True)
class RunSummary:
    """A run, or one attempt at it. Counts are of what its attempts did, not of what was there before."""

    run: int
    attempts: int  # drivers that left a summary
    code: tuple[str, ...]  # versions, each once
    devices: Mapping[str, int]  # kind or model of device -> units (of one SAE group) committed on it
    executor: str  # of the last attempt
    host: str  # of its driver
    process: int
    workers: int  # most at once
    started: float  # seconds since 1970, UTC: when the first attempt took the lease
    finished: float  # when the last one ended
    seconds: float  # wall, of all attempts
    units: int  # of one SAE group each: to do, when the last attempt began
    committed: int  # units of one SAE group
    documents: int  # indexed
    quarantined: int  # documents that could not be scanned
    tokens: int  # counted
    tokens_run: int  # that went through the model: for each SAE group again
    retries: int  # failed attempts at units that were followed by another
    failures: Mapping[str, int]  # failed attempts at units by kind, retried or not
    given_up: int  # units of one SAE group
    rows: Mapping[str, int]  # by table, as committed
    bytes: Mapping[str, int]  # of data files by table, as committed
    merged_bytes: int  # written by compaction beside the scan
    worker_seconds: float  # in which a worker was held, at work or not
    gpu_seconds: float  # those of them that a GPU was held
    stages: Mapping[str, float]  # worker-seconds of units by stage (pipelines/stages.py)
    cost: float | None  # in the price's currency; None where an attempt had no price
    exit_code: int  # of the last attempt
    reason: str  # how that ended, one line
    error: str = ""  # the newest failure of an attempt at a unit, one line
    unaccounted: int = 0  # attempts without a summary: killed, or still at work

    @property
    def worker_hours(self) -> float:
        return self.worker_seconds / 3600

    @property
    def gpu_hours(self) -> float:
        return self.gpu_seconds / 3600

    @property
    def tokens_per_second(self) -> float | None:
        """Counted tokens by wall time."""
        return self.tokens / self.seconds if self.seconds > 0 else None

    @property
    def idle_share(self) -> float | None:
        """Share of the time in which a worker was held and neither the model nor an encoder ran on it."""
        if self.worker_seconds <= 0:
            return None
        busy = sum(self.stages.get(stage, 0.0) for stage in DEVICE)
        return min(1.0, max(0.0, 1 - busy / self.worker_seconds))

    @property
    def facts(self) -> dict[str, Any]:
        """Fields, and what follows from them."""
        return {**asdict(self), **{name: getattr(self, name) for name in _DERIVED}}


def name(run: int, term: int) -> str:
    """Where the summary of the attempt that held a term is."""
    return f"{folder(run)}/summary-{term:06d}.json"


def folder(run: int) -> str:
    """Where what is said of a run is."""
    return f"{RUNS}/{run:06d}"


def write(store: Store, term: int, attempt: RunSummary) -> bool:
    """Put an attempt's summary down; False if the term has one."""
    return store.put_if_absent(name(attempt.run, term), dump(attempt.facts))


def read(store: Store, run: int) -> RunSummary | None:
    """The summary of a run, or None where no attempt at it has left one. DataError if one is damaged.

    Attempts without a summary are told from the leases: a listing of them, and those that left none.
    """
    attempts = _attempts(store)
    summed = _summed(store, [each for each in attempts if each[0] == run]).get(run)
    if summed is None:
        return None
    accounted = {term for _, term in attempts}
    silent = [term for term in terms(store) if term not in accounted]
    return replace(summed, unaccounted=sum(holder.run == run for holder in holders(store, silent)))


def newest(store: Store) -> RunSummary | None:
    """The summary of the newest run that has one."""
    attempts = _attempts(store)
    return read(store, attempts[-1][0]) if attempts else None


def read_all(store: Store) -> dict[int, RunSummary]:
    """Summaries by run, attempts without one left out: a listing, and an object for each attempt."""
    return _summed(store, _attempts(store))


def read_one(store: Store, path: str) -> RunSummary:
    """One attempt's summary by its name. DataError if it is damaged."""
    [head] = objects(store, [path])
    return _parsed(store, path, head)


def paths(store: Store) -> list[str]:
    """Names of all attempts' summaries."""
    return [name(*each) for each in _attempts(store)]


def _attempts(store: Store) -> list[tuple[int, int]]:
    """(run, term) of every summary, ascending."""
    found = (_NAME.fullmatch(each) for each in names(store, RUNS, ".json"))
    return sorted((int(match[1]), int(match[2])) for match in found if match)


def _summed(store: Store, attempts: Sequence[tuple[int, int]]) -> dict[int, RunSummary]:
    summed: dict[int, RunSummary] = {}
    paths = [name(*each) for each in attempts]
    for (run, _), path, head in zip(attempts, paths, objects(store, paths), strict=True):
        one = _parsed(store, path, head)
        summed[run] = plus(summed[run], one) if run in summed else one
    return summed


def _parsed(store: Store, path: str, head: dict[str, Any]) -> RunSummary:
    try:
        known = {each.name: head[each.name] for each in fields(RunSummary)}
        found = RunSummary(**{**known, "code": tuple(known["code"])})
    except (KeyError, TypeError) as error:
        raise DataError(f"{store.uri}/{path}: damaged, not a run's summary; remove that file") from error
    if not path.startswith(f"{folder(found.run)}/"):
        raise DataError(
            f"{store.uri}/{path}: damaged, it says that it is of run {found.run}; remove that file"
        )
    return found


def plus(before: RunSummary, after: RunSummary) -> RunSummary:
    """One summary of two attempts at a run, or of more; `after` began later."""
    later = asdict(after)
    first = asdict(before)
    for each in _ADDED:
        later[each] += first[each]
    for each in _BY_KEY:
        both = (*first[each], *later[each])
        later[each] = {key: first[each].get(key, 0) + later[each].get(key, 0) for key in both}
    later["code"] = tuple(dict.fromkeys((*before.code, *after.code)))
    later["workers"] = max(before.workers, after.workers)
    later["started"] = min(before.started, after.started)
    later["cost"] = None if before.cost is None or after.cost is None else before.cost + after.cost
    later["error"] = after.error or before.error
    return RunSummary(**later)
