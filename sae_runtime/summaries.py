"""What a scan keeps of every feature: counts, exact sums, histogram, top contexts, stratified samples.

Invariant: a summary depends on the documents alone, in corpus order; neither the cut into chunks nor
the unit boundaries show. Chunks may cut a document (it stays "open" until its last context), never a
context. Partials of disjoint sets of documents merge: counts and sums add, maxima and lowest hashes
are taken again (queries/views.sql does it).
Trade-off: dense per-feature state (about 1.6 kB a feature at top_k 20, most of it the histogram and
the candidates) instead of a hash map, so that a chunk is a few linear passes over its sorted rows.
Those are separate functions without calls that stay calls: where one remains, numba counts references
of every array of a tuple around it (with that and other changes 1.5 M rows went from 50 ms to 22).

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
_EXACT = 134 - SQUARE_BITS // 2  # exponent field from which on no bit of a square is cut off
_ROWS = (1 << 40) - 1  # more than a chunk's rows


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
    start: (
        np.ndarray
    )  # int64 [width, k + 1]: window in the arena; inside `update` also of rows, see _gathered
    length: np.ndarray  # int32 [width, k + 1]


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
    """Windows of activations, in the order they came; some nobody refers to any more."""

    position: np.ndarray  # int32
    code: np.ndarray  # uint16
    used: int  # entries from here on are room for more


class DocumentRows(NamedTuple):
    """document_features of the documents that a chunk closed, sorted by feature, then document."""

    feature: np.ndarray  # int32
    document: np.ndarray  # int32, unit-local
    tokens: np.ndarray  # int32
    max: np.ndarray  # uint16
    high: np.ndarray  # int64
    low: np.ndarray  # uint64


class Groups(NamedTuple):
    """The (feature, context) pairs of a chunk, sorted."""

    indptr: np.ndarray  # int64 [width + 1]
    row: np.ndarray  # int32: of the context's maximum


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
        if _highest(sparse.code) >= _TOO_LARGE:
            token = int(sparse.token[int((sparse.code & np.uint16(0x7FFF)).argmax())])
            where = f"context {chunk.context[token]} of the unit, position {chunk.position[token]}"
            raise DataError(f"{where}: an activation of {self.sae} is 2^31 or more")
        width, contexts, k = len(sparse.indptr) - 1, len(chunk.document), self.sample_k
        begins = np.searchsorted(chunk.context, chunk.first + np.arange(contexts + 1))
        floors = np.zeros(width, np.int64)
        _count_values(sparse.indptr, sparse.code, _BINS, self.counts, floors)
        documents = int(np.count_nonzero(np.diff(chunk.document))) + 2  # and one that was open
        rows = _no_rows(min(sparse.rows + width, width * documents))
        best_rows, tail_rows = np.empty(len(rows.feature), np.int64), np.full(width, -1)
        groups = Groups(np.zeros(width + 1, np.int64), np.empty(min(sparse.rows, width * contexts), np.int32))
        n = _count_documents(
            sparse.indptr, sparse.token, sparse.code, chunk, begins, floors, self.counts, self.open,
            self.top.code[:, -1], rows, best_rows, tail_rows, groups,
        )  # fmt: skip
        _enter(
            sparse.indptr, sparse.token, sparse.code, chunk, begins, rows.feature[:n], best_rows, tail_rows,
            self.top,
        )  # fmt: skip
        fresh = _room(width, int(groups.indptr[-1]))
        _draw(
            sparse.indptr, sparse.token, sparse.code, chunk, begins, groups, self.seed, _no_strata(k),
            self.samples, fresh,
        )  # fmt: skip
        new = _room(width, len(self.samples.stratum) + int(fresh.indptr[-1]))
        self.samples = _cut(new, _merge(self.samples, fresh, k, new))
        start, length = self.top.start.reshape(-1), self.top.length.reshape(-1)
        self.top_arena = _gathered(start, length, sparse, chunk, self.top_arena)
        start, length = self.samples.start, self.samples.length
        self.sample_arena = _gathered(start, length, sparse, chunk, self.sample_arena)
        return DocumentRows(*(column[:n].copy() for column in rows))


def place_hash(corpus: str, source: str, row: int, start: int) -> int:
    """64-bit hash of a context's place: what makes samples independent of keys and of history."""
    text = f"{corpus}\0{source}\0{row}\0{start}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


_BINS = bin_table()
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _no_arena() -> Arena:
    return Arena(np.zeros(0, np.int32), np.zeros(0, np.uint16), 0)


