"""Metadata columns in `documents`: of several sources, and named like one of the view's own."""

from __future__ import annotations

import json

import queries


def test_a_column_of_one_source_is_null_in_the_other_and_a_taken_name_gets_a_number(
    tmp_path, write_spec, scan_inline
):
    rows = {
        "a": [{"text": "one two", "source": "wiki", "n": 1}, {"text": "three", "source": None, "n": 2}],
        "b": [{"text": "four", "lang": "de"}],
    }
    for name, documents in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, documents)))
    corpus = [{"uri": "a.jsonl", "metadata": ["source", "n"]}, {"uri": "b.jsonl", "metadata": ["lang"]}]
    scan_inline(write_spec(tmp_path, corpus=corpus))
    con = queries.connect(str(tmp_path / "index"))
    assert con.sql("SELECT corpus, source, source_1, n, lang FROM documents ORDER BY ALL").fetchall() == [
        ("a", "a.jsonl", "wiki", 1, None),
        ("a", "a.jsonl", None, 2, None),
        ("b", "b.jsonl", None, None, "de"),
    ]


def test_columns_come_in_the_spec_s_order(tmp_path, write_spec, scan_inline):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one", "zeta": 1, "alpha": 2}))
    scan_inline(write_spec(tmp_path, corpus={"uri": "a.jsonl", "id": None, "metadata": ["zeta", "alpha"]}))
    result = queries.connect(str(tmp_path / "index")).execute("SELECT * FROM documents")
    assert [column[0] for column in result.description][-3:] == ["n_tokens", "zeta", "alpha"]
