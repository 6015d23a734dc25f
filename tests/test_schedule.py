"""Schedules: due times over changes of the clocks, each served once, growing folders, what runs changed."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import cluster
import jsonschema
import numpy as np
import pytest
import tiny
import yaml
from cronsim import CronSim
from forks import fork
from kuberay import SCHEMAS
from test_resume import ROOT

import queries
from jobs import cli
from jobs.changes import STRONGEST
from jobs.rayjobs import Jobs
from jobs.specfile import load_spec
from pipelines import due, gc
from pipelines.lease import Lease, this_process
from pipelines.schedules import last_due, next_due
from pipelines.storage import Store
from queries.changes import COLUMNS, changes
from queries.diff import diff
from sae_runtime.errors import DataError, InputError, Interrupted

UTC = timezone.utc
DAILY = "0 3 * * *"


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


# --- cron lines and zones


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("61 * * * *", "schedule: '61 * * * *': wrong minute; the fields are minute, hour"),
        ("0 24 * * *", "schedule: '0 24 * * *': wrong hour;"),
        ("0 0 32 * *", "schedule: '0 0 32 * *': wrong day of month;"),
        ("0 0 * * MO", "schedule: '0 0 * * MO': wrong day of week;"),
        ("0 0 31 2 *", "schedule: '0 0 31 2 *': there is no such date"),
        ("0 0 31 4,6 *", "schedule: '0 0 31 4,6 *': there is no such date"),
        ("@daily", "schedule: '@daily': a cron line has five fields"),
        ("0 0 3 * * *", "this has 6"),
        (5, 'schedule: a cron line such as "0 3 * * *", or a mapping'),
        ({"cron": "0 3 * *"}, "schedule.cron: '0 3 * *': a cron line has five fields"),
        ({"cron": DAILY, "timezone": "Mars/Base"}, "schedule.timezone: 'Mars/Base': no such time zone;"),
        ({"cron": DAILY, "timezone": "Europe"}, "schedule.timezone: 'Europe': no such time zone;"),
        ({"cron": DAILY, "timezone": "../UTC"}, "schedule.timezone: '../UTC': no such time zone;"),
        ({"cron": DAILY, "zone": "UTC"}, "schedule.zone: unknown key; did you mean 'timezone'?"),
        ({"timezone": "UTC"}, "schedule.cron: this key is missing"),
    ],
)
def test_a_schedule_that_is_none_is_an_error_that_names_the_key(
    tmp_path: Path, write_spec: Callable[..., Path], schedule: Any, words: str
) -> None:
    spec = write_spec(tmp_path, schedule=schedule)
    with pytest.raises(InputError, match=re.escape(words)) as refused:
        load_spec(str(spec))
    assert "\n" not in str(refused.value)


def test_a_line_that_yaml_takes_for_something_else_is_told_so(
    tmp_path: Path, write_spec: Callable[..., Path]
) -> None:
    spec = write_spec(tmp_path)
    spec.write_text(spec.read_text() + "schedule: */5 * * * *\n")
    with pytest.raises(InputError, match="must stand in quotes"):
        load_spec(str(spec))


def test_a_bare_line_is_in_utc(tmp_path: Path, write_spec: Callable[..., Path]) -> None:
    spec, _ = load_spec(str(write_spec(tmp_path, schedule="0  3 * * *")))
    assert spec.schedule is not None
    assert spec.schedule.model_dump() == {"cron": DAILY, "timezone": "UTC"}


def by_the_minute(cron: str, zone: str, start: datetime, stop: datetime) -> list[datetime]:
    """Due times in [start, stop), by asking of every minute what the clocks show then."""
    minute, hour, *_ = cron.split()
    fields, clocks = CronSim(cron, datetime(2000, 1, 1)), ZoneInfo(zone)

    def meant(shown: datetime) -> bool:
        fits = shown.minute in fields.minutes and shown.hour in fields.hours
        return fits and shown.month in fields.months and fields.match_day(shown.date())

    found, now = [], start
    while now < stop:
        shown = now.astimezone(clocks)
        before = (now - timedelta(minutes=1)).astimezone(clocks).replace(tzinfo=None)
        plain = shown.replace(tzinfo=None, fold=0)
        if minute.startswith("*") or hour.startswith("*"):
            is_due = meant(plain)  # by the time that passes
        else:  # once a day that has it, and at once where the clocks have left it out
            left_out = [
                before + timedelta(minutes=n) for n in range(1, (plain - before) // timedelta(minutes=1))
            ]
            is_due = (meant(plain) and not shown.fold) or any(map(meant, left_out))
        if is_due:
            found.append(now)
        now += timedelta(minutes=1)
    return found


@pytest.mark.parametrize(
    ("zone", "day"),
    [
        ("Europe/Berlin", "2026-03-29"),
        ("Europe/Berlin", "2026-10-25"),
        ("America/New_York", "2026-11-01"),
        ("America/Havana", "2026-03-08"),  # at midnight
        ("UTC", "2028-02-29"),
    ],
)
def test_due_times_over_changes_of_the_clocks(zone: str, day: str) -> None:
    start = at(day) - timedelta(hours=12)
    stop = start + timedelta(hours=36)
    for cron in ("30 2 * * *", "0,30 1-3 * * *", "0 * * * *", "*/20 2 * * *", "0 0 * * *", "30 2 29 * SUN"):
        want = by_the_minute(cron, zone, start, stop)
        forward, now = [], start - timedelta(minutes=1)
        while (found := next_due(cron, zone, now)) is not None and found < stop:
            forward.append(found)
            now = found
        assert forward == want, cron
        moments = [start + timedelta(minutes=7 * n) for n in range(36 * 60 // 7)]
        for moment in moments:
            latest = last_due(cron, zone, moment)
            assert latest is not None
            if want and moment >= want[0]:
                assert latest == max(each for each in want if each <= moment), (cron, moment)


# --- the command


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def schedule(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Done]]:
    """Runs `corpuscope schedule …` in this process; `run` scans inline, unless it is told otherwise."""

    def command(*args: object) -> Done:
        line = [str(arg) for arg in args]
        if line[0] == "run" and "--address" not in line:
            line += ["--executor", "inline"]
        monkeypatch.setattr(sys, "argv", ["corpuscope", "schedule", *line])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Done(int(str(ended.value.code)), captured.out, captured.err)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield command
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.fixture
def nightly(tmp_path: Path, write_spec: Callable[..., Path], tiny_corpus: Path, few: Any) -> Path:
    """specs/nightly.yaml, due at 2:30 in Berlin, over one file."""
    (tmp_path / "corpus").mkdir()
    shutil.copy2(tiny_corpus / "part_04.jsonl", tmp_path / "corpus")
    return scheduled(tmp_path, write_spec, {"cron": "30 2 * * *", "timezone": "Europe/Berlin"}, saes=few)


def scheduled(folder: Path, write_spec: Callable[..., Path], schedule: Any, **overrides: Any) -> Path:
    settings = {
        "corpus": {"uri": "../corpus/*.jsonl"},
        "index": "../index",
        "schedule": schedule,
        **overrides,
    }
    spec = write_spec(folder / "specs", **settings)
    return spec.rename(spec.with_name("nightly.yaml"))


def listed(schedule: Callable[..., Done], folder: Path, now: str) -> list[dict[str, Any]]:
    done = schedule("list", folder, "--now", now, "--format", "json")
    return list(json.loads(done.out))


def ids(index: Path) -> dict[int, set[str]]:
    """Documents by the run that scanned them."""
    found: dict[int, set[str]] = {}
    for run, id in queries.connect(str(index)).execute("SELECT run, id FROM documents").fetchall():
        found.setdefault(run, set()).add(id)
    return found


def rows(prefix: str, pool: list[str], n: int, words: tuple[int, int]) -> list[dict[str, Any]]:
    rng = np.random.default_rng(len(prefix) + n)
    texts = [" ".join(rng.choice(pool, int(rng.integers(*words)))) for _ in range(n)]
    return [
        {"id": f"{prefix}{i}", "text": text, "lang": "en", "score": 0.5, "even": True}
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def suites(tiny_suites: Path) -> list[dict[str, str]]:
    return [
        {"uri": str(tiny_suites / "tiny-res")},
        {"uri": str(tiny_suites / "tiny-att"), "select": "layer_1/*", "keep": "none"},
    ]


def test_a_growing_folder(
    tmp_path: Path, write_spec: Callable[..., Path], schedule: Callable[..., Done], suites: Any
) -> None:
    """Each due time scans the files that are new, whatever is missed is made up for once, none is no run."""
    spec = scheduled(tmp_path, write_spec, DAILY, saes=suites)
    first, words = rows("e", ["日本語"], 45, (2, 6)), rows("w", tiny.WORDS[2:12], 45, (8, 20))
    more = rows("more", tiny.WORDS, 3, (5, 9))
    (tmp_path / "corpus").mkdir()
    index, specs = tmp_path / "index", spec.parent
    days = [("first", first, "2026-11-01T05:00:00Z"), ("words", words, "2026-11-02T03:00:00Z"),
            ("more", more, "2026-11-06T23:59:00Z")]  # fmt: skip
    for number, (name, documents, now) in enumerate(days, 1):
        tiny.write_rows(tmp_path / "corpus" / f"{name}.jsonl", documents)
        assert listed(schedule, specs, now)[0]["state"] == "due"
        done = schedule("run", specs, "--now", now)
        assert done.code == 0, done.err
        assert ids(index)[number] == {row["id"] for row in documents}
        assert len(ids(index)) == number
        again = schedule("run", specs, "--now", now)
        assert (again.code, again.out, again.err.count("\n")) == (0, "", 1)
        assert "not due; next 2026-11-0" in again.err
    assert "note: of 1 SAE no document rows were kept" in done.err

    store = Store(str(index))
    before = store.entries("plans")
    done = schedule("run", specs, "--now", "2026-11-07T03:00:00Z", "--quiet")
    assert done.code == 0
    assert "nothing to scan" in done.err
    assert store.entries("plans") == before
    quiet = schedule("run", specs, "--now", "2026-11-07T04:00:00Z", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    [row] = listed(schedule, specs, "2026-11-07T04:00:00Z")
    assert (row["state"], row["last_exit"]) == ("waiting", 0)
    assert (row["last_due"], row["next_due"]) == ("2026-11-07T03:00:00+00:00", "2026-11-08T03:00:00+00:00")
    served = [each.day for _, each, _ in due.attempts(store)]
    assert served == [1, 2, 6, 7]  # of the five between only the last

    con = queries.connect(str(index))
    fired = fired_by_run(con)
    for run in (2, 3):
        told = json.loads(store.read(f"runs/{run:06d}/changes.json"))
        new = {key for key, runs in fired.items() if runs.get(run)}
        old = {key for key, runs in fired.items() if any(each < run for each in runs)}
        tested = diff(con, f"run = {run}", f"run < {run}", list(told["saes"])).table.to_pylist()
        sure = {(row["sae"], row["feature"]) for row in tested if row["q"] <= 0.05}
        want = {"appeared": new - old, "died": sure - new, "drifted": sure & new & old}
        if run == 2:
            assert all(want.values()), {change: len(keys) for change, keys in want.items()}
        for change, keys in want.items():
            assert sum(sae[change] for sae in told["saes"].values()) == len(keys)
            listed_ = {(row["sae"], row["feature"]) for row in told["strongest"][change]}
            assert listed_ <= keys
            assert len(listed_) == min(len(keys), STRONGEST)
            for row in told["strongest"][change]:
                runs = fired[row["sae"], row["feature"]]
                assert row["documents"] == runs.get(run, 0)
                assert row["earlier_documents"] == sum(n for each, n in runs.items() if each < run)
        assert told["documents"] == [0, 45, 45, 3][run]
        assert told["earlier_documents"] == [0, 0, 45, 90][run]
        assert [name.split("/")[0] for name in told["not_kept"]] == ["tiny-att"]
        assert all(name.startswith("tiny-res/") for name in told["saes"])
        # The same asked of the index later, whatever was scanned since.
        assert {change: found.total(change) for change in want for found in [changes(con, run)]} == {
            change: len(keys) for change, keys in want.items()
        }


def fired_by_run(con: Any) -> dict[tuple[str, int], dict[int, int]]:
    """Documents in which a feature is active by run, from the rows of tokens."""
    found: dict[tuple[str, int], dict[int, set[int]]] = {}
    runs = dict(con.execute("SELECT document, run FROM documents").fetchall())
    of = dict(con.execute("SELECT context, document FROM contexts").fetchall())
    rows = con.execute("SELECT sae, feature, context FROM activations WHERE sae LIKE 'tiny-res%'").fetchall()
    for sae, feature, context in rows:
        document = of[context]
        found.setdefault((sae, feature), {}).setdefault(runs[document], set()).add(document)
    return {key: {run: len(each) for run, each in by_run.items()} for key, by_run in found.items()}


def test_changes_that_cannot_be_told(tiny_index: Path, few_index: Path) -> None:
    con = queries.connect(str(few_index))
    first = changes(con, 1)
    assert first.earlier_documents == 0
    assert first.table.column_names == list(COLUMNS)
    assert not first.table.num_rows
    with pytest.raises(InputError, match="run 2: the index has no documents of it"):
        changes(con, 2)


@pytest.mark.parametrize(
    ("night", "times"),
    [("2026-03-29", ["2026-03-29T01:00:00"]), ("2026-10-25", ["2026-10-25T00:30:00"])],
    ids=["half past two is left out", "half past two comes twice"],
)
def test_a_night_when_the_clocks_change(
    nightly: Path, schedule: Callable[..., Done], night: str, times: list[str]
) -> None:
    """A spec that is due at 2:30 runs once, when looked at every half hour, whatever the clocks do."""
    store = Store(str(nightly.parent.parent / "index"))
    began = at(night) - timedelta(hours=2)
    schedule("run", nightly.parent, "--now", began.isoformat())  # of the day before
    before = set(due.attempts(store))
    scanned = []
    for half_hours in range(12):
        now = began + timedelta(minutes=30 * half_hours)
        done = schedule("run", nightly.parent, "--now", now.isoformat(), "--quiet")
        assert done.code == 0, done.err
        scanned += [now] if "nothing to scan" in done.err else []
    assert [each for _, each, _ in sorted(set(due.attempts(store)) - before)] == [at(time) for time in times]
    assert scanned == [at(time) for time in times]


def test_two_in_one_due_minute_scan_once(tmp_path: Path, nightly: Path) -> None:
    line = ["schedule", "run", str(nightly.parent), "--executor", "inline", "--now", "2026-11-02T01:30:00Z"]
    both = [fork(tmp_path / f"logs-{n}", [line], 32) for n in range(2)]
    assert [each.wait() for each in both] == [0, 0]
    logs = sorted((each.log.read_text() for each in both), key=len)
    assert "due since" not in logs[0]
    assert re.search(r"is at it|has just begun it|not due", logs[0])
    assert logs[1].count("due since") == 1
    store = Store(str(tmp_path / "index"))
    assert [(name, number) for name, _, number in due.attempts(store)] == [("nightly", 1)]
    assert store.entries("leases") == ["000001.json"]


def test_an_attempt_that_died_is_taken_up(
    tmp_path: Path, nightly: Path, tiny_corpus: Path, schedule: Callable[..., Done]
) -> None:
    for number in (12, 13):
        shutil.copy2(tiny_corpus / f"part_{number}.jsonl", tmp_path / "corpus")
    now = "2026-11-02T08:00:00Z"
    line = ["schedule", "run", str(nightly.parent), "--executor", "inline", "--now", now]
    died = fork(tmp_path / "logs", [line], 32, "after-commit:2")
    assert died.wait() == 137
    store = Store(str(tmp_path / "index"))
    first = {name: store.read(f"commits/{name}") for name in store.entries("commits")}
    assert len(first) == 2
    [row] = listed(schedule, nightly.parent, now)
    assert (row["state"], row["last_exit"]) == ("due", None)
    assert row["note"].startswith("attempt 1, process ")
    assert row["note"].endswith("did not end")

    done = schedule("run", nightly.parent, "--now", now)
    assert done.code == 0
    assert "due since 2026-11-02 01:30 UTC, attempt 2" in done.err
    after = {name: store.read(f"commits/{name}") for name in store.entries("commits")}
    assert len(after) == 3
    assert first.items() <= after.items()
    assert [number for _, _, number in due.attempts(store)] == [1, 2]
    assert set(ids(tmp_path / "index")) == {1}
    assert listed(schedule, nightly.parent, now)[0]["state"] == "waiting"
    assert "not due" in schedule("run", nightly.parent, "--now", now).err


def test_who_is_at_it(tmp_path: Path) -> None:
    """Of this machine's processes it is known; of others after a while, by the heartbeat of their scan."""
    store, wanted = Store(str(tmp_path)), at("2026-11-02T01:30:00")
    now = datetime.now(UTC)
    attempt = due.begin(store, "mine", wanted, 1)
    assert attempt is not None
    assert due.begin(store, "mine", wanted, 1) is None
    stands = due.standing(store, "mine", wanted, now)
    assert (stands.state, stands.unsure) == ("running", 0)

    def elsewhere(name: str, seconds: float) -> None:
        there = replace(this_process(), boot="another", host="there")
        record = {
            "due": wanted.isoformat(),
            "number": 1,
            "time": now.timestamp() - seconds,
            "by": asdict(there),
        }
        assert store.put_if_absent(
            f"schedules/{name}/20261102T013000Z.001.began.json", json.dumps(record).encode()
        )

    elsewhere("young", 10)
    stands = due.standing(store, "young", wanted, now)
    assert stands.state == "running"
    assert due.PATIENCE - 20 < stands.unsure < due.PATIENCE
    elsewhere("old", due.PATIENCE + 10)
    stands = due.standing(store, "old", wanted, now)
    assert (stands.state, stands.next_number) == ("due", 2)
    lease = {**asdict(replace(this_process(), boot="another", host="there")), "term": 1, "run": 1}
    beat = {"term": 1, "counter": 1, "time": now.timestamp(), "workers": 1, "ended": False, "units": {}}
    store.write("leases/000001.json", json.dumps(lease).encode())
    store.write("heartbeat.json", json.dumps(beat).encode())
    stands = due.standing(store, "old", wanted, now)
    assert (stands.state, stands.unsure) == ("running", 0)


