"""Merging summaries of units: features, top_contexts, samples and saes, as queries/views.sql does it.

Invariant: the views tell no difference between partials and what they were merged into, in any tree. Sums add
in fixed point; what is left out of a top or a sample has k better ones, with every later merge too.
Merged samples hold their hash, so that a unit's `contexts` are read once, when its own files are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.ledger import DataFileRecord
from pipelines.merge_files import (
    Cutter,
    Inputs,
    MergeRule,
    Output,
    Part,
    conformed,
    without,
)
from pipelines.merge_runs import Budget, Prepare, Run, in_runs, row_groups, windows
from pipelines.schema import LOCAL_BITS, LOCAL_MAX, sample_seed
from pipelines.storage import Store
from pipelines.writer import sae_column
from sae_runtime.errors import DataError

_BUDGET = Budget(1 << 17, 1 << 8)  # a row with its window takes some 700 bytes
_ROWS, _FEATURES = 1 << 13, 1 << 12  # of a row group: some 400 features' top contexts; features
_SUM_LIMIT = 2.0**62  # a sum of a component beyond it stays in rows of their own
_WORD = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

Reduce = Callable[[pa.Table, MergeRule], dict[str, Any]]  # rows of whole features -> columns by name


def merge_summaries(
    store: Store,
    parts: Sequence[Part],
    saes: Sequence[str],
    rule: MergeRule,
    stem: str,
) -> dict[str, list[DataFileRecord]]:
    """Merge features, top_contexts, samples (as `sampled_merged`) and saes of some SAEs.

    Parts are of different units, in order of their first ordinals; those that are one unit's own name
    `contexts` that have theirs, among others'. Kinds without rows are not in the answer. DataError for an
    input that is damaged.
    """
    found = {
        "features": _by_feature(store, parts, saes, rule, stem, "features", _features),
        "top_contexts": _by_feature(store, parts, saes, rule, stem, "top_contexts", _top),
        "sampled_merged": _by_feature(store, parts, saes, rule, stem, "sampled_merged", _samples),
        "saes": _saes(store, parts, saes, rule, stem),
    }
    return {kind: records for kind, records in found.items() if records}


def _by_feature(
    store: Store,
    parts: Sequence[Part],
    saes: Sequence[str],
    rule: MergeRule,
    stem: str,
    kind: str,
    reduce: Reduce,
) -> list[DataFileRecord]:
    schema = rule.schema(kind)
    inner = without(schema, "sae")
    sampled = kind == "sampled_merged"
    places = _place_hashes(store, [part for part in parts if not part.merged]) if sampled else None
    with (
        Inputs(store, inner.names) as merged,
        Inputs(store, without(inner, "hash").names) as own,
        Output(store, kind, rule, stem) as output,
    ):
        found = []
        for part in parts:
            unhashed = sampled and not part.merged
            inputs = own if unhashed else merged
            groups = row_groups(inputs, part, "sampled_contexts" if unhashed else kind, "sae", "feature")
            found.append((inputs, groups, unhashed))
        cutter = Cutter(output, _FEATURES if kind == "features" else _ROWS)
        for sae in saes:
            runs = [
                Run.of(inputs, run, "feature", _prepare(inner, sae, places if unhashed else None))
                for inputs, groups, unhashed in found
                for run in in_runs([group for group in groups if group.sae == sae], "feature")
            ]
            for batches in _whole(windows(runs, _BUDGET)):
                columns = reduce(pa.Table.from_batches(batches).combine_chunks(), rule)
                columns["sae"] = sae_column(sae, len(columns["feature"]))
                arrays = [pa.array(columns[field.name], field.type) for field in schema]
                cutter.add(pa.Table.from_arrays(arrays, schema=schema), columns["feature"])
            cutter.end()
    return output.records


def _whole(found: Iterable[tuple[list[pa.RecordBatch], bool]]) -> Iterator[list[pa.RecordBatch]]:
    """Windows with open ones joined, so that each holds all rows of its features: a feature's are few."""
    held: list[pa.RecordBatch] = []
    for batches, is_open in found:
        held += batches
        if not is_open:
            yield held
            held = []


def _prepare(schema: pa.Schema, sae: str, places: tuple[np.ndarray, np.ndarray] | None) -> Prepare:
    """What gives a batch its columns; with `places` the hash of samples is computed."""

    def prepare(batch: pa.RecordBatch) -> pa.RecordBatch:
        if places is not None:
            feature, context = (batch.column(name).to_numpy() for name in ("feature", "context"))
            batch = batch.append_column("hash", pa.array(_hashes(sae, feature, context, *places)))
        return conformed(batch, schema)

    return prepare


