"""Merged files: views over any tree of merges against those over the units' own files, and made-up inputs.

The made-up ones are small, but so are the budgets and row groups that they are merged with.
"""

from __future__ import annotations

import hashlib
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch

from pipelines import merge_keyed, merge_pages, merge_rows, merge_summaries, unit
from pipelines.contents import contents
from pipelines.ledger import DataFileRecord
from pipelines.merge import MergeRule, Part
from pipelines.merge_runs import Budget
from pipelines.partials import Moments
from pipelines.schema import DATA, KINDS, LOCAL_BITS, SCHEMAS, documents_schema, key, metadata_type
from pipelines.storage import Store
from pipelines.writer import UnitWriter, sae_column, windows_column
from queries.connect import _HERE, _statements, _values, fill
from queries.relations import parquet
from sae_runtime import suites
from sae_runtime.errors import DataError
from sae_runtime.sae import SaeInfo, SaeWeights

WORD = (1 << 64) - 1
LENGTH = 16  # of made-up contexts
Files = dict[str, tuple[str, ...]]
Merge = Callable[[Sequence[Part]], Part]


def rule_of(store: Store) -> MergeRule:
    """The rule of a scanned index."""
    found = contents(store)
    fixed = found.identity["fixed"]
    places = np.full(1 + int(found.live.max()), -1, np.int64)
    places[found.live] = np.arange(len(found.live))
    return MergeRule(
        fixed["context.length"], fixed["top_k"], fixed["sample_k"], fixed["metadata"], places, 1 << 18
    )


def made_up(units: int, **others: Any) -> MergeRule:
    """A rule for made-up units, which are in the corpus in order of their ordinals."""
    rule = MergeRule(LENGTH, top_k=3, sample_k=2, metadata={}, places=np.arange(units))
    return replace(rule, **others)


def leaves(store: Store) -> list[Part]:
    """The units of a scanned index."""
    found = contents(store)
    files: dict[int, Files] = {}
    for commit in found.commits_of(np.sort(found.shown)):
        own = files.setdefault(commit.ordinal, {})
        for kind, record in commit.files.items():
            own[kind] = (*own.get(kind, ()), record.path)
    return [Part((ordinal, ordinal + 1), files[ordinal], False) for ordinal in sorted(files)]


def merged(
    store: Store,
    parts: Sequence[Part],
    shares: Sequence[Sequence[str]],
    rule: MergeRule,
    omit: frozenset[int] = frozenset(),
    summaries: bool = True,
) -> Part:
    """Everything of some parts merged, SAEs in shares."""
    stem = f"m-{len(store.entries(DATA)):06d}"
    done = [merge_keyed.merge_keyed(store, parts, rule, stem, omit)]
    for i, saes in enumerate(shares):
        done.append(merge_rows.merge_rows(store, parts, saes, rule, f"{stem}-{i}", omit))
        if summaries:
            done.append(merge_summaries.merge_summaries(store, parts, saes, rule, f"{stem}-{i}"))
    files: Files = {}
    for each in done:
        for kind, records in each.items():
            files[kind] = (*files.get(kind, ()), *(record.path for record in records))
    return Part((parts[0].ordinals[0], max(part.ordinals[1] for part in parts)), files, True)


def shares_of(saes: Sequence[str], rng: np.random.Generator) -> list[Sequence[str]]:
    """The SAEs cut somewhere, or not."""
    cut = int(rng.integers(1, len(saes) + 1))
    return [share for share in (saes[:cut], saes[cut:]) if share]


def tree(parts: Sequence[Part], rng: np.random.Generator, merge: Merge, interlaced: bool) -> Part:
    """Merge all parts in some order: neighbours, or any, so that units lie between those of one part."""
    left = list(parts)
    while len(left) > 1:
        some = min(len(left), int(rng.integers(2, 8)))
        if interlaced:
            chosen = sorted(rng.choice(len(left), some, replace=False).tolist())
        else:
            first = int(rng.integers(len(left) - some + 1))
            chosen = list(range(first, first + some))
        made = merge([left[i] for i in chosen])
        left = [part for i, part in enumerate(left) if i not in chosen] + [made]
        left.sort(key=lambda part: part.ordinals)
    return left[0]


