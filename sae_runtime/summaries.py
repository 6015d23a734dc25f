"""What a scan keeps of every feature: counts, exact sums, histogram, top contexts, stratified samples.

Invariant: a summary depends on the documents alone, in corpus order; neither the cut into chunks nor
the unit boundaries show. Chunks may cut a document (it stays "open" until its last context), never a
context. Partials of disjoint sets of documents merge: counts and sums add, maxima and lowest hashes
are taken again (queries/views.sql does it).
Trade-off: dense per-feature state (about 1.6 kB a feature at top_k 20, most of it the histogram and
the candidates) instead of a hash map, so that a chunk is one linear pass over its sorted rows.

Top contexts: each document offers its highest activation; of offers whose last 16 tokens are equal
only the highest stays; then the k highest; ties go to the earlier in corpus order. Samples: within a
stratum floor(log2(context maximum)) the k contexts of lowest hash, which is a uniform sample.

"Highest" is by absolute value, for signed architectures: within a document or context the positive of
two equal ones, then the first; between documents +v and -v tie. Values keep their sign, sums are of
signed values, histograms and strata of absolute ones.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sae_runtime.bfloat import (
    BINS,
    SQUARE_BITS,
    SUM_BITS,
    add,
    bin_table,
    code_of,
    exponent,
    magnitude,
    negated,
    parts,
    rank_of,
    shifted,
)
from sae_runtime.encode import Sparse
from sae_runtime.errors import DataError
from sae_runtime.jit import inlined, jit

WINDOW = 64  # positions on either side of the maximum whose activations are kept
ENDING = 16  # tokens that must differ for two documents to be both among the top
_STRATA = 262  # bfloat16 exponents, -133 .. 128
_TOO_LARGE = 0x4F00  # code of 2^31, whose square still fits the sums


class Chunk(NamedTuple):
    """Consecutive whole contexts of a unit, and their counted tokens."""

    context: np.ndarray  # int32 [tokens]: context of each counted token, unit-local, ascending
    position: np.ndarray  # int32 [tokens]: its index into the context's tokens
    first: int  # unit-local index of the chunk's first context
    document: np.ndarray  # int32 [contexts]: unit-local document of each context
    place: np.ndarray  # uint64 [contexts]: hash of the context's place in the corpus
    tokens: np.ndarray  # int32: token ids of all contexts, as run
    offset: np.ndarray  # int64 [contexts + 1]: where each context's tokens start in `tokens`
    open_document: int  # document continued from the chunk before, or -1
    tail_document: int  # document that goes on in the next chunk, or -1


class Counts(NamedTuple):
    """Additive statistics per feature; `squares` and `sum` are 128-bit fixed point (see bfloat)."""

    tokens: np.ndarray  # int64 [width]
    contexts: np.ndarray  # int64 [width]
    documents: np.ndarray  # int64 [width]
    sum_high: np.ndarray  # int64 [width]
    sum_low: np.ndarray  # uint64 [width]
    squares_high: np.ndarray  # int64 [width]
    squares_low: np.ndarray  # uint64 [width]
    max: np.ndarray  # uint16 [width], bfloat16 codes of what is highest by absolute value
    histogram: np.ndarray  # uint32 [width, BINS]


class Top(NamedTuple):
    """Per feature up to k candidates, highest first; slot k holds the open document's best so far."""

    n: np.ndarray  # int32 [width]
    code: np.ndarray  # uint16 [width, k + 1]
    context: np.ndarray  # int32 [width, k + 1], unit-local
    position: np.ndarray  # int32 [width, k + 1]
    key: np.ndarray  # uint64 [width, k + 1, 2]: hash of the last tokens
    start: np.ndarray  # int64 [width, k + 1]: window in the arena
    length: np.ndarray  # int32 [width, k + 1]: its length, -1 when still to be gathered


class Open(NamedTuple):
    """The open document's share of document_features."""

    tokens: np.ndarray  # int32 [width]
    high: np.ndarray  # int64 [width]
    low: np.ndarray  # uint64 [width]


class Samples(NamedTuple):
    """Sampled contexts, sorted by feature, stratum, hash; windows lie in an arena like Top's."""

    indptr: np.ndarray  # int64 [width + 1]
    stratum: np.ndarray  # int16
    hash: np.ndarray  # uint64
    context: np.ndarray  # int32, unit-local
    position: np.ndarray  # int32
    code: np.ndarray  # uint16
    population: np.ndarray  # int64: contexts of the stratum, on its first row; 0 on the others
    start: np.ndarray  # int64
    length: np.ndarray  # int32


