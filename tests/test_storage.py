"""The storage door: one winner of a race, whole objects or none, and data files that are what commits say."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faulty_s3
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.storage import Store
from pipelines.writer import UnitWriter, sae_column
from sae_runtime.errors import InputError

RACERS = 50


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URI of an empty folder."""
    return str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}/store"


def test_of_fifty_writers_one_wins(place: str, request: pytest.FixtureRequest) -> None:
    interval = sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(interval))
    sys.setswitchinterval(1e-6)  # threads change between any two steps
    for turn in range(8):
        name = f"commits/{turn}.json"
        barrier = threading.Barrier(RACERS)

        def race(i: int, name: str = name, barrier: threading.Barrier = barrier) -> tuple[bool, bytes, bytes]:
            store, data = Store(place), f"racer {i} ".encode() * 5000
            barrier.wait()
            won = store.put_if_absent(name, data)
            return won, data, store.read(name)  # a loser's answer means that the winner's object stands

        with ThreadPoolExecutor(RACERS) as pool:
            results = list(pool.map(race, range(RACERS)))
        winners = [data for won, data, _ in results if won]
        assert len(winners) == 1
        assert {read for _, _, read in results} == {winners[0]}
        assert Store(place).put_if_absent(name, b"late") is False
        assert Store(place).read(name) == winners[0]
    assert Store(place).entries("commits") == sorted(f"{turn}.json" for turn in range(8))


def _race_in_process(folder: str, name: str, turns: int) -> list[bool]:
    return [Store(folder).put_if_absent(f"{turn}.json", name.encode()) for turn in range(turns)]