def views_over(store: Store, parts: Sequence[Part], views: Sequence[str]) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of views over the files of some parts, in one order."""
    found = contents(store)
    metadata = {name: metadata_type(of) for name, of in found.identity["fixed"]["metadata"].items()}
    schemas = {**SCHEMAS, "documents": documents_schema(metadata)}
    values = _values([found], lambda index, name: store.url(name), None)
    for kind in KINDS:
        files = [store.url(name) for part in parts for name in part.files.get(kind, ())]
        values[kind] = parquet(files, schemas[kind])
    con = duckdb.connect()
    for name in ("helpers.sql", "views.sql", "macros.sql"):
        for statement in _statements((_HERE / name).read_text()):
            con.execute(fill(statement, values))
    return {view: con.sql(f"SELECT * FROM {view} ORDER BY ALL").fetchall() for view in views}


def row_groups(store: Store, part: Part, kind: str) -> Iterator[pa.Table]:
    for name in part.files.get(kind, ()):
        file = pq.ParquetFile(store.path(name))
        for number in range(file.metadata.num_row_groups):
            yield file.read_row_group(number)


def table(store: Store, parts: Sequence[Part], kind: str) -> pa.Table:
    """Rows as they lie in the files."""
    groups = [group for part in parts for group in row_groups(store, part, kind)]
    return pa.concat_tables(groups) if groups else SCHEMAS[kind].empty_table()


def rows_of(store: Store, parts: Sequence[Part], kind: str) -> list[tuple[Any, ...]]:
    found = table(store, parts, kind)
    return list(zip(*(found.column(name).to_pylist() for name in found.schema.names), strict=True))


# --- scanned indexes


@pytest.fixture(scope="module")
def mixed_index(
    tmp_path_factory: pytest.TempPathFactory,
    write_spec: Callable[..., Path],
    scan_inline: Callable[..., Any],
    tiny_suites: Path,
) -> Path:
    """Signed activations, three ways to keep them, several chunks a unit and several runs a file."""
    load = suites.load

    def load_signed(info: SaeInfo) -> SaeWeights:
        return replace(load(info), rule="abstopk", k=5, threshold=None)

    keeps = {"tiny-res": "tokens", "tiny-mlp": {"sample": 0.5}, "tiny-att": "documents"}
    saes = [{"uri": str(tiny_suites / suite), "keep": keep} for suite, keep in keeps.items()]
    spec = write_spec(tmp_path_factory.mktemp("mixed"), saes=saes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suites, "load", load_signed)
        patch.setattr(unit, "BATCH_TOKENS", {"cpu": 128})
        patch.setattr(unit, "CHUNK_TOKENS", {"cpu": 128})
        patch.setattr(unit, "SEGMENT_ROWS", 2000)
        assert not scan_inline(spec).failed
    return spec.parent / "index"


def shrink(patch: pytest.MonkeyPatch, rows: int) -> None:
    """Have row groups of so many rows, and budgets to go with them."""
    for name in ("ROWS_PER_GROUP", "_DOCUMENT_ROWS"):
        patch.setattr(merge_rows, name, rows)
    for module in (merge_rows, merge_summaries):
        patch.setattr(module, "_BUDGET", Budget(rows, rows // 8))
    patch.setattr(merge_summaries, "_ROWS", rows)
    patch.setattr(merge_keyed, "_BUDGET", Budget(2, 2))
    patch.setattr(merge_keyed, "_ROWS", 6)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 64)


@pytest.fixture
def middling(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 1024)


VIEWS = (
    "saes", "documents", "segments", "contexts", "sampled_activations", "document_features", "features",
    "top_contexts", "sampled_contexts",
)  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("index", ["tiny_index", "mixed_index"])
def test_views_over_any_tree_of_merges_are_those_over_the_units(
    index: str, seed: int, middling: None, request: pytest.FixtureRequest
) -> None:
    store = Store(str(request.getfixturevalue(index)))
    rng, rule, parts = np.random.default_rng(seed), rule_of(store), leaves(store)
    saes = [sae["id"] for sae in contents(store).identity["saes"]]
    assert len(parts) == 24
    if index == "mixed_index":
        files = [pq.ParquetFile(store.path(part.files["activations"][0])) for part in parts[:2]]
        assert max(file.metadata.num_row_groups for file in files) > 2 * len(saes)  # several runs
    wanted = views_over(store, parts, VIEWS)
    if index == "tiny_index":
        shown = {view: rows for view, rows in tiny.views(store.uri).items() if view in VIEWS}
        assert tiny.differences({view: wanted[view] for view in shown}, shown) == []

    def merge(some: Sequence[Part]) -> Part:
        return merged(store, some, shares_of(saes, rng), rule)

    whole = tree(parts, rng, merge, interlaced=seed == 1)
    assert tiny.differences(wanted, views_over(store, [whole], VIEWS)) == []
    half = [merge(parts[:11]), *parts[11:]]
    assert tiny.differences(wanted, views_over(store, half, VIEWS)) == []
    for kind in ("activations", "document_features"):
        found = rows_of(store, [whole], kind)
        by_sae = {sae: [row[1:3] for row in found if row[0] == sae] for sae in saes}
        assert all(rows == sorted(rows) for rows in by_sae.values())
    found = rows_of(store, [whole], "by_document")
    assert sorted(found) == sorted(rows_of(store, parts, "document_features"))
    for name in whole.files["by_document"]:
        documents = pq.read_table(store.path(name)).column("document").to_pylist()
        assert documents == sorted(documents)


def test_omitted_units_leave_no_row(tiny_index: Path, middling: None) -> None:
    store = Store(str(tiny_index))
    rule, parts = rule_of(store), leaves(store)
    saes = [sae["id"] for sae in contents(store).identity["saes"]]
    omit = frozenset([0, 4, 9, 13, 21])
    lower = merged(store, parts[:14], [saes], rule, omit=frozenset([4]), summaries=False)
    whole = merged(store, [lower, *parts[14:]], [saes[:3], saes[3:]], rule, omit, summaries=False)
    kept = [part for part in parts if part.ordinals[0] not in omit]
    for kind in ("documents", "contexts", "activations", "document_features"):
        assert sorted(rows_of(store, [whole], kind), key=str) == sorted(rows_of(store, kept, kind), key=str)
    assert sorted(rows_of(store, [whole], "by_document")) == sorted(rows_of(store, kept, "document_features"))
    nothing = merged(store, parts[:2], [saes], rule, frozenset([0, 1]), summaries=False)
    assert nothing.files == {}


# --- rows


def write_rows(
    store: Store, ordinal: int, segments: Sequence[dict[str, Sequence[tuple[int, int]]]], group: int = 0
) -> Part:
    """A unit's rows of both kinds, the same in each: by segment and SAE (feature, token in the unit)."""
    writer = UnitWriter(store, f"u{ordinal}", group, "a", {})
    rng = np.random.default_rng(ordinal)
    for segment in segments:
        for sae, pairs in segment.items():
            feature = np.array([f for f, _ in pairs], np.int32)
            local = np.array([t for _, t in pairs], np.int64)
            values = rng.normal(size=len(pairs)).astype(np.float32)
            common = {"sae": sae_column(sae, len(pairs)), "feature": feature}
            writer.write(
                "activations", common | {"token": local + key(ordinal) * LENGTH, "activation": values}
            )
            numbers = {"n_tokens": local.astype(np.int32), "max": values, "sum": values.astype(np.float64)}
            writer.write("document_features", common | {"document": local + key(ordinal)} | numbers)
    return Part((ordinal, ordinal + 1), {k: (r.path,) for k, r in writer.close().items()}, False)


