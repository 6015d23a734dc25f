"""Scans as jobs of a Ray cluster, by its dashboard's Jobs API: which there are, what they say, how they end.

Invariant: only jobs with our metadata are ours, and an id is never used twice: Ray knows a job by its id
until the cluster ends, and a second one under the id of a job that was deleted dies at once. Nothing here
waits for an answer for ever: Ray's client has no time limits, so every request has one of ours.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import datetime
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

from sae_runtime.errors import CorpuscopeError, InputError, Interrupted, one_line

ID = re.compile(r"(scan-[0-9a-f]{16})-a([1-9]\d*)")
MARK = "corpuscope_run"  # the key of a job's metadata that says it is ours
_AGAIN = "submit it again to go on, committed units stay"
_ENDED = {
    0: "done",
    1: "failed; its log says why",
    2: "the spec or its inputs are wrong; its log says how",
    3: "done, with documents quarantined",
    75: f"ended before all was done; {_AGAIN}",
}  # by the exit code of the scan
_REACH_SECONDS = 10.0
_ANSWER_SECONDS = 60.0
_LOOK_EVERY = 1.0  # seconds between looks at a job that is followed
_AGENT_SECONDS = 60.0  # for a head that just began to have an agent that starts jobs
_AWAY_SECONDS = 60.0  # without an answer, after which a cluster is taken for lost
_PASSWORD = re.compile(r"(://[^/@:]*:)[^/@]*@")
_LINE = 300  # characters of a message
_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_TALKERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)  # they tell of every upload
_NEVER = datetime.datetime.min.replace(tzinfo=datetime.timezone.utc)
_T = TypeVar("_T")


@dataclass(frozen=True)
class ScanJob:
    """A submitted scan as the cluster knows it."""

    id: str  # <run>-a<attempt>
    state: str  # waiting | running | done | failed | stopped | lost
    exit_code: int | None  # the scan's own, once it ended by itself
    index: str
    spec: str
    attempt: int
    started: datetime.datetime | None  # UTC
    ended: datetime.datetime | None
    message: str  # one line; of a job that failed, its last

    @property
    def run(self) -> str:
        """What it scans into what; the same for the same."""
        return self.id.rpartition("-a")[0]

    @property
    def over(self) -> bool:
        return self.state not in ("waiting", "running")


class Jobs:
    """The jobs of the cluster whose dashboard is at `address` (http://HOST:PORT).

    Its own `address` is for people: without a password that a proxy in front of the dashboard may ask for.
    """

    def __init__(self, address: str) -> None:
        """Raises InputError where `address` is none of a dashboard, or nothing answers there."""
        _check_address(address)
        self.address = shown(address.rstrip("/"))
        try:
            self._client: Any = _answered(self.address, lambda: _client(address.rstrip("/")))
        except TimeoutError as error:
            raise InputError(f"--address: {one_line(error)}; is it a Ray dashboard?") from error

    def submit(self, id: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]) -> bool:
        """Start a job on the head; False if the cluster has one of this id. CorpuscopeError if it refuses.

        A head answers some seconds before it can start jobs; it is given a minute.
        """

        def ask() -> None:
            self._ask(
                lambda: self._client.submit_job(
                    submission_id=id,
                    entrypoint=entrypoint,
                    runtime_env=runtime_env,
                    metadata=metadata,
                    entrypoint_num_cpus=0,
                )
            )

        try:
            Retrying(
                retry=retry_if_exception(_without_agent),
                stop=stop_after_delay(_AGENT_SECONDS),
                wait=wait_fixed(_LOOK_EVERY),
                reraise=True,
            )(ask)
        except _Refused as error:
            if "already exists" in str(error):
                return False
            if _without_agent(error):
                raise CorpuscopeError(
                    f"{self.address} starts no jobs: the agent of its head does not answer; "
                    "dashboard_agent.log in Ray's logs there says why"
                ) from error
            raise
        return True

    def every(self) -> list[ScanJob]:
        """The scans that were submitted to the cluster, newest first."""
        found = [_scan_job(job) for job in self._ask(self._client.list_jobs) if _is_ours(job)]
        return sorted(found, key=lambda job: (job.started or _NEVER, job.id), reverse=True)

    def job(self, id: str) -> ScanJob:
        """One of them. Raises InputError if there is none of this id."""
        details = self._details(id)
        if details is None or not _is_ours(details):
            raise InputError(
                f"{id}: no scan of that id was submitted to {self.address}; "
                f"corpuscope jobs --address {self.address} lists them"
            )
        return _scan_job(details)

    def logs(self, id: str) -> str:
        """All that the job has printed. Raises InputError if there is none of this id."""
        self.job(id)
        return str(self._ask(lambda: self._client.get_job_logs(id)))

    def stop(self, id: str) -> None:
        """Ask the job to end; it does so in its own time."""
        self._ask(lambda: self._client.stop_job(id))

    def wait(self, id: str, seconds: float) -> ScanJob:
        """The job once it is over, or as it is after that time."""
        until = time.monotonic() + seconds
        while not (job := self.job(id)).over and time.monotonic() < until:
            time.sleep(_LOOK_EVERY / 2)
        return job

    def follow(self, id: str, show: Callable[[str], None]) -> ScanJob:
        """Give `show` what the job prints, whole lines, until it is over.

        Raises Interrupted when the cluster is lost meanwhile or knows the job no more.
        """
        return asyncio.run(_Follower(self, self._client, id, show).run())

    def exit_code(self, id: str) -> tuple[int, str]:
        """(exit code, why) of a job that is over: the scan's own code, 75 where it was ended by others."""
        job, code = self.job(id), Interrupted.exit_code
        if job.exit_code in _ENDED:
            return job.exit_code, _ENDED[job.exit_code]
        if job.state == "stopped":
            return code, f"stopped; {_AGAIN}"
        if job.state == "lost":
            return code, f"lost by the cluster ({job.message}); {_AGAIN}"
        if job.exit_code is None:
            return CorpuscopeError.exit_code, f"could not be started: {job.message}"
        if job.exit_code == 127:
            return CorpuscopeError.exit_code, (
                "could not be started: the head has no `python` on its PATH; put Ray's environment there "
                "where `ray start` runs"
            )
        how = f"ended with exit code {job.exit_code}"
        if job.exit_code < 0:
            how = f"was killed by signal {-job.exit_code}"
        return CorpuscopeError.exit_code, f"{how}: {job.message}"

    def _details(self, id: str) -> Any:
        """Ray's record of a job; None if there is none."""
        if not re.fullmatch(r"[\w.-]+", id):  # it becomes part of a URL
            return None
        try:
            return self._ask(lambda: self._client.get_job_info(id))
        except _Refused as error:
            if "does not exist" in str(error):
                return None
            raise

    def _ask(self, request: Callable[[], _T]) -> _T:
        """The answer to a request. Raises _Refused for an answer that is a no, Interrupted for none."""
        try:
            return _answered(self.address, request)
        except OSError as error:
            raise Interrupted(
                f"{self.address} does not answer any more ({one_line(error)}); run again when it does"
            ) from error
        except Exception as error:  # an answer that is a no has errors of Ray's, pydantic's and Python's own
            raise _Refused(f"{self.address}: {_cause(error)}") from error


class _Refused(CorpuscopeError):
    """The cluster answered that it will not."""


class _Follower:
    """One job's log by the dashboard's web socket, which begins anew after each break."""

    def __init__(self, jobs: Jobs, client: Any, id: str, show: Callable[[str], None]) -> None:
        self._jobs, self._client, self._id, self._show = jobs, client, id, show
        self._taken = 0  # characters of the log
        self._line = ""  # the last one, not ended yet

    async def run(self) -> ScanJob:
        stream = asyncio.create_task(self._stream())
        heard = time.monotonic()
        while True:
            await asyncio.wait({stream}, timeout=_LOOK_EVERY)
            try:
                job = await asyncio.to_thread(self._jobs.job, self._id)
            except Interrupted:
                if time.monotonic() - heard > _AWAY_SECONDS:
                    stream.cancel()
                    raise
                continue
            except InputError as error:
                stream.cancel()
                raise _lost(self._jobs.address, self._id) from error
            heard = time.monotonic()
            if job.over:
                await asyncio.wait({stream}, timeout=4 * _LOOK_EVERY)
                stream.cancel()
                self._rest()
                return job
            if stream.done():  # not yet begun, or broken off
                await asyncio.sleep(_LOOK_EVERY / 2)
                stream = asyncio.create_task(self._stream())

    async def _stream(self) -> None:
        import aiohttp

        seen = 0
        try:
            async for text in self._client.tail_job_logs(self._id):
                new = text[max(0, self._taken - seen) :]
                seen += len(text)
                self._taken = max(self._taken, seen)
                self._take(new)
        except (OSError, RuntimeError, aiohttp.ClientError):
            return  # whether the job lives is asked for, not heard here

    def _take(self, text: str) -> None:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._show(line.expandtabs(4))

    def _rest(self) -> None:
        """What the stream did not bring, as it broke off or the job was over before it began."""
        try:
            text = self._jobs.logs(self._id)
        except CorpuscopeError:  # the job's end is known, its words are lost with its node
            text = ""
        self._take(text[self._taken :])
        if self._line:
            self._take("\n")


def _client(address: str) -> Any:
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise InputError("Ray is not installed; pip install 'ray[default]'") from error
    for name in _TALKERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    with _without(*_OVERRIDES):
        try:
            return JobSubmissionClient(address)
        except Exception as error:  # Ray's own, requests' and JSON's; each is about the address
            text = _cause(error).replace(address, shown(address))
            address = shown(address)
            if type(error).__name__ == "AuthenticationError":
                raise InputError(f"--address: {address} asks who you are: {text}") from error
            if "ray[default]" in text:
                raise InputError(
                    "Ray's jobs client is not installed whole; pip install 'ray[default]'"
                ) from error
            raise InputError(
                f"--address: no Ray dashboard answers at {address} ({text}); its port is 8265 unless "
                "`ray start --dashboard-port` says otherwise, and 6379 is another one"
            ) from error


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Ray has the environment's address win over the one that it is given."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ |= before


def shown(address: str) -> str:
    """A URL as messages have it, which end in logs: a password in it is left out."""
    return _PASSWORD.sub(r"\1…@", address)


def _check_address(address: str) -> None:
    """InputError for what is no dashboard's URL, or where nothing listens."""
    try:
        parts = urlsplit(address)
        address = shown(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        address = shown(address)
        raise InputError(f"--address: {address} is not a URL: {one_line(error)}") from error
    if parts.scheme not in ("http", "https") or not host:
        named = re.fullmatch(r"(?:ray://)?([^:/]+)(?::\d+)?/?", address)
        example = named[1] if named and named[1] != "auto" else "HOST"
        raise InputError(
            f"--address: {address} is not a dashboard's URL; jobs are submitted to it, not to the cluster's "
            f"own port: http://{example}:8265"
        )
    try:
        socket.create_connection(
            (host, port or (443 if parts.scheme == "https" else 80)), _REACH_SECONDS
        ).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--address: nothing listens at {address} ({one_line(error)}); the dashboard's port is 8265 "
            "unless `ray start` says otherwise, and it needs ray[default] on the head"
        ) from error


def _answered(address: str, request: Callable[[], _T]) -> _T:
    """The answer to a request, within a minute. A thread that is given up does not hold the process up."""
    answer: concurrent.futures.Future[_T] = concurrent.futures.Future()

    def ask() -> None:
        try:
            answer.set_result(request())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=ask, name="ray-jobs", daemon=True).start()
    try:
        return answer.result(_ANSWER_SECONDS)
    except concurrent.futures.TimeoutError as error:
        raise TimeoutError(f"{address}: no answer for {_ANSWER_SECONDS:.0f} s") from error


