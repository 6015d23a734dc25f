"""Ray's own metrics, which Prometheus scrapes from each node's metrics port. Every name is in METRICS.

Invariant: a counter counts what commits hold, each once: the worker that made a commit counts what is in it,
the driver what became of attempts. Tags are few: index, run, and of each metric at most one more, whose
values are fixed. Ray adds the node's address and the process. Only processes of a Ray cluster import this.
What Prometheus sees is for watching: Ray hands values over every 10 s, so what a process did in its last
seconds may be missing; `runs/` of the index has the sums.
Measured (Ray 2.60): names get `ray_` before and counters `_total` behind; the `_sum` of a histogram is
made up from its buckets' middles, so seconds that are added up are counters here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipelines.executors.base import Attempted, Committed, Event, Failed
from pipelines.stages import STAGES

if TYPE_CHECKING:
    from pipelines.account import Account
    from pipelines.unit import Scanned

_EVERY = 1.0  # seconds between looks at gauges
_SECONDS = [1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 7200.0]


@dataclass(frozen=True)
class Metric:
    """What is counted where."""

    kind: Literal["counter", "gauge", "histogram"]
    by: Literal["worker", "driver"]
    tag: str | None  # besides index and run
    meaning: str

    def exported(self, name: str) -> str:
        """The name that Prometheus sees."""
        return f"ray_{name}_total" if self.kind == "counter" else f"ray_{name}"


METRICS: dict[str, Metric] = {
    "corpuscope_tokens": Metric("counter", "worker", None, "counted tokens of committed units"),
    "corpuscope_documents": Metric("counter", "worker", None, "documents indexed by committed units"),
    "corpuscope_quarantined": Metric("counter", "worker", None, "documents that could not be scanned"),
    "corpuscope_rows": Metric("counter", "worker", "table", "rows of committed data files"),
    "corpuscope_bytes": Metric("counter", "worker", "table", "bytes of committed data files"),
    "corpuscope_stage_seconds": Metric("counter", "worker", "stage", "worker-seconds of units by stage"),
    "corpuscope_unit_seconds": Metric("histogram", "worker", "group", "seconds of a unit of one SAE group"),
    "corpuscope_units_committed": Metric("counter", "driver", "group", "units of one SAE group committed"),
    "corpuscope_attempts_failed": Metric("counter", "driver", "kind", "attempts at units that failed"),
    "corpuscope_units_given_up": Metric("counter", "driver", None, "units that are not tried again"),
    "corpuscope_worker_seconds": Metric("counter", "driver", None, "seconds in which a worker was held"),
    "corpuscope_units_waiting": Metric("gauge", "driver", None, "units that nobody has in hand"),
    "corpuscope_units_in_flight": Metric("gauge", "driver", None, "units that a worker has in hand"),
    "corpuscope_workers": Metric("gauge", "driver", None, "workers that are held now"),
    "corpuscope_done_share": Metric("gauge", "driver", None, "share of the text to do that is done"),
    "corpuscope_idle_share": Metric(
        "gauge", "driver", None, "share of held worker time without model or encoder, since the start"
    ),
}  # fmt: skip


class Meters:
    """The metrics of one process and one index."""

    def __init__(self, by: Literal["worker", "driver"], index: str) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        def histogram(name: str, meaning: str, tag_keys: tuple[str, ...]) -> Histogram:
            return Histogram(name, meaning, _SECONDS, tag_keys)

        make: dict[str, Callable[..., Any]] = {"counter": Counter, "gauge": Gauge, "histogram": histogram}
        self._index = index
        self._made = {
            name: make[metric.kind](name, metric.meaning, tag_keys=_tags(metric))
            for name, metric in METRICS.items()
            if metric.by == by
        }

    def add(self, name: str, value: float, run: int, tag: object = None) -> None:
        """Add to a counter; nothing for 0, which Ray refuses."""
        if value > 0:
            self._made[name].inc(value, self._values(name, run, tag))

    def put(self, name: str, value: float, run: int, tag: object = None) -> None:
        """Set a gauge, or put a value into a histogram."""
        made, values = self._made[name], self._values(name, run, tag)
        if METRICS[name].kind == "gauge":
            made.set(value, values)
        else:
            made.observe(value, values)

    def _values(self, name: str, run: int, tag: object) -> dict[str, str]:
        values = {"index": self._index, "run": str(run)}
        key = METRICS[name].tag
        return values if key is None else {**values, key: str(tag)}


def _tags(metric: Metric) -> tuple[str, ...]:
    return ("index", "run") if metric.tag is None else ("index", "run", metric.tag)


def count_scanned(meters: Meters, scanned: Scanned) -> None:
    """What a worker counts when it has scanned a unit."""
    commit, run = scanned.commit, scanned.commit.run
    for stage in STAGES:
        meters.add("corpuscope_stage_seconds", scanned.stages[stage], run, stage)
    meters.put("corpuscope_unit_seconds", sum(scanned.stages.values()), run, commit.group)
    if not scanned.own:
        return
    if not commit.group:
        meters.add("corpuscope_tokens", commit.tokens, run)
        meters.add("corpuscope_documents", commit.documents, run)
        meters.add("corpuscope_quarantined", commit.quarantined, run)
    for table, file in commit.files.items():
        meters.add("corpuscope_rows", file.rows, run, table)
        meters.add("corpuscope_bytes", file.bytes, run, table)


def driver_meter(index: str, run: int) -> Callable[[Event, Account], None]:
    """What a driver calls at every event, when its account has taken it in."""
    meters = Meters("driver", index)
    looked, counted = 0.0, 0.0

    def take(event: Event, account: Account) -> None:
        nonlocal looked, counted
        if isinstance(event, Committed):
            if event.own:
                meters.add("corpuscope_units_committed", 1, run, event.work.group)
        elif isinstance(event, Attempted):
            meters.add("corpuscope_attempts_failed", 1, run, event.kind)
        elif isinstance(event, Failed):
            meters.add("corpuscope_units_given_up", 1, run)
        now = time.monotonic()
        if now < looked + _EVERY and not account.ended:
            return
        looked, done, found = now, account.done, account.summary
        meters.add("corpuscope_worker_seconds", found.worker_seconds - counted, run)
        counted = found.worker_seconds
        waiting = done.units - done.committed - done.given_up - len(account.flying)
        meters.put("corpuscope_units_waiting", max(0, waiting), run)
        meters.put("corpuscope_units_in_flight", len(account.flying), run)
        meters.put("corpuscope_workers", account.held, run)
        meters.put("corpuscope_done_share", done.share, run)
        meters.put("corpuscope_idle_share", found.idle_share or 0.0, run)

    return take
