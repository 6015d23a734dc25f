"""A report: one HTML file about an SAE, or about a list of features, for someone who has no index.

Invariant: the file needs nothing but itself. It has no script and asks for nothing (its own policy forbids
both), charts are SVG drawn beforehand, what comes from the corpus is escaped as on the explorer's pages; its
numbers are those of the views.
Measured (2 cores of a Xeon, 2026-11-23): an SAE with 20 features of 10 contexts is 0.8 to 1 MB, and takes 7 s
and 420 MB of memory on an index of a billion rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
from markupsafe import Markup

from pipelines.storage import Store
from queries import lookup
from queries.connect import resolved
from queries.explorer import charts, tokens, vega
from queries.explorer.session import Snapshot
from queries.explorer.web import template
from queries.relations import name as identifier
from sae_runtime.errors import DataError, InputError

Row = dict[str, Any]
MOST_BYTES = 30 << 20  # of a report, from which features are shown without their contexts
_DRAWN = 1500  # features that are drawn one by one; more are counted in cells
_CELLS = 48  # of the map along each axis
_BINS_A_DECADE = 4  # of the histogram of densities
_SHEET = Path(__file__).parent / "static" / "explorer.css"
_THEME = {name: f"var(--{name})" for name in ("ink", "faint", "line", "accent", "strong", "quiet")}
_CONFIG = {
    "background": None,
    "font": "sans-serif",
    "view": {"stroke": "$line"},
    "axis": {
        "labelColor": "$faint", "titleColor": "$ink", "gridColor": "$line", "domainColor": "$line",
        "tickColor": "$line", "titleFontWeight": "normal", "gridOpacity": 0.4,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """What a report is to show."""

    sae: str = ""  # an SAE with its map, its table and its first features
    features: Sequence[tuple[str, int]] = ()  # (SAE, feature) besides, or instead
    sort: str = "n_tokens"  # of the table, as `features` sorts
    limit: int = 20  # features of the table
    contexts: int = 10  # of each feature, at most


@dataclass(frozen=True)
class Report:
    """A page, and what is to be said of it."""

    html: str
    features: int
    contexts: int
    cut: int  # features without their contexts, as the page had grown too large


def report(uris: Sequence[str], wanted: Wanted, most_bytes: int = MOST_BYTES) -> Report:
    """The report of an index, or of several as one.

    `wanted.sae` and the SAEs of `wanted.features` are named as everywhere; without either it is the index's
    only SAE. Raises InputError for names and numbers that are not there, DataError.
    """
    try:
        return _report(Snapshot([resolved(Store(uri)) for uri in uris]), wanted, most_bytes)
    except DataError:  # compacted meanwhile
        return _report(Snapshot([resolved(Store(uri)) for uri in uris]), wanted, most_bytes)


def _report(snapshot: Snapshot, wanted: Wanted, most_bytes: int) -> Report:
    with snapshot.connection() as con:
        sae = lookup.resolve_sae(con, wanted.sae or _only(con)) if wanted.sae or not wanted.features else ""
        chosen = [(lookup.resolve_sae(con, name), number) for name, number in wanted.features]
        listed: list[Row] = []
        if sae:
            listed = lookup.feature_table(con, sae, wanted.sort, wanted.limit)
            chosen += [(sae, row["feature"]) for row in listed]
        chosen = list(dict.fromkeys(chosen))
        saes = {row["sae"]: row for row in lookup.ask(con, "SELECT * FROM saes ORDER BY sae")}
        overview = _overview(con, snapshot, sae, [n for name, n in chosen if name == sae]) if sae else {}
        sections, size, shown, cut = [], 0, 0, 0
        for name, number in chosen:
            found = (
                lookup.feature(con, name, number, wanted.contexts)
                if wanted.contexts
                else _bare(con, name, number)
            )
            full = size >= most_bytes
            section = _section(found, with_contexts=not full)
            cut += full and bool(found["contexts"])
            shown += 0 if full else len(found["contexts"])
            size += len(section.encode())
            sections.append(section)
        values = {
            "title": sae or "Features",
            "styles": _styles(),
            "facts": _index_facts(con, snapshot),
            "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "sae": saes[sae] if sae else None,
            "overview": overview,
            "listed": listed,
            "sort": wanted.sort,
            "anchors": {number: _anchor(name, number) for name, number in chosen if name == sae},
            "others": [saes[name] for name in dict.fromkeys(name for name, _ in chosen) if name != sae],
            "sections": sections,
            "cut": cut,
            "most": most_bytes,
        }
    return Report(template("report.html").render(values), len(chosen), shown, cut)


def _only(con: duckdb.DuckDBPyConnection) -> str:
    """The SAE of an index that has one."""
    known = [row["sae"] for row in lookup.ask(con, "SELECT sae FROM _declared_saes ORDER BY sae")]
    if len(known) == 1:
        return str(known[0])
    some = ", ".join(known[:3]) + (", …" if len(known) > 3 else "")
    raise InputError(
        f"report: the index has {len(known)} SAEs; --sae chooses one ({some}), or --feature SAE:N"
    )


def _bare(con: duckdb.DuckDBPyConnection, sae: str, number: int) -> Row:
    """A feature without contexts."""
    return lookup.feature(con, sae, number, 1) | {"contexts": []}


def _index_facts(con: duckdb.DuckDBPyConnection, snapshot: Snapshot) -> list[tuple[str, str]]:
    """What was scanned; no folders of the machine that did."""
    [counts] = lookup.ask(
        con,
        "SELECT count(*) AS documents, coalesce(sum(n_tokens), 0)::BIGINT AS tokens, "
        "list_sort(list(DISTINCT corpus)) AS corpora FROM documents",
    )
    models = sorted({str(each.identity["model"]).rstrip("/").rsplit("/", 1)[-1] for each in snapshot.found})
    return [
        ("corpus", ", ".join(counts["corpora"] or ["–"])),
        ("model", ", ".join(models)),
        ("documents", f"{counts['documents']:,}"),
        ("counted tokens", f"{counts['tokens']:,}"),
        ("index as of", snapshot.told),
    ]


# --- an SAE


def _overview(
    con: duckdb.DuckDBPyConnection, snapshot: Snapshot, sae: str, marked: Sequence[int]
) -> dict[str, Any]:
    """An SAE's charts and the numbers beside them; `marked` features stand out on the map."""
    table = identifier(snapshot.features(con, sae))
    [counts] = lookup.ask(
        con,
        f"SELECT count(*) AS width, count(*) FILTER (n_tokens = 0) AS dead, "
        f"count(*) FILTER (density > 0.1) AS dense, median(density) FILTER (n_tokens > 0) AS median_density, "
        f"median(abs(max)) AS median_max FROM {table}",
    )
    values: dict[str, Any] = {**counts, "map": "", "densities": ""}
    if counts["width"] == counts["dead"]:
        return values
    points = lookup.ask(
        con,
        f"SELECT feature, density, abs(max) AS max FROM {table} "
        "WHERE n_tokens > 0 AND max <> 0 AND ($1 OR list_contains($2, feature))",
        [counts["width"] - counts["dead"] <= _DRAWN, list(marked)],
    )
    cells = [] if counts["width"] - counts["dead"] <= _DRAWN else _cells(con, table)
    values["map"] = drawn(feature_map(points, cells, set(marked)))
    bins = lookup.ask(
        con,
        f"SELECT pow(10, b / {_BINS_A_DECADE}) AS low, pow(10, (b + 1) / {_BINS_A_DECADE}) AS high, "
        f"count(*) AS features FROM (SELECT floor(log10(density) * {_BINS_A_DECADE}) AS b FROM {table} "
        "WHERE n_tokens > 0) GROUP BY b ORDER BY b",
    )
    values["densities"] = drawn(charts.bars(bins, "low", "high", "features", "density", "features"))
    return values


