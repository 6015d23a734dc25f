"""The registry of units: what every run found in the corpus, appended plan by plan.

    plans/000000.json                 a run: spec, versions, counts, what it dropped; names its two tables
    plans/000000-<attempt>.files.parquet   every corpus file as the run saw it
    plans/000000-<attempt>.units.parquet   the units that the run added, with their ordinals

Invariant: a plan is created at most once (put-if-absent) and never changed; it gives each new unit a dense
ordinal that no other unit ever has. A plan of `kind` gc adds nothing: it retires units that were dropped,
whose data `gc` then removes; if their rows come back they are new units.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import parquet
from pipelines.faults import crash
from pipelines.ordinals import Ranges, unpack
from pipelines.schema import PLANS
from pipelines.storage import Store, names
from sae_runtime.errors import DataError


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
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
    units: tuple[Unit, ...]  # new ones, or such that came back
    dropped: Ranges  # ordinals of units of changed or deleted files
    kind: str = "scan"  # or "gc"
    attempt: str = ""  # in the names of its tables; given when it is written
    retired: Ranges = ()  # ordinals of dropped units whose data are given up


_FILES = pa.schema(
    [
        ("source", pa.int32()),
        ("corpus", pa.string()),
        ("path", pa.string()),
        ("digest", pa.string()),
        ("size", pa.int64()),
        ("stamp", pa.string()),
        ("rows", pa.int64()),
        ("settings", pa.string()),
    ]
)
_UNITS = pa.schema(
    [
        ("unit", pa.string()),
        ("ordinal", pa.int64()),
        ("file", pa.int32()),  # row of the plan's table of files
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("bytes", pa.int64()),
    ]
)


def write_plan(store: Store, plan: Plan) -> bool:
    """Append a plan; False if another one of the same number was first, whose tables stay the truth."""
    stem = f"{PLANS}/{plan.run - 1:06d}"
    attempt = uuid.uuid4().hex[:8]
    numbers = {(f.corpus, f.path, f.digest, f.settings): i for i, f in enumerate(plan.files)}
    units: list[list[Any]] = [
        [u.unit for u in plan.units],
        [u.ordinal for u in plan.units],
        [numbers[u.corpus, u.path, u.digest, u.settings] for u in plan.units],
        [u.start for u in plan.units],
        [u.stop for u in plan.units],
        [u.bytes for u in plan.units],
    ]
    files = [[getattr(f, name) for f in plan.files] for name in _FILES.names]
    head = {
        "run": plan.run,
        "kind": plan.kind,
        "attempt": attempt,
        "started": plan.started,
        "code": plan.code,
        "device": plan.device,
        "environment": plan.environment,
        "files": len(plan.files),
        "units": len(plan.units),
        "dropped": plan.dropped,
        "retired": plan.retired,
        "spec": plan.spec,
    }
    crash("before-plan")
    _write(store, f"{stem}-{attempt}.files.parquet", files, _FILES)
    crash("plan-files")
    _write(store, f"{stem}-{attempt}.units.parquet", units, _UNITS)
    crash("plan-tables")
    return store.put_if_absent(f"{stem}.json", dump(head))


def read_plans(store: Store) -> list[Plan]:
    """All plans, oldest first. DataError names one that is damaged."""
    heads = [f"{PLANS}/{name}.json" for name in names(store, PLANS, ".json")]
    return [_plan(store, head, data) for head, data in zip(heads, objects(store, heads), strict=True)]


def read_plan(store: Store, name: str) -> Plan:
    """One plan by the name of its head. DataError if it is damaged."""
    [head] = objects(store, [name])
    return _plan(store, name, head)


def live_units(plans: Iterable[Plan]) -> list[Unit]:
    """Units that belong to the index by its newest plan, in ordinal order."""
    units: dict[int, Unit] = {}
    for plan in plans:
        for unit in plan.units:
            units[unit.ordinal] = unit
        for ordinal in unpack(plan.dropped).tolist():
            units.pop(ordinal, None)
    return sorted(units.values(), key=lambda unit: unit.ordinal)


def known_units(plans: Iterable[Plan]) -> dict[str, Unit]:
    """By id: units of any plan that have not been retired. A file that comes back finds them here."""
    units: dict[int, Unit] = {}
    for plan in plans:
        for unit in plan.units:
            units[unit.ordinal] = unit
        for ordinal in unpack(plan.retired).tolist():
            units.pop(ordinal, None)
    return {unit.unit: unit for unit in units.values()}


def next_ordinal(plans: Iterable[Plan]) -> int:
    """The first ordinal that no unit ever had."""
    return 1 + max((unit.ordinal for plan in plans for unit in plan.units), default=-1)


def last_scan(plans: Sequence[Plan]) -> Plan | None:
    """The newest plan of a scan: its files are the corpus."""
    return next((plan for plan in reversed(plans) if plan.kind == "scan"), None)


def in_corpus_order(plans: Sequence[Plan]) -> list[Unit]:
    """Live units by (source, path, row): the order that breaks ties, whatever the history."""
    newest = last_scan(plans)
    sources = {(file.corpus, file.path): file.source for file in newest.files} if newest else {}
    units = live_units(plans)
    return sorted(units, key=lambda u: (sources.get((u.corpus, u.path), 1 << 30), u.path, u.start))


def unit_id(corpus: str, path: str, digest: str, settings: str, start: int, stop: int) -> str:
    """Content-derived identity: the same rows of the same file are the same unit in any history."""
    text = json.dumps([corpus, path, digest, settings, start, stop], separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def dump(value: Any) -> bytes:
    """JSON, one key a line and in the order given, so that a person can read and compare it."""
    return json.dumps(value, indent=1, ensure_ascii=False).encode()


def objects(store: Store, items: Sequence[str]) -> list[dict[str, Any]]:
    """JSON objects by name. DataError names one that is damaged."""
    found = []
    for item, data in zip(items, store.read_many(list(items)), strict=True):
        try:
            found.append(dict(json.loads(data)))
        except (ValueError, TypeError) as error:
            raise DataError(f"{store.uri}/{item}: damaged, not a JSON object") from error
    return found


def _plan(store: Store, name: str, head: dict[str, Any]) -> Plan:
    stem = name.removesuffix(".json")
    try:
        tables = f"{stem}-{head['attempt']}"
        files = [FileRecord(*row) for row in _rows(store, f"{tables}.files.parquet", _FILES)]
        units = [
            Unit(unit, ordinal, f.corpus, f.path, f.digest, f.settings, start, stop, size)
            for unit, ordinal, file, start, stop, size in _rows(store, f"{tables}.units.parquet", _UNITS)
            for f in [files[file]]
        ]
        if (len(files), len(units)) != (head.pop("files"), head.pop("units")):
            raise DataError(f"{store.uri}/{name}: damaged, its tables have other lengths")
        dropped, retired = (tuple((a, b) for a, b in head.pop(key)) for key in ("dropped", "retired"))
        return Plan(files=tuple(files), units=tuple(units), dropped=dropped, retired=retired, **head)
    except (KeyError, TypeError, ValueError, IndexError, pa.ArrowException, FileNotFoundError) as error:
        raise DataError(f"{store.uri}/{name}: damaged, not a plan ({type(error).__name__})") from error


def _rows(store: Store, name: str, schema: pa.Schema) -> Iterable[tuple[Any, ...]]:
    # `read_table` would import pyarrow.dataset, and with it pandas: 0.3 s of opening an index.
    table = parquet.opened(store.read(name)).read(schema.names, use_threads=False)
    return zip(*(column.to_pylist() for column in table.columns), strict=True)


def _write(store: Store, name: str, columns: Sequence[Sequence[Any]], schema: pa.Schema) -> None:
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), sink, compression="zstd")
    store.write(name, sink.getvalue())
