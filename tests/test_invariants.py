"""Invariants 2, 3 and 5: statistics, top contexts and samples recomputed by brute force from the rows.

Everything here reads `activations`, `contexts` and `documents` and follows the contract's words; nothing
is taken from the code that streams. The index is made of two dozen units, so partials are merged; the same
is done once more with chunks, batches and segments cut so small that they fall inside documents.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import tiny
import torch

import queries
from pipelines.executors.base import Committed
from pipelines.scan import Started

TOP_K, SAMPLE_K = 4, 3  # of conftest's spec
EDGES = [2.0 ** (-10 + i / 8) for i in range(24 * 8 + 1)]
FIRST = tiny.SAES[0].path


@dataclass(frozen=True)
class Context:
    key: int
    place: tuple[str, int, int]  # source, row, start: corpus order, there being one source
    document: int
    tokens: list[int]
    counted: list[bool]


@dataclass
class Fired:
    """One feature's rows: context key -> [(position, activation)], ascending."""

    contexts: dict[int, list[tuple[int, float]]] = field(default_factory=dict)

    def values(self) -> list[float]:
        return [value for rows in self.contexts.values() for _, value in rows]


class Rows:
    """What an index's rows say."""

    def __init__(self, index: Path, activations: str = "activations") -> None:
        self.con = queries.connect(str(index))
        documents = self.con.sql("SELECT document, source, row, n_tokens FROM documents").fetchall()
        self.documents = {key: (source, row) for key, source, row, _ in documents}
        self.n_tokens = {key: n for key, _, _, n in documents}
        self.contexts = {
            key: Context(key, (*self.documents[document], start), document, tokens, counted)
            for key, document, start, tokens, counted in self.con.sql(
                "SELECT context, document, start, tokens, counted FROM contexts"
            ).fetchall()
        }
        self.fired: dict[tuple[str, int], Fired] = {}
        for sae, feature, context, position, value in self.con.sql(
            f"SELECT sae, feature, context, position, activation FROM {activations} ORDER BY ALL"
        ).fetchall():
            found = self.fired.setdefault((sae, feature), Fired())
            found.contexts.setdefault(context, []).append((position, value))
        self.widths = dict(self.con.sql("SELECT sae, width FROM saes").fetchall())

    def best(self, fired: Fired, context: int) -> tuple[float, int]:
        """A context's highest activation and its first position."""
        value = max(v for _, v in fired.contexts[context])
        return value, next(p for p, v in fired.contexts[context] if v == value)

    def near(self, fired: Fired, context: int, position: int) -> tuple[list[int], list[float]]:
        rows = [(p, v) for p, v in fired.contexts[context] if abs(p - position) <= 64]
        return [p for p, _ in rows], [v for _, v in rows]

    def top(self, sae: str, feature: int) -> list[tuple[Any, ...]]:
        """(rank, context, position, activation, positions, values) as the contract says."""
        fired = self.fired.get((sae, feature), Fired())
        offers: dict[int, tuple[float, Context, int]] = {}
        for context in sorted((self.contexts[key] for key in fired.contexts), key=lambda c: c.place):
            value, position = self.best(fired, context.key)
            if context.document not in offers or value > offers[context.document][0]:
                offers[context.document] = value, context, position
        chosen, endings = [], set()
        for value, context, position in sorted(offers.values(), key=lambda o: (-o[0], o[1].place)):
            ending = tuple(context.tokens[max(0, position - 15) : position + 1])
            if ending not in endings:
                endings.add(ending)
                near = self.near(fired, context.key, position)
                chosen.append((len(chosen) + 1, context.key, position, value, *near))
        return chosen[:TOP_K]

    def strata(self, sae: str, feature: int) -> dict[int, list[int]]:
        fired = self.fired.get((sae, feature), Fired())
        found: dict[int, list[int]] = {}
        for context in fired.contexts:
            found.setdefault(math.floor(math.log2(self.best(fired, context)[0])), []).append(context)
        return found


def mix(value: int) -> int:
    """The finaliser of splitmix64."""
    value ^= value >> 30
    value = value * 0xBF58476D1CE4E5B9 % 2**64
    value ^= value >> 27
    value = value * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def draw(context: Context, sae: str, feature: int) -> int:
    """A context's lot: the hash of its place, the SAE and the feature. Stays the same over versions."""
    place = "\0".join(("tiny", *map(str, context.place)))
    one, two = (
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        for text in (place, sae)
    )
    return mix(one ^ mix((two + feature * 0x9E3779B97F4A7C15) % 2**64))


