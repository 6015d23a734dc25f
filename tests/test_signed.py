"""Signed activations: order by absolute value, signed sums, and what people see of them.

The definition is written out slowly over whole documents; values are few and of both signs, so that +v
and -v tie all the time, inside contexts, inside documents and between documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_summaries import SAMPLE_K, TOP_K, WIDTH, Context, actual_top, make_contexts, run

import queries
from queries.connect import _HERE
from queries.lookup import feature_table
from queries.pieces import join_pieces
from queries.show import shaded
from sae_runtime import suites
from sae_runtime.bfloat import BINS, fixed_to_float, histogram_edges, to_float
from sae_runtime.encode import Sparse
from sae_runtime.errors import DataError
from sae_runtime.sae import SaeInfo, SaeWeights
from sae_runtime.summaries import ENDING, WINDOW, Chunk, Summary

LIMIT = 1 << 126
WORD = (1 << 64) - 1


def words(totals: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Two's complement 128-bit integers as (high, low)."""
    return np.array([t >> 64 for t in totals], np.int64), np.array([t & WORD for t in totals], np.uint64)


EDGES = [
    0, 1, -1, 2**53 + 1, -(2**53) - 1, -(2**53) - 2, -(2**53) - 3, 2**64, -(2**64), 2**64 - 1, -(2**64) + 1,
    -(2**64) - 1, -(2**117) - 2**63, -(2**117) - 2**63 - 1, -(2**117) - 3 * 2**63, LIMIT - 1, -LIMIT,
    -(5 << 64), (-7 << 64) + 2**63,
]  # fmt: skip
totals = st.lists(
    st.integers(-LIMIT, LIMIT) | st.integers(-(2**66), 2**66) | st.sampled_from(EDGES), min_size=1
)


@settings(max_examples=200, deadline=None)
@given(totals)
def test_fixed_point_to_float_is_rounded_once(sums: list[int]) -> None:
    """Python's integer division is rounded correctly."""
    for bits in (64, 56):
        assert fixed_to_float(*words(sums), bits).tolist() == [t / (1 << bits) for t in sums]


@pytest.fixture(scope="module")
def sql() -> duckdb.DuckDBPyConnection:
    con = duckdb.connect()
    con.execute((_HERE / "helpers.sql").read_text())
    return con


