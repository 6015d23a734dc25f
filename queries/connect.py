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
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.compute as pc

from pipelines.contents import Contents, contents, places
from pipelines.names import reading
from pipelines.schema import (
    KEYED,
    KINDS,
    LOCAL_MAX,
    SAMPLE_BITS,
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
from queries.relations import literal, name, parquet, table, texts, without
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


def connect(uri: str, *more: str) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with the index's views and macros. Raises InputError if there is no index.

    DataError names a file that is gone. Files that were replaced and removed while it was opened are not: the
    index is resolved again then.
    """
    if more:
        raise InputError(f"{uri}: several indexes at once are not supported yet")
    store = Store(uri)
    found, filled = resolved(store)
    while True:
        try:
            return opened(found, filled)
        except DataError:
            before = filled
            found, filled = resolved(store)
            if filled == before:
                raise


def resolved(store: Store) -> tuple[Contents, dict[str, str]]:
    """What an index holds, and what the `$names` of the .sql files stand for in it."""
    with reading(store.uri):
        found = contents(store)
        return found, _values(found)


def opened(found: Contents, filled: dict[str, str], **settings: Any) -> duckdb.DuckDBPyConnection:
    """The same for an index that is resolved already; `settings` are DuckDB's. Raises DataError."""
    con = duckdb.connect(":memory:", config={"autoinstall_known_extensions": False, **settings})
    if not found.store.local:
        con.register_filesystem(RemoteFiles(found.store))
    try:
        con.execute("SET parquet_metadata_cache = true")  # no file of an index ever changes
        for statement in _script(filled):
            con.execute(statement)
    except duckdb.Error as error:
        con.close()
        raise DataError(f"index {found.store.uri}: damaged: {one_line(error)}") from error
    return con


def script(store: Store) -> list[str]:
    """The statements that make the macros and views, file lists filled in: they run in any DuckDB."""
    return _script(resolved(store)[1])


def _script(filled: dict[str, str]) -> list[str]:
    files = [(_HERE / file).read_text() for file in ("helpers.sql", "views.sql", "macros.sql")]
    return [fill(statement, filled) for file in files for statement in _statements(file)]


def busy_seconds(started: Iterable[float], finished: Iterable[float]) -> float:
    """Seconds in which at least one unit was being scanned: pauses between resumptions do not count."""
    total, end = 0.0, 0.0
    for start, stop in sorted(zip(started, finished, strict=True)):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _values(found: Contents) -> dict[str, str]:
    """What the `$names` of the .sql files stand for."""
    store, fixed, saes = found.store, found.identity["fixed"], found.identity["saes"]
    metadata = fixed["metadata"]
    schemas = {
        **SCHEMAS,
        "documents": documents_schema({column: metadata_type(kind) for column, kind in metadata.items()}),
    }
    ordinals = dict.fromkeys(("document_features", "by_document", *KEYED), f"document // {LOCAL_MAX}")
    ordinals["activations"] = f"token // {fixed['context.length'] * LOCAL_MAX}"
    relations = {
        kind: without(
            parquet([store.url(file.path) for file in found.files(kind)], schemas[kind]),
            ordinals.get(kind, ""),
            found.hidden.tolist() if kind in ordinals else (),
        )
        for kind in KINDS
    }
    return relations | {
        "units": table(places(found.live), {"first": "BIGINT", "stop": "BIGINT", "place": "BIGINT"}),
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
        "sample_bits": str(SAMPLE_BITS),
        "top_k": literal(int(fixed["top_k"])),
        "sample_k": literal(int(fixed["sample_k"])),
        "not_kept_tokens": texts(sae["id"] for sae in saes if sae["keep"] != "tokens"),
        "not_kept_documents": texts(sae["id"] for sae in saes if sae["keep"] == "none"),
    }


def _sae_row(sae: dict[str, Any], identity: dict[str, Any]) -> list[Any]:
    record = sae | {"sae": sae["id"], "model": identity["model"], "activation_convention": sae["convention"]}
    return [record.get(column) for column in _SAE_COLUMNS]


def _run_rows(found: Contents) -> list[list[Any]]:
    prints = [sae["fingerprint"] for sae in found.identity["saes"]]
    live, shown = set(found.live.tolist()), set(found.shown.tolist())
    rows = []
    for plan in found.plans:
        if plan.kind != "scan":
            continue
        done = found.facts.filter(pc.equal(found.facts["run"], plan.run))
        complete = all(u.ordinal in shown for u in plan.units if u.ordinal in live)
        tokens = pc.sum(done["tokens"], min_count=0).as_py()
        busy = busy_seconds(done["started"].to_pylist(), done["finished"].to_pylist())
        values = {
            "run": plan.run,
            "spec": plan.spec,
            "model_fingerprint": found.identity["fixed"]["model"],
            "sae_fingerprints": prints,
            "code": plan.code,
            "device": plan.device,
            "started": _time(plan.started),
            "finished": _time(pc.max(done["finished"]).as_py() or plan.started) if complete else None,
            "documents": pc.sum(done["documents"], min_count=0).as_py(),
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


def fill(statement: str, values: dict[str, str]) -> str:
    """SQL with its `$names` replaced."""
    return re.sub(r"\$(\w+)", lambda match: values[match[1]], statement)
