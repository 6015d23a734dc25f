"""Opening an index: commits are resolved to file lists, the views and macros are made over them.

Invariant: a connection sees the units that were wholly committed when it was opened, and no others;
files are named one by one, never by a glob. The connection is in memory and reads the index only.
Measured (design note, local and warm): a point query over 1,000 files takes 0.3 s, most of it opening
them; compaction is what keeps that flat.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from pipelines.ledger import Commit, Ledger, Plan, in_corpus_order
from pipelines.schema import KINDS, LOCAL_MAX, SCHEMAS, VOCABULARY, documents_schema
from pipelines.storage import Store
from sae_runtime.errors import InputError

_HERE = Path(__file__).parent
_SQL_TYPES = {
    "bool": "BOOLEAN",
    "int32": "INTEGER",
    "int64": "BIGINT",
    "uint8": "UTINYINT",
    "uint64": "UBIGINT",
    "float": "FLOAT",
    "double": "DOUBLE",
    "string": "VARCHAR",
    "binary": "BLOB",
}
_METADATA_TYPES = {
    "bool": pa.bool_(),
    "int64": pa.int64(),
    "double": pa.float64(),
}


def connect(uri: str) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with the index's views and macros. Raises InputError if there is no index."""
    store = Store(uri)
    statements = script(store)
    con = duckdb.connect(":memory:", config={"autoinstall_known_extensions": False})
    if not store.local:
        con.register_filesystem(store.fs)
    for statement in statements:
        con.execute(statement)
    return con


def script(store: Store) -> list[str]:
    """The statements that make the macros and views, file lists filled in: they run in any DuckDB."""
    ledger = Ledger(store)
    identity = ledger.identity()
    if identity is None:
        raise InputError(f"{store.uri}: no index here (no index.json); `corpuscope scan` makes one")
    # Commits before plans: a unit that is seen committed is then always in a plan that is seen.
    commits = ledger.commits()
    plans = ledger.plans()
    groups = len(identity["groups"])
    order = {unit.ordinal: place for place, unit in enumerate(in_corpus_order(plans))}
    visible = {
        unit.ordinal: unit
        for unit in in_corpus_order(plans)
        if all((unit.unit, group) in commits for group in range(groups))
    }
    shown = [c for c in commits.values() if c.ordinal in visible and visible[c.ordinal].unit == c.unit]
    metadata = identity["fixed"]["metadata"]
    fixed = identity["fixed"]
    values = {
        "units": _values(
            [(c.ordinal, c.run, order[c.ordinal]) for c in shown if c.group == 0], "NULL::BIGINT, NULL::INTEGER, 0"
        ),
        "declared_saes": _declared(identity),
        "runs": _runs(plans, commits.values(), groups, identity),
        "vocabulary": f"read_parquet([{_text(store.url(VOCABULARY))}])",
        "metadata": "".join(f", {_name(column)}" for column in metadata),
        "length": str(fixed["context.length"]),
        "local_max": str(LOCAL_MAX),
        "top_k": str(fixed["top_k"]),
        "sample_k": str(fixed["sample_k"]),
        "not_kept_tokens": _list(s["id"] for s in identity["saes"] if s["keep"] != "tokens"),
        "not_kept_documents": _list(s["id"] for s in identity["saes"] if s["keep"] == "none"),
    }
    schemas = {**SCHEMAS, "documents": _documents(metadata)}
    for kind in KINDS:
        files = [store.url(c.files[kind].path) for c in _ordered(shown) if kind in c.files]
        values[kind] = _relation(files, schemas[kind])
    text = (_HERE / "views.sql").read_text() 
    # Views may use macros only once these exist, and some macros read views.
    macros = _statements((_HERE / "macros.sql").read_text())
    first = [m for m in macros if re.match(r"CREATE MACRO (_fixed|_bin_value)\b", m)]
    rest = [m for m in macros if m not in first]
    return [*first, *(_fill(statement, values) for statement in _statements(text)), *rest]


def _ordered(commits: Iterable[Commit]) -> list[Commit]:
    return sorted(commits, key=lambda c: (c.ordinal, c.group))


