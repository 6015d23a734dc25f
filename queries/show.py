"""What people see of features in a terminal: contexts with active tokens shaded, a small histogram.

Invariant: without colour the same marks are there as brackets, so output piped to a file says as much.
Negative activations, of signed architectures, are blue, or in braces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.style import Style
from rich.text import Text

from sae_runtime.terminal import plain, sign

_BARS = " ▁▂▃▄▅▆▇█"
_LOWEST, _PER_OCTAVE = -10, 8
_WIDEST = 50  # characters of a histogram
_EXPLAINED, _LISTED, _ELSEWHERE = 3, 5, 3  # explanations; tokens and features; features of other SAEs


def feature_view(found: dict[str, Any], color: bool) -> RenderableType:
    """The page of one feature, from `lookup.feature`."""
    parts: list[RenderableType] = [Text(f"{plain(found['sae'])}  feature {found['feature']}", style="bold")]
    if not found["n_tokens"]:
        parts.append(Text("dead: never active on a counted token of this corpus"))
        return Group(*parts, *_annotations(found))
    parts += [Text(_statistics(found)), _histogram(found["histogram"]), *_annotations(found)]
    for context in found["contexts"]:
        # Shades are a context's own: one outlier among the contexts must not leave the others pale.
        text = shaded(context["pieces"], context["activation"], color)
        parts += [Text(), _heading(context), Padding(text, (0, 0, 0, 4))]
    return Group(*parts)


def _annotations(found: dict[str, Any]) -> list[Text]:
    """What `annotate` has added, a line each; nothing where it has not."""
    lines = []
    for each in found["explanations"][:_EXPLAINED]:
        by = ", ".join(visible(each[name]) for name in ("method", "model", "source") if each[name])
        score = "" if each["score"] is None else f", score {each['score']:.2g}"
        lines.append(Text.assemble(visible(each["description"]), (f"  ({by}{score})", "dim")))
    for words, tokens in (("promotes  ", found["top_tokens"]), ("suppresses", found["bottom_tokens"])):
        if tokens:
            shown = "  ".join(f"{visible(t['text'])!r} {t['logit']:+.3g}" for t in tokens[:_LISTED])
            lines.append(Text.assemble((f"{words}  ", "dim"), shown))
    near = found["neighbours"]
    here = [n for n in near if n["other_sae"] == found["sae"]][:_LISTED]
    away = [n for n in near if n["other_sae"] != found["sae"]][:_ELSEWHERE]
    if here:
        shown = "  ".join(f"{n['other_feature']} ({n['cosine']:.2f})" for n in here)
        lines.append(Text.assemble(("alike       ", "dim"), shown))
    for each in away:
        shown = f"{plain(each['other_sae'])} {each['other_feature']} ({each['cosine']:.2f})"
        lines.append(Text.assemble(("elsewhere   ", "dim"), shown))
    return lines


def shaded(pieces: Sequence[Sequence[Any]], highest: float, color: bool) -> Text:
    """Tokens with their activation as shade, or in brackets: doubled from half of |highest| on."""
    text = Text()
    for piece, value in pieces:
        shown = visible(piece)
        share = abs(value) / abs(highest)
        if value == 0:
            text.append(shown)
        elif color:
            text.append(shown, _shade(share, value < 0))
        else:
            left, right = ("{", "}") if value < 0 else ("[", "]")
            times = 2 if share >= 0.5 else 1
            text.append(f"{left * times}{shown}{right * times}")
    return text


def visible(piece: str) -> str:
    """Newlines, tabs and other control characters as signs, so that a context stays one paragraph."""
    return "".join(c if c.isprintable() else sign(c) for c in piece)


def _heading(context: dict[str, Any]) -> Text:
    where = f"{context['source']} row {context['row']}"
    if context["id"] is not None:
        where = f"{context['id']}  ({where})"
    return Text.assemble(
        (f"{context['rank']:>2}  ", "dim"),
        (f"{context['activation']:.4g}", "bold"),
        (f"  {plain(where)}", "cyan"),
    )


def _shade(share: float, negative: bool) -> Style:
    """Orange (or blue) from pale to full on black or white alike: background with dark text."""
    share = min(1.0, max(0.0, share))
    red, green, blue = 255, int(240 - 130 * share), int(205 - 190 * share)
    if negative:
        red, blue = blue, red
    return Style(color="rgb(0,0,0)", bgcolor=f"rgb({red},{green},{blue})", bold=share > 0.6)


def _statistics(found: dict[str, Any]) -> str:
    return (
        f"active on {found['n_tokens']:,} tokens (density {found['density']:.3g}), "
        f"in {found['n_contexts']:,} contexts of {found['n_documents']:,} documents\n"
        f"when active: mean {found['mean_active']:.4g}  std {found['std_active']:.3g}  "
        f"p50 {found['p50']:.4g}  p90 {found['p90']:.4g}  p99 {found['p99']:.4g}  max {found['max']:.4g}"
    )


def _histogram(counts: Sequence[int]) -> Text:
    """One character a bin over the range that occurs, log-spaced as the bins are; wide ranges are thinned."""
    filled = [i for i, n in enumerate(counts) if n]
    first, last = filled[0], filled[-1]
    step = -(-(last + 1 - first) // _WIDEST)
    shown = [sum(counts[i : min(i + step, last + 1)]) for i in range(first, last + 1, step)]
    top = max(shown)
    bars = "".join(_BARS[max(1, round(n / top * (len(_BARS) - 1)))] if n else " " for n in shown)
    left, right = f"{_edge(first - 1):.4g} ", f" {_edge(last):.4g}"
    return Text.assemble((left, "dim"), (bars, "dark_orange"), (right, "dim"), ("  (log)", "dim"))


def _edge(index: int) -> float:
    return float(2.0 ** (_LOWEST + max(index, 0) / _PER_OCTAVE))
