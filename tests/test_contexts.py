"""Documents, contexts and text: what is run, what is counted, and that a position means its token.

Each test scans with the tiny Gemma 2 and reads the views; what they must hold is written from the contract.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import queries

PAD, EOS, BOS = range(3)
Row = dict[str, Any]


def fetch(index: Path, sql: str) -> list[Row]:
    result = queries.connect(str(index)).execute(sql)
    names = [column[0] for column in result.description]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def windows(index: Path) -> dict[int, list[Row]]:
    """Contexts of each document, in order of start."""
    found: dict[int, list[Row]] = {
        row["document"]: [] for row in fetch(index, "SELECT document FROM documents")
    }
    for row in fetch(index, "SELECT * FROM contexts ORDER BY document, start"):
        found[row["document"]].append(row)
    return found


def own_tokens(contexts: list[Row]) -> list[int]:
    return [token for context in contexts for token in context["tokens"][context["first"] :]]


def check_windows(index: Path, length: int, overlap: int, bos: bool) -> None:
    """Every token of a document is the own token of one context; windows are full but for the last."""
    segments = {row["document"]: row for row in fetch(index, "SELECT * FROM segments")}
    n_tokens = {row["document"]: row["n_tokens"] for row in fetch(index, "SELECT * FROM documents")}
    seen_many = 0
    for document, contexts in windows(index).items():
        tokens = own_tokens(contexts)
        segment = segments[document]
        assert (segment["segment"], segment["role"]) == (0, "text")
        assert (segment["start"], segment["stop"]) == (0, len(tokens))
        start = 0
        for i, context in enumerate(contexts):
            run, counted, first = context["tokens"], context["counted"], context["first"]
            repeated = min(overlap, start)
            assert context["start"] == start
            assert first == bos + repeated
            assert run[bos:first] == tokens[start - repeated : start]
            assert len(run) == len(counted) <= length
            assert len(run) == length or i == len(contexts) - 1, "a window that is not the last is short"
            assert len(run) > first, "a window without a token of its own"
            assert not any(counted[:first]), "BOS and overlap are run, never counted"
            if bos:
                assert run[0] == BOS
            start += len(run) - first
        assert sum(sum(context["counted"]) for context in contexts) == n_tokens[document]
        seen_many += len(contexts) > 3
    assert seen_many >= 2, "no document spans many windows"
    active = fetch(
        index,
        "SELECT count(*) AS n, count(*) FILTER (NOT c.counted[a.position + 1]) AS uncounted "
        "FROM activations a JOIN contexts c USING (context)",
    )
    assert active[0]["n"] > 0
    assert active[0]["uncounted"] == 0


def published_texts() -> dict[tuple[str, int], str]:
    return {
        (f"part_{i:02d}.jsonl", j): row["text"]
        for i, rows in enumerate(tiny.texts_by_file())
        for j, row in enumerate(rows)
    }


# --- the default: BOS, special tokens out


def test_windows_with_bos(tiny_index: Path) -> None:
    check_windows(tiny_index, 96, 0, bos=True)


def test_every_document_is_there_once(tiny_index: Path) -> None:
    found = fetch(tiny_index, "SELECT * FROM documents")
    wanted = published_texts()
    assert len(found) == len({row["document"] for row in found}) == len(wanted)
    assert {(row["source"], row["row"]) for row in found} == set(wanted)
    for row in found:
        i, j = int(row["source"][5:7]), row["row"]
        given = tiny.texts_by_file()[i][j]
        assert {k: row[k] for k in ("id", "lang", "score", "even")} == {
            k: given[k] for k in given if k != "text"
        }
        assert (row["corpus"], row["run"]) == ("tiny", 1)


def test_an_empty_document_has_no_contexts(tiny_index: Path) -> None:
    found = windows(tiny_index)
    empty = fetch(
        tiny_index, "SELECT * FROM documents WHERE source = 'part_09.jsonl' OR id IN ('0-0', '1-1')"
    )
    assert len(empty) == 4
    for row in empty:
        assert row["n_tokens"] == 0
        assert found[row["document"]] == []
    assert fetch(tiny_index, "SELECT count(*) AS n FROM documents WHERE n_tokens = 0") == [{"n": 4}]


def test_a_document_that_spells_bos_does_not_get_two(tiny_index: Path) -> None:
    (spelled,) = fetch(tiny_index, "SELECT document FROM documents WHERE id = '2-0'")
    (inside,) = fetch(tiny_index, "SELECT document FROM documents WHERE id = '2-1'")
    found = windows(tiny_index)
    assert [c["tokens"].count(BOS) for c in found[spelled["document"]]] == [1]
    (context,) = found[inside["document"]]
    specials = [i for i, token in enumerate(context["tokens"]) if token in (PAD, EOS, BOS)]
    assert [context["tokens"][i] for i in specials] == [BOS, BOS, EOS]
    assert [i for i, keep in enumerate(context["counted"]) if not keep] == specials
    assert fetch(tiny_index, f"SELECT count(*) AS n FROM contexts WHERE tokens[2] = {BOS}") == [{"n": 0}]


# --- text


def test_bytes_of_own_tokens_are_the_text(tiny_index: Path) -> None:
    spelling = {row["token"]: bytes(row["bytes"]) for row in fetch(tiny_index, "SELECT * FROM vocabulary")}
    place = {row["document"]: row for row in fetch(tiny_index, "SELECT document, source, row FROM documents")}
    wanted = published_texts()
    split = 0
    for document, contexts in windows(tiny_index).items():
        text = wanted[place[document]["source"], place[document]["row"]].removeprefix("<bos>")
        pieces = [spelling[token] for token in own_tokens(contexts)]
        assert b"".join(pieces) == text.encode()
        split += sum(piece.decode(errors="ignore").encode() != piece for piece in pieces)
    assert split > 100, "no character was cut between tokens"


def test_context_text_and_snippet_are_what_python_decodes(tiny_index: Path) -> None:
    con = queries.connect(str(tiny_index))
    spelling = dict(con.sql("SELECT token, bytes FROM vocabulary").fetchall())

    def spell(tokens: list[int]) -> str:
        return b"".join(bytes(spelling[token]) for token in tokens).decode(errors="replace")

    contexts = con.sql(
        "SELECT c.context, c.tokens, context_text(c.context) FROM contexts c "
        "JOIN documents d USING (document) "
        "WHERE d.source IN ('part_01.jsonl', 'part_05.jsonl', 'part_11.jsonl')"
    ).fetchall()
    assert len(contexts) > 8
    cut = 0
    for key, tokens, text in contexts:
        assert text == spell(tokens)
        wanted, calls = [], []
        for position in range(0, len(tokens), 3):
            width = position % 5
            wanted.append(spell(tokens[max(0, position - width) : position + width + 1]))
            calls.append(f"snippet({key}, {position}, {width})")
        cut += sum("\ufffd" in text for text in wanted)
        assert con.sql(f"SELECT {', '.join(calls)}").fetchall() == [tuple(wanted)]
    assert cut > 20, "no snippet cut a character"


def test_positions_point_at_their_tokens(tiny_index: Path, tiny_model: Path, tiny_suites: Path) -> None:
    """A feature that reads one token's embedding at layer 0 cannot exist here, so: by the model, at the end
    of long multi-byte documents. The rows of the last window, recomputed at those very positions."""
    con = queries.connect(str(tiny_index))
    rows = con.sql(
        "SELECT c.context, c.tokens, c.start, c.first FROM contexts c JOIN documents d USING (document) "
        "WHERE d.id IN ('0-1', '1-0') QUALIFY c.start = max(c.start) OVER (PARTITION BY document)"
    ).fetchall()
    assert len(rows) == 2
    assert all(start > 400 for _, _, start, _ in rows)
    causal, sae = tiny.load_causal(tiny_model), tiny.SAES[1]
    t = {k: v.astype(np.float64) for k, v in tiny.load_sae(tiny_suites, sae.path).items()}
    for context, tokens, _, first in rows:
        x = tiny.dense(causal, [np.array([tokens])], [sae.site])[sae.site][0][0].double().numpy()
        pre = x @ t["W_enc"] + t["b_enc"]
        wanted = {(int(p), int(f)) for p, f in np.argwhere(pre > t["threshold"]) if p >= first}
        found = con.execute(
            "SELECT position, feature FROM activations WHERE sae = $1 AND context = $2", [sae.path, context]
        ).fetchall()
        assert len(wanted) > 100
        assert len(wanted.symmetric_difference(found)) <= 2  # float32 may decide at the threshold


# --- other settings

SETTINGS: list[tuple[bool, dict[str, Any], int]] = [
    # (the tokenizer adds BOS, context settings, uncounted tokens beside BOS and overlap in the corpus below)
    (True, {"length": 20, "exclude": []}, 0),
    (True, {"length": 20, "overlap": 7}, 2),
    (True, {"length": 20, "overlap": 18, "exclude": []}, 0),
    (True, {"length": 2}, 2),
    (True, {"length": 20, "bos": False, "exclude": ["special"]}, 3),
    (False, {"length": 20, "exclude": ["special"]}, 3),
    (False, {"length": 20, "exclude": []}, 0),
    (False, {"length": 20, "bos": True}, 2),
    (False, {"length": 20, "overlap": 6, "exclude": ["special"]}, 3),
]


@pytest.fixture(scope="module")
def few_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = tiny.WORDS * 2
    texts = [
        "<bos>" + " ".join(words[:30]),
        " ".join(words[:80]) + " <eos> and <bos> " + "日本語🦊" * 6,
        "",
        " ".join(words[10:100]),
        "x",
    ]
    return tiny.write_rows(tmp_path_factory.mktemp("few") / "few.jsonl", [{"text": text} for text in texts])


def scan_few(
    tmp_path: Path, model: Path, few: Path, suites: Path, context: dict[str, Any],
    write_spec: Callable[..., Path], scan_inline: Callable[..., Any],
) -> Path:  # fmt: skip
    spec = write_spec(
        tmp_path,
        corpus={"uri": str(few), "id": None, "metadata": []},
        model={"uri": str(model)},
        saes=[{"uri": str(suites / "tiny-res"), "select": "layer_1/width_37/*"}],
        context=context,
    )
    assert not scan_inline(spec).failed
    return tmp_path / "index"


@pytest.mark.parametrize(("adds_bos", "context", "special"), SETTINGS)
def test_what_is_counted(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_model: Path,
    tiny_model_no_bos: Path, tiny_suites: Path, few_texts: Path, adds_bos: bool, context: dict[str, Any],
    special: int,
) -> None:  # fmt: skip
    model = tiny_model if adds_bos else tiny_model_no_bos
    index = scan_few(tmp_path, model, few_texts, tiny_suites, context, write_spec, scan_inline)
    bos = context.get("bos", "auto")
    has_bos = adds_bos if bos == "auto" else bos
    check_windows(index, context["length"], context.get("overlap", 0), has_bos)
    n_own = sum(len(own_tokens(contexts)) for contexts in windows(index).values())
    (counted,) = fetch(
        index, "SELECT sum(n_tokens) AS n, (SELECT n_tokens FROM saes) AS of_sae FROM documents"
    )
    assert counted["n"] == counted["of_sae"] == n_own - special


@pytest.mark.parametrize("overlap", [0, 6])
def test_without_bos_the_first_position_is_not_counted(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_model_no_bos: Path,
    tiny_suites: Path, few_texts: Path, overlap: int,
) -> None:  # fmt: skip
    """Position 0 of every context: the attention sink. With overlap, later windows lose none of their own."""
    settings = {"length": 20, "overlap": overlap}
    index = scan_few(tmp_path, tiny_model_no_bos, few_texts, tiny_suites, settings, write_spec, scan_inline)
    check_windows(index, 20, overlap, bos=False)
    lost = 0
    for contexts in windows(index).values():
        for context in contexts:
            assert not context["counted"][0]
            specials = sum(token in (PAD, EOS, BOS) for token in context["tokens"][context["first"] :])
            lost_here = len(context["tokens"]) - context["first"] - sum(context["counted"]) - specials
            spelled = context["tokens"][0] == BOS and context["first"] == 0
            assert lost_here == (context["first"] == 0) - spelled
            lost += lost_here
    assert lost > 0


# --- damage


def test_nan_in_the_model_quarantines_the_document_and_names_the_site(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_model: Path,
) -> None:  # fmt: skip
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tokenizer = tiny.make_tokenizer(bos=True)
    (bad,) = tokenizer(" Paris", add_special_tokens=False)["input_ids"]
    weights = load_file(model / "model.safetensors")
    name = next(n for n in weights if n.endswith("embed_tokens.weight"))
    weights[name][bad] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    tiny.write_rows(tmp_path / "c" / "a.jsonl", [{"text": t} for t in ("one two", "in Paris now", "two")])
    tiny.write_rows(tmp_path / "c" / "b.jsonl", [{"text": "three"}])
    spec = write_spec(
        tmp_path, corpus={"uri": "c/*.jsonl", "id": None, "metadata": []}, model={"uri": str(model)}
    )
    outcome = scan_inline(spec)
    assert not outcome.failed
    (found,) = fetch(tmp_path / "index", "SELECT source, row, error FROM quarantine")
    assert (found["source"], found["row"]) == ("a.jsonl", 1)
    assert "model.layers.1." in found["error"]
    assert "not finite" in found["error"]
    shown = fetch(tmp_path / "index", "SELECT source, row FROM documents ORDER BY ALL")
    assert [(d["source"], d["row"]) for d in shown] == [("a.jsonl", 0), ("a.jsonl", 2), ("b.jsonl", 0)]
