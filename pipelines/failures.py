"""Failed attempts on record: `failures/<unit>.<group>-<number>.<kind>.<token>.json`.

Invariant: what a retry cap counts is in the objects' names, so one listing gives all counts; numbers grow
by one for each (unit, group), so no clock decides their order. When a scan has ended by itself and
reported a unit as given up, an object of kind `given_up` closes its account: people mend things and run
the same command again, and then the unit is tried as if for the first time.
"""

from __future__ import annotations

import errno
import json
import time
import uuid
from collections.abc import Collection, Hashable
from dataclasses import asdict, dataclass
from typing import Any, get_args

from pipelines.registry import Unit, dump
from pipelines.scheduler import Kind, Tried
from pipelines.schema import FAILURES
from pipelines.storage import Store, names
from sae_runtime.errors import DataError, is_infrastructure, is_remote

GIVEN_UP = "given_up"
_KINDS: tuple[Kind, ...] = get_args(Kind)
# OSErrors that waiting does not mend: a path is wrong.
_PATH = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)

Key = tuple[str, int]  # unit, SAE group


@dataclass(frozen=True)
class Failure:
    """One failed attempt, or the mark that closes an account (kind `given_up`)."""

    unit: str
    group: int
    source: str  # path of the unit's file
    rows: tuple[int, int]
    kind: str  # infra | task | timeout | memory | given_up
    error: str  # one line
    detail: str  # the traceback if it was unexpected
    host: str
    time: float  # seconds since 1970 by the driver's clock, for people
    final: bool  # the unit was given up on


class Failures:
    """The failures of one index, as listed when this was made and added to since."""

    def __init__(self, store: Store) -> None:
        self._store = store
        # (number, kind, name) in the order of their numbers
        self._found: dict[Key, list[tuple[int, str, str]]] = {}
        for name in names(store, FAILURES, ".json"):
            key, number, kind = _parsed(store, name)
            self._found.setdefault(key, []).append((number, kind, name))
        for account in self._found.values():
            account.sort()

    def tried(self) -> dict[Hashable, Tried]:
        """Failures of each account that is open, by (unit, group)."""
        counts: dict[Hashable, Tried] = {}
        for key, account in self._found.items():
            tried = Tried()
            for _, kind, _ in _open(account):
                tried = tried.plus(_kind(kind))
            if tried.total:
                counts[key] = tried
        return counts

    def add(self, unit: Unit, group: int, kind: str, error: str, detail: str, host: str, final: bool) -> None:
        """Put one failed attempt on record."""
        rows = unit.start, unit.stop
        failure = Failure(unit.unit, group, unit.path, rows, kind, error, detail, host, time.time(), final)
        account = self._found.setdefault((unit.unit, group), [])
        number = account[-1][0] + 1 if account else 1
        name = f"{unit.unit}.{group}-{number:06d}.{kind}.{uuid.uuid4().hex[:8]}"
        self._store.write(f"{FAILURES}/{name}.json", dump(asdict(failure)))
        account.append((number, kind, name))

    def close(self, unit: Unit, group: int, error: str, host: str) -> None:
        """Close a unit's account: it was reported as given up."""
        self.add(unit, group, GIVEN_UP, error, "", host, final=True)

    def last(self, units: Collection[str]) -> list[Failure]:
        """The newest failure of each account of these units."""
        items = [account[-1][2] for (unit, _), account in self._found.items() if unit in units]
        paths = [f"{FAILURES}/{name}.json" for name in items]
        return [
            _failure(self._store, path, data)
            for path, data in zip(paths, self._store.read_many(paths), strict=True)
        ]


def kind_of(error: BaseException) -> Kind:
    """What an exception in a worker counts as."""
    if not is_infrastructure(error) or isinstance(error, _PATH):
        return "task"
    if isinstance(error, OSError):
        return "memory" if error.errno == errno.ENOMEM else "infra"
    return "infra" if is_remote(error) else "memory"


def _open(account: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """What came after the newest mark."""
    closed = max((i for i, (_, kind, _) in enumerate(account) if kind == GIVEN_UP), default=-1)
    return account[closed + 1 :]


def _kind(name: str) -> Kind:
    return next(kind for kind in _KINDS if kind == name)


def _parsed(store: Store, name: str) -> tuple[Key, int, str]:
    try:
        item, attempt = name.split("-")
        unit, group = item.split(".")
        number, kind, _ = attempt.split(".")
        if kind not in (*_KINDS, GIVEN_UP):
            raise ValueError(kind)
        return (unit, int(group)), int(number), kind
    except ValueError as error:
        raise DataError(
            f"{store.uri}/{FAILURES}/{name}.json: not the name of a failure; remove that file"
        ) from error


def _failure(store: Store, path: str, data: bytes) -> Failure:
    try:
        found: dict[str, Any] = json.loads(data)
        return Failure(**{**found, "rows": tuple(found["rows"])})
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{store.uri}/{path}: damaged; remove that file") from error
