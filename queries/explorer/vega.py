"""The chart library, Vega-Lite: its JavaScript for pages, its SVG for reports, both from `vl-convert-python`.

A chart is a dict in Vega-Lite's language (`charts.py`), the same for both. Vega's own interpreter of
expressions is used (`ast`), so that pages need no `eval`.
Measured (a Xeon core, 2026-11-23): the bundle of 0.9 MB is made once in 1.1 s, an SVG takes 20 to 30 ms
after a first one of 120.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that sets `vegaEmbed`."""
    import vl_convert

    script: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    return script


def svg(chart: dict[str, Any]) -> str:
    """A chart as SVG, without scripts."""
    import vl_convert

    drawn: str = vl_convert.vegalite_to_svg(chart)
    return drawn
