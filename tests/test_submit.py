"""Scans as jobs of a Ray cluster: what is refused and what is shipped, attempts, exit codes, lost heads.

The tests of the cluster group have a real head, and submit by the command line over HTTP. The head's own
environment holds packages of our names that end whoever imports them: what runs is what was shipped.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import cluster
import psutil
import pytest
import tiny
import yaml
from test_resume import ROOT, UNITS, commits, committed

import queries
from jobs import output, rayjobs
from jobs.cli import cli
from jobs.rayjobs import Jobs, ScanJob
from jobs.shipping import SPEC, check_size, pack
from jobs.specfile import load_spec
from jobs.submit import submit_scan
from pipelines.lease import beat
from pipelines.storage import Store
from sae_runtime.errors import CorpuscopeError, InputError, Interrupted

URL = "http://127.0.0.1:8265"
REMOTE: dict[str, Any] = {
    "corpus": {"uri": ["s3://bucket/a-*.jsonl", "hf://datasets/org/name/x.jsonl"], "metadata": ["lang"]},
    "model": {"uri": "org/model"},
    "saes": [{"uri": "hf://org/suite"}],
    "index": "s3://bucket/index",
}


def written(folder: Path, **overrides: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "my.yaml").write_text(yaml.safe_dump({**REMOTE, **overrides}))
    return str(folder / "my.yaml")


# --- what a cluster cannot see


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"corpus": {"uri": "data/*.jsonl"}}, "corpus.uri: {here}/data/*.jsonl"),
        ({"corpus": [REMOTE["corpus"], {"uri": "file:///d/x.txt"}]}, "corpus[1].uri: file:///d/x.txt"),
        ({"corpus": {"uri": "zip://*.jsonl::/d/x.zip"}}, "corpus.uri: zip://*.jsonl::/d/x.zip"),
        ({"corpus": {"uri": "http://localhost:8000/x.jsonl"}}, "corpus.uri: http://localhost:8000/x.jsonl"),
        ({"model": {"uri": "./weights"}}, "model.uri: {here}/weights"),
        ({"model": {"uri": "m.gguf"}}, "model.uri: {here}/m.gguf"),
        ({"saes": [{"uri": "s3://b/a"}, {"uri": "b"}]}, "saes[1].uri: {here}/b"),
        ({"index": "out/index"}, "index: {here}/out/index"),
    ],
)
def test_what_only_this_machine_sees_is_refused_unless_shared(
    tmp_path: Path, overrides: dict[str, Any], key: str
) -> None:
    spec = written(tmp_path, **overrides)
    with pytest.raises(InputError) as refused:
        pack(spec)
    assert str(refused.value).startswith(key.format(here=tmp_path))
    assert "--shared" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert pack(spec, shared=True).job[SPEC]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"index": "memory://index"}, "index: "),
        ({"corpus": {"uri": "zip://*.jsonl::data/x.zip"}}, "corpus.uri: "),
        ({"model": {"uri": "file://weights"}}, "model.uri: "),
        ({"index": "s3://bucket/i", "saes": [{"uri": "https://me:secret@host/saes"}]}, "saes.uri: "),
        ({"corpus": {"uri": "zip://x::https://me:secret@host/x.zip"}}, "corpus.uri: "),
    ],
)
def test_what_no_job_can_see_and_passwords_are_refused_even_when_shared(
    tmp_path: Path, overrides: dict[str, Any], key: str
) -> None:
    with pytest.raises(InputError) as refused:
        pack(written(tmp_path, **overrides), shared=True)
    assert str(refused.value).startswith(key)
    assert "secret" not in str(refused.value)


# --- what is shipped


def test_only_the_code_and_the_spec_are_shipped(tmp_path: Path) -> None:
    shipment = pack(written(tmp_path))
    code = {
        file.relative_to(ROOT).as_posix()
        for room in ("sae_runtime", "pipelines", "queries", "jobs")
        for file in (ROOT / room).rglob("*")
        if file.suffix in (".py", ".sql")
    }
    assert len(code) > 100
    assert set(shipment.code) == code
    assert set(shipment.job) == {SPEC}
    assert sum(map(len, shipment.code.values())) < 4 << 20


def test_the_shipped_spec_is_the_same_spec_with_its_paths_whole(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    spec = written(
        here,
        corpus=[
            {"uri": "a.jsonl", "messages": "chat", "template": "chat.jinja", "metadata": ["naïve"]},
            {"uri": "~/b.jsonl", "limit": 3},
        ],
        context={"length": 64, "exclude": ["special", {"roles": "system"}, {"norm_above": 10.0}]},
        saes={"uri": "hf://org/suite", "keep": {"sample": 0.25}, "select": "canonical"},
        max_index_bytes="3GB",
    )
    (here / "chat.jinja").write_text("{{ messages }}", encoding="utf-8")
    pack(spec, index="index", shared=True).write(there)
    before, after = load_spec(spec, "index")[0], load_spec(str(there / "job" / SPEC))[0]
    assert after.corpus[0].template == str(there / "job" / "template-0.jinja")
    assert (there / "job" / "template-0.jinja").read_text() == "{{ messages }}"
    assert after.index == str(Path.cwd() / "index")

    def rest(spec: Any) -> dict[str, Any]:
        found: dict[str, Any] = spec.model_dump()
        del found["corpus"][0]["template"]
        return found

    assert rest(before) == rest(after)


def test_a_template_that_cannot_be_read_is_refused_here(tmp_path: Path) -> None:
    spec = written(tmp_path, corpus={"uri": "s3://b/a.jsonl", "messages": "chat", "template": "no.jinja"})
    with pytest.raises(InputError, match=r"^corpus\.template: cannot read .*no\.jinja: No such file"):
        pack(spec)


def test_too_large_a_folder_is_refused_with_the_largest_names() -> None:
    files = {"jobs/a.py": bytes(20 << 20), "jobs/b.py": bytes(13 << 20), "jobs/c.py": b"1", "jobs/d.py": b""}
    with pytest.raises(InputError, match=r"a\.py \(21\.0 MB\), jobs/b\.py \(13\.6 MB\), jobs/c\.py"):
        check_size(files)
    check_size({"jobs/a.py": bytes(32 << 20)})


def test_a_run_is_what_goes_where_and_nothing_else(tmp_path: Path) -> None:
    chat = {"uri": "s3://b/a.jsonl", "messages": "chat", "template": "t.jinja"}
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.jinja").write_text("x" if name != "c" else "y")
    same = {
        pack(written(tmp_path / "a", corpus=chat)).run,
        pack(written(tmp_path / "b", corpus=[chat], schedule="0 3 * * *", top_k=20)).run,
        pack(written(tmp_path / "b", corpus=chat, index="s3://b/else"), index="s3://bucket/index").run,
    }
    others = [
        pack(written(tmp_path / "c", corpus=chat)).run,  # another template under the same name
        pack(written(tmp_path / "b", corpus=chat), index="s3://bucket/other").run,
        pack(written(tmp_path / "b", corpus=chat, top_k=21)).run,
    ]
    assert len(same) == 1
    assert len({*same, *others}) == 4


# --- attempts, by a client that answers as Ray's does


class Status(Enum):
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"


@dataclass
class Details:
    """Ray's JobDetails as far as they are read."""

    submission_id: str | None
    status: Status
    driver_exit_code: int | None = None
    error_type: str | None = None
    message: str | None = None
    metadata: dict[str, str] | None = field(default_factory=lambda: {rayjobs.MARK: "x"})
    start_time: int | None = 1_795_000_000_000
    end_time: int | None = None


