"""The page of an SAE: its features as a map, as a table, by density.

Invariant: the table, the map and the numbers are of the rows of the view `features`; what is brushed on the
map is a span of densities and of maxima in the address.
"""

from __future__ import annotations

from typing import Any

from queries import lookup
from queries.explorer import charts, links
from queries.explorer.web import Answer, Ask, page
from queries.relations import literal, text
from queries.relations import name as identifier
from sae_runtime.errors import InputError

PAGE = 50  # rows of the table
_BINS_A_DECADE = 4  # of the histogram of densities
_DRAWN = 20_000  # features that are drawn one by one
_CELLS = 24  # a decade, of the map of more
COLUMNS = (
    "feature", "density", "n_tokens", "n_documents", "mean_active", "max", "p50", "p99",
)  # fmt: skip
_QUANTILES = ("p50", "p99")  # of all features they take longer than all the rest: on demand
# Parameter -> (the condition, its words on the page).
BOUNDS = {
    "min_density": ("density >= {}", "density from"),
    "max_density": ("density <= {}", "to"),
    "min_max": ("abs(max) >= {}", "maximum from"),
    "max_max": ("abs(max) <= {}", "to"),
    "min_tokens": ("n_tokens >= {}", "tokens from"),
    "min_documents": ("n_documents >= {}", "documents from"),
}
_EXPLAINED = (
    "feature IN (SELECT feature FROM explanations WHERE sae = {} AND contains(lower(description), {}))"
)


