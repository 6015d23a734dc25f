"""The driver of a scan: prepare, plan, check, run what is not committed, tell how it went.

Invariant: running the same scan again is resume, and a finished scan again is a no-op that loads no
model. Everything that can be wrong with the inputs is found before the first write.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
import torch

from pipelines.estimate import check_size, estimate
from pipelines.executors.base import Committed, Event, Executor, Failed, Progress
from pipelines.executors.inline import InlineExecutor
from pipelines.heartbeat import Heartbeat, running
from pipelines.ledger import Commit, Ledger
from pipelines.planning import (
    Planned,
    Prepared,
    check_identity,
    environment,
    identity,
    local_device,
    plan_groups,
    plan_units,
    prepare,
)
from pipelines.quarantine import Tally
from pipelines.schema import VOCABULARY
from pipelines.selfcheck import MIN_TOKENS, complaints
from pipelines.spec import ScanSpec
from pipelines.storage import Store
from pipelines.unit import Setup, Work
from pipelines.vocabulary import vocabulary
from sae_runtime.errors import InputError, Interrupted
from sae_runtime.model import load_tokenizer


@dataclass(frozen=True)
class ScanOptions:
    """How to run: choices that never change the index."""

    executor: str = "ray"  # or "inline"
    address: str | None = None
    workers: int | None = None
    allow_removal: bool = False


@dataclass(frozen=True)
class Started:
    """Told to the observer before the first unit. Counts are of what is to be run now, by the plan."""

    items: int  # (unit, group) pairs to run
    documents: int
    bytes: int
    items_done: int
    workers: int
    run: int


@dataclass(frozen=True)
class Outcome:
    """How a scan ended."""

    run: int
    items: int  # run now; 0 when everything was committed before
    documents: int  # committed now
    tokens: int  # counted, committed now
    seconds: float
    failed: tuple[Failed, ...]
    quarantined: int  # documents of the index that could not be scanned, those of earlier runs too


Observer = Callable[[Started | Event], None]
Notice = Callable[[str], None]


def run_scan(
    spec: ScanSpec, spec_text: str, options: ScanOptions, observe: Observer, notice: Notice
) -> Outcome:
    """Scan `spec` into its index. `notice` takes one-line messages for people.

    Raises InputError before anything is written if the inputs are wrong, Interrupted when another
    scan of the index is running or registered its plan at the same moment.
    """
    with _Session(spec, options) as session:
        prepared = prepare(spec, session.device)
        for line in prepared.warnings:
            notice(line)
        store = Store(spec.index)
        ledger = Ledger(store)
        have = ledger.identity()
        if have is not None and (other := running(store)):
            raise Interrupted(
                f"index {spec.index}: another scan is running (run {other['run']}, process "
                f"{other['process']} on {other['host']}); run again when it has ended"
            )
        planned, metadata = plan_units(prepared, ledger, spec_text, options.allow_removal)
        groups = have["groups"] if have else plan_groups(prepared, options.workers)
        want = identity(prepared, metadata, groups)
        if have is not None:
            check_identity(spec.index, have, want)
        done = ledger.commits() if have is not None else {}
        live = {unit.unit for unit in planned.units}
        tally = Tally(spec.index, len(groups), (c for c in done.values() if c.unit in live))
        tally.check()
        todo = _todo(planned, done, len(groups))
        if options.address is not None and spec.model.device == "auto" and session.device == "cpu":
            notice(
                "note: the cluster has no GPU now, so this scans on CPUs; `model.device: cuda` waits for GPUs"
            )
        _name_limits(planned, spec, notice)
        if not todo and not planned.is_new:
            return Outcome(planned.plan.run, 0, 0, 0, 0.0, (), tally.quarantined)
        check_size(prepared, planned, estimate(prepared, planned, groups), spec.index)
        if todo:
            session.connect()
        _register(store, ledger, want, planned, prepared)
        _name_changes(planned, notice)
        if not todo:
            return Outcome(planned.plan.run, 0, 0, 0, 0.0, (), tally.quarantined)
        return session.execute(prepared, planned, groups, metadata, todo, observe, ledger, notice, tally)


class _Session:
    """The device and the executor of one scan; a Ray cluster started here ends with it."""

    def __init__(self, spec: ScanSpec, options: ScanOptions) -> None:
        self.spec, self.options = spec, options
        self.started = False
        # A cluster elsewhere must be asked for its devices; one of our own is started when needed.
        if options.executor == "ray" and options.address is not None:
            self.connect()
        self.device = self._device()

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, *_: object) -> None:
        if self.started:
            import ray

            ray.shutdown()

    def execute(
        self,
        prepared: Prepared,
        planned: Planned,
        groups: Sequence[Sequence[str]],
        metadata: dict[str, str],
        todo: Sequence[tuple[int, int]],
        observe: Observer,
        ledger: Ledger,
        notice: Notice,
        tally: Tally,
    ) -> Outcome:
        """Run the (group, ordinal) pairs of `todo`."""
        by_id = {sae.id: sae for sae in prepared.saes}
        setup = Setup(
            spec=prepared.spec,
            source=prepared.source,
            device=prepared.device,
            groups=tuple(tuple(by_id[sae] for sae in group) for group in groups),
            metadata=metadata,
            index=prepared.spec.index,
            templates=prepared.templates,
        )
        units = {unit.ordinal: unit for unit in planned.units}
        run_of = _runs(ledger)
        items = [
            Work(unit, group, planned.files[unit.corpus, unit.path], run_of[unit.unit])
            for group, ordinal in todo
            for unit in [units[ordinal]]
        ]
        executor = self._executor(setup, len(items))

        def share(work: Work) -> float:
            return prepared.spec.share(work.file.source)

        observe(
            Started(
                items=len(items),
                documents=round(sum(share(w) * w.unit.documents for w in items if not w.group)),
                bytes=round(sum(share(w) * w.unit.bytes for w in items)),
                items_done=len(planned.units) * len(groups) - len(items),
                workers=executor.workers,
                run=planned.plan.run,
            )
        )
        began = time.monotonic()
        commits: list[Commit] = []
        failed: list[Failed] = []

        heart = Heartbeat(ledger.store, planned.plan.run, executor.workers)
        heart.beat({})
        flying: dict[str, int] = {}
        checked: set[int] = set()  # SAE groups whose first unit has been looked at
        causes = True  # the likely ones are told once

        def watch(event: Event) -> None:
            nonlocal causes
            work = event.work
            if isinstance(event, Progress):
                flying[work.unit.unit] = event.tokens
            else:
                flying.pop(work.unit.unit, None)
            heart.beat(flying)
            if isinstance(event, Committed) and event.own:
                commits.append(event.commit)
                if work.group not in checked and event.commit.tokens >= MIN_TOKENS:
                    checked.add(work.group)
                    told = complaints(setup.groups[work.group], event.measured)
                    for line in told if causes else told[:-1]:
                        notice(line)
                    causes = causes and not told
            elif isinstance(event, Failed):
                failed.append(event)
                record = {
                    "unit": work.unit.unit,
                    "group": work.group,
                    "source": work.unit.path,
                    "rows": [work.unit.start, work.unit.stop],
                    "error": event.error,
                    "detail": event.detail,
                    "time": time.time(),
                }
                ledger.fail(work.unit.unit, work.group, f"{time.time_ns():x}", record)
            observe(event)
            if isinstance(event, Committed):
                tally.add(event.commit)
                tally.check()

        try:
            executor.run(items, watch)
        finally:
            executor.close()
            heart.beat({}, ended=True)
        first = [c for c in commits if c.group == 0]
        return Outcome(
            planned.plan.run,
            len(items),
            sum(c.documents for c in first),
            sum(c.tokens for c in first),
            time.monotonic() - began,
            tuple(failed),
            tally.quarantined,
        )

    def connect(self) -> None:
        """Be on a Ray cluster, where the executor needs one: what can fail there fails before any write."""
        if self.options.executor == "ray" and not self.started:
            from pipelines.executors.ray import connect

            self.started = connect(self.options.address)

    def _device(self) -> str:
        device = self.spec.model.device
        if device == "cuda" and self.options.address is None and not torch.cuda.is_available():
            raise InputError(
                "model.device: cuda is asked for, but torch sees no GPU here; use auto or cpu, "
                "or --address of a cluster that has GPUs"
            )
        if device != "auto":
            return device
        if self.options.executor == "ray" and self.options.address is not None:
            from pipelines.executors.ray import cluster_device

            return cluster_device()
        return local_device()

    def _executor(self, setup: Setup, items: int) -> Executor:
        if self.options.executor == "inline":
            return InlineExecutor(setup)
        from pipelines.executors.ray import RayExecutor, default_workers

        workers = self.options.workers or default_workers(setup.device, setup.spec.model.threads)
        return RayExecutor(setup, min(workers, max(1, items)), self.options.address is None)


def _todo(planned: Planned, done: Mapping[tuple[str, int], Commit], groups: int) -> list[tuple[int, int]]:
    """(group, ordinal) pairs without a commit, group by group so that SAEs are loaded once."""
    return [
        (group, unit.ordinal)
        for group in range(groups)
        for unit in planned.units
        if (unit.unit, group) not in done
    ]


def _register(
    store: Store, ledger: Ledger, want: dict[str, Any], planned: Planned, prepared: Prepared
) -> None:
    """Write index.json, the vocabulary and the plan, whichever are not there yet."""
    have = ledger.create(want)
    check_identity(store.uri, have, want)
    if not store.exists(VOCABULARY):
        sink = io.BytesIO()
        pq.write_table(vocabulary(load_tokenizer(prepared.source)), sink, compression="zstd")
        store.write(VOCABULARY, sink.getvalue())
    if planned.is_new and not ledger.add_plan(planned.plan):
        raise Interrupted(
            f"index {store.uri}: another scan has just registered run {planned.plan.run}; run again"
        )


def _runs(ledger: Ledger) -> dict[str, int]:
    """The run that registered each unit: a resumed scan goes on with that run."""
    return {unit.unit: plan.run for plan in ledger.plans() for unit in plan.units}


def _name_limits(planned: Planned, spec: ScanSpec, notice: Notice) -> None:
    """Say where a lowered `limit` takes nothing away."""
    for number, source in enumerate(spec.corpus):
        own = [u for u in planned.units if planned.files[u.corpus, u.path].source == number]
        have = sum(unit.documents for unit in own)
        if source.limit is not None and have > source.limit:
            notice(f"note: corpus[{number}].limit is {source.limit:,}; the {have:,} documents indexed stay")


def _name_changes(planned: Planned, notice: Notice) -> None:
    """Say what leaves the index, and which versions differ from the run that is resumed.

    With other versions values may differ in their last bits.
    """
    if not planned.units:
        notice("note: the corpus has no documents")
    if planned.is_new:
        if planned.plan.dropped:
            notice(f"note: {len(planned.plan.dropped):,} units of changed or removed files leave the index")
        return
    now = environment()
    changes = [
        f"{name} {old} -> {now.get(name)}"
        for name, old in planned.plan.environment.items()
        if now.get(name) != old
    ]
    if changes:
        notice(f"note: run {planned.plan.run} began with other versions: {', '.join(changes)}")