class Arena(NamedTuple):
    """Windows of activations, one after the other."""

    position: np.ndarray  # int32
    code: np.ndarray  # uint16


class DocumentRows(NamedTuple):
    """document_features of the documents that a chunk closed, sorted by feature, then document."""

    feature: np.ndarray  # int32
    document: np.ndarray  # int32, unit-local
    tokens: np.ndarray  # int32
    max: np.ndarray  # uint16
    high: np.ndarray  # int64
    low: np.ndarray  # uint64


@dataclass
class Summary:
    """The running summary of one SAE over one unit. Feed chunks in order, then read the fields."""

    counts: Counts
    top: Top
    top_arena: Arena
    open: Open
    samples: Samples
    sample_arena: Arena
    sae: str
    seed: np.uint64
    sample_k: int

    @classmethod
    def empty(cls, sae: str, width: int, top_k: int, sample_k: int) -> Summary:
        """A summary of nothing for the SAE of id `sae`."""
        long, slots = (width,), (width, top_k + 1)
        return cls(
            Counts(
                np.zeros(long, np.int64),
                np.zeros(long, np.int64),
                np.zeros(long, np.int64),
                np.zeros(long, np.int64),
                np.zeros(long, np.uint64),
                np.zeros(long, np.int64),
                np.zeros(long, np.uint64),
                np.zeros(long, np.uint16),
                np.zeros((width, BINS), np.uint32),
            ),
            Top(
                np.zeros(long, np.int32),
                np.zeros(slots, np.uint16),
                np.zeros(slots, np.int32),
                np.zeros(slots, np.int32),
                np.zeros((*slots, 2), np.uint64),
                np.zeros(slots, np.int64),
                np.zeros(slots, np.int32),
            ),
            _no_arena(),
            Open(np.zeros(long, np.int32), np.zeros(long, np.int64), np.zeros(long, np.uint64)),
            Samples(
                np.zeros(width + 1, np.int64),
                np.zeros(0, np.int16),
                np.zeros(0, np.uint64),
                np.zeros(0, np.int32),
                np.zeros(0, np.int32),
                np.zeros(0, np.uint16),
                np.zeros(0, np.int64),
                np.zeros(0, np.int64),
                np.zeros(0, np.int32),
            ),
            _no_arena(),
            sae,
            np.uint64(int.from_bytes(hashlib.blake2b(sae.encode(), digest_size=8).digest(), "little")),
            sample_k,
        )

    def update(self, sparse: Sparse, chunk: Chunk) -> DocumentRows:
        """Take in a chunk's activations; `sparse.token` indexes the chunk's counted tokens.

        Returns the rows of documents that ended. Raises DataError for an absolute value of 2^31 or more.
        """
        size = sparse.code & np.uint16(0x7FFF)
        if sparse.rows and int(size.max()) >= _TOO_LARGE:
            token = int(sparse.token[int(size.argmax())])
            where = f"context {chunk.context[token]} of the unit, position {chunk.position[token]}"
            raise DataError(f"{where}: an activation of {self.sae} is 2^31 or more")
        groups, rows = _count(
            sparse.indptr, sparse.token, sparse.code, chunk, _BINS, self.counts, self.top, self.open
        )
        self.top_arena = _gather_top(
            sparse.indptr, sparse.token, sparse.code, chunk, self.top, self.top_arena
        )
        self.samples, self.sample_arena = _sample(
            sparse.indptr,
            sparse.token,
            sparse.code,
            chunk,
            self.samples,
            self.sample_arena,
            self.seed,
            self.sample_k,
            groups,
        )
        return DocumentRows(*rows)


def place_hash(corpus: str, source: str, row: int, start: int) -> int:
    """64-bit hash of a context's place: what makes samples independent of keys and of history."""
    text = f"{corpus}\0{source}\0{row}\0{start}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


_BINS = bin_table()
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _no_arena() -> Arena:
    return Arena(np.zeros(0, np.int32), np.zeros(0, np.uint16))


