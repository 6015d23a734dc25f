"""Addresses of pages. Invariant: a page's whole state is in its address, so that it can be sent and kept."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode


def to(page: str, /, **query: Any) -> str:
    """`/page?name=value…`; None and empty values are left out, lists are repeated."""
    pairs = {
        name: value for name, value in query.items() if value is not None and value != "" and value != []
    }
    return f"/{page}" + (f"?{urlencode(pairs, doseq=True)}" if pairs else "")


def sae(name: str, /, **query: Any) -> str:
    """The page of an SAE."""
    return to("sae", sae=name, **query)


def feature(name: str, number: int, /, **query: Any) -> str:
    """The page of a feature."""
    return to("feature", sae=name, feature=number, **query)


def document(key: int, /, **query: Any) -> str:
    """The page of a document, by its key in the index."""
    return to("document", document=key, **query)


def sql(statement: str) -> str:
    """The page that runs a statement."""
    return to("sql", q=statement)
