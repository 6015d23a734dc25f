"""The storage door when S3 misbehaves: s3fs over HTTP to a moto server, behind a proxy that breaks answers.

What the door then says and stores is compared with what it says and stores undisturbed.
"""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

_REASON = "needs moto[server] and s3fs, which the dev group installs"
pytest.importorskip("moto.server", reason=_REASON, exc_type=ImportError)
pytest.importorskip("s3fs", reason=_REASON, exc_type=ImportError)

# ruff: noqa: E402
import faulty_s3
from faulty_s3 import BAD, BUCKET, LOST, RESET, SLOW_DOWN, Fault, FaultyS3, Request, at_random, first

from pipelines.retries import Brake, Patience
from pipelines.s3 import PatientS3
from pipelines.storage import Store

PART = 5 << 20  # bytes: the least that S3 takes
SHORT = Patience(
    total=30.0, unproven=1.0, first=0.02, longest=0.1, connect=2.0, read=0.7, renewals=6, renewal=0.1
)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "credentials"


@pytest.fixture(scope="module")
def server(keys: Path) -> Iterator[FaultyS3]:
    with faulty_s3.serving(keys) as proxy:
        yield proxy


@pytest.fixture
def s3(server: FaultyS3, monkeypatch: pytest.MonkeyPatch, keys: Path) -> FaultyS3:
    """The proxy, without faults until the test sets a plan; this process is impatient."""
    faulty_s3.write_keys(keys, "test")
    monkeypatch.setattr(PatientS3, "patience", SHORT)
    monkeypatch.setattr(PatientS3, "default_block_size", PART)
    PatientS3.clear_instance_cache()
    PatientS3._brakes.clear()
    server.reset()
    return server


@pytest.fixture
def store(s3: FaultyS3) -> Store:
    """A folder of the test's own, whose server has answered once."""
    opened = Store(f"s3://{BUCKET}/{random.getrandbits(64):x}")
    opened.write("proof", b"1")
    s3.seen.clear()
    return opened


