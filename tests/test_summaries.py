"""The streamed summaries against their definition, written out slowly over whole documents."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_runtime.bfloat import fixed_to_float, histogram_edges, to_float
from sae_runtime.encode import Sparse
from sae_runtime.errors import DataError
from sae_runtime.summaries import ENDING, WINDOW, Chunk, Summary, place_hash

WIDTH, TOP_K, SAMPLE_K = 5, 3, 2
VALUES = [3 * 2**-12, 0.5, 0.75, 1.0, 1.5, 3.0, 3.015625, 100.0, 19968.0]  # exact in bfloat16


@dataclass
class Context:
    document: int
    start: int
    tokens: list[int]
    counted: list[bool]
    acts: np.ndarray  # float32 [tokens, WIDTH], zero where inactive or not counted


def make_contexts(rng: np.random.Generator, documents: int, vocabulary: int) -> list[Context]:
    contexts = []
    for document in range(documents):
        start = 0
        for _ in range(rng.integers(0, 5)):
            n = int(rng.integers(1, 90))
            counted = rng.random(n) < 0.9
            acts = rng.choice(VALUES, size=(n, WIDTH)).astype(np.float32)
            density = np.array([0.0, 0.02, 0.2, 0.5, 1.0])
            acts[(rng.random((n, WIDTH)) >= density) | ~counted[:, None]] = 0
            tokens = rng.integers(0, vocabulary, n).tolist()
            contexts.append(Context(document, start, tokens, counted.tolist(), acts))
            start += n
    return contexts


def run(contexts: list[Context], cuts: list[int]) -> tuple[Summary, list[tuple]]:
    """Feed the contexts in chunks cut before the given context numbers."""
    summary = Summary.empty("suite/sae", WIDTH, TOP_K, SAMPLE_K)
    rows = []
    edges = sorted({0, len(contexts), *(c for c in cuts if 0 < c < len(contexts))})
    for first, last in itertools.pairwise(edges):
        part = contexts[first:last]
        before = contexts[first - 1].document if first else -1
        after = contexts[last].document if last < len(contexts) else -1
        index = [(first + c, p) for c, ctx in enumerate(part) for p, keep in enumerate(ctx.counted) if keep]
        acts = np.concatenate([ctx.acts[np.array(ctx.counted)] for ctx in part])
        feature, token = np.nonzero(acts.T)
        codes = (acts.T[feature, token].view(np.uint32) >> 16).astype(np.uint16)
        indptr = np.zeros(WIDTH + 1, np.int64)
        indptr[1:] = np.cumsum(np.bincount(feature, minlength=WIDTH))
        lengths = [len(ctx.tokens) for ctx in part]
        chunk = Chunk(
            np.array([c for c, _ in index], np.int32),
            np.array([p for _, p in index], np.int32),
            first,
            np.array([ctx.document for ctx in part], np.int32),
            np.array([place_hash("c", "s", ctx.document, ctx.start) for ctx in part], np.uint64),
            np.array([t for ctx in part for t in ctx.tokens], np.int32),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            before if before == part[0].document else -1,
            after if after == part[-1].document else -1,
        )
        closed = summary.update(Sparse(indptr, token.astype(np.int32), codes), chunk)
        sums = fixed_to_float(closed.high, closed.low, 64)
        maxima = to_float(closed.max)
        for i in range(len(closed.feature)):
            rows.append(
                (
                    int(closed.feature[i]),
                    int(closed.document[i]),
                    int(closed.tokens[i]),
                    float(maxima[i]),
                    float(sums[i]),
                )
            )
    return summary, sorted(rows)


def window(ctx: Context, f: int, position: int) -> list[tuple[int, float]]:
    near = range(max(0, position - WINDOW), min(len(ctx.tokens), position + WINDOW + 1))
    return [(p, float(ctx.acts[p, f])) for p in near if ctx.acts[p, f] > 0]


def expected_top(contexts: list[Context], f: int) -> list[tuple]:
    offers = {}
    for c, ctx in enumerate(contexts):
        best = float(ctx.acts[:, f].max())
        if best > 0 and best > offers.get(ctx.document, (0,))[0]:
            offers[ctx.document] = (best, c, int(ctx.acts[:, f].argmax()))
    chosen, endings = [], set()
    for best, c, position in sorted(offers.values(), key=lambda o: (-o[0], o[1])):
        ending = tuple(contexts[c].tokens[max(0, position - ENDING + 1) : position + 1])
        if ending not in endings:
            endings.add(ending)
            chosen.append((best, c, position, window(contexts[c], f, position)))
    return chosen[:TOP_K]


def actual_top(summary: Summary, f: int) -> list[tuple]:
    top, arena = summary.top, summary.top_arena
    result = []
    for j in range(top.n[f]):
        at = slice(top.start[f, j], top.start[f, j] + top.length[f, j])
        near = list(zip(arena.position[at].tolist(), to_float(arena.code[at]).tolist(), strict=True))
        value = float(to_float(top.code[f, j : j + 1])[0])
        result.append((value, int(top.context[f, j]), int(top.position[f, j]), near))
    return result


def strata(contexts: list[Context], f: int) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for c, ctx in enumerate(contexts):
        best = float(ctx.acts[:, f].max())
        if best > 0:
            found.setdefault(math.floor(math.log2(best)), []).append(c)
    return found


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    documents=st.integers(1, 12),
    vocabulary=st.sampled_from([1, 2, 50]),
    cuts=st.lists(st.integers(1, 40), max_size=8),
)
def test_summaries_equal_the_definition_however_the_chunks_are_cut(seed, documents, vocabulary, cuts):
    contexts = make_contexts(np.random.default_rng(seed), documents, vocabulary)
    if not any(any(ctx.counted) for ctx in contexts):
        return
    summary, rows = run(contexts, cuts)
    counts = summary.counts
    expected_rows = []
    for f in range(WIDTH):
        active = np.concatenate([ctx.acts[:, f][ctx.acts[:, f] > 0] for ctx in contexts]).astype(np.float64)
        assert counts.tokens[f] == len(active)
        assert counts.contexts[f] == sum((ctx.acts[:, f] > 0).any() for ctx in contexts)
        by_document: dict[int, list[float]] = {}
        for ctx in contexts:
            by_document.setdefault(ctx.document, []).extend(ctx.acts[:, f][ctx.acts[:, f] > 0].tolist())
        by_document = {d: v for d, v in by_document.items() if v}
        assert counts.documents[f] == len(by_document)
        expected_rows += [(f, d, len(v), max(v), math.fsum(v)) for d, v in by_document.items()]
        total = (int(counts.sum_high[f]) << 64) + int(counts.sum_low[f])
        assert Fraction(total, 1 << 64) == sum((Fraction(float(v)) for v in active), Fraction(0))
        squares = (int(counts.squares_high[f]) << 64) + int(counts.squares_low[f])
        assert Fraction(squares, 1 << 56) == sum((Fraction(float(v)) ** 2 for v in active), Fraction(0))
        bins = np.searchsorted(histogram_edges(), active, side="right")
        assert (counts.histogram[f] == np.bincount(bins, minlength=194)).all()
        assert float(to_float(counts.max[f : f + 1])[0]) == (active.max() if len(active) else 0)
        assert actual_top(summary, f) == expected_top(contexts, f)
        check_samples(summary, contexts, f)
    assert rows == sorted(expected_rows)


def check_samples(summary: Summary, contexts: list[Context], f: int) -> None:
    samples, arena = summary.samples, summary.sample_arena
    at = range(samples.indptr[f], samples.indptr[f + 1])
    wanted = strata(contexts, f)
    assert sorted({int(samples.stratum[e]) for e in at}) == sorted(wanted)
    for stratum, members in wanted.items():
        entries = [e for e in at if samples.stratum[e] == stratum]
        assert len(entries) == min(SAMPLE_K, len(members))
        assert [int(samples.population[e]) for e in entries] == [len(members)] + [0] * (len(entries) - 1)
        hashes = [int(samples.hash[e]) for e in entries]
        assert hashes == sorted(hashes)
        for e in entries:
            ctx = contexts[samples.context[e]]
            assert samples.context[e] in members
            assert samples.position[e] == ctx.acts[:, f].argmax()
            near = slice(samples.start[e], samples.start[e] + samples.length[e])
            pairs = list(zip(arena.position[near].tolist(), to_float(arena.code[near]).tolist(), strict=True))
            assert pairs == window(ctx, f, int(samples.position[e]))


def test_the_sample_is_the_same_for_every_cut_and_differs_between_features():
    contexts = make_contexts(np.random.default_rng(7), 40, 50)
    whole, _ = run(contexts, [])
    cut, _ = run(contexts, list(range(1, len(contexts), 3)))
    for field in ("indptr", "stratum", "hash", "context", "position", "code", "population", "length"):
        assert (getattr(whole.samples, field) == getattr(cut.samples, field)).all()
    chosen = [
        set(whole.samples.context[whole.samples.indptr[f] : whole.samples.indptr[f + 1]].tolist())
        for f in (3, 4)
    ]
    assert chosen[0] != chosen[1]


def test_each_context_is_sampled_equally_often():
    """Bottom-k by hash is uniform: over many SAE names every one of 40 contexts comes up as often."""
    hits = np.zeros(40)
    for name in range(400):
        summary = Summary.empty(f"suite/{name}", WIDTH, TOP_K, SAMPLE_K)
        indptr = np.arange(WIDTH + 1, dtype=np.int64) * 40
        token = np.tile(np.arange(40, dtype=np.int32), WIDTH)
        code = np.full(40 * WIDTH, 0x3F80, np.uint16)
        index = np.arange(40, dtype=np.int32)
        places = np.array([place_hash("c", "s", d, 0) for d in range(40)], np.uint64)
        chunk = Chunk(index, index * 0, 0, index, places, index, np.arange(41, dtype=np.int64), -1, -1)
        summary.update(Sparse(indptr, token, code), chunk)
        np.add.at(hits, summary.samples.context, 1)
    expected = 400 * WIDTH * SAMPLE_K / 40
    chi2 = ((hits - expected) ** 2 / expected).sum()
    assert chi2 < 85  # 39 degrees of freedom: beyond the 99.99th percentile


def test_an_activation_whose_square_would_not_fit_the_sums_is_an_error():
    summary = Summary.empty("s", 1, 1, 1)
    one = np.zeros(1, np.int32)
    chunk = Chunk(one, one, 0, one, np.zeros(1, np.uint64), one, np.array([0, 1], np.int64), -1, -1)
    with pytest.raises(DataError, match=r"2\^31 or more"):
        summary.update(Sparse(np.array([0, 1]), one, np.array([0x4F00], np.uint16)), chunk)
