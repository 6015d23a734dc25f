"""Poison documents: each is quarantined with its place and error, and its neighbours do not notice.

The reference is an index in which nothing is wrong: of the same corpus with an empty text where a row cannot
be read, or by a model that can run what the other one cannot. Healthy documents have the same keys and the
same values there, bit for bit, in bfloat16 and packed too.
"""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import json
import lzma
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import IMPORT
from safetensors.torch import load_file, save_file

import pipelines.corpus
import pipelines.readers
import pipelines.scan
import pipelines.unit
import queries
from pipelines.corpus import Document, index_file, read_documents
from pipelines.files import list_files
from pipelines.ledger import Ledger
from pipelines.quarantine import MANY, Refused, Tally, culprits_apart, line, systematic
from pipelines.scheduler import Policy
from pipelines.spec import CorpusSource
from pipelines.status import status
from pipelines.storage import Store
from sae_runtime.errors import CorpuscopeError, DataError, InputError, Interrupted, is_infrastructure
from sae_runtime.model import LanguageModel

Scan = Callable[..., Any]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def text(n: int) -> str:
    """A document of some 5 to 120 words, without the word that stands for poison."""
    rng = np.random.default_rng(n)
    words = [word for word in tiny.WORDS if word != "Paris"]
    return " ".join(rng.choice(words, int(rng.integers(5, 120))))


def row(n: int, **changes: Any) -> dict[str, Any]:
    return {"id": f"i{n}", "text": text(n), "lang": "en", "score": n / 2, "even": n % 2 == 0, **changes}


def dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def lines(rows: list[Any]) -> bytes:
    return b"".join((each if isinstance(each, bytes) else dumped(each)) + b"\n" for each in rows)


def table(rows: list[dict[str, Any]], group: int = 4) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=group, compression="none")
    return sink.getvalue().to_pybytes()


@pytest.fixture
def spec_of(write_spec: Callable[..., Path], tiny_suites: Path) -> Callable[..., Path]:
    """A spec of one SAE over the files `c/*` of a folder."""

    def make(folder: Path, **changes: Any) -> Path:
        corpus = {"uri": "c/*", **changes.pop("corpus", {})}
        saes = [{"uri": str(tiny_suites / "tiny-res"), "select": "layer_*/width_130/*"}]
        return write_spec(folder, **{"corpus": corpus, "saes": saes, **changes})

    return make


