"""`corpuscope diff`: the test's exactness, what it finds in noise and in planted differences, the command.

Expected values are other people's (statsmodels, scipy, whole numbers) or sums over raw rows in Python.
"""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import tiny
from scipy import stats
from statsmodels.stats.contingency_tables import StratifiedTable

import queries
from jobs import cli
from queries import diff as differences
from queries.conditional import p_values, supports
from queries.diff import COLUMNS, diff, stratified
from queries.odds import mantel_haenszel
from sae_runtime.errors import InputError

SAE = tiny.SAES[0].path
ALPHAS = (0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 0.95)


# The test of one feature ---------------------------------------------------------------------------


def exact_p(fired_a, fired, units_a, units) -> Fraction:
    """The definition, in whole numbers."""
    ways, first = [1], 0
    for n, m, size in zip(map(int, fired), map(int, units_a), map(int, units), strict=True):
        low, high = max(0, n + m - size), min(n, m)
        one = [math.comb(m, x) * math.comb(size - m, n - x) for x in range(low, high + 1)]
        both = [0] * (len(ways) + len(one) - 1)
        for i, x in enumerate(ways):
            for j, y in enumerate(one):
                both[i + j] += x * y
        ways, first = both, first + low
    s = int(sum(fired_a)) - first
    return min(Fraction(1), Fraction(2 * min(sum(ways[: s + 1]), sum(ways[s:])), sum(ways)))


def tables(rng, strata: int, size: int, share: float, rate: float, log_odds: float, features: int = 8):
    """Random margins and counts; a side may be empty in a stratum, or everything fire."""
    units = rng.integers(1, size + 1, strata)
    units_a = rng.binomial(units, share)
    odds = rate / max(1 - rate, 1e-9) * math.exp(log_odds)
    a = rng.binomial(units_a, odds / (1 + odds), (features, strata))
    return a, a + rng.binomial(units - units_a, rate, (features, strata)), units_a, units


def values_of(fired_a, fired, units_a, units):
    return p_values(fired_a, fired, units_a, units, mantel_haenszel(fired_a, fired, units_a, units)[0])


CASES = [
    (strata, size, share, rate, log_odds)
    for strata, size in ((1, 4), (1, 900), (3, 60), (12, 30), (60, 8))
    for share in (0.01, 0.5, 0.9)
    for rate in (0.02, 0.5, 0.97, 1.0)
    for log_odds in (0.0, -2.0, 7.0)
]


def test_p_is_that_of_whole_numbers_to_12_digits() -> None:
    rng = np.random.default_rng(1)
    smallest = 1.0
    for case in CASES:
        margins = tables(rng, *case)
        p = values_of(*margins)
        for f, found in enumerate(p):
            wanted = exact_p(margins[0][f], margins[1][f], *margins[2:])
            assert found == pytest.approx(float(wanted), rel=1e-11, abs=1e-300), (case, f)
            smallest = min(smallest, found)
    assert smallest < 1e-30


def test_tiny_p_keep_their_precision() -> None:
    units, units_a = np.array([340, 260, 400]), np.array([170, 130, 200])
    fired = np.array([[170, 130, 200], [165, 130, 200], [170, 128, 199]])
    fired_a = np.array([[169, 130, 199], [164, 130, 200], [170, 128, 197]])
    for f, found in enumerate(values_of(fired_a, fired, units_a, units)):
        wanted = exact_p(fired_a[f], fired[f], units_a, units)
        assert 1e-306 < float(wanted) < 1e-270
        assert math.log(found) == pytest.approx(
            math.log(wanted.numerator) - math.log(wanted.denominator), abs=1e-9
        )


@pytest.mark.parametrize("size", [2_000, 100_000])
def test_p_of_one_stratum_is_scipys(size: int) -> None:
    n, m = size // 2 + 3, size // 3
    mean, sd = n * m / size, math.sqrt(n * m * (size - n) * (size - m) / size**3)
    x = np.round(mean + sd * np.array([-6, -3, -1, -0.1, 0, 0.2, 1, 2.5, 5])).astype(np.int64)
    law = stats.hypergeom(size, m, n)
    wanted = np.minimum(1, 2 * np.minimum(law.cdf(x), law.sf(x - 1)))
    found = values_of(x[:, None], np.full((len(x), 1), n), np.array([m]), np.array([size]))
    np.testing.assert_allclose(found, wanted, rtol=1e-7)  # scipy's own precision