# --- hashes of samples


def _place_hashes(store: Store, parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray]:
    """(context int64, ascending; place_hash uint64) of units' contexts; their files may hold others' too."""
    columns: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0, np.int64), np.zeros(0, np.uint64))]
    with Inputs(store, ["context", "place_hash"]) as inputs:
        for part in parts:
            first, stop = (ordinal << LOCAL_BITS for ordinal in part.ordinals)
            for group in row_groups(inputs, part, "contexts", "context"):
                lowest, highest = group.spans["context"]
                if lowest >= stop or highest < first:
                    continue
                for batch in inputs.batches(group.file, group.number, 1 << 16):
                    context, place = (batch.column(name).to_numpy() for name in inputs.columns)
                    own = slice(*np.searchsorted(context, (first, stop)))
                    columns.append((context[own], place[own]))
    context, place_hash = (np.concatenate(column) for column in zip(*columns, strict=True))
    return context, place_hash


def _hashes(
    sae: str, feature: np.ndarray, context: np.ndarray, contexts: np.ndarray, place_hashes: np.ndarray
) -> np.ndarray:
    """uint64 hash by which a feature's sample is drawn, as sae_runtime/summaries.py has it."""
    at = np.searchsorted(contexts, context)
    if not len(contexts) or (contexts[np.minimum(at, len(contexts) - 1)] != context).any():
        raise DataError(f"samples of {sae} name contexts that their unit does not have")
    salt = _mixed(np.uint64(sample_seed(sae)) + feature.astype(np.uint64) * _GOLDEN)
    return _mixed(place_hashes[at] ^ salt)


