"""Token ids as text: spelt by the index's vocabulary, pieces of one character joined.

Invariant: every byte is shown, in order, and none as anything else: what is no UTF-8 even between its
neighbours is U+FFFD.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import duckdb
import numpy as np
import pyarrow as pa

from sae_runtime.errors import DataError, one_line


def spelling(con: duckdb.DuckDBPyConnection, contexts: Sequence[dict[str, Any]]) -> dict[int, bytes]:
    """The bytes of each token that some contexts have. DataError where the vocabulary lacks one."""
    wanted = np.array(sorted({token for context in contexts for token in context["tokens"]}), np.int64)
    known, spelt = _vocabulary(con)
    places = np.searchsorted(known, wanted)
    if not np.array_equal(known[np.minimum(places, len(known) - 1)], wanted):
        raise DataError("index: damaged: contexts have tokens that the vocabulary has not")
    return dict(zip(wanted.tolist(), spelt.take(pa.array(places)).to_pylist(), strict=True))


# (tokens, their bytes) of connections that have spelt something: a few cost as much to read as all.
_vocabularies: WeakKeyDictionary[duckdb.DuckDBPyConnection, tuple[np.ndarray, pa.ChunkedArray]] = (
    WeakKeyDictionary()
)


def _vocabulary(con: duckdb.DuckDBPyConnection) -> tuple[np.ndarray, pa.ChunkedArray]:
    """Every token, ascending, and its bytes."""
    if con not in _vocabularies:
        try:
            table = con.sql("SELECT token, bytes FROM vocabulary ORDER BY token").to_arrow_table()
        except duckdb.Error as error:
            raise DataError(f"index: damaged: {one_line(error)}") from error
        _vocabularies[con] = table["token"].to_numpy(), table["bytes"]
    return _vocabularies[con]


def spell(con: duckdb.DuckDBPyConnection, contexts: list[dict[str, Any]]) -> None:
    """Replace token ids by [text, activation] pieces; multi-byte characters are joined truthfully."""
    spelt = spelling(con, contexts)
    for context in contexts:
        first = context.pop("first")
        active = dict(zip(context.pop("positions"), context.pop("values"), strict=True))
        values = [active.get(first + i, 0.0) for i in range(len(context["tokens"]))]
        pieces = join_pieces([spelt[t] for t in context["tokens"]], values)
        context["text"] = "".join(text for text, _ in pieces)
        context["pieces"] = [list(piece) for piece in pieces]
        del context["tokens"]


def join_pieces(tokens: list[bytes], values: list[float]) -> list[tuple[str, float]]:
    """(text, activation) per token; tokens that share a character become one piece with the highest value.

    Bytes that are no text even then (a character cut by the window) are shown as U+FFFD.
    """
    found, start = [], 0
    for text, count in joined(tokens):
        strongest = max(values[start : start + count], key=lambda value: (abs(value), value))
        found.append((text, strongest))
        start += count
    return found


def joined(tokens: Sequence[bytes]) -> Iterator[tuple[str, int]]:
    """(text, number of tokens) of each piece: tokens that share a character are one."""
    held, count = b"", 0
    for token in tokens:
        held, count = held + token, count + 1
        if not _is_cut(held):
            yield held.decode(errors="replace"), count
            held, count = b"", 0
    if count:
        yield held.decode(errors="replace"), count


def _is_cut(data: bytes) -> bool:
    """Whether `data` ends inside a UTF-8 character that more bytes could complete."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False
