"""Opening indexes: commits are resolved to file lists, the views and macros are made over them.

Invariant: a connection sees the units that were wholly committed when it was opened, and no others;
files are named one by one, never by a glob. The connection is in memory and reads the indexes only: DuckDB's
external access is off but for our own files (files.py), which cannot be written, and for the folder that it
spills to, which is the connection's own.
Measured (design note, local and warm): a point query over 1,000 files takes 0.3 s, most of it opening
them; compaction is what will keep that flat.
"""

from __future__ import annotations

import datetime
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contents import Contents, contents, places
from pipelines.names import reading
from pipelines.schema import (
    FACTS,
    KEYED,
    KINDS,
    LOCAL_MAX,
    ROWS,
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
from pipelines.summary import RunSummary, read_all
from queries.files import SCHEME, IndexFiles, url
from queries.pruning import remember
from queries.relations import literal, name, parquet, table, text, texts, without
from queries.several import Keys, agree, match, same_keys
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
# Columns that hold keys.
_KEY = dict.fromkeys(("document_features", "by_document", *KEYED), "document") | {
    "activations": "token",
    **dict.fromkeys(("top_contexts", "sampled_contexts", "sampled_merged"), "context"),
}
# Every connection's.
_SETTINGS = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "python_enable_replacements": False,  # or an unknown table is looked for in Python
}
# What a person may still set; nothing of it opens a file.
_FREE = [
    "default_null_order", "default_order", "enable_progress_bar", "memory_limit", "preserve_insertion_order",
    "progress_bar_time", "threads", "TimeZone",
]  # fmt: skip
# Set last: `enable_external_access` alone would let no file of an index be opened.
_CLOSED = {
    "allowed_directories": texts([f"{SCHEME}://"]),
    "enable_external_access": "false",
    "allowed_configs": texts(_FREE),
    "lock_configuration": "true",
}
_CREATED = re.compile(r"\ACREATE (?:VIEW|MACRO) (\w+)")
_WORD = re.compile(r"\w+")
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
    # Of its attempts' summaries; NULL where none has left one.
    "seconds": "DOUBLE",
    "workers": "INTEGER",
    "worker_hours": "DOUBLE",
    "retries": "BIGINT",
    "failures": "BIGINT",
    "cost": "DOUBLE",
    "index": "VARCHAR",  # of several the one that it made
}


