"""The corpus: whatever the format, compression and cuts, the same documents; what is none is refused."""

from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import hashlib
import json
import lzma
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.columns import merge_types
from pipelines.corpus import Document, FileIndex, Span, index_file, read_documents
from pipelines.files import SourceFile, list_files
from pipelines.quarantine import Refused
from pipelines.schema import metadata_type
from pipelines.spec import CorpusSource
from sae_runtime.errors import CorpuscopeError, DataError, InputError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
ROWS: list[dict[str, Any]] = [
    {
        "id": f"d{n}",
        "text": "naïve 語 😀 \u2028 line\r\n" * (n % 5) + str(n),
        "lang": ["en", None, "fr"][n % 3],
        "n": n,
    }
    for n in range(1300)
]


def source(uri: Any, **more: Any) -> CorpusSource:
    return CorpusSource(uri=uri if isinstance(uri, (tuple, list)) else str(uri), **more)


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(rows: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=400)
    return sink.getvalue().to_pybytes()


def arrow(rows: list[Any], new: Any = pa.ipc.new_file) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows)
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=300)
    return sink.getvalue().to_pybytes()


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def only(wanted: CorpusSource) -> SourceFile:
    (file,) = list_files([wanted])
    return file


def index(wanted: CorpusSource, unit_bytes: int = 1 << 30, **more: Any) -> FileIndex:
    return index_file(only(wanted), wanted, unit_bytes, **more)


def read(wanted: CorpusSource, unit_bytes: int = 1 << 30, **more: Any) -> list[Document | Refused]:
    """All rows, span by span."""
    file = only(wanted)
    found = index_file(file, wanted, unit_bytes, **more)
    types = merge_types([found.types])
    return [d for span in found.spans for d in read_documents(file, wanted, types, span.start, span.stop)]


def documents(wanted: CorpusSource, unit_bytes: int = 1 << 30, **more: Any) -> list[Document]:
    """All rows, each of which is a document."""
    rows = read(wanted, unit_bytes, **more)
    found = [row for row in rows if isinstance(row, Document)]
    assert found == rows
    return found


def refused(rows: list[Document | Refused]) -> list[tuple[int, str]]:
    """Rows that are refused, and why."""
    return [(row.row, row.error) for row in rows if isinstance(row, Refused)]


def unsuited(wanted: CorpusSource, key: str) -> str:
    """What an index says against a key of the spec."""
    found = index(wanted).unsuited
    assert found is not None
    (why,) = (why for (of, _), why in found.items() if of == key)
    return why


def fails(kind: type[CorpuscopeError], *words: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# --- formats


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize(("name", "write"), [
    ("a.jsonl", jsonl), ("a.ndjson", jsonl), ("a.parquet", parquet), ("a.arrow", arrow),
    ("a.feather", lambda rows: arrow(rows, pa.ipc.new_stream)),
])  # fmt: skip
def test_formats_and_compressions_give_the_same_documents(
    tmp_path: Path, name: str, write: Callable[[list[Any]], bytes], ending: str
) -> None:
    data = COMPRESS[ending](write(ROWS))
    wanted = source(put(tmp_path / (name + ending), data), id="id", metadata=("n", "lang"))
    found = index(wanted, 5000)
    assert documents(wanted, 5000) == [
        Document(n, row["id"], row["text"], (row["n"], row["lang"])) for n, row in enumerate(ROWS)
    ]
    assert found.digest == hashlib.blake2b(data, digest_size=16).hexdigest()
    assert found.rows == len(ROWS)
    assert found.text_bytes == sum(len(row["text"].encode()) for row in ROWS)
    assert found.types == {"n": "int64", "lang": "string"}
    assert found.spans == index(source(put(tmp_path / "plain.jsonl", jsonl(ROWS))), 5000).spans


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_text_file_is_one_document(tmp_path: Path, ending: str) -> None:
    text = "Ünicode\r\n\u2028語\n"
    data = COMPRESS[ending](b"\xef\xbb\xbf" + text.encode())
    wanted = source(put(tmp_path / ("intro.rst" + ending), data))
    found = index(wanted, 1)
    size = len(text.encode())
    assert found == FileIndex(
        hashlib.blake2b(data, digest_size=16).hexdigest(), 1, size, (Span(0, 1, size),), {}, {}
    )
    assert documents(wanted) == [Document(0, None, text, ())]
    assert index(wanted, 1, start=1).spans == ()
    assert only(wanted).corpus == "intro"


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
def test_concatenated_streams_and_padding(tmp_path: Path, ending: str) -> None:
    parts = [COMPRESS[ending](jsonl(ROWS[n : n + 100])) for n in range(0, 1300, 100)]
    padded = source(put(tmp_path / ("a.jsonl" + ending), b"".join(parts) + b"\0" * 8))
    assert [d.text for d in documents(padded)] == [row["text"] for row in ROWS]


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "a.arrow"])
@pytest.mark.parametrize("kept", [0, 3, 30, -1])
def test_what_is_cut_short_is_one_row_after_those_before_it(
    tmp_path: Path, name: str, ending: str, kept: int
) -> None:
    rows = ROWS[:300]
    data = parquet(rows) if "parquet" in name else arrow(rows) if "arrow" in name else jsonl(rows)
    wanted = source(put(tmp_path / (name + ending), COMPRESS[ending](data)[:kept]))
    found = read(wanted)
    assert index(wanted).rows == len(found)
    ((row, error),) = refused(found)
    assert "cannot be read" in error
    assert "cut short" in error
    assert row == len(found) - 1
    assert [d.text for d in found if isinstance(d, Document)] == [each["text"] for each in rows[:row]]
    if kept == -1 and ending in (".gz", ".xz") and "jsonl" in name:
        assert row == 300, "the checksum alone is cut"


