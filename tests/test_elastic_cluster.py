"""A real cluster that grows and shrinks while a scan goes on, and one of two kinds of machines.

The driver stops at chosen commits until the test has changed the cluster, so that nothing hangs on who is
faster. A machine of another kind is one whose processes are told to use fewer instructions.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from test_chaos import Machines, check, kinds, machines  # noqa: F401
from test_resume import ROOT, UNITS, commits

from pipelines import devices
from pipelines.storage import Store
from sae_runtime.device import device_model

pytestmark = pytest.mark.cluster

Cluster = tuple[Machines, dict[str, str]]
# Prints (process, workers that there are or are asked for) of each unit; stops after those it is told, and
# then waits until so many workers have answered as it is told. It goes in rounds, so that nobody is left out.
_DRIVER = """
import json, sys
from pipelines.executors import drive
stops = {int(n) for n in sys.argv.pop(1).split(",")}
settle, done = drive.Drive._settle, 0
def settled(self, reference, attempt):
    global done
    slot = self._crew._slots[attempt.worker]
    settle(self, reference, attempt)
    done += 1
    print(json.dumps([slot.process[1], len(self._crew._slots)]), flush=True)
    if done in stops:
        print("stopped", flush=True)
        if (newcomers := int(sys.stdin.readline()) - self._crew.joined) > 0:
            self._ray.wait([*self._crew.waiting], num_returns=newcomers, timeout=90)
    if self._flying:
        self._ray.wait([*self._flying], num_returns=len(self._flying), timeout=90)
drive.Drive._settle = settled
from jobs.cli import main; main()
"""


class Driver:
    """A scan without --workers that stops after some units."""

    def __init__(self, spec: Path, cluster: Cluster, *stops: int) -> None:
        world, self.env = cluster
        command = [sys.executable, "-c", _DRIVER, ",".join(map(str, stops or (-1,)))]
        self.process = subprocess.Popen(
            [*command, "scan", str(spec), "--address", world.cluster.address], cwd=ROOT, env=self.env,
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.units: list[tuple[str, int]] = []  # process, workers that there are or are asked for

    def until_stopped(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line == "stopped\n":
                return
            self._take(line)
        raise AssertionError(self.process.communicate())

    def go_on(self, workers: int = 0) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{workers}\n")
        self.process.stdin.flush()

    def end(self, code: int = 0) -> str:
        out, err = self.process.communicate(timeout=120)
        assert self.process.returncode == code, err
        assert "Traceback" not in err
        for line in out.splitlines():
            self._take(line)
        return err

    def _take(self, line: str) -> None:
        if line.startswith("["):  # Ray tells of nodes that are lost between them
            process, slots = json.loads(line)
            self.units.append((process, slots))


@pytest.fixture
def one(machines: Cluster) -> Iterator[Cluster]:  # noqa: F811
    """The cluster with one machine; it has that many again afterwards."""
    world, _ = machines
    while len(world.nodes) > 1:
        world.remove(world.nodes.pop())
    yield machines
    while len(world.nodes) > 1:
        world.remove(world.nodes.pop())


def other(world: Machines) -> Any:
    """One more machine, of another kind."""
    world.nodes.append(
        world.cluster.add_node(
            num_cpus=1, object_store_memory=80 << 20, env_vars={"ATEN_CPU_CAPABILITY": "default"}
        )
    )
    return world.nodes[-1]


def running(processes: Iterable[str]) -> int:
    """How many are there and no zombies."""
    found = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += psutil.Process(int(process)).status() != psutil.STATUS_ZOMBIE
    return found


def until_fewer(processes: Iterable[str], than: int) -> None:
    end = time.monotonic() + 60
    while running(processes) >= than:
        assert time.monotonic() < end
        time.sleep(0.1)


def test_machines_that_come_are_used_and_one_that_goes_is_survived(
    tmp_path: Path, one: Cluster, write_spec: Callable[..., Path], tiny_index: Path
) -> None:
    world, _ = one
    driver = Driver(write_spec(tmp_path), one, 3, 12)
    driver.until_stopped()
    assert {slots for _, slots in driver.units} <= {UNITS, UNITS - 1, UNITS - 2}  # what waits is the demand
    assert len({process for process, _ in driver.units}) == 1
    world.nodes += [world.add(), world.add()]
    driver.go_on(workers=3)
    driver.until_stopped()
    workers = {process for process, _ in driver.units}
    assert running(workers) == 3
    world.remove(world.nodes.pop())
    until_fewer(
        workers, 3
    )  # a worker outlives its machine's raylet by a moment, in which it may do all the rest
    driver.go_on()
    err = driver.end()
    assert "1 worker now, as many as the cluster gets" in err
    assert len({process for process, _ in driver.units}) >= 3
    assert driver.units[-1][1] <= 2  # nothing waits for a machine any more
    check(tmp_path / "index", tiny_index)
    assert set(kinds(tmp_path / "index")) <= {"infra"}


def test_a_machine_of_another_kind_is_not_used_unless_the_spec_allows_it(
    tmp_path: Path, one: Cluster, write_spec: Callable[..., Path], tiny_index: Path
) -> None:
    world, _ = one
    here, alone, mixed = device_model("cpu"), tmp_path / "alone", tmp_path / "mixed"
    driver = Driver(write_spec(alone), one, 1)
    driver.until_stopped()
    other(world)
    driver.go_on(workers=2)
    err = driver.end()
    [note] = [line for line in err.splitlines() if "is not used" in line]
    assert "(DEFAULT" in note
    assert f"the index's {here}; `model.mixed_devices: true`" in note
    check(alone / "index", tiny_index)
    assert {commit["device"] for commit in commits(alone / "index").values()} == {here}

    driver = Driver(write_spec(mixed, model={"mixed_devices": True}), one, 1)
    driver.until_stopped()
    driver.go_on(workers=2)
    err = driver.end()
    used = {commit["device"] for commit in commits(mixed / "index").values()}
    assert len(used) == 2
    assert used == set(devices.recorded(Store(str(mixed / "index"))))
    assert err.count("warning: devices are mixed (") == 1
    assert tiny.views(mixed / "index")["documents"] == tiny.views(tiny_index)["documents"]


def test_a_scan_ends_with_one_line_where_no_machine_may_scan(
    tmp_path: Path, one: Cluster, write_spec: Callable[..., Path]
) -> None:
    index = tmp_path / "index"
    devices.record(Store(str(index)), "NVIDIA H200", 1, alone=True)
    err = Driver(write_spec(tmp_path), one).end(2)
    assert err.splitlines()[-1].startswith("error: no worker may scan: the worker on ")
    assert "the index's NVIDIA H200; `model.mixed_devices: true`" in err.splitlines()[-1]
    assert commits(index) == {}
