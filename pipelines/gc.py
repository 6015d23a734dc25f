"""Garbage: what no commit, snapshot or plan names, removed once nobody can come to need it.

Five kinds, each with its own proof that it is dead:
- files of an attempt whose (unit, group) another attempt has committed: at once, as no commit is replaced,
  but for units that were retired since, which may come back;
- files that a snapshot replaced, and those of units that the corpus dropped: READERS seconds after that, so
  that whoever resolved the index before can finish. A dropped unit is first *retired* in the registry
  (put-if-absent beside the plans of scans): until then its file can come back and find its data, afterwards
  it is scanned anew;
- annotations that others replaced, likewise;
- records of due times of schedules that are not among the newest ones, which nothing asks for, at once;
- what was staged for workers, UNFINISHED seconds after it was put there, while no scan runs: one that begins
  at that moment has its weights from the hub;
- work that nothing names, and the temporaries of writers that were killed: after UNFINISHED seconds, far
  beyond the age at which an attempt refuses to commit.
Leases, failures and what is said of runs stay: they are the index's history, a few kB a run.
Ages are told by the store's own clock, for both ends. Invariant: killed at any point it leaves an index that
reads the same, and the next gc goes on.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipelines import annotation_records, due, lease, staged
from pipelines.contents import Contents, contents
from pipelines.faults import crash
from pipelines.ledger import Ledger
from pipelines.ordinals import pack, unpack
from pipelines.registry import Plan, objects
from pipelines.schema import (
    ANNOTATIONS,
    DATA,
    FACTS,
    MANIFESTS,
    PLANS,
    REPLACED,
    SCHEDULES,
    SNAPSHOTS,
    STAGED,
)
from pipelines.snapshots import Node, Run, read_nodes, read_runs, snapshot_name
from pipelines.storage import Entry, Store

READERS = 600.0
UNFINISHED = 86400.0
_OWN = re.compile(r"(?P<kind>\w+)/(?P<unit>[0-9a-f]+)\.(?P<group>\d+)-(?P<attempt>[0-9a-f]+)\.parquet")
_TURNS = (DATA, MANIFESTS, SNAPSHOTS, ANNOTATIONS, PLANS, STAGED)
_TEMPORARY = re.compile(r"(.*/)?\.(clock-)?[0-9a-f]{32}")  # as the storage door names them
_ANNOTATED = re.compile(rf"(?:{'|'.join(FACTS)})/annotation-[0-9a-f]+\.parquet")
_MERGED = re.compile(r"\w+/(?P<stem>(?:run|node)-\d+-\d+-[0-9a-f]+)(?:-\d+)*\.parquet")


@dataclass(frozen=True)
class Collected:
    """What a gc did; sizes in bytes."""

    retired: int  # units
    removed: int  # objects
    bytes: int
    waiting: int  # objects that are garbage, but too young
    waiting_bytes: int


def collect(store: Store, readers: float = READERS, unfinished: float = UNFINISHED) -> Collected:
    """Remove garbage of at least these ages (seconds). Raises InputError where there is no index."""
    retired = _retire(store, readers)
    crash("gc-retired")
    garbage = list(_garbage(store, contents(store), readers, unfinished))
    named = _named(store)  # by now: what was published since the index was resolved stays
    dead = [entry for entry, ripe in garbage if ripe and entry.name not in named]
    crash("gc-listed")
    # Data before the manifests that name them: what is left of a killed gc is then garbage still.
    for _, part in itertools.groupby(sorted(dead, key=_turn), key=_turn):
        names = [entry.name for entry in part]
        for first in range(0, len(names), 1000):
            store.remove(names[first : first + 1000])
            crash("gc-removing")
    young = [entry for entry, ripe in garbage if not ripe]
    return Collected(retired, len(dead), sum(e.size for e in dead), len(young), sum(e.size for e in young))


def _turn(entry: Entry) -> int:
    """When an object goes; temporaries may lie anywhere."""
    folder = entry.name.split("/")[0]
    return _TURNS.index(folder) if folder in _TURNS else len(_TURNS)


def _retire(store: Store, readers: float) -> int:
    """Give up the units that were dropped at least `readers` seconds ago; how many."""
    ledger = Ledger(store)
    while True:
        plans = contents(store).plans
        now = store.now()
        gone: set[int] = set()
        live: set[int] = set()
        for plan in plans:
            dropped = set(unpack(plan.dropped).tolist())
            added = {unit.ordinal for unit in plan.units}
            live = (live | added) - dropped
            gone -= added  # of a unit that came back the newest dropping counts
            if now - store.modified(f"{PLANS}/{plan.run - 1:06d}.json") >= readers:
                gone |= dropped
        retired = np.array(sorted(gone - live - _retired(plans)), np.int64)
        if not len(retired):
            return 0
        plan = Plan(
            run=len(plans) + 1,
            started=time.time(),
            spec="",
            code="",
            device="",
            environment={},
            files=(),
            units=(),
            dropped=(),
            kind="gc",
            retired=pack(retired),
        )
        if ledger.add_plan(plan):
            return len(retired)


def _retired(plans: Iterable[Plan]) -> set[int]:
    return {ordinal for plan in plans for ordinal in unpack(plan.retired).tolist()}


def _garbage(
    store: Store, found: Contents, readers: float, unfinished: float
) -> Iterable[tuple[Entry, bool]]:
    """Objects that nothing needs, each with whether it is old enough to go."""
    now = store.now()
    manifests = {entry.name: entry for entry in _listed(store, MANIFESTS)}
    needed, runs = _merged_in_use(store, found)
    published, replaced = _snapshots(store)
    since = _covered_since(runs, published, now)
    stems = {name.rsplit("/", 1)[-1].removesuffix(".json") for name in needed}
    commits = Ledger(store).commits()
    retired = _retired(found.plans)
    attempts: dict[tuple[str, int], dict[str, int]] = {}  # (unit, group) -> attempt -> ordinal
    for (ordinal, group), commit in commits.items():
        attempts.setdefault((commit.unit, group), {})[commit.attempt] = ordinal
    # Not those of retired units: one that comes back has the same id, and may be at work by now.
    settled = {(commit.unit, group) for (ordinal, group), commit in commits.items() if ordinal not in retired}
    records = sorted(_listed(store, ANNOTATIONS), key=lambda entry: entry.name)
    annotated, superseded = _annotations(store, records)
    for entry in records[:-1]:
        yield entry, now - entry.modified >= unfinished  # until then they tell what was replaced when
    for entry in _listed(store, DATA):
        name = entry.name.removeprefix(f"{DATA}/")
        if match := _OWN.fullmatch(name):
            place = match["unit"], int(match["group"])
            own = attempts.get(place, {}).get(match["attempt"])
            if own is None:
                yield entry, place in settled or now - entry.modified >= unfinished
            elif own in retired:
                yield entry, True
            elif match["kind"] in REPLACED and own in since:
                yield entry, now - since[own] >= readers
        elif (match := _MERGED.fullmatch(name)) and match["stem"] not in stems:
            at = replaced.get(f"{MANIFESTS}/{match['stem']}.json")
            yield entry, now - entry.modified >= unfinished or (at is not None and now - at >= readers)
        elif _ANNOTATED.fullmatch(name) and entry.name not in annotated:
            at = superseded.get(entry.name)
            yield entry, now - entry.modified >= unfinished or (at is not None and now - at >= readers)
    for entry in manifests.values():
        if entry.name not in needed:
            at = replaced.get(entry.name)
            yield entry, now - entry.modified >= unfinished or (at is not None and now - at >= readers)
    newest = snapshot_name(found.snapshot.number)
    for entry in _listed(store, SNAPSHOTS):
        if entry.name < newest:
            yield entry, now - entry.modified >= unfinished  # until then they tell what was replaced when
    tables = {f"{PLANS}/{plan.run - 1:06d}-{plan.attempt}" for plan in found.plans}
    for entry in _listed(store, PLANS):
        if entry.name.endswith(".parquet") and entry.name.split(".")[0] not in tables:
            yield entry, now - entry.modified >= unfinished
    served = {entry.name: entry for entry in _listed(store, SCHEDULES)}
    for name in due.outdated(list(served)):
        yield served[name], True
    objects_named = {file.name for file in staged.recorded(store).values()}
    idle = lease.running(store) is None
    for entry in _listed(store, STAGED):
        if idle or not (entry.name.endswith(".json") or entry.name in objects_named):
            yield entry, now - entry.modified >= unfinished
    for entry in store.details("", hidden=True):
        if _TEMPORARY.fullmatch(entry.name):
            yield entry, now - entry.modified >= unfinished


def _listed(store: Store, folder: str) -> list[Entry]:
    """The objects of a folder, by their whole names."""
    return [replace(entry, name=f"{folder}/{entry.name}") for entry in store.details(folder)]


def _named(store: Store) -> set[str]:
    """Manifests and merged files that the newest snapshot needs, and files of annotations that hold."""
    found = contents(store)
    needed, _ = _merged_in_use(store, found)
    runs, nodes = found.snapshot.runs, sorted(needed - set(found.snapshot.runs))
    merged: list[Run | Node] = [*read_runs(store, runs), *read_nodes(store, nodes)]
    own = {r.path for each in merged for records in each.files.values() for r in records}
    return needed | own | annotation_records.newest(store).paths


def _merged_in_use(store: Store, found: Contents) -> tuple[set[str], list[Run]]:
    """Manifests that the newest snapshot needs, those below its nodes too; and its runs."""
    needed = set(found.snapshot.runs)
    level = list(found.snapshot.nodes)
    while level:
        needed |= set(level)
        level = [child for node in read_nodes(store, level) for child in node.children]
    return needed, read_runs(store, found.snapshot.runs)


def _covered_since(runs: Iterable[Run], published: dict[str, float], now: float) -> dict[int, float]:
    """When each unit's rows came to be in a run that readers know of, by ordinal."""
    return {ordinal: published.get(run.name, now) for run in runs for ordinal in unpack(run.units).tolist()}


def _annotations(store: Store, records: Sequence[Entry]) -> tuple[set[str], dict[str, float]]:
    """Files of annotations that the last of some records names; when those of the others were replaced."""
    held = [annotation_records.read(store, entry.name).paths for entry in records]
    last = {path: i for i, paths in enumerate(held[:-1]) for path in paths}
    newest = held[-1] if held else set()
    return newest, {path: records[i + 1].modified for path, i in last.items() if path not in newest}


def _snapshots(store: Store) -> tuple[dict[str, float], dict[str, float]]:
    """When manifests were first named by a snapshot that is left, and when by none any more.

    Ranges are merged some at a time and published together: a manifest may be much older than its snapshot.
    """
    entries = sorted(_listed(store, SNAPSHOTS), key=lambda entry: entry.name)
    heads = objects(store, [entry.name for entry in entries])
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for i, head in enumerate(heads):
        for name in (*head["runs"], *head["nodes"]):
            first.setdefault(name, i)
            last[name] = i
    return (
        {name: entries[i].modified for name, i in first.items()},
        {name: entries[i + 1].modified for name, i in last.items() if i + 1 < len(entries)},
    )
