"""Opening an index: commits are resolved to file lists, the views and macros are made over them.

Invariant: a connection sees the units that were wholly committed when it was opened, and no others;
files are named one by one, never by a glob. The connection is in memory and reads the index only.
Measured (design note, local and warm): a point query over 1,000 files takes 0.3 s, most of it opening
them; compaction is what will keep that flat.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from pipelines.ledger import Commit, Ledger, Plan, in_corpus_order
from pipelines.names import reading
from pipelines.schema import (
    KINDS,
    LOCAL_MAX,
    SCHEMAS,
    VOCABULARY,
    VOCABULARY_SCHEMA,
    WINDOW,
    documents_schema,
    metadata_columns,
    metadata_type,
    sample_seed,
)
from pipelines.storage import Store
from queries.relations import literal, name, parquet, table, texts
from queries.remote import RemoteFiles
from sae_runtime.errors import DataError, InputError, one_line

_HERE = Path(__file__).parent
_SAE_COLUMNS = {
    "sae": "VARCHAR",
    "suite": "VARCHAR",
    "model": "VARCHAR",
    "site": "VARCHAR",
    "layer": "INTEGER",
    "architecture": "VARCHAR",
    "d_in": "INTEGER",
    "width": "INTEGER",
    "nominal_l0": "DOUBLE",
    "keep": "VARCHAR",
    "activation_convention": "VARCHAR",
    "trained_on": "VARCHAR",
    "neuronpedia": "VARCHAR",
    "fingerprint": "VARCHAR",
    "uri": "VARCHAR",
}
_SEED_COLUMNS = {"sae": "VARCHAR", "seed": "UHUGEINT"}
_RUN_COLUMNS = {
    "run": "INTEGER",
    "spec": "VARCHAR",
    "model_fingerprint": "VARCHAR",
    "sae_fingerprints": "VARCHAR[]",
    "code": "VARCHAR",
    "device": "VARCHAR",
    "started": "TIMESTAMP",
    "finished": "TIMESTAMP",
    "documents": "BIGINT",
    "tokens": "BIGINT",
    "tokens_per_second": "DOUBLE",
}


@dataclass(frozen=True)
class Snapshot:
    """What an index holds at one moment."""

    identity: dict[str, Any]
    plans: tuple[Plan, ...]
    commits: tuple[Commit, ...]  # all of them, dropped units' too
    shown: tuple[Commit, ...]  # of live units with every group committed, by ordinal and group
    order: dict[int, int]  # ordinal -> place in the corpus


def connect(uri: str) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with the index's views and macros. Raises InputError if there is no index.

    DataError names a file that is gone.
    """
    store = Store(uri)
    statements = script(store)
    con = duckdb.connect(":memory:", config={"autoinstall_known_extensions": False})
    if not store.local:
        con.register_filesystem(RemoteFiles(store))
    try:
        for statement in statements:
            con.execute(statement)
    except duckdb.Error as error:
        raise DataError(f"index {uri}: damaged: {one_line(error)}") from error
    return con


def script(store: Store) -> list[str]:
    """The statements that make the macros and views, file lists filled in: they run in any DuckDB."""
    with reading(store.uri):
        values = _values(store, snapshot(store))
    files = [(_HERE / file).read_text() for file in ("helpers.sql", "views.sql", "macros.sql")]
    return [_fill(statement, values) for file in files for statement in _statements(file)]


def snapshot(store: Store) -> Snapshot:
    """Read plans and commits. Raises InputError where there is no index."""
    ledger = Ledger(store)
    identity = ledger.identity()
    if identity is None:
        several = "; several indexes at once are not supported yet" if "," in store.uri else ""
        raise InputError(f"{store.uri}: no index here (no index.json){several}; `corpuscope scan` makes one")
    # Commits before plans: a unit that is seen committed is then always in a plan that is seen.
    commits = ledger.commits()
    plans = ledger.plans()
    units = in_corpus_order(plans)
    groups = range(len(identity["groups"]))
    shown = [
        commits[unit.unit, group]
        for unit in units
        if all((unit.unit, g) in commits for g in groups)
        for group in groups
    ]
    return Snapshot(
        identity=identity,
        plans=tuple(plans),
        commits=tuple(commits.values()),
        shown=tuple(sorted(shown, key=lambda c: (c.ordinal, c.group))),
        order={unit.ordinal: place for place, unit in enumerate(units)},
    )


