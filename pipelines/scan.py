"""The driver of a scan: prepare, plan, check, run what is not committed, tell how it went.

Invariant: running the same scan again is resume, and a finished scan again is a no-op that loads no
model. Everything that can be wrong with the inputs is found before the first write.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from pipelines.account import Account
from pipelines.admission import Admission, check_here
from pipelines.contents import Contents, Registered, resolve
from pipelines.estimate import check_size, estimate
from pipelines.executors.base import Attempted, Committed, Event, Executor, Failed
from pipelines.executors.inline import InlineExecutor
from pipelines.failures import Failures
from pipelines.faults import crash
from pipelines.lease import Lease
from pipelines.ledger import Ledger
from pipelines.measured import measured
from pipelines.ordinals import unpack
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
from pipelines.registry import Unit, in_corpus_order, last_scan
from pipelines.schema import VOCABULARY
from pipelines.selfcheck import MIN_TOKENS, complaints
from pipelines.spec import ScanSpec
from pipelines.staging import stage
from pipelines.storage import Store
from pipelines.unit import Setup, Work
from pipelines.upkeep import Upkeep
from pipelines.version import code_version
from pipelines.vocabulary import vocabulary
from sae_runtime.errors import CorpuscopeError, InputError, Interrupted
from sae_runtime.model import load_tokenizer


@dataclass(frozen=True)
class ScanOptions:
    """How to run: choices that never change the index."""

    executor: str = "ray"  # or "inline"
    address: str | None = None
    workers: int | None = None  # at most; None: as the cluster, or this machine, has room for
    allow_removal: bool = False
    price: float | None = None  # of a worker that is held for an hour, for the run's summary


@dataclass(frozen=True)
class Started:
    """Told to the observer before the first unit. Counts are of what is to be run now, by the plan."""

    items: int  # (unit, group) pairs to run
    documents: int
    bytes: int
    items_done: int
    workers: int  # that there is room for now
    elastic: bool  # whether more may come
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
Meter = Callable[[Event, Account], None]
_NOTE_SECONDS = 0.5  # between notes for the heartbeat, which cost as much as there are units in flight
Notice = Callable[[str], None]


def run_scan(
    spec: ScanSpec, spec_text: str, options: ScanOptions, observe: Observer, notice: Notice
) -> Outcome:
    """Scan `spec` into its index. `notice` takes one-line messages for people.

    Raises InputError before anything is written if the inputs are wrong, Interrupted when another
    scan of the index is running or registered its plan at the same moment.
    """
    with _Session(spec, options) as session:
        store = Store(spec.index)
        ledger = Ledger(store)
        have = ledger.identity()
        with Lease(store, notice) as lease:
            lease.look()
            prepared = prepare(spec, session.device)
            for line in prepared.warnings:
                notice(line)
            planned, metadata = plan_units(prepared, ledger, spec_text, options.allow_removal)
            groups = have["groups"] if have else plan_groups(prepared, options.workers)
            want = identity(prepared, metadata, groups)
            if have is not None:
                check_identity(spec.index, have, want)
            held = None
            if have is not None:
                known = Registered(have, planned.plans, planned.units)
                held = resolve(store, known, files=False)
            tally = _tally(spec.index, len(groups), held)
            tally.check()
            todo = _Todo(planned, held, len(groups))
            held = None  # a million commits, where nothing is compacted
            if options.address is not None and spec.model.device == "auto" and session.device == "cpu":
                notice(
                    "note: the cluster has no GPU now, so this scans on CPUs; `model.device: cuda` waits for "
                    "GPUs"
                )
            _name_limits(planned, spec, notice)
            if not todo.items and not planned.is_new:
                return Outcome(planned.plan.run, 0, 0, 0, 0.0, (), tally.quarantined)
            constants = None if have is None else measured(store, planned.plans)
            check_size(prepared, planned, estimate(prepared, planned, groups, constants), spec.index)
            if todo.items and options.address is None:
                check_here(store, session.device, spec.model.mixed_devices)
            if todo.items:
                session.connect()
            crash("before-lease")
            lease.take(planned.plan.run)
            _register(store, ledger, want, planned, prepared)
            account = Account(
                store,
                planned.plan.run,
                lease.term,
                code_version(),
                options.executor,
                session.device,
                options.price,
                notice,
            )
            with account:
                _name_changes(planned, notice)
                if not todo.items:
                    return Outcome(planned.plan.run, 0, 0, 0, 0.0, (), tally.quarantined)
                plans = (*planned.plans, planned.plan) if planned.is_new else planned.plans
                registered = Registered(want, plans, tuple(in_corpus_order(plans)))
                return session.execute(
                    prepared,
                    planned,
                    registered,
                    metadata,
                    todo,
                    observe,
                    ledger,
                    lease,
                    notice,
                    tally,
                    account,
                )


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
        registered: Registered,
        metadata: dict[str, str],
        todo: _Todo,
        observe: Observer,
        ledger: Ledger,
        lease: Lease,
        notice: Notice,
        tally: Tally,
        account: Account,
    ) -> Outcome:
        """Run what is to be done."""
        groups: list[list[str]] = registered.identity["groups"]
        by_id = {sae.id: sae for sae in prepared.saes}
        # Elsewhere machines start empty; on a shared disk they share HF_HOME instead.
        away = self.options.executor == "ray" and self.options.address is not None and not ledger.store.local
        setup = Setup(
            spec=prepared.spec,
            source=prepared.source,
            device=prepared.device,
            groups=tuple(tuple(by_id[sae] for sae in group) for group in groups),
            metadata=metadata,
            index=prepared.spec.index,
            templates=prepared.templates,
            staged=stage(ledger.store, prepared.source, prepared.saes, notice) if away else None,
        )
        run_of = _runs(planned)
        admission = Admission(ledger.store, planned.plan.run, prepared.spec.model.mixed_devices, notice)
        executor = self._executor(setup, todo.items, admission, notice)

        def items() -> Iterator[Work]:
            for group, unit in todo:
                yield Work(unit, group, planned.files[unit.corpus, unit.path], run_of[unit.ordinal])

        documents = size = 0.0
        for group, unit in todo:
            share = prepared.spec.share(planned.files[unit.corpus, unit.path].source)
            documents += 0 if group else share * unit.documents
            size += share * unit.bytes
        observe(
            Started(
                items=todo.items,
                documents=round(documents),
                bytes=round(size),
                items_done=len(planned.units) * len(groups) - todo.items,
                workers=executor.planned,
                elastic=executor.elastic,
                run=planned.plan.run,
            )
        )
        began = time.monotonic()
        account.begin(todo.items, round(size))
        account.hold(executor.workers)
        meter = self._meter(ledger.store.uri, planned.plan.run)
        failed: list[Failed] = []
        failures = Failures(ledger.store)
        given_up: list[Attempted] = []
        checked: set[int] = set()  # SAE groups whose first unit has been looked at
        causes = True  # the likely ones are told once

        noted = 0.0

        def note(last: bool = False) -> None:
            nonlocal noted
            if last or time.monotonic() >= noted + _NOTE_SECONDS:
                noted = time.monotonic()
                lease.note(account.flying, executor.workers, account.done)

        def watch(event: Event) -> None:
            nonlocal causes
            lease.check()
            work = event.work
            account.take(event, executor.workers)
            note()
            meter(event, account)
            if isinstance(event, Committed) and event.own:
                if work.group not in checked and event.commit.tokens >= MIN_TOKENS:
                    checked.add(work.group)
                    told = complaints(setup.groups[work.group], event.measured)
                    for line in told if causes else told[:-1]:
                        notice(line)
                    causes = causes and not told
            elif isinstance(event, Attempted):
                failures.add(
                    work.unit, work.group, event.kind, event.error, event.detail, event.host, event.final
                )
                if event.final:
                    given_up.append(event)
            elif isinstance(event, Failed):
                failed.append(event)
            observe(event)
            if isinstance(event, Committed):
                upkeep.committed(work.unit.ordinal)
                tally.add(event.commit)
                tally.check()

        def close_accounts() -> None:
            for event in given_up:
                failures.close(event.work.unit, event.work.group, event.error, event.host)

        upkeep = Upkeep(ledger.store, registered, (unit.ordinal for _, unit in todo), executor.merge, notice)
        try:
            with upkeep:
                executor.run(items(), watch, failures.tried())
        except CorpuscopeError:
            if not lease.lost:
                close_accounts()
            raise
        finally:
            account.hold(executor.workers)
            account.merged_bytes = upkeep.bytes
            note(last=True)
            executor.close()
        close_accounts()
        account.close(len(failed), tally.quarantined)
        done = account.summary
        return Outcome(
            planned.plan.run,
            todo.items,
            done.documents,
            done.tokens,
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

    def _meter(self, index: str, run: int) -> Meter:
        """What is told of every event to whoever watches the cluster."""
        if self.options.executor == "inline":
            return lambda event, account: None
        from pipelines.executors.metrics import driver_meter

        return driver_meter(index, run)

    def _executor(self, setup: Setup, items: int, admission: Admission, notice: Notice) -> Executor:
        if self.options.executor == "inline":
            return InlineExecutor(setup, admission)
        from pipelines.executors.ray import RayExecutor, default_workers

        local, workers = self.options.address is None, self.options.workers
        if local and workers is None:
            workers = default_workers(setup.device, setup.spec.model.threads)
        return RayExecutor(setup, admission, notice, items, workers, local)


class _Todo:
    """(group, unit) pairs without a commit, group by group so that SAEs are loaded once; made as one asks."""

    def __init__(self, planned: Planned, held: Contents | None, groups: int) -> None:
        self._units = planned.units
        left = np.ones((groups, 1 + max((unit.ordinal for unit in planned.units), default=-1)), bool)
        if held is not None:
            left[:, held.live[np.isin(held.live, held.covered)]] = False
            for ordinal, group in held.commits:
                if ordinal < left.shape[1]:
                    left[group, ordinal] = False
        own = np.fromiter((unit.ordinal for unit in planned.units), np.int64)
        self._places = [np.flatnonzero(left[group, own]) for group in range(groups)]  # in `_units`
        self.items = sum(map(len, self._places))

    def __iter__(self) -> Iterator[tuple[int, Unit]]:
        for group, places in enumerate(self._places):
            for place in places:
                yield group, self._units[place]


def _tally(index: str, groups: int, held: Contents | None) -> Tally:
    """What is read and quarantined of the live units that are committed."""
    if held is None:
        return Tally(index, groups, ())
    live = set(held.live.tolist())
    tally = Tally(index, groups, (c for c in held.commits.values() if c.ordinal in live))
    merged = held.merged_facts(("ordinal", "documents", "quarantined"))
    inside = merged.filter(pc.is_in(merged["ordinal"], pa.array(held.live)))
    quarantined = pc.sum(inside["quarantined"], min_count=0).as_py()
    tally.quarantined += quarantined
    tally.read += pc.sum(inside["documents"], min_count=0).as_py() + quarantined
    return tally


def _register(
    store: Store, ledger: Ledger, want: dict[str, Any], planned: Planned, prepared: Prepared
) -> None:
    """Write index.json, the vocabulary and the plan, whichever are not there yet."""
    crash("before-index")
    have = ledger.create(want)
    check_identity(store.uri, have, want)
    crash("before-vocabulary")
    if not store.exists(VOCABULARY):
        sink = io.BytesIO()
        pq.write_table(vocabulary(load_tokenizer(prepared.source)), sink, compression="zstd")
        store.write(VOCABULARY, sink.getvalue())
    if planned.is_new and not ledger.add_plan(planned.plan):
        raise Interrupted(
            f"index {store.uri}: another scan has just registered run {planned.plan.run}; run again"
        )


def _runs(planned: Planned) -> dict[int, int]:
    """The run that registered each unit, by ordinal: a resumed scan goes on with that run."""
    plans = (*planned.plans, planned.plan)
    return {unit.ordinal: plan.run for plan in plans for unit in plan.units}


def _name_limits(planned: Planned, spec: ScanSpec, notice: Notice) -> None:
    """Say where a lowered `limit` takes nothing away."""
    for number, source in enumerate(spec.corpus):
        own = [u for u in planned.units if planned.files[u.corpus, u.path].source == number]
        have = sum(unit.documents for unit in own)
        if source.limit is not None and have > source.limit:
            notice(f"note: corpus[{number}].limit is {source.limit:,}; the {have:,} documents indexed stay")


def _name_changes(planned: Planned, notice: Notice) -> None:
    """Say what leaves the index, and which versions differ from the run that is resumed, or came before.

    With other versions values may differ in their last bits.
    """
    if not planned.units:
        notice("note: the corpus has no documents")
    if planned.is_new and planned.plan.dropped:
        left = len(unpack(planned.plan.dropped))
        notice(f"note: {left:,} units of changed or removed files leave the index")
    last = last_scan(planned.plans) if planned.is_new else planned.plan
    if last is None:
        return
    before = {"corpuscope": last.code, **last.environment}
    now = {"corpuscope": code_version(), **environment()}
    changes = [f"{name} {old} -> {now.get(name)}" for name, old in before.items() if now.get(name) != old]
    if changes:
        notice(f"note: run {last.run} began with other versions: {', '.join(changes)}")