def test_another_machines_attempt_is_waited_for_and_taken_up(
    nightly: Path, schedule: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, there = (
        Store(str(nightly.parent.parent / "index")),
        replace(this_process(), boot="b", host="there"),
    )
    monkeypatch.setattr("pipelines.due.this_process", lambda: there)
    assert due.begin(store, "nightly", at("2026-11-02T01:30:00"), 1)
    monkeypatch.undo()
    monkeypatch.setattr(due, "PATIENCE", 0.5)
    done = schedule("run", nightly, "--now", "2026-11-02T01:31:00Z")
    assert done.code == 0
    assert "attempt 2" in done.err
    assert [number for _, _, number in due.attempts(store)] == [1, 2]


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (KeyboardInterrupt(), 75, "stopped; run the same"),
        (RuntimeError("a defect"), 1, "RuntimeError: a defect"),
    ],
)
def test_a_scan_that_is_stopped_or_breaks_is_recorded_and_tried_again(
    nightly: Path,
    schedule: Callable[..., Done],
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    code: int,
    words: str,
) -> None:
    def scan(*_: object) -> None:
        raise raised

    monkeypatch.setattr("pipelines.scan.run_scan", scan)
    done = schedule("run", nightly, "--now", "2026-11-02T01:31:00Z")
    assert done.code == code
    assert words in done.err
    monkeypatch.undo()
    [row] = listed(schedule, nightly, "2026-11-02T01:31:00Z")
    assert (row["state"], row["last_exit"]) == ("due", code)
    done = schedule("run", nightly, "--now", "2026-11-02T01:31:00Z")
    assert (done.code, "attempt 2" in done.err) == (0, True)


