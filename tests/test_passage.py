"""A passage of one's own has what a scan of it as the only document has, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

import queries
from pipelines import reading
from pipelines.ledger import Ledger
from pipelines.passage import MOST_TOKENS, Passage, PassageModel
from pipelines.reading import Reader
from pipelines.storage import Store
from sae_runtime.errors import InputError

LONG = tiny.texts_by_file()[0][1]["text"]  # several windows
MIXED = tiny.texts_by_file()[1][0]["text"]
Scan = Callable[..., Any]


def identity(index: Path) -> dict[str, Any]:
    found = Ledger(Store(str(index))).identity()
    assert found is not None
    return found


def scanned(
    folder: Path, texts: list[str], write_spec: Callable[..., Path], scan_inline: Scan, **settings: Any
) -> Path:
    """An index of texts, a document each."""
    tiny.write_rows(folder / "corpus" / "one.jsonl", [{"id": str(i), "text": t} for i, t in enumerate(texts)])
    corpus = {"uri": str(folder / "corpus" / "one.jsonl"), "metadata": []}
    assert not scan_inline(write_spec(folder, corpus=corpus, **settings)).failed
    return folder / "index"


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "several windows": (LONG, {}),
    "overlap": (LONG, {"context": {"length": 64, "overlap": 16}}),
    "bfloat16, characters of several tokens": (MIXED, {"model": {"dtype": "bfloat16", "threads": 2}}),
    "without a BOS, loud tokens left out": (
        MIXED, {"context": {"bos": False, "exclude": ["special", "first", {"norm_above": 1.0512345678}]}},
    ),
    "its own BOS is ours": ("<bos><bos>" + LONG[:200], {}),
    "one token": ("a", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_it_is_what_a_scan_has(
    case: str, tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Scan
) -> None:
    text, settings = SETTINGS[case]
    index = scanned(tmp_path, [text], write_spec, scan_inline, **settings)
    con, known, reader = queries.connect(str(index)), identity(index), Reader()
    windows = con.execute("SELECT context, first, tokens, counted FROM contexts ORDER BY start").fetchall()
    number = {context: i for i, (context, *_) in enumerate(windows)}
    total = 0
    for sae in known["saes"]:
        found = reader.read(known, sae["id"], text).result()
        shown = [(c.first, c.tokens.tolist(), c.counted.tolist()) for c in found.contexts]
        assert shown == [tuple(window[1:]) for window in windows]
        assert found.counted == sum(sum(counted) for *_, counted in windows)
        rows = con.execute(
            "SELECT feature, context, position, activation FROM activations WHERE sae = ?", [sae["id"]]
        ).fetchall()
        wanted = sorted((feature, number[context], at, value) for feature, context, at, value in rows)
        assert listed(found) == wanted
        total += len(wanted)
    assert total > (0 if text == "a" else 100)
    reader.close()


def listed(found: Passage) -> list[tuple[int, int, int, float]]:
    columns = (found.feature, found.context, found.position, found.activation)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_nothing_is_found_where_nothing_is_counted(few_index: Path) -> None:
    known, reader = identity(few_index), Reader()
    for text in ("", "<eos>"):
        found = reader.read(known, known["saes"][0]["id"], text).result()
        assert (found.counted, listed(found)) == (0, [])
    reader.close()


def test_what_was_read_is_remembered_and_what_failed_for_a_while(
    few_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, reader = identity(few_index), Reader()
    sae = known["saes"][0]["id"]
    first = reader.read(known, sae, "the cat")
    assert reader.read(known, sae, "the cat") is first
    with pytest.raises(InputError, match=rf"text: .* tokens; a passage has at most {MOST_TOKENS:,}"):
        reader.read(known, sae, "x " * MOST_TOKENS).result()
    with monkeypatch.context() as patch:
        patch.setattr(PassageModel, "passage", lambda *_: (_ for _ in ()).throw(InputError("text: no")))
        failed = reader.read(known, sae, "a dog")
        assert str(failed.exception()) == "text: no"
    assert reader.read(known, sae, "a dog") is failed  # a page that waited for it asks only now
    monkeypatch.setattr(reading, "_FAILED", 0.0)
    assert reader.read(known, sae, "a dog").result().counted == 4
    assert reader.doing == ""
    reader.close()


def test_other_weights_are_refused(few_index: Path, tiny_model_no_bos: Path, tmp_path: Path) -> None:
    known = identity(few_index)
    sae = known["saes"][0]["id"]
    moved = Reader(model=str(tiny_model_no_bos))
    with pytest.raises(InputError, match=r"model.uri: .* is not the model that was scanned"):
        moved.read(known, sae, "the cat").result()
    moved.close()
    nowhere = Reader(suites=[str(tmp_path)])
    with pytest.raises(InputError, match=r"is not found at .*--saes URI says where its suite is"):
        nowhere.read(known, sae, "the cat").result()
    nowhere.close()
    changed = {**known, "saes": [{**each, "fingerprint": "0" * 32} for each in known["saes"]]}
    reader = Reader()
    with pytest.raises(InputError, match="is not what was scanned as"):
        reader.read(changed, sae, "the cat").result()
    reader.close()


def test_only_the_last_few_saes_stay_loaded(tiny_index: Path) -> None:
    known = identity(tiny_index)
    model = PassageModel(known, None, ())
    for sae in known["saes"]:
        model.encoder(sae["id"])
    ids = [sae["id"] for sae in known["saes"]]
    assert model.encoder(ids[-1]) is model.encoder(ids[-1])
    assert list(model._encoders) == ids[-4:]
