"""Connections: what a query may touch, its time limit, and several indexes of one corpus as one."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny

import queries
from pipelines.storage import Store
from queries.connect import script
from queries.files import IndexFiles, url
from queries.lookup import rows, select
from sae_runtime.errors import CorpuscopeError, InputError
from sae_runtime.model import LanguageModel

RES, MLP = "tiny-res", "tiny-mlp"


# --- what a query may touch


@pytest.fixture
def con(tiny_index: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    connection = queries.connect(str(tiny_index))
    yield connection
    connection.close()


def listing(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*")}


WRITES = (
    "COPY (SELECT 1) TO '{outside}/x.csv'",
    "COPY (SELECT 1) TO '{index}/x.parquet'",
    "COPY (SELECT 1) TO '{data}'",
    "COPY (SELECT 1) TO 'corpuscope://0/x.csv'",
    "COPY (SELECT 1) TO 'corpuscope://0/vocabulary.parquet' (OVERWRITE)",
    "COPY (SELECT 1 AS a) TO 'corpuscope://0/folder' (FORMAT parquet, PARTITION_BY a)",
    "EXPORT DATABASE '{outside}/x'",
    "ATTACH '{outside}/x.db'",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{outside}/x.csv'",
    "CALL enable_profiling(save_location='{outside}/x.json')",
    "SET temp_directory = '{outside}/x'",
    "PRAGMA profiling_output = '{outside}/x'",
)
READS = (
    "SELECT * FROM read_text('{outside}/secret')",
    "SELECT * FROM '{outside}/secret.csv'",
    "SELECT * FROM read_blob('{outside}/*')",
    "SELECT * FROM glob('{outside}/*')",
    "SELECT * FROM sniff_csv('{outside}/secret')",
    "SELECT * FROM read_parquet('{data}')",
    "IMPORT DATABASE '{outside}'",
    "CREATE TABLE t AS SELECT 1 AS a; COPY t FROM '{outside}/secret'",
    "SELECT * FROM read_text('https://127.0.0.1:9/secret')",
    "SELECT * FROM seen_in_python",
)
SETTINGS = (
    "SET enable_external_access = true",
    "SET allowed_directories = ['/']",
    "SET allowed_paths = ['{outside}/secret']",
    "SET lock_configuration = false",
    "RESET lock_configuration",
    "SET python_enable_replacements = true",
    "SET allowed_configs = ['allowed_directories']",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{outside}/secret'",
    "SET extension_directory = '{outside}'",
    "SET secret_directory = '{outside}'",
    "SET home_directory = '{outside}'",
)


@pytest.mark.parametrize("statement", [*WRITES, *READS, *SETTINGS])
def test_nothing_is_written_nor_read_outside_nor_opened_up(
    con: duckdb.DuckDBPyConnection, tiny_index: Path, tmp_path: Path, statement: str
) -> None:
    seen_in_python = [1]
    assert seen_in_python
    for name in ("secret", "secret.csv"):
        (tmp_path / name).write_text("a\n1\n")
    data = next((tiny_index / "data" / "documents").glob("*.parquet"))
    before = listing(tiny_index.parent) | listing(tmp_path)
    with pytest.raises(duckdb.Error):
        con.execute(statement.format(outside=tmp_path, index=tiny_index, data=data)).fetchall()
    assert listing(tiny_index.parent) | listing(tmp_path) == before
    assert con.sql("SELECT count(*) > 0 FROM features").fetchall() == [(True,)]  # still of use


def test_no_name_leads_out_of_an_index(
    con: duckdb.DuckDBPyConnection, tiny_index: Path, tmp_path: Path
) -> None:
    (tiny_index.parent / "beside.txt").write_text("secret")
    for name in ("../beside.txt", "data/../../beside.txt", "/etc/hostname", "//etc/hostname", ""):
        for path in (f"corpuscope://0/{name}", f"corpuscope://{name}", f"corpuscope://1/{name}"):
            try:
                found = con.execute("SELECT content FROM read_text($1)", [path]).fetchall()
            except duckdb.Error:
                continue
            assert found == []
    assert con.execute("SELECT size > 9 FROM read_blob('corpuscope://0/index.json')").fetchall() == [(True,)]


def test_files_of_an_index_are_never_opened_for_writing(tiny_index: Path) -> None:
    files = IndexFiles([Store(str(tiny_index))], {})
    for mode in ("wb", "ab", "r+b", "xb", "w"):
        with pytest.raises(PermissionError, match="only read"):
            files.open(url(0, "vocabulary.parquet"), mode)


def test_what_is_free_in_a_connection(con: duckdb.DuckDBPyConnection) -> None:
    con.execute("SET threads = 1; SET memory_limit = '1GB'; SET preserve_insertion_order = false")
    con.execute("CREATE TABLE mine AS SELECT feature, max FROM features WHERE max IS NOT NULL")
    con.execute("CREATE MACRO twice(x) AS 2 * x")
    con.register("given", duckdb.arrow(con.sql("SELECT 3 AS a").to_arrow_table()).to_arrow_table())
    assert con.sql("SELECT (SELECT count(*) > 0 FROM mine), twice(a) FROM given").fetchall() == [(True, 6)]


def test_some_views_come_with_what_they_are_made_of(con: duckdb.DuckDBPyConnection, tiny_index: Path) -> None:
    names = [
        name for (name,) in con.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()
    ]
    assert len(names) > 20
    some = queries.connect(str(tiny_index), views=["documents"])
    assert some.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall() == [
        ("documents",)
    ]
    for name in names:
        alone = queries.connect(str(tiny_index), views=[name])
        if name not in ("activations", "_active_tokens", "document_features", "_by_document"):  # not all kept
            assert (
                alone.sql(f"SELECT count(*) FROM {name}").fetchall()
                == con.sql(f"SELECT count(*) FROM {name}").fetchall()
            )
        alone.close()


def test_a_query_that_does_not_fit_spills_and_leaves_nothing(tiny_index: Path) -> None:
    con = queries.connect(str(tiny_index), memory_limit="60MB", threads=2)
    ((folder,),) = con.execute("SELECT value FROM duckdb_settings() WHERE name = 'temp_directory'").fetchall()
    assert not os.path.exists(folder)
    con.execute("CREATE TABLE large AS SELECT md5(range::VARCHAR) AS a FROM range(2_000_000)")
    assert os.listdir(folder)
    assert con.sql("SELECT count(DISTINCT a) FROM large").fetchall() == [(2_000_000,)]
    con.close()
    assert not os.path.exists(folder)


ENDLESS = "SELECT count(*) FROM range(1_000_000_000) a, range(1_000_000_000) b WHERE a.range * b.range = 3"


def test_a_query_is_stopped_after_its_time(con: duckdb.DuckDBPyConnection) -> None:
    begun = time.monotonic()
    with pytest.raises(CorpuscopeError, match=r"stopped after 0\.2 s"), queries.time_limit(con, 0.2):
        select(con, ENDLESS)
    assert time.monotonic() - begun < 30  # it would take years
    with pytest.raises(CorpuscopeError, match="time limit"), queries.time_limit(con, 0.3):
        for _ in rows(select(con, "SELECT a.range FROM range(1_000_000) a, range(1_000_000) b")):
            pass
    with pytest.raises(InputError, match="syntax error"), queries.time_limit(con, 20):
        select(con, "SELEC 1")
    with queries.time_limit(con, 20):
        assert list(rows(select(con, "SELECT 1 AS a"))) == [{"a": 1}]


# --- several indexes


def parts(folder: Path) -> tuple[Path, Path]:
    return folder / "a" / "index", folder / "b" / "index"


def of(con: duckdb.DuckDBPyConnection) -> dict[str, list[tuple[Any, ...]]]:
    return {view: con.sql(f"SELECT * FROM {view} ORDER BY ALL").fetchall() for view in tiny.VIEWS}


@pytest.fixture(scope="module")
def suites(tiny_suites: Path) -> dict[str, list[dict[str, str]]]:
    rest = [{"uri": str(tiny_suites / suite)} for suite in tiny.SUITES if suite != RES]
    return {"a": [{"uri": str(tiny_suites / RES)}], "b": rest}


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory,
    write_spec: Callable[..., Path],
    scan_inline: Callable[..., Any],
    suites: dict[str, list[dict[str, str]]],
    tiny_corpus: Path,
) -> Path:
    """a: the residual SAEs; b: all others, whose corpus came in two parts, the later files first."""
    folder = tmp_path_factory.mktemp("two")
    assert not scan_inline(write_spec(folder / "a", saes=suites["a"])).failed
    growing = folder / "growing"
    growing.mkdir()
    files = sorted(tiny_corpus.glob("*.jsonl"))
    corpus = {"uri": f"{growing}/*.jsonl"}
    for some in (files[9:], files[:9]):
        for file in some:
            shutil.copy(file, growing)
        assert not scan_inline(write_spec(folder / "b", saes=suites["b"], corpus=corpus)).failed
    return folder


def test_two_indexes_are_as_one_scan_of_both(two: Path, tiny_index: Path) -> None:
    a, b = parts(two)
    with queries.connect(str(a), str(b)) as con:
        assert tiny.differences(of(con), of(queries.connect(str(tiny_index)))) == []
        found = con.sql("SELECT run, index, documents FROM runs ORDER BY ALL").fetchall()
    alone = queries.connect(str(b)).sql("SELECT documents FROM runs ORDER BY run").fetchall()
    assert [(run, index) for run, index, _ in found] == [(1, str(a)), (1, str(b)), (2, str(b))]
    assert [n for _, _, n in found[1:]] == [n for (n,) in alone]


def test_the_script_of_two_indexes_runs_in_any_duckdb(two: Path, tiny_index: Path) -> None:
    con = duckdb.connect()
    for statement in script([Store(str(each)) for each in parts(two)]):
        con.execute(statement)
    assert tiny.differences(of(con), of(queries.connect(str(tiny_index)))) == []


def test_the_first_index_has_the_documents(two: Path) -> None:
    a, b = parts(two)
    there, here = queries.connect(str(b), str(a)), queries.connect(str(b))
    for view in ("documents", "contexts", "vocabulary"):
        assert (
            there.sql(f"FROM {view} ORDER BY ALL").fetchall()
            == here.sql(f"FROM {view} ORDER BY ALL").fetchall()
        )
    mine = "SELECT * FROM {} WHERE NOT starts_with(sae, 'tiny-res') ORDER BY ALL"
    for view in ("activations", "document_features", "top_contexts", "sampled_contexts", "features"):
        assert there.sql(mine.format(view)).fetchall() == here.sql(mine.format(view)).fetchall()


def test_units_that_were_cut_elsewhere(
    two: Path,
    tmp_path: Path,
    write_spec: Callable[..., Path],
    scan_inline: Callable[..., Any],
    suites: dict[str, list[dict[str, str]]],
    tiny_corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One file, cut into few units by one scan and into more by the other."""
    text = "".join(file.read_text(encoding="utf-8") for file in sorted(tiny_corpus.glob("*.jsonl"))[:8])
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "all.jsonl").write_text(text, encoding="utf-8")
    corpus = {"uri": f"{tmp_path / 'one'}/*.jsonl"}
    for name, size in (("a", 5000), ("b", 1700)):
        monkeypatch.setattr("pipelines.planning.UNIT_BYTES", {"cpu": size})
        assert not scan_inline(write_spec(tmp_path / name, saes=suites[name], corpus=corpus)).failed
    monkeypatch.setattr("pipelines.planning.UNIT_BYTES", {"cpu": 5000})
    both = [{"uri": each["uri"]} for name in "ab" for each in suites[name]]
    assert not scan_inline(write_spec(tmp_path / "whole", saes=both, corpus=corpus)).failed
    a, b = parts(tmp_path)
    units = [queries.connect(str(i)).sql("SELECT DISTINCT document >> 20 FROM documents") for i in (a, b)]
    assert len(units[0]) < len(units[1])
    for view in ("activations", "document_features", "top_contexts", "sampled_contexts", "features"):
        columns = "* EXCLUDE (values)" if view.endswith("contexts") else "*"
        sql = f"SELECT {columns} FROM {view} ORDER BY ALL"
        shown = queries.connect(str(a), str(b)).sql(sql).fetchall()
        whole = queries.connect(str(tmp_path / "whole" / "index")).sql(sql).fetchall()
        assert len(shown) == len(whole)
        assert tiny.differences({view: shown}, {view: whole}) == []


