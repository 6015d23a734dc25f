"""The benchmark of a million units, with 1,500: what it counts adds up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "scale.py"
UNITS, WORKERS = 1500, 40


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--units", str(UNITS), "--workers", str(WORKERS)]
    command += ["--parts", "plan,run,c,status", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "scale.json").read_text(encoding="utf-8"))[str(UNITS)]
    run = found["run"]
    assert run["committed"] + run["given_up"] == UNITS
    failed = sum(run["counts"].get(kind, 0) for kind in ("infra", "task", "timeout"))
    ignored = run["counts"].get("ignored", 0)  # a copy that had lost is not put on record
    assert run["files"]["failures"] == failed - ignored > 0
    assert run["counts"]["attempts"] >= run["committed"] + failed
    # Every closed range of 32 is one run and one node; of 1,024 there is one.
    assert run["files"]["commits"] == UNITS
    assert run["files"]["manifests"] == 2 * (UNITS // 32 + UNITS // 1024)
    assert 0 < run["tail_seconds"] < run["virtual_seconds"]
    assert run["ideal_seconds"] < run["virtual_seconds"]
    assert found["plan"]["registry_bytes"] > 10 * UNITS
    for part in found.values():
        assert part["peak_mb"] > 50
    assert "tail_seconds" in done.stdout