LOG = "failed, last logs:\n x\nerror: the cause\nRunning entrypoint for job scan-1: exec python\n\n"


class Client:
    """Ray's client. `hidden` are jobs that were submitted after the listing was made."""

    def __init__(self) -> None:
        self.jobs: list[Details] = []
        self.hidden: set[str] = set()
        self.submitted: list[dict[str, Any]] = []
        self.sent: set[str] = set()  # what lay in the folders of the job
        self.tails: list[list[str]] = []  # of each connection; one that ends early broke off
        self.log = ""
        self.without_agent = 0.0  # times that a job is asked for before the head can start one

    def list_jobs(self) -> list[Details]:
        return self.jobs

    def get_job_info(self, id: str) -> Details:
        for job in self.jobs:
            if job.submission_id == id:
                return job
        raise RuntimeError(f"Request failed with status code 404: Job {id} does not exist.")

    def get_job_logs(self, id: str) -> str:
        return self.log

    def submit_job(self, **options: Any) -> str:
        id = options["submission_id"]
        if self.without_agent > 0:
            self.without_agent -= 1
            raise RuntimeError("Request failed with status code 500: No available agent to submit job, ...")
        if id in self.hidden or any(job.submission_id == id for job in self.jobs):
            raise RuntimeError(f"Request failed with status code 500: {id} already exists. Please use")
        if options["entrypoint"].endswith("--allow-removal"):
            raise RuntimeError(
                "Request failed with status code 500: Traceback (most recent call last):\nE: no room\n."
            )
        self.submitted.append(options)
        sent = options["runtime_env"]
        folders = [sent["working_dir"], *sent["py_modules"]]
        self.sent = {f"{Path(f).name}/{p.name}" for f in folders for p in Path(f).iterdir()}
        self.jobs.append(Details(id, Status.PENDING, metadata=options["metadata"]))
        return str(id)

    async def tail_job_logs(self, id: str) -> AsyncIterator[str]:
        if not self.tails:
            self.jobs[0].status = Status.SUCCEEDED
            return
        for text in self.tails.pop(0):
            yield text
        raise RuntimeError("WebSocket connection closed unexpectedly")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    found = Client()
    monkeypatch.setattr(rayjobs, "_client", lambda address: found)
    monkeypatch.setattr(rayjobs, "_check_address", lambda address: None)
    monkeypatch.setattr(rayjobs, "_LOOK_EVERY", 0.02)
    return found