def check_document_features(rows: Rows) -> None:
    wanted = {}
    for (sae, feature), fired in rows.fired.items():
        by_document: dict[int, list[float]] = {}
        for context, pairs in fired.contexts.items():
            by_document.setdefault(rows.contexts[context].document, []).extend(v for _, v in pairs)
        for document, values in by_document.items():
            total = float(sum(map(Fraction, values), Fraction(0)))
            wanted[sae, feature, document] = (len(values), max(values), total)
    found = rows.con.sql(
        "SELECT sae, feature, document, n_tokens, max, sum FROM document_features"
    ).fetchall()
    assert len(found) == len(wanted)
    assert {row[:3]: row[3:] for row in found} == wanted


def check_features(rows: Rows) -> None:
    counted = sum(sum(context.counted) for context in rows.contexts.values())
    con = rows.con.sql("SELECT * FROM features")
    names = [column[0] for column in con.description]
    found = {(row[0], row[1]): dict(zip(names, row, strict=True)) for row in con.fetchall()}
    assert set(found) == {(sae, f) for sae, width in rows.widths.items() for f in range(width)}
    assert names[:13] == [
        "sae", "feature", "n_tokens", "n_contexts", "n_documents", "density", "mean_active", "std_active",
        "max", "p50", "p90", "p99", "histogram",
    ]  # fmt: skip
    for key, row in found.items():
        fired = rows.fired.get(key, Fired())
        values = sorted(fired.values())
        n = len(values)
        assert row["n_tokens"] == n
        assert row["n_contexts"] == len(fired.contexts)
        assert row["n_documents"] == len({rows.contexts[c].document for c in fired.contexts})
        assert row["density"] == n / counted
        if not n:
            assert all(row[c] is None for c in ("mean_active", "std_active", "max", "p50", "p90", "p99"))
            continue
        total = sum(map(Fraction, values), Fraction(0))
        # The sum is exact and is rounded to a double once, then divided.
        assert row["mean_active"] == float(total) / n
        assert row["max"] == values[-1]
        variance = sum((Fraction(v) ** 2 for v in values), Fraction(0)) / n - (total / n) ** 2
        # E[x^2] - E[x]^2 in doubles loses what is below their last bits; no more than that is allowed.
        slack = 16 * np.finfo(float).eps * float((total / n) ** 2 + variance)
        assert abs(row["std_active"] ** 2 - float(variance)) <= slack
        bins = np.bincount(np.searchsorted(EDGES, values, side="right"), minlength=194)
        assert row["histogram"] == bins.tolist()
        for name, q in (("p50", Fraction(1, 2)), ("p90", Fraction(9, 10)), ("p99", Fraction(99, 100))):
            true = values[max(1, math.ceil(q * n)) - 1]
            if EDGES[0] <= true < EDGES[-1]:
                assert true / 1.045 <= row[name] <= true * 1.045


def check_top_and_samples(rows: Rows) -> None:
    top: dict[tuple[str, int], list[Any]] = {}
    for sae, feature, *rest in rows.con.sql(
        'SELECT sae, feature, rank, context, position, activation, positions, "values" FROM top_contexts '
        "ORDER BY sae, feature, rank"
    ).fetchall():
        top.setdefault((sae, feature), []).append(tuple(rest))
    assert set(top) == set(rows.fired)
    for key in rows.fired:
        assert top[key] == rows.top(*key), key

    samples: dict[tuple[str, int], dict[int, list[Any]]] = {}
    for sae, feature, stratum, *rest in rows.con.sql(
        "SELECT sae, feature, stratum, stratum_contexts, context, position, activation, positions, "
        '"values" FROM sampled_contexts'
    ).fetchall():
        samples.setdefault((sae, feature), {}).setdefault(stratum, []).append(rest)
    assert set(samples) == set(rows.fired)
    for key, fired in rows.fired.items():
        strata = rows.strata(*key)
        assert set(samples[key]) == set(strata)
        for stratum, members in strata.items():
            drawn = samples[key][stratum]
            lots = sorted((draw(rows.contexts[context], *key), context) for context in members)
            assert {context for _, context, *_ in drawn} == {context for _, context in lots[:SAMPLE_K]}
            assert len(drawn) == min(SAMPLE_K, len(members))
            for population, context, position, activation, positions, values in drawn:
                assert population == len(members)
                assert (activation, position) == rows.best(fired, context)
                assert (positions, values) == rows.near(fired, context, position)


def check_all(rows: Rows) -> None:
    check_document_features(rows)
    check_features(rows)
    check_top_and_samples(rows)


