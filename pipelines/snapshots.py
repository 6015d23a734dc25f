"""Snapshots: which merged files stand for which units.

    snapshots/<range>/000000000.json        names the runs and nodes that hold now
    manifests/<stem>.json                   one run or node: what it covers, its files with checksums

A *run* holds the rows of many units, sorted by (sae, feature, ...); it replaces their own files. A *node*
holds the merged summaries of all shown units between two ordinals; the nodes and units that it was merged
from stay, because maxima and samples cannot be subtracted when a unit goes.
Invariant: nothing here is ever changed; snapshot n + 1 is created at most once (put-if-absent), so readers
have one or the other whole. A snapshot that names 50 manifests stands for a million units.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from pipelines.ledger import DataFileRecord
from pipelines.names import inside
from pipelines.ordinals import Ranges
from pipelines.registry import dump, objects
from pipelines.schema import MANIFESTS, SNAPSHOTS
from pipelines.storage import Store, names
from sae_runtime.errors import DataError

Files = dict[str, tuple[DataFileRecord, ...]]  # by kind


@dataclass(frozen=True)
class Run:
    """Rows of units, merged."""

    name: str  # of its manifest
    level: int
    units: Ranges  # whose rows are inside, shown or not
    gone: Ranges  # retired units whose rows were left out; `units.parquet` still counts them
    files: Files


@dataclass(frozen=True)
class Node:
    """Summaries of the shown units in [first, stop), merged."""

    name: str
    level: int
    first: int
    stop: int
    members: str  # digest of those units' ordinals in corpus order
    files: Files
    children: tuple[str, ...]  # manifests of the nodes it was merged from; other units were merged one by one

    def meets(self, first: int, stop: int) -> bool:
        """Whether it reaches into [first, stop)."""
        return self.first < stop and first < self.stop


@dataclass(frozen=True)
class Snapshot:
    """Names of manifests."""

    number: int
    runs: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()


M = TypeVar("M", Run, Node)
NONE = Snapshot(-1)
SPAN = 1000  # snapshots of a folder: to find the newest, two listings
# Manifests never change, and a scan that compacts as it goes asks for the same ones again and again.
_read: dict[tuple[str, str], Run | Node] = {}
_READ_MOST = 1 << 16


def newest(store: Store) -> Snapshot:
    """The newest snapshot, or one of nothing."""
    # On local disk a folder is there before its first snapshot, and stays so if the writer is killed.
    folders = (f"{SNAPSHOTS}/{folder}" for folder in reversed(store.folders(SNAPSHOTS)))
    found = ([f"{folder}/{name}.json" for name in names(store, folder, ".json")] for folder in folders)
    name = next((each[-1] for each in found if each), None)
    if name is None:
        return NONE
    [data] = objects(store, [name])
    try:
        return Snapshot(int(data["number"]), tuple(data["runs"]), tuple(data["nodes"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{store.uri}/{name}: damaged, not a snapshot") from error


def publish(store: Store, snapshot: Snapshot) -> bool:
    """Make a snapshot the newest; False if another one of its number was first."""
    head = {
        "number": snapshot.number,
        "attempt": uuid.uuid4().hex[:8],
        "runs": snapshot.runs,
        "nodes": snapshot.nodes,
    }
    return store.put_if_absent(snapshot_name(snapshot.number), dump(head))


def snapshot_name(number: int) -> str:
    """Where a snapshot is."""
    return f"{SNAPSHOTS}/{number // SPAN:06d}/{number:09d}.json"


def write_run(store: Store, run: Run) -> None:
    """Write a run's manifest, under its attempt-unique name."""
    head = {"level": run.level, "units": run.units, "gone": run.gone}
    store.write(run.name, dump({**head, **_named(run.files)}))


def write_node(store: Store, node: Node) -> None:
    """Write a node's manifest, under its attempt-unique name."""
    head = {"level": node.level, "first": node.first, "stop": node.stop, "members": node.members}
    store.write(node.name, dump({**head, "children": node.children, **_named(node.files)}))


def read_runs(store: Store, manifests: Sequence[str]) -> list[Run]:
    """Runs by the names of their manifests. DataError for one that is damaged."""
    return _manifests(store, manifests, _run)


def read_nodes(store: Store, manifests: Sequence[str]) -> list[Node]:
    """Nodes by the names of their manifests. DataError for one that is damaged."""
    return _manifests(store, manifests, _node)


def manifest_name(stem: str) -> str:
    """Where the manifest of a stem lies."""
    return f"{MANIFESTS}/{stem}.json"


def _manifests(store: Store, manifests: Sequence[str], make: Callable[[str, dict[str, Any]], M]) -> list[M]:
    missing = [name for name in manifests if (store.uri, name) not in _read]
    found = {}
    for name, data in zip(missing, objects(store, missing), strict=True):
        try:
            found[name] = make(name, data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{store.uri}/{name}: damaged, not a manifest") from error
    pieces = [found[name] if name in found else _read[store.uri, name] for name in manifests]
    if len(_read) + len(found) > _READ_MOST:
        _read.clear()
    _read.update({(store.uri, name): piece for name, piece in found.items()})
    return cast(list[M], pieces)


def _run(name: str, data: dict[str, Any]) -> Run:
    return Run(name, data["level"], _ranges(data["units"]), _ranges(data["gone"]), _files(data))


def _node(name: str, data: dict[str, Any]) -> Node:
    first, stop, children = data["first"], data["stop"], tuple(data["children"])
    return Node(name, data["level"], first, stop, data["members"], _files(data), children)


def _files(data: dict[str, Any]) -> Files:
    files = {
        kind: tuple(DataFileRecord.of(record) for record in records)
        for kind, records in data["files"].items()
    }
    for kind, merged in files.items():
        for record in merged:
            inside(record.path, kind)
    return files


def _named(files: Files) -> dict[str, Any]:
    return {"files": {kind: [record.json for record in records] for kind, records in files.items()}}


def _ranges(data: Sequence[Sequence[int]]) -> Ranges:
    return tuple((int(first), int(stop)) for first, stop in data)