def test_processes_race_too(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        won = pool.starmap(_race_in_process, [(str(tmp_path / "s"), str(i), 200) for i in range(3)])
    for turn in range(200):
        winners = [str(i) for i in range(3) if won[i][turn]]
        assert len(winners) == 1
        assert Store(str(tmp_path / "s")).read(f"{turn}.json").decode() == winners[0]
    assert len(list((tmp_path / "s").iterdir())) == 200, "a loser's temporary file was left"


def test_readers_see_whole_objects_or_none(tmp_path: Path) -> None:
    """While a large object is created, and while it is replaced."""
    store, size = Store(str(tmp_path)), 2_000_000
    stop, seen, broken = threading.Event(), set(), []

    def read() -> None:
        reader = Store(str(tmp_path))
        while not stop.is_set():
            for name in reader.entries("f"):
                data = reader.read(f"f/{name}")
                seen.add(name)
                if len(data) != size or len(set(data)) != 1:
                    broken.append((name, len(data)))

    thread = threading.Thread(target=read)
    thread.start()
    for i in range(15):
        assert store.put_if_absent(f"f/{i}", bytes([i]) * size)
        store.write("f/again", bytes([i]) * size)
    stop.set()
    thread.join()
    assert not broken
    assert len(seen) > 3


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 bucket, over HTTP."""
    reason = "needs moto[server] and s3fs, which the dev group installs"
    pytest.importorskip("moto.server", reason=reason, exc_type=ImportError)
    pytest.importorskip("s3fs", reason=reason, exc_type=ImportError)
    with faulty_s3.serving(tmp_path_factory.mktemp("keys") / "credentials"):
        yield f"s3://{faulty_s3.BUCKET}"


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty folder on each kind of store."""
    unique = uuid.uuid4().hex
    if request.param == "s3":
        return Store(f"{request.getfixturevalue('bucket')}/{unique}")
    return Store(str(tmp_path / "store") if request.param == "local" else f"memory://{unique}/store")


def test_what_is_where(store: Store) -> None:
    sizes = {"a": 0, "b/c": 3, "b/d/e": 5, "b/d/f": 7, "g.x/h": 1}
    for name, size in sizes.items():
        store.write(name, b"x" * size)
    store.write(".hidden", b"1")
    store.write("b/.hidden", b"1")
    store.write(".secret/x", b"1")
    assert store.entries("b") == ["c", "d/e", "d/f"]
    assert [(entry.name, entry.size) for entry in store.details("b")] == [("c", 3), ("d/e", 5), ("d/f", 7)]
    assert [name for name in store.entries("") if not name.startswith(".")] == sorted(sizes)
    assert (store.folders(""), store.folders("b"), store.folders("b/d")) == (["b", "g.x"], ["d"], [])
    assert store.folders("nowhere") == store.details("nowhere") == store.entries("nowhere") == []
    assert {name: store.size(name) for name in sizes} == sizes
    for ask in (store.size, store.modified, store.open, store.read):
        for missing in ("nowhere", "b/nowhere"):
            with pytest.raises(FileNotFoundError):
                ask(missing)


def test_times_are_the_stores_own(store: Store) -> None:
    """S3 drops the fraction of a second."""
    started = time.time()
    before = store.now()
    store.write("a/b", b"1")
    after = store.now()
    assert before <= store.modified("a/b") <= after
    assert [entry.modified for entry in store.details("a")] == [store.modified("a/b")]
    assert started - 1.5 <= before <= after <= time.time() + 0.5
    assert store.entries("") == ["a/b"]
    time.sleep(1.1)
    store.write("a/b", b"2")
    assert store.modified("a/b") > after


def test_removing_again_is_no_error(store: Store) -> None:
    names = [f"a/{i}" for i in range(1003)]  # S3 takes 1,000 at once
    for name in names[::100] + names[-1:]:
        store.write(name, b"1")
    store.write("b", b"1")
    store.remove(names)
    assert (store.entries("a"), store.entries("")) == ([], ["b"])
    store.remove(names[:3])
    store.remove([])
    assert store.exists("b")


def test_streams_seek_and_are_what_arrow_reads(store: Store) -> None:
    data = random.Random(0).randbytes(3_000_000)
    store.write("a", data)
    store.write("empty", b"")
    with store.open("a") as stream:
        for seed in range(30):
            rng = random.Random(seed)
            start, size = rng.randrange(len(data)), rng.choice([1, 100, 70_000, 2_000_000])
            assert stream.seek(start) == stream.tell() == start
            assert stream.read(size) == data[start : start + size]
        assert stream.seek(-5, os.SEEK_END) == len(data) - 5
        assert (stream.read(), stream.read(3)) == (data[-5:], b"")
    with store.open("empty") as stream:
        assert stream.read() == b""
    table = pa.table({"x": range(200_000), "y": [str(i) for i in range(200_000)]})
    with store.create("t.parquet") as file:
        pq.write_table(table, file, row_group_size=10_000)
    with store.open("t.parquet") as stream:
        assert pq.ParquetFile(stream).read_row_group(7).equals(table.slice(70_000, 10_000))


ODD = [
    "sp ace",
    "é 漢 🙂",
    "#?&+%",
    "a%2Fb",
    "100%25",
    "[a]*{b}?",
    "q'\"`$(x);",
    "--x",
    "a=b",
    "~",
    "x:y::z",
    "back\\slash",
]


def test_odd_names(store: Store) -> None:
    """No name is a pattern, an escape, a query or a user's home."""
    for i, odd in enumerate(ODD):
        assert store.put_if_absent(f"{odd}/{odd}", b"%d" % i), odd
    assert store.folders("") == sorted(ODD)
    assert store.entries("") == sorted(f"{odd}/{odd}" for odd in ODD)
    assert store.read_many([f"{odd}/{odd}" for odd in ODD]) == [b"%d" % i for i in range(len(ODD))]
    for odd in ODD:
        assert not store.put_if_absent(f"{odd}/{odd}", b"other")
        assert [entry.name for entry in store.details(odd)] == [odd]
        with store.open(f"{odd}/{odd}") as stream:
            assert stream.read() == store.read(f"{odd}/{odd}")
    store.remove([f"{odd}/{odd}" for odd in ODD[::2]])
    assert store.entries("") == sorted(f"{odd}/{odd}" for odd in ODD[1::2])


OUTSIDE = ["", "/", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "a//b", "a/", ".", "./a", "a/./b"]
OUTSIDE += ["a\0b", "a?versionId=1"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_outside_is_named(store: Store, name: str) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: store.read(name), lambda: store.read_many([name]), lambda: store.open(name),
        lambda: store.exists(name), lambda: store.size(name), lambda: store.modified(name),
        lambda: store.write(name, b"1"), lambda: store.put_if_absent(name, b"1"), lambda: store.create(name),
        lambda: store.remove(["good", name]), lambda: store.url(name), lambda: store.path(name),
    ]  # fmt: skip
    if name:  # the folder itself can be listed
        calls += [lambda: store.entries(name), lambda: store.details(name), lambda: store.folders(name)]
    store.write("good", b"1")
    for call in calls:
        with pytest.raises(InputError) as refused:
            call()
        assert repr(name) in str(refused.value)
    assert store.entries("") == ["good"]


def test_a_data_file_that_is_dropped_leaves_nothing(store: Store) -> None:
    file = store.create("a/b")
    file.write(b"half")
    file.discard()
    file.discard()
    assert file.write(b"footer") == 6
    file.close()
    assert store.entries("") == []
    with store.create("a/b") as kept:
        kept.write(b"whole")
        kept.close()
        kept.discard()
    assert store.read("a/b") == b"whole"


def test_an_abandoned_unit_leaves_nothing(store: Store) -> None:
    writer = UnitWriter(store, "unit", 0, "attempt", {})
    columns = {"feature": [1], "token": [2], "activation": [1.0]}
    schema = writer.schema("activations")
    writer.write("activations", {"sae": sae_column("s", 1), **{
        name: pa.array(value, schema.field(name).type) for name, value in columns.items()}})  # fmt: skip
    writer.abandon()
    assert store.entries("") == []


def test_listing_while_objects_come_and_go(store: Store) -> None:
    """What stays is always listed, and nothing else than what was there."""
    for i in range(20):
        store.write(f"f/stay{i}", b"1")
    stop = threading.Event()

    def churn() -> None:
        writer = Store(store.uri)
        while not stop.is_set():
            writer.put_if_absent("f/comes", b"1")
            writer.write("f/g/comes", b"1")
            writer.remove(["f/comes", "f/g/comes"])
            if writer.local:
                shutil.rmtree(f"{writer.root}/f/g", ignore_errors=True)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(20):
            stay = {f"stay{i}" for i in range(20)}
            assert stay <= set(store.entries("f")) <= stay | {"comes", "g/comes"}
            assert stay <= {entry.name for entry in store.details("f")} <= stay | {"comes", "g/comes"}
    finally:
        stop.set()
        thread.join()


def test_a_disk_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> None:
        raise OSError(errno.EPERM, "not permitted")

    monkeypatch.setattr("os.link", link)
    with pytest.raises(InputError, match="hard links"):
        Store(str(tmp_path)).put_if_absent("a", b"1")
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_was_made_unheard_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an NFS server whose answer was lost: the client's retry finds its own link."""
    link = os.link

    def twice(source: str, target: str) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr("os.link", twice)
    assert Store(str(tmp_path)).put_if_absent("a", b"1")
    assert not Store(str(tmp_path)).put_if_absent("a", b"1")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_missing_things(place: str) -> None:
    store = Store(place)
    assert store.entries("nothing/here") == []
    assert not store.exists("a")
    assert store.read_many([]) == []
    with pytest.raises(FileNotFoundError):
        store.read("a")
    store.write("a", b"1")
    store.write("b/c", b"2")
    assert store.read_many(["b/c", "a"]) == [b"2", b"1"]
    store.write("a", b"3")
    assert (store.read("a"), store.exists("a"), store.entries("b")) == (b"3", True, ["c"])


@pytest.mark.parametrize("uri", ["nosuch://bucket/index", "htp:/x://y"])
def test_unknown_schemes_are_refused(uri: str) -> None:
    with pytest.raises(InputError) as refused:
        Store(uri)
    assert uri in str(refused.value)
    assert "\n" not in str(refused.value)


class NoConditionalWrite(MemoryFileSystem):
    """A filesystem that can only overwrite."""

    protocol = "overwriting"


def test_a_filesystem_without_conditional_write_is_refused() -> None:
    fsspec.register_implementation("overwriting", NoConditionalWrite, clobber=True)
    store = Store("overwriting://x/index")
    with pytest.raises(InputError, match="overwriting"):
        store.put_if_absent("a", b"1")
    assert not store.exists("a")


class Lossy(MemoryFileSystem):
    """As s3fs behaves when an answer is lost: the write is applied, its retry finds the object there."""

    protocol = "s3"
    lose = False

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if mode == "create" and self.exists(path):
            raise FileExistsError(path)
        super().pipe_file(path, value, **kwargs)
        if self.lose:
            raise FileExistsError(path)


def test_a_lost_answer_is_told_from_a_lost_race() -> None:
    store = Store(f"memory://{uuid.uuid4().hex}")
    store.fs = Lossy()
    assert store.put_if_absent("a", b"mine")
    assert not store.put_if_absent("a", b"theirs")
    store.fs.lose = True
    assert store.put_if_absent("b", b"mine"), "applied, but the answer was lost"
    assert not store.put_if_absent("b", b"theirs")
    assert store.read("b") == b"mine"


# --- what commits say of data files


def test_commits_tell_the_truth_about_files(tiny_index: Path) -> None:
    """Path, rows, bytes and checksum; and no row group holds two SAEs or is out of order."""
    files = 0
    for commit in (json.loads(f.read_text()) for f in (tiny_index / "commits").rglob("*.json")):
        for kind, record in commit["files"].items():
            data = (tiny_index / record["path"]).read_bytes()
            assert record["path"].startswith(f"data/{kind}/")
            assert record["bytes"] == len(data)
            assert record["digest"] == hashlib.blake2b(data, digest_size=16).hexdigest()
            parquet = pq.ParquetFile(tiny_index / record["path"])
            assert record["rows"] == parquet.metadata.num_rows > 0
            files += 1
            if kind not in (
                "activations",
                "document_features",
                "features",
                "top_contexts",
                "sampled_contexts",
            ):
                continue
            for group in range(parquet.metadata.num_row_groups):
                table = parquet.read_row_group(group).to_pydict()
                assert len(set(table["sae"])) == 1
                second = {"activations": "token", "document_features": "document"}.get(kind)
                order = (
                    list(zip(table["feature"], table[second], strict=True)) if second else table["feature"]
                )
                assert order == sorted(order)
    assert files > 24 * 5


def test_an_index_in_memory_is_the_same(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_index: Path
) -> None:
    """Every byte goes through the door: another filesystem, the same rows."""
    uri = f"memory://{uuid.uuid4().hex}/index"
    spec = write_spec(tmp_path, index=uri)
    assert not scan_inline(spec).failed
    assert not tiny.differences(tiny.views(tiny_index), tiny.views(uri))
    assert scan_inline(spec).items == 0
    assert not (tmp_path / "index").exists()