def test_failures_are_tried_again_with_pauses(tmp_path: Path) -> None:
    store, wanted = Store(str(tmp_path)), at("2026-11-02T01:30:00")

    def fail(number: int, code: int) -> datetime:
        attempt = due.begin(store, "x", wanted, number)
        assert attempt is not None
        due.end(store, "x", attempt, code, None, None)
        return datetime.now(UTC)

    ended = fail(1, 1)
    assert due.standing(store, "x", wanted, ended).state == "due"
    ended = fail(2, Interrupted.exit_code)
    assert due.standing(store, "x", wanted, ended).state == "due"
    for number, pause in ((3, 300), (4, 600), (5, 1200)):
        ended = fail(number, 2)
        assert due.standing(store, "x", wanted, ended + timedelta(seconds=pause - 5)).state == "failed"
        stands = due.standing(store, "x", wanted, ended + timedelta(seconds=pause))
        assert (stands.state, stands.next_number) == ("due", number + 1)
    later = wanted + timedelta(days=1)
    stands = due.standing(store, "x", later, ended)
    assert (stands.state, stands.next_number) == ("due", 1)
    assert due.standing(store, "x", wanted - timedelta(days=1), ended).state == "waiting"


def test_one_specs_trouble_is_not_the_others(
    tmp_path: Path, nightly: Path, schedule: Callable[..., Done]
) -> None:
    """A wrong spec, a corpus without files, an index that is being scanned; the worst exit code wins."""
    folder, now = nightly.parent, "2026-11-02T08:00:00Z"
    text = nightly.read_text()
    (folder / "a-wrong.yaml").write_text(text.replace("30 2 * * *", "30 2 * *"))
    (folder / "b-empty.yaml").write_text(
        text.replace("../corpus/", "../none/").replace("../index", "../empty")
    )
    (folder / "c-busy.yaml").write_text(text.replace("../index", "../busy"))
    (folder / "d-never.yaml").write_text(text[: text.index("schedule:")])
    (folder / ".hidden.yaml").write_text("no spec")
    (folder / "notes.txt").write_text("no spec either")
    states = {row["spec"]: row["state"] for row in listed(schedule, folder, now)}
    assert states == {"a-wrong.yaml": "error", "b-empty.yaml": "due", "c-busy.yaml": "due",
                      "d-never.yaml": "never", "nightly.yaml": "due"}  # fmt: skip
    table = schedule("list", folder, "--now", now)
    assert table.code == 2
    heading, *lines = table.out.splitlines()
    assert heading.split() == ["spec", "state", "cron", "due"], "what no row has is left out"
    assert lines[-1].startswith("a-wrong.yaml: schedule.cron: "), "the folder is not repeated"
    assert max(map(len, table.out.splitlines()[:-1])) <= 80
    busy = Store(str(tmp_path / "busy"))
    with Lease(busy, print) as lease:
        lease.look()
        lease.take(1)
        done = schedule("run", folder, "--now", now)
    assert done.code == 2
    assert done.err.count("error: ") == 2
    assert "a-wrong.yaml: schedule.cron: '30 2 * *'" in done.err
    assert "corpus.uri: no file matches" in done.err
    assert re.search(r"c-busy: due; another scan of \S+busy is running \(run 1, process \d+ on ", done.err)
    assert len(ids(tmp_path / "index")[1]) > 0
    rows = {row["spec"]: row for row in listed(schedule, folder, now)}
    assert {name: (row["state"], row["last_exit"]) for name, row in rows.items()} == {
        "a-wrong.yaml": ("error", None),
        "b-empty.yaml": ("due", 2),
        "c-busy.yaml": ("due", None),
        "d-never.yaml": ("never", None),
        "nightly.yaml": ("waiting", 0),
    }
    for name in ("a-wrong", "b-empty"):
        (folder / f"{name}.yaml").unlink()
    assert schedule("run", folder, "--now", now).code == 0
    assert len(ids(tmp_path / "busy")[1]) == len(ids(tmp_path / "index")[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--now", "yesterday"), "'yesterday' is no time such as"),
        (("--now", "2026-11-02T08:00"), "says no time zone"),
        (("--shared",), "--shared: is for submitted scans"),
        (("--name", "x"), "--name x: is of one spec"),
        (("--workers", "3"), "--executor inline: runs in this process alone"),
        (("--address", "auto", "--workers", "-1"), "--workers"),
        (("--address", "http://127.0.0.1:1", "--workers", "many"), "'many' is neither a number"),
        (("--address", "http://127.0.0.1:1", "--executor", "ray"), "--executor ray: is for scans here"),
    ],
)
def test_wrong_options_are_told_before_anything_begins(
    nightly: Path, schedule: Callable[..., Done], options: tuple[str, ...], words: str
) -> None:
    done = schedule("run", nightly.parent, *options)
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert done.err.count("\n") == 1
    assert not (nightly.parent.parent / "index").exists()


