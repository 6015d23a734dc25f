"""Which files may hold a feature's rows or its page: what is asked about one feature is asked of those alone.

DuckDB looks at every row group of every file for each question, 4 to 6 us each: 25 ms where a billion rows
have 4,000. Manifests say which features a merged file has, so files of others are not opened.
Invariant: a file whose features are not known is among a feature's files; where rows of an index are not
told as they are in its files (units were dropped, keys are another index's) there is no answer, and the
views have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import duckdb

from pipelines.contents import Contents
from queries.files import url

Spans = dict[str, tuple[int, int]]  # SAE -> lowest and highest feature


@dataclass(frozen=True)
class Held:
    """Files of the SAEs of one index."""

    length: int  # tokens a context
    saes: frozenset[str]
    files: tuple[tuple[str, Spans | None], ...]  # of token rows, as DuckDB opens them
    pages: tuple[tuple[str, Spans | None], ...]  # of `pages`, which say all of top contexts; or none
    annotated: bool  # there is something that `annotate` added

    def of(self, sae: str, feature: int) -> list[str]:
        """Those that may have rows of a feature."""
        return _having(self.files, sae, feature)

    def page_of(self, sae: str, feature: int) -> list[str]:
        """Those that may have the page of a feature."""
        return _having(self.pages, sae, feature)


def _having(files: Sequence[tuple[str, Spans | None]], sae: str, feature: int) -> list[str]:
    found = []
    for name, spans in files:
        lowest, highest = (feature, feature) if spans is None else spans.get(sae, (1, 0))
        if lowest <= feature <= highest:
            found.append(name)
    return found


_held: WeakKeyDictionary[duckdb.DuckDBPyConnection, Held] = WeakKeyDictionary()


def remember(con: duckdb.DuckDBPyConnection, found: Sequence[Contents]) -> None:
    """Have `held` know the files of the first of the indexes that a connection was opened to."""
    first = found[0]
    if len(first.hidden):
        return
    files, pages = (
        tuple((url(0, file.path), file.spans) for file in first.files(kind))
        for kind in ("activations", "pages")
    )
    saes = frozenset(sae["id"] for sae in first.identity["saes"])
    annotated = any(each.annotations.files for each in found)
    _held[con] = Held(int(first.identity["fixed"]["context.length"]), saes, files, pages, annotated)


def held(con: duckdb.DuckDBPyConnection, sae: str) -> Held | None:
    """What `remember` was told, if that has the rows of an SAE as they are."""
    found = _held.get(con)
    return found if found is not None and sae in found.saes else None
