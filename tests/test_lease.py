"""The lease and the record of failures: who may scan, and what a retry cap counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from pipelines import lease
from pipelines.failures import Failures, kind_of
from pipelines.lease import HEARTBEAT, Holder, Lease, newest, running
from pipelines.registry import Unit, dump
from pipelines.scheduler import Tried
from pipelines.status import status
from pipelines.storage import Store
from sae_runtime.errors import DataError, Interrupted

HOLDER = Holder(1, 7, "far-away", 4711, "another-boot", "pid:[1]", "123", "a")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "index"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watching takes a second."""
    monkeypatch.setattr(lease, "STALE", 1.2)
    monkeypatch.setattr(lease, "EVERY", 0.1)


def said(store: Store) -> tuple[Lease, list[str]]:
    notices: list[str] = []
    return Lease(store, notices.append), notices


def held_by(store: Store, holder: Holder, counter: int = 5, term: int | None = None) -> None:
    """Somebody's lease and newest beat."""
    store.write(f"leases/{holder.term:06d}.json", dump(asdict(holder)))
    sign = lease.Beat(term or holder.term, counter, time.time() - 1e6, 2, False, {"u": 3})
    store.write(HEARTBEAT, dump(asdict(sign)))


def test_one_of_many_newcomers_wins(store: Store) -> None:
    crowd = [said(store)[0] for _ in range(20)]
    for one in crowd:
        one.look()
    won: list[Lease] = []
    lost: list[str] = []
    gate = threading.Barrier(len(crowd))

    def try_it(one: Lease) -> None:
        gate.wait()
        try:
            one.take(1)
        except Interrupted as error:
            lost.append(str(error))
        else:
            won.append(one)

    threads = [threading.Thread(target=try_it, args=(one,)) for one in crowd]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert all("another scan is running (run 1, process " in words for words in lost)
    with won[0]:
        late, _ = said(store)
        with pytest.raises(Interrupted, match=rf"run 1, process {os.getpid()} on "):
            late.look()
        assert running(store) is not None
    assert running(store) is None
    again, notices = said(store)
    with again:
        again.look()
        again.take(2)
        assert newest(store) is not None
        assert (newest(store) or HOLDER).term == 2
    assert notices == []


