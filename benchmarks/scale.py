"""A million units, a thousand workers, no model: what planning, committing, compacting and resuming cost.

Everything is the product's own, from `run_scan` down: corpus files, planner, registry, lease, ledger,
failures, tiers, snapshots, scheduler. Only the executor is not: its workers live on a virtual clock, draw how
long a unit takes and what goes wrong, and commit units without data files. `os.fsync` does nothing here, so
that disks are left out; each part is a process of its own, so that peaks of memory are its own.

    plan     the corpus indexed, the plan registered; stopped before the first unit
    run      the same command again: every unit committed by 1,000 workers, with tiers as in any scan
    a        the same command again: all is committed, nothing to do
    c        99 % of the commits, nothing compacted: seconds to the first unit
    named    the same, each commit naming eight data files as those of a real scan do
    tiers    c, compacted in tiers
    b        the same, compacted: seconds to the first unit
    status   `corpuscope status` and `queries.connect` of the index that `run` made

    python benchmarks/scale.py [--units 20000 --units 1000000] [--workers 1000] [--folder DIR]
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).resolve().parent
PARTS = ("plan", "run", "a", "c", "named", "tiers", "b", "status")
ROWS = 1000  # of a corpus file
SEED = 1
MISSING = 0.01  # of the units, scattered, in b and c

# The virtual cluster. Seconds.
MEDIAN, SIGMA = 60.0, 0.4  # of a unit; lognormal
STRAGGLERS, SLOWER = 0.002, (10.0, 50.0)  # share of attempts, and how much longer they take
NODE_WORKERS, NODE_LIFE, ZONE_EVERY = 8, 12 * 3600.0, 6 * 3600.0
ZONE = 10  # one node in so many is lost at once when a zone fails
ABSENT = (30.0, 600.0)  # until what was lost is back
LOST, STORAGE, TASK, HANGS = 0.002, 0.003, 0.002, 0.0002  # share of attempts
POISON = 1e-5  # share of units that always fail
RESTART, CANCEL = 15.0, 1.0

Found = dict[str, Any]


# --- the virtual cluster


class Timed:
    """Counts calls of a function and their seconds."""

    def __init__(self, function: Callable[..., Any], clock: Callable[[], float] = time.perf_counter) -> None:
        self.function, self.clock = function, clock
        self.calls, self.seconds, self.longest = 0, 0.0, 0.0

    def __call__(self, *args: Any, **more: Any) -> Any:
        began = self.clock()
        try:
            return self.function(*args, **more)
        finally:
            took = self.clock() - began
            self.calls, self.seconds, self.longest = (
                self.calls + 1,
                self.seconds + took,
                max(self.longest, took),
            )


class Cluster:
    """An executor whose workers are entries of a heap of events: (virtual second, number, what, about)."""

    def __init__(self, index: str, workers: int, poison: float = POISON) -> None:
        from pipelines.ledger import Ledger
        from pipelines.storage import Store

        self.workers = self.planned = workers
        self.elastic, self.poison = False, poison
        self.ledger = Ledger(Store(index))
        self.now = 0.0
        self.work = 0.0  # seconds of the attempts that committed first, stragglers as if they were none
        self.emptied: float | None = None  # when the last item was taken
        self.counts: Counter[str] = Counter()
        self.committing = Timed(self.ledger.commit)
        self.observing, self.deciding = 0.0, 0.0  # seconds of this machine
        self.calls = 0  # of the scheduler
        self.most_open = 0
        self._random = random.Random(SEED)
        self._events: list[tuple[float, int, str, Any]] = []
        self._numbers = itertools.count()
        self._flying: dict[int, Any] = {}  # attempts by number
        self._of: dict[int, int] = {}  # worker -> its attempt
        self._dropped: set[int] = set()
        self._gone: set[int] = set()  # let go for good
        self._joined: set[int] = set()

    def run(
        self,
        items: Iterable[Any],
        observe: Callable[[Any], None],
        tried: Mapping[Hashable, Any] | None = None,
    ) -> None:
        from pipelines.executors.base import queue
        from pipelines.scheduler import Scheduler

        def watched() -> Iterator[Any]:
            yield from queue(items)
            self.emptied = self.now

        def observed(event: Any) -> None:
            began = time.perf_counter()
            observe(event)
            self.observing += time.perf_counter() - began

        self._observe = observed
        self._scheduler = _Counted(Scheduler(watched(), None, tried))
        for worker in range(self.workers):
            self._at(self._random.random() * 60, "join", worker)
        nodes = -(-self.workers // NODE_WORKERS)
        self._at(self._random.expovariate(nodes / NODE_LIFE), "node", nodes)
        self._at(self._random.expovariate(1 / ZONE_EVERY), "zone", nodes)
        while not self._scheduler.done:
            self._step()
        self.deciding, self.calls = self._scheduler.seconds, self._scheduler.calls

    def _step(self) -> None:
        scheduler = self._scheduler
        for attempt in scheduler.overdue(self.now):
            self._fail(attempt, "timeout", f"not done within {self.now - attempt.started:,.0f} s", RESTART)
        while (attempt := scheduler.assign(self.now)) is not None:
            self._start(attempt)
        self.most_open = max(self.most_open, len(self._flying))
        for worker in scheduler.surplus():
            scheduler.leave(worker)
            self._joined.discard(worker)
            self._gone.add(worker)
        wake = scheduler.wake(self.now)
        until = self._events[0][0] if wake is None else min(wake, self._events[0][0])
        self.now = max(self.now, until)
        while self._events and self._events[0][0] <= self.now:
            _, _, what, about = heapq.heappop(self._events)
            getattr(self, f"_{what}")(about)

    def _at(self, delay: float, what: str, about: Any) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._numbers), what, about))

    def _start(self, attempt: Any) -> None:
        draw = self._random.random
        self._flying[attempt.number], self._of[attempt.worker] = attempt, attempt.number
        self.counts["attempts"] += 1
        self.counts["copies"] += attempt.copy
        usual = seconds = MEDIAN * self._random.lognormvariate(0.0, SIGMA)
        if draw() < STRAGGLERS:
            seconds *= self._random.uniform(*SLOWER)
            self.counts["stragglers"] += 1
        kind = draw()
        if int(attempt.item.key[0][:8], 16) < self.poison * 2**32:
            self._at(seconds * draw(), "task", attempt)
        elif kind < LOST:
            self._at(seconds * draw(), "lost", attempt)
        elif kind < LOST + STORAGE:
            self._at(seconds * draw(), "storage", attempt)
        elif kind < LOST + STORAGE + TASK:
            self._at(seconds * draw(), "task", attempt)
        elif kind >= LOST + STORAGE + TASK + HANGS:
            self._at(seconds, "commit", (attempt, usual))

    # --- events

    def _join(self, worker: int) -> None:
        if worker not in self._gone:
            self._joined.add(worker)
            self._scheduler.join(worker, self.now)

    def _commit(self, about: tuple[Any, float]) -> None:
        from pipelines.executors.base import Committed
        from pipelines.ledger import Commit

        attempt, usual = about
        if self._flying.pop(attempt.number, None) is None:
            return
        del self._of[attempt.worker]
        work = attempt.item.payload
        commit = Commit(
            work.unit.unit, work.unit.ordinal, work.group, uuid.uuid4().hex, work.run,
            documents=work.unit.documents, quarantined=0, poison=(), contexts=1, tokens=8, tokens_run=9,
            started=attempt.started, finished=self.now, device="virtual",
        )  # fmt: skip
        own = self.committing(commit)
        others = self._scheduler.committed(attempt.number, self.now)
        if own == (others is None):
            raise AssertionError(f"the ledger and the scheduler disagree on unit {work.unit.unit}")
        if others is None:
            self.counts["lost races"] += 1
            return
        self.work += usual
        for other in others:
            self._dropped.add(other.number)
            self._at(CANCEL, "drop", other)
        self._observe(Committed(work, commit))

    def _drop(self, attempt: Any) -> None:
        if self._flying.pop(attempt.number, None) is not None:
            del self._of[attempt.worker]
            self._scheduler.dropped(attempt.number, self.now)

    def _lost(self, attempt: Any) -> None:
        self._fail(attempt, "infra", "worker lost", RESTART)

    def _storage(self, attempt: Any) -> None:
        self._fail(attempt, "infra", "storage did not answer", None)

    def _task(self, attempt: Any) -> None:
        self._fail(attempt, "task", "ValueError: drawn", None)

    def _node(self, nodes: int) -> None:
        self.counts["nodes lost"] += 1
        self._lose([self._random.randrange(nodes)])
        self._at(self._random.expovariate(nodes / NODE_LIFE), "node", nodes)

    def _zone(self, nodes: int) -> None:
        self.counts["zones lost"] += 1
        self._lose(self._random.sample(range(nodes), -(-nodes // ZONE)))
        self._at(self._random.expovariate(1 / ZONE_EVERY), "zone", nodes)

    def _lose(self, nodes: Sequence[int]) -> None:
        for node in nodes:
            back = self._random.uniform(*ABSENT)
            for worker in range(node * NODE_WORKERS, min((node + 1) * NODE_WORKERS, self.workers)):
                if worker in self._of:
                    self._fail(self._flying[self._of[worker]], "infra", "machine lost", back)
                elif worker in self._joined:
                    self._leave(worker, back)

    def _fail(self, attempt: Any, kind: Any, error: str, back: float | None) -> None:
        """An attempt fails; with it its worker, where it comes `back` after so many seconds."""
        from pipelines.executors.base import Reason, report_failure

        if self._flying.pop(attempt.number, None) is None:
            return
        del self._of[attempt.worker]
        verdict = report_failure(
            self._scheduler, attempt, Reason(kind, error), f"node-{attempt.worker // NODE_WORKERS}", self.now,
            self._observe,
        )  # fmt: skip
        self.counts[kind] += 1
        self.counts[verdict.action] += 1
        self.counts["restarts"] += verdict.restart
        if back is not None or verdict.restart:
            self._leave(attempt.worker, RESTART if back is None else back)

    def _leave(self, worker: int, back: float) -> None:
        self._scheduler.leave(worker)
        self._joined.discard(worker)
        self._at(back, "join", worker)

    # --- the rest of an executor

    def merge(self, tasks: Any) -> Any:
        from pipelines.compaction import perform_here

        return perform_here(tasks)

    def close(self) -> None:
        pass


class _Counted:
    """A scheduler whose calls are timed."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._timed: dict[str, Timed] = {}

    def __getattr__(self, name: str) -> Any:
        if name in ("done", "in_flight"):
            return getattr(self._scheduler, name)
        self._timed[name] = Timed(getattr(self._scheduler, name))
        setattr(self, name, self._timed[name])
        return self._timed[name]

    @property
    def seconds(self) -> float:
        return sum(timed.seconds for timed in self._timed.values())

    @property
    def calls(self) -> int:
        return sum(timed.calls for timed in self._timed.values())


