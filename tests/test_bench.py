"""`make bench` at a tiny size: the arms agree on their rows, and the numbers are about what was run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def bench(tiny_model_no_bos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of 16 contexts of 64 tokens through three SAEs, without delphi."""
    out = tmp_path_factory.mktemp("bench")
    command = [
        sys.executable,
        str(BENCHMARKS / "compare.py"),
        "--model",
        str(tiny_model_no_bos),
        "--saes",
        "3",
    ]
    command += ["--tokens", "1050", "--length", "64", "--width", "200", "--l0", "12", "--repeat", "1"]
    command += ["--threads", "1", "--out", str(out), "--arms", "scan,script"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "bench.json").read_text(encoding="utf-8"))
    assert not list(out.glob("*.npz"))
    return {**found, "text": done.stdout, "out": out}


def test_the_arms_do_the_same_work(bench: dict[str, Any]) -> None:
    assert (bench["tokens"], bench["counted"]) == (1024, 1024 - 16)
    arms = bench["arms"]
    assert set(arms) == {"floor", "scan", "script"}
    assert 6 < bench["l0"] < 24
    assert bench["rows"] == arms["scan"]["rows"]
    # float32 beside float32: only rounding at a threshold may tell them apart.
    assert arms["script"]["missing"] + arms["script"]["surplus"] <= 0.002 * bench["rows"]


def test_every_number_is_there(bench: dict[str, Any]) -> None:
    for name, arm in bench["arms"].items():
        assert arm["seconds"] > 0
        assert arm["ratio"] == pytest.approx(arm["seconds"] / bench["arms"]["floor"]["seconds"])
        assert arm["peak"] >= arm["before"] > 50e6
        assert name == "floor" or 0 < arm["activation_bytes"] < arm["bytes"]
        assert name in bench["text"]
    root = ElementTree.parse(bench["out"] / "bench.svg").getroot() if has_matplotlib() else None
    assert root is None or root.tag.endswith("svg")


def has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def test_entropy_is_that_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from compare import entropy

    class Sixteen:
        def contexts(self, part: str) -> np.ndarray:
            return np.zeros((2, 8), np.int32)

    # Feature 0 at every other token, feature 3 at none but two: gaps 2 x 8, then 4 and 4.
    tokens = [[1, 3, 5, 7, 9, 11, 13, 15], [], [], [3, 7]]
    keys = np.array([16 * f + t for f, own in enumerate(tokens) for t in own])
    values = np.array([1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 4.0, 4.0], np.float32)
    found = entropy(keys, values, Sixteen())  # type: ignore[arg-type]
    assert found["gaps"] == pytest.approx(-0.8 * np.log2(0.8) - 0.2 * np.log2(0.2))
    assert found["values"] == pytest.approx(-2 * 0.4 * np.log2(0.4) - 0.2 * np.log2(0.2))
    eighth = -(1 / 8) * np.log2(1 / 8) - (7 / 8) * np.log2(7 / 8)
    assert found["gaps given density"] == pytest.approx((8 * 2.0 + 2 * 8 * eighth) / 10)