def _without_agent(error: BaseException) -> bool:
    """Of a head that just began; for good where its agent found its port taken."""
    return isinstance(error, _Refused) and "No available agent" in str(error)


def _is_ours(details: Any) -> bool:
    return bool(details.submission_id) and MARK in (details.metadata or {})


def _scan_job(details: Any) -> ScanJob:
    metadata = details.metadata
    match = ID.fullmatch(details.submission_id)
    return ScanJob(
        id=details.submission_id,
        state=_state(details),
        exit_code=details.driver_exit_code,
        index=metadata.get("corpuscope_index", ""),
        spec=metadata.get("corpuscope_spec", ""),
        attempt=int(match[2]) if match else 0,
        started=_time(details.start_time),
        ended=_time(details.end_time),
        message=_last_line(details.message or ""),
    )


def _state(details: Any) -> str:
    """In our words: to Ray every exit code but 0 is a failure."""
    if details.status.value == "FAILED":
        if details.driver_exit_code is None:
            return "lost" if str(details.error_type or "").startswith("JOB_SUPERVISOR") else "failed"
        return {3: "done", 75: "stopped"}.get(details.driver_exit_code, "failed")
    words = {"PENDING": "waiting", "RUNNING": "running", "SUCCEEDED": "done", "STOPPED": "stopped"}
    return words[details.status.value]


def _time(milliseconds: int | None) -> datetime.datetime | None:
    if not milliseconds:
        return None
    return datetime.datetime.fromtimestamp(milliseconds // 1000, datetime.timezone.utc)


def _cause(error: BaseException) -> str:
    """One line of an error; of one that quotes the head's traceback, what that ends with."""
    text = str(error)
    return _last_line(text.rstrip(". \n")) if "Traceback" in text else one_line(error)


def _last_line(text: str) -> str:
    """The last line that says something; Ray's own first one may come late, and then last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith("Running entrypoint for job")]
    last = said[-1] if said else ""
    return last if len(last) <= _LINE else last[: _LINE - 1] + "…"


def _lost(address: str, id: str) -> Interrupted:
    return Interrupted(
        f"{address} knows no job {id} any more: its head was lost, and another one runs there; submit again, "
        "committed units stay"
    )