@inlined
def _mix(value: np.uint64) -> np.uint64:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): a bijection that avalanches."""
    value ^= value >> np.uint64(30)
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    value *= np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@jit
def _ending(chunk: Chunk, context: int, position: int) -> tuple[np.uint64, np.uint64]:
    """128-bit hash of the up to ENDING tokens of a context that end at `position`."""
    base = chunk.offset[context - chunk.first]
    first = max(0, position - ENDING + 1)
    one, two = np.uint64(position - first), ~np.uint64(position - first)
    for i in range(first, position + 1):
        token = np.uint64(chunk.tokens[base + i]) + np.uint64(1)
        one = _mix(one + token * _GOLDEN)
        two = _mix((two ^ token) + _GOLDEN)
    return one, two


@jit
def _set_slot(
    top: Top, f: int, j: int, code: np.uint16, context: int, position: int, one: np.uint64, two: np.uint64,
    start: int, length: int,
) -> None:  # fmt: skip
    top.code[f, j] = code
    top.context[f, j] = context
    top.position[f, j] = position
    top.key[f, j, 0] = one
    top.key[f, j, 1] = two
    top.start[f, j] = start
    top.length[f, j] = length


@jit
def _copy_slot(top: Top, f: int, source: int, target: int) -> None:
    _set_slot(
        top, f, target, top.code[f, source], top.context[f, source], top.position[f, source],
        top.key[f, source, 0], top.key[f, source, 1], top.start[f, source], top.length[f, source],
    )  # fmt: skip


@jit
def _offer(top: Top, f: int) -> None:
    """Let the candidate in the last slot take its place among the top, if it has one."""
    k = top.code.shape[1] - 1
    n, size = top.n[f], magnitude(top.code[f, k])
    if n == k and size <= magnitude(top.code[f, k - 1]):
        return
    for j in range(n):
        if top.key[f, j, 0] == top.key[f, k, 0] and top.key[f, j, 1] == top.key[f, k, 1]:
            if size <= magnitude(top.code[f, j]):
                return
            for i in range(j, n - 1):
                _copy_slot(top, f, i + 1, i)
            n -= 1
            break
    j = min(n, k - 1)
    while j > 0 and magnitude(top.code[f, j - 1]) < size:
        _copy_slot(top, f, j - 1, j)
        j -= 1
    _copy_slot(top, f, k, j)
    top.n[f] = min(n + 1, k)


@jit
def _count(
    indptr: np.ndarray, token: np.ndarray, code: np.ndarray, chunk: Chunk, bins: np.ndarray,
    counts: Counts, top: Top, opened: Open,
) -> tuple:  # fmt: skip
    """One pass over a chunk's rows: counts, top candidates, document rows. Also (feature, context) pairs."""
    width = len(indptr) - 1
    k = top.code.shape[1] - 1
    most = len(token) + width
    out_feature, out_document = np.empty(most, np.int32), np.empty(most, np.int32)
    out_tokens, out_max = np.empty(most, np.int32), np.empty(most, np.uint16)
    out_high, out_low = np.empty(most, np.int64), np.empty(most, np.uint64)
    out, groups = 0, 0
    for f in range(width):
        row, end = indptr[f], indptr[f + 1]
        pending = opened.tokens[f] > 0
        if row == end and not pending:
            continue
        while row < end or (pending and chunk.open_document != chunk.tail_document):
            # The next document with something to say of this feature: the open one comes first.
            if row < end:
                document = chunk.document[chunk.context[token[row]] - chunk.first]
            if pending and (row == end or document != chunk.open_document):
                document = chunk.open_document
            n, high, low = 0, np.int64(0), np.uint64(0)
            best = np.uint16(0)  # as rank_of has it; every activation's is higher
            if pending:
                n, high, low = opened.tokens[f], opened.high[f], opened.low[f]
                best = rank_of(top.code[f, k])
                opened.tokens[f] = 0
                pending = False
            better = False
            best_context, best_position = 0, 0
            while row < end and chunk.document[chunk.context[token[row]] - chunk.first] == document:
                context = chunk.context[token[row]]
                groups += 1
                counts.contexts[f] += 1
                while row < end and chunk.context[token[row]] == context:
                    value = code[row]
                    mantissa, power = parts(value)
                    more_high, more_low = shifted(mantissa, power + SUM_BITS)
                    if value >> np.uint16(15):
                        more_high, more_low = negated(more_high, more_low)
                    high, low = add(high, low, more_high, more_low)
                    more_high, more_low = shifted(mantissa * mantissa, 2 * power + SQUARE_BITS)
                    counts.squares_high[f], counts.squares_low[f] = add(
                        counts.squares_high[f], counts.squares_low[f], more_high, more_low
                    )
                    counts.histogram[f, bins[magnitude(value)]] += np.uint32(1)
                    if rank_of(value) > best:
                        best, better = rank_of(value), True
                        best_context, best_position = context, chunk.position[token[row]]
                    n += 1
                    row += 1
            if better:
                one, two = _ending(chunk, best_context, best_position)
                _set_slot(top, f, k, code_of(best), best_context, best_position, one, two, 0, -1)
            if document == chunk.tail_document:
                opened.tokens[f], opened.high[f], opened.low[f] = n, high, low
                break
            _offer(top, f)
            top.length[f, k] = 0
            counts.tokens[f] += n
            counts.documents[f] += 1
            counts.sum_high[f], counts.sum_low[f] = add(counts.sum_high[f], counts.sum_low[f], high, low)
            if best > rank_of(counts.max[f]):
                counts.max[f] = code_of(best)
            out_feature[out], out_document[out] = f, document
            out_tokens[out], out_max[out] = n, code_of(best)
            out_high[out], out_low[out] = high, low
            out += 1
    return groups, (
        out_feature[:out].copy(), out_document[:out].copy(), out_tokens[:out].copy(),
        out_max[:out].copy(), out_high[:out].copy(), out_low[:out].copy(),
    )  # fmt: skip


