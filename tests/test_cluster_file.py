"""`ray_cluster.yaml` by Ray's own rules: schema, command line, environment, autoscaler; no cloud is called.

Commands that a machine would run are run here, in a temporary home, with something else in Ray's place.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from autoscaling import launched

from jobs.specfile import load_spec
from pipelines import lease
from pipelines.scheduler import Policy

ROOT = Path(__file__).parent.parent
CONFIG = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
TYPES = CONFIG["available_node_types"]
HEAD = TYPES[CONFIG["head_node_type"]]
WORKERS = {name: kind for name, kind in TYPES.items() if name != CONFIG["head_node_type"]}
ACTOR = {"CPU": 2.0, "GPU": 1.0}  # what `pipelines/executors/ray.py` asks for, at the default of `threads`


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """The file with Ray's defaults filled in, accepted by Ray's schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    full: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(full)
    return full


@pytest.fixture(scope="module")
def full() -> dict[str, Any]:
    return prepared(CONFIG)


def test_ray_refuses_a_key_it_does_not_know():
    from jsonschema.exceptions import ValidationError

    with pytest.raises(ValidationError):
        prepared({**CONFIG, "no_such_key": 1})
    with pytest.raises(ValidationError):
        prepared({**CONFIG, "available_node_types": {**TYPES, "gpu-spot": {**TYPES["gpu-spot"], "spot": 1}}})


def test_no_work_lands_on_the_head_and_it_is_not_spot():
    assert HEAD["resources"] == {"CPU": 0, "GPU": 0}
    assert (HEAD["min_workers"], HEAD["max_workers"]) == (0, 0)
    assert "InstanceMarketOptions" not in HEAD["node_config"]


def test_workers_come_from_none_go_when_idle_and_share_one_limit(full):
    for kind in WORKERS.values():
        assert kind["min_workers"] == 0
        assert kind["idle_timeout_s"] > 0
        assert kind["max_workers"] <= full["max_workers"]
        assert kind["resources"]["GPU"] == 1
    assert full["max_workers"] <= sum(kind["max_workers"] for kind in WORKERS.values())


def test_the_fallback_differs_from_spot_in_the_market_and_in_what_waiting_costs():
    spot, other = copy.deepcopy(TYPES["gpu-spot"]), copy.deepcopy(TYPES["gpu-on-demand"])
    assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot.pop("priority") > other.pop("priority")
    assert spot.pop("idle_timeout_s") >= other.pop("idle_timeout_s")
    assert (spot.pop("labels"), other.pop("labels")) == ({"market": "spot"}, {"market": "on-demand"})
    assert spot == other


def test_every_machine_has_one_image_and_an_instance_profile():
    # Ray makes a profile for a head that names none, and none for workers: they could not read the bucket.
    assert {kind["node_config"]["ImageId"] for kind in TYPES.values()} == {CONFIG["metadata"]["image"]}
    profiles = {name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in TYPES.items()}
    assert profiles["gpu-spot"] == profiles["gpu-on-demand"] != profiles["head"]


def test_nothing_in_the_file_is_secret():
    text = (ROOT / "ray_cluster.yaml").read_text()
    assert not re.search(r"AKIA|aws_secret|AWS_SECRET|AWS_ACCESS_KEY_ID=|HF_TOKEN=|hf_[A-Za-z0-9]{20}", text)


def test_only_code_is_mounted():
    mounted = {
        remote.removeprefix("~/corpuscope/"): ROOT / here for remote, here in CONFIG["file_mounts"].items()
    }
    for name, here in mounted.items():
        assert here.exists(), name
    files = [file for here in mounted.values() for file in ([here] if here.is_file() else here.rglob("*"))]
    code = [file for file in files if file.is_file() and "__pycache__" not in file.parts]
    pages = {".html", ".css", ".js", ".svg"}
    assert {file.suffix for file in code} <= {".py", ".sql", ".yaml", ".toml", ".txt", ".md"} | pages
    assert sum(file.stat().st_size for file in code) < 8 * 2**20
    # What `pip install -e` on a machine needs.
    project = (ROOT / "pyproject.toml").read_text()
    packages = {
        name.split(".")[0] for name in re.findall(r'"([a-z_.]+)"', _line(project, 'packages = ["sae'))
    }
    assert packages | {"pyproject.toml", "README.md", "constraints.txt"} == set(mounted)


def _line(text: str, beginning: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(beginning))


def test_versions_are_those_of_the_environment():
    pins = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^;\s]+)", (ROOT / "constraints.txt").read_text(), re.M))
    commands = "\n".join(CONFIG["setup_commands"])
    assert f"torch=={pins['torch']}" in commands
    assert f"ray[default]=={pins['ray']}" in commands
    assert commands.count("-c ~/corpuscope/constraints.txt") == commands.count("pip install")


