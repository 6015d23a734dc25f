"""What a finished or running scan tells about the next one: rows, bytes and seconds of its units.

Invariant: reads index.json, the plans and a bounded number of commits, those of up to SAMPLE live units of
the newest run that has any; nothing of the data but the counts of up to L0_UNITS units. A factor is the
measured number over what `pipelines/tables.py` expects of the same units, so that units of like shapes are
predicted as they were and others as the laws have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines import parquet, tables
from pipelines.ledger import Commit, Ledger
from pipelines.names import reading
from pipelines.ordinals import unpack
from pipelines.registry import Plan, Unit
from pipelines.storage import Store
from pipelines.tables import SaeShape, Units

SAMPLE = 64  # units
L0_UNITS = 8
DEFAULT_L0 = 100.0  # where a suite does not say


@dataclass(frozen=True)
class Attempt:
    """The scan of one (unit, SAE group)."""

    group: int
    tokens: int  # as run
    seconds: float


@dataclass(frozen=True)
class MeasuredSae:
    """An SAE of the measured index, for the time that it took."""

    id: str
    layer: int
    shape: SaeShape


@dataclass(frozen=True)
class Measured:
    """Constants of one run of an index."""

    index: str
    run: int
    device: str  # as the run's commits name it
    model: tuple[Any, ...]  # its digest, dtype and attention: seconds hold for the same ones
    threads: int | None  # CPU threads of a worker; None where a GPU did the work
    units: int  # looked at
    tokens: int  # counted, of those
    counted: float  # share of the text's tokens that is counted
    rows: dict[str, float]  # table -> factor
    bytes: dict[str, float]  # table -> factor of a row's bytes
    l0: dict[str, float]  # by SAE
    groups: tuple[tuple[MeasuredSae, ...], ...]
    attempts: tuple[Attempt, ...]  # in order of their starts
    startup: float  # seconds from the plan to the first unit's start


def measured(store: Store, plans: Sequence[Plan] | None = None) -> Measured | None:
    """The constants of the newest run of an index that has committed anything; None where there is none.

    `plans` of the index, where they have been read. Raises InputError where something else than an index is
    there, DataError where it is damaged.
    """
    ledger = Ledger(store)
    identity = ledger.identity()
    if identity is None:
        return None
    with reading(store.uri):
        dropped: set[int] = set()  # since the plan that is looked at
        for plan in reversed(ledger.plans() if plans is None else plans):
            own = [unit for unit in plan.units if unit.ordinal not in dropped]
            found = _whole(ledger, own, len(identity["groups"]))
            if any(commits[0].tokens for _, commits in found):
                return _measured(store, identity, plan, found)
            dropped.update(unpack(plan.dropped).tolist())
    return None


_Found = list[tuple[Unit, list[Commit]]]  # a unit with the commits of all groups


def _whole(ledger: Ledger, units: Sequence[Unit], groups: int) -> _Found:
    """Those of a sample of units that are committed whole: the first ones, and some over the whole."""
    half = SAMPLE // 2
    spread = np.linspace(0, len(units) - 1, half).astype(int) if units else np.empty(0, int)
    places = sorted({*range(min(half, len(units))), *spread.tolist()})
    sample = [units[place] for place in places]
    commits = ledger.commits(np.array([unit.ordinal for unit in sample], np.int64))
    found = []
    for unit in sample:
        own = [commits[unit.ordinal, group] for group in range(groups) if (unit.ordinal, group) in commits]
        if len(own) == groups:
            found.append((unit, own))
    return found


def _measured(store: Store, identity: dict[str, Any], plan: Plan, found: _Found) -> Measured:
    fixed = identity["fixed"]
    firsts = [commits[0] for _, commits in found]
    everything = [commit for _, commits in found for commit in commits]
    l0 = _l0(store, everything)
    records = {sae["id"]: sae for sae in identity["saes"]}
    shapes = {
        id_: SaeShape.of(
            sae["d_in"],
            sae["width"],
            l0.get(id_, sae["nominal_l0"] or DEFAULT_L0),
            _keep(sae["keep"]),
        )
        for id_, sae in records.items()
    }
    groups = [
        tuple(MeasuredSae(id_, records[id_]["layer"], shapes[id_]) for id_ in group)
        for group in identity["groups"]
    ]
    units = Units(
        *(
            np.array(column, float)
            for column in (
                [c.documents for c in firsts],
                [c.contexts for c in firsts],
                [c.tokens for c in firsts],
                [c.tokens_run for c in firsts],
                [c.documents * tables.SEGMENTS * ("segments" in c.files) for c in firsts],
                [1] * len(firsts),
            )
        )
    )
    rows, sizes = _factors(everything, list(shapes.values()), units, fixed, len(groups))
    length = fixed["context.length"]
    text = float(units.run.sum()) * (length - fixed["context.overlap"]) / length
    started = min(commit.started for commit in everything)
    return Measured(
        index=store.uri,
        run=plan.run,
        device=everything[0].device,
        model=(fixed["model"], fixed["model.dtype"], fixed["model.attention"]),
        threads=fixed["model.threads"],
        units=len(found),
        tokens=int(units.counted.sum()),
        counted=min(1.0, float(units.counted.sum()) / text),
        rows=rows,
        bytes=sizes,
        l0=l0,
        groups=tuple(groups),
        attempts=tuple(
            Attempt(commit.group, commit.tokens_run, commit.finished - commit.started)
            for commit in sorted(everything, key=lambda commit: commit.started)
        ),
        startup=max(0.0, started - plan.started),
    )


def _factors(
    commits: Sequence[Commit], saes: Sequence[SaeShape], units: Units, fixed: dict[str, Any], groups: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Measured over expected, by table: rows, and bytes that follow from rows."""
    expected = tables.rows(saes, units, fixed["top_k"], fixed["sample_k"])
    rows, sizes = {}, {}
    for table in (*tables.SAE_TABLES, *tables.UNIT_TABLES):
        have = sum(commit.files[table].rows for commit in commits if table in commit.files)
        wanted = float(expected[table].sum())
        if have and wanted:
            rows[table] = have / wanted
    by_rows, anyway = tables.sizes(
        saes, units, tables.corrected(expected, rows), groups, len(fixed["metadata"])
    )
    for table in by_rows:
        have = sum(commit.files[table].bytes for commit in commits if table in commit.files)
        if have and by_rows[table].sum():
            least = 0.05 * have  # however small the files: their rows took something
            sizes[table] = max(have - float(anyway[table].sum()), least) / float(by_rows[table].sum())
    return rows, sizes


def _l0(store: Store, commits: Sequence[Commit]) -> dict[str, float]:
    """Active features of a counted token by SAE, over some of the units."""
    chosen = sorted({c.ordinal for c in commits if c.tokens})
    chosen = [chosen[int(i)] for i in np.linspace(0, len(chosen) - 1, min(L0_UNITS, len(chosen)))]
    paths = [c.files["saes"].path for c in commits if c.ordinal in chosen and "saes" in c.files]
    columns = ["sae", "n_tokens", "n_active"]
    sums: dict[str, list[int]] = {}
    for data in store.read_many(paths):
        table = parquet.opened(data).read(columns, use_threads=False)
        for row in table.to_pylist():
            own = sums.setdefault(row["sae"], [0, 0])
            own[0] += row["n_tokens"]
            own[1] += row["n_active"]
    return {sae: active / tokens for sae, (tokens, active) in sums.items() if tokens}


def _keep(text: str) -> str | float:
    """`SaeInfo.keep` of what `keep_text` made of it."""
    return float(text.removeprefix("sample ")) if text.startswith("sample ") else text
