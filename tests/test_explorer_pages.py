"""What the explorer's pages say, held against SQL; pages as functions, without HTTP where that is enough."""

from __future__ import annotations

import io
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import duckdb
import hostile
import pyarrow.parquet as pq
import pytest
import tiny
from starlette.datastructures import QueryParams
from starlette.testclient import TestClient

import queries
from pipelines.ledger import Ledger
from pipelines.reading import Reader
from pipelines.status import status
from pipelines.storage import Store
from queries import lookup
from queries.diff import diff
from queries.explorer import compare, documents, feature, overview, passage, sae, sql, tokens
from queries.explorer.app import application
from queries.explorer.session import Outside, Session, open_session
from queries.explorer.web import Ask, figure, share
from sae_runtime.errors import InputError

SAE = "tiny-res/layer_1/width_130/average_l0_13"
SMALL = "tiny-res/layer_1/width_37/average_l0_2"
Page = Callable[..., dict[str, Any]]


def on(session: Session) -> Page:
    """`page(function, **query)` is what a page's function answers."""

    def values(function: Callable[[Ask], Any], **query: Any) -> Any:
        snapshot = session.current()
        with snapshot.connection() as con:
            return function(Ask(session, snapshot, con, QueryParams({k: str(v) for k, v in query.items()})))

    return values


@pytest.fixture(scope="module")
def page(tiny_index: Path) -> Iterator[Page]:
    reader = Reader()
    yield on(open_session([str(tiny_index)], Outside(status, reader)))
    reader.close()


@pytest.fixture(scope="module")
def con(tiny_index: Path) -> duckdb.DuckDBPyConnection:
    return queries.connect(str(tiny_index))


@pytest.fixture(scope="module")
def client(tiny_index: Path) -> TestClient:
    session = open_session([str(tiny_index)], Outside(status))
    return TestClient(application(session), base_url="http://localhost", raise_server_exceptions=False)


def fetch(con: duckdb.DuckDBPyConnection, statement: str, *values: Any) -> list[dict[str, Any]]:
    result = con.execute(statement, list(values))
    names = [column for column, *_ in result.description]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


# --- the first page


def test_the_first_page_counts_as_sql_does(page: Page, con: duckdb.DuckDBPyConnection) -> None:
    found = page(overview.overview)
    rows = fetch(
        con,
        "SELECT s.sae, s.measured_l0, s.width, count(*) FILTER (f.n_tokens = 0) / count(*) AS dead "
        "FROM saes AS s JOIN features AS f ON f.sae = s.sae GROUP BY ALL ORDER BY s.sae",
    )
    assert [row["sae"] for row in found["saes"]] == [row["sae"] for row in rows]
    for shown, row in zip(found["saes"], rows, strict=True):
        assert shown["dead"] == pytest.approx(row["dead"], abs=1e-12)
        assert shown["measured_l0"] == row["measured_l0"]
        assert shown["density"] == pytest.approx(row["measured_l0"] / row["width"])
    assert any(0 < row["dead"] < 1 for row in rows)
    [corpus] = found["corpora"]
    assert corpus == fetch(con, "SELECT corpus, count(*) AS documents, sum(n_tokens)::BIGINT AS tokens "
                                "FROM documents GROUP BY corpus")[0]  # fmt: skip
    drawn = found["chart"]["data"]["values"]
    assert {each["sae"] for each in drawn} == {row["sae"] for row in rows}
    places = [(each["kind"], each["layer"], each["place"]) for each in drawn]
    assert len(set(places)) == len(places)


def test_saes_are_found_by_id_and_site(page: Page) -> None:
    by_id = page(overview.overview, find="WIDTH_37")
    assert {row["width"] for row in by_id["saes"]} == {37}
    assert by_id["of"] == len(tiny.SAES)
    assert {row["site"] for row in page(overview.overview, find="o_proj")["saes"]} == {
        f"model.layers.{layer}.self_attn.o_proj.input" for layer in (1, 3)
    }
    assert page(overview.overview, find="nothing of this")["saes"] == []


def test_progress_is_that_of_status(page: Page, tiny_index: Path) -> None:
    [told] = page(overview.status)["indexes"]
    wanted = status(str(tiny_index))
    assert (told["state"], told["committed"], told["units"]) == ("complete", wanted.committed, wanted.units)


# --- an SAE