def test_a_folder_without_specs(tmp_path: Path, schedule: Callable[..., Done]) -> None:
    for folder, words in ((tmp_path / "gone", "there is no such folder"), (tmp_path, "there are no specs")):
        for command in (("list",), ("run",), ("export", "--format", "crontab")):
            done = schedule(*command, folder)
            assert (done.code, done.out) == (2, "")
            assert words in done.err


def test_due_specs_are_submitted_once(
    nightly: Path, schedule: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def submit(spec: str, address: str, **options: Any) -> str:
        calls.append({"spec": spec, "address": address, **options})
        if len(calls) == 1:
            raise Interrupted("the cluster does not answer")
        return "scan-1-a1"

    monkeypatch.setattr("jobs.submit.submit_scan", submit)
    options = (
        "--now",
        "2026-11-02T08:00:00Z",
        "--address",
        "http://127.0.0.1:8265",
        "--shared",
        "--workers",
        "4",
    )
    assert schedule("run", nightly.parent, *options).code == 75
    done = schedule("run", nightly.parent, *options)
    assert (done.code, done.out) == (0, "scan-1-a1\n")
    assert schedule("run", nightly.parent, *options).code == 0
    assert len(calls) == 2
    assert calls[1]["spec"] == str(nightly)
    assert (calls[1]["shared"], calls[1]["workers"]) == (True, "4")
    [row] = listed(schedule, nightly.parent, "2026-11-02T08:00:00Z")
    assert (row["state"], row["note"]) == ("waiting", "submitted as scan-1-a1")


def test_records_are_checked_and_collected(tmp_path: Path, few_index: Path) -> None:
    from queries.verify import verify

    shutil.copytree(few_index, tmp_path / "index")
    store = Store(str(tmp_path / "index"))
    for day in range(due.KEPT + 3):
        attempt = due.begin(store, "nightly", at("2026-01-01") + timedelta(days=day), 1)
        assert attempt is not None
        due.end(store, "nightly", attempt, 0, 1, None)
    store.write("runs/000001/changes.json", b'{"run": 1}')
    assert not verify(str(tmp_path / "index"), True).faults
    assert gc.collect(store, 0, 0).removed == 6
    assert min(each for _, each, _ in due.attempts(store)) == at("2026-01-04")
    store.write("runs/000001/changes.json", b'{"run": 2}')
    name = store.entries("schedules")[0]
    store.write(f"schedules/{name}", b"[")
    faults = {(fault.file, fault.check) for fault in verify(str(tmp_path / "index"), True).faults}
    assert faults == {
        ("schedules/nightly", "schedules are readable"),
        ("runs/000001/changes.json", "changes are readable"),
    }
    with pytest.raises(DataError, match="damaged, not a JSON object"):
        due.read(store, "nightly", at("2026-01-04"), 1)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Head]:
    with cluster.head(tmp_path_factory.mktemp("home")) as found:
        yield found