def put(file: Path, data: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


def rows_of(index: Path, sql: str) -> list[tuple[Any, ...]]:
    return queries.connect(str(index)).sql(sql).fetchall()


def quarantined(index: Path) -> list[tuple[str, int]]:
    return [(s, r) for s, r in rows_of(index, "SELECT source, row FROM quarantine ORDER BY ALL")]


def check_sums(index: Path, rows: int) -> None:
    """documents read = documents indexed + quarantined, in every unit and in what the views show."""
    ledger = Ledger(Store(str(index)))
    units = {unit.unit: unit.documents for plan in ledger.plans() for unit in plan.units}
    for commit in ledger.commits().values():
        assert commit.documents + commit.quarantined == units[commit.unit]
    n_documents, n_bad = (len(rows_of(index, f"SELECT row FROM {v}")) for v in ("documents", "quarantine"))
    assert n_documents + n_bad == rows
    found = status(str(index))
    assert (found.documents, found.quarantined) == (n_documents, n_bad)


OF_DOCUMENTS = {
    "documents": "SELECT * FROM documents WHERE {healthy}",
    "contexts": "SELECT c.* FROM contexts c JOIN documents d USING (document) WHERE {healthy}",
    "segments": "SELECT s.* FROM segments s JOIN documents d USING (document) WHERE {healthy}",
    "document_features": "SELECT f.* FROM document_features f JOIN documents d USING (document) "
    "WHERE {healthy}",
    "activations": "SELECT a.* FROM activations a JOIN contexts c USING (context) JOIN documents d USING "
    "(document) WHERE {healthy}",
}


def healthy(index: Path, bad: list[tuple[str, int]]) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of documents that are not `bad`, keys included."""
    places = ", ".join(f"('{source}', {row})" for source, row in bad) or "('', -1)"
    con = queries.connect(str(index))
    where = f"(source, row) NOT IN ({places})"
    return {
        view: con.sql(sql.format(healthy=where) + " ORDER BY ALL").fetchall()
        for view, sql in OF_DOCUMENTS.items()
    }


# --- rows that cannot be read

BAD_LINES: list[tuple[Any, str]] = [
    (b'{"id": "x", "text": oops', "not JSON"),
    (b'{"id": "x", "text": "\xff\xfe"}', "not UTF-8 at byte 21 of the line"),
    (b"[" * 5000, "not JSON"),
    (b'"text"', "not a JSON object but 'text'"),
    ({"id": "x"}, "text column 'text' is missing"),
    (row(1, text=5), "text column 'text' is 5, not a string"),
    (row(1, text=None), "text column 'text' is None"),
    (row(1, text=["a"]), "is ['a'], not a string"),
    (b'{"id": "x", "text": "\\ud800"}', "which is not string"),
    (row(1, score="high"), "column 'score' holds 'high', which is not double"),
    (row(1, even="yes"), "column 'even' holds 'yes', which is not bool"),
    (row(1, lang={"a": 1}), "column 'lang' holds {'a': 1}, which is not string"),
    (row(1, id=[1]), "column 'id' holds [1], which is not string"),
]


@pytest.mark.parametrize("changes", [{}, {"model": {"dtype": "bfloat16"}}], ids=["float32", "bfloat16"])
def test_unreadable_rows_leave_everything_else_as_it_would_be(
    tmp_path: Path,
    spec_of: Any,
    scan_inline: Scan,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    """In many places of two files: all views are those of a corpus that has empty texts there."""
    monkeypatch.setattr(pipelines.corpus, "HEAD", 40)  # so many values fix a column's type
    bad = {40 + 3 * n: each for n, each in enumerate(BAD_LINES)}
    found: dict[str, Any] = {}
    for name in ("hurt", "whole"):
        rows = [
            (bad[n][0] if name == "hurt" else row(n, text="")) if n in bad else row(n)
            for n in range(40 + 3 * len(BAD_LINES))
        ]
        put(tmp_path / name / "c" / "a.jsonl", lines(rows[:60]))
        put(tmp_path / name / "c" / "b.jsonl", lines([*rows[:40], *rows[60:]]))
        outcome = scan_inline(spec_of(tmp_path / name, corpus={"metadata": ["lang", "score", "even"]},
                                      **changes))  # fmt: skip
        assert not outcome.failed
        found[name] = tiny.views(tmp_path / name / "index")
    index = tmp_path / "hurt" / "index"
    errors = rows_of(index, "SELECT source, row, id, error FROM quarantine ORDER BY source, row")
    assert len(errors) == len(BAD_LINES)
    for (source, at, _, error), (n, (_, words)) in zip(errors, bad.items(), strict=True):
        assert (source, at) == (("a.jsonl", n) if n < 60 else ("b.jsonl", n - 20))
        assert words in error
    assert {id for _, _, id, _ in errors} == {None, "x", "i1"}
    check_sums(index, 80 + 3 * len(BAD_LINES))
    gone = {(s, r) for s, r, _, _ in errors}
    keys = {d[0] for d in found["whole"]["documents"] if (d[3], d[4]) in gone}
    for view in ("documents", "segments"):
        found["whole"][view] = [each for each in found["whole"][view] if each[0] not in keys]
    found["whole"]["runs"] = [(run, n - len(errors), t) for run, n, t in found["whole"]["runs"]]
    assert not tiny.differences(found["hurt"], found["whole"])


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
def test_the_rest_of_a_truncated_file_is_one_row(
    tmp_path: Path, spec_of: Any, scan_inline: Scan, ending: str
) -> None:
    rows = [row(n) for n in range(30)]
    # In two streams, of which the second one is cut: bz2 has all or nothing of its only block.
    data = COMPRESS[ending](lines(rows[:20])) + COMPRESS[ending](lines(rows[20:]))[:-9]
    put(tmp_path / "cut" / "c" / f"a.jsonl{ending}", data)
    put(tmp_path / "cut" / "c" / "b.jsonl", lines(rows[:3]))
    assert not scan_inline(spec_of(tmp_path / "cut")).failed
    ((source, at, id, error),) = rows_of(tmp_path / "cut" / "index", "SELECT * FROM quarantine")
    assert (source, id) == (f"a.jsonl{ending}", None)
    assert 20 <= at <= 30
    assert "the file cannot be read from here on: the compressed data is cut short" in error
    check_sums(tmp_path / "cut" / "index", at + 1 + 3)
    shown = rows_of(
        tmp_path / "cut" / "index", "SELECT row FROM documents WHERE source LIKE 'a%' ORDER BY row"
    )
    assert [r for (r,) in shown] == list(range(at))


def test_damaged_tables(tmp_path: Path, spec_of: Any, scan_inline: Scan) -> None:
    """A row group in the middle; no footer; a stream cut short; beside each other and healthy ones."""
    rows = [row(n) for n in range(12)]
    data = bytearray(table(rows))
    at = bytes(data).index(text(5).encode())  # in the second of three groups
    data[at - 200 : at + 200] = b"\xff" * 400
    put(tmp_path / "c" / "a.parquet", bytes(data))
    put(tmp_path / "c" / "b.parquet", table(rows)[:-6])
    put(tmp_path / "c" / "d.parquet", table(rows))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.Table.from_pylist(rows).schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows), max_chunksize=4)
    put(tmp_path / "c" / "e.arrow", sink.getvalue().to_pybytes()[:-2000])
    assert not scan_inline(spec_of(tmp_path)).failed
    bad = quarantined(tmp_path / "index")
    assert [place for place in bad if place[0] < "e"] == [
        *(("a.parquet", n) for n in range(4, 8)), ("b.parquet", 0),
    ]  # fmt: skip
    assert [place for place in bad if place[0] > "e"] in ([("e.arrow", 4)], [("e.arrow", 8)])
    shown = rows_of(
        tmp_path / "index", "SELECT row, id FROM documents WHERE source = 'a.parquet' ORDER BY row"
    )
    assert shown == [(n, f"i{n}") for n in (0, 1, 2, 3, 8, 9, 10, 11)]
    check_sums(tmp_path / "index", 12 + 1 + 12 + bad[-1][1] + 1)


# --- the spec's mistakes and the files'


def test_a_column_that_some_files_lack(tmp_path: Path, spec_of: Any, scan_inline: Scan) -> None:
    """No text: quarantined. No id or metadata: NULL. In every file: the spec's mistake."""
    put(tmp_path / "c" / "a.jsonl", lines([row(n) for n in range(3)]))
    put(tmp_path / "c" / "b.jsonl", lines([{"body": "x", "id": f"b{n}"} for n in range(2)]))
    put(tmp_path / "c" / "d.parquet", table([{"text": text(n)} for n in range(2)]))
    put(tmp_path / "c" / "e.parquet", table([{"body": "x", "id": 4}]))
    put(tmp_path / "c" / "f.parquet", table([{"text": 5, "id": "f", "lang": "fr"}]))
    put(tmp_path / "c" / "g.jsonl.gz", b"no gzip")
    spec = spec_of(tmp_path, corpus={"metadata": ["lang"]})
    assert not scan_inline(spec).failed
    index = tmp_path / "index"
    assert rows_of(index, "SELECT source, row, id FROM quarantine ORDER BY ALL") == [
        ("b.jsonl", 0, "b0"), ("b.jsonl", 1, "b1"), ("e.parquet", 0, "4"), ("f.parquet", 0, "f"),
        ("g.jsonl.gz", 0, None),
    ]  # fmt: skip
    assert rows_of(index, "SELECT id, lang FROM documents WHERE source = 'd.parquet'") == [(None, None)] * 2
    check_sums(index, 10)
    for changes, words in (
        ({"text": "txt"}, "corpus.text: no column 'txt' in a.jsonl; it has: id, text, lang"),
        ({"id": "key"}, "corpus.id: no column 'key' in a.jsonl"),
        ({"metadata": ["lang", "none"]}, "corpus.metadata: no column 'none' in a.jsonl"),
    ):
        with pytest.raises(InputError) as caught:
            scan_inline(spec_of(tmp_path, corpus={"metadata": ["lang"], **changes}, index="other"))
        assert str(caught.value).startswith(words)
    assert not (tmp_path / "other").exists()


# --- what is too large


def hostile(folder: Path) -> dict[str, Path]:
    """A line of 100 MB between two rows, as it is and compressed, and files that expand to 256 MiB."""
    files = {}
    block = b"a" * 1_000_000
    for ending, compress in COMPRESS.items():
        first, last = lines([{"text": "before"}]) + b'{"text": "', b'"}\n' + lines([{"text": "after"}])
        data = compress(first) + compress(block) * 100 + compress(last)
        files[f"line{ending}"] = put(folder / f"line.jsonl{ending}", data)
    for name, end in (("bomb", ".jsonl"), ("text", ".txt"), ("table", ".parquet")):
        bomb = zstandard.ZstdCompressor().compressobj()
        data = b"".join(bomb.compress(b"\0" * (1 << 20)) for _ in range(1 << 8)) + bomb.flush()
        files[name] = put(folder / f"{name}{end}.zst", data)
    files["bomb.gz"] = put(folder / "bomb.jsonl.gz", gzip.compress(b"\0" * (1 << 28), 1))
    return files


MEASURE = """
from pipelines.corpus import index_file, read_documents
from pipelines.files import list_files
from pipelines.quarantine import Refused
from pipelines import readers
from pipelines.spec import CorpusSource
import pyarrow.compute
readers.SPOOL = 1 << 26
before = peak()
for path in sys.argv[1:]:
    source = CorpusSource(uri=path)
    (file,) = list_files([source])
    rows = index_file(file, source, 1 << 20).rows
    found = list(read_documents(file, source, {}, 0, rows))
    told = [(each.row, each.error) if isinstance(each, Refused) else each.text for each in found]
    print(path.rsplit("/", 1)[1], rows, told)
print(peak() - before >> 20)
"""


def test_what_is_too_large_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    files = hostile(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", IMPORT + MEASURE, *map(str, files.values())],
        capture_output=True,
        text=True,
        check=True,
    )
    *told, grown = done.stdout.splitlines()
    long = ["before", (1, "a line of more than 32 MiB, which is not read"), "after"]
    expected = {f"line.jsonl{ending}": (3, long) for ending in COMPRESS} | {
        "bomb.jsonl.zst": (1, [(0, long[1][1])]),
        "bomb.jsonl.gz": (1, [(0, long[1][1])]),
        "text.txt.zst": (1, [(0, "a file of more than 32 MiB, which is not read")]),
        "table.parquet.zst": (1, [(0, "the file cannot be read: decodes to more than 64 MiB, which is not "
                                      "read; store it uncompressed")]),
    }  # fmt: skip
    found = dict(each.split(" ", 1) for each in told)
    assert found == {name: f"{rows} {what}" for name, (rows, what) in expected.items()}
    assert int(grown) < 200, "MiB: a 32 MiB line, as read and as joined, and the decoders' windows"


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
def test_decoders_never_give_more_than_they_are_asked_for(ending: str) -> None:
    """Of zeros 4 KiB hold up to 100 MB; what is asked for comes in full all the same."""
    data = COMPRESS[ending](bytes(1 << 27)) + COMPRESS[ending](b"end")
    most, size, left = 1 << 18, 0, b""
    decoder = pipelines.readers.DECODERS[ending]()
    for start in range(0, len(data), 4096):
        left = data[start : start + 4096]
        while True:
            piece = decoder.decompress(left, most)
            left = b""
            size += len(piece)
            assert len(piece) <= most
            if decoder.eof:
                left, decoder = decoder.unused_data, pipelines.readers.DECODERS[ending]()
                if not left:
                    break
            elif decoder.needs_input:
                break
    assert size == (1 << 27) + 3


def test_a_scan_over_a_line_that_is_too_long(
    tmp_path: Path, spec_of: Any, scan_inline: Scan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines.readers, "MOST", 2000)
    long = row(1, text="a" * 3000)
    put(tmp_path / "c" / "a.jsonl", lines([row(0), long, row(2)]))
    put(tmp_path / "c" / "b.parquet", table([row(0), long, row(2)]))
    put(tmp_path / "c" / "c.txt", b"a" * 3000)
    assert not scan_inline(spec_of(tmp_path, corpus={"id": None, "metadata": []})).failed
    assert quarantined(tmp_path / "index") == [("a.jsonl", 1), ("b.parquet", 1), ("c.txt", 0)]
    check_sums(tmp_path / "index", 7)


def test_a_full_disk_is_no_files_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = CorpusSource(uri=str(put(tmp_path / "a.parquet.gz", gzip.compress(table([row(1)])))))
    (file,) = list_files([wanted])
    assert index_file(file, wanted, 1).rows == 1
    monkeypatch.setattr(pipelines.readers, "SPARE", 1 << 60)
    with pytest.raises(OSError, match="TMPDIR"):
        index_file(file, wanted, 1)


# --- documents that the model or the tokenizer cannot take


@pytest.fixture
def poisoned_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model, with no numbers for the word Paris."""
    model = tmp_path / "poisoned"
    shutil.copytree(tiny_model, model)
    (bad,) = tiny.make_tokenizer(bos=True)(" Paris", add_special_tokens=False)["input_ids"]
    weights = load_file(model / "model.safetensors")
    name = next(n for n in weights if n.endswith("embed_tokens.weight"))
    weights[name][bad] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


POISON = {2, 7, 8, 31, 59}


def poison_corpus(folder: Path) -> None:
    """60 documents, some of them longer than a context; five hold the word."""
    for name, part in (("a.jsonl", range(40)), ("b.jsonl", range(40, 60))):
        rows = [row(n, text=f"now in Paris {text(n)} {text(n + 1)}") if n in POISON else row(n) for n in part]
        put(folder / "c" / name, lines(rows))


BAD = sorted(("a.jsonl", n) if n < 40 else ("b.jsonl", n - 40) for n in POISON)


@pytest.mark.parametrize("changes", [
    {"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "attention": "flex_attention"},
], ids=["float32", "bfloat16", "packed"])  # fmt: skip
def test_activations_that_are_not_finite(
    tmp_path: Path, spec_of: Any, scan_inline: Scan, tiny_model: Path, poisoned_model: Path,
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any],
) -> None:  # fmt: skip
    """Several chunks, culprits that a chunk cuts: neighbours as if the culprits could be run."""
    monkeypatch.setitem(pipelines.unit.CHUNK_TOKENS, "cpu", 2048)
    monkeypatch.setitem(pipelines.unit.BATCH_TOKENS, "cpu", 512)
    for name, model in (("hurt", poisoned_model), ("whole", tiny_model)):
        poison_corpus(tmp_path / name)
        spec = spec_of(tmp_path / name, model={"uri": str(model), **changes}, context={"length": 64})
        outcome = scan_inline(spec)
        assert not outcome.failed
    hurt, whole = tmp_path / "hurt" / "index", tmp_path / "whole" / "index"
    assert quarantined(hurt) == BAD
    assert not quarantined(whole)
    check_sums(hurt, 60)
    for id, error in rows_of(hurt, "SELECT id, error FROM quarantine"):
        assert int(id[1:]) in POISON
        assert error.startswith("activations at model.layers.1")
        assert "are not finite in torch" in error
    assert len(rows_of(hurt, "SELECT * FROM activations")) > 1000
    assert not tiny.differences(healthy(hurt, []), healthy(whole, BAD))
    # Counted nowhere: what is said of an SAE is of the healthy documents alone.
    counted, said = rows_of(
        hurt, "SELECT sum(n_tokens), (SELECT any_value(n_tokens) FROM saes) FROM documents"
    )[0]
    assert counted == said
    assert rows_of(hurt, "SELECT sum(n_tokens) FROM features") == rows_of(
        hurt, "SELECT count(*) FROM activations"
    )
    contexts = {c for (c,) in rows_of(hurt, "SELECT context FROM contexts")}
    for view in ("top_contexts", "sampled_contexts"):
        assert {c for (c,) in rows_of(hurt, f"SELECT context FROM {view}")} <= contexts


def raising(
    monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], times: int = 1 << 30
) -> list[Any]:
    """The model raises `error` where a batch holds the word Paris, that many times; returns what it ran."""
    (bad,) = tiny.make_tokenizer(bos=True)(" Paris", add_special_tokens=False)["input_ids"]
    run, shapes = LanguageModel.run, list[Any]()

    def hurt(self: Any, ids: torch.Tensor, positions: Any = None) -> Any:
        shapes.append(tuple(ids.shape))
        if error is not None and (ids == bad).any():
            raise error()
        return run(self, ids, positions)

    monkeypatch.setattr(LanguageModel, "run", hurt)
    return shapes


def test_a_model_that_raises(
    tmp_path: Path, spec_of: Any, scan_inline: Scan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pipelines.unit.BATCH_TOKENS, "cpu", 512)
    changes = {"model": {"dtype": "bfloat16"}, "context": {"length": 64}}
    for name in ("whole", "hurt"):
        poison_corpus(tmp_path / name)
        if name == "hurt":
            shapes = raising(monkeypatch, lambda: IndexError("index out of range\nin self"))
        assert not scan_inline(spec_of(tmp_path / name, **changes)).failed
    index = tmp_path / "hurt" / "index"
    assert quarantined(index) == BAD
    assert {e for (e,) in rows_of(index, "SELECT error FROM quarantine")} == {
        "IndexError: index out of range in self"
    }
    assert not tiny.differences(healthy(index, []), healthy(tmp_path / "whole" / "index", BAD))
    check_sums(index, 60)
    assert len(set(shapes)) < len(shapes) / 2, "trials have the shapes of the batches"


@pytest.mark.parametrize("error", [
    MemoryError("no"), torch.cuda.OutOfMemoryError("CUDA out of memory"), ConnectionError("reset"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
])  # fmt: skip
def test_what_is_not_a_documents_fault_changes_nothing(
    tmp_path: Path, spec_of: Any, scan_inline: Scan, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The unit fails, nothing is quarantined, no other batch is tried; scanned again, all is there."""
    poison_corpus(tmp_path)
    monkeypatch.setattr("pipelines.scheduler.Policy", partial(Policy, infrastructure_tries=1))
    with monkeypatch.context() as patch:
        undisturbed = raising(patch, None)
        assert not scan_inline(spec_of(tmp_path), str(tmp_path / "other")).failed
    with monkeypatch.context() as patch:
        shapes = raising(patch, lambda: error)
        if isinstance(error, ConnectionError):
            assert len(scan_inline(spec_of(tmp_path)).failed) == 2
        else:
            with pytest.raises(Interrupted, match="memory"):
                scan_inline(spec_of(tmp_path))
    assert not Counter(shapes) - Counter(undisturbed), "none is run twice"
    assert status(str(tmp_path / "index")).quarantined == 0
    outcome = scan_inline(spec_of(tmp_path))
    assert (outcome.documents, outcome.quarantined, len(outcome.failed)) == (60, 0, 0)


def test_a_model_that_raises_whatever_it_is_given_blames_no_document(
    tmp_path: Path, spec_of: Any, scan_inline: Scan, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_corpus(tmp_path)

    def broken(self: Any, *inputs: Any) -> Any:
        raise ValueError("no such kernel")

    monkeypatch.setattr(LanguageModel, "run", broken)
    failed = scan_inline(spec_of(tmp_path)).failed
    assert [f.error for f in failed] == ["ValueError: no such kernel (3 attempts)"] * 2


class PanicException(BaseException):  # what a Rust library's panic is in Python
    pass


@pytest.mark.parametrize("error", [ValueError("cannot\ntokenise"), PanicException("rust")])
def test_a_tokenizer_that_raises(
    tmp_path: Path, spec_of: Any, scan_inline: Scan, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    tokenize = pipelines.unit.tokenize
    for name in ("whole", "hurt"):
        rows = [row(n, text="" if n in POISON and name == "whole" else text(n)) for n in range(20)]
        put(tmp_path / name / "c" / "a.jsonl", lines(rows))

    def hurt(tokenizer: Any, texts: list[str]) -> Any:
        if any(each in {text(n) for n in POISON} for each in texts):
            raise error
        return tokenize(tokenizer, texts)

    assert not scan_inline(spec_of(tmp_path / "whole")).failed
    monkeypatch.setattr(pipelines.unit, "tokenize", hurt)
    assert not scan_inline(spec_of(tmp_path / "hurt")).failed
    index = tmp_path / "hurt" / "index"
    bad = [("a.jsonl", n) for n in sorted(POISON) if n < 20]
    assert quarantined(index) == bad
    assert {e for (e,) in rows_of(index, "SELECT error FROM quarantine")} == {line(error)}
    assert not tiny.differences(healthy(index, []), healthy(tmp_path / "whole" / "index", bad))


def test_a_tokenizer_out_of_memory_blames_no_document() -> None:
    calls = []

    def work(items: list[int]) -> list[int]:
        calls.append(items)
        raise MemoryError

    with pytest.raises(MemoryError):
        culprits_apart(work, [1, 2, 3])
    assert calls == [[1, 2, 3]]
    with pytest.raises(KeyboardInterrupt):
        culprits_apart(lambda items: (_ for _ in ()).throw(KeyboardInterrupt), [1, 2])


# --- too many


def test_a_unit_with_too_many_fails(tmp_path: Path, spec_of: Any, scan_inline: Scan) -> None:
    """100 and more than a tenth; one fewer is a scan that ends well."""
    good = [row(n, text="one two") for n in range(30)]
    for bad, fails in ((MANY, True), (MANY - 1, False)):
        folder = tmp_path / str(bad)
        put(
            folder / "c" / "a.jsonl",
            lines([*good, *({"id": "x", "text": n} for n in range(bad - 1)), {"a": 1}]),
        )
        put(folder / "c" / "b.jsonl", lines(good))
        outcome = scan_inline(spec_of(folder, corpus={"metadata": []}))
        assert bool(outcome.failed) == fails
        if fails:
            (error,) = [f.error for f in outcome.failed]
            assert error.startswith("a.jsonl: 100 of 130 documents cannot be scanned, too many")
            assert error.endswith("1 times: text column 'text' is 0, not a string")
            assert not quarantined(folder / "index")
        else:
            assert outcome.quarantined == bad


def test_a_poisoned_unit_is_given_up_on_without_trying_every_document(
    tmp_path: Path, spec_of: Any, scan_inline: Scan, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "c" / "a.jsonl", lines([row(n, text="in Paris") for n in range(300)]))
    shapes = raising(monkeypatch, lambda: ValueError("bad kernel for it"))
    ((failed),) = scan_inline(spec_of(tmp_path, corpus={"metadata": []})).failed
    assert failed.error.endswith("100 times: ValueError: bad kernel for it")
    assert len(shapes) < 110


def test_a_run_with_too_many_stops(tmp_path: Path, spec_of: Any, scan_inline: Scan) -> None:
    """In no unit are there a hundred; over the run there are, and the scan stops there, and again."""
    for part in range(5):
        rows = [row(n, text="one two") for n in range(30)] + [{"id": "x", "text": n} for n in range(30)]
        put(tmp_path / "c" / f"{part}.jsonl", lines(rows))
    spec = spec_of(tmp_path, corpus={"metadata": []})
    for _ in range(2):
        with pytest.raises(
            CorpuscopeError, match="120 of 240 documents cannot be scanned, too many"
        ) as caught:
            scan_inline(spec)
        assert caught.value.exit_code == 1
        assert status(str(tmp_path / "index")).committed == 4
    for part in range(4):  # mended
        put(tmp_path / "c" / f"{part}.jsonl", lines([row(n, text="one two") for n in range(60)]))
    outcome = scan_inline(spec)
    assert outcome.quarantined == 30


def test_bounds() -> None:
    assert not systematic(99, 99)
    assert systematic(100, 100)
    assert not systematic(1000, 100)
    assert systematic(999, 100)


# --- SAE groups


def test_groups_that_disagree_need_an_index_each(
    tmp_path: Path, spec_of: Any, scan_inline: Scan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At layer 3 a document is not finite that is so at layer 1; where both refuse it all is well."""
    monkeypatch.setattr(
        pipelines.scan, "plan_groups", lambda prepared, workers: [[sae.id] for sae in prepared.saes]
    )
    (bad,) = tiny.make_tokenizer(bos=True)(" Paris", add_special_tokens=False)["input_ids"]
    run = LanguageModel.run
    layers = {3}

    def hurt(self: Any, ids: torch.Tensor, positions: Any = None) -> Any:
        found = run(self, ids, positions)
        for site, x in found.items():
            if site.layer in layers:
                x[ids == bad] = torch.nan
        return found

    monkeypatch.setattr(LanguageModel, "run", hurt)
    for name, both in (("one", False), ("both", True)):
        layers |= {1} if both else set()
        poison_corpus(tmp_path / name)
        outcome = scan_inline(spec_of(tmp_path / name))
        if name == "both":
            assert not outcome.failed
            assert quarantined(tmp_path / name / "index") == BAD
            check_sums(tmp_path / name / "index", 60)
            continue
        assert [f.error for f in outcome.failed] == [
            f"{file}: row {at}: the model can run this document for some of the SAEs, not for those at other "
            "sites; scan these into an index of their own"
            for file, at in (("a.jsonl", 2), ("b.jsonl", 19))
        ]
        assert not rows_of(tmp_path / name / "index", "SELECT * FROM documents")
    # Two workers that look at the same moment may both commit: the next scan sees it.
    commits = list(Ledger(Store(str(tmp_path / "both" / "index"))).commits().values())
    Tally("x", 2, commits)
    one, *others = commits
    with pytest.raises(DataError, match="an index of their own"):
        Tally("x", 2, [dataclasses.replace(one, poison=(5,)), *others])


# --- any damage


def damaged(data: bytes, cut: float, flips: list[tuple[float, int]]) -> bytes:
    hurt = bytearray(data[: round(cut * len(data))])
    for where, value in flips:
        if hurt:
            hurt[int(where * len(hurt))] = value
    return bytes(hurt)


def a_file(name: str) -> bytes:
    rows = [row(n) for n in range(300)]
    if "jsonl" in name:
        return lines(rows)
    if "parquet" in name:
        return table(rows, 100)
    sink = pa.BufferOutputStream()
    new = pa.ipc.new_stream if "stream" in name else pa.ipc.new_file
    with new(sink, pa.Table.from_pylist(rows).schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows), max_chunksize=100)
    return bytes(sink.getvalue().to_pybytes())


FILES = {
    f"{name}{ending}": COMPRESS[ending](a_file(name))
    for name in ("a.jsonl", "a.parquet", "a.arrow", "stream.arrow")
    for ending in (COMPRESS if name == "a.jsonl" else ("", ".zst"))
}


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(FILES)),
    cut=st.just(1.0) | st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    unit=st.integers(1, 20_000),
)
def test_of_a_damaged_file_every_row_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, name: str, cut: float, flips: list[tuple[float, int]], unit: int
) -> None:
    """Whatever is damaged: no error, and the rows that planning counts are the rows that are read."""
    path = put(tmp_path_factory.mktemp("any") / name, damaged(FILES[name], cut, flips))
    wanted = CorpusSource(uri=str(path), id="id", metadata=("lang", "score"))
    (file,) = list_files([wanted])
    found = index_file(file, wanted, unit)
    types = {column: "string" if type == "null" else type for column, type in found.types.items()}

    def read() -> Iterator[Document | Refused]:
        for span in found.spans:
            yield from read_documents(file, wanted, types, span.start, span.stop)

    rows = list(read())
    assert [each.row for each in rows] == list(range(found.rows))
    if cut == 1.0 and not flips:
        assert all(isinstance(each, Document) for each in rows)
        assert found.rows == 300
    for each in rows:
        if isinstance(each, Refused):
            assert each.error == line(each.error)
            assert each.error


def test_a_scan_of_damaged_files(tmp_path: Path, spec_of: Any, scan_inline: Scan) -> None:
    """Some of each kind end to end; those of one seed, so that a failure can be looked at."""
    rng = np.random.default_rng(20)
    for n, (name, data) in enumerate(sorted(FILES.items())):
        flips = [(float(rng.random()), int(rng.integers(256))) for _ in range(3)]
        put(tmp_path / "c" / f"{n}.{name}", damaged(data[: len(data) // 2], 1.0, flips))
    put(tmp_path / "c" / "whole.jsonl", lines([row(n, text="one two") for n in range(3000)]))
    outcome = scan_inline(spec_of(tmp_path, context={"length": 16}))
    assert not outcome.failed
    assert outcome.quarantined >= len(FILES) - 1
    check_sums(tmp_path / "index", outcome.documents + outcome.quarantined)


# --- errors


@pytest.mark.parametrize(("error", "is_one"), [
    (MemoryError(), True), (torch.cuda.OutOfMemoryError("x"), True), (OSError("disk"), True),
    (TimeoutError(), True), (RuntimeError("CUDA error: device-side assert triggered"), True),
    (RuntimeError("cuBLAS error: CUBLAS_STATUS_ALLOC_FAILED"), True),
    (pa.ArrowMemoryError("malloc of size 9 failed"), True),
    (RuntimeError("shape mismatch"), False), (ValueError("out of memory"), False), (IndexError("x"), False),
    (DataError("row 1"), False), (AssertionError(), False), (OverflowError("int too large"), False),
])  # fmt: skip
def test_what_is_infrastructure(error: Exception, is_one: bool) -> None:
    assert is_infrastructure(error) == is_one


def test_an_error_is_one_short_line_of_text() -> None:
    assert line(ValueError("a\nb\t c\ud800")) == "ValueError: a b c?"
    assert line(DataError("as it is")) == "as it is"
    assert line(KeyError()) == "KeyError"
    assert len(line("x" * 1000)) == 300