@pytest.mark.parametrize("ending", [".gz", ".zst", ".xz"])
def test_rows_before_the_cut_are_read(tmp_path: Path, ending: str) -> None:
    """A few thousand compressed bytes hold hundreds of rows: they are there."""
    data = COMPRESS[ending](jsonl([{"text": hashlib.sha256(bytes([n % 256, n >> 8])).hexdigest() * 9}
                                   for n in range(4000)]))  # fmt: skip
    wanted = source(put(tmp_path / f"a.jsonl{ending}", data[: len(data) // 2]))
    found = read(wanted, 4096)
    assert 1000 < len(found) < 3000
    assert [row for row, _ in refused(found)] == [len(found) - 1]
    half = len(found) // 2
    assert list(read_documents(only(wanted), wanted, {}, half, half + 5)) == found[half : half + 5]


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.bz2", "a.jsonl.xz", "a.parquet", "a.arrow"]
)
def test_what_is_not_what_its_name_says_is_one_row(tmp_path: Path, name: str) -> None:
    wanted = source(put(tmp_path / name, b"this is not that\n" * 9))
    assert index(wanted).unsuited is None
    ((row, error),) = refused(read(wanted))
    assert row == 0
    assert "cannot be read" in error


def test_data_after_a_compressed_stream_are_a_row(tmp_path: Path) -> None:
    for ending in (".gz", ".zst", ".bz2", ".xz"):
        data = COMPRESS[ending](jsonl(ROWS[:2])) + b"more"
        found = read(source(put(tmp_path / f"a.jsonl{ending}", data)))
        assert [isinstance(row, Refused) for row in found] == [False, False, True]


def test_lines(tmp_path: Path) -> None:
    lines = [
        '\ufeff{"text": "a\u2028b"}\r',
        "\r",
        "  \t",
        '{"text": "c\\u2028d"}',
        "\x0c",
        '{"text": "e\x85f"}',
    ]
    data = "\n".join(lines).encode()
    wanted = source(put(tmp_path / "a.jsonl", data))
    assert [(d.row, d.text) for d in documents(wanted, 1)] == [
        (0, "a\u2028b"),
        (1, "c\u2028d"),
        (2, "e\x85f"),
    ]
    assert index(wanted).rows == 3


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_has_no_rows(tmp_path: Path, data: bytes) -> None:
    found = index(source(put(tmp_path / "a.jsonl", data), id="i", metadata=("m",)))
    assert (found.rows, found.spans, found.types) == (0, (), {"m": "null"})


def test_an_empty_text_file_is_a_document_and_empty_tables_have_no_rows(tmp_path: Path) -> None:
    assert [d.text for d in documents(source(put(tmp_path / "a.txt", b"")))] == [""]
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert index(source(tmp_path / "a.parquet")).spans == ()


# --- spans


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 4), max_size=20),
    unit=st.integers(1, 8),
    start=st.integers(0, 22),
    rows=st.none() | st.integers(0, 22),
)
def test_spans_partition_the_rows(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], unit: int, start: int, rows: int | None
) -> None:
    path = tmp_path_factory.mktemp("spans") / "a.jsonl"
    wanted = source(put(path, jsonl([{"text": "x" * size} for size in sizes])))
    found = index(wanted, unit, start=start, rows=rows)
    covered = [row for span in found.spans for row in range(span.start, span.stop)]
    assert covered == list(range(len(sizes)))[start : None if rows is None else start + rows]
    for number, span in enumerate(found.spans):
        inside = sizes[span.start : span.stop]
        assert inside
        assert span.bytes == sum(inside)
        assert sum(inside[:-1]) < unit
        assert number == len(found.spans) - 1 or span.bytes >= unit
    assert (found.rows, found.text_bytes) == (len(sizes), sum(sizes))
    put(path, jsonl([{"text": "x" * size} for size in sizes[start:]]))
    shifted = index(wanted, unit, rows=rows).spans
    assert [(s.start + start, s.stop + start, s.bytes) for s in shifted] == [
        (s.start, s.stop, s.bytes) for s in found.spans
    ]
    put(path, jsonl([{"text": "x" * size} for size in sizes] + [{"text": "new"}]))
    assert index(wanted, unit, start=start).spans[: max(0, len(found.spans) - 1)] == found.spans[:-1]


