"""Weights on a real cluster: the hub is there for the driver alone, the index is on S3."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hub as server
import pytest
import tiny
import yaml

_REASON = "needs moto[server] and s3fs, which the dev group installs"
pytest.importorskip("moto.server", reason=_REASON, exc_type=ImportError)
pytest.importorskip("s3fs", reason=_REASON, exc_type=ImportError)

# ruff: noqa: E402
import faulty_s3
from cluster import Head, head

pytestmark = pytest.mark.cluster

SUITE = "tiny-att"
DEAD = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[faulty_s3.FaultyS3]:
    with faulty_s3.serving(tmp_path_factory.mktemp("keys") / "credentials") as proxy:
        yield proxy


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, s3: faulty_s3.FaultyS3) -> Iterator[Head]:
    """A head whose workers have an empty cache of 400 kB and no way to the hub."""
    folder = tmp_path_factory.mktemp("machine")
    own = {"HF_ENDPOINT": DEAD, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hf")}
    copies = {"CORPUSCOPE_CACHE": str(folder / "own"), "CORPUSCOPE_CACHE_BYTES": "400kB"}
    with head(folder, **own, **copies) as found:
        yield found


def scan(
    net: server.Hub, machine: Head, home: Path, corpus: Path, index: str, suite: str
) -> subprocess.CompletedProcess[str]:
    """By a driver of its own, which has the hub and nothing else."""
    spec = {
        "corpus": {"name": "tiny", "uri": f"{corpus}/part_*0.jsonl"},
        "model": {"uri": "org/tiny", "dtype": "float32", "device": "cpu", "threads": 1},
        "saes": [{"uri": f"hf://org/{suite}"}],
        "context": {"length": 96},
        "index": index,
    }
    (home / "spec.yaml").write_text(yaml.safe_dump(spec))
    own = {
        "HF_ENDPOINT": net.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home / "hf"),
        "CORPUSCOPE_CACHE": str(home / "own"),
    }
    command = [sys.executable, "-m", "jobs.cli", "scan", str(home / "spec.yaml")]
    command += ["--address", machine.cluster, "--workers", "2"]
    env = {k: v for k, v in machine.env.items() if k != "CORPUSCOPE_CACHE_BYTES"} | own
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


def test_a_machine_without_the_hub_fetches_each_file_once_for_all_its_workers(
    tmp_path: Path,
    machine: Head,
    s3: faulty_s3.FaultyS3,
    tiny_model: Path,
    tiny_suites: Path,
    tiny_corpus: Path,
) -> None:
    with server.running() as net:
        net.push("org/tiny", tiny_model)
        net.push(f"org/{SUITE}", tiny_suites / SUITE)
        done = scan(net, machine, tmp_path, tiny_corpus, f"s3://{faulty_s3.BUCKET}/one", SUITE)
    assert done.returncode == 0, done.stderr
    assert "files of the hub" in done.stderr
    objects = [r for r in s3.seen if r.key.startswith("one/staged/") and not r.key.endswith(".json")]
    put = {request.key for request in objects if request.method == "PUT"}
    assert len(put) >= 2 + sum(sae.path.startswith(SUITE) for sae in tiny.SAES)
    assert Counter(request.key for request in objects if request.method == "GET") == Counter(put)
    assert not os.path.exists(machine.env["HF_HOME"])


def test_weights_beyond_the_budget_of_a_machine_stop_the_scan_with_one_line(
    tmp_path: Path, machine: Head, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The suite's one file is larger than all that copies may take."""
    import numpy as np

    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "part_00.jsonl").write_text('{"text": "the cat sat on a mat"}\n')
    at = tmp_path / "wide-res" / "layer_1" / "width_2k" / "average_l0_9"
    at.mkdir(parents=True)
    shapes = {"W_enc": (32, 2048), "W_dec": (2048, 32), "b_enc": 2048, "b_dec": 32, "threshold": 2048}
    np.savez(at / "params.npz", **{name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    with server.running() as net:
        net.push("org/tiny", tiny_model)
        net.push("org/wide-res", tmp_path / "wide-res")
        done = scan(net, machine, tmp_path, corpus, f"s3://{faulty_s3.BUCKET}/two", "wide-res")
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "no room" in line]
    assert "average_l0_9/params.npz (" in line
    assert "in the budget of 0.0004 GB for copies" in line
    assert line.endswith("raise CORPUSCOPE_CACHE_BYTES where workers are started")
