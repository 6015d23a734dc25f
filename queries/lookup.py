"""Questions that the commands ask of an index, each one SQL statement; answers are lists of dicts.

Invariant: answers come from the views alone, so what a command prints a person can ask again in SQL.
"""

from __future__ import annotations

from typing import Any

import duckdb

from sae_runtime.errors import InputError, one_line

FEATURE_COLUMNS = (
    "feature", "n_tokens", "n_contexts", "n_documents", "density", "mean_active", "std_active", "max",
    "p50", "p90", "p99",
)  # fmt: skip
_NEAR = 24  # tokens shown on either side of a maximum


def rows(result: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    """A result as dicts, in order."""
    names = [column[0] for column in result.description or ()]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def select(con: duckdb.DuckDBPyConnection, statement: str) -> duckdb.DuckDBPyConnection:
    """Run one read-only statement. Raises InputError (one line) for anything else or for SQL errors."""
    try:
        found = duckdb.extract_statements(statement)
    except duckdb.Error as error:
        raise InputError(f"sql: {one_line(error)}") from error
    if len(found) != 1:
        raise InputError(f"sql: one statement is wanted, {len(found)} were given")
    if found[0].type not in (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN):
        kind = str(found[0].type).rsplit(".", 1)[-1]
        raise InputError(f"sql: only reading is allowed here (SELECT, FROM, DESCRIBE, …), not {kind}")
    try:
        return con.execute(found[0])
    except duckdb.Error as error:
        raise InputError(f"sql: {one_line(error)}") from error


def resolve_sae(con: duckdb.DuckDBPyConnection, name: str) -> str:
    """The id of the SAE that `name` names: its id, its Neuronpedia id or an unambiguous ending of its id."""
    found = rows(
        con.execute(
            "SELECT sae FROM saes WHERE sae = $1 OR neuronpedia = $1 OR ends_with(sae, '/' || $1) ORDER BY sae",
            [name],
        )
    ) or rows(con.execute("SELECT sae FROM saes WHERE ends_with(sae, $1) ORDER BY sae", [name]))
    exact = [row["sae"] for row in found if row["sae"] == name]
    if len(found) == 1 or exact:
        return str(exact[0] if exact else found[0]["sae"])
    if found:
        some = ", ".join(row["sae"] for row in found[:4])
        raise InputError(f"sae: {name!r} is the ending of {len(found)} ids ({some}); give more of it")
    some = ", ".join(row["sae"] for row in rows(con.execute("SELECT sae FROM saes ORDER BY sae LIMIT 4")))
    raise InputError(f"sae: {name!r} names no SAE of this index; there are {some}, …")


def feature_table(
    con: duckdb.DuckDBPyConnection, sae: str, sort: str, limit: int
) -> list[dict[str, Any]]:
    """Statistics of an SAE's features, highest `sort` first. InputError for an unknown column."""
    column = sort.removeprefix("-")
    if column not in FEATURE_COLUMNS:
        raise InputError(f"--sort: no column {column!r}; there are {', '.join(FEATURE_COLUMNS)}")
    ascending = sort.startswith("-") or column == "feature"
    direction = "ASC" if ascending else "DESC"
    return rows(
        con.execute(
            f"SELECT {', '.join(FEATURE_COLUMNS)} FROM features WHERE sae = $1 "
            f"ORDER BY {column} {direction} NULLS LAST, feature LIMIT $2",
            [sae, limit],
        )
    )


def feature(con: duckdb.DuckDBPyConnection, sae: str, number: int, k: int) -> dict[str, Any]:
    """One feature: its statistics, and `contexts`, its k highest with tokens and values around the maximum."""
    width = rows(con.execute("SELECT width FROM saes WHERE sae = $1", [sae]))[0]["width"]
    if not 0 <= number < width:
        raise InputError(f"feature: {sae} has features 0 to {width - 1}, not {number}")
    columns = ", ".join((*FEATURE_COLUMNS, "histogram"))
    found = rows(
        con.execute(f"SELECT sae, {columns} FROM features WHERE sae = $1 AND feature = $2", [sae, number])
    )[0]
    found["contexts"] = rows(
        con.execute(
            """
            SELECT t.rank, t.activation, d.id, d.corpus, d.source, d.row, t.context, t.position,
                t.positions, t.values,
                greatest(t.position - $4, 0) AS first,
                c.tokens[greatest(t.position - $4, 0) + 1 : t.position + $4 + 1] AS tokens
            FROM top_contexts AS t
            JOIN contexts AS c ON c.context = t.context
            JOIN documents AS d ON d.document = c.document
            WHERE t.sae = $1 AND t.feature = $2 AND t.rank <= $3
            ORDER BY t.rank
            """,
            [sae, number, k, _NEAR],
        )
    )
    _spell(con, found["contexts"])
    return found


def _spell(con: duckdb.DuckDBPyConnection, contexts: list[dict[str, Any]]) -> None:
    """Replace token ids by [text, activation] pieces; multi-byte characters are joined truthfully."""
    wanted = sorted({token for context in contexts for token in context["tokens"]})
    found = con.execute("SELECT token, bytes FROM vocabulary WHERE list_contains($1, token)", [wanted])
    spelling = dict(found.fetchall())
    for context in contexts:
        first = context.pop("first")
        active = dict(zip(context.pop("positions"), context.pop("values"), strict=True))
        values = [active.get(first + i, 0.0) for i in range(len(context["tokens"]))]
        pieces = join_pieces([spelling[t] for t in context["tokens"]], values)
        context["text"] = "".join(text for text, _ in pieces)
        context["pieces"] = [list(piece) for piece in pieces]
        del context["tokens"]


def join_pieces(tokens: list[bytes], values: list[float]) -> list[tuple[str, float]]:
    """(text, activation) per token; tokens that share a character become one piece with the higher value.

    Bytes that are no text even then (a character cut by the window) are shown as U+FFFD.
    """
    pieces: list[tuple[str, float]] = []
    held, highest = b"", 0.0
    for token, value in zip(tokens, values, strict=True):
        held, highest = held + token, max(highest, value)
        if not _is_cut(held):
            pieces.append((held.decode(errors="replace"), highest))
            held, highest = b"", 0.0
    if held:
        pieces.append((held.decode(errors="replace"), highest))
    return pieces


def _is_cut(data: bytes) -> bool:
    """Whether `data` ends inside a UTF-8 character that more bytes could complete."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False
