"""The first page: what was scanned, its SAEs, how a scan that is at work gets on."""

from __future__ import annotations

import re
from typing import Any

from queries.explorer import charts
from queries.explorer.sae import all_saes
from queries.explorer.web import Answer, Ask, page
from sae_runtime.errors import CorpuscopeError

_DRAWN = 600  # SAEs of the map; the table has all


def overview(ask: Ask) -> Answer:
    """Values of `overview.html`."""
    rows = ask.snapshot.once("overview", lambda: _saes(ask))
    corpora = ask.snapshot.once(
        "corpora",
        lambda: ask.rows(
            "SELECT corpus, count(*) AS documents, sum(n_tokens)::BIGINT AS tokens FROM documents "
            "GROUP BY corpus ORDER BY corpus"
        ),
    )
    wanted = ask.text("find").lower()
    first = ask.snapshot.found[0].identity
    return {
        "title": "Index",
        "saes": [row for row in rows if wanted in row["sae"].lower() or wanted in row["site"].lower()],
        "of": len(rows),
        "find": ask.text("find"),
        "corpora": corpora,
        "quarantined": ask.rows("SELECT count(*) AS n FROM quarantine")[0]["n"],
        "models": sorted({str(each.identity["model"]) for each in ask.snapshot.found}),
        "settings": {
            key: ", ".join(value) if isinstance(value, list) else "none" if value is None else value
            for key, value in first["fixed"].items()
            if key.startswith("context.")
        },
        "runs": ask.rows("SELECT * EXCLUDE (spec, sae_fingerprints) FROM runs ORDER BY ALL"),
        "chart": charts.sae_map(_map(rows)) if 0 < len(rows) <= _DRAWN else None,
    }


def _saes(ask: Ask) -> list[dict[str, Any]]:
    """Rows of `saes`, with `live` and `dead` features and the mean `density`."""
    live = {row["sae"]: row["n"] for row in ask.rows("FROM _live_features")}
    return [
        {
            **row,
            "live": live.get(row["sae"], 0),
            "dead": 1 - live.get(row["sae"], 0) / row["width"],
            "density": None if row["measured_l0"] is None else row["measured_l0"] / row["width"],
        }
        for row in all_saes(ask)
    ]


def _map(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the map draws: `kind` is the site without its layer's number, `place` that within its cell."""
    placed: dict[tuple[Any, str], int] = {}
    found = []
    for row in sorted(rows, key=lambda row: (row["layer"], row["width"], row["sae"])):
        kind = re.sub(r"\.\d+\.", ".N.", row["site"])
        place = placed[row["layer"], kind] = placed.get((row["layer"], kind), -1) + 1
        found.append(
            {
                "sae": row["sae"], "kind": kind, "layer": row["layer"], "place": place, "width": row["width"],
                "l0": row["measured_l0"] or 0.0, "density": row["density"], "dead": row["dead"],
            }
        )  # fmt: skip
    return found


def status(ask: Ask) -> Answer:
    """How the scans of the indexes get on: a dict a URI, with `error` where that cannot be told."""
    found = []
    for uri in ask.session.uris:
        try:
            told = ask.session.outside.status(uri)
            found.append(
                {
                    "uri": uri, "state": told.state, "committed": told.committed, "units": told.units,
                    "failed": told.failed, "tokens_per_second": told.tokens_per_second,
                    "seconds_left": told.seconds_left, "next": told.next, "error": told.error,
                }
            )  # fmt: skip
        except CorpuscopeError as error:
            found.append({"uri": uri, "error": str(error)})
    return {"indexes": found, "when": ask.snapshot.when}


ROUTES = [page("/", overview, "overview.html"), page("/status.json", status)]
