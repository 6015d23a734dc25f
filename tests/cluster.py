"""A real head on loopback, as `ray start --head` makes one, with the dashboard and its Jobs API.

Invariant: every port is a free one, every file is in a folder of its own, and nothing outlives the `with`:
the head is a process group that is ended as one, and whatever it started elsewhere carries a mark by which
it is found. A head takes some 6 s to answer.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
from test_resume import marked, processes

HOST = "127.0.0.2"  # of the loopback; Ray takes 127.0.0.1 for "find the address that others see"
_START_SECONDS = 90


class Head:
    """A head that can be killed and started again at the same address. `environment` is what it runs in."""

    def __init__(self, env: dict[str, str], log: Path, cpus: int = 2) -> None:
        self.env, self.cpus, self._log = env, cpus, log
        self.folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # names of sockets have 107 bytes
        # Held together until all are known, so that no two are the same.
        with contextlib.ExitStack() as held:
            self.ports = list(itertools.islice(_free(held), 7))
        self.address = f"http://127.0.0.1:{self.ports[1]}"  # of the dashboard
        self.cluster = f"{HOST}:{self.ports[0]}"  # for `scan --address` and more nodes
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the head, and wait until it takes jobs."""
        assert importlib.util.find_spec("aiohttp_cors"), "a dashboard needs pip install 'ray[default]'"
        gcs, dashboard, agent, agent_grpc, metrics, runtime, client = map(str, self.ports)
        options = {
            "--node-ip-address": HOST, "--port": gcs, "--dashboard-host": "127.0.0.1",
            "--dashboard-port": dashboard, "--dashboard-agent-listen-port": agent,
            "--dashboard-agent-grpc-port": agent_grpc, "--metrics-export-port": metrics,
            "--runtime-env-agent-port": runtime, "--ray-client-server-port": client,
            "--min-worker-port": "0", "--max-worker-port": "0", "--include-dashboard": "true",
            "--num-cpus": str(self.cpus), "--num-gpus": "0", "--object-store-memory": str(80 << 20),
            "--temp-dir": str(self.folder),
        }  # fmt: skip
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += ["--disable-usage-stats", *(word for pair in options.items() for word in pair)]
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + _START_SECONDS
        while not self._takes_jobs():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, f"takes no jobs: {self._tail()}"
            time.sleep(0.2)

    def _takes_jobs(self) -> bool:
        """A dashboard answers some seconds before the agent that starts the jobs."""
        agent = f"http://{HOST}:{self.ports[2]}/api/healthz"
        with contextlib.suppress(OSError, urllib.error.URLError):
            for url in (f"{self.address}/api/jobs/", agent):
                with urllib.request.urlopen(url, timeout=5) as answer:
                    assert answer.status == 200
            return True
        return False

    def _tail(self) -> str:
        return self._log.read_text()[-2000:]

    def processes(self) -> list[psutil.Process]:
        """All that runs for this head: its own, workers, jobs."""
        return processes(self.env["CORPUSCOPE_TEST_MARK"])

    def workers(self) -> list[psutil.Process]:
        """The actors that scan."""
        return [p for p in self.processes() if "ScanWorker" in p.name()]

    def kill(self) -> None:
        """As if the power had gone: SIGKILL to the whole group."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        self._process = None

    def close(self) -> None:
        """End the head and what it started."""
        process, self._process = self._process, None
        if process is not None:
            group = process.pid
            os.killpg(group, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(3)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def head(folder: Path, cpus: int = 2, **env: str) -> Iterator[Head]:
    """A head with `folder` as its home and `env` on top of this environment; nothing of it is left behind."""
    more = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # a job's `python`
    }
    with marked(folder) as own:
        found = Head(own | more | env, folder / "head.log", cpus)
        try:
            found.start()
            yield found
        finally:
            found.close()


def _free(held: contextlib.ExitStack) -> Iterator[int]:
    """Ports that are free on every address, and that no connection is given for its own end.

    One of those can be taken before the head binds it, and a head whose agent finds its port taken lives on
    without one: "No available agent to submit job".
    """
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    lowest = int(given.read_text().split()[0]) if given.exists() else 32768
    # Where nearly all are given away there is nothing better than one that is free now.
    ports = range(lowest - 12_000, lowest) if lowest > 14_000 else range(14_000, 26_000)
    for port in random.SystemRandom().sample(ports, 1000):
        sock = held.enter_context(socket.socket())
        with contextlib.suppress(OSError):
            sock.bind(("", port))
            yield port