def sae(ask: Ask) -> Answer:
    """Values of `sae.html`."""
    chosen = ask.sae()
    [facts] = [row for row in all_saes(ask) if row["sae"] == chosen]
    sort = ask.choice("sort", [*COLUMNS, *(f"-{column}" for column in COLUMNS)], "n_tokens")
    quantiles = ask.choice("quantiles", ("", "1"), "") or sort.removeprefix("-") in _QUANTILES
    columns = [name for name in COLUMNS if quantiles or name not in _QUANTILES]
    table = identifier(ask.snapshot.features(ask.con, chosen, bool(quantiles)))
    bounds = {name: ask.number(name) for name in BOUNDS}
    words = ask.text("words")
    dead = ask.choice("dead", ("", "yes", "no"), "")
    conditions = [
        BOUNDS[name][0].format(literal(value)) for name, value in bounds.items() if value is not None
    ]
    if words:
        conditions.append(_EXPLAINED.format(text(chosen), text(words.lower())))
    if dead:
        conditions.append(f"n_tokens {'=' if dead == 'yes' else '>'} 0")
    where = " AND ".join(conditions) or "true"
    column = sort.removeprefix("-")
    # As the command `features` sorts: by size, but for the number, which is told from the lowest on.
    ascending = sort.startswith("-") != (column == "feature")
    order = (
        f"{'abs(max)' if column == 'max' else column} {'ASC' if ascending else 'DESC'} NULLS LAST, feature"
    )
    [counts] = ask.rows(
        f"SELECT count(*) AS width, count(*) FILTER (n_tokens = 0) AS dead, "
        f"count(*) FILTER (density > 0.1) AS dense, count(*) FILTER ({where}) AS found, "
        f"median(density) FILTER (n_tokens > 0) AS median_density FROM {table}"
    )
    pages = max(1, -(-counts["found"] // PAGE))
    number = ask.integer("page", 1, 1)
    if number > pages:
        raise InputError(f"page: {number:,}, but there are {pages:,}")
    rows = ask.rows(
        f"SELECT {', '.join(columns)} FROM {table} WHERE {where} ORDER BY {order} "
        f"LIMIT {PAGE} OFFSET {(number - 1) * PAGE}"
    )
    examples = lookup.examples(ask.con, chosen, [row["feature"] for row in rows if row["n_tokens"]])
    for row in rows:
        row["example"] = examples.get(row["feature"])
    explained = _explanations(ask, chosen, [row["feature"] for row in rows])
    names = [each["sae"] for each in all_saes(ask)]
    at = names.index(chosen)
    query = {**bounds, "dead": dead, "words": words, "quantiles": "1" if quantiles else None}
    return {
        "title": chosen,
        "sae": facts,
        "counts": counts,
        "rows": rows,
        "explained": explained,
        "bounds": BOUNDS,
        "columns": columns,
        "sort": sort,
        "ascending": ascending,
        "query": query,
        "number": number,
        "pages": pages,
        "before": names[at - 1] if at else None,
        "after": names[at + 1] if at + 1 < len(names) else None,
        "densities": _densities(ask, table) if counts["dead"] < counts["width"] else None,
        "points": links.to(
            "sae/points.json", sae=chosen, **{name: bounds[name] for name in list(BOUNDS)[:4]}
        ),
        "binned": counts["width"] - counts["dead"] > _DRAWN,
        "statement": f"SELECT {', '.join(columns)} FROM features WHERE sae = {text(chosen)} AND {where} "
        f"ORDER BY {order} LIMIT {PAGE}" + (f" OFFSET {(number - 1) * PAGE}" if number > 1 else ""),
    }


def all_saes(ask: Ask) -> list[dict[str, Any]]:
    """The rows of `saes`, which take a scan of summaries: read once for a moment of the index."""
    return ask.snapshot.once("saes", lambda: ask.rows("SELECT * FROM saes ORDER BY sae"))


def _densities(ask: Ask, table: str) -> charts.Chart:
    bins = ask.rows(
        f"SELECT pow(10, b / {_BINS_A_DECADE}) AS low, pow(10, (b + 1) / {_BINS_A_DECADE}) AS high, "
        f"count(*) AS features FROM (SELECT floor(log10(density) * {_BINS_A_DECADE}) AS b FROM {table} "
        "WHERE n_tokens > 0) GROUP BY b ORDER BY b"
    )
    return charts.bars(bins, "low", "high", "features", "density", "features")


def _explanations(ask: Ask, sae: str, features: list[int]) -> dict[int, str] | None:
    """A description of each of some features that has one; None where the SAE has none at all."""
    some = "SELECT count(*) AS n FROM explanations WHERE sae = $1"
    if not ask.snapshot.once(("explained", sae), lambda: ask.rows(some, [sae])[0]["n"]):
        return None
    found = ask.rows(
        "SELECT feature, first(description ORDER BY score DESC NULLS LAST, source, method, description) "
        "AS description FROM explanations WHERE sae = $1 AND list_contains($2, feature) GROUP BY feature",
        [sae, features],
    )
    return {row["feature"]: row["description"] for row in found}


def points(ask: Ask) -> Answer:
    """The map of an SAE's live features as a chart: points, or counts of cells where there are too many."""
    chosen = ask.sae()
    table = identifier(ask.snapshot.features(ask.con, chosen))
    spans = [[ask.number(f"{end}_{field}") for end in ("min", "max")] for field in ("density", "max")]
    live = f"FROM {table} WHERE n_tokens > 0 AND max <> 0"
    if ask.rows(f"SELECT count(*) AS n {live}")[0]["n"] <= _DRAWN:
        rows = ask.rows(f"SELECT feature, density, abs(max) AS max {live}")
        return charts.feature_points(rows, *spans)
    cells = ask.rows(
        f"SELECT pow(10, i / {_CELLS}) AS density, pow(10, (i + 1) / {_CELLS}) AS density_to, "
        f"pow(10, j / {_CELLS}) AS max, pow(10, (j + 1) / {_CELLS}) AS max_to, count(*) AS features "
        f"FROM (SELECT floor(log10(density) * {_CELLS}) AS i, floor(log10(abs(max)) * {_CELLS}) AS j {live}) "
        "GROUP BY i, j ORDER BY i, j"
    )
    return charts.feature_cells(cells, *spans)


ROUTES = [page("/sae", sae, "sae.html"), page("/sae/points.json", points)]