def test_a_job_alive_is_joined_and_one_that_ended_is_followed_by_the_next_attempt(
    tmp_path: Path, client: Client
) -> None:
    spec, notices = written(tmp_path), []

    def again() -> str:
        return submit_scan(spec, URL, notice=notices.append)

    run = pack(spec).run
    client.jobs = [
        Details("scan-0000000000000000-a7", Status.SUCCEEDED),  # of another run
        Details("mine", Status.RUNNING, metadata={}),
        Details(None, Status.RUNNING, metadata=None),  # a driver that nobody submitted
    ]
    assert again() == f"{run}-a1"
    for state in (Status.PENDING, Status.RUNNING):
        client.jobs[-1].status = state
        assert again() == f"{run}-a1"
    for state in (Status.SUCCEEDED, Status.STOPPED, Status.FAILED):
        client.jobs[-1].status = state
        newest = again()
    assert newest == f"{run}-a4"
    assert [call["submission_id"] for call in client.submitted] == [f"{run}-a{n}" for n in (1, 2, 3, 4)]
    assert "no second job" in notices[0]
    client.hidden.add(f"{run}-a5")
    client.jobs[-1].status = Status.STOPPED
    assert again() == f"{run}-a5"  # another one was faster, and that is the job
    assert len(client.submitted) == 4


def test_a_job_has_the_code_first_what_is_named_of_the_environment_and_no_cores(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "t0ken")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    submit_scan(written(tmp_path), URL, workers="auto", env=["MY_TOKEN"], notice=print)
    (call,) = client.submitted
    assert call["entrypoint"] == "exec python -m jobs.cli scan spec.yaml --address auto --workers auto"
    assert call["entrypoint_num_cpus"] == 0
    variables = call["runtime_env"]["env_vars"]
    assert variables.pop("RAY_JOB_STOP_WAIT_TIME_S") == "30"
    assert variables == {"MY_TOKEN": "t0ken"}
    assert "s3cret" not in repr(call)
    assert {"jobs/cli.py", "pipelines/scan.py", "queries/views.sql", "sae_runtime/encode.py"} < client.sent
    assert {name for name in client.sent if name.startswith("job/")} == {f"job/{SPEC}"}
    assert not Path(call["runtime_env"]["working_dir"]).exists()
    assert call["metadata"]["corpuscope_index"] == "s3://bucket/index"
    assert call["metadata"]["corpuscope_code"] == pack(written(tmp_path)).version


def test_a_variable_that_is_not_set_and_a_cluster_that_refuses_are_one_line(
    tmp_path: Path, client: Client
) -> None:
    with pytest.raises(InputError, match=r"^--env NO_SUCH: .* export it$"):
        submit_scan(written(tmp_path), URL, env=["NO_SUCH"], notice=print)
    with pytest.raises(CorpuscopeError, match=r"^http://127.0.0.1:8265: E: no room$") as refused:
        submit_scan(written(tmp_path), URL, allow_removal=True, notice=print)
    assert refused.value.exit_code == 1