@pytest.fixture(scope="module")
def tiny_rows(tiny_index: Path) -> Rows:
    return Rows(tiny_index)


# --- invariant 2


def test_document_features_are_recomputed_from_the_rows(tiny_rows: Rows) -> None:
    check_document_features(tiny_rows)


def test_features_are_recomputed_from_the_rows(tiny_rows: Rows) -> None:
    check_features(tiny_rows)


def test_the_extremes_are_there(tiny_rows: Rows) -> None:
    """So that the recomputation above meets them: dead, always on, relu only, both open bins."""
    counted = sum(tiny_rows.n_tokens.values())
    assert (FIRST, tiny.DEAD) not in tiny_rows.fired
    assert len(tiny_rows.fired[FIRST, tiny.ALWAYS].values()) == counted
    assert min(tiny_rows.fired[FIRST, tiny.ALWAYS].values()) >= EDGES[-1]
    assert min(tiny_rows.fired[FIRST, tiny.NEGATIVE].values()) > 0
    assert 0.2 < len(tiny_rows.fired[FIRST, tiny.NEGATIVE].values()) / counted < 0.8
    assert max(tiny_rows.fired[FIRST, tiny.FAINT].values()) < EDGES[0]


def test_histogram_edges(tiny_rows: Rows) -> None:
    assert tiny_rows.con.sql("SELECT histogram_edges()").fetchall() == [(EDGES,)]


def test_counts_of_saes_documents_and_runs(tiny_rows: Rows) -> None:
    counted = sum(sum(context.counted) for context in tiny_rows.contexts.values())
    by_document: dict[int, int] = dict.fromkeys(tiny_rows.documents, 0)
    for context in tiny_rows.contexts.values():
        by_document[context.document] += sum(context.counted)
    assert by_document == tiny_rows.n_tokens
    assert sum(by_document.values()) == counted > 2000
    per_sae = dict.fromkeys(tiny_rows.widths, 0)
    for (sae, _), fired in tiny_rows.fired.items():
        per_sae[sae] += len(fired.values())
    for sae, n_tokens, l0 in tiny_rows.con.sql("SELECT sae, n_tokens, measured_l0 FROM saes").fetchall():
        assert n_tokens == counted
        assert l0 == per_sae[sae] / counted
    runs = tiny_rows.con.sql("SELECT run, documents, tokens FROM runs").fetchall()
    assert runs == [(1, len(tiny_rows.documents), counted)]


def test_fvu(tiny_rows: Rows, tiny_model: Path, tiny_suites: Path) -> None:
    """Against the formula in float64: closely on every 64th counted token of a unit, loosely on all."""
    causal = tiny.load_causal(tiny_model)
    contexts = sorted(tiny_rows.contexts.values(), key=lambda c: c.place)
    sites = sorted({sae.site for sae in tiny.SAES})
    found = tiny.dense(causal, (np.array([c.tokens]) for c in contexts), sites)
    sampled: list[bool] = []
    seen: dict[int, int] = {}
    for context in contexts:
        for keep in context.counted:
            if keep:
                number = seen.get(context.place[0], 0)
                sampled.append(number % 64 == 0)
                seen[context.place[0]] = number + 1
    measured = dict(tiny_rows.con.sql("SELECT sae, fvu FROM saes").fetchall())
    row_of = {
        (context.key, position): row
        for row, (context, position) in enumerate(
            (context, p) for context in contexts for p, keep in enumerate(context.counted) if keep
        )
    }
    for sae in tiny.SAES:
        x = np.concatenate(
            [a[0].double().numpy()[c.counted] for a, c in zip(found[sae.site], contexts, strict=True)]
        )
        t = {name: value.astype(np.float64) for name, value in tiny.load_sae(tiny_suites, sae.path).items()}
        pre = x @ t["W_enc"] + t["b_enc"]
        written = np.zeros(pre.shape, bool)
        for (name, feature), fired in tiny_rows.fired.items():
            for context, rows in fired.contexts.items() if name == sae.path else ():
                written[[row_of[context, position] for position, _ in rows], feature] = True
        # Where a pre-activation is its threshold but for float32's rounding, either answer is right.
        near = np.isclose(pre, t["threshold"], rtol=1e-6, atol=1e-6)
        assert near.mean() < 1e-3
        fires = np.where(near, written, (pre > t["threshold"]) & (pre > 0))
        assert (fires == written).all()
        f = torch.from_numpy(np.maximum(pre, 0) * fires).bfloat16().double().numpy()
        error = x - (f @ t["W_dec"] + t["b_dec"])

        def fvu(chosen: np.ndarray, error: np.ndarray = error, x: np.ndarray = x) -> float:
            part = x[chosen]
            return float((error[chosen] ** 2).sum() / ((part - part.mean(axis=0)) ** 2).sum())

        assert measured[sae.path] == pytest.approx(fvu(np.array(sampled)), rel=1e-7)
        assert measured[sae.path] == pytest.approx(fvu(np.ones(len(x), bool)), rel=0.3)


