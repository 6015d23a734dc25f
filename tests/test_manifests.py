"""Kubernetes manifests: the fields that KubeRay knows, what Ray reads of them, and the script on the head."""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from autoscaling import launched
from kuberay import SCHEMAS
from test_cluster_file import ACTOR, CONFIG, ray_variables

from jobs import manifests
from jobs.manifests import ENTRYPOINT, Settings, dump, raycronjob, rayjob
from jobs.specfile import load_spec
from sae_runtime.errors import InputError

FOLDER = Path(manifests.__file__).parent / "kubernetes"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


SPEC_TEXT = documents("rayjob.yaml")[0]["data"]["spec.yaml"]
NIGHTLY = ("corpuscope-nightly", "0 3 * * *", "Europe/Berlin", ENTRYPOINT, SPEC_TEXT)


def check(item: dict[str, Any]) -> None:
    jsonschema.validate(item, SCHEMAS[item["kind"]])


def cluster_of(item: dict[str, Any]) -> dict[str, Any]:
    job = item["spec"]["jobTemplate"] if item["kind"] == "RayCronJob" else item["spec"]
    cluster: dict[str, Any] = job["rayClusterSpec"]
    return cluster


def test_the_examples_are_what_the_functions_give():
    assert rayjob("corpuscope-scan", ENTRYPOINT, SPEC_TEXT)["items"] == documents("rayjob.yaml")
    assert raycronjob(*NIGHTLY)["items"] == documents("raycronjob.yaml")
    assert list(yaml.safe_load_all(dump(raycronjob(*NIGHTLY)))) == documents("raycronjob.yaml")


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml"])
def test_every_field_is_one_of_kuberays(name):
    for item in documents(name):
        check(item)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "backOffLimit"), 2),
        (("spec", "backoffLimit"), "2"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplicas"), None),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "restart_policy"), "Never"),
        (("spec", "submissionMode"), "K8SJobMode"),
        (("spec", "concurrencyPolicy"), "Forbid"),
    ],
)
def test_a_wrong_field_or_type_is_noticed(path, value):
    item = copy.deepcopy(documents("rayjob.yaml")[1])
    place = item
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(item)


def test_a_cron_job_has_no_concurrency_policy_to_set():
    item = copy.deepcopy(documents("raycronjob.yaml")[1])
    item["spec"]["concurrencyPolicy"] = "Forbid"
    with pytest.raises(jsonschema.ValidationError):
        check(item)


def test_the_example_spec_is_a_spec(tmp_path):
    (tmp_path / "spec.yaml").write_text(SPEC_TEXT)
    spec, _ = load_spec(str(tmp_path / "spec.yaml"))
    assert spec.model.device == "cuda"
    assert spec.index == "s3://my-bucket/index"


def test_the_spec_travels_whole_and_another_spec_is_another_config_map():
    text = "# Straße: a comment stays\n" + SPEC_TEXT
    script, job = rayjob("scan", ENTRYPOINT, text)["items"]
    assert script["data"]["spec.yaml"] == text
    assert (
        yaml.safe_load(dump(rayjob("scan", ENTRYPOINT, text)).split("---\n")[0])["data"]["spec.yaml"] == text
    )
    volumes = cluster_of(job)["headGroupSpec"]["template"]["spec"]["volumes"]
    assert {"name": "spec", "configMap": {"name": script["metadata"]["name"]}} in volumes
    other = rayjob("scan", ENTRYPOINT, SPEC_TEXT)["items"][0]
    assert other["metadata"]["name"] != script["metadata"]["name"]
    assert rayjob("scan", ENTRYPOINT, text)["items"][0] == script


def test_settings_reach_every_pod():
    settings = Settings(
        image="registry.example.com/other:1",
        namespace="research",
        service_account="reader",
        machines=64,
        spot=("karpenter.sh/capacity-type", "spot"),
    )
    for item in raycronjob(*NIGHTLY, settings)["items"]:
        check(item)
        assert item["metadata"]["namespace"] == "research"
    cluster = cluster_of(item)
    spot, other = cluster["workerGroupSpecs"]
    for group in (cluster["headGroupSpec"], spot, other):
        pod = group["template"]["spec"]
        assert pod["serviceAccountName"] == "reader"
        assert [each["image"] for each in pod["containers"]] == ["registry.example.com/other:1"]
    assert (spot["maxReplicas"], other["maxReplicas"]) == (64, 64)
    assert spot["template"]["spec"]["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}
    assert "gke" not in yaml.safe_dump(cluster)


@pytest.mark.parametrize("name", ["Scan", "my_scan", "9scan", "scan-", "", "x" * 48, "a.b"])
def test_a_name_that_kubernetes_refuses(name):
    with pytest.raises(InputError, match="Kubernetes name"):
        rayjob(name, ENTRYPOINT, SPEC_TEXT)


def test_what_a_schedule_may_not_be():
    with pytest.raises(InputError, match="no time zone in the cron line"):
        raycronjob("scan", "CRON_TZ=Europe/Berlin 0 3 * * *", "Europe/Berlin", ENTRYPOINT, SPEC_TEXT)
    with pytest.raises(InputError, match="at most 36"):
        raycronjob("x" * 37, "0 3 * * *", "UTC", ENTRYPOINT, SPEC_TEXT)


@pytest.mark.parametrize("text", ["model: {uri: m}", "model: {uri: m, device: cpu}", "model: m", "[", ""])
def test_a_spec_that_would_not_wait_for_gpus(text):
    with pytest.raises(InputError, match=r"device: cuda|cannot be read") as caught:
        rayjob("scan", ENTRYPOINT, text)
    assert "\n" not in str(caught.value)


def test_the_example_of_the_page_runs(tmp_path, monkeypatch, capsys):
    [code] = re.findall(
        r"```python\n(.*?)```", (FOLDER.parent.parent / "docs/CLUSTER.md").read_text(), re.DOTALL
    )
    (tmp_path / "spec.yaml").write_text(SPEC_TEXT)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "CLUSTER.md", "exec"), {})
    for item in yaml.safe_load_all(capsys.readouterr().out):
        check(item)


