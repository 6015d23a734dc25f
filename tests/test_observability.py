"""What a scan tells of itself: the run's summary, `status`, logs, and the page for whoever is on call."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
from click.testing import CliRunner

import queries
from jobs.cli import cli
from pipelines import account, lease, logs, stages, status, summary
from pipelines.audit import audit
from pipelines.executors.metrics import METRICS
from pipelines.lease import Beat, Done
from pipelines.registry import dump
from pipelines.scan import ScanOptions, run_scan
from pipelines.scheduler import Kind
from pipelines.stages import STAGES, Stopwatch
from pipelines.storage import Store
from pipelines.unit import Scanner
from queries.lookup import rows, select
from sae_runtime.errors import CorpuscopeError, DataError, InputError, Interrupted, exit_code

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/ONCALL.md").read_text()
SECRET = "xyzzysecret"
Scan = Callable[..., Any]


def commits(index: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((index / "commits").rglob("*.json"))]


def read(index: Path, run: int = 1) -> summary.RunSummary:
    found = summary.read(Store(str(index)), run)
    assert found is not None
    return found


@pytest.fixture
def corpus(tmp_path: Path, tiny_corpus: Path) -> Path:
    """Five files of the tiny corpus."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in (2, 3, 4, 8, 12):
        shutil.copy2(tiny_corpus / f"part_{number:02d}.jsonl", folder)
    return folder


