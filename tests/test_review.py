"""What a review of the whole found wrong once: each of these failed before it was mended."""

from __future__ import annotations

import json

import duckdb
import pytest

import queries
from pipelines.planning import _Layout
from pipelines.scan import Started
from pipelines.status import status
from sae_runtime.errors import InputError


@pytest.mark.parametrize(
    "where",
    ["feature = 6", "activation > 0", "context >= 0", "position IS NOT NULL", "feature IN (1, 2)", "true"],
)
@pytest.mark.parametrize("sae", ["", "starts_with(sae, 'tiny-res') AND "])
def test_no_filter_gets_round_the_guard_of_rows_that_were_not_kept(
    tmp_path_factory, write_spec, scan_inline, tiny_suites, where, sae
):
    folder = tmp_path_factory.getbasetemp() / "guard"
    if not folder.exists():
        suites = [("tiny-res", "documents"), ("tiny-mlp", "tokens"), ("tiny-att", "none")]
        saes = [{"uri": str(tiny_suites / suite), "keep": keep} for suite, keep in suites]
        scan_inline(write_spec(folder, saes=saes))
    con = queries.connect(str(folder / "index"))
    with pytest.raises(duckdb.Error, match="keep"):
        con.sql(f"SELECT count(*) FROM activations WHERE {sae}{where}").fetchall()
    with pytest.raises(duckdb.Error, match="keep: none"):
        con.sql("SELECT count(DISTINCT sae) FROM document_features WHERE document IS NOT NULL").fetchall()
    kept = "SELECT count(*) FROM activations WHERE starts_with(sae, 'tiny-mlp') AND feature = 6"
    assert len(con.sql(kept).fetchall()) == 1


def test_keys_of_units_with_high_ordinals_do_not_overflow(tmp_path, write_spec, scan_inline, monkeypatch):
    whole = _Layout.__init__

    def later(self, *arguments):
        whole(self, *arguments)
        self.ordinal += 5000

    scan_inline(write_spec(tmp_path / "a"))
    monkeypatch.setattr(_Layout, "__init__", later)
    assert not scan_inline(write_spec(tmp_path / "b")).failed
    a, b = (queries.connect(str(tmp_path / name / "index")) for name in "ab")
    for view in ("activations", "top_contexts", "sampled_contexts"):
        question = f"SELECT sum(context - {{}}), count(*), sum(position) FROM {view}"
        assert a.sql(question.format(0)).fetchall() == b.sql(question.format(5000 << 20)).fetchall()
    low = b.sql("SELECT min(document) FROM document_features").fetchall()[0][0]
    assert low >= 5000 << 20


def test_a_document_whose_only_token_is_not_counted(tmp_path, write_spec, scan_inline, tiny_model_no_bos):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}))
    corpus = {"uri": "a.jsonl", "id": None, "metadata": []}
    model = {"uri": str(tiny_model_no_bos)}
    assert not scan_inline(write_spec(tmp_path, corpus=corpus, model=model)).failed
    con = queries.connect(str(tmp_path / "index"))
    assert con.sql("SELECT n_tokens FROM documents").fetchall() == [(0,)]
    assert con.sql("SELECT max(n_tokens), max(density) FROM features").fetchall() == [(0, None)]


def test_a_file_that_changes_after_planning_is_not_committed(tmp_path, write_spec, scan_inline, tiny_corpus):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "one two three"}))
    spec = write_spec(tmp_path, corpus={"uri": "a.jsonl", "id": None, "metadata": []})

    def change(event):
        if isinstance(event, Started):
            file.write_text(json.dumps({"text": "uno due treee"}))

    outcome = scan_inline(spec, observe=change)
    assert [f.error for f in outcome.failed] == [
        "a.jsonl: it has changed since the scan was planned; scan again"
    ]
    assert queries.connect(str(tmp_path / "index")).sql("FROM documents").fetchall() == []
    assert not scan_inline(spec).failed
    text = "SELECT context_text(context) FROM contexts"
    assert "uno due" in queries.connect(str(tmp_path / "index")).sql(text).fetchall()[0][0]


def test_other_order_of_sources_reorders_ties_without_scanning(
    tmp_path, write_spec, scan_inline, tiny_corpus
):
    files = sorted(tiny_corpus.glob("*.jsonl"))[:4]
    sources = [{"name": f.stem, "uri": str(f), "id": "id", "metadata": []} for f in files]
    scan_inline(write_spec(tmp_path, corpus=sources))
    assert scan_inline(write_spec(tmp_path, corpus=sources[::-1])).items == 0
    scan_inline(write_spec(tmp_path / "fresh", corpus=sources[::-1]))
    place = (
        "SELECT sae, feature, rank, d.corpus, d.row, c.start, position FROM top_contexts "
        "JOIN contexts c USING (context) JOIN documents d USING (document) ORDER BY ALL"
    )
    old, new = (queries.connect(str(folder / "index")) for folder in (tmp_path, tmp_path / "fresh"))
    assert old.sql(place).fetchall() == new.sql(place).fetchall()


def test_every_pattern_of_a_selection_must_name_an_sae(tmp_path, write_spec, scan_inline, tiny_suites):
    saes = [{"uri": str(tiny_suites / "tiny-res"), "select": ["*", "layer_9/typo"]}]
    with pytest.raises(InputError, match=r"saes.select: 'layer_9/typo' matches none"):
        scan_inline(write_spec(tmp_path, saes=saes))


def test_contexts_longer_than_the_model_allows_are_refused(tmp_path, write_spec, scan_inline):
    with pytest.raises(InputError, match=r"context\.length: 100000 tokens are more than"):
        scan_inline(write_spec(tmp_path, context={"length": 100000}))
    assert not (tmp_path / "index").exists()


def test_an_index_that_was_only_begun_reads_as_empty_and_incomplete(tmp_path, tiny_index):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/index.json").write_bytes((tiny_index / "index.json").read_bytes())
    assert status(str(tmp_path / "begun")).state == "incomplete"
    con = queries.connect(str(tmp_path / "begun"))
    assert con.sql("SELECT count(*) FROM vocabulary").fetchall() == [(0,)]
    assert con.sql("SELECT count(*), max(n_tokens) FROM features").fetchall()[0][1] == 0


def test_a_limit_that_is_lowered_says_that_documents_stay(tmp_path, write_spec, scan_inline, tiny_corpus):
    source = {"uri": f"{tiny_corpus}/*.jsonl", "id": "id", "metadata": []}
    scan_inline(write_spec(tmp_path, corpus={**source, "limit": 8}))
    said: list[str] = []
    scan_inline(write_spec(tmp_path, corpus={**source, "limit": 2}), notice=said.append)
    assert said == ["note: corpus[0].limit is 2; the 8 documents indexed stay"]


def test_the_error_of_an_sae_that_saw_no_token_is_null(tmp_path, write_spec, scan_inline, few):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": ""}))
    scan_inline(write_spec(tmp_path, corpus={"uri": "a.jsonl", "id": None, "metadata": []}, saes=few))
    found = queries.connect(str(tmp_path / "index")).sql("SELECT n_tokens, measured_l0, fvu FROM saes")
    assert found.fetchall() == [(0, None, None)] * 2