@jit
def _seek(lo: int, hi: int, token: np.ndarray, chunk: Chunk, context: int, position: int) -> int:
    """First row of [lo, hi) at or after (context, position)."""
    while lo < hi:
        mid = (lo + hi) // 2
        t = token[mid]
        c = chunk.context[t]
        if c < context or (c == context and chunk.position[t] < position):
            lo = mid + 1
        else:
            hi = mid
    return lo


@jit
def _window(
    indptr: np.ndarray, token: np.ndarray, chunk: Chunk, f: int, context: int, position: int
) -> tuple:
    """Rows of feature `f` within WINDOW of a position, as (first, last + 1)."""
    lo = _seek(indptr[f], indptr[f + 1], token, chunk, context, position - WINDOW)
    return lo, _seek(lo, indptr[f + 1], token, chunk, context, position + WINDOW + 1)


@jit
def _gather_top(
    indptr: np.ndarray, token: np.ndarray, code: np.ndarray, chunk: Chunk, top: Top, old: Arena
) -> Arena:
    """A fresh arena with the windows of all candidates: the old ones copied, the new ones gathered."""
    width, slots = top.code.shape
    total = 0
    for f in range(width):
        top.length[f, top.n[f] : slots - 1] = 0
        for j in range(slots):
            if top.length[f, j] < 0:
                lo, hi = _window(indptr, token, chunk, f, top.context[f, j], top.position[f, j])
                total += hi - lo
            else:
                total += top.length[f, j]
    new = Arena(np.empty(total, np.int32), np.empty(total, np.uint16))
    at = 0
    for f in range(width):
        for j in range(slots):
            first = at
            if top.length[f, j] < 0:
                lo, hi = _window(indptr, token, chunk, f, top.context[f, j], top.position[f, j])
                for row in range(lo, hi):
                    new.position[at] = chunk.position[token[row]]
                    new.code[at] = code[row]
                    at += 1
            else:
                for i in range(top.start[f, j], top.start[f, j] + top.length[f, j]):
                    new.position[at] = old.position[i]
                    new.code[at] = old.code[i]
                    at += 1
            top.start[f, j] = first
            top.length[f, j] = at - first
    return new