def _mixed(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


# --- one window


def _column(table: pa.Table, name: str) -> np.ndarray:
    return table.column(name).to_numpy()


def _features(table: pa.Table, rule: MergeRule) -> dict[str, Any]:
    order = np.argsort(_column(table, "feature"), kind="stable")
    feature = _column(table, "feature")[order]
    start = _starts(feature)

    def added(name: str) -> np.ndarray:
        return np.add.reduceat(_column(table, name)[order], start)

    sums = {}
    for name in ("sum", "squares"):
        high, low = (_column(table, f"{name}_{half}")[order] for half in ("high", "low"))
        sums[f"{name}_high"], sums[f"{name}_low"] = _add_words(high, low, start)
    highest = np.maximum.reduceat(_column(table, "max")[order], start)
    lowest = np.minimum.reduceat(_column(table, "max")[order], start)
    bins, tokens, bounds = _histograms(table, feature[start])
    return {
        "feature": feature[start],
        **{name: added(name) for name in ("n_tokens", "n_contexts", "n_documents")},
        **sums,
        "max": np.where(-lowest > highest, lowest, highest),
        "bins": pa.ListArray.from_arrays(bounds, bins),
        "bin_tokens": pa.ListArray.from_arrays(bounds, tokens),
    }


def _histograms(table: pa.Table, feature: np.ndarray) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Bins, their tokens, and the list offsets [features + 1] of `feature`, which ascends."""
    lists = table.column("bins").combine_chunks()
    row = np.repeat(np.searchsorted(feature, _column(table, "feature")), lists.value_lengths().to_numpy())
    key = (row << 8) | lists.flatten().to_numpy()
    order = np.argsort(key, kind="stable")
    key = key[order]
    start = _starts(key)
    tokens = np.add.reduceat(table.column("bin_tokens").combine_chunks().flatten().to_numpy()[order], start)
    bounds = np.searchsorted(key[start], np.arange(len(feature) + 1) << 8)
    return pa.array((key[start] & 0xFF).astype(np.uint8)), pa.array(tokens), pa.array(bounds.astype(np.int32))


def _add_words(high: np.ndarray, low: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of 128-bit numbers over the stretches that begin at `start`: low words are added by halves."""
    half = np.uint64(32)
    lower = np.add.reduceat(low & np.uint64(0xFFFFFFFF), start)
    upper = np.add.reduceat(low >> half, start) + (lower >> half)
    carry = (upper >> half).astype(np.int64)
    return np.add.reduceat(high, start) + carry, (upper << half) | (lower & np.uint64(0xFFFFFFFF))


def _top(table: pa.Table, rule: MergeRule) -> dict[str, Any]:
    feature, ending = _column(table, "feature"), _column(table, "ending")
    lowest_first = -np.abs(_column(table, "activation"))
    place = _places(table, rule)
    order = np.lexsort((place, lowest_first, ending, feature))
    kept = order[_starts(feature[order], ending[order])]  # of equal endings the highest
    order = kept[np.lexsort((place[kept], lowest_first[kept], feature[kept]))]
    kept = order[_ranks(feature[order]) < rule.top_k]
    return _taken(table, kept[np.lexsort((_column(table, "context")[kept], feature[kept]))])


def _samples(table: pa.Table, rule: MergeRule) -> dict[str, Any]:
    feature, stratum, context = (_column(table, name) for name in ("feature", "stratum", "context"))
    order = np.lexsort((_places(table, rule), _column(table, "hash"), stratum, feature))
    rank = _ranks(feature[order], stratum[order])
    population = np.add.reduceat(_column(table, "population")[order], np.flatnonzero(rank == 0))
    kept = order[rank < rule.sample_k]
    kept = kept[np.lexsort((context[kept], stratum[kept], feature[kept]))]
    columns = _taken(table, kept)
    columns["population"] = np.zeros(len(kept), np.int64)
    columns["population"][_starts(feature[kept], stratum[kept])] = population
    return columns


def _places(table: pa.Table, rule: MergeRule) -> np.ndarray:
    """The contexts' places in the corpus, int64."""
    context = _column(table, "context")
    return rule.places[(context >> LOCAL_BITS) - rule.first] * LOCAL_MAX + context % LOCAL_MAX


def _taken(table: pa.Table, rows: np.ndarray) -> dict[str, Any]:
    taken = table.take(pa.array(rows)).combine_chunks()
    columns: dict[str, Any] = {name: taken.column(name).chunk(0) for name in taken.schema.names}
    columns["feature"] = _column(taken, "feature")
    return columns


def _starts(*columns: np.ndarray) -> np.ndarray:
    """Where stretches of equal rows begin, int64; there is at least one row."""
    new = np.ones(len(columns[0]), bool)
    new[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return np.flatnonzero(new)


def _ranks(*columns: np.ndarray) -> np.ndarray:
    """Each row's number inside its stretch of equal rows, from 0."""
    start = _starts(*columns)
    return np.arange(len(columns[0])) - np.repeat(start, np.diff(start, append=len(columns[0])))


# --- SAEs


def _saes(
    store: Store, parts: Sequence[Part], saes: Sequence[str], rule: MergeRule, stem: str
) -> list[DataFileRecord]:
    schema = rule.schema("saes")
    with Inputs(store, schema.names) as inputs, Output(store, "saes", rule, stem) as output:
        rows: dict[str, list[dict[str, Any]]] = {sae: [] for sae in saes}
        for part in parts:
            for group in row_groups(inputs, part, "saes", "sae"):
                if group.sae in rows:  # each has a row group of its own
                    for batch in inputs.batches(group.file, group.number, 1 << 10):
                        _add_saes(rows[group.sae], batch)
            inputs.close()
        for found in rows.values():
            if found:
                output.write(pa.Table.from_pylist([_sae_row(row) for row in found], schema), True)
    return output.records


def _add_saes(rows: list[dict[str, Any]], batch: pa.RecordBatch) -> None:
    """Add one SAE's sums to those of the last row, or begin another where a component would not fit."""
    for i, values in enumerate(batch.column("sample_sum")):
        row = {name: batch.column(name)[i].as_py() for name in batch.schema.names if name != "sample_sum"}
        row["sample_sum"] = values.values.to_numpy()
        for name in ("squares", "error"):
            row[name] = (row.pop(f"{name}_high") << 64) + row.pop(f"{name}_low")
        if rows and _fits(rows[-1]["sample_sum"], row["sample_sum"]):
            for name in set(row) - {"sae", "unit"}:
                rows[-1][name] = rows[-1][name] + row[name]
        else:
            rows.append(row)


def _fits(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((np.abs(one.astype(np.float64)) + np.abs(other.astype(np.float64)) < _SUM_LIMIT).all())


def _sae_row(row: dict[str, Any]) -> dict[str, Any]:
    for name in ("squares", "error"):
        row[f"{name}_high"], row[f"{name}_low"] = row[name] >> 64, row[name] & _WORD
    return row
