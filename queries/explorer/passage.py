"""A text of one's own: what fires on it, beside what the index says of those features.

Invariant: nothing is computed here; the session's reader runs the text as a scan would, in a thread of its
own, and the page waits a little for it, then says what it waits for and asks again.
"""

from __future__ import annotations

from concurrent.futures import TimeoutError as StillAtWork
from typing import Any

import numpy as np

from queries import lookup
from queries.explorer import tokens
from queries.explorer.web import Answer, Ask, page
from queries.pieces import spelling
from queries.relations import name as identifier
from sae_runtime.errors import InputError

LONGEST = 8000  # characters, which an address still holds
SHOWN = 60  # features
SORTS = {
    "max": "the strongest here",
    "share": "nearest to their maximum in the index",
    "rare": "rarest in the index",
    "tokens": "active on most tokens",
}
_WAIT = 4.0  # seconds before the page says that it waits


def passage(ask: Ask) -> Answer:
    """Values of `passage.html`: a form, and once there is a text what fires on it."""
    text = ask.query.get("q", "").replace("\r\n", "\n")  # which a form makes of a newline
    names = [each["id"] for each in ask.snapshot.saes]
    sae = ask.sae() if ask.text("sae") else names[0]
    feature = ask.integer("feature") if ask.text("feature") else None
    sort = ask.choice("sort", list(SORTS), "max")
    reader = ask.session.outside.reader
    values: Answer = {
        "title": "Your text", "q": text, "sae": sae, "saes": names, "feature": feature, "sort": sort,
        "sorts": SORTS, "waits": "", "wrong": "", "found": None, "pieces": [], "rows": [], "highest": 0.0,
        "fired": 0,
    }  # fmt: skip
    if reader is None:
        return values | {"wrong": "the explorer was started with --no-model"}
    if not text.strip():
        return values
    if len(text) > LONGEST:
        raise InputError(f"q: a text has at most {LONGEST:,} characters, this has {len(text):,}")
    identity = next(
        each.identity for each in ask.snapshot.found if sae in (one["id"] for one in each.identity["saes"])
    )
    try:
        found = reader.read(identity, sae, text).result(timeout=_WAIT)
    except StillAtWork:
        return values | {"waits": reader.doing or "in line behind another text"}
    except InputError as error:
        return values | {"wrong": str(error), "_status": 400}
    return values | _shown(ask, sae, feature, sort, found)


def _shown(ask: Ask, sae: str, feature: int | None, sort: str, found: Any) -> Answer:
    contexts = [
        {"context": i, "first": each.first, "tokens": each.tokens.tolist(), "counted": each.counted.tolist()}
        for i, each in enumerate(found.contexts)
    ]
    at = {place: i for i, place in enumerate(tokens.places(contexts))}
    active: dict[int, list[tuple[int, float]]] = {}
    columns = (found.feature, found.context, found.position, found.activation)
    for number, context, position, value in zip(*(column.tolist() for column in columns), strict=True):
        active.setdefault(at[context, position], []).append((number, value))
    fired, starts, counts = np.unique(found.feature, return_index=True, return_counts=True)
    strongest = [max(part.tolist(), key=abs) for part in np.split(found.activation, starts[1:]) if len(part)]
    here = {
        number: {"feature": number, "here_tokens": count, "here": value}
        for number, count, value in zip(fired.tolist(), counts.tolist(), strongest, strict=True)
    }
    shades = [abs(value) for rows in active.values() for number, value in rows if feature in (None, number)]
    return {
        "found": found,
        "fired": len(here),
        "rows": _features(ask, sae, here, sort),
        "highest": max(shades, default=0.0),
        "active": len(shades) if feature is not None else len(active),
        "pieces": tokens.of_contexts(contexts, spelling(ask.con, contexts), active, feature),
    }


def _features(ask: Ask, sae: str, here: dict[int, dict[str, Any]], sort: str) -> list[dict[str, Any]]:
    """The features that fire, with the index's statistics and the tokens around their maximum there."""
    table = identifier(ask.snapshot.features(ask.con, sae))
    known = ask.rows(
        f"SELECT feature, density, n_tokens, max FROM {table} WHERE list_contains($1, feature)",
        [list(here)],
    )
    rows = [
        {**row, **here[row["feature"]], "share": abs(here[row["feature"]]["here"] / row["max"])
         if row["max"] else None}
        for row in known
    ]  # fmt: skip
    keys = {
        "max": lambda row: -abs(row["here"]),
        "share": lambda row: -(row["share"] if row["share"] is not None else np.inf),
        "rare": lambda row: row["density"],
        "tokens": lambda row: -row["here_tokens"],
    }
    rows = sorted(rows, key=lambda row: (keys[sort](row), row["feature"]))[:SHOWN]
    examples = lookup.examples(ask.con, sae, [row["feature"] for row in rows if row["n_tokens"]])
    return [{**row, "example": examples.get(row["feature"])} for row in rows]


ROUTES = [page("/text", passage, "passage.html")]
