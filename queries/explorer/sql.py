"""One read-only statement, and the recipes.

Invariant: a person's statement goes through `lookup.select` on a connection that can read the index alone;
what it fetches is bounded by the session's rows and seconds.
"""

from __future__ import annotations

import csv
import io
import json
from itertools import islice

from starlette.responses import Response

from queries import lookup
from queries.explorer.web import Answer, Ask, page
from queries.recipe import find, missing, recipes, statement
from sae_runtime.errors import InputError

_MOST = 1_000_000  # rows of a download


def sql(ask: Ask) -> Answer | Response:
    """Values of `sql.html`, or the answer as a file."""
    given = ask.text("q")
    download = ask.choice("download", ("", "csv", "jsonl"), "")
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
        "names": [],
        "rows": [],
        "wrong": "",
        "more": False,
    }
    if not given:
        return values
    try:
        result = lookup.select(ask.con, given)
        names = lookup.column_names(result)
        if download:
            return _file(download, names, result)
        rows = list(islice(lookup.rows(result), ask.session.rows + 1))
    except InputError as error:  # the page is the place to mend it
        if download:
            raise
        return values | {"wrong": str(error), "_status": 400}
    return values | {"names": names, "rows": rows[: ask.session.rows], "more": len(rows) > ask.session.rows}


def _file(kind: str, names: list[str], result: object) -> Response:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    if kind == "csv":
        writer.writerow(names)
    for number, row in enumerate(lookup.rows(result)):  # type: ignore[arg-type]
        if number == _MOST:
            raise InputError(f"download: more than {_MOST:,} rows; `corpuscope sql` writes any number")
        if kind == "csv":
            writer.writerow([row[name] for name in names])
        else:
            out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    media = {"csv": "text/csv; charset=utf-8", "jsonl": "application/x-ndjson"}[kind]
    return Response(
        out.getvalue().encode(errors="replace"),
        media_type=media,
        headers={"Content-Disposition": f'attachment; filename="corpuscope.{kind}"'},
    )


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
        result = lookup.select(ask.con, values["statement"])
        values["names"] = lookup.column_names(result)
        rows = list(islice(lookup.rows(result), ask.session.rows + 1))
    except InputError as error:
        return values | {"wrong": str(error), "_status": 400}
    return values | {"rows": rows[: ask.session.rows], "more": len(rows) > ask.session.rows}


ROUTES = [
    page("/sql", sql, "sql.html"),
    page("/recipes", recipe_list, "recipes.html"),
    page("/recipe", recipe, "recipe.html"),
]