@pytest.mark.parametrize(("name", "write"), [("a.jsonl", jsonl), ("a.parquet", parquet), ("a.arrow", arrow)])
def test_any_range_of_rows_is_that_range(
    tmp_path: Path, name: str, write: Callable[[list[Any]], bytes]
) -> None:
    wanted = source(put(tmp_path / name, write(ROWS)))
    file = only(wanted)
    for start, stop in [(0, 1), (399, 401), (400, 800), (511, 513), (1299, 1300), (250, 1290), (7, 7)]:
        assert [d.row for d in read_documents(file, wanted, {}, start, stop)] == list(range(start, stop))
    fails(DataError, name, "1300 rows", "1301",
          call=lambda: list(read_documents(file, wanted, {}, 1290, 1301)))  # fmt: skip


def test_a_sample_does_not_depend_on_the_spans(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", jsonl(ROWS))
    whole = [d.row for d in documents(source(path, sample=0.2), 1 << 30)]
    assert whole == [d.row for d in documents(source(path, sample=0.2), 100)]
    assert set(whole) <= {d.row for d in documents(source(path, sample=0.3))}
    assert 190 < len(whole) < 330
    assert len(documents(source(path, sample=1.0))) == len(ROWS)
    digests = [hashlib.blake2b(f"a\0a.jsonl\0{n}".encode(), digest_size=8) for n in range(len(ROWS))]
    expected = [n for n, d in enumerate(digests) if int.from_bytes(d.digest(), "big") < 0.2 * 2**64]
    assert whole == expected
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "b.parquet")
    other = source(tmp_path / "b.parquet", sample=0.2)
    file = replace(only(other), corpus="a", path="a.jsonl")
    assert [d.row for d in read_documents(file, other, {}, 0, 1300)] == whole


# --- files


def test_globs_and_lists_in_corpus_order(tmp_path: Path) -> None:
    for name in ("b/web.jsonl.zst", "a/z.jsonl", "top.jsonl", "a/deep/x.jsonl", "a/skip.txt"):
        put(tmp_path / name, b"")
    files = list_files(
        [
            source([f"{tmp_path}/top.jsonl", f"{tmp_path}/**/*.jsonl*"]),
            source(f"{tmp_path}/a/*.txt", name="n"),
        ]
    )
    assert [(f.source, f.path, f.corpus, f.format) for f in files] == [
        (0, "a/deep/x.jsonl", "x", "jsonl"), (0, "a/z.jsonl", "z", "jsonl"),
        (0, "b/web.jsonl.zst", "web", "jsonl"),
        (0, "top.jsonl", "top", "jsonl"), (1, "skip.txt", "n", "text"),
    ]  # fmt: skip
    assert files[1].uri == f"{tmp_path}/a/z.jsonl"
    by_folder = list_files([source(f"{tmp_path}/?/*.jsonl")])
    assert [f.path for f in by_folder] == ["a/z.jsonl"]
    assert [
        f.path for f in list_files([source(f"{tmp_path}/a/*.jsonl"), source(f"{tmp_path}/a/*.jsonl")])
    ] == ["z.jsonl"] * 2