@pytest.fixture
def spec(tmp_path: Path, corpus: Path, few: list[dict[str, str]], write_spec: Callable[..., Path]) -> Path:
    return write_spec(tmp_path, corpus={"uri": f"{corpus}/*.jsonl", "metadata": []}, saes=few)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """What `scan` does with signals does not outlive a test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# --- stages


def test_laps_add_up_to_the_time_that_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 15.0, 25.0, 26.0])
    monkeypatch.setattr(stages.time, "perf_counter", lambda: next(clock))
    watch = Stopwatch()
    watch.lap("read")
    watch.lap("model")
    watch.divide([{"encode": 3.0, "summarise": 1.0}, {"encode": 3.0, "summarise": 1.0}])
    watch.divide([{"encode": 0.0, "write": 0.0}])  # too short for the threads' clocks
    spent = {stage: seconds for stage, seconds in watch.seconds.items() if seconds}
    assert spent == {"read": 2.0, "model": 3.0, "encode": 8.0, "summarise": 2.5, "write": 0.5}


# --- summaries


def test_a_summary_is_the_sum_of_the_commits(few_index: Path) -> None:
    found, made = read(few_index), commits(few_index)
    assert (found.committed, found.units) == (len(made), len(made))
    assert found.devices == Counter(commit["device"] for commit in made)
    for name in ("documents", "quarantined", "tokens", "tokens_run"):
        assert getattr(found, name) == sum(commit[name] for commit in made), name
    for name in ("rows", "bytes"):
        wanted: dict[str, int] = {}
        for commit in made:
            for kind, file in commit["files"].items():
                wanted[kind] = wanted.get(kind, 0) + file[name]
        assert getattr(found, name) == wanted
    assert (found.attempts, found.unaccounted, found.exit_code, found.reason) == (1, 0, 0, "done")
    assert (found.retries, found.failures, found.given_up, found.cost) == (0, {}, 0, None)
    assert (found.workers, found.gpu_seconds) == (1, 0.0)
    # One worker, held from the beginning to the end: its stages are inside that, and inside the units' times.
    busy = sum(commit["finished"] - commit["started"] for commit in made)
    assert 0.8 * busy < sum(found.stages.values()) <= found.worker_seconds <= found.seconds
    assert set(found.stages) == set(STAGES)
    assert min(found.stages.values()) > 0
    assert found.idle_share == pytest.approx(
        1 - (found.stages["model"] + found.stages["encode"]) / found.worker_seconds
    )


def test_a_run_of_two_attempts_is_their_sum(spec: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    stop = {"left": 2}

    def stopping(event: Any) -> None:
        if type(event).__name__ == "Committed":
            stop["left"] -= 1
            if not stop["left"]:
                raise KeyboardInterrupt

    scan(spec, price=36.0, observe=stopping, ends=KeyboardInterrupt)
    first = read(index)
    assert (first.committed, first.units, first.exit_code) == (2, 5, 75)
    assert first.reason == "stopped by a signal"
    scan(spec, price=36.0)
    both, made = read(index), commits(index)
    assert (both.attempts, both.committed, both.units, both.exit_code) == (2, 5, 3, 0)
    assert both.tokens == sum(commit["tokens"] for commit in made)
    assert both.documents == sum(commit["documents"] for commit in made)
    assert both.started == first.started
    assert both.finished > first.finished
    assert both.worker_seconds > first.worker_seconds
    assert both.cost == pytest.approx(both.worker_seconds / 100)
    # A driver that is killed leaves no summary: its lease tells of it.
    (index / "runs/000001/summary-000001.json").unlink()
    alone = read(index)
    assert (alone.attempts, alone.unaccounted, alone.committed) == (1, 1, 3)
    assert alone.cost is not None
    assert both.cost is not None
    assert alone.cost < both.cost
    (index / "runs/000001/summary-000002.json").unlink()
    assert summary.read(Store(str(index)), 1) is None
    assert status.status(str(index)).last_run is None
    [row] = rows(select(queries.connect(str(index)), "SELECT seconds, cost, tokens FROM runs"))
    assert row == {"seconds": None, "cost": None, "tokens": both.tokens}


def scan(
    spec: Path,
    price: float | None = None,
    observe: Callable[[Any], None] = lambda event: None,
    ends: type[BaseException] | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> Any:
    from jobs.specfile import load_spec

    loaded, text = load_spec(str(spec), None)
    options = ScanOptions(executor="inline", price=price, allow_removal=True)
    if ends is None:
        return run_scan(loaded, text, options, observe, notice)
    with pytest.raises(ends):
        run_scan(loaded, text, options, observe, notice)
    return None


def test_each_run_has_its_own_and_a_scan_without_work_has_none(
    spec: Path, corpus: Path, tmp_path: Path, tiny_corpus: Path
) -> None:
    index = tmp_path / "index"
    scan(spec)
    scan(spec)  # nothing to do
    assert [file.name for file in sorted((index / "runs").rglob("*.json"))] == ["summary-000001.json"]
    shutil.copy2(tiny_corpus / "part_13.jsonl", corpus)
    scan(spec)
    (corpus / "part_13.jsonl").unlink()
    scan(spec)  # only takes away
    new, gone = read(index, 2), read(index, 3)
    assert (new.units, new.committed) == (1, 1)
    assert new.documents == len((tiny_corpus / "part_13.jsonl").read_text().splitlines())
    assert (gone.units, gone.documents, gone.workers, gone.worker_seconds) == (0, 0, 0, 0.0)
    assert gone.reason == account.NOTHING
    found = list(rows(select(queries.connect(str(index)), "SELECT run, workers, failures FROM runs")))
    assert [(row["run"], row["workers"], row["failures"]) for row in found] == [
        (1, 1, 0), (2, 1, 0), (3, 0, 0),
    ]  # fmt: skip


def test_a_summary_that_cannot_be_written_costs_nothing_else(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(summary, "write", full)
    said: list[str] = []
    assert not scan(spec, notice=said.append).failed
    assert [line for line in said if "summary" in line] == [
        "note: the run's summary could not be written: No space left on device"
    ]
    assert status.status(str(tmp_path / "index")).state == "complete"


def test_sums_keep_what_belongs_to_the_last_attempt(few_index: Path) -> None:
    one = read(few_index)
    other = replace(
        one, exit_code=75, reason="stopped", workers=3, failures={"infra": 2}, error="", cost=1.0,
        code=("later",), units=7, finished=one.finished + 5,
    )  # fmt: skip
    before = replace(one, failures={"infra": 1, "task": 1}, error="old", cost=2.0)
    both = summary.plus(before, other)
    assert (both.exit_code, both.reason, both.units, both.workers) == (75, "stopped", 7, 3)
    assert (both.failures, both.error, both.cost) == ({"infra": 3, "task": 1}, "old", 3.0)
    assert both.code == (*one.code, "later")
    assert summary.plus(one, other).cost is None  # of part of a run no cost is told


def test_verify_reads_summaries(few_index: Path, tmp_path: Path) -> None:
    index = Path(shutil.copytree(few_index, tmp_path / "index"))
    store = Store(str(index))
    assert not audit(store, quick=True).faults
    one = index / "runs/000001/summary-000001.json"
    (index / "runs/000001/summary-000007.json").write_text(one.read_text().replace('"run": 1', '"run": 2'))
    (index / "runs/000001/summary-000008.json").write_text("{}")
    found = {fault.file: fault.detail for fault in audit(store, quick=True).faults}
    assert sorted(found) == ["runs/000001/summary-000007.json", "runs/000001/summary-000008.json"]
    assert "of run 2" in found["runs/000001/summary-000007.json"]
    with pytest.raises(DataError, match="remove that file"):
        status.status(str(index))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 75),
        (Interrupted("x"), 75),
        (InputError("x"), 2),
        (CorpuscopeError("x"), 1),
        (FileNotFoundError("x"), 2),
        (ConnectionError("x"), 1),
        (RuntimeError("x"), 1),
    ],
)
def test_codes_of_errors(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


# --- failures, logs


@pytest.fixture
def breaking(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """part_04 has a document that is damaged; scanning part_08 always fails. Both say a word of the text."""
    tiny.write_rows(corpus / "part_03.jsonl", [{"id": "s", "text": f"open {SECRET} door"}])
    with (corpus / "part_04.jsonl").open("a") as stream:
        stream.write(f'{{"id": "{SECRET}", "text": {SECRET}}}\n')
    whole = Scanner.scan

    def scan(self: Scanner, work: Any) -> Any:
        if work.unit.path == "part_08.jsonl":
            raise RuntimeError(f"cannot take {SECRET}")
        return whole(self, work)

    monkeypatch.setattr(Scanner, "scan", scan)


def test_failures_in_the_summary_in_status_and_in_logs(spec: Path, tmp_path: Path, breaking: None) -> None:
    index, log = tmp_path / "index", tmp_path / "log.jsonl"
    command = ["scan", str(spec), "--executor", "inline", "--log", str(log), "--price-per-hour", "2"]
    done = CliRunner().invoke(cli, command)
    assert isinstance(done.exception, CorpuscopeError)
    found = read(index)
    assert (found.failures, found.retries, found.given_up, found.committed) == ({"task": 3}, 2, 1, 4)
    assert (found.exit_code, found.reason) == (1, "1 of 5 units were given up")
    assert found.quarantined == 1
    assert found.error == f"part_08.jsonl: RuntimeError: cannot take {SECRET}"
    assert found.cost == pytest.approx(found.worker_hours * 2)
    now = status.status(str(index))
    assert (now.state, now.failed, now.failures, now.error) == ("failed", 1, {"task": 3}, found.error)
    assert now.next.startswith("mend what the errors name")
    shown = CliRunner().invoke(cli, ["status", str(index)]).stdout
    assert "3 task; the newest: part_08.jsonl: RuntimeError" in shown
    # No line has a document's text, and what belongs together can be found by its ids.
    assert SECRET not in log.read_text()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["event"] for line in lines} <= set(logs.EVENTS)
    assert all({"time", "level", "host", "pid"} <= set(line) for line in lines)
    units = {commit["unit"]: commit for commit in commits(index)}
    scanned = {line["unit"]: line for line in lines if line["event"] == "unit_scanned"}
    assert set(scanned) == set(units)
    for unit, line in scanned.items():
        assert (line["run"], line["ordinal"], line["group"]) == (1, units[unit]["ordinal"], 0)
        assert (line["tokens"], line["attempt"]) == (units[unit]["tokens"], units[unit]["attempt"])
        assert sum(line["stages"].values()) == pytest.approx(line["seconds"], abs=0.01)
    failed = [line for line in lines if line["event"] == "attempt_failed"]
    assert [(line["kind"], line["final"], line["level"]) for line in failed] == [
        ("task", False, "warning"), ("task", False, "warning"), ("task", True, "warning"),
    ]  # fmt: skip
    assert (lines[0]["event"], lines[0]["units"]) == ("scan_started", 5)
    assert (lines[-1]["event"], lines[-1]["exit_code"], lines[-1]["committed"]) == ("scan_ended", 1, 4)


def test_a_log_on_stdout_is_all_there_is_on_stdout(spec: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["scan", str(spec), "--executor", "inline"], env={"CORPUSCOPE_LOG": "-"})
    assert done.exit_code == 0, done.output
    events = [json.loads(line)["event"] for line in done.stdout.splitlines()]
    assert (events[0], events[-1]) == ("scan_started", "scan_ended")
    assert "tokens/s" in done.stderr
    again = CliRunner().invoke(cli, ["scan", str(spec), "--executor", "inline"])
    assert again.stdout == ""


def test_a_log_that_cannot_be_written(spec: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["scan", str(spec), "--executor", "inline", "--log", "missing/folder/x"])
    assert isinstance(done.exception, InputError)
    assert "--log missing/folder/x: cannot be written: No such file" in str(done.exception)
    assert not (tmp_path / "index").exists()


# --- status


def beating(store: Store, age: float, process: int | None = None, done: Done | None = None) -> None:
    """A scan of this process, or of one that is gone, that gave its last sign some seconds ago."""
    before = lease.newest(store)
    assert before is not None
    holder = replace(lease.this_process(), term=before.term + 1, run=1)
    if process is not None:
        holder = replace(holder, process=process, born="0")
    store.write(f"leases/{holder.term:06d}.json", dump(asdict(holder)))
    sign = Beat(holder.term, 9, time.time() - age, 2, False, {"u": 3}, done)
    store.write(lease.HEARTBEAT, dump(asdict(sign)))


def test_states(few_index: Path, tmp_path: Path) -> None:
    index = Path(shutil.copytree(few_index, tmp_path / "index"))
    store = Store(str(index))

    def now() -> tuple[str, str, float | None]:
        found = status.status(str(index))
        return found.state, found.next, found.heartbeat

    assert now() == ("complete", "nothing", None)
    next((index / "commits").rglob("*.json")).unlink()
    state, words, age = now()
    assert (state, age) == ("incomplete", None)
    assert words.startswith("the last scan ended with 0 (done): run the same scan again")
    beating(store, 1.0)
    state, words, age = now()
    assert (state, age) == ("running", pytest.approx(1.0, abs=20))
    beating(store, 50.0)
    state, words, age = now()
    assert (state, age) == ("stale", pytest.approx(50.0, abs=20))
    assert "see whether process" in words
    beating(store, 1.0, process=2**22 + 5)  # no process has such a number
    state, words, age = now()
    assert state == "incomplete"
    assert "was killed" in words
    assert age == pytest.approx(1.0, abs=20)


def test_progress_of_a_scan_at_work(few_index: Path, tmp_path: Path) -> None:
    index = Path(shutil.copytree(few_index, tmp_path / "index"))
    next((index / "commits").rglob("*.json")).unlink()
    done = Done(100.0, 8, 1, 0, 20, 5000, 0.25, {"infra": 2}, "a.jsonl: worker lost: gone")
    beating(Store(str(index)), 1.0, done=done)
    found = status.status(str(index))
    assert (found.progress, found.progress_documents, found.progress_tokens) == (0.25, 20, 5000)
    assert (found.tokens_per_second, found.seconds_left) == (50.0, 300.0)
    assert (found.workers, found.failures, found.error) == (2, {"infra": 2}, "a.jsonl: worker lost: gone")
    assert found.last_run is not None
    assert found.last_run["unaccounted"] == 0  # the scan at work is none of those that were killed
    shown = CliRunner().invoke(cli, ["status", str(index)]).stdout
    assert "25%: 20 documents, 5,000 tokens, 50 tokens/s, 5:00 left" in shown
    assert "2 infra; the newest: a.jsonl: worker lost: gone" in shown


def test_a_scan_tells_its_heartbeat_how_far_it_is(spec: Path, tmp_path: Path) -> None:
    index, seen = tmp_path / "index", []

    def look(event: Any) -> None:
        if type(event).__name__ == "Committed":
            seen.append(event)

    scan(spec, observe=look)
    sign = lease.beat(Store(str(index)))
    assert sign is not None
    assert sign.done is not None
    assert (sign.done.units, sign.done.committed, sign.done.share) == (5, 5, 1.0)
    assert sign.done.tokens == sum(commit["tokens"] for commit in commits(index))
    assert sign.done.documents == sum(commit["documents"] for commit in commits(index))


# --- the page


def named(heading: str) -> list[str]:
    """What the table under a heading has in its first column, in backticks."""
    part = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [
        name for row in re.findall(r"^\| (`[^|]*) \|", part, re.M) for name in re.findall(r"`([^`]+)`", row)
    ]


def test_the_page_has_exactly_the_states_metrics_and_events_that_there_are() -> None:
    assert named("States") == list(status.STATES)
    assert sorted(named("Metrics")) == sorted(metric.exported(name) for name, metric in METRICS.items())
    assert named("Logs") == list(logs.EVENTS)
    assert named("Kinds of failures") == list(get_args(Kind))
    assert named("Stages") == list(STAGES)


def test_queries_of_the_page_use_metrics_and_tags_that_there_are() -> None:
    exported = {metric.exported(name): metric for name, metric in METRICS.items()}
    rules = re.findall(r"expr: (.*)", PAGE)
    assert len(rules) >= 5
    for rule in rules:
        for name, tags in re.findall(r"(ray_corpuscope_\w+)(?:\{([^}]*)\})?", rule):
            assert name in exported, name
            for tag, value in re.findall(r'(\w+)=~?"([^"]*)"', tags):
                assert tag == exported[name].tag, (name, tag)
                if tag == "stage":
                    assert set(value.split("|")) <= set(STAGES)
                else:
                    assert set(value.split("|")) <= set(get_args(Kind))


def test_messages_of_the_page_are_the_codes() -> None:
    """Each quoted message, up to what is filled in, stands in the sources."""
    source = "".join(
        re.sub(r'"\s*\n\s*f?"', "", file.read_text())
        for room in ("pipelines", "jobs", "sae_runtime")
        for file in (ROOT / room).rglob("*.py")
    )
    messages = named("Messages")
    assert len(messages) >= 12
    for message in messages:
        for part in message.split("…"):
            assert part.strip() in source, message
