"""Questions that the commands ask of an index, each one SQL statement; answers are lists of dicts.

Invariant: answers come from the views alone, so what a command prints a person can ask again in SQL.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import duckdb
import pyarrow as pa

from pipelines.schema import NEAR, WINDOW
from queries.pieces import join_pieces, spell, spelling
from queries.pruning import Held, held
from sae_runtime.errors import CorpuscopeError, DataError, InputError, one_line

FEATURE_COLUMNS = (
    "feature", "n_tokens", "n_contexts", "n_documents", "density", "mean_active", "std_active", "max",
    "p50", "p90", "p99",
)  # fmt: skip
_EXAMPLE = (5, 10)  # tokens before and after it in a table
_FETCH = 10_000  # rows fetched from DuckDB at a time


CONTEXT_COLUMNS = (
    "rank", "activation", "id", "corpus", "source", "row", "context", "position", "text", "pieces",
)  # fmt: skip
# Views that `feature` and `resolve_sae` ask.
FEATURE_VIEWS = (
    "_declared_saes", "_duplicates", "features", "_top_contexts", "top_contexts", "contexts", "documents",
    "vocabulary", "explanations", "feature_tokens", "feature_neighbours",
)  # fmt: skip
_READING = "only reading is allowed here (SELECT, FROM, DESCRIBE, …)"
_EXPLAIN = re.compile(r"\s*EXPLAIN\s+(ANALYZE\s+)?(\(\s*(FORMAT|ANALYZE)\b[^)]*\)\s*)?", re.IGNORECASE)


def column_names(result: duckdb.DuckDBPyConnection) -> list[str]:
    """A result's columns; a name that occurs again gets a number, as in `a`, `a_1`."""
    return unique([column for column, *_ in result.description or ()])


def unique(columns: Sequence[str]) -> list[str]:
    """Names of columns, numbered where they occur again."""
    names: list[str] = []
    for column in columns:
        name, number = column, 0
        while name in names:
            number += 1
            name = f"{column}_{number}"
        names.append(name)
    return names


def rows(result: duckdb.DuckDBPyConnection) -> Iterator[dict[str, Any]]:
    """A result's rows as dicts, in order, fetched as they are asked for."""
    names = column_names(result)
    with _sql_errors():
        while batch := result.fetchmany(_FETCH):
            for row in batch:
                yield dict(zip(names, row, strict=True))


