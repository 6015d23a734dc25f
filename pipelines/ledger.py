"""What an index holds and what is still to do: plans (the registry of units) and commits.

Invariant: a unit's data are visible exactly when every SAE group has a commit object, and a commit
is created at most once (put-if-absent). Plans only append; the newest one's number is the run's
number minus one. Everything is JSON that a person can read; `status` never needs a live cluster.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.names import inside
from pipelines.schema import COMMITS, FAILURES, FORMAT, INDEX, PLANS
from pipelines.storage import Store, names
from sae_runtime.errors import DataError, InputError


@dataclass(frozen=True)
class FileRecord:
    """A corpus file as a plan saw it. `settings` digests what the spec says of its source."""

    source: int
    corpus: str
    path: str
    digest: str
    size: int
    stamp: str
    rows: int
    settings: str


@dataclass(frozen=True)
class Unit:
    """Rows [start, stop) of one corpus file: what is scanned and committed as a whole."""

    unit: str  # digest of everything below but the ordinal
    ordinal: int
    corpus: str
    path: str
    digest: str
    settings: str
    start: int
    stop: int
    bytes: int  # of text

    @property
    def documents(self) -> int:
        """Rows of the span; fewer are indexed where the source is sampled."""
        return self.stop - self.start


@dataclass(frozen=True)
class Plan:
    """One entry of the registry: what a run found, adds and drops."""

    run: int
    started: float  # seconds since 1970, UTC
    spec: str  # the spec as given, YAML
    code: str
    device: str
    environment: dict[str, str]
    files: tuple[FileRecord, ...]
    units: tuple[Unit, ...]  # new ones
    dropped: tuple[str, ...]  # units of changed or deleted files


@dataclass(frozen=True)
class DataFileRecord:
    """A data file that a commit names."""

    path: str
    rows: int
    bytes: int
    digest: str


@dataclass(frozen=True)
class Commit:
    """One (unit, SAE group) done. Counts are of the unit, the same in every group's commit."""

    unit: str
    ordinal: int
    group: int
    attempt: str
    run: int
    documents: int
    contexts: int
    tokens: int  # counted
    tokens_run: int
    started: float
    finished: float
    device: str
    files: dict[str, DataFileRecord] = field(default_factory=dict)  # by kind

    @property
    def name(self) -> str:
        return f"{COMMITS}/{self.unit}.{self.group}.json"


class Ledger:
    """Plans, commits and failures of one index."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def identity(self) -> dict[str, Any] | None:
        """What `index.json` says, or None where there is no index. InputError if it is not ours."""
        try:
            data = json.loads(self.store.read(INDEX))
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            raise InputError(f"index {self.store.uri}: this is a file, not a folder") from error
        except ValueError as error:
            raise InputError(f"{self.store.uri}/{INDEX}: not JSON; is this an index?") from error
        if not isinstance(data, dict) or "fixed" not in data:
            raise InputError(f"{self.store.uri}/{INDEX}: not written by corpuscope; is this an index?")
        if data.get("format") != FORMAT:
            raise InputError(
                f"{self.store.uri}: index format {data.get('format')} is not {FORMAT}; scan into a new index"
            )
        return dict(data)

    def create(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Write `index.json` unless it exists; returns what is there."""
        self.store.put_if_absent(INDEX, dump(identity))
        found = self.identity()
        assert found is not None
        return found

    def plans(self) -> list[Plan]:
        """All plans, oldest first."""
        items = [f"{PLANS}/{name}.json" for name in names(self.store, PLANS, ".json")]
        return [_plan(data) for data in self._objects(items)]

    def add_plan(self, plan: Plan) -> bool:
        """Append a plan; False if another scan appended one of the same number first."""
        return self.store.put_if_absent(f"{PLANS}/{plan.run - 1:06d}.json", dump(asdict(plan)))

    def commits(self) -> dict[tuple[str, int], Commit]:
        """Every commit, by (unit, group)."""
        items = [f"{COMMITS}/{name}.json" for name in names(self.store, COMMITS, ".json")]
        found = [_commit(data) for data in self._objects(items)]
        return {(commit.unit, commit.group): commit for commit in found}

    def commit(self, commit: Commit) -> bool:
        """Publish a unit's group. False when another attempt was first: its files stay the truth."""
        return self.store.put_if_absent(commit.name, dump(asdict(commit)))

    def fail(self, unit: str, group: int, attempt: str, record: dict[str, Any]) -> None:
        """Keep a failed attempt on record."""
        self.store.write(f"{FAILURES}/{unit}.{group}-{attempt}.json", dump(record))

    def failures(self) -> list[dict[str, Any]]:
        """Every recorded failure, with `unit`, `group`, `error` and `time`."""
        items = [f"{FAILURES}/{name}.json" for name in names(self.store, FAILURES, ".json")]
        return self._objects(items)

    def _objects(self, items: list[str]) -> list[dict[str, Any]]:
        """JSON objects by name. DataError names one that is damaged."""
        found = []
        for item, data in zip(items, self.store.read_many(items), strict=True):
            try:
                found.append(dict(json.loads(data)))
            except (ValueError, TypeError) as error:
                raise DataError(f"{self.store.uri}/{item}: damaged, not a JSON object") from error
        return found


def live_units(plans: Iterable[Plan]) -> list[Unit]:
    """Units that belong to the index by its newest plan, in ordinal order."""
    units: dict[str, Unit] = {}
    for plan in plans:
        for unit in plan.units:
            units[unit.unit] = unit
        for dropped in plan.dropped:
            units.pop(dropped, None)
    return sorted(units.values(), key=lambda unit: unit.ordinal)


def in_corpus_order(plans: list[Plan]) -> list[Unit]:
    """Live units by (source, path, row): the order that breaks ties, whatever the history."""
    sources = {(file.corpus, file.path): file.source for file in plans[-1].files} if plans else {}
    units = live_units(plans)
    return sorted(units, key=lambda u: (sources.get((u.corpus, u.path), 1 << 30), u.path, u.start))


def unit_id(corpus: str, path: str, digest: str, settings: str, start: int, stop: int) -> str:
    """Content-derived identity: the same rows of the same file are the same unit in any history."""
    text = json.dumps([corpus, path, digest, settings, start, stop], separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def dump(value: Any) -> bytes:
    """JSON, one key a line and in the order given, so that a person can read and compare it."""
    return json.dumps(value, indent=1, ensure_ascii=False).encode()


def _plan(data: dict[str, Any]) -> Plan:
    files = tuple(FileRecord(**file) for file in data.pop("files"))
    units = tuple(Unit(**unit) for unit in data.pop("units"))
    return Plan(files=files, units=units, dropped=tuple(data.pop("dropped")), **data)


def _commit(data: dict[str, Any]) -> Commit:
    files = {kind: DataFileRecord(**record) for kind, record in data.pop("files").items()}
    for kind, file in files.items():
        inside(file.path, kind)
    return Commit(files=files, **data)
