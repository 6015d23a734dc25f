"""Tokens as HTML: shaded by activation, with nothing of the text hidden or acted on.

Invariant: every character of a corpus is there to be seen. A newline is a sign and a line's end, a tab and
other control characters are signs, marks that would turn the line around are written out; each token is
isolated, so that right-to-left text stays inside it. Shades are classes, not styles (the policy of the pages
allows none): 20 steps, orange above zero and blue below, with a rule beneath from half of the highest on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from sae_runtime.terminal import sign

STEPS = 20
_CUT = 2000  # characters of one token that are shown


def shaded(pieces: Sequence[Sequence[Any]], highest: float, peak: float | None = None) -> Markup:
    """Spans of (text, activation) pieces; shades are of |highest|. Pieces of exactly `peak` are outlined."""
    return Markup("").join(
        _token(text, value, highest, peak is not None and value == peak) for text, value in pieces
    )


def _token(text: str, value: float, highest: float, is_peak: bool) -> Markup:
    shown = visible(text)
    if not value:
        return Markup('<span class="t">{}</span>').format(shown)
    name = f"t {shade(value, highest)}{' peak' if is_peak else ''}"
    return Markup('<span class="{}" data-v="{}" tabindex="-1">{}</span>').format(name, f"{value:.4g}", shown)


def shade(value: float, highest: float) -> str:
    """The class of an activation: `p1` to `p20` above zero, `n1` to `n20` below, with `half` from 1/2 on."""
    part = min(1.0, abs(value) / abs(highest)) if highest else 1.0
    step = max(1, round(part * STEPS))
    return f"{'n' if value < 0 else 'p'}{step}{' half' if part >= 0.5 else ''}"


def visible(text: str) -> Markup:
    """A token's characters, escaped; those that do not print are signs, and newlines end the line too."""
    shown = Markup("").join(map(_character, text[:_CUT]))
    if len(text) > _CUT:
        shown += Markup('<i class="sign">… {} characters more</i>').format(f"{len(text) - _CUT:,}")
    return shown


def _character(character: str) -> Markup:
    if character.isprintable():
        return escape(character)
    shown = Markup('<i class="sign">{}</i>').format(sign(character))
    return shown + "\n" if character == "\n" else shown