def test_each_index_keeps_as_many_contexts_as_its_spec_says(
    two: Path,
    tmp_path: Path,
    write_spec: Callable[..., Path],
    scan_inline: Callable[..., Any],
    suites: dict[str, list[dict[str, str]]],
    tiny_index: Path,
) -> None:
    spec = write_spec(tmp_path, saes=[{**suites["b"][0], "keep": "documents"}], top_k=2, sample_k=1)
    assert not scan_inline(spec).failed
    con = queries.connect(str(parts(two)[0]), str(tmp_path / "index"))
    whole = queries.connect(str(tiny_index))
    few = f"starts_with(sae, '{Path(suites['b'][0]['uri']).name}')"
    top = "SELECT * FROM top_contexts WHERE {} ORDER BY ALL"
    assert con.sql(top.format(few)).fetchall() == whole.sql(top.format(f"{few} AND rank <= 2")).fetchall()
    res = f"starts_with(sae, '{RES}')"
    assert con.sql(top.format(res)).fetchall() == whole.sql(top.format(res)).fetchall()
    samples = "SELECT sae, feature, stratum, count(*) AS n FROM sampled_contexts GROUP BY ALL"
    assert con.sql(f"SELECT max(n) FROM ({samples}) WHERE {few}").fetchall() == [(1,)]
    assert con.sql(f"SELECT max(n) FROM ({samples}) WHERE {res}").fetchall() == [(3,)]
    with pytest.raises(InputError, match="keep"):
        list(rows(select(con, f"SELECT * FROM activations WHERE {few}")))
    assert list(rows(select(con, f"SELECT count(*) > 0 AS a FROM activations WHERE {res}"))) == [{"a": True}]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"context": {"length": 64}}, "context.length is 96 there and 64 here"),
        ({"context": {"exclude": []}}, "context.exclude"),
        ({"corpus": {"limit": 30}}, "lacks .* of the documents|not the same in both"),
        ({"corpus": {"name": "other"}}, "not the same in both"),
    ],
    ids=["length", "exclude", "limit", "corpus"],
)
def test_indexes_that_do_not_go_together(
    two: Path,
    tmp_path: Path,
    write_spec: Callable[..., Path],
    scan_inline: Callable[..., Any],
    suites: dict[str, list[dict[str, str]]],
    change: dict[str, Any],
    why: str,
) -> None:
    a, _ = parts(two)
    assert not scan_inline(write_spec(tmp_path, saes=suites["b"][:1], **change)).failed
    with pytest.raises(InputError, match=why) as refused:
        queries.connect(str(a), str(tmp_path / "index"))
    assert str(a) in str(refused.value)
    assert str(tmp_path / "index") in str(refused.value)