def _statements(text: str) -> list[str]:
    """SQL statements of a file, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("--")]
    return [part.strip() for part in "\n".join(lines).split(";\n") if part.strip(" \n;")]


def _fill(statement: str, values: dict[str, str]) -> str:
    return re.sub(r"\$(\w+)", lambda match: values[match[1]], statement).rstrip(";")


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _name(value: str) -> str:
    return '"' + value.replace('"', '""') + '"'


def _list(values: Iterable[str]) -> str:
    return f"[{', '.join(_text(v) for v in values)}]::VARCHAR[]"


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    return _text(value) if isinstance(value, str) else repr(value)


def _values(rows: Sequence[Sequence[Any]], empty: str) -> str:
    if not rows:
        return f"(SELECT {empty} WHERE false)"
    return f"(VALUES {', '.join('(' + ', '.join(map(_literal, row)) + ')' for row in rows)})"


def _typed(rows: Sequence[Sequence[Any]], columns: dict[str, str]) -> str:
    """A relation of literals with named, typed columns."""
    names = ", ".join(f"c{i}" for i in range(len(columns)))
    casts = ", ".join(f"c{i}::{kind} AS {name}" for i, (name, kind) in enumerate(columns.items()))
    empty = ", ".join("NULL" for _ in columns)
    return f"(SELECT {casts} FROM {_values(rows, empty)} AS rows({names}))"


def _relation(files: list[str], schema: pa.Schema) -> str:
    if files:
        return f"read_parquet([{', '.join(map(_text, files))}])"
    columns = ", ".join(f"NULL::{_sql_type(field.type)} AS {_name(field.name)}" for field in schema)
    return f"(SELECT {columns} WHERE false)"


def _sql_type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return _sql_type(kind.value_type) + "[]"
    if pa.types.is_dictionary(kind):
        return _sql_type(kind.value_type)
    return _SQL_TYPES.get(str(kind), "VARCHAR")


def _documents(metadata: dict[str, str]) -> pa.Schema:
    return documents_schema({name: _METADATA_TYPES.get(kind, pa.string()) for name, kind in metadata.items()})


def _declared(identity: dict[str, Any]) -> str:
    columns = {
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
    rows = [
        (
            s["id"], s["suite"], identity["model"], s["site"], s["layer"], s["architecture"], s["d_in"],
            s["width"], s["nominal_l0"], s["keep"], s["convention"], s["trained_on"], None,
            s["fingerprint"], s["uri"],
        )  # fmt: skip
        for s in identity["saes"]
    ]
    return _typed(rows, columns)


def _runs(plans: Sequence[Plan], commits: Iterable[Commit], groups: int, identity: dict[str, Any]) -> str:
    columns = {
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
    prints = [s["fingerprint"] for s in identity["saes"]]
    of_run: dict[int, list[Commit]] = {}
    for commit in commits:
        of_run.setdefault(commit.run, []).append(commit)
    dropped = {unit for plan in plans for unit in plan.dropped}
    rows = []
    for plan in plans:
        done = of_run.get(plan.run, [])
        first = [c for c in done if c.group == 0]
        have = {(c.unit, c.group) for c in done}
        wanted = {(u.unit, g) for u in plan.units if u.unit not in dropped for g in range(groups)}
        finished = max((c.finished for c in done), default=plan.started) if wanted <= have else None
        tokens = sum(c.tokens for c in first)
        busy = busy_seconds(done)
        rows.append(
            (
                plan.run, plan.spec, identity["fixed"]["model"], str(prints), plan.code, plan.device,
                _time(plan.started), _time(finished), sum(c.documents for c in first), tokens,
                tokens / busy if busy else None,
            )  # fmt: skip
        )
    return _typed(rows, columns)


def busy_seconds(commits: Iterable[Commit]) -> float:
    """Seconds in which at least one unit was being scanned: pauses between resumptions do not count."""
    total, end = 0.0, 0.0
    for commit in sorted(commits, key=lambda c: c.started):
        total += max(0.0, commit.finished - max(commit.started, end))
        end = max(end, commit.finished)
    return total


def _time(seconds: float | None) -> str | None:
    import datetime

    if seconds is None:
        return None
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S.%f")