@pytest.mark.cluster
def test_schedules_of_a_cluster(
    tmp_path: Path, nightly: Path, tiny_corpus: Path, schedule: Callable[..., Done], head: cluster.Head
) -> None:
    """Two that submit in one due minute start one job; the next due time has a job of its own."""
    options = ("--address", head.address, "--shared", "--workers", "1")

    def submit(now: str) -> subprocess.Popen[str]:
        line = [
            sys.executable,
            "-m",
            "jobs.cli",
            "schedule",
            "run",
            str(nightly.parent),
            "--now",
            now,
            *options,
        ]
        return subprocess.Popen(line, cwd=ROOT, env=head.env, text=True, stdout=subprocess.PIPE)

    def ended(job: str) -> dict[str, bool]:
        deadline = time.monotonic() + 120
        while True:
            found = {each.id: each.over for each in Jobs(head.address).every()}
            if found[job]:
                return found
            assert time.monotonic() < deadline, found
            time.sleep(0.5)

    for run, day in ((1, "02"), (2, "03")):
        both = [submit(f"2026-11-{day}T01:30:00Z") for _ in range(2)]
        out = [process.communicate(timeout=120)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0]
        [job] = "".join(out).split()
        assert job.endswith(f"-a{run}")
        assert len(ended(job)) == run
        [row] = listed(schedule, nightly.parent, f"2026-11-{day}T02:00:00Z")
        assert (row["state"], row["note"]) == ("waiting", f"submitted as {job}")
        assert set(ids(tmp_path / "index")) == set(range(1, run + 1))
        shutil.copy2(tiny_corpus / "part_12.jsonl", tmp_path / "corpus")