def busy_seconds(commits: Iterable[Commit]) -> float:
    """Seconds in which at least one unit was being scanned: pauses between resumptions do not count."""
    total, end = 0.0, 0.0
    for commit in sorted(commits, key=lambda c: c.started):
        total += max(0.0, commit.finished - max(commit.started, end))
        end = max(end, commit.finished)
    return total


def _values(store: Store, found: Snapshot) -> dict[str, str]:
    """What the `$names` of the .sql files stand for."""
    fixed, saes = found.identity["fixed"], found.identity["saes"]
    metadata = fixed["metadata"]
    schemas = {
        **SCHEMAS,
        "documents": documents_schema({column: metadata_type(kind) for column, kind in metadata.items()}),
    }
    relations = {
        kind: parquet([store.url(c.files[kind].path) for c in found.shown if kind in c.files], schemas[kind])
        for kind in KINDS
    }
    units = [(c.ordinal, c.run, found.order[c.ordinal]) for c in found.shown if c.group == 0]
    return relations | {
        "units": table(units, {"ordinal": "BIGINT", "run": "INTEGER", "corpus_order": "BIGINT"}),
        "declared_saes": table([_sae_row(sae, found.identity) for sae in saes], _SAE_COLUMNS),
        "duplicates": table(
            [list(pair) for pair in found.identity["duplicates"].items()],
            {"sae": "VARCHAR", "same_as": "VARCHAR"},
        ),
        "runs": table(_run_rows(found), _RUN_COLUMNS),
        "vocabulary": parquet([store.url(VOCABULARY)] if found.plans else [], VOCABULARY_SCHEMA),
        "metadata": "".join(f", {name(column)}" for column in metadata_columns(metadata).values()),
        "length": literal(int(fixed["context.length"])),
        "window": str(WINDOW),
        "seeds": table([(sae["id"], sample_seed(sae["id"])) for sae in saes], _SEED_COLUMNS),
        "local_max": str(LOCAL_MAX),
        "top_k": literal(int(fixed["top_k"])),
        "sample_k": literal(int(fixed["sample_k"])),
        "not_kept_tokens": texts(sae["id"] for sae in saes if sae["keep"] != "tokens"),
        "not_kept_documents": texts(sae["id"] for sae in saes if sae["keep"] == "none"),
    }


def _sae_row(sae: dict[str, Any], identity: dict[str, Any]) -> list[Any]:
    record = sae | {"sae": sae["id"], "model": identity["model"], "activation_convention": sae["convention"]}
    return [record.get(column) for column in _SAE_COLUMNS]


def _run_rows(found: Snapshot) -> list[list[Any]]:
    prints = [sae["fingerprint"] for sae in found.identity["saes"]]
    groups = range(len(found.identity["groups"]))
    dropped = {unit for plan in found.plans for unit in plan.dropped}
    committed = {(commit.unit, commit.group) for commit in found.commits}
    rows = []
    for plan in found.plans:
        done = [commit for commit in found.commits if commit.run == plan.run]
        first = [commit for commit in done if commit.group == 0]
        wanted = {(u.unit, g) for u in plan.units if u.unit not in dropped for g in groups}
        complete = wanted <= committed
        tokens, busy = sum(commit.tokens for commit in first), busy_seconds(done)
        values = {
            "run": plan.run,
            "spec": plan.spec,
            "model_fingerprint": found.identity["fixed"]["model"],
            "sae_fingerprints": prints,
            "code": plan.code,
            "device": plan.device,
            "started": _time(plan.started),
            "finished": _time(max((c.finished for c in done), default=plan.started)) if complete else None,
            "documents": sum(commit.documents for commit in first),
            "tokens": tokens,
            "tokens_per_second": tokens / busy if busy else None,
        }
        rows.append([values[column] for column in _RUN_COLUMNS])
    return rows


def _time(seconds: float) -> str:
    """UTC, as a TIMESTAMP literal has it."""
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S.%f")


def _statements(source: str) -> list[str]:
    """SQL statements of a file, without comments."""
    lines = [line for line in source.splitlines() if not line.lstrip().startswith("--")]
    return [part.strip(" \n;") for part in "\n".join(lines).split(";\n") if part.strip(" \n;")]


def _fill(statement: str, values: dict[str, str]) -> str:
    return re.sub(r"\$(\w+)", lambda match: values[match[1]], statement)