def test_p_does_not_depend_on_the_tilt() -> None:
    margins = tables(np.random.default_rng(2), 5, 200, 0.4, 0.3, 0.8, features=300)
    found = values_of(*margins)
    for tilt in (0.0, 1e-3, 5.0, -5.0, 40.0):
        np.testing.assert_allclose(p_values(*margins, np.full(300, tilt)), found, rtol=1e-10)


@pytest.mark.parametrize("support", [20, 50, 200, 1000])
def test_under_the_null_p_is_never_too_small_and_nearly_uniform(support: int) -> None:
    """The whole law of p for some margins: P(p <= alpha) <= alpha, and not below by more than its steps."""
    rng = np.random.default_rng(support)
    units = rng.multinomial(8_000, np.array([1, 3, 8, 12, 8, 3, 1]) / 36)
    units_a = rng.binomial(units, 0.4)
    fired = rng.multivariate_hypergeometric(units, support)
    low, high = (x[0] for x in supports(fired[None], units_a, units))
    law = np.ones(1)
    for k in range(len(units)):
        law = np.convolve(
            law, stats.hypergeom(units[k], units_a[k], fired[k]).pmf(np.arange(low[k], high[k] + 1))
        )
    steps = np.arange(len(law))[:, None] - np.concatenate([[0], np.cumsum(high - low)[:-1]])
    fired_a = low + np.clip(steps, 0, high - low)
    p = values_of(fired_a, np.broadcast_to(fired, fired_a.shape), units_a, units)
    order = np.argsort(p)
    below = np.cumsum(law[order])  # P(p <= p[order])
    distinct = np.append(np.diff(p[order]) > 1e-12, True)
    assert (below[distinct] <= p[order][distinct] * (1 + 1e-9) + 1e-12).all()
    if support >= 50:
        for alpha in np.linspace(0.05, 0.95, 19):
            assert alpha - law[p <= alpha].sum() <= 2 * law.max()


# Odds ratios ---------------------------------------------------------------------------------------


def stratified_tables(fired_a, fired, units_a, units) -> list[np.ndarray]:
    return [
        np.array([[x, m - x], [n - x, size - m - n + x]])
        for x, n, m, size in zip(fired_a, fired, units_a, units, strict=True)
    ]


def test_effect_and_interval_are_those_of_statsmodels() -> None:
    rng, seen = np.random.default_rng(3), 0
    for case in CASES:
        margins = tables(rng, *case, features=2)
        effect, low, high = mantel_haenszel(*margins)
        for f in np.flatnonzero(np.isfinite(effect)):
            inside = [t for t in stratified_tables(margins[0][f], margins[1][f], *margins[2:]) if t.sum() > 1]
            wanted = StratifiedTable(inside)
            assert effect[f] == pytest.approx(wanted.logodds_pooled, abs=1e-9)
            assert (low[f], high[f]) == pytest.approx(wanted.logodds_pooled_confint(), abs=1e-8)
            seen += 1
    assert seen > 60