def test_a_document_that_one_model_could_not_take(
    two: Path,
    tmp_path: Path,
    write_spec: Callable[..., Path],
    scan_inline: Callable[..., Any],
    suites: dict[str, list[dict[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The units are the same, what is in them is not."""
    text = tiny.texts_by_file()[5][1]["text"]
    ids = np.array(tiny.make_tokenizer(bos=True)(text)["input_ids"][1:9])
    run = LanguageModel.run

    def hurt(self: Any, tokens: Any, positions: Any = None) -> Any:
        if ids.tobytes() in tokens.numpy().tobytes():
            raise ValueError("no")
        return run(self, tokens, positions)

    monkeypatch.setattr(LanguageModel, "run", hurt)
    outcome = scan_inline(write_spec(tmp_path, saes=suites["b"][:1]))
    assert (outcome.quarantined, outcome.failed) == (1, ())
    with pytest.raises(InputError, match="lacks 1 of the documents"):
        queries.connect(str(parts(two)[0]), str(tmp_path / "index"))


def test_an_sae_of_two_indexes_is_named(two: Path, tiny_index: Path) -> None:
    with pytest.raises(InputError, match=r"SAE tiny-res/.* is in .* too"):
        queries.connect(str(parts(two)[0]), str(tiny_index))
    with pytest.raises(InputError, match="no index here"):
        queries.connect(str(tiny_index), str(two))


def test_files_are_such_that_the_duckdb_of_python_3_10_reads_them(tiny_index: Path) -> None:
    """DuckDB 1.5 refuses BYTE_STREAM_SPLIT but for FLOAT and DOUBLE."""
    split = set()
    for file in (tiny_index / "data").rglob("*.parquet"):
        group = pq.ParquetFile(file).metadata.row_group(0)
        for column in map(group.column, range(group.num_columns)):
            if "BYTE_STREAM_SPLIT" in column.encodings:
                split.add(column.physical_type)
    assert split == {"FLOAT", "DOUBLE"}