def test_a_head_that_just_began_is_waited_for_and_one_without_an_agent_not_for_ever(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.without_agent = 3
    submit_scan(written(tmp_path), URL, notice=print)
    assert (client.without_agent, len(client.submitted)) == (0, 1)

    client.jobs[-1].status = Status.STOPPED
    client.without_agent = math.inf
    monkeypatch.setattr(rayjobs, "_AGENT_SECONDS", 0.2)
    with pytest.raises(CorpuscopeError, match=r"^http://127.0.0.1:8265 starts no jobs: .*_agent.log"):
        submit_scan(written(tmp_path), URL, notice=print)
    assert len(client.submitted) == 1


@pytest.mark.parametrize(
    ("status", "code", "kind", "state", "exit_code"),
    [
        ("SUCCEEDED", 0, None, "done", 0),
        ("FAILED", 1, "JOB_ENTRYPOINT_COMMAND_ERROR", "failed", 1),
        ("FAILED", 2, "JOB_ENTRYPOINT_COMMAND_ERROR", "failed", 2),
        ("FAILED", 3, "JOB_ENTRYPOINT_COMMAND_ERROR", "done", 3),
        ("FAILED", 75, "JOB_ENTRYPOINT_COMMAND_ERROR", "stopped", 75),
        ("FAILED", 127, "JOB_ENTRYPOINT_COMMAND_ERROR", "failed", 1),
        ("FAILED", 9, "JOB_ENTRYPOINT_COMMAND_ERROR", "failed", 1),
        ("FAILED", -9, "JOB_ENTRYPOINT_COMMAND_ERROR", "failed", 1),
        ("FAILED", None, "RUNTIME_ENV_SETUP_FAILURE", "failed", 1),
        ("FAILED", None, "JOB_SUPERVISOR_ACTOR_DIED", "lost", 75),
        ("STOPPED", None, None, "stopped", 75),
    ],
)
def test_how_a_job_ended_is_an_exit_code(
    client: Client, status: str, code: int | None, kind: str | None, state: str, exit_code: int
) -> None:
    client.jobs = [Details("scan-1", Status(status), code, kind, LOG)]
    (job,) = Jobs(URL).every()
    assert (job.state, job.exit_code, job.over) == (state, code, True)
    found, why = Jobs(URL).exit_code("scan-1")
    assert found == exit_code
    assert "\n" not in why
    assert job.message == "error: the cause"
    if exit_code == 1 and code not in (1, 127):
        assert why.endswith("error: the cause")


def test_a_log_that_breaks_off_is_told_once_and_whole(client: Client) -> None:
    client.jobs = [Details("scan-1", Status.RUNNING)]
    client.tails = [[], ["one\ntw"], ["one\n", "two\nthr"], ["one\ntwo\n"]]
    client.log = "one\ntwo\nthree\nfour"
    lines: list[str] = []
    assert Jobs(URL).follow("scan-1", lines.append).state == "done"
    assert lines == ["one", "two", "three", "four"]


def test_a_head_that_knows_the_job_no_more_ends_the_following_as_unfinished(client: Client) -> None:
    with pytest.raises(Interrupted, match=r"knows no job scan-1 any more.*submit again"):
        Jobs(URL).follow("scan-1", print)


def test_a_cluster_that_is_silent_is_not_waited_for_for_ever(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent() -> list[Details]:
        time.sleep(30)
        raise AssertionError

    monkeypatch.setattr(rayjobs, "_ANSWER_SECONDS", 0.1)
    client.list_jobs = silent  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="does not answer any more"):
        Jobs(URL).every()


# --- the command line


def corpuscope(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments], cwd=ROOT, capture_output=True, text=True,
        timeout=240, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://10.0.0.1:10001", "http://10.0.0.1:8265"),
        ("10.0.0.1:6379", "http://10.0.0.1:8265"),
        ("auto", "http://HOST:8265"),
        ("http://127.0.0.1:1", "nothing listens at http://127.0.0.1:1"),
        ("http://[", "is not a URL"),
    ],
)
def test_an_address_that_is_no_dashboards_says_what_is_wanted(address: str, words: str) -> None:
    with pytest.raises(InputError) as refused:
        Jobs(address)
    assert words in str(refused.value)
    assert str(refused.value).startswith("--address: ")


