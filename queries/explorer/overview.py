"""The first page: what was scanned, its SAEs, how a scan that is at work gets on."""

from __future__ import annotations

from queries.explorer.web import Answer, Ask, page


def overview(ask: Ask) -> Answer:
    """Values of `overview.html`."""
    return {
        "title": "Index",
        "saes": ask.snapshot.once("saes", lambda: ask.rows("SELECT * FROM saes ORDER BY sae")),
    }


ROUTES = [page("/", overview, "overview.html")]