# --- export


@pytest.fixture
def odd(nightly: Path) -> Path:
    """The folder under a name that every scheduler has to quote."""
    return Path(shutil.move(nightly.parent, nightly.parent.parent / "the 100% 'best' $specs"))


def exported(schedule: Callable[..., Done], folder: Path, *options: str) -> dict[str, str]:
    target = folder.parent / "entries"
    done = schedule("export", folder, "-o", target, *options)
    assert done.code == 0, done.err
    return {file.name: file.read_text() for file in target.iterdir()}


def test_crontab(odd: Path, schedule: Callable[..., Done]) -> None:
    files = exported(schedule, odd, "--format", "crontab", "--every", "10", "--workers", "2")
    assert files == {
        "crontab": schedule("export", odd, "--format", "crontab", "--every", "10", "--workers", "2").out
    }
    [line] = [each for each in files["crontab"].splitlines() if each and not each.startswith("#")]
    fields = line.split(maxsplit=5)
    assert fields[:5] == ["*/10", "*", "*", "*", "*"]
    command, percent, _ = re.sub(r"\\%", "\0", fields[5]).partition("%")  # as cron reads it
    assert not percent
    words = shlex.split(command.replace("\0", "%"))
    assert Path(words[0]).is_absolute()
    assert words[-6:] == ["schedule", "run", str(odd), "--quiet", "--workers", "2"]


