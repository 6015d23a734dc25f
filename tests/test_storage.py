"""The storage door: one winner of a race, whole objects or none, and data files that are what commits say."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
import tiny
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.storage import Store
from sae_runtime.errors import InputError

RACERS = 16


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URI of an empty folder."""
    return str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}/store"


def test_of_sixteen_writers_one_wins(place: str, request: pytest.FixtureRequest) -> None:
    interval = sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(interval))
    sys.setswitchinterval(1e-6)  # threads change between any two steps
    for turn in range(20):
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
    assert Store(place).entries("commits") == sorted(f"{turn}.json" for turn in range(20))


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
