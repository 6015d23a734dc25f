"""Faults of a cluster: nodes that go and come, workers that end, drivers that are killed, two at once.

Three raylets on this machine, one worker each. Every test ends with an index equal to the undisturbed one,
row for row and key for key.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_resume import ROOT, UNITS, command, commits, environment, kill_after, marked, processes

from pipelines.lease import Lease
from pipelines.storage import Store
from sae_runtime.errors import Interrupted

pytestmark = pytest.mark.cluster

# A node that is gone is noticed within two seconds, not within fifteen.
_HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}


class Machines:
    """A head that runs nothing and nodes of one processor each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.nodes = [self.add() for _ in range(2)]

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=80 << 20)

    def remove(self, node: Any) -> None:
        """As if the power had gone."""
        self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machines, dict[str, str]]]:
    """The cluster, and the environment for its drivers; no process of either outlives the module."""
    home = tmp_path_factory.mktemp("home")
    with marked(home) as env, pytest.MonkeyPatch.context() as patch:
        env |= _HEALTH | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
        for name, value in env.items():
            patch.setenv(name, value)
        found = Machines()
        try:
            yield found, env
        finally:
            found.cluster.shutdown()


def start(spec: Path, address: str, env: dict[str, str], *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(spec, "--address", address, "--workers", "2", *options), cwd=ROOT, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], index: Path, wanted: int) -> None:
    """Until so many units are committed."""
    while len(commits(index)) < wanted:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a driver said on stderr; on stdout Ray itself tells of nodes that are lost."""
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return err


def check(index: Path, undisturbed: Path) -> None:
    assert len(commits(index)) == UNITS
    assert not tiny.differences(tiny.views(undisturbed), tiny.views(index))


def kinds(index: Path) -> list[str]:
    """Kinds of the failures on record."""
    folder = index / "failures"
    return [json.loads(f.read_text())["kind"] for f in folder.iterdir()] if folder.is_dir() else []


def test_nodes_go_and_come_while_a_scan_goes_on(
    tmp_path: Path,
    machines: tuple[Machines, dict[str, str]],
    write_spec: Callable[..., Path],
    tiny_index: Path,
) -> None:
    world, env = machines
    spec, index = write_spec(tmp_path), tmp_path / "index"
    process = start(spec, world.cluster.address, env)
    wait_for(process, index, 3)
    world.remove(world.nodes.pop())
    world.nodes.append(world.add())
    wait_for(process, index, 8)
    world.remove(world.nodes.pop(0))
    world.nodes.append(world.add())
    ended(process)
    check(index, tiny_index)
    assert set(kinds(index)) <= {"infra"}


def test_workers_end_at_chosen_units(
    tmp_path: Path,
    machines: tuple[Machines, dict[str, str]],
    write_spec: Callable[..., Path],
    tiny_index: Path,
) -> None:
    """Every process ends at its eighth unit, when it is committed and nobody has been told."""
    world, env = machines
    spec, index = write_spec(tmp_path), tmp_path / "index"
    job = {"runtime_env": {"env_vars": {"CORPUSCOPE_CRASH": "after-commit:8"}}}  # for the workers
    ended(start(spec, world.cluster.address, env | {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)}))
    check(index, tiny_index)
    assert len(kinds(index)) >= 2
    assert set(kinds(index)) == {"infra"}


def test_a_driver_killed_twice_and_two_at_once(
    tmp_path: Path,
    machines: tuple[Machines, dict[str, str]],
    write_spec: Callable[..., Path],
    scan_inline: Callable[..., Any],
    tiny_index: Path,
) -> None:
    world, env = machines
    spec, index = write_spec(tmp_path), tmp_path / "index"
    kill_after(start(spec, world.cluster.address, env), index, 4)
    before = commits(index)
    second = start(spec, world.cluster.address, env)
    wait_for(second, index, len(before) + 2)
    with pytest.raises(Interrupted, match=f"process {second.pid} on ") as busy:
        Lease(Store(str(index)), print).look()
    assert busy.value.exit_code == 75
    second.send_signal(signal.SIGTERM)
    began = time.monotonic()
    err = ended(second, 75)
    assert time.monotonic() - began < 15
    assert err.splitlines()[-1] == "stopped; run the same command again to go on"
    between = commits(index)
    assert len(before) + 2 <= len(between) < UNITS
    assert not scan_inline(spec).failed  # at once, and another executor may go on
    after = commits(index)
    assert {name: after[name] for name in between} == between
    check(index, tiny_index)


def test_two_drivers_without_a_lease_both_finish(
    tmp_path: Path, write_spec: Callable[..., Path], tiny_index: Path
) -> None:
    """The lease saves work; commits alone keep the index right."""
    spec, index = write_spec(tmp_path), tmp_path / "index"
    code = (
        "import os, sys, time\n"
        "from pipelines.lease import Lease\n"
        "from pipelines.executors import inline\n"
        "Lease.look = Lease.take = Lease.check = lambda self, *_: None\n"
        "Lease.term = os.getpid()\n"
        "init = inline.InlineExecutor.__init__\n"
        "def late(self, *a):\n"
        "    init(self, *a); print('ready', flush=True); sys.stdin.readline()\n"
        "inline.InlineExecutor.__init__ = late\n"
        "from jobs.cli import main; main()"
    )

    def driver() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code, "scan", str(spec), "--executor", "inline"], cwd=ROOT, text=True,
            env=environment(tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    one = driver()
    assert one.stdout is not None
    assert one.stdout.readline() == "ready\n"  # the plan is registered
    two = driver()
    assert two.stdout is not None
    assert two.stdout.readline() == "ready\n"
    for each in (one, two):
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    said = [ended(each) for each in (one, two)]
    check(index, tiny_index)
    scanned = [int(text.split("run 1: ")[-1].split(" document")[0]) for text in said]
    assert sum(scanned) == len(tiny.views(index)["documents"])  # each was counted by one of them


def test_a_worker_that_hangs_is_killed_at_its_deadline_and_its_unit_handed_out_again(
    tmp_path: Path,
    machines: tuple[Machines, dict[str, str]],
    write_spec: Callable[..., Path],
    tiny_index: Path,
) -> None:
    world, env = machines
    spec, index = write_spec(tmp_path), tmp_path / "index"
    code = (
        "from pipelines.scheduler import Policy\n"
        "init = Policy.__init__\n"
        "Policy.__init__ = lambda self: init(self, deadline_least=8.0, loading=60.0, straggler_least=1e9)\n"
        "from jobs.cli import main; main()"
    )
    arguments = ["scan", str(spec), "--address", world.cluster.address, "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for(process, index, 3)
    (worker,) = [p for p in processes(env["CORPUSCOPE_TEST_MARK"]) if "ScanWorker" in p.name()]
    worker.send_signal(signal.SIGSTOP)
    ended(process)
    assert not worker.is_running()
    check(index, tiny_index)
    assert kinds(index) == ["timeout"]