class Stopping:
    """An executor that is stopped when it takes its first item."""

    workers = planned = 1
    elastic = False

    def __init__(self) -> None:
        self.began = 0.0

    def run(self, items: Iterable[Any], observe: Any, tried: Any = None) -> None:
        from sae_runtime.errors import Interrupted

        next(iter(items))
        self.began = time.perf_counter()
        raise Interrupted("stopped before the first unit")

    def merge(self, tasks: Any) -> Any:
        raise AssertionError("stopped")

    def close(self) -> None:
        pass


# --- parts, each in a process of its own


def scan(folder: Path, index: str, executor: Any) -> Any:
    """`corpuscope scan` with another executor; the Outcome, or None where it was stopped."""
    from jobs.specfile import load_spec
    from pipelines import planning
    from pipelines import scan as scans
    from sae_runtime.errors import Interrupted

    planning.UNIT_BYTES = {"cpu": 1}  # each row a unit
    scans.InlineExecutor = lambda *given: executor  # type: ignore[misc,assignment]
    spec, text = load_spec(str(folder / "spec.yaml"), index)
    told: list[str] = []
    options = scans.ScanOptions(executor="inline")
    try:
        outcome = scans.run_scan(spec, text, options, lambda event: None, told.append)
    except Interrupted:
        outcome = None
    if any("stopped" in line for line in told):
        raise AssertionError(f"the scan says: {told}")
    return outcome


