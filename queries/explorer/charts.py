"""Charts as Vega-Lite sees them: plain dicts, the same on pages and in reports.

Invariant: colours are named, never given: pages and reports fill in those of their theme (`themed`), all from
a palette that the colour-blind can tell apart (Okabe and Ito, 2008). What is drawn is never all that is said:
each chart stands beside its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Chart = dict[str, Any]
_LOWEST, _PER_OCTAVE = -10, 8  # of the index's histogram: 8 bins an octave from 2^-10 (shared contract, 4)


def bars(values: Sequence[dict[str, Any]], x: str, x2: str, y: str, x_title: str, y_title: str) -> Chart:
    """A histogram of bins that are there already: from `x` to `x2`, `y` high; the x axis is logarithmic."""
    return {
        "data": {"values": list(values)},
        "mark": {"type": "bar", "color": "$accent", "tooltip": True},
        "encoding": {
            "x": {
                "field": x, "type": "quantitative", "bin": {"binned": True},
                "scale": {"type": "log"}, "axis": {"title": x_title},
            },
            "x2": {"field": x2},
            "y": {"field": y, "type": "quantitative", "axis": {"title": y_title}},
        },
        "width": "container",
        "height": 160,
    }  # fmt: skip


def activation_bins(counts: Sequence[int]) -> list[dict[str, Any]]:
    """The filled span of a feature's `histogram`: `from`, `to` (activation) and `tokens` of each bin.

    The two open bins are drawn as wide as one of the others.
    """
    filled = [i for i, n in enumerate(counts) if n]
    if not filled:
        return []
    return [
        {"from": _edge(i - 1), "to": _edge(i), "tokens": counts[i]} for i in range(filled[0], filled[-1] + 1)
    ]


def _edge(index: int) -> float:
    return float(2.0 ** (_LOWEST + index / _PER_OCTAVE))


LIGHT = {"ink": "#1b1f24", "faint": "#667085", "line": "#d0d5dd", "paper": "#ffffff", "accent": "#0072b2",
         "strong": "#d55e00", "quiet": "#98a2b3"}  # fmt: skip


def themed(chart: Any, colours: dict[str, str]) -> Any:
    """A chart with the colours that its `$names` stand for."""
    if isinstance(chart, dict):
        return {key: themed(value, colours) for key, value in chart.items()}
    if isinstance(chart, list):
        return [themed(value, colours) for value in chart]
    if isinstance(chart, str) and chart.startswith("$"):
        return colours.get(chart[1:], chart)
    return chart


# --- overview


def sae_map(rows: Sequence[dict[str, Any]]) -> Chart:
    """SAEs by layer and kind of site; several of a cell beside each other, darker where L0 is higher."""
    return {
        "data": {"values": list(rows)},
        "mark": {"type": "bar", "tooltip": True},
        "encoding": {
            "x": {"field": "layer", "type": "ordinal", "axis": {"title": "layer", "labelAngle": 0}},
            "xOffset": {"field": "place", "type": "ordinal"},
            "y": {"field": "l0", "type": "quantitative", "axis": {"title": "measured L0"}},
            "row": {"field": "kind", "type": "nominal", "header": {"title": None, "labelOrient": "top",
                    "labelAnchor": "start"}},
            "color": {"field": "dead", "type": "quantitative",
                      "scale": {"range": ["$accent", "$strong"], "interpolate": "rgb", "domainMin": 0},
                      "legend": {"title": "dead share", "orient": "top", "format": ".1%"}},
            "tooltip": [{"field": "sae"}, {"field": "width"}, {"field": "l0", "format": ".4g"},
                        {"field": "density", "format": ".3g"}, {"field": "dead", "format": ".2%"}],
        },
        "width": 320,
        "height": 70,
    }  # fmt: skip


# --- sae


def feature_points(
    rows: Sequence[dict[str, Any]], density: Sequence[float | None], maximum: Sequence[float | None]
) -> Chart:
    """Features by density and |maximum|, both logarithmic; `brush` selects: both spans, at first."""
    return {
        "data": {"values": list(rows)},
        "params": [_brush(density, maximum)],
        "mark": {"type": "point", "filled": True, "size": 14},
        "encoding": {
            "x": {"field": "density", "type": "quantitative", "scale": {"type": "log"},
                  "axis": {"title": "density"}},
            "y": {"field": "max", "type": "quantitative", "scale": {"type": "log"},
                  "axis": {"title": "maximum (absolute)"}},
            "color": {"condition": {"param": "brush", "value": "$accent"}, "value": "$quiet"},
            "opacity": {"value": 0.7},
            "tooltip": [{"field": "feature"}, {"field": "density", "format": ".3g"},
                        {"field": "max", "format": ".4g"}],
        },
        "width": "container",
        "height": 300,
    }  # fmt: skip


def feature_cells(
    rows: Sequence[dict[str, Any]], density: Sequence[float | None], maximum: Sequence[float | None]
) -> Chart:
    """How many features there are in each cell of the same axes; `brush` as there."""
    return {
        "data": {"values": list(rows)},
        "params": [_brush(density, maximum)],
        "mark": {"type": "rect"},
        "encoding": {
            "x": {"field": "density", "type": "quantitative", "scale": {"type": "log"},
                  "axis": {"title": "density"}},
            "x2": {"field": "density_to"},
            "y": {"field": "max", "type": "quantitative", "scale": {"type": "log"},
                  "axis": {"title": "maximum (absolute)"}},
            "y2": {"field": "max_to"},
            "color": {"field": "features", "type": "quantitative",
                      "scale": {"type": "log", "range": ["$quiet", "$accent"]},
                      "legend": {"title": "features", "orient": "top"}},
            "opacity": {"condition": {"param": "brush", "value": 1}, "value": 0.35},
            "tooltip": [{"field": "features"}, {"field": "density", "format": ".3g", "title": "density from"},
                        {"field": "max", "format": ".4g", "title": "maximum from"}],
        },
        "width": "container",
        "height": 300,
    }  # fmt: skip


def _brush(density: Sequence[float | None], maximum: Sequence[float | None]) -> Chart:
    brush: Chart = {"name": "brush", "select": {"type": "interval", "mark": {"fill": "$strong"}}}
    if None not in (*density, *maximum):
        brush["value"] = {"x": list(density), "y": list(maximum)}
    return brush


# --- compare


def volcano(rows: Sequence[dict[str, Any]]) -> Chart:
    """Effects against -log10 q; what is below 0.05 stands out by colour and shape."""
    values = [{**row, "found": "q <= 0.05" if row["q"] <= 0.05 else "q > 0.05"} for row in rows]
    return {
        "data": {"values": values},
        "mark": {"type": "point", "filled": True, "size": 22},
        "encoding": {
            "x": {"field": "effect", "type": "quantitative", "axis": {"title": "effect (log2 odds ratio)"}},
            "y": {"field": "height", "type": "quantitative", "axis": {"title": "-log10 q"}},
            "color": {"field": "found", "type": "nominal", "legend": {"title": None, "orient": "top"},
                      "scale": {"domain": ["q <= 0.05", "q > 0.05"], "range": ["$strong", "$quiet"]}},
            "shape": {"field": "found", "type": "nominal", "legend": {"title": None, "orient": "top"},
                      "scale": {"domain": ["q <= 0.05", "q > 0.05"], "range": ["diamond", "circle"]}},
            "tooltip": [{"field": "sae"}, {"field": "feature"}, {"field": "effect", "format": ".3g"},
                        {"field": "q", "format": ".2e"}],
        },
        "width": "container",
        "height": 280,
    }  # fmt: skip