def arrow_table(result: duckdb.DuckDBPyConnection) -> pa.Table:
    """A whole result with its types."""
    names = column_names(result)
    with _sql_errors(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a relation would save a copy, but it runs the statement lazily
        table: pa.Table = result.to_arrow_table()
        return table.rename_columns(names)


def select(
    con: duckdb.DuckDBPyConnection, statement: str, values: Sequence[Any] | dict[str, Any] = ()
) -> duckdb.DuckDBPyConnection:
    """Run one read-only statement. Raises InputError (one line) for anything else or for SQL errors.

    `values` are those of its `?`, `$1` or `$name`.
    """
    with _sql_errors():
        found = duckdb.extract_statements(statement)
        if len(found) != 1:
            raise InputError(f"sql: one statement is wanted, {len(found)} were given")
        _check_reading(found[0])
        return con.execute(found[0], values or None)


@contextlib.contextmanager
def time_limit(con: duckdb.DuckDBPyConnection, seconds: float | None) -> Iterator[None]:
    """Stop what runs on the connection after so many seconds: asking and fetching. Raises CorpuscopeError.

    None sets no limit.
    """
    if seconds is None:
        yield
        return
    late = threading.Event()

    def stop() -> None:
        late.set()
        while not done.wait(0.1):  # an interrupt between two fetches is lost
            con.interrupt()

    done = threading.Event()
    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (InputError, DataError, duckdb.InterruptException) as error:
        if not late.is_set():
            raise
        raise CorpuscopeError(f"stopped after {seconds:g} s, its time limit") from error
    finally:
        done.set()
        timer.cancel()


def _check_reading(statement: duckdb.Statement) -> None:
    """InputError unless the statement, or the one that it explains, only reads.

    `EXPLAIN ANALYZE` runs what it explains, so a COPY would write.
    """
    kind = statement.type
    if kind == duckdb.StatementType.EXPLAIN:
        explained = duckdb.extract_statements(_EXPLAIN.sub("", statement.query.strip(), count=1))
        if len(explained) == 1 and explained[0].type == duckdb.StatementType.SELECT:
            return
        raise InputError(f"sql: {_READING}; EXPLAIN takes one such statement, without comments before it")
    if kind == duckdb.StatementType.MULTI:
        raise InputError("sql: PIVOT needs its columns by name here: PIVOT … ON column IN (value, …) USING …")
    if kind != duckdb.StatementType.SELECT:
        raise InputError(f"sql: {_READING}, not {str(kind).rsplit('.', 1)[-1]}")


@contextlib.contextmanager
def _sql_errors() -> Iterator[None]:
    """DuckDB's errors as InputErrors of one line, with the names it suggests."""
    try:
        yield
    except duckdb.InterruptException:  # no error of the statement's: who stopped it knows why
        raise
    except duckdb.Error as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        hints = [line for line in lines[1:] if line.startswith(("Candidate bindings", "Did you mean"))]
        raise InputError(" ".join([f"sql: {one_line(error)}", *hints[:1]])) from error


def resolve_sae(con: duckdb.DuckDBPyConnection, name: str) -> str:
    """The id of the SAE that `name` names: its id, its Neuronpedia id or an unambiguous ending of its id."""
    # `_declared_saes` is what `saes` shows of them without the statistics, which cost a scan.
    known = ask(con, "SELECT sae, neuronpedia FROM _declared_saes ORDER BY sae")
    ids = [row["sae"] for row in known]
    if name in ids:
        return name
    for row in ask(con, "SELECT sae, same_as FROM _duplicates"):
        if row["sae"] == name:  # it was not scanned: the other one has the same tensors
            return str(row["same_as"])
    found = [row["sae"] for row in known if name and row["neuronpedia"] == name]
    found = found or [sae for sae in ids if sae.endswith(f"/{name}")]
    found = found or [sae for sae in ids if name and sae.endswith(name)]
    if len(found) == 1:
        return str(found[0])
    if found:
        raise InputError(f"sae: {name!r} is the ending of {len(found)} ids ({_some(found)}); give more of it")
    near = difflib.get_close_matches(name, ids, n=3, cutoff=0.8)
    raise InputError(f"sae: {name!r} names no SAE of this index; there are {_some(near or ids)}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def ask(con: duckdb.DuckDBPyConnection, statement: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """The rows of one of our own statements. DataError where the index's files cannot be read."""
    try:
        result = con.execute(statement, list(values))
        names = column_names(result)
        return [dict(zip(names, row, strict=True)) for row in result.fetchall()]
    except duckdb.Error as error:  # our own statement, so the files are to blame
        raise DataError(f"index: damaged: {one_line(error)}") from error


def feature_table(con: duckdb.DuckDBPyConnection, sae: str, sort: str, limit: int) -> list[dict[str, Any]]:
    """Statistics of an SAE's features, highest `sort` first, and `example`: the text at the maximum.

    `max` sorts by its absolute value, as everything that ranks activations. InputError for an unknown column.
    """
    column = sort.removeprefix("-")
    if column not in FEATURE_COLUMNS:
        raise InputError(f"--sort: no column {column!r}; there are {', '.join(FEATURE_COLUMNS)}")
    ascending = sort.startswith("-") or column == "feature"
    direction = "ASC" if ascending else "DESC"
    found = ask(
        con,
        f"SELECT {', '.join(FEATURE_COLUMNS)} FROM features WHERE sae = $1 "
        f"ORDER BY {'abs(max)' if column == 'max' else column} {direction} NULLS LAST, feature LIMIT $2",
        [sae, limit],
    )
    texts = examples(con, sae, [row["feature"] for row in found if row["n_tokens"]])
    return [{**row, "example": texts.get(row["feature"])} for row in found]


def examples(con: duckdb.DuckDBPyConnection, sae: str, features: list[int]) -> dict[int, str]:
    """The tokens around each feature's highest activation, which stands in brackets."""
    if not features:
        return {}
    before, after = _EXAMPLE
    tops = ask(
        con,
        "SELECT feature, position, context FROM _top_contexts "
        "WHERE sae = $1 AND rank = 1 AND list_contains($2, feature)",
        [sae, features],
    )
    tokens = {
        row["context"]: row["tokens"]
        for row in ask(
            con, "SELECT context, tokens FROM contexts WHERE list_contains($1, context)",
            [[row["context"] for row in tops]],
        )
    }  # fmt: skip
    contexts = [
        {**row, "first": first, "tokens": tokens[row["context"]][first : row["position"] + after + 1]}
        for row in tops
        for first in [max(row["position"] - before, 0)]
    ]
    spelt = spelling(con, contexts)
    return {row["feature"]: _marked(row, spelt) for row in contexts}


def _marked(context: dict[str, Any], spelling: dict[int, bytes]) -> str:
    at = context["position"] - context["first"]
    tokens = [spelling[token] for token in context["tokens"]]
    values = [float(i == at) for i in range(len(tokens))]
    return "".join(f"[{text}]" if value else text for text, value in join_pieces(tokens, values))


def feature(con: duckdb.DuckDBPyConnection, sae: str, number: int, k: int) -> dict[str, Any]:
    """One feature: its statistics, and `contexts`: its k highest, with tokens around the maximum."""
    columns = ", ".join((*FEATURE_COLUMNS, "histogram"))
    rows = ask(con, f"SELECT sae, {columns} FROM features WHERE sae = $1 AND feature = $2", [sae, number])
    if not rows:
        width = ask(con, "SELECT width FROM _declared_saes WHERE sae = $1", [sae])[0]["width"]
        raise InputError(f"feature: {sae} has features 0 to {width - 1}, not {number}")
    [found] = rows
    found["contexts"] = _top(con, sae, number, k)
    spell(con, found["contexts"])
    return found | _annotated(con, sae, number)


def _top(con: duckdb.DuckDBPyConnection, sae: str, number: int, k: int) -> list[dict[str, Any]]:
    """A feature's k highest contexts as `top_contexts` has them, with their documents and tokens.

    Where that would take windows from `activations`, they are from the files that may have the feature, and
    from `pages` where there are.
    """
    rows = held(con, sae)
    if rows is not None and rows.pages:
        return _page(con, rows, sae, number, k)
    table, window = ("top_contexts", "positions") if rows is None else ("_top_contexts", "offsets")
    found = ask(
        con,
        f"SELECT rank, activation, context, position, {window} AS positions, values FROM {table} "
        "WHERE sae = $1 AND feature = $2 AND rank <= $3 ORDER BY rank",
        [sae, number, k],
    )
    return _located(con, rows, sae, number, found)


def samples(con: duckdb.DuckDBPyConnection, sae: str, number: int) -> list[dict[str, Any]]:
    """A feature's sampled contexts as `sampled_contexts` has them, strongest stratum first, spelt.

    Windows are found as those of `feature`.
    """
    rows = held(con, sae)
    table, window = ("sampled_contexts", "positions") if rows is None else ("_sampled_contexts", "offsets")
    found = ask(
        con,
        f"SELECT stratum, stratum_contexts, activation, context, position, {window} AS positions, values "
        f"FROM {table} WHERE sae = $1 AND feature = $2 ORDER BY stratum DESC, abs(activation) DESC, context",
        [sae, number],
    )
    found = _located(con, rows, sae, number, found)
    spell(con, found)
    return found


def _located(
    con: duckdb.DuckDBPyConnection, rows: Held | None, sae: str, number: int, found: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The same contexts with their documents, the tokens around and positions where offsets are.

    Keys are given as a list: where 60 contexts are joined instead, DuckDB reads three times as long.
    """
    if not found:
        return found
    contexts = {
        row["context"]: row
        for row in ask(
            con, "SELECT context, document, tokens FROM contexts WHERE list_contains($1, context)",
            [[row["context"] for row in found]],
        )
    }  # fmt: skip
    documents = {
        row["document"]: row
        for row in ask(
            con, "SELECT document, id, corpus, source, row FROM documents WHERE list_contains($1, document)",
            [sorted({row["document"] for row in contexts.values()})],
        )
    }  # fmt: skip
    located = []
    for row in found:
        context = contexts[row["context"]]
        first = max(row["position"] - NEAR, 0)
        tokens = context["tokens"][first : row["position"] + NEAR + 1]
        located.append({**row, **documents[context["document"]], "first": first, "tokens": tokens})
    if rows is not None:
        _windows(con, rows, sae, number, located)
    return located


def _windows(
    con: duckdb.DuckDBPyConnection, rows: Held, sae: str, number: int, found: list[dict[str, Any]]
) -> None:
    """Put positions where offsets are; both from the rows of `activations` where they are NULL."""
    wanted = [row["context"] for row in found if row["positions"] is None]
    near: dict[int, list[tuple[int, float]]] = {context: [] for context in wanted}
    for token, activation in _rows_of(con, rows, sae, number, wanted) if wanted else ():
        near[token // rows.length].append((token % rows.length, activation))
    for row in found:
        at = row["position"]
        if row["positions"] is not None:
            row["positions"] = [at + offset for offset in row["positions"]]
            continue
        own = [(p, value) for p, value in near[row["context"]] if abs(p - at) <= WINDOW]
        row["positions"], row["values"] = [p for p, _ in own], [value for _, value in own]


def _page(con: duckdb.DuckDBPyConnection, rows: Held, sae: str, number: int, k: int) -> list[dict[str, Any]]:
    """The same from `pages`."""
    files = rows.page_of(sae, number)
    if not files:
        return []
    return ask(
        con,
        """
        SELECT t.rank, t.activation, t.document, d.id, d.corpus, d.source, d.row, t.context, t.position,
            list_transform(t.offsets, lambda o: t.position + o) AS positions, t.values, t.first, t.tokens
        FROM read_parquet($1) AS t JOIN documents AS d ON d.document = t.document
        WHERE t.sae = $2 AND t.feature = $3 AND t.rank <= $4
        ORDER BY t.rank
        """,
        [files, sae, number, k],
    )


def _annotated(con: duckdb.DuckDBPyConnection, sae: str, number: int) -> dict[str, Any]:
    """What `annotate` has added to a feature; empty lists where it has not."""
    known = held(con, sae)
    if known is not None and not known.annotated:
        return {"explanations": [], "top_tokens": [], "bottom_tokens": [], "neighbours": []}
    tokens = ask(
        con,
        """
        SELECT f.sign, f.token, v.bytes, f.logit
        FROM feature_tokens AS f LEFT JOIN vocabulary AS v ON v.token = f.token
        WHERE f.sae = $1 AND f.feature = $2
        ORDER BY f.sign DESC, f.rank
        """,
        [sae, number],
    )
    signs: dict[int, list[dict[str, Any]]] = {1: [], -1: []}
    for row in tokens:
        text = (row["bytes"] or b"").decode(errors="replace")
        signs[row["sign"]].append({"token": row["token"], "text": text, "logit": row["logit"]})
    return {
        "explanations": ask(
            con,
            "SELECT description, method, model, score, source FROM explanations "
            "WHERE sae = $1 AND feature = $2 "
            "ORDER BY score DESC NULLS LAST, source, method, model, description",
            [sae, number],
        ),
        "top_tokens": signs[1],
        "bottom_tokens": signs[-1],
        "neighbours": ask(
            con,
            "SELECT rank, other_sae, other_feature, cosine FROM feature_neighbours "
            "WHERE sae = $1 AND feature = $2 ORDER BY rank",
            [sae, number],
        ),
    }


def _rows_of(
    con: duckdb.DuckDBPyConnection, rows: Held, sae: str, number: int, contexts: Sequence[int]
) -> list[tuple[int, float]]:
    """(token key, activation) of a feature's rows in some contexts, in order."""
    found = ask(
        con,
        """
        SELECT token, activation FROM read_parquet($1)
        WHERE sae = $2 AND feature = $3 AND token // $4 IN (SELECT unnest($5))
        ORDER BY token
        """,
        [rows.of(sae, number), sae, number, rows.length, list(contexts)],
    )
    return [(row["token"], row["activation"]) for row in found]