def _cells(con: duckdb.DuckDBPyConnection, table: str) -> list[Row]:
    """Live features counted in equal cells of log density and log |max|."""
    return lookup.ask(
        con,
        f"""
        WITH live AS (
            SELECT log10(density) AS x, log10(abs(max)) AS y FROM {table} WHERE n_tokens > 0 AND max <> 0
        ), spans AS (
            SELECT min(x) AS x0, greatest(max(x) - min(x), 1e-6) * 1.0001 / {_CELLS} AS dx,
                min(y) AS y0, greatest(max(y) - min(y), 1e-6) * 1.0001 / {_CELLS} AS dy
            FROM live
        ), placed AS (
            SELECT floor((x - x0) / dx) AS i, floor((y - y0) / dy) AS j, * FROM live, spans
        )
        SELECT pow(10, any_value(x0 + i * dx)) AS low, pow(10, any_value(x0 + (i + 1) * dx)) AS high,
            pow(10, any_value(y0 + j * dy)) AS bottom, pow(10, any_value(y0 + (j + 1) * dy)) AS top,
            count(*) AS features
        FROM placed GROUP BY i, j ORDER BY i, j
        """,
    )


def feature_map(points: Iterable[Row], cells: Sequence[Row], marked: set[int]) -> charts.Chart:
    """Density against |maximum|, both logarithmic: points, or cells beneath the marked points."""
    scale = {"type": "log", "nice": False}
    x = {"type": "quantitative", "scale": scale, "axis": {"title": "density", "tickCount": 6}}
    y = {"type": "quantitative", "scale": scale, "axis": {"title": "maximum (absolute)", "tickCount": 5}}
    values = [{"x": p["density"], "y": p["max"], "marked": p["feature"] in marked} for p in points]
    layers: list[charts.Chart] = [
        {
            "data": {"values": [v for v in values if v["marked"] is special]},
            "mark": {
                "type": "point", "shape": shape, "filled": not special, "size": size, "color": colour,
                "opacity": opacity, "aria": False,
            },
            "encoding": {"x": {"field": "x", **x}, "y": {"field": "y", **y}},
        }
        for special, shape, size, colour, opacity in (
            (False, "circle", 9, "$accent", 0.6), (True, "diamond", 60, "$strong", 1.0),
        )
        if special or not cells
    ]  # fmt: skip
    if cells:
        layers.insert(
            0,
            {
                "data": {"values": list(cells)},
                "mark": {"type": "rect", "color": "$accent", "aria": False},
                "encoding": {
                    "x": {"field": "low", **x},
                    "x2": {"field": "high"},
                    "y": {"field": "bottom", **y},
                    "y2": {"field": "top"},
                    "opacity": {
                        "field": "features", "type": "quantitative", "legend": None,
                        "scale": {"type": "log", "range": [0.2, 1]},
                    },
                },
            },
        )  # fmt: skip
    return {"layer": layers, "width": 470, "height": 260}


