"""One read-only statement, and the recipes.

Invariant: a person's statement goes through `lookup.select` on a connection that can read the index alone;
what it fetches is bounded by the session's rows and seconds.
"""

from __future__ import annotations

import csv
import io
import json
import re
from itertools import islice

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from starlette.responses import Response

from queries import lookup
from queries.explorer.web import Answer, Ask, page
from queries.recipe import find, missing, recipes, statement
from sae_runtime.errors import InputError, one_line

_MOST = 1_000_000  # rows of a download
_TOO_MANY = f"download: more than {_MOST:,} rows; `corpuscope sql` writes any number"
_MEDIA = {
    "csv": "text/csv; charset=utf-8",
    "jsonl": "application/x-ndjson",
    "parquet": "application/vnd.apache.parquet",
}
_CUT = 2000  # characters of a nested value's text
_ITEMS = 200  # of a list that are shown
_SHORT = (
    f"CASE WHEN len({{column}}) > {_ITEMS} THEN left({{column}}[:{_ITEMS}]::VARCHAR, {_CUT}) || ' and ' || "
    f"(len({{column}}) - {_ITEMS}) || ' more' ELSE left({{column}}::VARCHAR, {_CUT}) END"
)
_NESTED = re.compile(r"\]$|^(STRUCT|MAP|UNION|VARIANT)\b")
_SELECTS = re.compile(r"\s*(SELECT|FROM|WITH|VALUES|\()", re.IGNORECASE)


def sql(ask: Ask) -> Answer | Response:
    """Values of `sql.html`, or the answer as a file."""
    given = ask.text("q")
    download = ask.choice("download", ("", *_MEDIA), "")
    schema: dict[str, list[str]] = {}
    for row in ask.rows(
        "SELECT table_name, column_name FROM duckdb_columns() WHERE NOT internal "
        "AND NOT starts_with(table_name, '_') ORDER BY table_name, column_index"
    ):
        schema.setdefault(row["table_name"], []).append(row["column_name"])
    values: Answer = {
        "title": "SQL",
        "q": given,
        "schema": schema,
        "recipes": recipes(),
        "names": [],
        "rows": [],
        "wrong": "",
        "more": False,
    }
    if not given:
        return values
    try:
        if download == "parquet":
            return _parquet(ask, given)
        if download:
            return _lines(download, lookup.select(ask.con, given))
        return values | _table(ask, given)
    except InputError as error:  # the page is the place to mend it
        if download:
            raise
        return values | {"wrong": str(error), "_status": 400}


def _table(ask: Ask, given: str) -> Answer:
    """`names`, the first `rows` and whether there are `more`.

    Lists and the like come as DuckDB's text, long ones cut and saying so: as Python's objects one cell of
    200 million numbers would take a minute, which no time limit stops.
    """
    most = ask.session.rows
    described = lookup.rows(lookup.select(ask.con, f"DESCRIBE {given}")) if _SELECTS.match(given) else ()
    columns = [(row["column_name"], row["column_type"]) for row in described]
    nested = [_NESTED.search(kind) is not None for _, kind in columns]
    if not any(nested):
        result = lookup.select(ask.con, given)
        names = lookup.column_names(result)
        rows = list(islice(lookup.rows(result), most + 1))
    else:
        own = [f"c{i}" for i in range(len(columns))]
        shown = [
            _SHORT.format(column=column) if kind.endswith("[]") else f"left({column}::VARCHAR, {_CUT})"
            for column, (_, kind) in zip(own, columns, strict=True)
        ]
        shown = [each if deep else column for each, deep, column in zip(shown, nested, own, strict=True)]
        body = given.rstrip().rstrip(";")
        result = lookup.select(
            ask.con, f"SELECT {', '.join(shown)} FROM (\n{body}\n) AS t({', '.join(own)}) LIMIT {most + 1}"
        )
        names = lookup.unique([column for column, _ in columns])
        rows = [dict(zip(names, row.values(), strict=True)) for row in lookup.rows(result)]
    return {"names": names, "rows": rows[:most], "more": len(rows) > most}


def _parquet(ask: Ask, given: str) -> Response:
    body = given.rstrip().rstrip(";")
    table = lookup.arrow_table(lookup.select(ask.con, f"SELECT * FROM (\n{body}\n) LIMIT {_MOST + 1}"))
    if table.num_rows > _MOST:
        raise InputError(_TOO_MANY)
    out = io.BytesIO()
    try:
        pq.write_table(table, out, compression="zstd")
    except pa.ArrowNotImplementedError as error:
        raise InputError(f"download: Parquet cannot hold this ({one_line(error)}); take csv") from error
    return _download("parquet", out.getvalue())


def _lines(kind: str, result: duckdb.DuckDBPyConnection) -> Response:
    """CSV or JSON lines."""
    names = lookup.column_names(result)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    if kind == "csv":
        writer.writerow(names)
    for number, row in enumerate(lookup.rows(result)):
        if number == _MOST:
            raise InputError(_TOO_MANY)
        if kind == "csv":
            writer.writerow(row.values())
        else:
            out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    return _download(kind, out.getvalue().encode(errors="replace"))


def _download(kind: str, data: bytes) -> Response:
    name = f'attachment; filename="corpuscope.{kind}"'
    return Response(data, media_type=_MEDIA[kind], headers={"Content-Disposition": name})


def recipe_list(ask: Ask) -> Answer:
    """Values of `recipes.html`."""
    width = len(ask.snapshot.saes)
    rows = [(each, width - len(missing(ask.con, each))) for each in recipes()]
    return {"title": "Recipes", "rows": rows, "saes": width}


def recipe(ask: Ask) -> Answer:
    """Values of `recipe.html`: a form of the recipe's parameters, and its answer once they are given."""
    try:
        chosen = find(ask.text("name"))
    except InputError as error:
        raise InputError(f"name: {error}") from error
    given = {param.name: ask.text(param.name) for param in chosen.params if ask.text(param.name)}
    lacking = [param.name for param in chosen.params if param.default is None and param.name not in given]
    values: Answer = {
        "title": chosen.title, "recipe": chosen, "given": given, "saes": [s["id"] for s in ask.snapshot.saes],
        "names": [], "rows": [], "more": False, "wrong": "", "statement": "", "lacking": lacking,
    }  # fmt: skip
    if lacking or not ask.text("run"):
        return values
    try:
        values["statement"] = statement(ask.con, chosen.name, given)
        return values | _table(ask, values["statement"])
    except InputError as error:
        return values | {"wrong": str(error), "_status": 400}


ROUTES = [
    page("/sql", sql, "sql.html"),
    page("/recipes", recipe_list, "recipes.html"),
    page("/recipe", recipe, "recipe.html"),
]