@settings(max_examples=50, deadline=None)
@given(sums=totals)
def test_fixed_in_sql_over_summed_parts(sql: duckdb.DuckDBPyConnection, sums: list[int]) -> None:
    """One by one, and the sum of all of them from sums of high and low words apart."""
    sums = [t // 64 for t in sums]  # the sum must fit too
    high, low = words(sums)
    values = ", ".join(
        f"({h}::BIGINT, {w}::UBIGINT, {i})" for i, (h, w) in enumerate(zip(high, low, strict=True))
    )
    source = f"FROM (VALUES {values}) AS v(high, low, i)"
    each = sql.sql(f"SELECT _fixed(high, low, 64) {source} ORDER BY i").fetchall()
    assert [value for (value,) in each] == [t / 2**64 for t in sums]
    if abs(sum(sums)) < LIMIT:
        total = sql.sql(f"SELECT _fixed(sum(high), sum(low), 56) {source}").fetchall()
        assert total == [(sum(sums) / 2**56,)]


def test_the_furthest_in_sql(sql: duckdb.DuckDBPyConnection) -> None:
    def furthest(*values: float | None) -> object:
        listed = ", ".join("(NULL::FLOAT)" if v is None else f"({v}::FLOAT)" for v in values)
        return sql.sql(f"SELECT _furthest(max(v), min(v)) FROM (VALUES {listed}) AS t(v)").fetchall()[0][0]

    assert furthest(1, 2, 0.5) == 2
    assert furthest(-1, 2, -3) == -3
    assert furthest(-3, 3, None) == 3
    assert furthest(-3, -1) == -3
    assert furthest(None) is None


# --- summaries


def signed(contexts: list[Context], seed: int) -> list[Context]:
    rng = np.random.default_rng(seed)
    for ctx in contexts:
        ctx.acts *= rng.choice(np.float32([-1, 1]), ctx.acts.shape)
        ctx.acts[:, 1] = -np.abs(ctx.acts[:, 1])  # a feature that is only ever negative
        ctx.acts += np.float32(0)  # no -0
    return contexts


def highest(ctx: Context, f: int) -> tuple[float, int]:
    """(value, position): largest |value|, then the positive, then the first."""
    column = ctx.acts[:, f].tolist()
    at = min(range(len(column)), key=lambda i: (-abs(column[i]), -column[i], i))
    return column[at], at


def near(ctx: Context, f: int, at: int) -> list[tuple[int, float]]:
    return [(p, float(v)) for p, v in enumerate(ctx.acts[:, f]) if v != 0 and abs(p - at) <= WINDOW]


def expected_top(contexts: list[Context], f: int) -> list[tuple]:
    offers: dict[int, tuple[float, int, int]] = {}
    for c, ctx in enumerate(contexts):
        value, at = highest(ctx, f)
        held = offers.get(ctx.document, (0.0, 0, 0))[0]
        if (abs(value), value) > (abs(held), held):
            offers[ctx.document] = value, c, at
    chosen, endings = [], set()
    for value, c, at in sorted(offers.values(), key=lambda o: (-abs(o[0]), o[1])):
        ending = tuple(contexts[c].tokens[max(0, at - ENDING + 1) : at + 1])
        if ending not in endings:
            endings.add(ending)
            chosen.append((value, c, at, near(contexts[c], f, at)))
    return chosen[:TOP_K]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    documents=st.integers(1, 12),
    vocabulary=st.sampled_from([1, 2, 50]),
    cuts=st.lists(st.integers(1, 40), max_size=8),
)
def test_signed_summaries_equal_the_definition_however_the_chunks_are_cut(
    seed: int, documents: int, vocabulary: int, cuts: list[int]
) -> None:
    contexts = signed(make_contexts(np.random.default_rng(seed), documents, vocabulary), seed)
    if not any(any(ctx.counted) for ctx in contexts):
        return
    summary, found_rows = run(contexts, cuts)
    counts, rows = summary.counts, []
    for f in range(WIDTH):
        by_document: dict[int, list[float]] = {}
        for ctx in contexts:
            by_document.setdefault(ctx.document, []).extend(v for v in ctx.acts[:, f].tolist() if v)
        values = [v for part in by_document.values() for v in part]
        for document, part in by_document.items():
            if part:
                most = max(part, key=lambda v: (abs(v), v))
                rows.append((f, document, len(part), most, float(sum(map(Fraction, part)))))
        assert counts.tokens[f] == len(values)
        total = (int(counts.sum_high[f]) << 64) + int(counts.sum_low[f])
        assert Fraction(total, 1 << 64) == sum(map(Fraction, values), Fraction(0))
        squares = (int(counts.squares_high[f]) << 64) + int(counts.squares_low[f])
        assert Fraction(squares, 1 << 56) == sum((Fraction(v) ** 2 for v in values), Fraction(0))
        bins = np.searchsorted(histogram_edges(), np.abs(values), side="right").astype(int)
        assert (counts.histogram[f] == np.bincount(bins, minlength=BINS)).all()
        maximum = float(to_float(counts.max[f : f + 1])[0])
        assert maximum == max(values, key=lambda v: (abs(v), v), default=0)
        assert actual_top(summary, f) == expected_top(contexts, f)
        check_samples(summary, contexts, f)
    assert found_rows == sorted(rows)


def check_samples(summary: Summary, contexts: list[Context], f: int) -> None:
    samples, arena = summary.samples, summary.sample_arena
    strata: dict[int, list[int]] = {}
    for c, ctx in enumerate(contexts):
        if highest(ctx, f)[0]:
            strata.setdefault(math.floor(math.log2(abs(highest(ctx, f)[0]))), []).append(c)
    entries = range(samples.indptr[f], samples.indptr[f + 1])
    drawn: dict[int, int] = {}
    for e in entries:
        stratum, ctx = int(samples.stratum[e]), contexts[samples.context[e]]
        drawn[stratum] = drawn.get(stratum, 0) + 1
        assert samples.context[e] in strata[stratum]
        value = float(to_float(samples.code[e : e + 1])[0])
        assert (value, samples.position[e]) == highest(ctx, f)
        at = slice(samples.start[e], samples.start[e] + samples.length[e])
        pairs = list(zip(arena.position[at].tolist(), to_float(arena.code[at]).tolist(), strict=True))
        assert pairs == near(ctx, f, int(samples.position[e]))
    assert drawn == {stratum: min(SAMPLE_K, len(members)) for stratum, members in strata.items()}


@pytest.mark.parametrize("code", [0xCF00, 0x4F00])
def test_a_large_activation_of_either_sign_is_an_error(code: int) -> None:
    """And a lesser one is not, though its code is higher: 0xBF80 is -1."""
    index = np.arange(2, dtype=np.int32)
    chunk = Chunk(index * 0, index, 0, index[:1], np.zeros(1, np.uint64), index, np.array([0, 2]), -1, -1)
    Summary.empty("s", 1, 1, 1).update(
        Sparse(np.array([0, 2]), index, np.array([0xBF80, 0x4EFF], np.uint16)), chunk
    )
    with pytest.raises(DataError, match=r"position 1: .* is 2\^31 or more"):
        Summary.empty("s", 1, 1, 1).update(
            Sparse(np.array([0, 2]), index, np.array([0xBF80, code], np.uint16)), chunk
        )