def drawn(chart: charts.Chart) -> Markup:
    """A chart as SVG that takes the page's colours. Charts of a report hold numbers only."""
    if chart.get("width") == "container":
        chart = {**chart, "width": 470}
    return Markup(vega.svg(charts.themed({**chart, "config": _CONFIG}, _THEME)))


# --- a feature


def _section(found: Row, with_contexts: bool) -> Markup:
    """A feature as HTML."""
    highest = max((abs(context["activation"]) for context in found["contexts"]), default=0.0)
    bins = charts.activation_bins(found["histogram"] or [])
    chart = charts.bars(bins, "from", "to", "tokens", "activation (absolute)", "tokens") if bins else None
    return Markup(
        template("report_feature.html").render(
            found=found,
            anchor=_anchor(found["sae"], found["feature"]),
            chart=drawn({**chart, "height": 90}) if chart else "",
            contexts=[
                {**context, "shaded": _titled(context["pieces"], highest)} for context in found["contexts"]
            ]
            if with_contexts
            else [],
            left_out=bool(found["contexts"]) and not with_contexts,
        )
    )


def _anchor(sae: str, number: int) -> str:
    """An id within the page; names of SAEs may hold anything, so they are told by their bytes."""
    return f"f{number}-{sae.encode().hex()[-16:]}"


def _titled(pieces: Sequence[Sequence[Any]], highest: float) -> Markup:
    """Shaded tokens whose values are titles, as there is no script to show them."""
    peak = max((abs(value) for _, value in pieces), default=0.0)
    return Markup("").join(
        Markup('<span class="t {}{}" title="{}">{}</span>').format(
            tokens.shade(value, highest), " peak" if abs(value) == peak else "", f"{value:.4g}",
            tokens.visible(text),
        )
        if value
        else Markup('<span class="t">{}</span>').format(tokens.visible(text))
        for text, value in pieces
    )  # fmt: skip


def _styles() -> Markup:
    """What a report needs of the explorer's sheet: the common rules and its own."""
    parts = _SHEET.read_text(encoding="utf-8").split("/* --- ")
    return Markup(parts[0] + "".join(f"/* --- {part}" for part in parts[1:] if part.startswith("report")))