def resume(folder: Path, index: str) -> Found:
    """Seconds until the first unit, or to the end where nothing is to do."""
    from pipelines import contents
    from pipelines import scan as scans
    from pipelines.ledger import Ledger

    steps = {
        "prepare": Timed(scans.prepare),
        "plan_units": Timed(scans.plan_units),
        "resolve": Timed(scans.resolve),
        "add_plan": Timed(Ledger.add_plan),
        "listing": Timed(contents.Ledger.commits),
    }
    scans.prepare, scans.plan_units, scans.resolve = (  # type: ignore[assignment]
        steps["prepare"], steps["plan_units"], steps["resolve"]
    )  # fmt: skip
    Ledger.add_plan = lambda *given: steps["add_plan"](*given)  # type: ignore[method-assign]
    Ledger.commits = lambda *given: steps["listing"](*given)  # type: ignore[method-assign]
    executor = Stopping()
    began = time.perf_counter()
    outcome = scan(folder, index, executor)
    ended = executor.began or time.perf_counter()
    return {
        "first_unit": ended - began,
        "items": None if outcome is None else outcome.items,
        **{name: step.seconds for name, step in steps.items() if step.calls},
    }


def part_plan(folder: Path, units: int, workers: int) -> Found:
    sys.path.insert(0, str(HERE.parent / "tests"))
    import tiny
    import yaml

    tiny.make_suites(folder / "suites", tiny.make_model(folder / "model"))
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, first in enumerate(range(0, units, ROWS)):
        tiny.write_rows(
            corpus / f"part-{number:05d}.jsonl",
            ({"text": f"the cat sat on mat {row}"} for row in range(first, min(first + ROWS, units))),
        )
    spec = {
        "corpus": {"name": "rows", "uri": f"{corpus}/*.jsonl"},
        "model": {"uri": str(folder / "model"), "dtype": "float32", "device": "cpu", "threads": 1},
        "saes": [{"uri": str(folder / "suites" / "tiny-res"), "keep": "none"}],
        "context": {"length": 32},
        "max_index_bytes": "100TB",
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    index = folder / "index"
    return resume(folder, str(index)) | {"registry_bytes": size_of(index / "plans")}


def part_run(folder: Path, units: int, workers: int) -> Found:
    from pipelines import upkeep

    index = folder / "index"
    cluster = Cluster(str(index), workers)
    settling = Timed(upkeep.settle, time.thread_time)
    upkeep.settle = settling  # type: ignore[assignment]
    began = time.perf_counter()
    outcome = scan(folder, str(index), cluster)
    seconds, peak = time.perf_counter() - began, peak_mb()
    assert cluster.emptied is not None
    found = {
        "run_seconds": seconds,
        "run_peak_mb": peak,
        "committed": units - len(outcome.failed),
        "given_up": len(outcome.failed),
        "counts": dict(cluster.counts),
        "virtual_seconds": cluster.now,
        "ideal_seconds": cluster.work / workers,
        "tail_seconds": cluster.now - cluster.emptied,
        "scheduler_us_per_item": 1e6 * cluster.deciding / units,
        "scheduler_calls": cluster.calls,
        "commit_us": 1e6 * cluster.committing.seconds / cluster.committing.calls,
        "driver_us_per_event": 1e6 * cluster.observing / (cluster.counts["attempts"]),
        "ranges": settling.calls,
        "range_ms": 1e3 * settling.seconds / max(1, settling.calls),
        "range_longest_ms": 1e3 * settling.longest,
        "files": {
            name: sum(len(files) for _, _, files in os.walk(index / name))
            for name in ("commits", "snapshots", "manifests", "failures", "data")
        },
        "snapshot_bytes": size_of(index / "snapshots"),
    }
    if outcome.failed:  # somebody mends what was wrong with them
        scan(folder, str(index), Cluster(str(index), 1, poison=0.0))
    return found


def part_a(folder: Path, units: int, workers: int) -> Found:
    return resume(folder, str(folder / "index"))


def part_c(folder: Path, units: int, workers: int) -> Found:
    whole, index = folder / "index", folder / "holes"
    for name in ("plans", "commits"):
        shutil.copytree(whole / name, index / name, copy_function=os.link)
    for name in ("index.json", "vocabulary.parquet"):
        shutil.copy(whole / name, index / name)
    drawn = random.Random(SEED).sample(range(units), round(MISSING * units))
    for ordinal in drawn:
        Path(index, "commits", f"{ordinal // 4096:06d}", f"{ordinal:09d}.0.json").unlink(missing_ok=True)
    return resume(folder, str(index))


def part_named(folder: Path, units: int, workers: int) -> Found:
    holes, index = folder / "holes", folder / "named"
    shutil.copytree(holes / "plans", index / "plans", copy_function=os.link)
    for name in ("index.json", "vocabulary.parquet"):
        shutil.copy(holes / name, index / name)
    kinds = (
        "documents", "contexts", "activations", "document_features", "features", "top_contexts",
        "sampled_contexts", "saes",
    )  # fmt: skip
    for file in (holes / "commits").rglob("*.json"):
        commit = json.loads(file.read_bytes())
        stem = f"{commit['unit']}.{commit['group']}-{commit['attempt']}"
        commit["files"] = {
            kind: {
                "path": f"data/{kind}/{stem}.parquet",
                "rows": 1 << 20,
                "bytes": 1 << 22,
                "digest": uuid.uuid4().hex,
            }
            for kind in kinds
        }
        target = index / file.relative_to(holes)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(commit))
    before = peak_mb()
    return {"before_mb": before, **resume(folder, str(index))}