def connect(
    uri: str, *more: str, views: Collection[str] | None = None, **settings: Any
) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with the views and macros of an index, or of several over the same documents.

    `views` are those that are wanted, if not all: making all takes 60 ms. `settings` are DuckDB's. A query on
    it can neither write a file nor read one outside the indexes, nor load an extension, nor change that;
    tables in memory, and settings such as `threads` and `memory_limit`, are free. Documents, contexts and
    their keys are those of the first index; the others add their SAEs.
    Raises InputError if there is no index, or if they do not go together. DataError names a file that is
    gone, unless it was replaced and removed while the index was opened, which is resolved again then.
    """
    stores = [Store(each) for each in (uri, *more)]
    found = [resolved(store) for store in stores]
    while True:
        try:
            return opened(found, views, **settings)
        except DataError:
            before = _files(found)
            found = [resolved(store) for store in stores]
            if _files(found) == before:
                raise


def resolved(store: Store) -> Contents:
    """What an index holds."""
    with reading(store.uri):
        return contents(store)


def opened(
    found: Sequence[Contents], views: Collection[str] | None = None, **settings: Any
) -> duckdb.DuckDBPyConnection:
    """The same for indexes that are resolved already. Raises DataError, InputError."""
    con = _session(found, settings)
    try:
        con.execute("SET parquet_metadata_cache = true")  # files of ours never change
        for statement in _needed(_script(_values(found, url, con)), views):
            con.execute(statement)
        for name, value in _CLOSED.items():
            con.execute(f"SET {name} = {value}")
    except duckdb.Error as error:
        con.close()
        raise DataError(f"index {_uris(found)}: damaged: {one_line(error)}") from error
    except InputError:
        con.close()
        raise
    remember(con, found)
    return con


def script(stores: Sequence[Store]) -> list[str]:
    """The statements that make the macros and views, file lists filled in: they run in any DuckDB.

    Raises as `connect` does.
    """
    found = [resolved(store) for store in stores]
    con = _session(found, {})
    try:
        return _script(_values(found, lambda index, name: found[index].store.url(name), con))
    except duckdb.Error as error:
        raise DataError(f"index {_uris(found)}: damaged: {one_line(error)}") from error
    finally:
        con.close()


def values(found: Contents) -> dict[str, str]:
    """What the `$names` of the .sql files stand for in a connection to one index."""
    return _values([found], url, None)


def _files(found: Sequence[Contents]) -> list[frozenset[str]]:
    with reading(_uris(found)):
        return [each.named for each in found]


def _uris(found: Sequence[Contents]) -> str:
    return ",".join(each.store.uri for each in found)


def _session(found: Sequence[Contents], settings: dict[str, Any]) -> duckdb.DuckDBPyConnection:
    """A DuckDB in memory that sees the files of some indexes; it is not closed to anything else yet."""
    sizes: dict[tuple[int, str], int] = {}
    for number, each in enumerate(found):
        if not each.store.local:
            with reading(each.store.uri):
                sizes |= {(number, file.path): file.bytes for kind in KINDS for file in each.files(kind)}
                sizes |= {(number, held.file.path): held.file.bytes for held in each.annotations.files}
    # Until a query spills there is no such folder; DuckDB removes it with the connection.
    scratch = os.path.join(tempfile.gettempdir(), f"corpuscope-{uuid.uuid4().hex}")
    con = duckdb.connect(":memory:", config={**_SETTINGS, "temp_directory": scratch, **settings})
    con.register_filesystem(IndexFiles([each.store for each in found], sizes))
    return con


def _script(filled: dict[str, str]) -> list[str]:
    files = [(_HERE / file).read_text() for file in ("helpers.sql", "views.sql", "macros.sql")]
    return [fill(statement, filled) for file in files for statement in _statements(file)]


def _needed(statements: Sequence[str], views: Collection[str] | None) -> list[str]:
    """Those that make some views and macros, and what these are made of; None is for all."""
    if views is None:
        return list(statements)
    named = {_CREATED.findall(statement)[0]: statement for statement in statements}
    wanted, more = set(), set(views)
    while more:
        wanted |= more
        more = {word for name in more for word in _WORD.findall(named[name]) if word in named} - wanted
    return [statement for name, statement in named.items() if name in wanted]


def busy_seconds(started: Iterable[float], finished: Iterable[float]) -> float:
    """Seconds in which at least one unit was being scanned: pauses between resumptions do not count."""
    total, end = 0.0, 0.0
    for start, stop in sorted(zip(started, finished, strict=True)):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _values(
    found: Sequence[Contents], named: Callable[[int, str], str], con: duckdb.DuckDBPyConnection | None
) -> dict[str, str]:
    """What the `$names` of the .sql files stand for. Raises DataError, InputError.

    `named` gives what DuckDB opens as a file of the index of a number; `con` sees them as `url` has them, and
    is needed for several indexes.
    """
    with reading(_uris(found)):
        return _filled(found, named, con)


def _filled(
    found: Sequence[Contents], named: Callable[[int, str], str], con: duckdb.DuckDBPyConnection | None
) -> dict[str, str]:
    first = found[0]
    fixed = first.identity["fixed"]
    length, metadata = int(fixed["context.length"]), fixed["metadata"]
    schemas = {
        **SCHEMAS,
        "documents": documents_schema({column: metadata_type(kind) for column, kind in metadata.items()}),
    }
    keys = _keys(found, schemas, con)
    relations = {
        kind: _rows(kind, found[:1] if kind in KEYED else found, schemas[kind], keys, named) for kind in KINDS
    }
    saes = [(sae, each.identity) for each in found for sae in each.identity["saes"]]
    relations |= {kind: _annotated(kind, found, named) for kind in FACTS}
    return relations | {
        "units": table(places(first.live), {"first": "BIGINT", "stop": "BIGINT", "place": "BIGINT"}),
        "declared_saes": table([_sae_row(*each) for each in saes], _SAE_COLUMNS),
        "duplicates": table(
            [list(pair) for each in found for pair in each.identity["duplicates"].items()],
            {"sae": "VARCHAR", "same_as": "VARCHAR"},
        ),
        "runs": table([row for each in found for row in _run_rows(each)], _RUN_COLUMNS),
        "vocabulary": parquet([named(0, VOCABULARY)] if first.plans else [], VOCABULARY_SCHEMA),
        "metadata": "".join(f", {name(column)}" for column in metadata_columns(metadata).values()),
        "length": literal(length),
        "window": str(WINDOW),
        "seeds": table([(sae["id"], sample_seed(sae["id"])) for sae, _ in saes], _SEED_COLUMNS),
        "local_max": str(LOCAL_MAX),
        "sample_bits": str(SAMPLE_BITS),
        "top_k": _setting("top_k", found),
        "sample_k": _setting("sample_k", found),
        "not_kept_tokens": texts(sae["id"] for sae, _ in saes if sae["keep"] != "tokens"),
        "not_kept_documents": texts(sae["id"] for sae, _ in saes if sae["keep"] == "none"),
    }


def _rows(
    kind: str,
    found: Sequence[Contents],
    schema: pa.Schema,
    keys: Sequence[Keys | None],
    named: Callable[[int, str], str],
    at: int = 0,
) -> str:
    """The rows of a kind in some indexes, less those of dropped units, in keys of the first index.

    `at` is the number of the first of `found`.
    """
    column, plain, relations = _KEY.get(kind, ""), [], []
    for number, (each, key) in enumerate(zip(found, keys, strict=False), at):
        files = [named(number, file.path) for file in each.files(kind)]
        hidden = each.hidden.tolist() if kind in (*ROWS, *KEYED) else []
        scale = int(each.identity["fixed"]["context.length"]) if column == "token" else 1
        if not files:
            continue
        if not hidden and not (key and column):
            plain += files
            continue
        relation = without(parquet(files, schema), f"{column} // {scale * LOCAL_MAX}", hidden)
        relations.append(key.moved(relation, column, scale) if key and column else relation)
    if plain or not relations:
        relations.append(parquet(plain, schema))
    if len(relations) == 1:
        return relations[0]
    return f"({' UNION ALL BY NAME '.join(f'SELECT * FROM {relation}' for relation in relations)})"


def _annotated(kind: str, found: Sequence[Contents], named: Callable[[int, str], str]) -> str:
    """The rows of an annotation's kind that hold in some indexes."""
    plain, relations = [], []
    for number, each in enumerate(found):
        for held in each.annotations.of(kind):
            file = named(number, held.file.path)
            if held.whole:
                plain.append(file)
                continue
            columns, keys = "sae", texts(sae for sae, _ in held.keys)
            if kind == "explanations":  # each source's are replaced apart
                columns = "(sae, source)"
                keys = f"[{', '.join(f'({text(sae)}, {text(source)})' for sae, source in held.keys)}]"
            relations.append(
                f"(SELECT * FROM {parquet([file], FACTS[kind])} WHERE {columns} IN (SELECT unnest({keys})))"
            )
    if plain or not relations:
        relations.append(parquet(plain, FACTS[kind]))
    if len(relations) == 1:
        return relations[0]
    return f"({' UNION ALL BY NAME '.join(f'SELECT * FROM {relation}' for relation in relations)})"