def test_a_holder_of_this_machine_that_was_killed_is_no_obstacle(store: Store) -> None:
    code = (
        "import os, sys; from pipelines.lease import Lease; from pipelines.storage import Store\n"
        "one = Lease(Store(sys.argv[1]), print); one.look(); one.take(3)\n"
        "print('taken', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, store.uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    one, notices = said(store)
    with pytest.raises(Interrupted, match=rf"run 3, process {process.pid} on "):
        one.look()
    assert running(store) is not None
    process.kill()
    deadline = time.monotonic() + 10
    while (held := newest(store)) is None or lease.lives_here(held):
        assert time.monotonic() < deadline
    one.look()  # it has not even been waited for
    process.wait()
    assert running(store) is None
    one.look()
    # Its process number belongs to somebody else now, who was born later.
    held = newest(store)
    assert held is not None
    assert lease.lives_here(replace(held, process=os.getpid())) is False
    assert lease.lives_here(replace(held, process=os.getpid(), namespace="pid:[1]")) is None
    with one:
        one.take(4)
    assert notices == []


def test_a_holder_elsewhere_is_watched_whatever_its_clock_says(store: Store, quick: None) -> None:
    held_by(store, HOLDER)  # its clock is eleven days behind
    stop = threading.Event()

    def live() -> None:
        counter = 5
        while not stop.wait(0.2):
            counter += 1
            held_by(store, HOLDER, counter)

    thread = threading.Thread(target=live)
    thread.start()
    one, notices = said(store)
    try:
        with pytest.raises(Interrupted, match="run 7, process 4711 on far-away"):
            one.look()
    finally:
        stop.set()
        thread.join()
    assert len(notices) == 1
    assert "watching for" in notices[0]

    began = time.monotonic()
    one.look()  # it is silent now
    assert time.monotonic() - began >= 1.2
    held_by(store, HOLDER, counter=99)  # and comes back while the newcomer plans
    with pytest.raises(Interrupted, match="far-away"):
        one.take(8)
    assert newest(store) == HOLDER
    one.look()
    with one:
        one.take(8)
        assert (newest(store) or HOLDER).term == 2


def test_a_lease_without_a_beat_is_watched_too(store: Store, quick: None) -> None:
    held_by(store, HOLDER, term=1)
    held_by(store, replace(HOLDER, term=2, attempt="b"), term=1)  # the beat is an older holder's
    one, _ = said(store)
    began = time.monotonic()
    one.look()
    assert time.monotonic() - began >= 1.2
    with one:
        one.take(1)
        assert (newest(store) or HOLDER).term == 3


def test_a_holder_that_was_taken_for_dead_stops_and_writes_no_more(store: Store, quick: None) -> None:
    one, _ = said(store)
    with one:
        one.look()
        one.take(1)
        one.check()
        store.put_if_absent("leases/000002.json", dump(asdict(replace(HOLDER, term=2))))
        store.write(HEARTBEAT, b"the other's")
        deadline = time.monotonic() + 10
        while not one.lost:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(Interrupted, match=r"taken for dead .*run 7, process 4711 on far-away"):
            one.check()
    # A beat that was on its way when the lease was lost may have come after the other's, none later.
    after = store.read(HEARTBEAT)
    time.sleep(0.3)
    assert store.read(HEARTBEAT) == after
    assert b'"ended": true' not in after


def test_the_beat_goes_on_by_itself_and_says_what_is_in_flight(store: Store, quick: None) -> None:
    one, _ = said(store)
    with one:
        one.look()
        one.take(1)
        one.note({"abc": 12}, 3)
        first, seen = lease.beat(store), set()
        deadline = time.monotonic() + 10
        while len(seen) < 3:
            assert time.monotonic() < deadline
            sign = lease.beat(store)
            assert sign is not None
            if sign.units:
                seen.add(sign.counter)
                assert (dict(sign.units), sign.workers) == ({"abc": 12}, 3)
            time.sleep(0.02)
        assert first is not None
        assert min(seen) >= first.counter
    last = lease.beat(store)
    assert last is not None
    assert last.ended
    assert not last.units


def test_a_storage_that_fails_for_a_while_ends_nothing(
    store: Store, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, notices = said(store)
    one.look()
    one.take(1)
    with monkeypatch.context() as broken:

        def refuse(*_: Any) -> None:
            raise ConnectionError("storage is away")

        broken.setattr(store, "write", refuse)
        time.sleep(0.4)
    before = lease.beat(store)
    time.sleep(0.4)
    assert lease.beat(store) != before
    monkeypatch.setattr(store, "write", refuse)
    with one:
        pass
    assert notices == ["note: the lease could not be given back, the next scan waits: storage is away"]


def test_damaged_notes_are_named(store: Store) -> None:
    store.write(HEARTBEAT, b"{")
    with pytest.raises(DataError, match=r"heartbeat.json: damaged"):
        said(store)[0].look()


def test_a_scan_of_an_index_in_use_stops_with_75_and_a_finished_one_leaves_no_trace(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_corpus: Path
) -> None:
    spec = write_spec(tmp_path, corpus={"uri": f"{tiny_corpus}/part_0[0-2].jsonl"})
    seen: list[str | None] = []
    outcome = scan_inline(spec, observe=lambda event: seen.append(status(str(tmp_path / "index")).scan))
    assert outcome.items == 3
    assert f"run 1, process {os.getpid()} on " in str(seen[-1])
    store = Store(str(tmp_path / "index"))
    assert status(store.uri).scan is None
    leases = store.entries("leases")
    assert scan_inline(spec).items == 0
    assert store.entries("leases") == leases == ["000001.json"]
    one, _ = said(store)
    one.look()
    with one:
        one.take(5)
        assert status(store.uri).state == "running"
        with pytest.raises(Interrupted, match="another scan is running") as error:
            scan_inline(spec)
        assert error.value.exit_code == 75


def test_a_scan_that_loses_its_lease_stops_and_another_goes_on(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_index: Path,
    quick: None,
) -> None:  # fmt: skip
    spec, index = write_spec(tmp_path), Store(str(tmp_path / "index"))

    def rob(event: Any) -> None:
        if hasattr(event, "commit"):
            index.put_if_absent("leases/000002.json", dump(asdict(replace(HOLDER, term=2))))
            time.sleep(0.25)

    with pytest.raises(Interrupted, match="taken for dead"):
        scan_inline(spec, observe=rob)
    assert not scan_inline(spec).failed
    views = tiny.views(tmp_path / "index")
    assert not tiny.differences(tiny.views(tiny_index), views)


# --- failures on record


def unit(name: str = "ab12") -> Unit:
    return Unit(name, 0, "c", "a.jsonl", "d", "s", 0, 3, 10)


def test_failures_are_counted_from_one_listing_and_a_mark_closes_the_account(store: Store) -> None:
    record = Failures(store)
    for kind in ("infra", "task", "infra", "timeout", "memory"):
        record.add(unit(), 0, kind, f"{kind}!", "", "here", final=False)
    record.add(unit(), 1, "task", "other group", "", "here", final=True)
    later = Failures(store)
    wanted = {("ab12", 0): Tried(infra=2, task=1, timeout=1, memory=1), ("ab12", 1): Tried(task=1)}
    assert later.tried() == record.tried() == wanted
    assert [(f.kind, f.error, f.rows) for f in later.last({"ab12"}) if f.group == 0] == [
        ("memory", "memory!", (0, 3))
    ]
    later.close(unit(), 0, "given up", "here")
    assert Failures(store).tried() == {("ab12", 1): Tried(task=1)}
    later.add(unit(), 0, "task", "anew", "", "here", final=False)
    assert Failures(store).tried()["ab12", 0] == Tried(task=1)
    assert Failures(store).last({"cd34"}) == []
    store.write("failures/odd.json", b"{}")
    with pytest.raises(DataError, match=r"failures/odd.json: not the name of a failure"):
        Failures(store)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("x"), "task"),
        (RuntimeError("shapes do not fit"), "task"),
        (FileNotFoundError(2, "gone"), "task"),
        (ConnectionError("reset"), "infra"),
        (TimeoutError(), "infra"),
        (OSError(28, "No space left on device"), "infra"),
        (OSError(12, "Cannot allocate memory"), "memory"),
        (MemoryError(), "memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "memory"),
    ],
)
def test_what_an_exception_counts_as(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind


def failing(monkeypatch: pytest.MonkeyPatch, plan: Callable[[str, int], Exception | None]) -> list[str]:
    """Scans whose n-th attempt at a file raises what `plan(path, n)` gives. Returns the paths tried."""
    from pipelines.unit import Scanner

    tried: list[str] = []
    scan = Scanner.scan

    def broken(self: Any, work: Any) -> Any:
        tried.append(work.unit.path)
        error = plan(work.unit.path, tried.count(work.unit.path))
        if error is not None:
            raise error
        return scan(self, work)

    monkeypatch.setattr(Scanner, "scan", broken)
    return tried


def test_a_driver_that_is_killed_does_not_reset_the_counts(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    spec = write_spec(tmp_path, corpus={"uri": f"{tiny_corpus}/part_0[0-3].jsonl"})
    tried = failing(monkeypatch, lambda path, n: ValueError("odd") if path == "part_01.jsonl" else None)

    def killed(event: Any) -> None:
        if hasattr(event, "kind") and tried.count("part_01.jsonl") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan_inline(spec, observe=killed)
    assert tried == ["part_00.jsonl", "part_01.jsonl", "part_01.jsonl"]
    found = status(str(tmp_path / "index"))
    assert (found.committed, found.failed, found.pending) == (1, 0, 3)  # not given up on

    outcome = scan_inline(spec)
    assert tried[3:].count("part_01.jsonl") == 1  # the third of three
    assert [(f.work.unit.path, f.error) for f in outcome.failed] == [
        ("part_01.jsonl", "ValueError: odd (3 attempts)")
    ]
    found = status(str(tmp_path / "index"))
    assert (found.committed, found.failed, found.pending) == (3, 1, 0)
    assert found.errors == ("part_01.jsonl: ValueError: odd",)

    del tried[:]
    assert len(scan_inline(spec).failed) == 1  # reported before, so it is tried anew
    assert tried == ["part_01.jsonl"] * 3
    monkeypatch.undo()
    assert not scan_inline(spec).failed
    assert status(str(tmp_path / "index")).state == "complete"


def test_storage_that_fails_is_waited_for_and_nobody_is_blamed(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from pipelines import scheduler

    monkeypatch.setattr(scheduler.Policy, "__init__", _with(scheduler.Policy, backoff=0.02, rest_most=0.02))
    spec = write_spec(tmp_path, corpus={"uri": f"{tiny_corpus}/part_0[0-2].jsonl"})
    tried = failing(monkeypatch, lambda path, n: ConnectionError("reset") if n < 6 else None)
    assert not scan_inline(spec).failed
    assert len(tried) == 18
    monkeypatch.undo()
    calm = write_spec(tmp_path / "calm", corpus={"uri": f"{tiny_corpus}/part_0[0-2].jsonl"})
    assert not scan_inline(calm).failed
    assert not tiny.differences(tiny.content(tmp_path / "calm" / "index"), tiny.content(tmp_path / "index"))


def _with(policy: type, **defaults: Any) -> Callable[..., None]:
    made = policy.__init__

    def init(self: Any, **given: Any) -> None:
        made(self, **{**defaults, **given})

    return init


def test_out_of_memory_stops_the_scan_and_never_changes_a_batch(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    spec = write_spec(tmp_path, corpus={"uri": f"{tiny_corpus}/part_0[0-2].jsonl"})
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    tried = failing(monkeypatch, lambda path, n: error if path == "part_01.jsonl" else None)
    with pytest.raises(Interrupted, match=r"part_01.jsonl rows 0 to .*--workers.*committed units stay"):
        scan_inline(spec)
    assert tried == ["part_00.jsonl", "part_01.jsonl"]
    (name,) = [f for f in (tmp_path / "index" / "failures").iterdir() if ".memory." in f.name]
    assert json.loads(name.read_text())["host"]
    monkeypatch.undo()
    assert not scan_inline(spec).failed
    assert status(str(tmp_path / "index")).state == "complete"
