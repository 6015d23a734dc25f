"""Two sets of documents: the features whose frequency differs, as `diff` tests them."""

from __future__ import annotations

import math

from queries.diff import COLUMNS, MIN_DOCUMENTS, diff
from queries.explorer import charts
from queries.explorer.web import Answer, Ask, page
from sae_runtime.errors import InputError

_DRAWN = 20_000  # points of the plot, strongest first
SHOWN = (
    "sae",
    "feature",
    "a_documents",
    "b_documents",
    "a_rate",
    "b_rate",
    "effect",
    "low",
    "high",
    "p",
    "q",
)
_SMALLEST = 1e-300  # a q below it is drawn as if it were this
_ROWS = 200


def compare(ask: Ask) -> Answer:
    """Values of `compare.html`: a form, and what came of it once both sets are given."""
    a, b, sae = ask.text("a"), ask.text("b"), ask.text("sae")
    values: Answer = {
        "title": "Compare", "a": a, "b": b, "sae": sae, "names": SHOWN, "rows": [], "chart": None,
        "wrong": "",
        "saes": [each["id"] for each in ask.snapshot.saes], "found": None, "discoveries": 0, "more": 0,
        "min_documents": ask.integer("min_documents", MIN_DOCUMENTS, 1), "cluster": ask.text("cluster"),
        "columns": ", ".join(row["column_name"] for row in ask.rows("DESCRIBE documents")),
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
        return values | {"wrong": str(error), "_status": 400}
    table = found.table.select(list(COLUMNS))
    strongest = table.slice(0, _DRAWN).select(["sae", "feature", "effect", "q"]).to_pylist()
    points = [
        {**row, "height": -math.log10(max(row["q"], _SMALLEST))}
        for row in strongest
        if row["effect"] is not None and row["q"] is not None and math.isfinite(row["effect"])
    ]
    return values | {
        "found": found,
        "rows": table.slice(0, _ROWS).to_pylist(),
        "more": table.num_rows - _ROWS,
        "discoveries": sum(q is not None and q <= 0.05 for q in table["q"].to_pylist()),
        "chart": charts.volcano(points) if points else None,
    }


ROUTES = [page("/compare", compare, "compare.html")]