@pytest.mark.parametrize("fault", BAD.values(), ids=BAD)
def test_every_operation_outlasts_faults(s3: FaultyS3, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tries of each kind of request for each object fail."""
    if fault.silence:
        monkeypatch.setattr(PatientS3, "patience", replace(SHORT, read=0.2))
    store = Store(f"s3://{BUCKET}/{random.getrandbits(64):x}")
    store.write("proof", b"1")
    large = random.Random(1).randbytes(PART + PART // 2)
    s3.plan = first(1 if fault.silence or fault.status in (429, 503) else 2, fault)
    store.write("a/one", b"1" * 1000)
    assert store.put_if_absent("a/two", b"mine")
    assert not store.put_if_absent("a/two", b"theirs")
    with store.create("a/large") as stream:
        for start in range(0, len(large), 1 << 20):
            stream.write(large[start : start + (1 << 20)])
    assert store.entries("") == ["a/large", "a/one", "a/two", "proof"]
    assert [(e.name, e.size) for e in store.details("a")] == [
        ("large", len(large)),
        ("one", 1000),
        ("two", 4),
    ]
    assert store.folders("") == ["a"]
    assert store.read_many(["a/one", "a/two"]) == [b"1" * 1000, b"mine"]
    with store.open("a/large") as stream:
        assert stream.seek(PART - 5) == PART - 5
        assert stream.read(1 << 21) == large[PART - 5 : PART - 5 + (1 << 21)]
    assert (store.size("a/one"), store.exists("a/two"), store.exists("a/three")) == (1000, True, False)
    with pytest.raises(FileNotFoundError):
        store.read("a/three")
    store.remove(["a/one", "a/three"])
    assert store.entries("a") == ["large", "two"]
    assert s3.faults >= 10
    if not fault.applied:  # one whose beginning was unheard holds no bytes; a lifecycle rule ends it
        assert uploads(store) == []


def uploads(store: Store) -> list[str]:
    """Keys of the uploads under the store that were begun and not ended."""
    found = store.fs.call_s3("list_multipart_uploads", Bucket=BUCKET).get("Uploads", [])
    folder = store.root.removeprefix(f"{BUCKET}/")
    return [upload["Key"] for upload in found if upload["Key"].startswith(folder)]


# --- answers that are lost


UNHEARD = {name: fault for name, fault in BAD.items() if fault.applied and not fault.cut}


@pytest.mark.parametrize("fault", UNHEARD.values(), ids=UNHEARD)
def test_a_creator_whose_answer_was_lost_is_told_so(store: Store, s3: FaultyS3, fault: Fault) -> None:
    s3.plan = first(1, fault, "PUT")
    assert store.put_if_absent("a", b"mine")
    assert s3.count("PUT") == 2
    assert not store.put_if_absent("a", b"theirs")
    assert store.read("a") == b"mine"


def test_of_racers_whose_answers_are_lost_one_wins(store: Store, s3: FaultyS3) -> None:
    seed = random.getrandbits(32)
    print(f"seed {seed}")
    s3.plan = at_random(seed, 0.2)
    for turn in range(2):
        barrier = threading.Barrier(50)

        def race(i: int, turn: int = turn, barrier: threading.Barrier = barrier) -> tuple[bool, bytes, bytes]:
            data = f"racer {i}".encode()
            barrier.wait()
            won = store.put_if_absent(f"c/{turn}", data)
            return won, data, store.read(f"c/{turn}")

        with ThreadPoolExecutor(50) as pool:
            results = list(pool.map(race, range(50)))
        winners = [data for won, data, _ in results if won]
        assert len(winners) == 1
        assert {read for _, _, read in results} == {winners[0]}
    assert s3.faults > 0


def test_creations_that_meet_are_tried_again(store: Store, s3: FaultyS3) -> None:
    """AWS answers 409 to both; some servers answer 412 without naming the condition."""
    conflict = Fault(409, "ConditionalRequestConflict")
    s3.plan = first(3, conflict, "PUT")
    assert store.put_if_absent("a", b"mine")
    assert s3.count("PUT") == 4
    s3.plan = first(1, conflict, "PUT")
    assert not store.put_if_absent("a", b"theirs")
    s3.plan = first(1, Fault(412, "PreconditionFailed"), "PUT")
    assert not store.put_if_absent("a", b"theirs")


def in_turn(kind: str, *faults: Fault) -> Callable[[Request], Fault | None]:
    """The first requests of a kind meet these."""
    left = list(faults)
    return lambda request: left.pop(0) if request.kind == kind and left else None


NO_SUCH_UPLOAD = Fault(404, "NoSuchUpload")  # what AWS says of one that was completed or aborted


@pytest.mark.parametrize("fault", UNHEARD.values(), ids=UNHEARD)
def test_an_upload_completed_unheard_is_complete(store: Store, s3: FaultyS3, fault: Fault) -> None:
    data = random.Random(2).randbytes(2 * PART + 17)
    s3.plan = in_turn("POST uploadId", fault, RESET, NO_SUCH_UPLOAD)
    with store.create("large") as stream:
        stream.write(data)
    assert s3.count("POST uploadId") == 3
    assert store.read("large") == data


def test_an_upload_that_is_gone_is_an_error(store: Store, s3: FaultyS3) -> None:
    """As after a lifecycle rule: NoSuchUpload does not always mean that an answer was lost."""
    s3.plan = in_turn("POST uploadId", RESET, NO_SUCH_UPLOAD)
    stream = store.create("large")
    stream.write(b"x" * (PART + 1))
    with pytest.raises(FileNotFoundError):
        stream.close()
    assert not store.exists("large")


def test_a_large_object_is_created_once(store: Store, s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts, the condition is on the completion; its lost answer is told by reading back too."""
    pipe = store.fs.pipe_file
    monkeypatch.setattr(store.fs, "pipe_file", functools.partial(pipe, chunksize=PART))
    data = random.Random(3).randbytes(2 * PART)
    s3.plan = in_turn("POST uploadId", LOST, NO_SUCH_UPLOAD)
    assert store.put_if_absent("large", data)
    assert s3.count("POST uploadId") == 2
    assert not store.put_if_absent("large", data[::-1])
    assert store.read("large") == data


# --- throttling


def test_a_throttle_holds_every_thread_back(store: Store, s3: FaultyS3) -> None:
    """Threads that each backed off on their own would send some 800 requests in this time."""
    threads, until = 40, time.monotonic() + 1.5
    s3.plan = lambda request: SLOW_DOWN if time.monotonic() < until else None
    store.fs.connect()
    with ThreadPoolExecutor(threads) as pool:
        assert set(pool.map(lambda _: store.read("proof"), range(threads))) == {b"1"}
    assert s3.faults <= 3 * threads


def test_eight_threads_that_share_a_brake_ask_less_than_eight_that_do_not(
    store: Store, s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store takes eight requests in a fifth of a second and refuses the others, as S3 does."""

    def work() -> tuple[int, int]:
        """(requests refused, most of them in a second) until everybody is through."""
        taken: list[float] = []
        refused: list[float] = []
        lock = threading.Lock()

        def plan(request: Request) -> Fault | None:
            with lock:
                now = time.monotonic()
                if sum(now - 0.2 < at for at in taken) < 8:
                    taken.append(now)
                    return None
                refused.append(now)
                return SLOW_DOWN

        s3.plan = plan
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(lambda _: store.read("proof"), range(48))) == {b"1"}
        s3.plan = lambda request: None
        return len(refused), max(sum(at <= other < at + 1 for other in refused) for at in refused)

    store.fs.connect()
    shared = work()
    monkeypatch.setattr("pipelines.retries.Brakes.of", lambda self, part: Brake())
    alone = work()
    assert 2 * shared[0] < alone[0]
    assert 2 * shared[1] < alone[1]


def test_a_prefix_that_is_throttled_holds_no_other_up(store: Store, s3: FaultyS3) -> None:
    """Reads of one top folder wait, those of another in the same bucket go on at once."""
    other = Store(f"s3://{BUCKET}/other-{random.getrandbits(64):x}")
    other.write("proof", b"2")
    busy, stop = store.root.removeprefix(f"{BUCKET}/"), time.monotonic() + 1.5
    s3.plan = lambda request: SLOW_DOWN if request.key.startswith(busy) and time.monotonic() < stop else None
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(store.read, "proof") for _ in range(8)]
        while not s3.faults:
            time.sleep(0.005)
        for _ in range(5):
            assert other.read("proof") == b"2"
        assert time.monotonic() < stop
        assert not any(each.done() for each in waiting)
        assert {each.result() for each in waiting} == {b"1"}


def test_the_brake_lengthens_and_ignores_old_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("pipelines.retries.time.monotonic", lambda: clock[0])
    brake, held = Brake(), []
    for _ in range(5):
        sent = clock[0]
        for _ in range(64):
            brake.throttled(sent, SHORT)  # all that were in flight are throttled
            clock[0] += 0.0001
        held.append(brake._released - brake._set)
        clock[0] = brake._released + 1
    assert held == pytest.approx([0.02, 0.04, 0.08, 0.1, 0.1], abs=1e-6)
    for _ in range(50):
        brake.answered()
    clock[0] += 1
    brake.throttled(clock[0], SHORT)
    assert brake._released - brake._set == pytest.approx(SHORT.first)


# --- what outlasts patience


@pytest.mark.parametrize(
    "fault",
    [Fault(500, "InternalError"), RESET, Fault(silence=0.8)],
    ids=["500", "reset", "silence"],
)
def test_a_store_that_stays_away_is_an_error_that_names_the_object(
    store: Store, s3: FaultyS3, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr(PatientS3, "patience", replace(SHORT, total=1.0))
    s3.plan = lambda request: fault
    for ask in (lambda: store.read("proof"), lambda: store.put_if_absent("b", b"1")):
        start = time.monotonic()
        with pytest.raises(ConnectionError) as failed:
            ask()
        assert 0.3 < time.monotonic() - start < 8
        assert failed.value.filename.startswith(f"{store.uri}/")
        assert "(tried for 1 s)" in failed.value.strerror
        assert "run again" in failed.value.strerror
        assert "\n" not in str(failed.value)


def test_a_body_that_never_ends_well_is_an_error(
    store: Store, s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PatientS3, "retries", 3)
    s3.plan = lambda request: Fault(applied=True, cut=True) if request.kind == "GET" else None
    for read in (store.read, lambda name: store.fs.open(store.path(name)).read()):
        s3.seen.clear()
        with pytest.raises(ConnectionError) as failed:
            read("proof")
        assert s3.count("GET") == 3
        assert failed.value.filename == f"{store.uri}/proof"


def test_refusals_are_told_at_once(store: Store, s3: FaultyS3) -> None:
    s3.plan = lambda request: Fault(403, "AccessDenied")
    with pytest.raises(PermissionError):
        store.read("proof")
    with pytest.raises(PermissionError):
        store.size("proof")
    assert s3.count("GET") == 2  # the second one asks why
    assert s3.count("HEAD") == 1


def test_an_upload_that_is_dropped_leaves_nothing(store: Store, s3: FaultyS3) -> None:
    for size, name in ((10, "small"), (PART + 1, "large")):
        stream = store.create(name)
        stream.write(b"x" * size)
        assert len(uploads(store)) == (name == "large")
        stream.discard()
        assert stream.write(b"footer") == 6
        stream.close()
    del stream
    assert store.entries("") == ["proof"]
    assert uploads(store) == []


def test_dropping_never_raises(store: Store, s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.s3._ABORT_SECONDS", 0.3)
    stream = store.create("large")
    stream.write(b"x" * (PART + 1))
    s3.plan = lambda request: RESET
    start = time.monotonic()
    stream.discard()
    stream.close()
    assert time.monotonic() - start < 5
    s3.reset()
    del stream
    assert not store.exists("large")


# --- credentials that expire


def test_renewed_credentials_are_picked_up_mid_run(store: Store, s3: FaultyS3, keys: Path) -> None:
    """Also by an upload that is under way, by requests whose answer has no body, and by many threads."""
    data = random.Random(4).randbytes(2 * PART)
    s3.valid = {"test"}
    stream = store.create("large")
    stream.write(data[: PART + 1])
    s3.valid = {"renewed"}
    timer = threading.Timer(0.4, lambda: faulty_s3.write_keys(keys, "renewed"))
    timer.start()
    assert store.size("proof") == 1
    stream.write(data[PART + 1 :])
    stream.close()
    timer.join()
    assert store.read("large") == data
    assert {request.access_key for request in s3.seen} == {"test", "renewed"}
    s3.valid = {"again"}
    faulty_s3.write_keys(keys, "again")
    renewed = store.fs._renewed
    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(lambda i: store.put_if_absent(f"d/{i}", b"%d" % i), range(20)))
    assert store.fs._renewed == renewed + 1, "each thread made a session of its own"


def test_credentials_that_nobody_renews_are_one_line(
    store: Store, s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PatientS3, "patience", replace(SHORT, renewals=3))
    s3.valid = set()
    for ask in (lambda: store.read("proof"), lambda: store.size("proof"), lambda: store.entries("")):
        with pytest.raises(PermissionError, match="ExpiredToken: renew the credentials") as failed:
            ask()
        assert "\n" not in str(failed.value)
        assert failed.value.filename.startswith("s3://")


# --- a scan


def test_a_scan_of_which_a_tenth_of_the_requests_fails_has_the_rows_of_an_undisturbed_one(
    s3: FaultyS3, tiny_corpus: Path, few: list[dict[str, str]], few_index: Path,
    write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    seed = random.getrandbits(32)
    print(f"seed {seed}")
    corpus = Store(f"s3://{BUCKET}/corpus")
    for file in sorted(tiny_corpus.iterdir()):
        corpus.write(file.name, file.read_bytes())
    index = f"s3://{BUCKET}/index"
    spec = write_spec(tmp_path, corpus={"uri": f"{corpus.uri}/*.jsonl"}, index=index, saes=few)
    s3.plan = at_random(seed, 0.1)
    outcome = scan_inline(spec)
    assert (outcome.items, outcome.failed) == (24, ())
    assert s3.faults >= 20
    assert not tiny.differences(tiny.views(few_index), tiny.views(index))