def test_systemd(odd: Path, schedule: Callable[..., Done]) -> None:
    files = exported(schedule, odd, "--format", "systemd")
    units = {}
    for name, text in files.items():
        units[name.rsplit(".")[-1]] = parsed = configparser.ConfigParser(interpolation=None, strict=False)
        parsed.optionxform = str  # type: ignore[assignment,method-assign]
        parsed.read_string(text)
    assert units["timer"]["Timer"]["OnCalendar"] == "*:0/5"
    assert units["service"]["Service"]["SuccessExitStatus"] == "3 75"
    start = units["service"]["Service"]["ExecStart"].replace("%%", "%").replace("$$", "$")
    assert shlex.split(start)[-4:] == ["schedule", "run", str(odd), "--quiet"]
    analyze = shutil.which("systemd-analyze")
    if analyze:
        paths = [str(odd.parent / "entries" / name) for name in files]
        checked = subprocess.run([analyze, "verify", *paths], capture_output=True, text=True, timeout=60)
        told = [line for line in checked.stderr.splitlines() if "corpuscope-" in line]
        assert not told, told


def k8s_spec(folder: Path, schedule: Any, **overrides: Any) -> Path:
    spec = {
        "corpus": {"uri": "s3://b/*.jsonl"},
        "model": {"uri": "org/model", "device": "cuda"},
        "saes": {"uri": "hf://org/suite"},
        "index": "s3://b/index",
        "schedule": schedule,
        **overrides,
    }
    (folder / "nightly.yaml").write_text(yaml.safe_dump(spec))
    return folder