@pytest.mark.parametrize("sort", [*sae.COLUMNS, *(f"-{column}" for column in sae.COLUMNS)])
def test_the_table_is_sorted_as_sql_sorts(page: Page, con: duckdb.DuckDBPyConnection, sort: str) -> None:
    column = sort.removeprefix("-")
    up = (column == "feature") != sort.startswith("-")
    key = "abs(max)" if column == "max" else column
    wanted = fetch(
        con,
        f"SELECT {', '.join(sae.COLUMNS)} FROM features WHERE sae = ? "
        f"ORDER BY {key} {'ASC' if up else 'DESC'} NULLS LAST, feature",
        SAE,
    )
    shown = []
    for number in range(1, 4):
        found = page(sae.sae, sae=SAE, sort=sort, page=number, quantiles=1)
        shown += [{name: row[name] for name in sae.COLUMNS} for row in found["rows"]]
        assert same(fetch(con, found["statement"]), shown[50 * (number - 1) :])
    assert same(shown, wanted)
    plain = page(sae.sae, sae=SAE, sort=sort)
    assert ("p50" in plain["columns"]) == (column in ("p50", "p99"))
    assert [row["feature"] for row in plain["rows"]] == [row["feature"] for row in wanted[:50]]
    with pytest.raises(InputError, match="page: 4, but there are 3"):
        page(sae.sae, sae=SAE, page=4)


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    return repr(a) == repr(b)  # NaN too