@jit
def _sample(
    indptr: np.ndarray, token: np.ndarray, code: np.ndarray, chunk: Chunk, old: Samples, arena: Arena,
    seed: np.uint64, k: int, groups: int,
) -> tuple:  # fmt: skip
    """The samples with a chunk's contexts taken in."""
    width = len(indptr) - 1
    most = len(old.stratum) + groups
    new = Samples(
        np.zeros(width + 1, np.int64), np.empty(most, np.int16), np.empty(most, np.uint64),
        np.empty(most, np.int32), np.empty(most, np.int32), np.empty(most, np.uint16),
        np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most, np.int32),
    )  # fmt: skip
    contexts = len(chunk.document)
    hashes, strata = np.empty(contexts, np.uint64), np.empty(contexts, np.int16)
    found, positions = np.empty(contexts, np.int32), np.empty(contexts, np.int32)
    codes = np.empty(contexts, np.uint16)
    population = np.zeros(_STRATA, np.int64)
    out = 0
    for f in range(width):
        row, end = indptr[f], indptr[f + 1]
        n = 0
        salt = _mix(seed + np.uint64(f) * _GOLDEN)
        lowest, highest = 999, -999
        while row < end:
            context = chunk.context[token[row]]
            best, position = np.uint16(0), 0
            while row < end and chunk.context[token[row]] == context:
                if rank_of(code[row]) > best:
                    best, position = rank_of(code[row]), chunk.position[token[row]]
                row += 1
            found[n], positions[n], codes[n] = context, position, code_of(best)
            hashes[n] = _mix(chunk.place[context - chunk.first] ^ salt)
            strata[n] = exponent(codes[n])
            population[strata[n] + 133] += 1
            lowest, highest = min(lowest, strata[n]), max(highest, strata[n])
            n += 1
        order = np.argsort(hashes[:n])
        a, stop = old.indptr[f], old.indptr[f + 1]
        if stop > a:
            lowest, highest = min(lowest, old.stratum[a]), max(highest, old.stratum[stop - 1])
        for stratum in range(lowest, highest + 1):
            before = 0
            if a < stop and old.stratum[a] == stratum:
                before = old.population[a]
            if before + population[stratum + 133] == 0:
                continue
            taken, b = 0, 0
            while taken < k:
                while b < n and strata[order[b]] != stratum:
                    b += 1
                is_old = a < stop and old.stratum[a] == stratum
                if not is_old and b == n:
                    break
                if is_old and (b == n or old.hash[a] <= hashes[order[b]]):
                    new.hash[out], new.context[out], new.position[out] = (
                        old.hash[a],
                        old.context[a],
                        old.position[a],
                    )
                    new.code[out], new.start[out], new.length[out] = old.code[a], old.start[a], old.length[a]
                    a += 1
                else:
                    i = order[b]
                    new.hash[out], new.context[out], new.position[out] = hashes[i], found[i], positions[i]
                    new.code[out], new.start[out], new.length[out] = codes[i], 0, -1
                    b += 1
                new.stratum[out] = stratum
                new.population[out] = before + population[stratum + 133] if taken == 0 else 0
                taken += 1
                out += 1
            while a < stop and old.stratum[a] == stratum:
                a += 1
            population[stratum + 133] = 0
        new.indptr[f + 1] = out
    kept = Samples(
        new.indptr, new.stratum[:out].copy(), new.hash[:out].copy(), new.context[:out].copy(),
        new.position[:out].copy(), new.code[:out].copy(), new.population[:out].copy(),
        new.start[:out].copy(), new.length[:out].copy(),
    )  # fmt: skip
    return kept, _gather_samples(indptr, token, code, chunk, kept, arena)


@jit
def _gather_samples(
    indptr: np.ndarray, token: np.ndarray, code: np.ndarray, chunk: Chunk, samples: Samples, old: Arena
) -> Arena:
    total = 0
    for f in range(len(samples.indptr) - 1):
        for e in range(samples.indptr[f], samples.indptr[f + 1]):
            if samples.length[e] < 0:
                lo, hi = _window(indptr, token, chunk, f, samples.context[e], samples.position[e])
                total += hi - lo
            else:
                total += samples.length[e]
    new = Arena(np.empty(total, np.int32), np.empty(total, np.uint16))
    at = 0
    for f in range(len(samples.indptr) - 1):
        for e in range(samples.indptr[f], samples.indptr[f + 1]):
            first = at
            if samples.length[e] < 0:
                lo, hi = _window(indptr, token, chunk, f, samples.context[e], samples.position[e])
                for row in range(lo, hi):
                    new.position[at] = chunk.position[token[row]]
                    new.code[at] = code[row]
                    at += 1
            else:
                for i in range(samples.start[e], samples.start[e] + samples.length[e]):
                    new.position[at] = old.position[i]
                    new.code[at] = old.code[i]
                    at += 1
            samples.start[e] = first
            samples.length[e] = at - first
    return new