# --- invariant 3


def test_top_and_sampled_contexts_are_recomputed_from_the_rows(tiny_rows: Rows) -> None:
    check_top_and_samples(tiny_rows)


def test_equal_endings_were_met(tiny_rows: Rows) -> None:
    """Near-identical documents of the corpus would fill the top if they were not dropped."""
    dropped = 0
    for key, fired in tiny_rows.fired.items():
        best: dict[int, float] = {}
        for context in fired.contexts:
            document = tiny_rows.contexts[context].document
            best[document] = max(best.get(document, 0.0), tiny_rows.best(fired, context)[0])
        plain = sorted(best.values(), reverse=True)[:TOP_K]
        dropped += plain != [row[3] for row in tiny_rows.top(*key)]
    assert dropped > 5


def test_windows_are_cut_at_64(tiny_rows: Rows) -> None:
    """The contexts are long enough for a window to leave something out."""
    spans = tiny_rows.con.sql(
        "SELECT max(position - positions[1]), max(positions[-1] - position) FROM top_contexts"
    ).fetchall()
    assert spans == [(64, 64)]


def test_with_chunks_and_segments_inside_documents(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Chunks of two contexts, batches of one or two, short segments, units of a part of a file."""
    monkeypatch.setattr("pipelines.unit.CHUNK_TOKENS", {"cpu": 60})
    monkeypatch.setattr("pipelines.unit.BATCH_TOKENS", {"cpu": 64})
    monkeypatch.setattr("pipelines.unit.SEGMENT_ROWS", 500)
    monkeypatch.setattr("pipelines.planning.UNIT_BYTES", {"cpu": 3000})
    monkeypatch.setattr("pipelines.writer.ROWS_PER_GROUP", 64)
    lines = [
        line for i in range(8) for line in (tiny_corpus / f"part_{i:02d}.jsonl").read_text().splitlines()
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    spec = write_spec(tmp_path, corpus={"uri": "a.jsonl"}, context={"length": 32, "overlap": 5})
    assert not scan_inline(spec).failed
    assert len(list((tmp_path / "index" / "commits").rglob("*.json"))) > 2
    rows = Rows(tmp_path / "index")
    assert len(rows.documents) == len(lines)
    check_all(rows)


def test_several_sae_groups_give_what_one_gives(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_index: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And no reader sees a unit of which a group is missing (invariant 5)."""
    monkeypatch.setattr("pipelines.planning.memory_budget", lambda workers, device: 400_000)
    spec = write_spec(tmp_path)
    index = tmp_path / "index"
    seen: list[int] = []
    groups = [0]

    def observe(event: Any) -> None:
        if isinstance(event, Started):
            groups[0] = event.items // 24
        if isinstance(event, Committed) and event.work.group in (0, groups[0] - 1):
            whole = event.work.unit.ordinal + 1 if event.work.group else 0
            if event.work.unit.ordinal % 5 == 0:
                con = queries.connect(str(index))
                ((sources,),) = con.sql("SELECT count(DISTINCT source) FROM documents").fetchall()
                ((saes,),) = con.sql("SELECT count(DISTINCT sae) FROM activations").fetchall()
                assert (sources, saes) == (whole, len(tiny.SAES) if whole else 0)
                seen.append(sources)

    assert not scan_inline(spec, observe=observe).failed
    assert groups[0] > 1
    assert set(seen) == {0, 1, 6, 11, 16, 21}
    assert not tiny.differences(tiny.content(tiny_index), tiny.content(index))
    assert not tiny.differences(tiny.views(tiny_index), tiny.views(index))


def test_keep_changes_rows_and_nothing_else(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_suites: Path,
    tiny_index: Path, tiny_rows: Rows,
) -> None:  # fmt: skip
    keeps = {"tiny-res": {"sample": 0.4}, "tiny-mlp": "documents", "tiny-att": "none"}
    saes = [{"uri": str(tiny_suites / suite), "keep": keep} for suite, keep in keeps.items()]
    assert not scan_inline(write_spec(tmp_path, saes=saes)).failed
    con, full = queries.connect(str(tmp_path / "index")), tiny_rows.con
    same = ("documents", "segments", "contexts", "features", "top_contexts", "sampled_contexts", "vocabulary")
    for view in same:
        sql = f"SELECT * FROM {view} ORDER BY ALL"
        assert con.sql(sql).fetchall() == full.sql(sql).fetchall(), view
    sql = "SELECT * EXCLUDE (keep) FROM saes ORDER BY sae"
    assert con.sql(sql).fetchall() == full.sql(sql).fetchall()

    # Nothing is answered from partial rows: all or an error that names the policy.
    for view, suite in (("activations", "res"), ("activations", "mlp"), ("document_features", "att")):
        for what in ("count(*)", "max(feature)", "*"):
            with pytest.raises(duckdb.Error, match="keep"):
                con.sql(f"SELECT {what} FROM {view} WHERE sae LIKE 'tiny-{suite}/%'").fetchall()
        with pytest.raises(duckdb.Error, match="keep"):
            con.sql(f"SELECT count(*) FROM {view}").fetchall()
    for suite in ("res", "mlp"):
        sql = f"SELECT * FROM document_features WHERE sae LIKE 'tiny-{suite}/%' ORDER BY ALL"
        assert con.sql(sql).fetchall() == full.sql(sql).fetchall() != []

    # The sample is of whole documents: every row of those that are in, the same ones for each SAE.
    held = con.sql("SELECT sae, feature, context, position, activation FROM sampled_activations").fetchall()
    assert {row[0] for row in held} == {sae.path for sae in tiny.SAES if sae.path.startswith("tiny-res/")}
    inside = {tiny_rows.contexts[row[2]].document for row in held}
    nonempty = [document for document, n in tiny_rows.n_tokens.items() if n]
    assert 0.15 < len(inside) / len(nonempty) < 0.7
    wanted = full.sql(
        "SELECT sae, feature, context, position, activation FROM activations WHERE sae LIKE 'tiny-res/%'"
    ).fetchall()
    wanted = [row for row in wanted if tiny_rows.contexts[row[2]].document in inside]
    assert sorted(held) == sorted(wanted)


# --- invariant 5


def test_readers_see_whole_units_while_a_scan_runs(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_index: Path
) -> None:
    """One reader in step with the commits, one that opens the index as often as it can."""
    spec, index = write_spec(tmp_path), tmp_path / "index"
    committed: list[str] = []
    count = "SELECT source, count(*) FROM documents GROUP BY source"
    whole = dict(queries.connect(str(tiny_index)).sql(count).fetchall())
    opened: list[int] = []
    errors: list[BaseException] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            if not (index / "index.json").exists():
                continue
            try:
                con = queries.connect(str(index))
                units = dict(con.sql(count).fetchall())
                assert units.items() <= whole.items()
                lost = con.sql(
                    "SELECT count(*) FROM contexts c ANTI JOIN documents d USING (document)"
                ).fetchall()
                assert lost == [(0,)]
                opened.append(len(units))
            except BaseException as error:
                errors.append(error)
                return

    def observe(event: Any) -> None:
        if isinstance(event, Committed):
            committed.append(event.work.unit.path)
            if len(committed) in (1, 7, 23):
                con = queries.connect(str(index))
                assert dict(con.sql(count).fetchall()) == {path: whole[path] for path in committed}
                # Every row of the unit, nothing of the others: totals agree with the units' own rows.
                rows = Rows(index)
                check_document_features(rows)
                check_features(rows)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        assert not scan_inline(spec, observe=observe).failed
    finally:
        stop.set()
        thread.join()
    assert not errors, errors[0]
    assert len(committed) == 24
    assert len(set(opened)) > 2, "the reader must have met the scan on its way"


def test_a_data_file_without_a_commit_is_invisible(tmp_path: Path, tiny_index: Path) -> None:
    shutil.copytree(tiny_index, tmp_path / "index")
    before = tiny.views(tiny_index)
    for folder in (tmp_path / "index" / "data").iterdir():
        file = next(folder.iterdir())
        shutil.copy(file, folder / f"{file.stem}ff.parquet")
        (folder / "half.parquet").write_bytes(file.read_bytes()[:100])
    assert not tiny.differences(before, tiny.views(tmp_path / "index"))
    # And without its commit a unit is not there at all.
    gone = next((tmp_path / "index" / "commits").rglob("*.json"))
    gone.unlink()
    con = queries.connect(str(tmp_path / "index"))
    assert con.sql("SELECT count(DISTINCT document >> 20) FROM documents").fetchall() == [(23,)]
    check_features(Rows(tmp_path / "index"))