# --- commands, run


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], dict[str, str]]]:
    """(arguments, environment) that `ray` gets on head and worker when a machine runs the file's commands."""
    home = tmp_path_factory.mktemp("home")
    (home / "venv/bin").mkdir(parents=True)
    ray = home / "venv/bin/ray"
    ray.write_text(
        f"#!{shutil.which('python3')}\n"
        "import json, os, sys\n"
        "call = json.dumps([sys.argv[1:], dict(os.environ)])\n"
        "open(os.path.expanduser('~/called'), 'a').write(call + '\\n')\n"
    )
    ray.chmod(0o755)
    environment = {"HOME": str(home), "PATH": os.environ["PATH"]}
    writes = [command for command in CONFIG["setup_commands"] if "> ~/ray.env" in command]
    assert len(writes) == 1
    found = {}
    for kind in ("head", "worker"):
        (home / "called").unlink(missing_ok=True)
        for command in [*writes, *CONFIG[f"{kind}_start_ray_commands"]]:
            # As Ray's launcher has it: in a shell of its own, with these two set.
            line = f"export OMP_NUM_THREADS=1 RAY_HEAD_IP=10.0.0.1; {command}"
            subprocess.run(["bash", "-c", line], env=environment, check=True, timeout=60)
        calls = [json.loads(line) for line in (home / "called").read_text().splitlines()]
        assert [arguments[0] for arguments, _ in calls] == ["stop", "start"]
        found[kind] = (calls[1][0], calls[1][1])
    return found


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_ray_start_takes_every_flag(started, kind):
    from ray.scripts.scripts import start

    arguments, _ = started[kind]
    given = start.make_context("start", arguments[1:]).params
    assert given["object_store_memory"] == 2**28
    assert given["metrics_export_port"] == 8080
    if kind == "head":
        assert given["head"]
        assert given["autoscaling_config"].endswith("ray_bootstrap_config.yaml")
        # Whoever reaches the job server can run code: it listens to the machine itself.
        assert (given["dashboard_host"], given["dashboard_port"]) == ("127.0.0.1", 8265)
    else:
        assert given["address"] == "10.0.0.1:6379"


def test_head_and_workers_have_one_environment_and_no_thread_limit(started):
    (_, head), (_, worker) = started["head"], started["worker"]
    assert head == worker
    assert "OMP_NUM_THREADS" not in head
    assert {name for name in head if name.startswith("RAY_")} == {*ray_variables(), "RAY_HEAD_IP"}


def ray_variables() -> dict[str, str]:
    text = next(command for command in CONFIG["setup_commands"] if "> ~/ray.env" in command)
    return {name: value for name, value in re.findall(r"(\w+)=(\S+)", text) if name.startswith("RAY_")}


def known_to_ray(name: str) -> bool:
    """Whether the installed Ray reads the variable: in its Python, or spelt out in a program of its core."""
    import ray
    import ray._private.ray_constants as constants

    folder = Path(ray.__file__).parent
    setting = name.removeprefix("RAY_")
    if hasattr(ray._config, setting) or hasattr(constants, name):
        return True
    if any(
        f'"{name}"' in file.read_text()
        for part in ("dashboard/modules/job", "autoscaler", "_common/usage")
        for file in (folder / part).rglob("*.py")
    ):
        return True
    return name.encode() in (folder / "core/src/ray/raylet/raylet").read_bytes()


@pytest.mark.parametrize("name", sorted(ray_variables()))
def test_the_installed_ray_reads_each_variable(name):
    assert known_to_ray(name)
    assert not known_to_ray(f"{name}_x")


def test_health_checks_are_rays_own():
    import ray

    spelt = {name: value for name, value in ray_variables().items() if "health_check" in name}
    assert len(spelt) == 4
    for name, value in spelt.items():
        assert getattr(ray._config, name.removeprefix("RAY_"))() == int(value), name


# --- the page


PAGE = (ROOT / "docs/CLUSTER.md").read_text()


def test_the_page_explains_every_flag_variable_and_key(started):
    flags = {part.split("=")[0] for arguments, _ in started.values() for part in arguments[1:]}
    keys = {
        "max_workers",
        "upscaling_speed",
        "idle_timeout_minutes",
        "idle_timeout_s",
        "priority",
        "VolumeSize",
    }
    for name in {*flags - {"--head", "--address"}, *ray_variables(), *keys}:
        assert f"`{name}`" in PAGE, name
    rows = {name.strip("` "): value for name, value in re.findall(r"^\| ([^|]+) \| ([^|]+) \|", PAGE, re.M)}
    assert rows["max_workers"].startswith(f"{CONFIG['max_workers']},")
    assert float(rows["upscaling_speed"]) == CONFIG["upscaling_speed"]
    assert rows["VolumeSize"].startswith(
        f"{HEAD['node_config']['BlockDeviceMappings'][0]['Ebs']['VolumeSize']} GB"
    )
    spot, other = WORKERS["gpu-spot"], WORKERS["gpu-on-demand"]
    assert rows["priority"] == f"{spot['priority']} spot, {other['priority']} on demand"
    assert rows["idle_timeout_s"] == f"{spot['idle_timeout_s']} spot, {other['idle_timeout_s']} on demand"
    for machine in (HEAD, spot):
        assert machine["node_config"]["InstanceType"] in PAGE
    assert CONFIG["metadata"]["image"] in PAGE


