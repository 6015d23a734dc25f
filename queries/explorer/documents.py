"""Documents: a list to find them by, and one document with the features that are active on it.

Invariant: a document's tokens are shown once and in order: a context's own ones, from its `first` on.
"""

from __future__ import annotations

from typing import Any

from queries.explorer import tokens
from queries.explorer.sae import all_saes
from queries.explorer.web import Answer, Ask, page
from queries.pieces import spelling
from sae_runtime.errors import InputError

PAGE = 50  # documents of a list
CONTEXTS = 8  # of a document at a time
_STRONGEST = 30  # features of a document
_LONGEST = 20_000  # characters of a document's id in SQL


def documents(ask: Ask) -> Answer:
    """Values of `documents.html`."""
    quarantined = ask.text("quarantined") == "1"
    given, number = ask.text("id")[:_LONGEST], ask.integer("page", 1, 1, 10**9)
    if quarantined:
        rows = ask.rows(
            f"SELECT * FROM quarantine ORDER BY source, row LIMIT {PAGE + 1} OFFSET {(number - 1) * PAGE}"
        )
    else:
        rows = ask.rows(
            "SELECT * FROM documents WHERE $1 = '' OR starts_with(id, $1) OR source = $1 "
            f"ORDER BY document LIMIT {PAGE + 1} OFFSET {(number - 1) * PAGE}",
            [given],
        )
    return {
        "title": "Quarantine" if quarantined else "Documents",
        "quarantined": quarantined,
        "given": given,
        "rows": rows[:PAGE],
        "names": list(rows[0]) if rows else [],
        "number": number,
        "more": len(rows) > PAGE,
    }


def document(ask: Ask) -> Answer:
    """Values of `document.html` and of the part of it that other pages take in."""
    key = ask.integer("document")
    rows = ask.rows("SELECT * FROM documents WHERE document = $1", [key])
    if not rows:
        raise InputError(f"document: the index has none of key {key}")
    names = [row["sae"] for row in all_saes(ask)]
    sae = ask.sae() if ask.text("sae") else names[0]
    [facts] = [row for row in all_saes(ask) if row["sae"] == sae]
    feature = ask.integer("feature") if ask.text("feature") else None
    each_token = ask.text("tokens") == "1"
    number = ask.integer("page", 1, 1, 10**6)
    found = ask.rows(
        "SELECT context, first, tokens, counted FROM contexts WHERE document = $1 ORDER BY start, context "
        f"LIMIT {CONTEXTS + 1} OFFSET {(number - 1) * CONTEXTS}",
        [key],
    )
    contexts = found[:CONTEXTS]
    places = {place: i for i, place in enumerate(tokens.places(contexts))}
    active: dict[int, list[tuple[int, float]]] = {}
    lacking = ""
    if facts["keep"] != "tokens" and (feature is not None or each_token):
        lacking = (
            f"token rows of this SAE were not all kept (keep: {facts['keep']}), so no token can be shaded"
        )
    elif feature is not None or each_token:
        for row in ask.rows(
            "SELECT context, position, feature, activation FROM activations "
            "WHERE sae = $1 AND list_contains($2, context) AND ($3 IS NULL OR feature = $3)",
            [sae, [each["context"] for each in contexts], feature],
        ):
            at = places[row["context"], row["position"]]
            active.setdefault(at, []).append((row["feature"], row["activation"]))
    strongest: list[dict[str, Any]] | None = None
    if facts["keep"] != "none":
        strongest = ask.rows(
            "SELECT feature, n_tokens, max FROM _by_document WHERE document = $1 AND sae = $2 "
            f"ORDER BY abs(max) DESC, feature LIMIT {_STRONGEST}",
            [key, sae],
        )
    return {
        "title": f"Document {rows[0]['id'] if rows[0]['id'] is not None else key}",
        "row": rows[0],
        "sae": sae,
        "saes": names,
        "feature": feature,
        "each_token": each_token,
        "number": number,
        "more": len(found) > CONTEXTS,
        "lacking": lacking,
        "strongest": strongest,
        "highest": max((abs(value) for at in active.values() for _, value in at), default=0.0),
        "active": len(active),
        "pieces": tokens.of_contexts(contexts, spelling(ask.con, contexts), active, feature),
    }


ROUTES = [
    page("/documents", documents, "documents.html"),
    page("/document", document, "document.html"),
    page("/document.html", document, "document_part.html"),
]