@pytest.mark.parametrize(
    "address", ["http://me:hidden@127.0.0.1:1", "http://me:hidden@[", "ray://me:hidden@h:1"]
)
def test_a_password_of_the_address_is_not_repeated(address: str) -> None:
    with pytest.raises(InputError) as refused:
        Jobs(address)
    assert "hidden" not in str(refused.value)
    assert "Errno" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("submit", "{spec}", "--address", "http://127.0.0.1:1"), "error: model.uri: "),
        (("submit", "{spec}", "--address", "http://127.0.0.1:1", "--shared"), "nothing listens"),
        (("submit", "{spec}", "--address", "http://127.0.0.1:1", "--workers", "0"), "or more nor auto"),
        (("submit", "{spec}"), "--address"),
        (("jobs", "--address", "auto", "stop", "x"), "is not a dashboard's URL"),
    ],
)
def test_wrong_arguments_are_one_line_and_2(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    spec = written(tmp_path, model={"uri": "./m"})
    done = corpuscope(*(word.format(spec=spec) for word in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["logs", "x"], "http://127.0.0.1:1"),
        (["logs", "x", "--address", "http://127.0.0.1:2"], "http://127.0.0.1:2"),
        (["--address", "http://127.0.0.1:3", "stop", "x"], "http://127.0.0.1:3"),
        (
            ["--address", "http://127.0.0.1:3", "stop", "x", "--address", "http://127.0.0.1:2"],
            "http://127.0.0.1:2",
        ),
    ],
)
def test_the_address_nearest_to_the_word_holds(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], asked: str
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    with pytest.raises(InputError, match=f"nothing listens at {asked} "):
        cli.main(["jobs", *arguments], standalone_mode=False)


def test_the_table_of_jobs_fits_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "_WIDE", 80)
    began = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(hours=40)
    job = ScanJob(
        id="scan-0123456789abcdef-a12", state="failed", exit_code=2, index="s3://a-bucket/of/mine/and/more/web",
        spec="specs/web.yaml", attempt=12, started=began, ended=began + datetime.timedelta(minutes=50),
        message="error: corpus.uri: no file matches s3://a-bucket/web/*.jsonl",
    )  # fmt: skip
    done = replace(job, id="scan-fedcba9876543210-a1", state="done", exit_code=0, message="Job finished.")
    monkeypatch.setattr(Jobs, "__init__", lambda self, address: None)
    monkeypatch.setattr(Jobs, "every", lambda self: [job, done])
    cli.main(["jobs", "--address", "http://x"], standalone_mode=False)
    heading, first, second, why = capsys.readouterr().out.splitlines()
    assert max(map(len, (heading, first, second))) <= 80
    assert first.split()[:6] == [job.id, "failed", "2", "40", "h", "ago"]
    assert first.endswith("/more/web")
    assert second.split()[:3] == [done.id, "done", "0"]
    assert why == f"{job.id}: {job.message}"


# --- a real head


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Head]:
    """A head on whose machine other packages of our names are installed."""
    folder, decoys = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("decoys")
    for name in ("jobs", "pipelines", "sae_runtime"):
        (decoys / name).mkdir()
        (decoys / name / "__init__.py").write_text("raise SystemExit(9)")
    with cluster.head(folder, PYTHONPATH=str(decoys)) as found:
        yield found


def at(head: cluster.Head, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "jobs.cli", *arguments, "--address", head.address]