def test_variables_of_the_page_are_rays():
    named = set(re.findall(r"\bRAY_[A-Za-z_]+[a-zA-Z]\b", PAGE))
    assert len(named) > 8
    assert not {name for name in named if not known_to_ray(name)}


def test_times_of_the_page_are_the_leases_and_the_schedulers():
    told = re.sub(r"\s+", " ", PAGE)
    assert f"watching for {lease.STALE:.0f} s whether it lives" in told
    assert f"comes every {lease.EVERY:.0f} s, must stand still for {lease.STALE:.0f} s" in told
    assert f"up to {lease._RECENT:.0f} s" in told
    assert f"fails for good after {Policy().infrastructure_tries} such losses" in told
    assert f"given up after {Policy().task_tries} tries" in told
    assert Policy().memory_tries == 3  # "tried twice more"


def test_the_spec_of_the_page_is_a_spec(tmp_path):
    [text] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "spec.yaml").write_text(text)
    spec, _ = load_spec(str(tmp_path / "spec.yaml"))
    assert (spec.model.device, spec.index) == ("cuda", "s3://my-bucket/index")


# --- what Ray's autoscaler makes of it


def test_a_scan_gets_spot_machines_first_then_the_others_within_the_limit(full):
    most = full["max_workers"]
    assert launched(full, 0, ACTOR) == {}
    assert launched(full, 3, ACTOR) == {"gpu-spot": 3}
    assert launched(full, most + 5, ACTOR) == {"gpu-spot": most}
    roomy = {**full, "max_workers": most + 2}
    assert launched(roomy, most + 5, ACTOR) == {"gpu-spot": most, "gpu-on-demand": 2}


def test_a_machine_that_never_came_up_turns_ray_to_the_fallback(full):
    assert launched(full, 3, ACTOR, (("gpu-spot", "ALLOCATION_TIMEOUT"),)) == {"gpu-on-demand": 3}


def test_a_launch_that_aws_refuses_does_not(full):
    """What docs/CLUSTER.md warns of. When this fails, Ray has learnt it, and the page is to say so."""
    assert launched(full, 3, ACTOR, (("gpu-spot", "ALLOCATION_FAILED"),)) == {"gpu-spot": 3}


def test_the_remedy_of_the_page_works(full):
    changed = copy.deepcopy(full)
    changed["available_node_types"]["gpu-on-demand"]["priority"] = 20
    assert launched(changed, 3, ACTOR) == {"gpu-on-demand": 3}
    # Actors that ask for a market by label are given it, whatever the priorities are.
    assert launched(full, 3, ACTOR, market="on-demand") == {"gpu-on-demand": 3}


# --- Ray itself, on loopback


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


LOOK = """
import json, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
@ray.remote(num_cpus=2, num_gpus=1)
class Actor:
    def seen(self):
        import os
        return dict(os.environ)
found = ray.get(Actor.remote().seen.remote(), timeout=90)
nodes = [[n["Resources"].get("CPU", 0), n["Resources"].get("GPU", 0)] for n in ray.nodes() if n["Alive"]]
print(json.dumps([nodes, found]))
"""


@pytest.mark.cluster
def test_ray_starts_as_the_file_says_and_an_actor_lands_on_the_worker(started, tmp_path):
    port, folder = free_port(), tempfile.mkdtemp(prefix="r", dir="/tmp")
    shared = {
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
    }
    processes = []
    try:
        for kind, machine in (("head", HEAD), ("worker", WORKERS["gpu-spot"])):
            arguments, environment = started[kind]
            own = [
                a
                for a in arguments
                if not a.startswith(("--autoscaling", "--port", "--address", "--dashboard"))
            ]
            own = [
                a for a in own if not a.startswith(("--object-manager-port", "--metrics"))
            ]  # may be taken here
            own += [f"--port={port}", "--include-dashboard=false"] if kind == "head" else []
            own += [] if kind == "head" else [f"--address=127.0.0.1:{port}"]
            own += ["--node-ip-address=127.0.0.1", "--block"]
            own += [f"--temp-dir={folder}"] if kind == "head" else []
            override = {"RAY_OVERRIDE_RESOURCES": json.dumps(machine["resources"])}  # as Ray's launcher does
            with open(tmp_path / kind, "wb") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "ray.scripts.scripts", *own],
                        env=environment | shared | override,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
            wait_for_port(port, processes[0])
        looked = subprocess.run(
            [sys.executable, "-c", LOOK, f"127.0.0.1:{port}"],
            env=shared,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert looked.returncode == 0, looked.stderr + (tmp_path / "worker").read_text()
        nodes, environment = json.loads(looked.stdout.splitlines()[-1])
        assert sorted(nodes) == [[0, 0], [16, 1]]
        assert {name: environment.get(name) for name in ray_variables()} == ray_variables()
        assert environment["CORPUSCOPE_CACHE"].startswith("/opt/dlami/nvme/")
        assert environment["OMP_NUM_THREADS"] == "2"  # what the actor asked for, not the launcher's 1
    finally:
        for process in reversed(processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + 90
    while time.monotonic() < limit and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise AssertionError("the head did not come up")