def _keys(
    found: Sequence[Contents], schemas: dict[str, pa.Schema], con: duckdb.DuckDBPyConnection | None
) -> list[Keys | None]:
    """For each index how its keys become the first one's; None where they are the same."""
    first, *others = found
    if not others:
        return [None]
    assert con is not None
    agree(found)
    keys: list[Keys | None] = [None]
    for number, other in enumerate(others, 1):
        if same_keys(first, other):
            keys.append(None)
            continue
        tables = [
            _rows(kind, [each], schemas[kind], [None], url, at)
            for at, each in ((0, first), (number, other))
            for kind in ("documents", "contexts")
        ]
        keys.append(match(con, first, other, tables))
    return keys


def _setting(name: str, found: Sequence[Contents]) -> str:
    """A number that the indexes fix, as SQL: by `sae` where they differ in it."""
    wanted = {number: int(each.identity["fixed"][name]) for number, each in enumerate(found)}
    if len(set(wanted.values())) == 1:
        return literal(wanted[0])
    cases = " ".join(
        f"WHEN list_contains({texts(sae['id'] for sae in found[number].identity['saes'])}, sae) THEN {value}"
        for number, value in wanted.items()
    )
    return f"CASE {cases} END"


def _sae_row(sae: dict[str, Any], identity: dict[str, Any]) -> list[Any]:
    record = sae | {"sae": sae["id"], "model": identity["model"], "activation_convention": sae["convention"]}
    return [record.get(column) for column in _SAE_COLUMNS]


def _run_rows(found: Contents) -> list[list[Any]]:
    prints = [sae["fingerprint"] for sae in found.identity["saes"]]
    live, shown = set(found.live.tolist()), set(found.shown.tolist())
    summaries = read_all(found.store)
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
            **_told(summaries.get(plan.run)),
            "index": found.store.uri,
        }
        rows.append([values[column] for column in _RUN_COLUMNS])
    return rows


def _told(run: RunSummary | None) -> dict[str, Any]:
    if run is None:
        return dict.fromkeys(("seconds", "workers", "worker_hours", "retries", "failures", "cost"))
    return {
        "seconds": run.seconds,
        "workers": run.workers,
        "worker_hours": run.worker_hours,
        "retries": run.retries,
        "failures": sum(run.failures.values()),
        "cost": run.cost,
    }


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
