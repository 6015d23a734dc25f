"""What people see of features in a terminal: contexts with active tokens shaded, a small histogram.

Invariant: without colour the same marks are there as brackets, so output piped to a file says as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

_BARS = " ▁▂▃▄▅▆▇█"
_LOWEST, _PER_OCTAVE = -10, 8


def feature_view(found: dict[str, Any], color: bool) -> RenderableType:
    """The page of one feature, from `lookup.feature`."""
    parts: list[RenderableType] = [Text(f"{found['sae']}  feature {found['feature']}", style="bold")]
    if not found["n_tokens"]:
        parts.append(Text("dead: never active on a counted token of this corpus"))
        return Group(*parts)
    parts.append(Text(_statistics(found)))
    parts.extend(_histogram(found["histogram"]))
    parts.append(Text())
    highest = max(context["activation"] for context in found["contexts"])
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    for column in ("right", "right", "left", "left"):
        table.add_column(justify=column, no_wrap=column == "right")  # type: ignore[arg-type]
    for context in found["contexts"]:
        where = context["id"] or f"{context['source']}:{context['row']}"
        table.add_row(
            Text(str(context["rank"]), style="dim"),
            Text(f"{context['activation']:.4g}"),
            Text(_short(where), style="cyan"),
            shaded(context["pieces"], highest, color),
        )
    return Group(*parts, table)


def shaded(pieces: Sequence[Sequence[Any]], highest: float, color: bool) -> Text:
    """Tokens with their activation as shade (colour) or in brackets, the strongest doubled."""
    text = Text()
    for piece, value in pieces:
        shown = visible(piece)
        if value <= 0:
            text.append(shown)
        elif color:
            text.append(shown, _shade(value / highest))
        else:
            strong = value >= highest / 2
            text.append(f"[[{shown}]]" if strong else f"[{shown}]")
    return text


def visible(piece: str) -> str:
    """Newlines, tabs and other control characters as signs, so that a context stays one paragraph."""
    signs = {"\n": "↵", "\t": "→", "\r": "␍"}
    return "".join(signs.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in piece)


def _shade(share: float) -> Style:
    """Orange from pale to full on black or white alike: background with dark text."""
    share = min(1.0, max(0.15, share))
    red, green, blue = 255, int(235 - 120 * share), int(200 - 180 * share)
    return Style(color="black", bgcolor=f"rgb({red},{green},{blue})", bold=share > 0.6)


def _statistics(found: dict[str, Any]) -> str:
    return (
        f"active on {found['n_tokens']:,} tokens (density {found['density']:.3g}), "
        f"{found['n_contexts']:,} contexts, {found['n_documents']:,} documents\n"
        f"when active: mean {found['mean_active']:.4g}  std {found['std_active']:.3g}  "
        f"p50 {found['p50']:.4g}  p90 {found['p90']:.4g}  p99 {found['p99']:.4g}  max {found['max']:.4g}"
    )


def _histogram(counts: Sequence[int]) -> list[Text]:
    """One character a bin over the range that occurs, log-spaced as the bins are."""
    filled = [i for i, n in enumerate(counts) if n]
    first, last = filled[0], filled[-1]
    top = max(counts)
    bars = "".join(
        _BARS[max(1, round(n / top * (len(_BARS) - 1)))] if n else " " for n in counts[first : last + 1]
    )
    left, right = f"{_edge(first - 1):.3g} ", f" {_edge(last):.3g}"
    return [Text.assemble((left, "dim"), (bars, "dark_orange"), (right, "dim"))]


def _edge(index: int) -> float:
    return float(2.0 ** (_LOWEST + max(index, 0) / _PER_OCTAVE))


def _short(where: str, limit: int = 28) -> str:
    return where if len(where) <= limit else "…" + where[-(limit - 1) :]
