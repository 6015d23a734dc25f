"""Tokens as HTML: shaded by activation, with nothing of the text hidden or acted on.

Invariant: every character of a corpus is there to be seen. A newline is a sign and a line's end, a tab and
other control characters are signs, marks that would turn the line around are written out; each token is
isolated, so that right-to-left text stays inside it. Shades are classes, not styles (the policy of the pages
allows none): 20 steps, orange above zero and blue below, with a rule beneath from half of the highest on.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from queries.pieces import joined
from sae_runtime.terminal import sign

STEPS = 20
_NAMED = 5  # features of a token that its label names
_CUT = 2000  # characters of one token that are shown


Active = Mapping[int, Sequence[tuple[int, float]]]  # token -> its active features and their activations


class Piece(NamedTuple):
    """One token, or several that share a character."""

    text: str
    value: float  # that it is shaded by; 0 is inactive
    words: str = ""  # its label, where it is more than the value
    counted: bool = True


def pieces(
    tokens: Sequence[bytes], active: Active, feature: int | None = None, uncounted: Container[int] = ()
) -> list[Piece]:
    """Pieces shaded by a feature, or by the strongest of each and labelled with the strongest few."""
    found, start = [], 0
    for text, count in joined(tokens):
        each = range(start, start + count)
        rows = [row for token in each for row in active.get(token, ()) if feature in (None, row[0])]
        rows.sort(key=lambda row: (-abs(row[1]), row[0]))
        words = "" if feature is not None else "\n".join(f"{n}: {v:.4g}" for n, v in rows[:_NAMED])
        if len(rows) > _NAMED and words:
            words += f"\n{len(rows) - _NAMED} more"
        counted = any(token not in uncounted for token in each)
        found.append(Piece(text, rows[0][1] if rows else 0.0, words, counted))
        start += count
    return found


def places(contexts: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """(context, position) of the own tokens of a document's contexts, in order."""
    return [
        (each["context"], position)
        for each in contexts
        for position in range(each["first"], len(each["tokens"]))
    ]


def of_contexts(
    contexts: Sequence[Mapping[str, Any]], spelling: Mapping[int, bytes], active: Active, feature: int | None
) -> list[Piece]:
    """Pieces of a document's contexts; `active` numbers the own tokens in order (`places`)."""
    spelt = [spelling[token] for each in contexts for token in each["tokens"][each["first"] :]]
    flags = [flag for each in contexts for flag in each["counted"][each["first"] :]]
    uncounted = {i for i, flag in enumerate(flags) if not flag}
    return pieces(spelt, active, feature, uncounted)


def shaded(pieces: Sequence[Sequence[Any]], highest: float, peak: float | None = None) -> Markup:
    """Spans of (text, activation) or `Piece`s; shades are of |highest|, what is exactly `peak` has a rim."""
    return Markup("").join(
        _token(Piece(*piece), highest, peak is not None and piece[1] == peak) for piece in pieces
    )


def _token(piece: Piece, highest: float, is_peak: bool) -> Markup:
    shown = visible(piece.text)
    if not piece.value:
        return Markup('<span class="t{}">{}</span>').format("" if piece.counted else " dim", shown)
    name = f"t {shade(piece.value, highest)}{' peak' if is_peak else ''}"
    label = piece.words or f"{piece.value:.4g}"
    return Markup('<span class="{}" data-v="{}" tabindex="-1">{}</span>').format(name, label, shown)


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