def test_the_finite_bound_of_an_infinite_effect_is_exact() -> None:
    """At the bound the tail, one point, has probability 0.025."""
    rng, seen = np.random.default_rng(4), 0
    for strata, size, rate in ((1, 3, 0.5), (1, 4000, 0.2), (4, 40, 0.3), (30, 4, 0.5), (3, 20_000, 0.7)):
        units = rng.integers(max(2, size // 2), size + 1, strata)
        units_a = np.maximum(units // 3, 1)
        fired = rng.binomial(units, rate, (5, strata))
        lowest, highest = supports(fired, units_a, units)
        for end, sign in ((highest, 1), (lowest, -1)):
            effect, low, high = mantel_haenszel(end, fired, units_a, units)
            for f in np.flatnonzero(lowest.sum(1) < highest.sum(1)):
                bound, other = (low, high)[::sign][0][f], (low, high)[::sign][1][f]
                assert effect[f] == other == sign * math.inf
                log_tail = 0.0
                for k in range(strata):
                    x = np.arange(lowest[f, k], highest[f, k] + 1)
                    law = stats.hypergeom.logpmf(x, units[k], units_a[k], fired[f, k]) + bound * x
                    log_tail += law[-1 if sign > 0 else 0] - np.logaddexp.reduce(law)
                assert math.exp(log_tail) == pytest.approx(0.025, rel=1e-5)
                seen += 1
    assert seen > 30
    nothing = mantel_haenszel(np.array([[3]]), np.array([[9]]), np.array([3]), np.array([9]))
    assert all(np.isnan(value[0]) for value in nothing)


def test_q_is_by_definition_over_the_tested_features_of_all_saes(tiny_index: Path) -> None:
    """Benjamini and Hochberg: the least p m / rank of those that are not below, at most 1."""
    table = diff(queries.connect(str(tiny_index)), "row % 2 = 0", "row % 2 <> 0", min_documents=5).table
    p = table["p"].to_numpy()
    assert len(set(table["sae"].to_pylist())) > 1
    rate = p * len(p) / (p <= p[:, None]).sum(1)
    np.testing.assert_allclose(
        table["q"].to_numpy(), [min(1.0, rate[p >= each].min()) for each in p], rtol=1e-12
    )


# Sets of documents ---------------------------------------------------------------------------------


def world(
    lengths: np.ndarray, fires: np.ndarray, maxima: np.ndarray | None = None, **columns: Any
) -> duckdb.DuckDBPyConnection:
    """The views that `diff` reads, of one SAE: `fires` [documents, features] are active tokens."""
    con = duckdb.connect()
    document, feature = np.nonzero(fires)
    key = np.arange(len(lengths)) // 50 * (1 << 20) + np.arange(len(lengths)) % 50  # units of 50 documents
    active = fires[document, feature]
    views = {
        "documents": {
            "document": key,
            "id": [f"d{i}" for i in range(len(lengths))],
            "source": ["s"] * len(lengths),
            "row": key,
            "n_tokens": lengths.astype(np.int32),
            **columns,
        },
        "document_features": {
            "sae": ["s/one"] * len(feature),
            "feature": feature.astype(np.int32),
            "document": key[document],
            "n_tokens": active.astype(np.int32),
            "max": (fires if maxima is None else maxima)[document, feature].astype(np.float32),
            "sum": active.astype(np.float64),
        },
        "_declared_saes": {
            "sae": ["s/one"],
            "width": pa.array([fires.shape[1]], pa.int32()),
            "keep": ["documents"],
            "neuronpedia": pa.array([None], pa.string()),
        },
        "_duplicates": {"sae": pa.array([], pa.string()), "same_as": pa.array([], pa.string())},
    }
    for view, columns_ in views.items():
        con.register(view, pa.table(columns_))
    con.execute(
        "CREATE MACRO _furthest(highest, lowest) AS CASE WHEN -lowest > highest THEN lowest ELSE highest END"
    )
    return con


def fired(rng, lengths: np.ndarray, densities: np.ndarray) -> np.ndarray:
    """Active tokens of documents at densities of a token, [documents, features]."""
    return rng.binomial(lengths[:, None], densities).astype(np.int16)


def lognormal(rng, documents: int, typical: float = 120.0) -> np.ndarray:
    return np.maximum(1, typical * np.exp(rng.normal(0, 0.8, documents))).astype(np.int64)


def found(table: pa.Table, column: str) -> np.ndarray:
    return table[column].to_numpy(zero_copy_only=False)


@pytest.mark.parametrize("seed", range(3))
def test_equal_densities_and_fourfold_lengths_give_no_discoveries(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    side = rng.random(2_500) < 0.5
    lengths = lognormal(rng, 2_500) * np.where(side, 4, 1)
    densities = np.minimum(np.exp(rng.normal(-5.5, 1.5, 2_000)), 0.3)
    con = world(lengths, fired(rng, lengths, densities), a=side)
    done = diff(con, "a", "NOT a")
    assert done.tested > 1_500
    assert done.strata > 5
    assert done.per_octave > 1
    assert found(done.table, "q").min() >= 0.05
    p = found(done.table, "p")
    for alpha in ALPHAS:  # features are independent here
        assert (p <= alpha).mean() <= alpha + 4 * math.sqrt(alpha * (1 - alpha) / len(p))
    # Unlike without strata, or this would show nothing.
    monkeypatch.setattr(differences, "stratified", lambda tokens, side: (np.zeros(len(tokens), np.int64), 1))
    assert (found(diff(con, "a", "NOT a").table, "q") < 0.05).mean() > 0.5


def test_strata_are_octaves_unless_lengths_differ_inside_them() -> None:
    rng = np.random.default_rng(6)
    lengths, side = lognormal(rng, 5_000), rng.random(5_000) < 0.5
    strata, per_octave = stratified(lengths, side)
    octave = np.floor(np.log2(lengths)).astype(int)
    assert per_octave == 1
    for k in np.unique(octave):
        inside = octave == k
        assert len(set(strata[inside])) == 1
        one_sided = side[inside].all() or not side[inside].any()
        assert (strata[inside][0] == -1) == one_sided
    assert stratified(lengths * np.where(side, 8, 1), side)[1] > 1
    assert stratified(np.where(side, 4, 1024), side)[0].max() == -1


def test_planted_differences_are_found() -> None:
    rng = np.random.default_rng(7)
    side = rng.random(4_000) < 0.4
    lengths = lognormal(rng, 4_000) * np.where(side, 2, 1)
    densities = np.minimum(np.exp(rng.normal(-5, 1, 600)), 0.1)
    planted = np.exp2(rng.choice([-2.0, -1.0, 1.0, 2.0], 60))
    fires = fired(rng, lengths, densities)
    # A document of a that would not fire, or would, does with the odds that were planted.
    chance = 1 - (1 - densities[:60]) ** lengths[side, None]
    odds = planted * chance / np.maximum(1 - chance, 1e-9)
    fires[np.ix_(side, np.arange(60))] = rng.random(odds.shape) < odds / (1 + odds)
    table = diff(world(lengths, fires, a=side), "a", "NOT a", min_documents=100).table
    feature, q, effect = found(table, "feature"), found(table, "q"), found(table, "effect")
    low, high = found(table, "low"), found(table, "high")
    strong = set(feature[(q < 0.05) & (feature < 60)])
    assert len(strong) >= 50
    assert ((q < 0.05) & (feature >= 60)).sum() <= 0.15 * len(strong)
    at = feature < 60
    assert (np.sign(effect[at & (q < 0.05)]) == np.sign(np.log2(planted[feature[at & (q < 0.05)]]))).all()
    true = np.where(at, np.log2(planted[np.minimum(feature, 59)]), 0)
    covered = (low <= true) & (true <= high)
    assert covered.mean() == pytest.approx(0.95, abs=0.035)
    assert covered[at].sum() >= 51
    strength = np.where(low > 0, low, np.where(high < 0, -high, 0))
    assert list(zip(-strength, found(table, "p"), feature, strict=True)) == sorted(
        zip(-strength, found(table, "p"), feature, strict=True)
    )


def test_copies_in_groups_are_one_observation() -> None:
    rng = np.random.default_rng(8)
    lengths, side = np.repeat(lognormal(rng, 400), 8), np.repeat(rng.random(400) < 0.5, 8)
    fires = np.repeat(fired(rng, lengths[::8], np.exp(rng.normal(-5, 1, 500))), 8, axis=0)
    group = pa.array(np.repeat(np.arange(400), 8))
    con = world(lengths, fires, a=side, site=group)
    assert (found(diff(con, "a", "NOT a").table, "q") < 0.05).sum() > 50
    done = diff(con, "a", "NOT a", cluster="SITE")
    assert (found(done.table, "q") < 0.05).sum() == 0
    assert (done.a, done.a_units) == (side.sum(), side.sum() / 8)
    single = diff(world(lengths[::8], fires[::8], a=side[::8]), "a", "NOT a").table
    for column in ("feature", "a_documents", "a_rate", "a_density", "effect", "p", "q"):
        np.testing.assert_allclose(
            found(done.table.sort_by("feature"), column), found(single.sort_by("feature"), column), rtol=1e-9
        )


def test_maxima_keep_their_sign_and_a_groups_is_the_furthest() -> None:
    fires = np.array([[1], [1], [1], [0], [1]])
    maxima = np.array([[3.0], [-5.0], [2.0], [0.0], [-7.0]])
    group = pa.array(["x", "x", "y", "y", None])
    con = world(np.full(5, 10), fires, maxima, a=np.array([True, True, False, False, False]), site=group)
    by_document = diff(con, "a", "NOT a", min_documents=1).table.to_pylist()[0]
    assert (by_document["a_mean_max"], by_document["b_mean_max"]) == (-1.0, -2.5)
    by_group = diff(con, "a", "NOT a", min_documents=1, cluster="site").table.to_pylist()[0]
    assert (by_group["a_mean_max"], by_group["b_mean_max"]) == (-5.0, -2.5)
    assert (by_group["a_density"], by_group["a_documents"], by_group["b_documents"]) == (0.1, 1, 2)


def test_large_widths_are_read_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    lengths, side = lognormal(rng, 300), rng.random(300) < 0.5
    con = world(lengths, fired(rng, lengths, np.full(90, 0.01)), a=side)
    whole, told = diff(con, "a", "NOT a"), []
    monkeypatch.setattr(differences, "_CELLS", 500)
    sliced = diff(con, "a", "NOT a", told=told.append)
    assert len(told) == 3
    for column in COLUMNS[1:]:  # p of features side by side differ in their last digits
        np.testing.assert_allclose(
            found(sliced.table.sort_by("feature"), column),
            found(whole.table.sort_by("feature"), column),
            rtol=1e-9,
        )


# A real index --------------------------------------------------------------------------------------


def expected(con, sae: str, documents: list[dict], in_a: dict[int, bool], unit: dict[int, Any], least: int):
    """Columns of each feature that fires in `least` units, from raw activations; strata are octaves."""
    side = {unit[row["document"]]: in_a[row["document"]] for row in documents}
    size: dict[Any, int] = {}
    for row in documents:
        size[unit[row["document"]]] = size.get(unit[row["document"]], 0) + row["n_tokens"]
    active: dict[int, dict[Any, list[float]]] = {}
    for feature, document, activation in con.execute(
        "SELECT feature, document, activation FROM activations JOIN contexts USING (context) WHERE sae = ?",
        [sae],
    ).fetchall():
        active.setdefault(feature, {}).setdefault(unit[document], []).append(activation)
    answers = {}
    for feature, by_unit in active.items():
        if len(by_unit) < least:
            continue
        columns: dict[str, Any] = {}
        for letter, wanted in (("a", True), ("b", False)):
            units = [u for u in size if side[u] is wanted]
            fires = [u for u in units if u in by_unit]
            columns[f"{letter}_documents"] = len(fires)
            columns[f"{letter}_rate"] = len(fires) / len(units)
            columns[f"{letter}_density"] = sum(len(by_unit[u]) for u in fires) / sum(size[u] for u in units)
            maxima = [max(by_unit[u], key=abs) for u in fires]
            columns[f"{letter}_mean_max"] = sum(maxima) / len(maxima) if maxima else None
        octaves: dict[int, np.ndarray] = {}
        for u in size:
            octaves.setdefault(size[u].bit_length(), np.zeros((2, 2), int))[
                1 - side[u], 1 - (u in by_unit)
            ] += 1
        both = np.array([(t[0, 0], t[:, 0].sum(), t[0].sum(), t.sum()) for t in octaves.values()])
        columns["p"] = float(exact_p(*both.T))
        answers[feature] = columns
    return answers


@pytest.mark.parametrize("cluster", [None, "source", "lang"])
def test_the_columns_are_those_of_the_raw_rows(tiny_index: Path, cluster: str | None) -> None:
    by_lang = cluster == "lang"
    a, b = ("lang = 'en'", "lang = 'ja' OR lang IS NULL") if by_lang else ("even", "NOT even")
    con = queries.connect(str(tiny_index))
    rows = con.sql("SELECT * FROM documents").to_arrow_table().to_pylist()
    kept = [row for row in rows if row["n_tokens"]]
    in_a = {row["document"]: row["lang"] == "en" if by_lang else row["even"] for row in kept}
    # A document without a value is a group of its own.
    unit = {row["document"]: (row[cluster] if cluster else None) or row["document"] for row in kept}
    done = diff(con, a, b, [SAE], min_documents=5, cluster=cluster)
    wanted = expected(con, SAE, kept, in_a, unit, 5)
    assert done.per_octave == 1
    got = {row["feature"]: row for row in done.table.to_pylist()}
    assert len(got) > 20
    assert got.keys() == wanted.keys()
    for feature, columns in wanted.items():
        for column, value in columns.items():
            assert got[feature][column] == (value if value is None else pytest.approx(value, rel=1e-9)), (
                column
            )
    assert done.a == sum(in_a.values())
    assert (done.a + done.b, done.empty, done.neither) == (len(kept), len(rows) - len(kept), 0)
    assert done.alone == (sum(row["lang"] is None for row in kept) if by_lang else 0)
    assert done.a_units + done.b_units == len(set(unit.values()))


def test_random_splits_of_a_real_index_find_nothing(tiny_index: Path) -> None:
    """P(p <= alpha) <= alpha over splits; features of a split are not independent, so splits are counted."""
    con = queries.connect(str(tiny_index))
    shares = []
    for seed in range(30):
        half = f"hash(document * 1000 + {seed}) % 2 = 0"
        p = found(diff(con, half, f"NOT ({half})", ["tiny-mlp/layer_2/width_64/average_l0_3"], 10).table, "p")
        assert len(p) > 20
        shares.append([(p <= alpha).mean() for alpha in ALPHAS])
    mean, error = np.mean(shares, 0), np.std(shares, 0, ddof=1) / math.sqrt(len(shares))
    assert (mean <= np.array(ALPHAS) + 3 * error + 1e-9).all()
    assert mean[-1] > 0.4


# The command ---------------------------------------------------------------------------------------


@pytest.fixture
def corpuscope(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs `corpuscope diff`; returns exit code, stdout and stderr."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["corpuscope", "diff", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


def test_the_command_prints_rows_and_counts(tiny_index: Path, corpuscope: Callable[..., Any]) -> None:
    sets = ("--a", "even", "--b", "NOT even", "--sae", "width_37/average_l0_2", "--min-documents", 5)
    rows = diff(queries.connect(str(tiny_index)), "even", "NOT even", [SAE], 5).table.to_pylist()
    code, out, err = corpuscope(tiny_index, *sets, "--limit", 3, "--format", "json")
    shown = json.loads(out)
    assert code == 0
    assert [list(row) for row in shown] == [list(COLUMNS)] * 3
    assert [row["feature"] for row in shown] == [row["feature"] for row in rows[:3]]
    assert "left out" in err
    assert f"{len(rows)} features of 1 SAE fire in at least 5 documents" in err
    code, out, _ = corpuscope(tiny_index, *sets, "--format", "csv", "--limit", 100)
    assert len(list(csv.DictReader(io.StringIO(out)))) == len(rows)
    code, out, _ = corpuscope(tiny_index, *sets)
    assert out.split()[:4] == ["sae", "feature", "a_documents", "b_documents"]
    everything = corpuscope(tiny_index, *sets[:4], "--format", "jsonl", "--limit", 10_000)[1]
    assert len({json.loads(line)["sae"] for line in everything.splitlines()}) == len(tiny.SAES)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--a", "even", "--b", "true"), "--a, --b: "),
        (("--a", "even", "--b", "lang = 'xx'"), "--b: the set is empty: no document satisfies it"),
        (("--a", "even", "--b", "NOT even AND n_tokens = 0"), "--b: the set is empty: its documents have no"),
        (
            ("--a", "nothing = 1", "--b", "even"),
            '--a: sql: Binder Error: Referenced column "nothing" not found',
        ),
        (("--a", "even); DROP TABLE x; --", "--b", "even"), "--a: sql: "),
        (("--a", " ", "--b", "even"), "--a: an SQL predicate"),
        (
            ("--a", "even", "--b", "NOT even", "--cluster", "corpus"),
            "--cluster corpus: 1 group has documents in both",
        ),
        (
            ("--a", "even", "--b", "NOT even", "--cluster", "town"),
            "--cluster: `documents` has no column 'town'",
        ),
        (("--a", "even", "--b", "NOT even", "--sae", "nope"), "sae: 'nope' names no SAE"),
    ],
)
def test_what_is_wrong_is_one_line(
    tiny_index: Path, corpuscope: Callable[..., Any], args: tuple[str, ...], said: str
) -> None:
    code, out, err = corpuscope(tiny_index, *args)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_sets_of_other_lengths_only_are_said_to_be(tiny_index: Path, corpuscope: Callable[..., Any]) -> None:
    code, out, err = corpuscope(
        tiny_index, "--a", "n_tokens < 20", "--b", "n_tokens > 300", "--min-documents", 2, "--format", "json"
    )
    assert code == 0
    assert "only lengths can be told apart" in err
    assert {(row["effect"], row["low"], row["p"]) for row in json.loads(out)} == {(None, None, 1.0)}


def test_saes_without_document_rows_are_refused(tiny_index: Path, tmp_path: Path) -> None:
    index = shutil.copytree(tiny_index, tmp_path / "index")
    file = index / "index.json"
    identity = json.loads(file.read_text())
    (kept,) = (sae for sae in identity["saes"] if sae["id"] == SAE)
    kept["keep"] = "none"
    file.write_text(json.dumps(identity))
    con = queries.connect(str(index))
    for saes in (None, [SAE]):
        with pytest.raises(InputError, match=rf"{SAE}.*keep: none"):
            diff(con, "even", "NOT even", saes)
    assert diff(con, "even", "NOT even", [tiny.SAES[1].path], 5).tested
