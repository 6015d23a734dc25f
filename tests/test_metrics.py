"""Ray's metrics, scraped from a node's own endpoint while a scan is at work: names, tags, sums."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_resume import ROOT, marked

from jobs.specfile import load_spec
from pipelines import summary
from pipelines.executors.metrics import METRICS
from pipelines.executors.ray import RayExecutor
from pipelines.scan import ScanOptions, run_scan
from pipelines.stages import STAGES
from pipelines.storage import Store

pytestmark = pytest.mark.cluster

Samples = dict[str, list[tuple[dict[str, str], float]]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head of two processors; its processes hand metrics over every second."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # names of sockets have 107 bytes
    with marked(tmp_path_factory.mktemp("home")) as env, pytest.MonkeyPatch.context() as patch:
        env |= {"PYTHONPATH": str(ROOT), "RAY_metrics_report_interval_ms": "1000"}
        for name, value in env.items():
            patch.setenv(name, value)
        head = {
            "num_cpus": 2,
            "include_dashboard": False,
            "object_store_memory": 80 << 20,
            "temp_dir": folder,
        }
        found = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield found
        finally:
            found.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def scrape() -> Samples:
    """What Prometheus would read of every node: metric -> (tags, value) of each sample."""
    import ray

    found: Samples = {}
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                if match := re.fullmatch(r"(ray_corpuscope\w+)\{(.*)\} (\S+)", line):
                    tags = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
                    found.setdefault(match[1], []).append((tags, float(match[3])))
    return found


def total(found: Samples, name: str, index: Path, **tags: str) -> float:
    wanted = {"index": str(index), "run": "1", **tags}
    return sum(value for have, value in found.get(name, ()) if wanted.items() <= have.items())


def test_counters_end_at_what_the_commits_hold(
    tmp_path: Path, cluster: Any, write_spec: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, seen = tmp_path / "index", []
    spec, text = load_spec(str(write_spec(tmp_path)), None)
    close = RayExecutor.close

    def look(self: RayExecutor) -> None:
        """Before the workers are ended: what they did last is handed over within seconds."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            time.sleep(1)
            seen.append(scrape())
            done = total(seen[-1], "ray_corpuscope_tokens_total", index)
            if done >= tokens() and total(seen[-1], "ray_corpuscope_units_committed_total", index) >= 24:
                break
        close(self)

    def commits() -> list[dict[str, Any]]:
        return [json.loads(file.read_text()) for file in (index / "commits").rglob("*.json")]

    def tokens() -> int:
        return sum(commit["tokens"] for commit in commits())

    monkeypatch.setattr(RayExecutor, "close", look)
    options = ScanOptions(executor="ray", address=cluster.address, workers=2)
    outcome = run_scan(spec, text, options, lambda event: None, lambda line: None)
    assert not outcome.failed
    found, told = seen[-1], summary.read(Store(str(index)), 1)
    assert told is not None
    assert total(found, "ray_corpuscope_tokens_total", index) == told.tokens == tokens()
    assert total(found, "ray_corpuscope_documents_total", index) == told.documents
    assert total(found, "ray_corpuscope_units_committed_total", index, group="0") == len(commits())
    for table in told.rows:
        assert total(found, "ray_corpuscope_rows_total", index, table=table) == told.rows[table]
        assert total(found, "ray_corpuscope_bytes_total", index, table=table) == told.bytes[table]
    for stage in STAGES:
        seconds = total(found, "ray_corpuscope_stage_seconds_total", index, stage=stage)
        assert seconds == pytest.approx(told.stages[stage], abs=0.01), stage
    assert total(found, "ray_corpuscope_unit_seconds_count", index, group="0") == len(commits())
    assert total(found, "ray_corpuscope_units_waiting", index) == 0
    assert total(found, "ray_corpuscope_done_share", index) == 1
    assert total(found, "ray_corpuscope_workers", index) in (1, 2)  # one goes when nothing is left for it
    assert 0 < total(found, "ray_corpuscope_idle_share", index) < 1
    assert 0 < total(found, "ray_corpuscope_worker_seconds_total", index) <= told.worker_seconds
    # Every name that there is was seen, but for failures, of which there were none; and no other.
    names = {re.sub(r"_(bucket|count|sum)$", "", name) for name in found}
    wanted = {metric.exported(name) for name, metric in METRICS.items()}
    absent = {f"ray_corpuscope_{n}_total" for n in ("attempts_failed", "units_given_up", "quarantined")}
    assert names == wanted - absent
    assert {tags["NodeAddress"] for tags, _ in found["ray_corpuscope_tokens_total"]} == {
        cluster.head_node.node_ip_address
    }
    # Two processes scanned, and the log of each says so.
    events = [json.loads(line)["event"] for line in worker_lines(cluster)]
    assert events.count("unit_scanned") == len(commits())


def worker_lines(cluster: Any) -> list[str]:
    """JSON lines on the workers' stderr, as Ray keeps it."""
    folder = Path(cluster.head_node.get_logs_dir_path())
    lines = (line for file in folder.glob("worker-*.err") for line in file.read_text().splitlines())
    return [line for line in lines if line.startswith('{"time"')]