# --- what people see


def test_negative_tokens_are_marked_apart() -> None:
    pieces = [("a", 0.0), ("b", -4.0), ("c", -1.0), ("d", 2.0), ("e", 1.5)]
    assert shaded(pieces, -4.0, color=False).plain == "a{{b}}{c}[[d]][e]"
    spans = shaded(pieces, -4.0, color=True)
    assert spans.plain == "abcde"
    colors = {spans.plain[s.start : s.end]: s.style.bgcolor.triplet for s in spans.spans}  # type: ignore[union-attr]
    assert set(colors) == set("bcde")
    assert all((c.blue > c.red) == (piece in "bc") for piece, c in colors.items())


def test_tokens_that_share_a_character_show_the_furthest_value() -> None:
    first, second = "é".encode()[:1], "é".encode()[1:]
    assert join_pieces([first, second], [1.0, -3.0]) == [("é", -3.0)]
    assert join_pieces([first, second], [-3.0, 3.0]) == [("é", 3.0)]
    assert join_pieces([first, second], [0.0, -3.0]) == [("é", -3.0)]


# --- a whole index


def test_an_index_of_signed_activations(
    tmp_path: Path,
    write_spec: Callable[..., Path],
    scan_inline: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two dozen units merged by the views: statistics and top contexts recomputed from the rows."""
    load = suites.load

    def load_signed(info: SaeInfo) -> SaeWeights:
        return replace(load(info), rule="abstopk", k=5, threshold=None)

    monkeypatch.setattr(suites, "load", load_signed)
    assert not scan_inline(write_spec(tmp_path)).failed
    con = queries.connect(str(tmp_path / "index"))
    statement = """
        SELECT a.sae, a.feature, d.document, d.source, d.row, c.start, a.position, a.activation,
            c.tokens[greatest(a.position - 14, 1) : a.position + 1]
        FROM activations AS a JOIN contexts AS c USING (context) JOIN documents AS d USING (document)
        ORDER BY ALL
    """
    fired: dict[tuple[str, int], list[tuple[Any, ...]]] = {}
    for sae, feature, *row in con.sql(statement).fetchall():
        fired.setdefault((sae, feature), []).append(tuple(row))
    assert min(value for found in fired.values() for *_, value, _ in found) < 0

    wanted, documents, tops = {}, {}, {}
    for key, found in fired.items():
        by_document: dict[int, list[tuple[Any, ...]]] = {}
        for row in found:
            by_document.setdefault(row[0], []).append(row)
        offers = []
        for document, own in by_document.items():
            values = [row[5] for row in own]
            best = max(own, key=lambda row: (abs(row[5]), row[5], [-place for place in row[3:5]]))
            offers.append(best)
            documents[key, document] = (len(own), best[5], float(sum(map(Fraction, values))))
        values = sorted((row[5] for row in found), key=abs)
        total = float(sum(map(Fraction, values)))
        p50 = abs(values[math.ceil(len(values) / 2) - 1])
        wanted[key] = (len(values), total / len(values), max(values, key=lambda v: (abs(v), v)), p50)
        tops[key], endings = [], set()
        for best in sorted(offers, key=lambda row: (-abs(row[5]), row[1:5])):
            if tuple(best[6]) not in endings:
                endings.add(tuple(best[6]))
                tops[key].append((best[0], best[3], best[4], best[5]))
    rows = con.sql("SELECT sae, feature, document, n_tokens, max, sum FROM document_features").fetchall()
    assert {((sae, feature), document): tuple(row) for sae, feature, document, *row in rows} == documents
    rows = con.sql(
        "SELECT sae, feature, n_tokens, mean_active, max, p50 FROM features WHERE n_tokens > 0"
    ).fetchall()
    assert {row[:2]: row[2:5] for row in rows} == {key: row[:3] for key, row in wanted.items()}
    for row in rows:
        median = wanted[row[:2]][3]
        assert not 2**-10 <= median < 2**14 or median / 1.045 <= row[5] <= median * 1.045
    found_top: dict[tuple[str, int], list[tuple[Any, ...]]] = {}
    for sae, feature, *row in con.sql(
        "SELECT t.sae, t.feature, c.document, c.start, t.position, t.activation FROM top_contexts AS t "
        "JOIN contexts AS c USING (context) ORDER BY t.sae, t.feature, t.rank"
    ).fetchall():
        found_top.setdefault((sae, feature), []).append(tuple(row))
    assert found_top == {key: top[:4] for key, top in tops.items()}
    sae = rows[0][0]
    table = feature_table(con, sae, "max", 5)
    highest_first = sorted((row for row in rows if row[0] == sae), key=lambda row: (-abs(row[4]), row[1]))
    assert [(row["feature"], row["max"]) for row in table] == [(row[1], row[4]) for row in highest_first[:5]]
