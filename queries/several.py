"""Several indexes of one corpus as one: the keys of the others are told in terms of the first one's.

Invariant: indexes are opened together only if they hold the same documents, cut into the same contexts of
the same tokens, in the same order; every row of an SAE is then of the first index's documents and contexts,
so an answer is what one scan with all those SAEs would have given. An index numbers its units in the order
in which its scans met them, and may cut them elsewhere: inside the part that a unit of each has in common
the keys differ by one number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contents import Contents
from pipelines.schema import LOCAL_MAX, VOCABULARY
from queries.relations import table
from sae_runtime.errors import InputError

_SETTINGS = ("context.length", "context.overlap", "context.bos", "context.exclude")
_PIECE = {"ordinal": "BIGINT", "low": "BIGINT", "high": "BIGINT", "shift": "BIGINT"}


@dataclass(frozen=True)
class Keys:
    """How an index's keys become the first one's. A piece: (ordinal, lowest key, highest key, shift)."""

    documents: tuple[tuple[int, int, int, int], ...]
    contexts: tuple[tuple[int, int, int, int], ...]

    def moved(self, relation: str, column: str, scale: int = 1) -> str:
        """A relation with `column` (document, context, or token = context * scale + position) in new keys."""
        pieces = table(self.documents if column == "document" else self.contexts, _PIECE)
        key = f"(r.{column} // {scale})" if scale > 1 else f"r.{column}"
        return (
            f"(SELECT r.* REPLACE (r.{column} + s.shift * {scale} AS {column}) FROM {relation} AS r "
            f"JOIN {pieces} AS s ON {key} // {LOCAL_MAX} = s.ordinal AND {key} BETWEEN s.low AND s.high)"
        )


def agree(found: Sequence[Contents]) -> None:
    """InputError unless the indexes have one tokenizer, the same context settings and SAEs of their own."""
    first, *others = found
    have = first.identity["fixed"]
    held = {sae["id"]: first.store.uri for sae in first.identity["saes"]}
    words = None
    for other in others:
        uri, fixed = other.store.uri, other.identity["fixed"]
        for name in _SETTINGS:
            if fixed[name] != have[name]:
                raise _apart(first, other, f"{name} is {have[name]} there and {fixed[name]} here")
        for sae in other.identity["saes"]:
            if sae["id"] in held:
                raise _apart(first, other, f"SAE {sae['id']} is in {held[sae['id']]} too")
            held[sae["id"]] = uri
        words = words or first.store.read(VOCABULARY)
        if other.store.read(VOCABULARY) != words:
            raise _apart(first, other, "their tokenizers are not the same")


def same_keys(first: Contents, other: Contents) -> bool:
    """Whether both show the same units under the same numbers, in the same order, and as much of each."""
    return _units(first) == _units(other) and _counts(first).equals(_counts(other))


def _units(found: Contents) -> list[tuple[int, str]]:
    shown = set(found.shown.tolist())
    return [(unit.ordinal, unit.unit) for unit in found.units if unit.ordinal in shown]


def _counts(found: Contents) -> pa.Table:
    """What is in each shown unit: what one model cannot take is quarantined in that index only."""
    facts = found.facts.filter(pc.is_in(found.facts["ordinal"], pa.array(found.shown)))
    columns = ["ordinal", "documents", "quarantined", "contexts", "tokens"]
    return facts.select(columns).sort_by("ordinal").combine_chunks()


def _files(found: Contents) -> list[tuple[str, str, str]]:
    """(corpus, path, digest) of the files of shown units, in corpus order."""
    shown = set(found.shown.tolist())
    return list(dict.fromkeys((u.corpus, u.path, u.digest) for u in found.units if u.ordinal in shown))


def match(con: duckdb.DuckDBPyConnection, first: Contents, other: Contents, tables: Sequence[str]) -> Keys:
    """Match two indexes document by document, context by context. InputError where they do not match.

    `tables` are SQL relations: documents and contexts of `first`, then those of `other`.
    """
    documents, contexts, other_documents, other_contexts = tables
    mine, theirs = dict.fromkeys(_files(first)), dict.fromkeys(_files(other))
    if unlike := [place for place in (*mine, *theirs) if not (place in mine and place in theirs)]:
        corpus, path, _ = unlike[0]
        raise _apart(first, other, f"{path} of {corpus} is not the same in both")
    if list(mine) != list(theirs):
        raise _apart(first, other, "their sources are not in the same order")
    con.execute(
        "CREATE OR REPLACE TEMP TABLE _documents_match AS SELECT a.document AS there, b.document AS here "
        f"FROM {documents} AS a FULL JOIN {other_documents} AS b "
        "ON (a.corpus, a.source, a.row, a.n_tokens, a._length) "
        "= (b.corpus, b.source, b.row, b.n_tokens, b._length)"
    )
    _all_matched(con, first, other, "documents")
    con.execute(
        "CREATE OR REPLACE TEMP TABLE _contexts_match AS SELECT a.context AS there, b.context AS here "
        f"FROM {contexts} AS a FULL JOIN (SELECT c.*, m.there FROM {other_contexts} AS c "
        "JOIN _documents_match AS m ON m.here = c.document) AS b "
        "ON (a.document, a.start) = (b.there, b.start)"
    )
    _all_matched(con, first, other, "contexts")
    return Keys(_pieces(con, "documents"), _pieces(con, "contexts"))


def _all_matched(con: duckdb.DuckDBPyConnection, first: Contents, other: Contents, what: str) -> None:
    counts = con.execute(
        f"SELECT count(*) FILTER (here IS NULL), count(*) FILTER (there IS NULL) FROM _{what}_match"
    ).fetchall()[0]
    for number, has, lacks in ((counts[0], first, other), (counts[1], other, first)):
        if number:
            missing = f"{lacks.store.uri} lacks {number:,} of the {what} of {has.store.uri}"
            raise _apart(first, other, f"{missing} (are both scans finished?)")


def _pieces(con: duckdb.DuckDBPyConnection, what: str) -> tuple[tuple[int, int, int, int], ...]:
    """Runs of keys that differ by one number, unit by unit."""
    found: Iterable[tuple[int, int, int, int]] = con.execute(
        f"""
        SELECT here // {LOCAL_MAX} AS ordinal, min(here), max(here), any_value(there - here)
        FROM (
            SELECT here, there, count(*) FILTER (new) OVER (ORDER BY here ROWS UNBOUNDED PRECEDING) AS piece
            FROM (
                SELECT here, there,
                    coalesce((there - here) <> lag(there - here) OVER (ORDER BY here), true) AS new
                FROM _{what}_match
            )
        )
        GROUP BY here // {LOCAL_MAX}, piece
        ORDER BY 2
        """
    ).fetchall()
    con.execute(f"DROP TABLE _{what}_match")
    return tuple(found)


def _apart(first: Contents, other: Contents, why: str) -> InputError:
    return InputError(
        f"{other.store.uri} cannot be opened together with {first.store.uri}: {why}; "
        "indexes that share corpus, tokenizer and context settings can, with SAEs of their own"
    )
