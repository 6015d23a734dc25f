"""What annotations of an index hold: decoder-side facts and explanations of features.

    annotations/000000000.json                      names every file that holds now
    data/<kind>/annotation-<attempt>.parquet        rows of one or more SAEs, sorted by (sae, feature)

Invariant: a record is never changed, and record n + 1 is created at most once (put-if-absent), so readers
have one or the other whole; who loses that race reads the winner's record and adds to it. What a record
names of an SAE (of explanations: of an SAE from one source) replaces what an older one named; rows that are
replaced inside a file that stays are filtered out by `keys`.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.ledger import DataFileRecord
from pipelines.names import inside
from pipelines.registry import dump, objects
from pipelines.schema import ANNOTATIONS, FACTS
from pipelines.storage import Store, names
from sae_runtime.errors import DataError

Key = tuple[str, str]  # SAE, and the source of an explanation ("" for facts)


@dataclass(frozen=True)
class Annotated:
    """A data file, and whose rows of it hold."""

    kind: str  # of schema.FACTS
    file: DataFileRecord
    keys: tuple[Key, ...]
    whole: bool = True  # whether all its rows do


@dataclass(frozen=True)
class Done:
    """What was made of one SAE."""

    settings: str  # another text is made anew
    why: str | None = None  # why there are no rows


@dataclass(frozen=True)
class Annotations:
    """One record."""

    number: int
    files: tuple[Annotated, ...] = ()
    done: Mapping[str, Mapping[str, Done]] = field(default_factory=dict)  # kind -> SAE; not of explanations

    @property
    def paths(self) -> set[str]:
        """Names of the data files."""
        return {each.file.path for each in self.files}

    def of(self, kind: str) -> list[Annotated]:
        """The files of a kind."""
        return [each for each in self.files if each.kind == kind]


NONE = Annotations(-1)


def newest(store: Store) -> Annotations:
    """The newest record, or one of nothing. Raises DataError where it is damaged."""
    before = None
    while numbers := list(names(store, ANNOTATIONS, ".json")):
        name = f"{ANNOTATIONS}/{numbers[-1]}.json"
        try:
            return read(store, name)
        except FileNotFoundError:  # a newer one is there, and gc took this one
            if name == before:
                raise
            before = name
    return NONE


def read(store: Store, name: str) -> Annotations:
    """A record by its name. Raises DataError where it is damaged, FileNotFoundError."""
    [data] = objects(store, [name])
    try:
        files = tuple(_file(each) for each in data["files"])
        done = {
            kind: {sae: Done(each["settings"], each["why"]) for sae, each in saes.items()}
            for kind, saes in data["done"].items()
        }
        return Annotations(int(data["number"]), files, done)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{store.uri}/{name}: damaged, not a record of annotations") from error


def publish(
    store: Store, files: Sequence[Annotated], done: Mapping[str, Mapping[str, Done]] | None = None
) -> Annotations:
    """Make a record of `files` and `done` and of what the newest one holds, less what they replace."""
    while True:
        merged = _merged(newest(store), files, done or {})
        head = {
            "number": merged.number,
            "attempt": uuid.uuid4().hex[:12],
            "files": [_plain(each) for each in merged.files],
            "done": {
                kind: {sae: {"settings": d.settings, "why": d.why} for sae, d in sorted(saes.items())}
                for kind, saes in merged.done.items()
            },
        }
        if store.put_if_absent(record_name(merged.number), dump(head)):
            return merged


def record_name(number: int) -> str:
    """Where a record is."""
    return f"{ANNOTATIONS}/{number:09d}.json"


def _merged(
    held: Annotations, files: Sequence[Annotated], done: Mapping[str, Mapping[str, Done]]
) -> Annotations:
    new = {(kind, (sae, "")) for kind, saes in done.items() for sae in saes}
    new |= {(each.kind, key) for each in files for key in each.keys}
    kept = []
    for each in held.files:
        keys = tuple(key for key in each.keys if (each.kind, key) not in new)
        if keys:
            kept.append(replace(each, keys=keys, whole=each.whole and keys == each.keys))
    both = {kind: {**held.done.get(kind, {}), **done.get(kind, {})} for kind in (*held.done, *done)}
    return Annotations(held.number + 1, (*kept, *files), both)


def _file(data: dict[str, Any]) -> Annotated:
    kind = data["kind"]
    if kind not in FACTS:
        raise ValueError(kind)
    record = DataFileRecord(data["path"], data["rows"], data["bytes"], data["digest"])
    inside(record.path, kind)
    return Annotated(
        kind, record, tuple((str(sae), str(source)) for sae, source in data["keys"]), data["whole"]
    )


def _plain(each: Annotated) -> dict[str, Any]:
    file = each.file
    return {
        "kind": each.kind,
        "path": file.path,
        "rows": file.rows,
        "bytes": file.bytes,
        "digest": file.digest,
        "keys": each.keys,
        "whole": each.whole,
    }