@inlined
def _mix(value: np.uint64) -> np.uint64:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): a bijection that avalanches."""
    value ^= value >> np.uint64(30)
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    value *= np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@jit
def _ending(tokens: np.ndarray, base: int, position: int) -> tuple[np.uint64, np.uint64]:
    """128-bit hash of the up to ENDING tokens that end at `position` of the context that starts at `base`."""
    first = max(0, position - ENDING + 1)
    one, two = np.uint64(position - first), ~np.uint64(position - first)
    for i in range(first, position + 1):
        token = np.uint64(tokens[base + i]) + np.uint64(1)
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
def _highest(codes: np.ndarray) -> int:
    """The highest absolute value, as a code; 0 of none."""
    highest = np.uint16(0)
    for i in range(len(codes)):  # a loop over the codes themselves is not vectorised
        highest = max(highest, magnitude(codes[i]))
    return int(highest)


@jit
def _floor(codes: np.ndarray) -> int:
    """The lowest exponent field from which on values, and their squares, can be summed in 64 bits.

    Counted from that field, a squared mantissa has 16 bits and two more for each octave above it.
    """
    rows = len(codes)
    length = 0
    while rows >> length:
        length += 1
    return max((_highest(codes) >> 7) - (63 - 16 - length) // 2, _EXACT)


@jit
def _count_values(
    indptr: np.ndarray, code: np.ndarray, bins: np.ndarray, counts: Counts, floors: np.ndarray
) -> None:
    """Take rows into squares and histogram; `floors` [width] gets `_floor` of each feature."""
    for f in range(len(indptr) - 1):
        if indptr[f] == indptr[f + 1]:
            continue
        codes = code[indptr[f] : indptr[f + 1]]
        floor = _floor(codes)
        floors[f] = floor
        high, low = _squares(codes, floor)
        counts.squares_high[f], counts.squares_low[f] = add(
            counts.squares_high[f], counts.squares_low[f], high, low
        )
        for value in codes:
            counts.histogram[f, bins[magnitude(value)]] += np.uint32(1)


@inlined
def _squares(codes: np.ndarray, floor: int) -> tuple[np.int64, np.uint64]:
    """The sum of squares as (high, low) words."""
    total, small = np.int64(0), np.int64(0)
    for i in range(len(codes)):
        value = np.int64(codes[i])
        above = ((value >> 7) & 0xFF) - floor
        mantissa = (value & 0x7F) | 0x80
        inside = np.int64(above >= 0)  # no branch, to be vectorised
        total += (mantissa * mantissa * inside) << (2 * above * inside)
        small += 1 - inside
    high, low = shifted(np.uint64(total), 2 * (floor - 134) + SQUARE_BITS)
    if small > 0:
        for code in codes:
            if (np.int64(code) >> 7) & 0xFF < floor:
                size, power = parts(code)
                more_high, more_low = shifted(size * size, 2 * power + SQUARE_BITS)
                high, low = add(high, low, more_high, more_low)
    return high, low


@inlined
def _wide(total: int, shift: int) -> tuple[np.int64, np.uint64]:
    """total * 2^shift as (high, low) 64-bit words, for a signed total and 0 < shift < 128."""
    if shift < 64:
        return np.int64(total >> (64 - shift)), np.uint64(total) << np.uint64(shift)
    return np.int64(total << (shift - 64)), np.uint64(0)


@jit
def _span(
    token: np.ndarray, chunk: Chunk, begins: np.ndarray, first: int, last: int, row: int
) -> tuple[int, int]:
    """Rows of [first, last), all of one feature, within WINDOW of `row` and in its context."""
    t = token[row]
    context, position = chunk.context[t] - chunk.first, chunk.position[t]
    lo, hi = row, row + 1
    begin, end = begins[context], begins[context + 1]
    while lo > first and token[lo - 1] >= begin and chunk.position[token[lo - 1]] >= position - WINDOW:
        lo -= 1
    while hi < last and token[hi] < end and chunk.position[token[hi]] <= position + WINDOW:
        hi += 1
    return lo, hi


@jit
def _count_documents(
    indptr: np.ndarray, token: np.ndarray, code: np.ndarray, chunk: Chunk, begins: np.ndarray,
    floors: np.ndarray, counts: Counts, opened: Open, open_code: np.ndarray, rows: DocumentRows,
    best_rows: np.ndarray, tail_rows: np.ndarray, groups: Groups,
) -> int:  # fmt: skip
    """Go through rows by document and context: what is left of the counts, document rows, maxima's rows.

    A document's maximum may be of an earlier chunk, as `open_code` has it; its row is then -1.
    """
    out, group = 0, 0
    for f in range(len(indptr) - 1):
        row, end, floor = indptr[f], indptr[f + 1], floors[f]
        pending = opened.tokens[f] > 0
        context = chunk.context[token[row]] - chunk.first if row < end else 0
        while row < end or (pending and chunk.open_document != chunk.tail_document):
            # The next document with something to say of this feature: the open one comes first.
            document = chunk.open_document
            if row < end and not (pending and chunk.document[context] != chunk.open_document):
                document = chunk.document[context]
            n, high, low = np.int64(0), np.int64(0), np.uint64(0)
            best = np.uint16(0)  # as rank_of has it; every activation's is higher
            if pending:
                n, high, low = np.int64(opened.tokens[f]), opened.high[f], opened.low[f]
                best = rank_of(open_code[f])
                opened.tokens[f] = 0
                pending = False
            best_row, total = np.int64(-1), np.int64(0)  # total: signed, in units of the floor
            while row < end and chunk.document[context] == document:
                stop = begins[context + 1]
                before, highest = row, np.int64(0)
                while row < end and token[row] < stop:
                    value = np.int64(code[row])
                    above = ((value >> 7) & 0xFF) - floor
                    if above >= 0:
                        signed = ((value & 0x7F) | 0x80) << above
                        total += -signed if value >> 15 else signed
                    else:
                        mantissa, power = parts(code[row])
                        more_high, more_low = shifted(mantissa, power + SUM_BITS)
                        if value >> 15:
                            more_high, more_low = negated(more_high, more_low)
                        high, low = add(high, low, more_high, more_low)
                    # The highest rank, of equals the first row: one comparison, no branch.
                    highest = max(highest, (np.int64(rank_of(code[row])) << 40) | (_ROWS - row))
                    row += 1
                n += row - before
                rank, at = np.uint16(highest >> 40), _ROWS - (highest & _ROWS)
                groups.row[group] = at
                group += 1
                counts.contexts[f] += 1
                if rank > best:
                    best, best_row = rank, at
                if row < end:
                    context = chunk.context[token[row]] - chunk.first
            if total != 0:
                more_high, more_low = _wide(int(total), floor - 134 + SUM_BITS)
                high, low = add(high, low, more_high, more_low)
            if document == chunk.tail_document:
                opened.tokens[f], opened.high[f], opened.low[f] = n, high, low
                tail_rows[f] = best_row
                break
            counts.tokens[f] += n
            counts.documents[f] += 1
            counts.sum_high[f], counts.sum_low[f] = add(counts.sum_high[f], counts.sum_low[f], high, low)
            if best > rank_of(counts.max[f]):
                counts.max[f] = code_of(best)
            rows.feature[out], rows.document[out] = f, document
            rows.tokens[out], rows.max[out] = n, code_of(best)
            rows.high[out], rows.low[out] = high, low
            best_rows[out] = best_row
            out += 1
        groups.indptr[f + 1] = group
    return out


@jit
def _enter(
    indptr: np.ndarray, token: np.ndarray, code: np.ndarray, chunk: Chunk, begins: np.ndarray,
    feature: np.ndarray, best_rows: np.ndarray, tail_rows: np.ndarray, top: Top,
) -> None:  # fmt: skip
    """Offer the maxima of documents to the top; windows of new candidates are first row and -length."""
    width, k = top.code.shape[0], top.code.shape[1] - 1
    i = 0
    for f in range(width):
        closed = True
        while closed:
            closed = i < len(feature) and feature[i] == f
            row = best_rows[i] if closed else tail_rows[f]
            i += closed
            if row >= 0:
                top.code[f, k] = code[row]
                top.length[f, k] = 0
            n, size = top.n[f], magnitude(top.code[f, k])
            # What is not above the k-th never will be, for that only rises: needs no ending, no window.
            enters = n < k or size > magnitude(top.code[f, k - 1])
            if enters and row >= 0:
                context, position = chunk.context[token[row]], chunk.position[token[row]]
                one, two = _ending(chunk.tokens, chunk.offset[context - chunk.first], position)
                _set_slot(top, f, k, code[row], context, position, one, two, row, -1)
            if enters and closed:
                # It takes the place of the candidate of equal ending, if there is one, else of the last.
                hole = 0
                while hole < n and (
                    top.key[f, hole, 0] != top.key[f, k, 0] or top.key[f, hole, 1] != top.key[f, k, 1]
                ):
                    hole += 1
                if hole == n or size > magnitude(top.code[f, hole]):
                    if hole == n:
                        top.n[f] = min(n + 1, k)
                        hole = min(n, k - 1)
                    while hole > 0 and magnitude(top.code[f, hole - 1]) < size:
                        _copy_slot(top, f, hole - 1, hole)
                        hole -= 1
                    _copy_slot(top, f, k, hole)
            if closed:
                top.length[f, k] = 0
        for j in range(k + 1):
            if top.length[f, j] < 0:
                lo, hi = _span(token, chunk, begins, indptr[f], indptr[f + 1], top.start[f, j])
                top.start[f, j], top.length[f, j] = lo, lo - hi


class _Strata(NamedTuple):
    """Of one feature and chunk, by stratum: the contexts of lowest hash that old samples do not shut out."""

    population: np.ndarray  # int64 [strata]: contexts seen; 0 between features, what follows is of no meaning
    home: np.ndarray  # int64 [strata]: first row of the stratum's old samples, or -1
    full: np.ndarray  # bool [strata]: whether a hash must be below `limit`
    limit: np.ndarray  # uint64 [strata]
    n: np.ndarray  # int64 [strata]
    hash: np.ndarray  # uint64 [strata, k], ascending
    row: np.ndarray  # int64 [strata, k]: of the context's maximum


def _no_rows(n: int) -> DocumentRows:
    return DocumentRows(
        np.empty(n, np.int32), np.empty(n, np.int32), np.empty(n, np.int32), np.empty(n, np.uint16),
        np.empty(n, np.int64), np.empty(n, np.uint64),
    )  # fmt: skip


def _no_strata(k: int) -> _Strata:
    return _Strata(
        np.zeros(_STRATA, np.int64), np.zeros(_STRATA, np.int64), np.zeros(_STRATA, np.bool_),
        np.zeros(_STRATA, np.uint64), np.zeros(_STRATA, np.int64), np.zeros((_STRATA, k), np.uint64),
        np.zeros((_STRATA, k), np.int64),
    )  # fmt: skip


@jit
def _draw(
    indptr: np.ndarray, token: np.ndarray, code: np.ndarray, chunk: Chunk, begins: np.ndarray, groups: Groups,
    seed: np.uint64, strata: _Strata, old: Samples, fresh: Samples,
) -> None:  # fmt: skip
    """The chunk's own samples. What `old` has of a stratum shuts out what could not stay beside it.

    Their windows are given as first row and -length; populations of strata that `old` has are added there.
    """
    k = strata.hash.shape[1]
    out = 0
    for f in range(len(indptr) - 1):
        salt = _mix(seed + np.uint64(f) * _GOLDEN)
        lowest, highest = _STRATA, -1
        for group in range(groups.indptr[f], groups.indptr[f + 1]):
            row = np.int64(groups.row[group])
            s = exponent(code[row]) + 133
            hash = _mix(chunk.place[chunk.context[token[row]] - chunk.first] ^ salt)
            if strata.population[s] == 0:
                a, end = old.indptr[f], old.indptr[f + 1]
                while a < end and old.stratum[a] < s - 133:
                    a += k if a + k <= end and old.stratum[a + k - 1] < s - 133 else 1
                strata.home[s] = a if a < end and old.stratum[a] == s - 133 else -1
                strata.full[s] = a + k <= end and old.stratum[a + k - 1] == s - 133
                if strata.full[s]:
                    strata.limit[s] = old.hash[a + k - 1]
                strata.n[s] = 0
                lowest, highest = min(lowest, s), max(highest, s)
            strata.population[s] += 1
            if strata.full[s] and hash >= strata.limit[s]:
                continue
            j = min(strata.n[s], k - 1)
            strata.n[s] = j + 1
            while j > 0 and strata.hash[s, j - 1] > hash:
                strata.hash[s, j], strata.row[s, j] = strata.hash[s, j - 1], strata.row[s, j - 1]
                j -= 1
            strata.hash[s, j], strata.row[s, j] = hash, row
            if strata.n[s] == k:
                strata.full[s], strata.limit[s] = True, strata.hash[s, k - 1]
        for s in range(lowest, highest + 1):
            population = strata.population[s]
            if population == 0:
                continue
            strata.population[s] = 0
            if strata.home[s] >= 0:
                old.population[strata.home[s]] += population
                population = 0
            for j in range(strata.n[s]):
                row = strata.row[s, j]
                t = token[row]
                lo, hi = _span(token, chunk, begins, indptr[f], indptr[f + 1], row)
                fresh.stratum[out], fresh.hash[out] = s - 133, strata.hash[s, j]
                fresh.context[out], fresh.position[out] = chunk.context[t], chunk.position[t]
                fresh.code[out], fresh.population[out] = code[row], population
                fresh.start[out], fresh.length[out] = lo, lo - hi
                population = 0
                out += 1
        fresh.indptr[f + 1] = out


def _room(width: int, rows: int) -> Samples:
    """Space for so many samples."""
    return Samples(
        np.zeros(width + 1, np.int64), np.empty(rows, np.int16), np.empty(rows, np.uint64),
        np.empty(rows, np.int32), np.empty(rows, np.int32), np.empty(rows, np.uint16),
        np.empty(rows, np.int64), np.empty(rows, np.int64), np.empty(rows, np.int32),
    )  # fmt: skip


def _cut(s: Samples, n: int) -> Samples:
    """The first `n` samples, without a copy."""
    return Samples(
        s.indptr, s.stratum[:n], s.hash[:n], s.context[:n], s.position[:n], s.code[:n], s.population[:n],
        s.start[:n], s.length[:n],
    )  # fmt: skip


@inlined
def _copy_sample(source: Samples, i: int, target: Samples, out: int) -> None:
    target.stratum[out], target.hash[out], target.context[out] = (
        source.stratum[i],
        source.hash[i],
        source.context[i],
    )
    target.position[out], target.code[out] = source.position[i], source.code[i]
    target.population[out] = source.population[i]
    target.start[out], target.length[out] = source.start[i], source.length[i]


@jit
def _merge(old: Samples, fresh: Samples, k: int, new: Samples) -> int:
    """Per feature and stratum the k lowest hashes of both, the old one of two equal, populations added."""
    out = 0
    for f in range(len(old.indptr) - 1):
        a, a_end = old.indptr[f], old.indptr[f + 1]
        b, b_end = fresh.indptr[f], fresh.indptr[f + 1]
        while b < b_end:
            stratum = fresh.stratum[b]
            while a < a_end and old.stratum[a] < stratum:
                _copy_sample(old, a, new, out)
                a += 1
                out += 1
            first, population = out, fresh.population[b]
            if a < a_end and old.stratum[a] == stratum:
                population += old.population[a]
            while out < first + k:
                is_old = a < a_end and old.stratum[a] == stratum
                is_new = b < b_end and fresh.stratum[b] == stratum
                if is_old and not (is_new and fresh.hash[b] < old.hash[a]):
                    _copy_sample(old, a, new, out)
                    a += 1
                elif is_new:
                    _copy_sample(fresh, b, new, out)
                    b += 1
                else:
                    break
                new.population[out] = 0
                out += 1
            new.population[first] = population
            while a < a_end and old.stratum[a] == stratum:
                a += 1
            while b < b_end and fresh.stratum[b] == stratum:
                b += 1
        while a < a_end:
            _copy_sample(old, a, new, out)
            a += 1
            out += 1
        new.indptr[f + 1] = out
    return out


@jit
def _sizes(length: np.ndarray) -> tuple[int, int]:
    """Activations in windows that are in an arena, and in those that are to come."""
    live, more = 0, 0
    for n in length:
        live += max(n, 0)
        more -= min(n, 0)
    return live, more


@jit
def _move(start: np.ndarray, length: np.ndarray, old: Arena, new: Arena) -> int:
    """Copy the windows of an arena to another one; returns how much of that is used."""
    at = 0
    for e in range(len(length)):
        if length[e] > 0:
            first, start[e] = start[e], at
            for i in range(length[e]):
                new.position[at + i] = old.position[first + i]
                new.code[at + i] = old.code[first + i]
            at += length[e]
    return at


@jit
def _append(
    start: np.ndarray, length: np.ndarray, token: np.ndarray, code: np.ndarray, position: np.ndarray,
    arena: Arena,
) -> int:  # fmt: skip
    """Copy windows of rows to the end of an arena's used part; returns its new end."""
    at = arena.used
    for e in range(len(length)):
        if length[e] < 0:
            first, length[e] = start[e], -length[e]
            start[e] = at
            for i in range(length[e]):
                arena.position[at + i] = position[token[first + i]]
                arena.code[at + i] = code[first + i]
            at += length[e]
    return at


def _gathered(start: np.ndarray, length: np.ndarray, sparse: Sparse, chunk: Chunk, arena: Arena) -> Arena:
    """The arena with windows still among a chunk's rows added; they have their first row and -length.

    Windows stay where they are until room runs out; then those still referred to move to a new arena.
    """
    live, more = _sizes(length)
    if arena.used + more > len(arena.position):
        room = (live + more) * 3 // 2  # memory that is not written to yet costs nothing
        new = Arena(np.empty(room, np.int32), np.empty(room, np.uint16), 0)
        arena = new._replace(used=_move(start, length, arena, new))
    return arena._replace(used=_append(start, length, sparse.token, sparse.code, chunk.position, arena))
