"""Two sets of documents: the features whose frequency differs, as `diff` tests them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa

from queries.diff import COLUMNS, MIN_DOCUMENTS, diff
from queries.explorer import charts
from queries.explorer.web import Answer, Ask, page
from queries.relations import name as identifier
from queries.relations import text as literal
from sae_runtime.errors import InputError

SHOWN = (
    "sae", "feature", "a_documents", "b_documents", "a_rate", "b_rate", "effect", "low", "high", "p", "q",
)  # fmt: skip
SORTS = {"q": "most certain first", "a": "more of A first", "b": "more of B first"}
_NO_SETS = ("document", "id", "row", "n_tokens")  # columns of documents that name no sets
_VALUES = 40  # of a column that are offered
_DRAWN = 20_000  # points of the plot, most certain first
_SMALLEST = 1e-300  # a q below it is drawn as if it were this
_ROWS = 200


def compare(ask: Ask) -> Answer:
    """Values of `compare.html`: forms, and what came of it once both sets are given."""
    a, b = _sets(ask)
    sae = ask.text("sae")
    columns = [row["column_name"] for row in ask.rows("DESCRIBE documents")]
    values: Answer = {
        "title": "Compare", "a": a, "b": b, "sae": sae, "names": SHOWN, "rows": [], "chart": None,
        "wrong": "", "saes": [each["id"] for each in ask.snapshot.saes], "found": None, "discoveries": 0,
        "more": 0, "min_documents": ask.integer("min_documents", MIN_DOCUMENTS, 1),
        "cluster": ask.text("cluster"), "columns": ", ".join(columns),
        "sort": ask.choice("sort", list(SORTS), "q"), "sorts": SORTS,
        "offers": ask.snapshot.once("offers", lambda: _offers(ask, columns)),
    }  # fmt: skip
    if not (a and b):
        return values
    names = [ask.sae()] if sae else None
    least, cluster = values["min_documents"], values["cluster"] or None
    try:
        found = ask.snapshot.once(
            ("diff", a, b, sae, least, cluster), lambda: diff(ask.con, a, b, names, least, cluster)
        )
    except InputError as error:
        return values | {"wrong": str(error).removeprefix("--"), "_status": 400}
    table = found.table.select(list(COLUMNS))
    strongest = table.slice(0, _DRAWN).select(["sae", "feature", "effect", "q"]).to_pylist()
    points = [
        {**row, "height": -math.log10(max(row["q"], _SMALLEST))}
        for row in strongest
        if row["effect"] is not None and row["q"] is not None and math.isfinite(row["effect"])
    ]
    return values | {
        "found": found,
        "rows": _sorted(table, values["sort"]).slice(0, _ROWS).to_pylist(),
        "more": table.num_rows - _ROWS,
        "discoveries": sum(q is not None and q <= 0.05 for q in table["q"].to_pylist()),
        "chart": charts.volcano(points) if points else None,
    }


def _sets(ask: Ask) -> tuple[str, str]:
    """The predicates of both sets: as they are given, or of two values of a column, B's other than A's."""
    column = ask.text("column")
    if not column:
        return ask.text("a"), ask.text("b")
    if column not in [row["column_name"] for row in ask.rows("DESCRIBE documents")]:
        raise InputError(f"column: documents have no {column[:100]!r}")
    one, other = (ask.query.get(name, "") for name in ("value", "against"))
    if "\0" in one + other:
        raise InputError("value: the character NUL cannot be asked for")
    subject = f"{identifier(column)}::VARCHAR"
    against = f"{subject} = {literal(other)}" if other else f"{subject} IS DISTINCT FROM {literal(one)}"
    return f"{subject} = {literal(one)}", against


def _offers(ask: Ask, columns: list[str]) -> list[dict[str, Any]]:
    """Columns that divide the documents into a few sets, with their values, most frequent first."""
    found = []
    for column in columns:
        if column in _NO_SETS:
            continue
        rows = ask.rows(
            f"SELECT {identifier(column)}::VARCHAR AS value, count(*) AS n FROM documents "
            f"WHERE value IS NOT NULL GROUP BY value ORDER BY n DESC, value LIMIT {_VALUES + 1}"
        )
        if 1 < len(rows) <= _VALUES:
            found.append({"column": column, "values": rows})
    return found


def _sorted(table: pa.Table, sort: str) -> pa.Table:
    """By effect, features without one last; as `diff` gives it otherwise."""
    if sort == "q":
        return table
    effects = table["effect"].to_numpy()  # NULL is NaN, which sorts last
    order = np.argsort(-effects if sort == "a" else effects, kind="stable")
    return table.take(order)


ROUTES = [page("/compare", compare, "compare.html")]