def started(head: cluster.Head, *arguments: str) -> subprocess.Popen[str]:
    """A command of ours about a head; in an environment that names another cluster."""
    env = {name: value for name, value in head.env.items() if name != "PYTHONPATH"}
    return subprocess.Popen(
        at(head, *arguments), cwd=ROOT, env=env | {"RAY_ADDRESS": "127.0.0.1:1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def said(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """What a command printed, stdout and stderr, once it has ended with this code."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out, err


def listed(head: cluster.Head) -> dict[str, dict[str, Any]]:
    """`corpuscope jobs` by id."""
    out, _ = said(started(head, "jobs", "--format", "json"))
    return {job["id"]: job for job in json.loads(out)}


def frozen(head: cluster.Head, index: Path, wanted: int) -> list[psutil.Process]:
    """A scan's workers, their clocks stopped once so many units are committed: it cannot end by itself."""
    deadline = time.monotonic() + 120
    while committed(index) < wanted:
        assert time.monotonic() < deadline, "nothing is committed"
        time.sleep(0.005)
    workers = head.workers()
    for worker in workers:
        worker.suspend()
    assert committed(index) < UNITS, "the scan was over before it could be stopped"
    return workers


def end(workers: list[psutil.Process]) -> None:
    """End stopped workers as they are: let go, they could commit the rest before they see that it is over."""
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
    _, left = psutil.wait_procs(workers, timeout=60)
    assert not left


@pytest.mark.cluster
def test_a_scans_own_exit_code_is_the_commands_and_new_files_are_another_attempt(
    tmp_path: Path, head: cluster.Head, write_spec: Callable[..., Path], few: list[dict[str, str]]
) -> None:
    rows = tmp_path / "rows"
    tiny.write_rows(rows / "a.jsonl", [{"text": "the cat sat on a mat"}]).open("a").write("{damaged\n")
    corpus: dict[str, Any] = {"uri": f"{rows}/*.jsonl", "id": None, "metadata": []}
    specs = {
        2: write_spec(tmp_path / "2", saes=few, corpus=corpus | {"text": "no_such"}),
        3: write_spec(tmp_path / "3", saes=few, corpus=corpus),
    }
    options = ("--shared", "--wait", "--workers", "1")
    both = {code: started(head, "submit", str(spec), *options) for code, spec in specs.items()}
    ended = {code: said(process, code) for code, process in both.items()}
    assert "no_such" in ended[2][1]
    assert "1 document could not be scanned" in ended[3][1]

    tiny.write_rows(rows / "b.jsonl", [{"text": "a new fox"}, {"text": "and a dog"}])
    out, err = said(started(head, "submit", str(specs[3]), *options), 3)
    run = pack(str(specs[3]), shared=True).run
    assert (ended[3][0], out) == (f"{run}-a1\n", f"{run}-a2\n")
    assert "attempt 2" in err
    con = queries.connect(str(tmp_path / "3" / "index"))
    assert con.sql("SELECT run, documents FROM runs ORDER BY run").fetchall() == [(1, 1), (2, 2)]

    jobs = listed(head)
    assert len(jobs) == 3
    wrong, first, second = jobs[ended[2][0].strip()], jobs[f"{run}-a1"], jobs[f"{run}-a2"]
    assert [(job["state"], job["exit_code"], job["attempt"]) for job in (wrong, first, second)] == [
        ("failed", 2, 1), ("done", 3, 1), ("done", 3, 2),
    ]  # fmt: skip
    assert "no_such" in wrong["message"]
    assert (first["index"], first["spec"]) == (str(tmp_path / "3" / "index"), str(specs[3]))
    assert first["started"] < first["ended"] <= second["started"]
    printed, _ = said(started(head, "jobs", "logs", f"{run}-a2"))
    assert "run 2: 2 documents" in printed


@pytest.mark.cluster
def test_a_scan_that_is_submitted_twice_stopped_resumed_and_loses_its_head_gives_what_an_inline_one_gives(
    tmp_path: Path, head: cluster.Head, write_spec: Callable[..., Path], tiny_index: Path
) -> None:
    spec, index = write_spec(tmp_path), tmp_path / "index"
    run = pack(str(spec), shared=True).run
    submit = ("submit", str(spec), "--shared", "--workers", "1")

    told = [said(process) for process in [started(head, *submit) for _ in range(2)]]
    first = f"{run}-a1"
    assert {out for out, _ in told} == {f"{first}\n"}
    assert sum("no second job is started" in err for _, err in told) == 1
    assert [job for job in listed(head) if job.startswith(run)] == [first]

    stopped = frozen(head, index, 3)
    waiting = started(head, "jobs", "logs", first, "-f")
    _, err = said(started(head, "jobs", "stop", first))
    assert "submit it again" in err
    said(waiting, Interrupted.exit_code)
    assert listed(head)[first]["state"] == "stopped"
    sign = beat(Store(str(index)))
    assert sign is not None
    assert sign.ended  # the lease was given back
    end(stopped)
    before = commits(index)
    assert 3 <= len(before) < UNITS
    _, err = said(started(head, "jobs", "stop", first))
    assert "is over already" in err

    waiting = started(head, *submit, "--wait")
    stopped = frozen(head, index, len(before) + 3)
    head.kill()
    end(stopped)  # the machine is gone, they with it
    between = commits(index)
    assert {name: between[name] for name in before} == before
    assert len(between) < UNITS
    head.start()
    out, err = said(waiting, Interrupted.exit_code)
    assert out == f"{run}-a2\n"
    assert f"knows no job {run}-a2" in err.splitlines()[-1]  # it is another head at the same address

    out, err = said(started(head, *submit, "--wait"))
    assert out == f"{first}\n"
    assert f"{len(between)} already committed" in err
    after = commits(index)
    assert {name: after[name] for name in between} == between
    assert not tiny.differences(tiny.views(tiny_index), tiny.views(index))