def random_segments(rng: np.random.Generator, saes: Sequence[str]) -> list[dict[str, list[tuple[int, int]]]]:
    """Up to four segments of rising tokens, of which feature 3 is active everywhere; an SAE may be silent."""
    segments, at = [], 0
    for _ in range(int(rng.integers(1, 5))):
        tokens = int(rng.integers(1, 60))
        segment = {}
        for sae in saes:
            if rng.random() < 0.8:
                share = rng.random(12) ** 4
                share[3] = 1 if rng.random() < 0.8 else 0
                on = np.argwhere(rng.random((12, tokens)) < share[:, None])
                segment[sae] = [(int(f), at + int(t)) for f, t in on]
        segments.append({sae: pairs for sae, pairs in segment.items() if pairs})
        at += tokens
    return segments


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_sorted_and_cut_at_features(tmp_path: Path, small: None, seed: int) -> None:
    """Against a sort in memory: dense features, several runs, silent SAEs, interlaced units, small files."""
    store, rng = Store(str(tmp_path)), np.random.default_rng(seed)
    saes = ["b", "a", "silent", "c"]
    parts = [write_rows(store, u, random_segments(rng, [s for s in saes if s != "silent"])) for u in range(9)]
    rule = made_up(9, target_bytes=3000)

    def merge(some: Sequence[Part]) -> Part:
        return merged(store, some, [saes], rule, summaries=False)

    whole = tree(parts, rng, merge, interlaced=seed % 2 == 1)
    for kind in ("activations", "document_features"):
        number = {sae: i for i, sae in enumerate(saes)}
        wanted = sorted(rows_of(store, parts, kind), key=lambda row: (number[row[0]], *row[1:3]))
        assert rows_of(store, [whole], kind) == wanted
        assert len(whole.files[kind]) > 1
        groups = [group.column("sae").to_pylist() for group in row_groups(store, whole, kind)]
        assert all(len(set(group)) == 1 and len(group) <= 64 for group in groups)
        spread: Counter[tuple[str, int]] = Counter()
        for group in row_groups(store, whole, kind):
            pairs = zip(group.column("sae").to_pylist(), group.column("feature").to_pylist(), strict=True)
            spread.update(set(pairs))
        for pair, rows in Counter(row[:2] for row in wanted).items():
            assert spread[pair] == 1 if rows <= 32 else spread[pair] <= -(-rows // 64) + 1
    order = {sae: i for i, sae in enumerate(saes)}
    wanted = sorted(rows_of(store, parts, "document_features"), key=lambda r: (r[2], order[r[0]], r[1]))
    assert rows_of(store, [whole], "by_document") == wanted
    spans = []
    for name in whole.files["by_document"]:
        metadata = pq.ParquetFile(store.path(name)).metadata
        spans += [metadata.row_group(i).column(2).statistics for i in range(metadata.num_row_groups)]
    assert len(spans) > 4
    assert all(one.max < other.min for one, other in pairwise(spans))


def test_files_end_at_features_near_the_target(tmp_path: Path, small: None) -> None:
    """One feature of many rows is in a file twice as large, not in one of any size."""
    store, rng = Store(str(tmp_path)), np.random.default_rng(5)
    sparse = [(f, t) for f in range(300) for t in sorted(rng.choice(5000, 20, replace=False).tolist())]
    dense = [(300, t) for t in range(6000)]
    part = write_rows(store, 0, [{"a": [*sparse, *dense]}])
    rule = made_up(1, target_bytes=8000)
    records = merge_rows.merge_rows(store, [part], ["a"], rule, "m")["activations"]
    features = [pq.read_table(store.path(r.path)).column("feature").to_pylist() for r in records]
    assert sum(map(len, features)) == len(sparse) + len(dense)
    assert [r.rows for r in records] == list(map(len, features))
    for before, after in pairwise(features):
        assert before[-1] < after[0] or before[-1] == after[0] == 300
    sizes = [(tmp_path / r.path).stat().st_size for r in records]
    assert sizes == [r.bytes for r in records]
    split = [300 in feature for feature in features]
    assert sum(split) > 2
    # Row groups are so small here that the footer is half of the file.
    assert all(
        (16000 if last else 8000) < size < (32000 if last else 16000)
        for size, last in zip(sizes[:-1], split, strict=False)
    )


def test_a_feature_of_more_rows_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 million rows of one feature, 48 MB as they are held, in two units and a merged one: 10 MB will do."""
    monkeypatch.setattr(merge_rows, "_BUDGET", Budget(1 << 16, 1 << 13))
    monkeypatch.setattr(merge_rows, "ROWS_PER_GROUP", 1 << 15)
    store, n = Store(str(tmp_path)), 1 << 20
    files = []
    for ordinal in range(3):
        writer = UnitWriter(store, f"u{ordinal}", 0, "a", {})
        token = np.arange(n) + key(ordinal) * LENGTH
        columns = {"feature": np.full(n, 7, np.int32), "token": token, "activation": np.ones(n, np.float32)}
        writer.write("activations", {"sae": sae_column("a", n), **columns})
        files.append(writer.close()["activations"].path)
    parts = [Part((i, i + 1), {"activations": (files[i],)}, i == 0) for i in range(3)]
    del token, columns
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        [record] = merge_rows.merge_rows(store, parts, ["a"], made_up(3), "m")["activations"]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    token = pq.read_table(store.path(record.path), columns=["token"]).column("token").to_numpy()
    assert len(token) == 3 * n
    assert (np.diff(token) > 0).all()
    assert 1e5 < pool.max_memory() < 10e6
    assert peak < 10e6


def test_damaged_inputs_are_named(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    part = write_rows(store, 0, [{"a": [(f, t) for f in range(300) for t in range(30)]}])
    name = part.files["activations"][0]
    good = (tmp_path / name).read_bytes()
    for bad in (good[:-50], good[:50], good[:200] + bytes(2000) + good[2200:]):
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(DataError, match=name):
            merge_rows.merge_rows(store, [part], ["a"], made_up(1), "m")
    pq.write_table(pq.read_table(tmp_path / part.files["document_features"][0]), tmp_path / name)
    with pytest.raises(DataError, match=f"{name}.* no column activation, token"):
        merge_rows.merge_rows(store, [part], ["a"], made_up(1), "n")
    (tmp_path / name).write_bytes(good)
    descending = pq.read_table(tmp_path / name).sort_by([("feature", "descending")])
    pq.write_table(descending, tmp_path / name)
    with pytest.raises(DataError, match=f"{name}.*not in order of feature"):
        merge_rows.merge_rows(store, [part], ["a"], made_up(1), "o")


# --- summaries


def write_summary(
    store: Store, ordinal: int, kind: str, columns: dict[str, Any], sae: str = "a", merged: bool = False
) -> Part:
    writer = UnitWriter(store, f"s{ordinal}", 0, kind, {})
    writer.write(kind, {"sae": sae_column(sae, len(columns["feature"])), **columns})
    return Part((ordinal, ordinal + 1), {k: (r.path,) for k, r in writer.close().items()}, merged)


@pytest.mark.parametrize("seed", range(3))
def test_sums_carry_and_maxima_keep_their_sign(tmp_path: Path, small: None, seed: int) -> None:
    """Against Python's integers, of which many lie around multiples of 2^64."""
    store, rng = Store(str(tmp_path)), np.random.default_rng(seed)
    near = [
        0,
        1,
        -1,
        WORD,
        WORD + 1,
        -WORD,
        -WORD - 1,
        2**100 + 3,
        -(2**100) - 3,
        2**63,
        -(2**63),
        3 * 2**64 - 1,
    ]
    parts, wanted = [], {}
    for ordinal in range(11):
        features = np.flatnonzero(rng.random(40) < 0.6).astype(np.int32)
        totals = [[near[i] for i in rng.integers(len(near), size=len(features))] for _ in range(2)]
        counts = rng.integers(1, 1 << 40, (3, len(features)))
        furthest = rng.choice(np.float32([-3, -2, -1, 1, 2, 3]), len(features))
        bins = [np.sort(rng.choice(194, int(rng.integers(1, 6)), replace=False)) for _ in features]
        tokens = [rng.integers(1, 1 << 50, len(b)) for b in bins]
        columns = {"feature": features, "max": furthest, "bins": pa.array(bins, pa.list_(pa.uint8()))}
        columns |= dict(zip(("n_tokens", "n_contexts", "n_documents"), counts, strict=True))
        columns["bin_tokens"] = pa.array(tokens, pa.list_(pa.int64()))
        for name, total in zip(("sum", "squares"), totals, strict=True):
            columns[f"{name}_high"] = np.array([t >> 64 for t in total], np.int64)
            columns[f"{name}_low"] = np.array([t & WORD for t in total], np.uint64)
        for i, f in enumerate(features.tolist()):
            held = wanted.setdefault(f, {"counts": [0] * 3, "totals": [0, 0], "max": 0.0, "bins": {}})
            held["counts"] = [a + int(b) for a, b in zip(held["counts"], counts[:, i], strict=True)]
            held["totals"] = [a + b[i] for a, b in zip(held["totals"], totals, strict=True)]
            held["max"] = max(held["max"], float(furthest[i]), key=lambda v: (abs(v), v))
            for b, n in zip(bins[i].tolist(), tokens[i].tolist(), strict=True):
                held["bins"][b] = held["bins"].get(b, 0) + n
        parts.append(write_summary(store, ordinal, "features", columns))
    whole = tree(parts, rng, lambda some: merged(store, some, [["a"]], made_up(11)), interlaced=False)
    found = {}
    for row in table(store, [whole], "features").to_pylist():
        found[row["feature"]] = {
            "counts": [row[name] for name in ("n_tokens", "n_contexts", "n_documents")],
            "totals": [(row[f"{name}_high"] << 64) + row[f"{name}_low"] for name in ("sum", "squares")],
            "max": row["max"],
            "bins": dict(zip(row["bins"], row["bin_tokens"], strict=True)),
        }
        assert row["bins"] == sorted(row["bins"])
    assert found == wanted
    assert list(found) == sorted(found)


def window(context: int) -> tuple[list[int], list[float]]:
    """Something that only this context has."""
    return [-(context % 5), 0, context % 3 + 1], [float(context), 1.0, 2.0]


def context_columns(contexts: Sequence[int], values: Sequence[float], windowed: bool) -> dict[str, Any]:
    """Columns of contexts; without windows those are NULL."""
    offsets, lists = zip(*map(window, contexts), strict=True) if windowed else ([None] * len(contexts),) * 2
    return {
        "context": np.array(contexts, np.int64),
        "position": np.array(contexts, np.int64).astype(np.int32) % 64,
        "activation": np.array(values, np.float32),
        "offsets": pa.array(offsets, SCHEMAS["top_contexts"].field("offsets").type),
        "values": pa.array(lists, SCHEMAS["top_contexts"].field("values").type),
    }


@pytest.mark.parametrize("seed", range(4))
def test_top_contexts_of_few_values_and_endings(tmp_path: Path, small: None, seed: int) -> None:
    """Ties everywhere, of either sign; the corpus is in another order than the ordinals."""
    store, rng = Store(str(tmp_path)), np.random.default_rng(seed)
    units, k, windowed = 12, 3, seed % 2 == 0
    rule = made_up(units, top_k=k, places=rng.permutation(units))
    offers: dict[int, list[tuple[float, int, int, int]]] = {}  # feature -> (-size, place, context, ending)
    value_of, parts = {}, []
    for ordinal in range(units):
        rows = []
        for f in range(20):
            own: dict[int, tuple[float, int, int, int]] = {}
            for local in sorted(rng.choice(30, int(rng.integers(0, 5)), replace=False).tolist()):
                value = float(rng.choice([-2, -1, 1, 2, 2.5]))
                context = key(ordinal, local)
                place = (int(rule.places[ordinal]) << LOCAL_BITS) + local
                offer = (-abs(value), place, context, int(rng.integers(6)))
                value_of[f, context] = value
                own[offer[3]] = min(own.get(offer[3], offer), offer)
            offers.setdefault(f, []).extend(own.values())
            best = sorted(own.values())[:k]
            rows += sorted((f, context, value_of[f, context], ending) for *_, context, ending in best)
        if not rows:
            continue
        features, contexts_, values, endings = zip(*rows, strict=True)
        columns = context_columns(contexts_, values, windowed)
        columns |= {"feature": np.array(features, np.int32), "ending": np.array(endings, np.int64)}
        parts.append(write_summary(store, ordinal, "top_contexts", columns))
    wanted = []
    for f, found in offers.items():
        best: dict[int, tuple[float, int, int, int]] = {}
        for offer in found:
            best[offer[3]] = min(best.get(offer[3], offer), offer)
        for *_, context, ending in sorted(sorted(best.values())[:k], key=lambda offer: offer[2]):
            near = window(context) if windowed else (None, None)
            wanted.append(("a", f, context, context % 64, value_of[f, context], *near, ending))
    whole = tree(parts, rng, lambda some: merged(store, some, [["a"]], rule), interlaced=seed > 1)
    assert rows_of(store, [whole], "top_contexts") == wanted


@pytest.mark.parametrize("seed", range(3))
def test_samples_of_equal_hashes_go_by_place(tmp_path: Path, small: None, seed: int) -> None:
    """Populations are added on a stratum's first row, whoever of it is left."""
    store, rng = Store(str(tmp_path)), np.random.default_rng(seed)
    units, k = 10, 2
    rule = made_up(units, sample_k=k, places=rng.permutation(units))
    all_rows: dict[tuple[int, int], list[tuple[int, int, int]]] = {}  # -> (hash, place, context)
    populations: dict[tuple[int, int], int] = {}
    parts = []
    for ordinal in range(units):
        features, strata, counts, hashes, contexts_ = [], [], [], [], []
        for f in range(12):
            for stratum in (-3, 0, 5):
                n = int(rng.integers(0, k + 1))
                for i, local in enumerate(sorted(rng.choice(30, n, replace=False).tolist())):
                    hash_ = (0, 1, 2**63 + 5, WORD)[rng.integers(4)]
                    place = (int(rule.places[ordinal]) << LOCAL_BITS) + local
                    all_rows.setdefault((f, stratum), []).append((hash_, place, key(ordinal, local)))
                    population = int(rng.integers(n, 1000)) if i == 0 else 0
                    populations[f, stratum] = populations.get((f, stratum), 0) + population
                    for column, value in zip(
                        (features, strata, counts, hashes, contexts_),
                        (f, stratum, population, hash_, key(ordinal, local)),
                        strict=True,
                    ):
                        column.append(value)
        columns = context_columns(contexts_, [1.0] * len(contexts_), True)
        columns |= {"feature": np.array(features, np.int32), "stratum": np.array(strata, np.int32)}
        columns |= {"population": np.array(counts, np.int64), "hash": np.array(hashes, np.uint64)}
        parts.append(write_summary(store, ordinal, "sampled_merged", columns, merged=True))
    wanted = []
    for (f, stratum), found in sorted(all_rows.items()):
        chosen = sorted(sorted(found)[:k], key=lambda row: row[2])
        for i, (hash_, _, context) in enumerate(chosen):
            n = populations[f, stratum] if i == 0 else 0
            wanted.append(("a", f, stratum, n, hash_, context, context % 64, 1.0, *window(context)))
    whole = tree(parts, rng, lambda some: merged(store, some, [["a"]], rule), interlaced=False)
    assert rows_of(store, [whole], "sampled_merged") == wanted


def test_samples_of_a_unit_without_its_contexts_are_an_error(tiny_index: Path) -> None:
    store = Store(str(tiny_index))
    part, *others = leaves(store)
    saes = [sae["id"] for sae in contents(store).identity["saes"]]
    elsewhere = replace(part, files={**part.files, "contexts": others[0].files["contexts"]})
    with pytest.raises(DataError, match="contexts that their unit does not have"):
        merge_summaries.merge_summaries(store, [elsewhere], saes, rule_of(store), "nowhere")


def test_contexts_of_a_unit_may_lie_in_a_merged_file(tiny_index: Path) -> None:
    """As after gc: the unit's own `contexts` are gone, its summaries are not."""
    store = Store(str(tiny_index))
    rule, parts = rule_of(store), leaves(store)
    saes = [sae["id"] for sae in contents(store).identity["saes"]]
    whole = merged(store, parts, [saes], rule, summaries=False)
    moved = [replace(p, files={**p.files, "contexts": whole.files["contexts"]}) for p in parts[3:8]]
    made = [
        merge_summaries.merge_summaries(store, some, saes, rule, f"contexts-{i}")
        for i, some in enumerate((parts[3:8], moved))
    ]
    one, other = (
        Part((3, 8), {kind: tuple(r.path for r in records) for kind, records in found.items()}, True)
        for found in made
    )
    assert rows_of(store, [one], "sampled_merged") == rows_of(store, [other], "sampled_merged") != []


# --- SAEs


def test_sums_of_the_sample_give_the_same_variance_unexplained() -> None:
    """Of units as small as a demo's, against float64 over all their tokens."""
    rng = np.random.default_rng(1)
    for scale, rel in ((0.01, 1e-7), (1.0, 1e-9), (3000.0, 1e-9)):
        shift = rng.normal(size=64)
        units, x, errors = [], [], []
        for _ in range(40):
            sample = torch.from_numpy((rng.normal(size=(250, 64)) * 0.3 + shift) * scale)
            x.append(sample.numpy())
            errors.append(float((rng.normal(size=64) * 0.1 * scale) ** 2 @ np.ones(64) * 250))
            moments = Moments(64)
            moments.add(sample, 250 * 64)
            units.append(moments.columns(errors[-1]))
        whole = np.concatenate(x)
        wanted = sum(errors) / float(((whole - whole.mean(axis=0)) ** 2).sum())

        def total(name: str, units: list[dict[str, list[Any]]] = units) -> Fraction:
            words = ((u[f"{name}_high"][0] << 64) + u[f"{name}_low"][0] for u in units)
            return Fraction(sum(words), 1 << 24)

        component = [Fraction(int(s), 1 << 24) for s in sum(u["sample_sum"][0] for u in units)]
        spread = total("squares") - sum(c * c for c in component) / len(whole)
        assert float(total("error") / spread) == pytest.approx(wanted, rel=rel)


@pytest.mark.parametrize("sample", [[1e12, 0.0], [float("inf"), 0.0], [float("nan"), 1.0]])
def test_what_does_not_fit_the_sums_is_an_error(sample: list[float]) -> None:
    moments = Moments(2)
    moments.add(torch.tensor([sample]), 1)
    with pytest.raises(DataError, match="too large"):
        moments.columns(1.0)


def sae_row(ordinal: int, sample: list[int], squares: int, sae: str = "a") -> dict[str, Any]:
    return {
        "sae": [sae], "unit": [ordinal], "n_tokens": [10 + ordinal], "n_active": [5], "sample_tokens": [2],
        "sample_sum": [sample], "squares_high": [squares >> 64], "squares_low": [squares & WORD],
        "error_high": [0], "error_low": [7],
    }  # fmt: skip


def test_sums_of_saes_that_pass_64_bits_stay_in_rows_of_their_own(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    rng, parts, rows = np.random.default_rng(3), [], []
    for ordinal in range(12):
        writer = UnitWriter(store, f"u{ordinal}", 0, "a", {})
        for sae in ("b", "a"):
            rows.append(sae_row(ordinal, [int(v) for v in rng.integers(-(2**61), 2**61, 3)], WORD - 5, sae))
            writer.write("saes", rows[-1])
        parts.append(Part((ordinal, ordinal + 1), {"saes": (writer.close()["saes"].path,)}, False))
    whole = tree(parts, rng, lambda some: merged(store, some, [["a", "b"]], made_up(12)), interlaced=False)
    found = table(store, [whole], "saes").to_pylist()
    assert [row["sae"] for row in found] == sorted(row["sae"] for row in found)
    for sae in ("a", "b"):
        wanted = [row for row in rows if row["sae"] == [sae]]
        own = [row for row in found if row["sae"] == sae]
        assert 1 < len(own) < 12
        assert own[0]["unit"] == 0
        for i in range(3):
            assert sum(row["sample_sum"][i] for row in own) == sum(row["sample_sum"][0][i] for row in wanted)
        assert sum((row["squares_high"] << 64) + row["squares_low"] for row in own) == 12 * (WORD - 5)
        assert sum(row["n_tokens"] for row in own) == sum(range(10, 22))
        assert sum(row["error_low"] for row in own) == 7 * 12


# --- tables with keys


def test_keyed_tables_are_cut_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups by rows and by bytes, metadata of every type with NULLs, segments of one long document."""
    store = Store(str(tmp_path))
    kinds = {
        "b": "bool",
        "i": "int64",
        "d": "double",
        "s": "string",
        "t": "timestamp",
        "j": "json",
        "n": "null",
    }
    parts, wanted = [], {"documents": [], "contexts": [], "segments": []}
    for ordinal in range(30):
        writer = UnitWriter(store, f"u{ordinal}", 0, "a", kinds)
        rows = []
        for local in range(ordinal % 4):
            own = (
                (None, ordinal, 0.5, "x'\n", 12345, None, None)
                if local % 2
                else (True, None, None, "", None, "{}", None)
            )
            rows.append((key(ordinal, local), f"id{local}", "c", "s", local, 1, 3, 9, *own))
        names = writer.schema("documents").names
        if rows:
            writer.write("documents", dict(zip(names, zip(*rows, strict=True), strict=True)))
        wanted["documents"] += rows
        n = 5000 if ordinal == 7 else ordinal % 3
        segments = [(key(ordinal), i, "user", i, i + 1) for i in range(n)]
        if segments:
            columns = zip(*segments, strict=True)
            writer.write("segments", dict(zip(writer.schema("segments").names, columns, strict=True)))
        wanted["segments"] += segments
        tokens = np.arange(400, dtype=np.int32)
        columns = {
            "context": [key(ordinal, i) for i in range(4)], "document": [key(ordinal)] * 4, "start": [0] * 4,
            "first": [1] * 4, "tokens": windows_column(tokens, np.arange(4), np.full(4, 300), pa.int32()),
            "counted": windows_column(tokens > 3, np.arange(4), np.full(4, 300), pa.bool_()),
            "place_hash": np.array([WORD - ordinal] * 4, np.uint64),
        }  # fmt: skip
        writer.write("contexts", columns)
        wanted["contexts"] += [
            (
                c,
                key(ordinal),
                0,
                1,
                tokens[i : i + 300].tolist(),
                (tokens > 3)[i : i + 300].tolist(),
                WORD - ordinal,
            )
            for i, c in enumerate(columns["context"])
        ]
        parts.append(Part((ordinal, ordinal + 1), {k: (r.path,) for k, r in writer.close().items()}, False))
    monkeypatch.setattr(merge_keyed, "_ROWS", 1000)
    monkeypatch.setattr(merge_keyed, "_BYTES", 40_000)
    rule = made_up(30, metadata=kinds)
    whole = tree(parts, np.random.default_rng(0), lambda some: merged(store, some, [], rule), interlaced=True)
    for kind, rows in wanted.items():
        found = table(store, [whole], kind)
        assert found.schema.names == rule.schema(kind).names
        got = rows_of(store, [whole], kind)
        if kind == "documents":
            at = found.schema.names.index("t")
            got = [(*row[:at], row[at] and 12345, *row[at + 1 :]) for row in got]
        assert got == rows
    assert max(group.nbytes for group in row_groups(store, whole, "contexts")) < 60_000
    assert 3 < len(list(row_groups(store, whole, "contexts"))) < 20
    assert len(list(row_groups(store, whole, "documents"))) == 1
    assert max(group.num_rows for group in row_groups(store, whole, "segments")) < 5000


def test_a_merge_that_fails_closes_what_it_had_open(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, opened = Store(str(tmp_path)), []
    pairs = [(f, t) for f in range(50) for t in range(9)]
    parts = [write_rows(store, 0, [{"a": pairs}]), write_rows(store, 1, [{"b": pairs}])]
    bad = tmp_path / parts[1].files["activations"][0]
    data = bad.read_bytes()
    bad.write_bytes(data[:60] + bytes(len(data) // 4) + data[60 + len(data) // 4 :])
    create, open_ = store.create, store.open

    def keeping(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any) -> Any:
            opened.append(make(*args))
            return opened[-1]

        return made

    monkeypatch.setattr(store, "create", keeping(create))
    monkeypatch.setattr(store, "open", keeping(open_))
    with pytest.raises(DataError, match=bad.name):
        merge_rows.merge_rows(store, parts, ["a", "b"], made_up(2), "m")
    assert len(opened) == 3
    assert all(stream.closed for stream in opened)


def test_records_say_what_the_files_are(tiny_index: Path, middling: None) -> None:
    store = Store(str(tiny_index))
    rule, parts = rule_of(store), leaves(store)
    saes = [sae["id"] for sae in contents(store).identity["saes"]]
    done = merge_rows.merge_rows(store, parts, saes, rule, "records")
    done |= merge_summaries.merge_summaries(store, parts, saes, rule, "records")
    done |= merge_keyed.merge_keyed(store, parts, rule, "records")
    inputs = {
        kind: tuple(path for part in parts for path in part.files.get(kind, ()))
        for kind in ("contexts", "activations")
    }
    tops = {"top_contexts": tuple(record.path for record in done["top_contexts"])}
    whole = Part((parts[0].ordinals[0], parts[-1].ordinals[1]), inputs | tops, True)
    done |= merge_pages.merge_pages(store, [whole], saes, rule, "records")
    assert set(done) == set(KINDS) - {"sampled_contexts", "segments", "quarantine"}
    for kind, records in done.items():
        for i, record in enumerate(records):
            assert isinstance(record, DataFileRecord)
            assert record.path == f"{DATA}/{kind}/records-{i}.parquet"
            data = (tiny_index / record.path).read_bytes()
            digest = hashlib.blake2b(data, digest_size=16).hexdigest()
            assert (record.bytes, record.digest) == (len(data), digest)
            assert record.rows == pq.ParquetFile(tiny_index / record.path).metadata.num_rows