def test_stamp_changes_with_the_file(tmp_path: Path) -> None:
    wanted = source(put(tmp_path / "a.jsonl", b'{"text": "a"}\n'))
    before = only(wanted)
    assert before.size == 14
    assert before.stamp
    assert before == only(wanted)
    times = os.stat(tmp_path / "a.jsonl")
    put(tmp_path / "a.jsonl", b'{"text": "b"}\n')
    os.utime(tmp_path / "a.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert only(wanted).stamp != before.stamp


def test_other_filesystems(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/corpus-test/x/a.jsonl.gz", gzip.compress(jsonl(ROWS[:3])))
    memory.pipe_file("/corpus-test/b.parquet", parquet(ROWS[:3]))
    try:
        files = list_files([source("memory://corpus-test/**/*.*")])
        assert [f.path for f in files] == ["b.parquet", "x/a.jsonl.gz"]
        assert all(f.uri.startswith("memory://") for f in files)
        wanted = source("memory://corpus-test/x/a.jsonl.gz")
        assert [d.text for d in documents(wanted)] == [row["text"] for row in ROWS[:3]]
        assert [d.text for d in documents(source("memory://corpus-test/*.parquet"))] == [
            r["text"] for r in ROWS[:3]
        ]
    finally:
        memory.rm("/corpus-test", recursive=True)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("in/a.jsonl", jsonl(ROWS[:2]))
    assert len(documents(source(f"zip://in/*.jsonl::{tmp_path}/all.zip"))) == 2
    put(tmp_path / "c.jsonl", jsonl(ROWS[:2]))
    assert len(documents(source(f"simplecache::file://{tmp_path}/*.jsonl"))) == 2


def test_a_name_with_wildcard_signs(tmp_path: Path) -> None:
    wanted = source(put(tmp_path / "a[1]?.jsonl", jsonl(ROWS[:2])))
    assert only(wanted).path == "a[1]?.jsonl"
    assert len(documents(wanted)) == 2


@pytest.mark.parametrize(("name", "format", "corpus"), [
    ("web.2020.JSONL.ZST", "jsonl", "web.2020"), ("a.json", "jsonl", "a"), ("a.pq", "parquet", "a"),
    ("a.ipc", "arrow", "a"), ("a.md.gz", "text", "a"), ("a.py", "text", "a"), ("a.tex.xz", "text", "a"),
])  # fmt: skip
def test_format_by_name(tmp_path: Path, name: str, format: str, corpus: str) -> None:
    file = only(source(put(tmp_path / name, b"")))
    assert (file.format, file.corpus) == (format, corpus)


@pytest.mark.parametrize("name", ["README", "a.csv", "a.zst", ".jsonl"])
def test_unknown_names_need_a_format(tmp_path: Path, name: str) -> None:
    path = put(tmp_path / name, b"")
    fails(InputError, "corpus.format", name, "`format:`", call=lambda: list_files([source(path)]))
    assert only(source(path, format="text")).format == "text"


def test_files_that_are_not_there(tmp_path: Path) -> None:
    put(tmp_path / "folder.jsonl" / "a.jsonl", b"")
    for pattern in (
        f"{tmp_path}/none.jsonl",
        f"{tmp_path}/*.txt",
        f"{tmp_path}/*.jsonl",
        f"{tmp_path}/no/*.jsonl",
    ):
        fails(InputError, "corpus.uri", "no file matches", pattern,
              call=lambda pattern=pattern: list_files([source(pattern)]))  # fmt: skip
    fails(InputError, "corpus.uri", "is a directory", f"{tmp_path}/*.jsonl",
          call=lambda: list_files([source(f"{tmp_path}/")]))  # fmt: skip
    fails(InputError, "corpus.uri", "nosuch", call=lambda: list_files([source("nosuch://x/*.jsonl")]))
    os.symlink(tmp_path / "gone", tmp_path / "broken.jsonl")
    fails(InputError, "corpus.uri", "broken.jsonl", call=lambda: list_files([source(f"{tmp_path}/*.jsonl")]))


def test_a_relative_path_twice_is_an_error(tmp_path: Path) -> None:
    put(tmp_path / "a" / "x.jsonl", b""), put(tmp_path / "b" / "x.jsonl", b"")
    wanted = source([f"{tmp_path}/a/*.jsonl", f"{tmp_path}/b/*.jsonl"])
    fails(
        InputError, "corpus.uri", "a/x.jsonl", "b/x.jsonl", "relative path", call=lambda: list_files([wanted])
    )
    assert len(list_files([source(f"{tmp_path}/a/*.jsonl"), source(f"{tmp_path}/b/*.jsonl")])) == 2


def test_a_file_removed_after_listing(tmp_path: Path) -> None:
    wanted = source(put(tmp_path / "a.jsonl", b""))
    file = only(wanted)
    (tmp_path / "a.jsonl").unlink()
    fails(InputError, "a.jsonl", "cannot be opened", call=lambda: index_file(file, wanted, 10))


# --- columns and types


@pytest.mark.parametrize(
    ("name", "write"), [("web.jsonl", jsonl), ("web.parquet", parquet), ("web.arrow", arrow)]
)
@pytest.mark.parametrize(("key", "more"), [
    ("text", {"text": "body"}), ("id", {"id": "body"}), ("metadata", {"metadata": ("n", "body")}),
])  # fmt: skip
def test_missing_columns(
    tmp_path: Path, name: str, write: Callable[[list[Any]], bytes], key: str, more: dict[str, Any]
) -> None:
    wanted = source(put(tmp_path / name, write(ROWS)), **more)
    assert unsuited(wanted, key) == f"corpus.{key}: no column 'body' in {name}; it has: id, text, lang, n"
    found = read(wanted)
    if key == "text":
        assert refused(found) == [(n, "text column 'body' is missing") for n in range(len(ROWS))]
    else:
        assert [(d.id, d.metadata[1:]) for d in found if isinstance(d, Document)] == [
            (None, (None,) if key == "metadata" else ()) for _ in ROWS
        ]


def test_a_column_has_a_thousand_rows_to_appear(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "x"}] * 999
    path = put(tmp_path / "a.jsonl", jsonl([*rows, {"text": "x", "late": 1}]))
    assert index(source(path, metadata=("late",))).types == {"late": "int64"}
    path = put(tmp_path / "a.jsonl", jsonl([*rows, {"text": "x"}, {"text": "x", "late": 1}]))
    assert "corpus.metadata: no column 'late'" in unsuited(source(path, metadata=("late",)), "metadata")


@pytest.mark.parametrize("data", [b"[\n1,\n2]\n", b"text,lang\na,b\n", b'[{"text": "a"}]'])
def test_what_is_not_json_lines_is_said(tmp_path: Path, data: bytes) -> None:
    wanted = source(put(tmp_path / "a.json", data))
    why = unsuited(wanted, "text")
    assert all(word in why for word in ("corpus.format", "a.json", "no JSON object", "`format:`"))


def test_text_files_have_no_columns(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", b"x")
    for key, value in (("id", "id"), ("metadata", ("lang",)), ("messages", "turns")):
        why = unsuited(source(path, **{key: value}), key)
        assert f"corpus.{key}: a.txt is a text file" in why
    assert refused(read(source(path, messages="turns"))) == [(0, "a text file has no messages")]


@pytest.mark.parametrize(("values", "name", "stored"), [
    ([True, None], "bool", [True, None]),
    ([1, -(2**63)], "int64", [1, -(2**63)]),
    ([1, 2.5], "double", [1.0, 2.5]),
    (["a", None], "string", ["a", None]),
    ([None, None], "null", [None, None]),
    ([1, "a"], "json", ["1", '"a"']),
    ([True, 1], "json", ["true", "1"]),
    ([{"a": [1, "é"]}, None], "json", ['{"a": [1, "é"]}', None]),
    ([2**64, 1], "json", [str(2**64), "1"]),
    (["2020-01-01", "2020-01-02"], "string", ["2020-01-01", "2020-01-02"]),
])  # fmt: skip
def test_json_types(tmp_path: Path, values: list[Any], name: str, stored: list[Any]) -> None:
    wanted = source(put(tmp_path / "a.jsonl", jsonl([{"text": "", "m": v} for v in values])), metadata=("m",))
    assert index(wanted).types == {"m": name}
    found = [d.metadata[0] for d in documents(wanted)]
    assert found == stored
    assert [type(v) for v in found] == [type(v) for v in stored]


def test_types_are_those_of_a_columns_first_thousand_values(tmp_path: Path) -> None:
    rows = [{"text": "", "m": None, "k": 0}] * 1500 + [
        {"text": "", "m": 1, "k": 1},
        {"text": "", "m": 2, "k": "x"},
    ]
    wanted = source(put(tmp_path / "a.jsonl", jsonl(rows)), metadata=("m", "k"))
    assert index(wanted).types == {"m": "int64", "k": "int64"}
    assert refused(read(wanted)) == [(1501, "column 'k' holds 'x', which is not int64")]


def test_schema_types(tmp_path: Path) -> None:
    moment = datetime.datetime(2020, 9, 13, 12, 26, 40, 123456)
    columns: dict[str, tuple[pa.Array, str, Any]] = {
        "bool": (pa.array([True]), "bool", True),
        "uint8": (pa.array([200], pa.uint8()), "int64", 200),
        "half": (pa.array([0.5], pa.float16()), "double", 0.5),
        "decimal": (pa.array([decimal.Decimal("1.25")]), "double", 1.25),
        "large": (pa.array(["é"], pa.large_string()), "string", "é"),
        "view": (pa.array(["é"], pa.string_view()), "string", "é"),
        "dictionary": (pa.array(["é"]).dictionary_encode(), "string", "é"),
        "seconds": (pa.array([moment], pa.timestamp("s")), "timestamp", moment.replace(microsecond=0)),
        "nano": (pa.array([1_600_000_000_123_456_789], pa.timestamp("ns")), "timestamp", moment),
        "zone": (pa.array([1_600_000_000_123_456], pa.timestamp("us", "+02:00")), "timestamp", moment),
        "date": (pa.array([moment.date()], pa.date64()), "date", moment.date()),
        "list": (pa.array([[1, 2]]), "json", "[1, 2]"),
        "struct": (pa.array([{"a": moment.date()}]), "json", '{"a": "2020-09-13"}'),
        "a.b": (pa.array([1]), "int64", 1),
        "null": (pa.nulls(1), "null", None),
    }
    table = pa.table({"text": ["x"]} | {name: array for name, (array, _, _) in columns.items()})
    pq.write_table(table.drop_columns("view"), tmp_path / "a.parquet")
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("a.arrow", "a.parquet"):
        names = tuple(column for column in columns if name == "a.arrow" or column != "view")
        wanted = source(tmp_path / name, metadata=names)
        assert index(wanted).types == {column: columns[column][1] for column in names}
        (document,) = documents(wanted)
        assert dict(zip(names, document.metadata, strict=True)) == {
            column: columns[column][2] for column in names
        }
        types = merge_types([index(wanted).types])
        for column, value in zip(names, document.metadata, strict=True):
            assert pa.array([value], metadata_type(types[column]))[0].as_py() == value


def test_schema_types_that_will_not_do(tmp_path: Path) -> None:
    table = pa.table({"text": ["x"], "raw": [b"x"], "score": [0.5]})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path)
    for key, column in (("metadata", "raw"), ("text", "raw"), ("id", "score")):
        wanted = source(path, **{key: (column,) if key == "metadata" else column})
        why = unsuited(wanted, key)
        assert all(word in why for word in (f"corpus.{key}", repr(column), "a.parquet"))
        ((row, _),) = refused(read(wanted))
        assert row == 0


def test_a_column_that_occurs_twice(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert "several columns" in unsuited(source(tmp_path / "a.arrow"), "text")
    assert refused(read(source(tmp_path / "a.arrow"))) == [(0, "the file has several columns 'text'")]


def test_merging_types() -> None:
    merged = merge_types([
        {"a": "int64", "b": "null", "c": "null", "d": "string", "e": "int64"},
        {"a": "double", "b": "date", "c": "null", "d": "int64", "e": "int64"},
    ])  # fmt: skip
    assert merged == {"a": "double", "b": "date", "c": "string", "d": "json", "e": "int64"}
    assert merge_types([]) == {}
    assert [metadata_type(n) for n in ("string", "json", "timestamp")] == [
        pa.string(),
        pa.string(),
        pa.timestamp("us"),
    ]


@given(
    st.lists(st.sampled_from(["bool", "int64", "double", "string", "json", "null"]), min_size=1, max_size=6)
)
def test_merging_types_does_not_depend_on_order(names: list[str]) -> None:
    assert merge_types([{"m": n} for n in names]) == merge_types([{"m": n} for n in reversed(names)])


# --- rows that cannot be documents


@pytest.mark.parametrize(("value", "name"), [
    ("x", "int64"), (1.5, "int64"), (True, "int64"), (2**63, "int64"), (1, "string"), (1, "bool"),
    ("x", "double"), (2**53 + 1, "double"), (10**400, "double"), ("x", "timestamp"), (1, "date"),
    ("x", "null"),
])  # fmt: skip
def test_values_that_do_not_fit(tmp_path: Path, value: Any, name: str) -> None:
    wanted = source(
        put(tmp_path / "a.jsonl", jsonl([{"text": ""}, {"text": "", "m": value}])), metadata=("m",)
    )
    assert index(wanted).rows == 2
    ((row, error),) = refused(list(read_documents(only(wanted), wanted, {"m": name}, 0, 2)))
    assert row == 1
    assert error.startswith("column 'm' holds")
    assert error.endswith(f"which is not {name}")


@pytest.mark.parametrize(("line", "words"), [
    (b'{"a": 1}', "text column 'text' is missing"),
    (b'{"text": null}', "is None, not a string"),
    (b'{"text": 3}', "is 3, not a string"),
    (b'{"text": "a"', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"text": "\xff"}', "not UTF-8 at byte 10 of the line"),
    (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
    (b'["text"]', "not a JSON object but ['text']"),
    (b'{"text": "\\ud800"}', "which is not string"),
    (b'{"text": "", "id": 1.5}', "column 'id' holds 1.5"),
    (b'{"text": "", "id": true}', "column 'id' holds True"),
])  # fmt: skip
def test_bad_rows_are_counted_and_refused_when_read(tmp_path: Path, line: bytes, words: str) -> None:
    data = jsonl([{"text": "ok", "id": "i"}]) + line + b"\n" + jsonl([{"text": "ok", "id": "i"}])
    wanted = source(put(tmp_path / "a.jsonl", data), id="id")
    assert index(wanted).rows == 3
    found = read(wanted)
    ((row, error),) = refused(found)
    assert row == 1
    assert words in error
    assert len(error) <= 300
    assert "\n" not in error
    assert [d.row for d in found if isinstance(d, Document)] == [0, 2]


def test_bad_rows_of_tables_and_text(tmp_path: Path) -> None:
    array = pa.StringArray.from_buffers(
        2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ok\xff\xfe")
    )
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), pa.schema([("text", pa.string())])) as writer:
        writer.write_table(pa.table({"text": array}))
    for name in ("a.parquet", "a.arrow"):
        ok, bad = read(source(tmp_path / name))
        assert isinstance(ok, Document)
        assert ok.text == "ok"
        assert isinstance(bad, Refused)
        assert bad.error.startswith("column 'text': ")
    pq.write_table(pa.table({"text": pa.array(["x", None])}), tmp_path / "b.parquet")
    assert refused(read(source(tmp_path / "b.parquet"))) == [(1, "text column 'text' is None, not a string")]
    big = pa.table({"text": ["x"], "m": pa.array([2**64 - 1], pa.uint64())})
    pq.write_table(big, tmp_path / "c.parquet")
    wanted = source(tmp_path / "c.parquet", metadata=("m",))
    assert refused(read(wanted)) == [(0, f"column 'm' holds {2**64 - 1}, which is not int64")]
    assert refused(read(source(put(tmp_path / "d.txt", b"ab\xff")))) == [(0, "not UTF-8 at byte 2")]


def test_ids(tmp_path: Path) -> None:
    rows = [
        {"text": "", "id": 7},
        {"text": "", "id": "x"},
        {"text": "", "id": None},
        {"text": ""},
        {"text": "", "id": 2**70},
    ]
    wanted = source(put(tmp_path / "a.jsonl", jsonl(rows)), id="id", metadata=("id",))
    found = documents(wanted)
    assert [d.id for d in found] == ["7", "x", None, None, str(2**70)]
    assert [d.metadata for d in found][:4] == [("7",), ('"x"',), (None,), (None,)]
    assert [d.id for d in documents(source(tmp_path / "a.jsonl"))] == [None] * 5


def test_no_heavy_imports() -> None:
    code = "import sys, pipelines.corpus; print([m for m in ('torch', 'ray', 'duckdb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
