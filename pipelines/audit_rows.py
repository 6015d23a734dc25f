"""Checks of what one data file says: order, keys, values. Rows come batch by batch and are not kept.

Invariant: what passes is sorted as pipelines/schema.py promises, has keys of its own units and of SAEs that
are declared, no row twice, and activations that a scan can have written: bfloat16, finite, not zero.
Memory: one batch, and eight bytes a feature of each SAE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.schema import LOCAL_BITS, NEAR, WINDOW

Said = Iterator[tuple[str, str]]  # (check, detail) of faults

ORDER, KEYS, VALUES, COUNTS, WINDOWS = "order", "keys", "values", "counts", "windows"
CHECKS = {
    "activations": (ORDER, KEYS, VALUES),
    "document_features": (ORDER, KEYS, VALUES, COUNTS),
    "by_document": (ORDER, KEYS, VALUES, COUNTS),
    "features": (ORDER, KEYS, VALUES, COUNTS),
    "top_contexts": (ORDER, KEYS, VALUES, COUNTS, WINDOWS),
    "sampled_contexts": (ORDER, KEYS, VALUES, COUNTS, WINDOWS),
    "sampled_merged": (ORDER, KEYS, VALUES, COUNTS, WINDOWS),
    "pages": (ORDER, KEYS, VALUES, COUNTS, WINDOWS),
    "saes": (KEYS, COUNTS),
    "contexts": (ORDER, KEYS, COUNTS),
    "documents": (ORDER, KEYS, COUNTS),
    "segments": (ORDER, KEYS, COUNTS),
}
_MAY_BE_NULL = ("id", "offsets", "values")
_TOO_LARGE = 2.0**31
_STRATA = 1 << 10  # more than there are
_LOWEST_STRATUM = -(1 << 9)


@dataclass(frozen=True)
class Rule:
    """What an index declares of its rows."""

    length: int  # tokens of a context
    top_k: int
    sample_k: int
    widths: Mapping[str, int]  # features, by SAE
    keeps: Mapping[str, str]
    tokens: int  # of the vocabulary
    metadata: frozenset[str]  # columns of documents


@dataclass(frozen=True)
class Piece:
    """Whose rows a file may hold."""

    ordinals: np.ndarray  # int64, ascending
    saes: frozenset[str]
    merged: bool


class RowChecks:
    """Takes the batches of one kind of one piece, in order of its files."""

    def __init__(self, rule: Rule, piece: Piece, kind: str) -> None:
        self._rule, self._piece, self._kind = rule, piece, kind
        self._group = -1
        self._sae: str | None = None  # of the row group
        self._feature: dict[str, int] = {}  # the last one, by SAE
        self._last: dict[str, np.ndarray] = {}  # last key of each feature, by SAE
        self._stratum: dict[str, int] = {}  # the last one, with its feature, by SAE
        self._key = -1
        self._take: Callable[[pa.RecordBatch], Said] = {
            "activations": self._activations,
            "document_features": self._document_features,
            "by_document": self._by_document,
            "features": self._features,
            "top_contexts": self._top,
            "sampled_contexts": self._sampled,
            "sampled_merged": self._sampled,
            "pages": self._pages,
            "saes": self._saes,
            "contexts": self._contexts,
            "documents": self._documents,
            "segments": self._segments,
        }.get(kind, self._keyed)

    def next_file(self) -> None:
        """The next batch is of another file: of by_document, it may have other SAEs and begin anew."""
        if self._kind == "by_document":
            self._key = -1

    def take(self, batch: pa.RecordBatch, group: int) -> Said:
        """What is wrong with some rows; `group` is their row group's number, over all files of the piece."""
        for name in batch.schema.names:
            optional = name in _MAY_BE_NULL or name in self._rule.metadata
            if batch.column(name).null_count and not optional:
                yield VALUES, f"{name} is NULL in {batch.column(name).null_count:,} rows"
                return
        if group != self._group:
            self._group, self._sae = group, None
        yield from self._take(batch)

    # --- rows of SAEs

    def _activations(self, batch: pa.RecordBatch) -> Said:
        token = _numbers(batch, "token")
        yield from self._ordered(batch, token)
        yield from self._owned(token // (self._rule.length << LOCAL_BITS))
        yield from _activation(_numbers(batch, "activation"))

    def _document_features(self, batch: pa.RecordBatch) -> Said:
        document = _numbers(batch, "document")
        yield from self._ordered(batch, document)
        yield from self._document_rows(batch)

    def _by_document(self, batch: pa.RecordBatch) -> Said:
        document, feature = _numbers(batch, "document"), _numbers(batch, "feature")
        sae = batch.column("sae")
        saes = sae.dictionary.to_pylist()
        for name in saes:
            yield from self._declared(name)
        numbers = {name: i for i, name in enumerate(self._rule.widths)}
        code = np.array([numbers.get(name, -1) for name in saes], np.int64)[sae.indices.to_numpy()]
        key = (code << 32) | feature
        same = np.diff(document) == 0
        if not ((np.diff(document) > 0) | (same & (np.diff(key) > 0))).all() or document[0] < self._key:
            yield ORDER, "rows are not in order of document, SAE and feature, or one is there twice"
        self._key = int(document[-1])
        yield from self._document_rows(batch)

    def _document_rows(self, batch: pa.RecordBatch) -> Said:
        yield from self._owned(_numbers(batch, "document") >> LOCAL_BITS)
        highest, total = _numbers(batch, "max"), _numbers(batch, "sum")
        n = _numbers(batch, "n_tokens")
        yield from _activation(highest)
        if (n < 1).any():
            yield COUNTS, f"{int((n < 1).sum()):,} rows have no active token"
        wrong = ~(np.abs(total) <= n * np.abs(highest.astype(np.float64)))
        wrong |= (n == 1) & (total != highest)
        if wrong.any():
            yield (
                VALUES,
                f"{int(wrong.sum()):,} sums cannot be of {_first(n, wrong)} tokens with that maximum",
            )

    def _features(self, batch: pa.RecordBatch) -> Said:
        feature, n = _numbers(batch, "feature"), _numbers(batch, "n_tokens")
        yield from self._ordered(batch, np.zeros(len(feature), np.int64))
        yield from _activation(_numbers(batch, "max"))
        contexts, documents = _numbers(batch, "n_contexts"), _numbers(batch, "n_documents")
        wrong = (documents < 1) | (contexts < documents) | (n < contexts)
        if wrong.any():
            yield COUNTS, f"feature {_first(feature, wrong)}: tokens, contexts and documents do not fit"
        row, bins = _flat(batch, "bins")
        _, tokens = _flat(batch, "bin_tokens")
        if len(bins) != len(tokens) or (pc.list_value_length(batch.column("bins")).to_numpy() < 1).any():
            yield COUNTS, "a histogram has not as many counts as bins"
            return
        if ((np.diff(row) == 0) & (np.diff(bins.astype(np.int64)) <= 0)).any() or (tokens < 1).any():
            yield ORDER, "bins of a histogram are not in order, or empty"
        wrong = np.bincount(row, tokens, len(feature)).astype(np.int64) != n
        if wrong.any():
            yield COUNTS, f"feature {_first(feature, wrong)}: its histogram has other tokens than its count"

    def _top(self, batch: pa.RecordBatch) -> Said:
        yield from self._ordered(batch, _numbers(batch, "context"))
        yield from self._windows(batch)
        feature = _numbers(batch, "feature")
        if len(feature) and np.bincount(feature - feature.min()).max() > self._rule.top_k:
            yield COUNTS, f"a feature has more than {self._rule.top_k} rows"

    def _pages(self, batch: pa.RecordBatch) -> Said:
        rank, position = _numbers(batch, "rank"), _numbers(batch, "position")
        yield from self._ordered(batch, rank)
        yield from self._keys(batch)
        yield from self._lists(batch)
        if (rank < 1).any() or (rank > self._rule.top_k).any():
            yield COUNTS, f"ranks are not from 1 to {self._rule.top_k}"
        row, token = _flat(batch, "tokens")
        if (token < 0).any() or (token >= self._rule.tokens).any():
            yield VALUES, "tokens are not of the vocabulary"
        sizes = np.bincount(row, minlength=len(rank))
        first = _numbers(batch, "first")
        if (first != np.maximum(position - NEAR, 0)).any() or (sizes <= position - first).any():
            yield WINDOWS, "tokens do not reach to the maximum"

    def _sampled(self, batch: pa.RecordBatch) -> Said:
        feature, stratum = _numbers(batch, "feature"), _numbers(batch, "stratum").astype(np.int64)
        context, population = _numbers(batch, "context"), _numbers(batch, "population")
        # By feature and stratum and, inside one, context: as one key of a feature.
        local = np.unique(context, return_inverse=True)[1]
        yield from self._ordered(batch, (stratum - _LOWEST_STRATUM) * (len(local) + 1) + local, within=True)
        yield from self._windows(batch)
        exponent = np.frexp(np.abs(_numbers(batch, "activation").astype(np.float64)))[1] - 1
        if (exponent != stratum).any():
            yield VALUES, f"{int((exponent != stratum).sum()):,} activations are not of their stratum"
        key = feature.astype(np.int64) * _STRATA + stratum - _LOWEST_STRATUM
        sae = str(self._sae)
        # A stratum may go on from the batch before.
        begins = np.r_[key[0] != self._stratum.get(sae), np.diff(key) != 0]
        self._stratum[sae] = int(key[-1])
        if ((population > 0) != begins).any():
            yield COUNTS, "a stratum's size is not on its first row, and there alone"
        if np.unique(key, return_counts=True)[1].max(initial=0) > self._rule.sample_k:
            yield COUNTS, f"a stratum has more than {self._rule.sample_k} rows"

    def _keys(self, batch: pa.RecordBatch) -> Said:
        """Keys and values of top and sampled contexts."""
        position = _numbers(batch, "position")
        yield from self._owned(_numbers(batch, "context") >> LOCAL_BITS)
        yield from _activation(_numbers(batch, "activation"))
        if (position < 0).any() or (position >= self._rule.length).any():
            yield KEYS, f"positions lie outside contexts of {self._rule.length} tokens"

    def _windows(self, batch: pa.RecordBatch) -> Said:
        """The same, and their windows where there are to be some."""
        yield from self._keys(batch)
        kept = self._sae is not None and self._rule.keeps.get(self._sae) == "tokens"
        offsets, values = batch.column("offsets"), batch.column("values")
        if kept:
            if offsets.null_count + values.null_count != 2 * len(offsets):
                yield WINDOWS, "windows are there though `keep: tokens` has the rows"
            return
        yield from self._lists(batch)

    def _lists(self, batch: pa.RecordBatch) -> Said:
        """Windows."""
        activation, offsets, values = (
            _numbers(batch, "activation"),
            batch.column("offsets"),
            batch.column("values"),
        )
        if offsets.null_count or values.null_count:
            yield WINDOWS, "windows are not there"
            return
        row, offset = _flat(batch, "offsets")
        at, value = _flat(batch, "values")
        if len(row) != len(at) or (row != at).any():
            yield WINDOWS, "a window has not as many values as offsets"
            return
        yield from _activation(value)
        offset = offset.astype(np.int64)
        if (np.abs(offset) > WINDOW).any() or ((np.diff(row) == 0) & (np.diff(offset) <= 0)).any():
            yield WINDOWS, f"offsets are not in order, or beyond {WINDOW}"
        middle = offset == 0
        if middle.sum() != len(activation) or (value[middle] != activation[row[middle]]).any():
            yield WINDOWS, "a window does not have the activation in its middle"
        if (np.abs(value) > np.abs(activation[row])).any():
            yield WINDOWS, "a window has something higher than the context's maximum"

    def _saes(self, batch: pa.RecordBatch) -> Said:
        for name in batch.column("sae").to_pylist():
            yield from self._declared(name)
            if name in self._last and not self._piece.merged:
                yield COUNTS, f"{name} is there twice"
            self._last[name] = np.empty(0, np.int64)
        yield from self._owned(_numbers(batch, "unit"))
        n, sampled = _numbers(batch, "n_tokens"), _numbers(batch, "sample_tokens")
        if (_numbers(batch, "n_active") < 0).any() or (sampled < 0).any() or (n < sampled).any():
            yield COUNTS, "an SAE's counts are not possible"

    # --- keyed tables

    def _contexts(self, batch: pa.RecordBatch) -> Said:
        yield from self._ascending(_numbers(batch, "context"))
        context, document = _numbers(batch, "context"), _numbers(batch, "document")
        yield from self._owned(context >> LOCAL_BITS)
        if (context >> LOCAL_BITS != document >> LOCAL_BITS).any():
            yield KEYS, "a context is of another unit than its document"
        start, first = _numbers(batch, "start"), _numbers(batch, "first")
        row, token = _flat(batch, "tokens")
        at, counted = _flat(batch, "counted")
        if len(row) != len(at) or (row != at).any():
            yield COUNTS, "a context has not as many tokens as marks of what is counted"
            return
        length = np.bincount(row, minlength=len(context))
        if (length > self._rule.length).any() or (first < 0).any() or (first >= length).any():
            yield COUNTS, f"a context has no own token, or more than {self._rule.length} tokens"
        if (start < 0).any():
            yield COUNTS, "a context starts before its document"
        index = np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length)
        if (counted & (index < first[row])).any():
            yield COUNTS, "tokens before a context's own are counted"
        if (token < 0).any() or (token >= self._rule.tokens).any():
            yield KEYS, f"token {int(token.max())} is not in the vocabulary of {self._rule.tokens:,}"

    def _documents(self, batch: pa.RecordBatch) -> Said:
        yield from self._keyed(batch)
        n, length = _numbers(batch, "n_tokens"), _numbers(batch, "_length")
        if (n < 0).any() or (n > length).any():
            yield COUNTS, "a document has more counted tokens than tokens"

    def _segments(self, batch: pa.RecordBatch) -> Said:
        document, segment = _numbers(batch, "document"), _numbers(batch, "segment")
        yield from self._owned(document >> LOCAL_BITS)
        same = np.diff(document) == 0
        if ((np.diff(document) < 0) | (same & (np.diff(segment) <= 0))).any() or document[0] < self._key:
            yield ORDER, "segments are not in order, or one is there twice"
        self._key = int(document[-1])
        if (_numbers(batch, "start") > _numbers(batch, "stop")).any():
            yield COUNTS, "a segment ends before it starts"

    def _keyed(self, batch: pa.RecordBatch) -> Said:
        document = _numbers(batch, "document")
        yield from self._ascending(document)
        yield from self._owned(document >> LOCAL_BITS)

    # --- what they share

    def _ascending(self, key: np.ndarray) -> Said:
        if (np.diff(key) <= 0).any() or key[0] <= self._key:
            yield ORDER, "keys are not in order, or one is there twice"
        self._key = max(self._key, int(key.max()))

    def _owned(self, ordinals: np.ndarray) -> Said:
        stray = ordinals[~np.isin(ordinals, self._piece.ordinals)]
        if len(stray):
            yield KEYS, f"{len(stray):,} rows are of unit {int(stray[0])}, which is not in this file"

    def _declared(self, sae: str) -> Said:
        if sae not in self._piece.saes:
            yield KEYS, f"rows of {sae}, which is not in this file"

    def _ordered(self, batch: pa.RecordBatch, key: np.ndarray, within: bool = False) -> Said:
        """One SAE a row group, features ascending in it, each feature's keys ascending over all runs.

        `within`: keys can be compared inside the batch only.
        """
        feature, column = _numbers(batch, "feature"), batch.column("sae")
        names = column.dictionary.take(pc.unique(column.indices)).to_pylist()
        self._sae = self._sae or names[0]
        if names != [self._sae]:
            yield ORDER, f"a row group has rows of {len({*names, self._sae})} SAEs"
            return
        yield from self._declared(self._sae)
        width = self._rule.widths.get(self._sae, 0)
        if (feature < 0).any() or (feature >= width).any():
            yield KEYS, f"feature {int(feature.max())} of {self._sae}, which has {width:,}"
            return
        down = np.diff(feature) < 0
        if self._piece.merged and feature[0] < self._feature.get(self._sae, 0):
            down = np.r_[down, True]
        if down.any():
            yield ORDER, f"features of {self._sae} are not in order"
        self._feature[self._sae] = int(feature[-1])
        starts = np.flatnonzero(np.r_[True, np.diff(feature) != 0])
        stops = np.r_[starts[1:], len(feature)] - 1
        last = self._last.setdefault(self._sae, np.full(width, -1, np.int64))
        again = (np.diff(key) <= 0) & (np.diff(feature) == 0)
        if not within:
            again = np.r_[again, key[starts] <= last[feature[starts]]]
            last[feature[stops]] = key[stops]
        if again.any():
            yield ORDER, f"{int(again.sum()):,} rows of {self._sae} are out of order or there twice"


def _activation(values: np.ndarray) -> Said:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    wrong = ~np.isfinite(values) | (values == 0) | (np.abs(values) >= _TOO_LARGE)
    if wrong.any():
        yield VALUES, f"{int(wrong.sum()):,} activations are NaN, zero or too large: {_first(values, wrong)}"
    odd = (bits & 0xFFFF != 0) & ~np.isnan(values)
    if odd.any():
        yield VALUES, f"{int(odd.sum()):,} activations are no bfloat16 numbers: {_first(values, odd)}"


def _numbers(batch: pa.RecordBatch, name: str) -> np.ndarray:
    return batch.column(name).to_numpy(zero_copy_only=False)


def _flat(batch: pa.RecordBatch, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(row, entry) of all entries of a list column."""
    column = batch.column(name)
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    return np.repeat(np.arange(len(column)), lengths), column.flatten().to_numpy(zero_copy_only=False)


def _first(values: np.ndarray, where: np.ndarray) -> Any:
    return values[where][0].item()
