"""What an index holds and what is still to do: its identity, and the commits of units.

Invariant: a unit's data are visible exactly when every SAE group has a commit object, and a commit is
created at most once (put-if-absent) and never removed, so that a straggler cannot make another. Commits lie
in folders of SPAN ordinals: whoever knows from a snapshot that all units of a folder are covered need not
list it. Everything is JSON that a person can read; `status` never needs a live cluster.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from pipelines.names import inside
from pipelines.registry import Plan, dump, objects, read_plans, write_plan
from pipelines.schema import COMMITS, FORMAT, INDEX
from pipelines.storage import Store, names
from sae_runtime.errors import DataError, InputError

SPAN = 4096  # ordinals of a folder of commits


@dataclass(frozen=True, slots=True)
class DataFileRecord:
    """A data file that a commit or a manifest names."""

    path: str
    rows: int
    bytes: int
    digest: str  # blake2b-128, hex
    # Of merged files sorted by feature: SAE -> its lowest and highest feature there.
    spans: dict[str, tuple[int, int]] | None = None

    @classmethod
    def of(cls, data: dict[str, Any]) -> DataFileRecord:
        """What `json` makes of one. TypeError or ValueError if it is none."""
        spans = data.get("spans")
        if spans is not None:
            spans = {sae: (first, last) for sae, (first, last) in spans.items()}
        return cls(**{**data, "spans": spans})

    @property
    def json(self) -> dict[str, Any]:
        """Its fields, `spans` where it has them."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Commit:
    """One (unit, SAE group) done. Counts are of the unit, the same in every group's commit."""

    unit: str
    ordinal: int
    group: int
    attempt: str
    run: int
    documents: int  # indexed
    quarantined: int  # documents of the unit that could not be scanned: read = documents + quarantined
    poison: tuple[int, ...]  # rows of those of them that the model refuses, ascending
    contexts: int
    tokens: int  # counted
    tokens_run: int
    started: float
    finished: float
    device: str  # its model; runs do not keep it, so this is where it can be looked up
    files: dict[str, DataFileRecord] = field(default_factory=dict)  # by kind

    @property
    def name(self) -> str:
        return commit_name(self.ordinal, self.group)


def commit_name(ordinal: int, group: int) -> str:
    """Where the commit of a unit's SAE group is."""
    return f"{COMMITS}/{ordinal // SPAN:06d}/{ordinal:09d}.{group}.json"


class Ledger:
    """Identity, plans and commits of one index."""

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
            newer = isinstance(data.get("format"), int) and data["format"] > FORMAT
            raise InputError(
                f"{self.store.uri}: index format {data.get('format')} is not {FORMAT}; "
                + ("read it with a newer corpuscope" if newer else "scan into a new index")
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
        return read_plans(self.store)

    def add_plan(self, plan: Plan) -> bool:
        """Append a plan; False if another scan appended one of the same number first."""
        return write_plan(self.store, plan)

    def commits(
        self, ordinals: np.ndarray | None = None, files: bool = True
    ) -> dict[tuple[int, int], Commit]:
        """Commits by (ordinal, group): every one, or those of some ordinals, whose folders are listed.

        Without `files` they name none: of a million units that is 1 GB rather than 4.
        """
        if ordinals is None:
            found = list(names(self.store, COMMITS, ".json"))
        else:
            found = [
                f"{folder:06d}/{name}"
                for folder in np.unique(ordinals // SPAN).tolist()
                for name in names(self.store, f"{COMMITS}/{folder:06d}", ".json")
            ]
            wanted = set(ordinals.tolist())
            found = [name for name in found if _ordinal(name) in wanted]
        read = self._read([f"{COMMITS}/{name}.json" for name in found], files)
        return {(commit.ordinal, commit.group): commit for commit in read}

    def read_commits(self, pairs: Sequence[tuple[int, int]]) -> list[Commit]:
        """Commits that exist, by (ordinal, group)."""
        return list(self._read([commit_name(*pair) for pair in pairs]))

    def _read(self, items: Sequence[str], files: bool = True) -> Iterator[Commit]:
        """Commits by name, some at a time: as bytes and as JSON they are several times as large."""
        for i in range(0, len(items), SPAN):
            some = items[i : i + SPAN]
            for item, data in zip(some, objects(self.store, some), strict=True):
                commit = _commit(data)
                if commit.name != item:
                    raise DataError(f"{self.store.uri}/{item}: damaged: it says that it is {commit.name}")
                yield commit if files else replace(commit, files={})

    def commit(self, commit: Commit) -> bool:
        """Publish a unit's group. False when another attempt was first: its files stay the truth."""
        files = {kind: record.json for kind, record in commit.files.items()}
        data = dump({**asdict(commit), "files": files})
        try:
            return self.store.put_if_absent(commit.name, data)
        except (ConnectionError, TimeoutError):  # the commit may be made, and the work need not be done again
            if self.store.exists(commit.name) and self.store.read(commit.name) == data:
                return True
            raise


def _commit(data: dict[str, Any]) -> Commit:
    files = {kind: DataFileRecord.of(record) for kind, record in data.pop("files").items()}
    for kind, file in files.items():
        inside(file.path, kind)
    data["device"] = sys.intern(data["device"])  # one for a million commits
    return Commit(files=files, poison=tuple(data.pop("poison")), **data)


def _ordinal(name: str) -> int:
    """The ordinal in a commit's name, -1 if it has none."""
    number = name.rsplit("/", 1)[-1].split(".")[0]
    return int(number) if number.isdecimal() else -1