def part_tiers(folder: Path, units: int, workers: int) -> Found:
    from pipelines.compaction import catch_up
    from pipelines.contents import contents
    from pipelines.storage import Store

    store = Store(str(folder / "holes"))
    registered = contents(store).registered
    began = time.perf_counter()
    done = catch_up(store, registered)
    seconds = time.perf_counter() - began
    found = contents(store)
    return {
        "merging_seconds": seconds,
        "jobs": done.runs + done.nodes,
        "runs": len(found.snapshot.runs),
        "nodes": len(found.snapshot.nodes),
        "alone": len(found.own),
        "snapshot_bytes": size_of(folder / "holes" / "snapshots"),
    }


def part_b(folder: Path, units: int, workers: int) -> Found:
    return resume(folder, str(folder / "holes"))


def part_status(folder: Path, units: int, workers: int) -> Found:
    import queries
    from pipelines.status import status

    index = str(folder / "index")
    began = time.perf_counter()
    committed = status(index).committed
    middle = time.perf_counter()
    [(shown,)] = queries.connect(index).sql("SELECT count(*) FROM documents").fetchall()
    ended = time.perf_counter()
    assert (committed, shown) == (units, 0)
    return {"status": middle - began, "connect": ended - middle}


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk(folder) for name in names)


def peak_mb() -> float:
    """Most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure(part: str, folder: Path, units: int, workers: int) -> None:
    """Do a part in this process; what was found goes to `<folder>/<part>.json`."""
    sys.path[:0] = [str(HERE.parent)]
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.fsync = lambda handle: None  # type: ignore[assignment]
    began = time.perf_counter()
    found = globals()[f"part_{part}"](folder, units, workers)
    used = resource.getrusage(resource.RUSAGE_SELF)
    found |= {"wall": time.perf_counter() - began, "cpu": used.ru_utime + used.ru_stime, "peak_mb": peak_mb()}
    (folder / f"{part}.json").write_text(json.dumps(found, indent=1))


# --- the command


def summary(all_found: Mapping[int, Mapping[str, Found]]) -> str:
    """A table: a row each measure, a column each number of units."""
    rows: dict[tuple[str, str], dict[int, Any]] = {}
    for units, parts in all_found.items():
        for part, found in parts.items():
            for name, value in found.items():
                nested = value.items() if isinstance(value, dict) else [("", value)]
                for inner, number in nested:
                    rows.setdefault((part, f"{name} {inner}".strip()), {})[units] = number
    lines = [" " * 36 + "".join(f"{units:>16,}" for units in all_found)]
    for (part, name), values in rows.items():
        numbers = "".join(f"{_short(values.get(units)):>16}" for units in all_found)
        lines.append(f"{part:8}{name:28}{numbers}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


@click.command()
@click.option("--units", multiple=True, type=int, default=(20_000,), show_default=True)
@click.option("--workers", default=1000, show_default=True)
@click.option("--folder", help="For the indexes and scale.json; kept. Without it, one that is removed.")
@click.option("--parts", default=",".join(PARTS), show_default=True)
@click.option("--part", hidden=True)
def main(units: tuple[int, ...], workers: int, folder: str | None, parts: str, part: str | None) -> None:
    """Print what each part took at each number of units, and write it to FOLDER/scale.json."""
    if part is not None:
        assert folder is not None
        measure(part, Path(folder), units[0], workers)
        os._exit(0)  # compaction may be going on in a thread, as where a scan is killed
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(folder or temporary)
        all_found: dict[int, dict[str, Found]] = {}
        for number in units:
            own = base / str(number)
            own.mkdir(parents=True, exist_ok=True)
            for name in parts.split(","):
                command = [sys.executable, __file__, "--part", name, "--folder", str(own)]
                command += ["--units", str(number), "--workers", str(workers)]
                if subprocess.run(command, check=False).returncode:
                    raise click.ClickException(f"part {name} of {number:,} units failed")
                found = json.loads((own / f"{name}.json").read_text())
                all_found.setdefault(number, {})[name] = found
                click.echo(
                    f"{number:,} units, {name}: {found['wall']:.1f} s, {found['peak_mb']:.0f} MB", err=True
                )
        (base / "scale.json").write_text(json.dumps(all_found, indent=1))
        click.echo(summary(all_found))


if __name__ == "__main__":
    main()