FILTERS = {
    "min_density": ("density >= 0.05", 0.05), "max_density": ("density <= 0.05", 0.05),
    "min_max": ("abs(max) >= 60", 60), "max_max": ("abs(max) <= 60", 60),
    "min_tokens": ("n_tokens >= 100", 100), "min_documents": ("n_documents >= 30", 30),
    "dead": ("n_tokens = 0", "yes"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILTERS)
def test_filters_are_conditions(page: Page, con: duckdb.DuckDBPyConnection, name: str) -> None:
    condition, value = FILTERS[name]
    some = SMALL if name == "dead" else SAE
    wanted = fetch(con, f"SELECT feature FROM features WHERE sae = ? AND {condition}", some)
    found = page(sae.sae, sae=some, **{name: value})
    assert found["counts"]["found"] == len(wanted)
    assert 0 < len(wanted) < found["counts"]["width"]
    assert {row["feature"] for row in found["rows"]} <= {row["feature"] for row in wanted}
    asked = con.execute(found["statement"]).fetchall()  # the link that reproduces the table
    assert [row[0] for row in asked] == [row["feature"] for row in found["rows"]]


def test_densities_add_up(page: Page, con: duckdb.DuckDBPyConnection) -> None:
    bins = page(sae.sae, sae=SAE)["densities"]["data"]["values"]
    for each in bins:
        inside = "SELECT count(*) AS n FROM features WHERE sae = ? AND density >= ? AND density < ?"
        [row] = fetch(con, inside, SAE, each["low"], each["high"])
        assert row["n"] == pytest.approx(each["features"], abs=1)  # an edge may be off by an ulp
    assert sum(each["features"] for each in bins) == page(sae.sae, sae=SAE, dead="no")["counts"]["found"]


def test_the_map_has_every_live_feature_or_counts_them_all(
    page: Page, con: duckdb.DuckDBPyConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = fetch(
        con, "SELECT feature, density, abs(max) AS max FROM features WHERE sae = ? AND n_tokens > 0", SAE
    )
    points = page(sae.points, sae=SAE)["data"]["values"]
    assert sorted(points, key=lambda row: row["feature"]) == sorted(live, key=lambda row: row["feature"])
    monkeypatch.setattr(sae, "_DRAWN", 10)
    cells = page(sae.points, sae=SAE, min_density=0.01, max_density=0.1, min_max=1, max_max=9)
    assert cells["params"][0]["value"] == {"x": [0.01, 0.1], "y": [1.0, 9.0]}
    rows = cells["data"]["values"]
    assert sum(row["features"] for row in rows) == len(live)
    assert 1 < len(rows) <= len(live)
    for row in rows:
        inside = [
            each
            for each in live
            if row["density"] <= each["density"] < row["density_to"]
            and row["max"] <= each["max"] < row["max_to"]
        ]
        assert len(inside) == pytest.approx(row["features"], abs=1)


def test_examples_are_those_of_the_command(page: Page, con: duckdb.DuckDBPyConnection) -> None:
    wanted = {row["feature"]: row["example"] for row in lookup.feature_table(con, SAE, "n_tokens", 50)}
    assert {row["feature"]: row["example"] for row in page(sae.sae, sae=SAE)["rows"]} == wanted


# --- a feature


@pytest.mark.parametrize("number", [0, 3, 77, tiny.ALWAYS])
def test_a_feature_is_what_sql_says(page: Page, con: duckdb.DuckDBPyConnection, number: int) -> None:
    found = page(feature.feature, sae=SAE, feature=number, by="lang")
    [row] = fetch(con, "SELECT * FROM features WHERE sae = ? AND feature = ?", SAE, number)
    assert {name: found["found"][name] for name in lookup.FEATURE_COLUMNS} == {
        name: row[name] for name in lookup.FEATURE_COLUMNS
    }
    drawn = [] if found["chart"] is None else found["chart"]["data"]["values"]
    assert sum(each["tokens"] for each in drawn) == row["n_tokens"]
    tops = fetch(con, "SELECT * FROM top_contexts WHERE sae = ? AND feature = ? ORDER BY rank", SAE, number)
    assert [(c["context"], c["activation"]) for c in found["found"]["contexts"]] == [
        (top["context"], top["activation"]) for top in tops
    ]
    for context in found["found"]["contexts"]:
        own = fetch(con, "SELECT document FROM contexts WHERE context = ?", context["context"])
        assert context["document"] == own[0]["document"]
    groups = {row["value"]: row for row in found["groups"]}
    for lang in ("en", "ja", None):
        [count] = fetch(
            con,
            "SELECT count(*) AS documents, count(f.document) AS active, "
            "coalesce(sum(f.n_tokens), 0) AS tokens FROM documents AS d "
            "LEFT JOIN (FROM document_features WHERE sae = ? AND feature = ?) AS f "
            "ON f.document = d.document WHERE d.lang IS NOT DISTINCT FROM ?", SAE, number, lang,
        )  # fmt: skip
        assert {name: groups[lang][name] for name in count} == count
    assert sum(row["tokens"] for row in groups.values()) == row["n_tokens"]


def test_samples_are_those_of_the_view(page: Page, con: duckdb.DuckDBPyConnection) -> None:
    for number in (1, 3, 9):
        shown = [
            (one["stratum"], one["of"], each["context"], each["activation"], tuple(each["pieces"][0]))
            for one in page(feature.samples, sae=SAE, feature=number)["strata"]
            for each in one["contexts"]
        ]
        rows = fetch(
            con,
            "SELECT * FROM sampled_contexts WHERE sae = ? AND feature = ? "
            "ORDER BY stratum DESC, abs(activation) DESC, context", SAE, number,
        )  # fmt: skip
        assert rows
        assert [each[:4] for each in shown] == [
            (row["stratum"], row["stratum_contexts"], row["context"], row["activation"]) for row in rows
        ]


def test_samples_without_pruning_are_the_same(con: duckdb.DuckDBPyConnection, tiny_index: Path) -> None:
    """The view joins all rows; `samples` on a connection that knows its files reads a feature's alone."""
    plain = queries.connect(str(tiny_index))
    from queries import pruning

    assert pruning.held(plain, SAE) is not None
    for number in range(20):
        fast = lookup.samples(con, SAE, number)
        known = pruning._held.pop(plain)
        try:
            slow = lookup.samples(plain, SAE, number)
        finally:
            pruning._held[plain] = known
        assert fast == slow


def test_a_dead_feature_says_so(page: Page, client: TestClient) -> None:
    found = page(feature.feature, sae=SMALL, feature=tiny.DEAD)
    assert (found["chart"], found["found"]["contexts"]) == (None, [])
    assert page(feature.samples, sae=SMALL, feature=tiny.DEAD)["strata"] == []
    text = client.get(f"/feature?{urlencode({'sae': SMALL, 'feature': tiny.DEAD})}").text
    assert "Dead: never active" in text


def test_cofiring_is_the_recipes(page: Page, con: duckdb.DuckDBPyConnection) -> None:
    from queries.recipe import statement

    found = page(feature.cofiring, sae=SAE, feature=3)
    text = statement(con, "cofiring_documents", {"sae": SAE, "feature": "3", "limit": "20"})
    assert same(found["rows"], fetch(con, text))
    assert len(found["rows"]) == 20
    other = page(feature.cofiring, sae=SAE, feature=3, other="layer_3/width_130/average_l0_6")
    assert {row["other_sae"] for row in other["rows"]} == {"tiny-res/layer_3/width_130/average_l0_6"}
    everywhere = page(feature.cofiring, sae=SAE, feature=3, other="all")
    assert len({row["other_sae"] for row in everywhere["rows"]}) > 1


# --- documents


def test_a_document_is_shaded_by_its_rows(page: Page, con: duckdb.DuckDBPyConnection) -> None:
    [row] = fetch(con, "SELECT document, n_tokens FROM documents ORDER BY n_tokens DESC LIMIT 1")
    shown: list[tokens.Piece] = []
    number, more = 1, True
    while more:
        found = page(documents.document, document=row["document"], sae=SAE, feature=tiny.ALWAYS, page=number)
        shown += found["pieces"]
        number, more = number + 1, found["more"]
    assert number > 2
    [text] = fetch(
        con,
        "SELECT string_agg(context_text(context), '' ORDER BY start) AS whole FROM contexts "
        "WHERE document = ?", row["document"],
    )  # fmt: skip
    whole = "".join(piece.text for piece in shown)
    assert len(whole) > 1000
    assert whole in text["whole"].replace("<bos>", "")
    values = fetch(
        con,
        "SELECT a.activation FROM activations AS a JOIN contexts AS c USING (context) "
        "WHERE a.sae = ? AND a.feature = ? AND c.document = ? ORDER BY c.start, a.position",
        SAE, tiny.ALWAYS, row["document"],
    )  # fmt: skip
    assert [piece.value for piece in shown if piece.value] == [each["activation"] for each in values]


def test_labels_name_the_strongest_features(page: Page, con: duckdb.DuckDBPyConnection) -> None:
    [row] = fetch(con, "SELECT document FROM documents WHERE n_tokens BETWEEN 20 AND 60 LIMIT 1")
    found = page(documents.document, document=row["document"], sae=SAE, tokens="1")
    rows = fetch(
        con,
        "SELECT c.start + a.position - c.first AS token, a.feature, a.activation "
        "FROM activations AS a JOIN contexts AS c USING (context) WHERE a.sae = ? AND c.document = ? "
        "ORDER BY token, abs(activation) DESC, feature", SAE, row["document"],
    )  # fmt: skip
    by_token: dict[int, list[dict[str, Any]]] = {}
    for each in rows:
        by_token.setdefault(each["token"], []).append(each)
    labelled = [piece for piece in found["pieces"] if piece.words]
    assert [piece.words.split("\n")[0] for piece in labelled] == [
        f"{own[0]['feature']}: {own[0]['activation']:.4g}" for own in by_token.values()
    ]
    crowded = [i for i, own in enumerate(by_token.values()) if len(own) > 5]
    assert crowded
    for i in crowded:
        own = list(by_token.values())[i]
        assert labelled[i].words.split("\n")[5:] == [f"{len(own) - 5} more"]
    strongest = fetch(
        con, "SELECT feature, n_tokens, max FROM document_features WHERE sae = ? AND document = ? "
        "ORDER BY abs(max) DESC, feature LIMIT 30", SAE, row["document"],
    )  # fmt: skip
    assert found["strongest"] == strongest


def test_documents_are_found_by_id_and_file(page: Page) -> None:
    assert {row["id"] for row in page(documents.documents, id="3-")["rows"]} == {"3-0", "3-1", "3-2"}
    assert len(page(documents.documents, id="part_07.jsonl")["rows"]) == 3
    first, second = page(documents.documents), page(documents.documents, page=2)
    assert (len(first["rows"]), first["more"]) == (50, True)
    assert not {row["document"] for row in first["rows"]} & {row["document"] for row in second["rows"]}
    assert page(documents.documents, id="' OR true --")["rows"] == []


# --- a text of one's own


def test_a_text_says_what_the_index_says_of_it(page: Page, con: duckdb.DuckDBPyConnection) -> None:
    """A document of the index as one's own text has the same features as there."""
    text = tiny.texts_by_file()[4][0]["text"]
    [row] = fetch(con, "SELECT document, n_tokens FROM documents WHERE id = '4-0'")
    statement = "SELECT feature, n_tokens, max FROM document_features WHERE sae = ? AND document = ?"
    rows = {each["feature"]: each for each in fetch(con, statement, SAE, row["document"])}
    found = page(passage.passage, q=text, sae=SAE)
    assert (found["fired"], found["found"].counted) == (len(rows), row["n_tokens"])
    assert "".join(piece.text for piece in found["pieces"]) == text
    for each in found["rows"]:
        own = rows[each["feature"]]
        assert (each["here_tokens"], each["here"]) == (own["n_tokens"], pytest.approx(own["max"], rel=0.01))
        [known] = fetch(
            con, "SELECT density, max FROM features WHERE sae = ? AND feature = ?", SAE, each["feature"]
        )
        assert (each["density"], each["max"]) == (known["density"], known["max"])
        assert each["share"] == pytest.approx(abs(each["here"] / each["max"]))
    one = page(passage.passage, q=text, sae=SAE, feature=found["rows"][0]["feature"])
    assert (
        sum(piece.value != 0 for piece in one["pieces"]) == one["active"] == found["rows"][0]["here_tokens"]
    )


def test_features_of_a_text_are_sorted(page: Page) -> None:
    text = "the cat sat on a mat while seven red foxes jumped"
    keys: dict[str, Callable[[dict[str, Any]], float]] = {
        "max": lambda row: -abs(row["here"]), "share": lambda row: -row["share"],
        "rare": lambda row: row["density"], "tokens": lambda row: -row["here_tokens"],
    }  # fmt: skip
    for sort, key in keys.items():
        rows = page(passage.passage, q=text, sae=SAE, sort=sort)["rows"]
        assert [key(row) for row in rows] == sorted(key(row) for row in rows)
        assert len(rows) > 10


def test_a_form_s_newlines_are_newlines(page: Page) -> None:
    with_form, plain = (page(passage.passage, q=q, sae=SAE) for q in ("the\r\ncat", "the\ncat"))
    assert [piece.text for piece in with_form["pieces"]] == [piece.text for piece in plain["pieces"]]
    assert with_form["rows"] == plain["rows"]


def test_a_text_that_cannot_be_run_is_said(page: Page, tiny_index: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="q: a text has at most 8,000 characters, this has 8,001"):
        page(passage.passage, q="x" * 8001)
    closed = on(open_session([str(tiny_index)], Outside(status)))
    assert "--no-model" in closed(passage.passage, q="a")["wrong"]
    reader = Reader(model=str(tmp_path))
    moved = on(open_session([str(tiny_index)], Outside(status, reader)))
    found = moved(passage.passage, q="a cat")
    assert (found["_status"], found["wrong"].startswith("model.uri:")) == (400, True)
    reader.close()
    assert page(passage.passage, q=" \n")["found"] is None


def test_it_waits_for_the_model_and_says_so(tiny_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import Future

    class Slow:
        doing = "loading the model"

        def read(self, identity: dict[str, Any], sae: str, text: str) -> Future[Any]:
            return Future()

    monkeypatch.setattr(passage, "_WAIT", 0.01)
    client = TestClient(
        application(open_session([str(tiny_index)], Outside(status, Slow()))), base_url="http://localhost"
    )
    text = client.get("/text?q=a").text
    assert '<meta http-equiv="refresh" content="2">' in text
    assert "loading the model" in text
    assert "http-equiv" not in client.get("/text").text


def test_a_failure_that_was_waited_for_is_told(
    tiny_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page that asks again by itself must not ask for ever."""
    from pipelines import scanned

    def slow(*_: Any) -> None:
        time.sleep(0.5)
        raise InputError("model.uri: gone")

    monkeypatch.setattr(passage, "_WAIT", 0.01)
    monkeypatch.setattr(scanned, "model", slow)
    reader = Reader()
    ask = on(open_session([str(tiny_index)], Outside(status, reader)))
    assert ask(passage.passage, q="a cat")["waits"]
    until(lambda: not ask(passage.passage, q="a cat")["waits"])
    assert ask(passage.passage, q="a cat")["wrong"] == "model.uri: gone"
    reader.close()


# --- comparing


def test_a_comparison_is_diff_s(page: Page, con: duckdb.DuckDBPyConnection) -> None:
    found = page(compare.compare, a="even", b="NOT even", min_documents=5)
    wanted = diff(con, "even", "NOT even", min_documents=5)
    rows = wanted.table.to_pylist()
    assert same(
        [{n: row[n] for n in ("sae", "feature", "p", "q")} for row in found["rows"]],
        [{n: row[n] for n in ("sae", "feature", "p", "q")} for row in rows[:200]],
    )
    assert (found["found"].a, found["found"].b, found["more"]) == (wanted.a, wanted.b, len(rows) - 200)
    drawn = found["chart"]["data"]["values"]
    assert len(drawn) == sum(math.isfinite(row["effect"] or math.nan) for row in rows)
    for each in drawn[:50]:
        assert each["height"] == pytest.approx(-math.log10(each["q"]))


def test_sets_of_a_column_s_values(page: Page, con: duckdb.DuckDBPyConnection) -> None:
    offers = {each["column"]: each["values"] for each in page(compare.compare)["offers"]}
    assert {row["value"]: row["n"] for row in offers["lang"]} == dict(
        con.execute("SELECT lang, count(*) FROM documents WHERE lang IS NOT NULL GROUP BY lang").fetchall()
    )
    assert "score" not in offers or len(offers["score"]) <= 40
    one = page(compare.compare, column="lang", value="en", against="ja", min_documents=5)
    asked = page(compare.compare, a="lang = 'en'", b="lang = 'ja'", min_documents=5)
    assert same(one["rows"], asked["rows"])
    rest = page(compare.compare, column="lang", value="en", min_documents=5)
    asked = page(compare.compare, a="lang = 'en'", b="lang IS DISTINCT FROM 'en'", min_documents=5)
    assert same(rest["rows"], asked["rows"])
    with pytest.raises(InputError, match="documents have no 'x'"):
        page(compare.compare, column="x", value="en")
    nothing = page(compare.compare, column="lang", value="' OR true --")
    assert nothing["wrong"].startswith("a: the set is empty")


def test_a_comparison_is_sorted_by_effect(page: Page) -> None:
    for sort, sign in (("a", -1), ("b", 1)):
        rows = page(compare.compare, a="even", b="NOT even", min_documents=5, sort=sort)["rows"]
        effects = [sign * row["effect"] for row in rows if row["effect"] is not None]
        assert effects == sorted(effects)


# --- SQL


def test_sql_shows_what_it_gives(page: Page) -> None:
    found = page(
        sql.sql, q="SELECT 1 AS a, 'x' AS a, NULL AS n, [1, NULL] AS l, {'k': 'v'} AS s, map {'a': 1} AS m"
    )
    assert found["names"] == ["a", "a_1", "n", "l", "s", "m"]
    assert list(found["rows"][0].values()) == [1, "x", None, "[1, NULL]", "{'k': v}", "{a=1}"]
    for statement in (
        "WITH a AS (SELECT [3] AS q) FROM a -- end",
        "VALUES ([3])",
        "(SELECT [3])",
        "SELECT [3];",
    ):
        assert [list(row.values()) for row in page(sql.sql, q=statement)["rows"]] == [["[3]"]]
    for statement in ("SHOW TABLES", "DESCRIBE features", "EXPLAIN SELECT [1]", "-- so\nSELECT 1"):
        assert page(sql.sql, q=statement)["rows"]


def test_sql_keeps_its_order_whatever_the_columns(page: Page) -> None:
    for column in ("range", "[range]"):
        found = page(sql.sql, q=f"SELECT {column} AS x FROM range(300000) ORDER BY range DESC")
        assert [str(row["x"]).strip("[]") for row in found["rows"]] == [str(299999 - i) for i in range(1000)]
        assert found["more"]


def test_long_lists_are_cut_and_say_so(page: Page) -> None:
    began = time.monotonic()
    [row] = page(sql.sql, q="SELECT list(range) AS l FROM range(5000000)")["rows"]
    assert time.monotonic() - began < 30
    assert row["l"].startswith("[0, 1, 2, ")
    assert row["l"].endswith(" and 4999800 more")
    assert len(row["l"]) < 2100


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT", "SELECT 1; SELECT 2", "CREATE TABLE x AS SELECT 1", "COPY (SELECT 1) TO '/tmp/x'",
        "SELECT 1) --", "FROM read_csv('/etc/passwd')", "ATTACH '/tmp/x.db'", "INSTALL httpfs", "LOAD httpfs",
        "SET threads = 1", "SELECT * FROM (COPY (SELECT 1) TO '/tmp/x')", "PRAGMA database_list; SELECT [1]",
        "EXPLAIN ANALYZE COPY features TO 'x'",
        "SELECT error('no'), [1]", "SELECT getenv('HOME'), [1]",
    ],
)  # fmt: skip
def test_sql_that_does_not_read_is_refused_where_it_was_typed(client: TestClient, statement: str) -> None:
    answer = client.get(f"/sql?{urlencode({'q': statement})}")
    assert answer.status_code == 400
    assert 'role="alert">sql: ' in answer.text
    assert unescape(answer.text.split("<textarea")[1].split(">", 1)[1].split("</textarea>")[0]) == statement
    for kind in ("csv", "jsonl", "parquet"):
        assert client.get(f"/sql?{urlencode({'q': statement, 'download': kind})}").status_code == 400


def test_downloads_have_every_row(client: TestClient, con: duckdb.DuckDBPyConnection) -> None:
    statement = "SELECT sae, feature, density, histogram FROM features ORDER BY ALL"
    rows = fetch(con, statement)
    got = {
        kind: client.get(f"/sql?{urlencode({'q': statement, 'download': kind})}")
        for kind in ("csv", "jsonl", "parquet")
    }
    assert same(pq.read_table(io.BytesIO(got["parquet"].content)).to_pylist(), rows)
    lines = [json.loads(line) for line in got["jsonl"].text.splitlines()]
    assert [(each["sae"], each["feature"]) for each in lines] == [
        (row["sae"], row["feature"]) for row in rows
    ]
    assert len(got["csv"].text.splitlines()) == len(rows) + 1
    for kind, answer in got.items():
        assert answer.headers["content-disposition"] == f'attachment; filename="corpuscope.{kind}"'
    refused = client.get(f"/sql?{urlencode({'q': 'SELECT INTERVAL 3 MONTH', 'download': 'parquet'})}")
    assert (refused.status_code, "take csv" in refused.text) == (400, True)


def test_a_statement_is_stopped_in_time(tiny_index: Path) -> None:
    session = open_session([str(tiny_index)], Outside(status), seconds=0.5)
    client = TestClient(application(session), base_url="http://localhost")
    slow = "SELECT count(*) FROM range(1000000000) AS a, range(1000) AS b WHERE hash(a.range, b.range) = 1"
    began = time.monotonic()
    answer = client.get(f"/sql?{urlencode({'q': slow})}")
    assert time.monotonic() - began < 20
    assert (answer.status_code, "stopped after 0.5 s" in answer.text) == (503, True)
    assert client.get("/").status_code == 200


def test_recipes_are_run_with_their_parameters(page: Page, con: duckdb.DuckDBPyConnection) -> None:
    from queries.recipe import recipes, statement

    listed = page(sql.recipe_list)
    assert [each.name for each, _ in listed["rows"]] == [each.name for each in recipes()]
    form = page(sql.recipe, name="cofiring_documents")
    assert set(form["lacking"]) == {"sae", "feature"}
    found = page(sql.recipe, name="cofiring_documents", sae=SAE, feature=3, run=1)
    rows = fetch(con, statement(con, "cofiring_documents", {"sae": SAE, "feature": "3"}))
    assert [row["feature"] for row in found["rows"]] == [row["feature"] for row in rows[:1000]]
    wrong = page(sql.recipe, name="cofiring_documents", sae=SAE, feature="x", run=1)
    assert (wrong["_status"], bool(wrong["wrong"])) == (400, True)


# --- all of them


def test_what_is_asked_wrongly_is_one_line(client: TestClient) -> None:
    asked = {
        "/sae": "sae: ", "/sae?sae=nothing": "names no SAE", "/feature": "sae: ",
        f"/feature?sae={SAE}": "feature: a whole number is wanted",
        f"/feature?sae={SAE}&feature=130": "0 to 129", f"/feature/samples?sae={SAE}&feature=130": "0 to 129",
        f"/feature?sae={SAE}&feature=-1": "feature: -1 is not between",
        "/document?document=99999999999": "has none", "/document": "document: a whole number",
        f"/sae?sae={SAE}&sort=x": "sort: 'x' is none of", f"/sae?sae={SAE}&min_density=nan": "min_density: a",
        f"/sae?sae={SAE}&page=0": "page: 0 is not", f"/sae?sae={SAE}&words=a%00b": "NUL",
        f"/feature?sae={SAE}&feature=1&by=nothing": "by: 'nothing'", "/recipe?name=nothing": "name: ",
        "/sql?q=SELECT+1&download=x": "download: ", "/compare?sae=x&a=even&b=even": "sae: ",
    }  # fmt: skip
    for address, words in asked.items():
        answer = client.get(address)
        assert answer.status_code == 400, address
        look = hostile.Look(answer.text)
        assert words in look.text, (address, look.text)
        assert not look.problems
    gone = client.get("/nothing/of/this")
    assert (gone.status_code, "/nothing/of/this: no such page" in gone.text) == (404, True)


def test_every_sae_and_page_links_back_to_sql_that_runs(client: TestClient) -> None:
    for address in (f"/sae?sae={SAE}&min_density=0.01&dead=no", f"/feature?sae={SAE}&feature=3"):
        links = [link for link in hostile.Look(client.get(address).text).links if link.startswith("/sql?")]
        assert links
        for link in links:
            assert client.get(link).status_code == 200
            assert parse_qs(urlsplit(link).query)["q"]


def test_figures_do_not_round_to_nothing() -> None:
    assert [figure(v) for v in (None, math.nan, 0, 1234567, 0.000012345, 123456.7)] == [
        "–", "–", "0", "1,234,567", "1.234e-05", "123,457",
    ]  # fmt: skip
    assert [figure(v, 3) for v in (4011.3, 999.6, 0.12345, 123456.7)] == [
        "4,011",
        "1,000",
        "0.123",
        "123,457",
    ]
    assert [share(v) for v in (None, 0.0, 1.0, 0.00031)] == ["–", "0 %", "100 %", "0.031 %"]


# --- indexes of other kinds, and one that grows


@pytest.mark.parametrize("keep", ["none", "documents", {"sample": 0.5}])
def test_pages_of_an_index_that_keeps_less(
    keep: Any,
    tmp_path: Path,
    write_spec: Callable[..., Path],
    scan_inline: Callable[..., Any],
    tiny_suites: Path,
) -> None:
    saes = [{"uri": str(tiny_suites / "tiny-att"), "keep": keep}]
    assert not scan_inline(write_spec(tmp_path, saes=saes)).failed
    client = TestClient(
        application(open_session([str(tmp_path / "index")], Outside(status))),
        base_url="http://localhost", raise_server_exceptions=False,
    )  # fmt: skip
    con = queries.connect(str(tmp_path / "index"))
    name = "tiny-att/layer_3/width_50/average_l0_5"
    [row] = fetch(con, "SELECT feature FROM features WHERE sae = ? ORDER BY n_tokens DESC LIMIT 1", name)
    seeds = [
        "/", "/compare", "/compare?a=even&b=NOT+even&min_documents=3", "/recipes", f"/sae?sae={name}",
        f"/sae/points.json?sae={name}", f"/feature?sae={name}&feature={row['feature']}",
        f"/feature/cofiring?sae={name}&feature={row['feature']}", "/documents",
        f"/document?document=0&sae={name}&feature={row['feature']}",
        f"/document?document=0&sae={name}&tokens=1", f"/feature/samples?sae={name}&feature={row['feature']}",
    ]  # fmt: skip
    for address in seeds:
        answer = client.get(address)
        refused = "keep" in hostile.Look(answer.text).text and "none" in hostile.Look(answer.text).text
        cannot = keep == "none" and address.startswith(("/compare?", "/feature/cofiring"))
        assert answer.status_code == (400 if cannot else 200), (address, answer.text[:2000])
        if cannot:
            assert refused, address
    shaded = client.get(f"/document?document=0&sae={name}&tokens=1").text
    assert "no token can be shaded" in shaded
    assert ("were not kept" in shaded) == (keep == "none")
    tops = client.get(f"/feature?sae={name}&feature={row['feature']}").text
    assert 'class="t p20' in tops  # top contexts have their windows


def test_a_snapshot_follows_a_scan(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], few: Any,
    tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A page sees one moment; the next ones what has been committed since."""
    import queries.explorer.session as sessions

    monkeypatch.setattr(sessions, "_LOOK_SECONDS", 0.05)
    shutil.copytree(tiny_corpus, tmp_path / "corpus")
    late = [tmp_path / "corpus" / f"part_{i:02d}.jsonl" for i in range(12, 24)]
    for file in late:
        file.rename(file.with_suffix(".later"))
    spec = write_spec(tmp_path, corpus={"uri": f"{tmp_path}/corpus/*.jsonl"}, saes=few)
    assert not scan_inline(spec).failed
    session = open_session([str(tmp_path / "index")], Outside(status))
    ask = on(session)
    first = session.snapshot
    before = ask(overview.overview)["corpora"][0]["documents"]
    for file in late:
        file.with_suffix(".later").rename(file)
    with first.connection() as con:
        assert not scan_inline(spec).failed
        session.current()
        until(lambda: session.current() is not first)
        counted = con.execute("SELECT count(*) FROM documents").fetchall()
        assert counted == [(before,)]  # the request that had begun sees its moment
    after = ask(overview.overview)["corpora"][0]["documents"]
    assert after > before
    assert (
        after
        == fetch(queries.connect(str(tmp_path / "index")), "SELECT count(*) AS n FROM documents")[0]["n"]
    )
    assert session.trouble == ""
    (tmp_path / "index" / "index.json").rename(tmp_path / "gone.json")
    until(lambda: session.current() is not None and session.trouble != "")
    client = TestClient(application(session), base_url="http://localhost")
    answer = client.get("/")  # what was opened stays, and says that it grows old
    assert answer.status_code == 200
    assert "no index here" in answer.text


def until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_an_index_without_a_unit_has_its_pages(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], few: Any
) -> None:
    tiny.write_rows(tmp_path / "corpus" / "one.jsonl", [{"id": "1", "text": ""}])
    corpus = {"uri": f"{tmp_path}/corpus/one.jsonl", "metadata": []}
    assert not scan_inline(write_spec(tmp_path, corpus=corpus, saes=few)).failed
    client = TestClient(
        application(open_session([str(tmp_path / "index")], Outside(status))),
        base_url="http://localhost", raise_server_exceptions=False,
    )  # fmt: skip
    identity = Ledger(Store(str(tmp_path / "index"))).identity()
    assert identity is not None
    name = identity["saes"][0]["id"]
    for address in (
        "/", "/documents", "/compare", f"/sae?sae={name}", f"/sae/points.json?sae={name}",
        f"/feature?sae={name}&feature=1", "/document?document=0", "/recipes", "/sql?q=FROM+features",
    ):  # fmt: skip
        answer = client.get(address)
        assert answer.status_code == 200, (address, hostile.Look(answer.text).text)


def test_two_indexes_are_one(tiny_index: Path, few_index: Path) -> None:
    """The second adds no SAE here, so it is refused as everywhere; alone each has its pages."""
    with pytest.raises(InputError):
        open_session([str(tiny_index), str(few_index)], Outside(status))