# --- what Ray makes of them


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml"])
def test_rays_autoscaler_reads_the_cluster(name):
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = cluster_of(documents(name)[1])
    config = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "c", "namespace": "n"}, "spec": cluster}
    )
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    for kind in ("gpu-spot", "gpu-on-demand"):
        assert types[kind]["resources"]["GPU"] == 1
        assert types[kind]["idle_timeout_s"] == CONFIG["available_node_types"][kind]["idle_timeout_s"]
        assert types[kind]["min_workers"] == 0
    assert launched(config, 3, ACTOR) == {"gpu-spot": 3}
    assert launched(config, 3, ACTOR, (("gpu-spot", "ALLOCATION_TIMEOUT"),)) == {"gpu-on-demand": 3}


def test_the_wait_for_a_place_is_a_setting_of_rays_autoscaler(monkeypatch):
    from ray.autoscaler.v2.instance_manager import config

    options = cluster_of(documents("rayjob.yaml")[1])["autoscalerOptions"]
    for variable in options["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    found = module_from_spec(config.__spec__)
    monkeypatch.setitem(sys.modules, found.__name__, found)  # its dataclasses look themselves up there
    config.__spec__.loader.exec_module(found)
    assert found.InstanceReconcileConfig().allocate_status_timeout_s == 900


@pytest.mark.parametrize("group", [0, 1, 2])
def test_ray_start_takes_the_parameters(group):
    from ray.scripts.scripts import start

    cluster = cluster_of(documents("rayjob.yaml")[1])
    each = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]][group]
    arguments = [f"--{name}={value}" for name, value in each["rayStartParams"].items()]
    given = start.make_context("start", arguments).params
    assert given["object_store_memory"] == 2**28
    assert given["num_cpus"] == (0 if group == 0 else None)


def test_pods_have_the_environment_of_the_machines():
    cluster = cluster_of(documents("rayjob.yaml")[1])
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        variables = {
            each["name"]: each["value"] for each in group["template"]["spec"]["containers"][0]["env"]
        }
        assert {name: v for name, v in variables.items() if name.startswith("RAY_")} == ray_variables()
        mounts = {each["mountPath"] for each in group["template"]["spec"]["containers"][0]["volumeMounts"]}
        for name in ("CORPUSCOPE_CACHE", "HF_HOME"):
            assert str(Path(variables[name]).parent) in mounts


def test_ray_and_its_version_are_the_environments():
    ray = cluster_of(documents("rayjob.yaml")[1])["rayVersion"]
    assert f"ray[default]=={ray}" in "\n".join(CONFIG["setup_commands"])


# --- the script, run


def run_script(tmp_path: Path, kind: str, command: str) -> int:
    made = (
        rayjob("scan", command, SPEC_TEXT) if kind == "job" else raycronjob(*NIGHTLY[:3], command, SPEC_TEXT)
    )
    (tmp_path / "run.sh").write_text(made["items"][0]["data"]["run.sh"])
    return subprocess.run(["sh", str(tmp_path / "run.sh")], timeout=60).returncode


@pytest.mark.parametrize(
    ("code", "job", "cron"), [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 0, 0), (75, 75, 0), (137, 137, 137)]
)
def test_exit_codes_on_the_head(tmp_path, code, job, cron):
    assert run_script(tmp_path, "job", f"(exit {code})") == job
    assert run_script(tmp_path, "cron", f"(exit {code})") == cron


def test_a_scan_that_is_told_to_stop_may_tidy_up_first(tmp_path):
    command = f"sh -c 'trap \"touch {tmp_path}/tidy; exit 75\" TERM; touch {tmp_path}/up; sleep 30 & wait'"
    (tmp_path / "run.sh").write_text(rayjob("scan", command, SPEC_TEXT)["items"][0]["data"]["run.sh"])
    process = subprocess.Popen(["sh", str(tmp_path / "run.sh")], start_new_session=True)
    try:
        limit = time.monotonic() + 30
        while not (tmp_path / "up").exists() and time.monotonic() < limit:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGTERM)  # as Ray's job supervisor does
        assert process.wait(timeout=30) == 75
        assert (tmp_path / "tidy").exists()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