def test_kubernetes(tmp_path: Path, schedule: Callable[..., Done]) -> None:
    folder = k8s_spec(tmp_path, {"cron": "30 2 * * MON-FRI", "timezone": "Europe/Berlin"})
    done = schedule("export", folder, "--format", "k8s", "--image", "me/corpuscope:1")
    assert done.code == 0, done.err
    script, job = list(yaml.safe_load_all(done.out))
    jsonschema.validate(job, SCHEMAS["RayCronJob"])
    assert job["spec"]["schedule"] == "30 2 * * MON-FRI"
    assert job["spec"]["timeZone"] == "Europe/Berlin"
    assert script["data"]["spec.yaml"] == (folder / "nightly.yaml").read_text()
    assert "schedule run /etc/corpuscope/spec.yaml --name nightly --address auto" in script["data"]["run.sh"]
    assert "me/corpuscope:1" in done.out


@pytest.mark.parametrize(
    ("cron", "overrides", "words"),
    [
        ("0 3 L * *", {}, "knows no L, W and #"),
        ("0 3 * * MON#1", {}, "knows no L, W and #"),
        ("0 3 * * 5L", {}, "knows no L, W and #"),
        ("0 3 * * 5-7", {}, "knows no day 7"),
        ("0 3 */2 * MON", {}, "cron wants day of month and day of week to be right"),
        (DAILY, {"index": "out/index"}, "index: out/index: no pod has the spec's folder"),
        (DAILY, {"corpus": [{"uri": ["s3://b/a", "x.txt"]}]}, "corpus[0].uri: x.txt: no pod"),
        (DAILY, {"model": {"uri": "./m", "device": "cuda"}}, "model.uri: ./m: no pod"),
        (DAILY, {"model": {"uri": "org/m"}}, "device"),
        (None, {}, "none of the specs has a `schedule`"),
    ],
)
def test_what_kubernetes_cannot_have(
    tmp_path: Path, schedule: Callable[..., Done], cron: str | None, overrides: dict[str, Any], words: str
) -> None:
    done = schedule("export", k8s_spec(tmp_path, cron, **overrides), "--format", "k8s")
    assert (done.code, done.out) == (2, "")
    assert words in done.err


@pytest.mark.parametrize("cron", ["0 3 * JUL,MAR WED", "0 3 */2 * *", "*/7 3 1-7 * 1-5", "0 3 * * */7"])
def test_what_kubernetes_can_have(tmp_path: Path, schedule: Callable[..., Done], cron: str) -> None:
    assert schedule("export", k8s_spec(tmp_path, cron), "--format", "k8s").code == 0
