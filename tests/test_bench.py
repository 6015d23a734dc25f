"""`make bench` at a tiny size: the arms agree on their rows, and the numbers are about what was run."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import click
import numpy as np
import pytest
from click.testing import CliRunner

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts' folder, as Python sees it when it runs one of them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.usefixtures("benchmarks")
def test_the_arms_keep_the_same_rows(tiny_model_no_bos: Path, tmp_path: Path) -> None:
    """Scan and script on 16 contexts of 64 tokens and three SAEs, here in this process."""
    import arms
    import compare
    import world as worlds

    made = worlds.make(tmp_path, str(tiny_model_no_bos), 3, 1050, 200, 12, 64, 1)
    assert made.contexts("run").shape == (16, 64)
    found, files = {}, {}
    for name in ("scan", "script"):
        arm = arms.ARMS[name](made)
        loaded = arms.loaded_bytes()
        found[name] = arms.answer(arm, made, tmp_path / name, "run", "", loaded)
        files[name] = tmp_path / f"{name}.npz"
        arms.answer(arm, made, tmp_path / name, "keys", str(files[name]), loaded)
    rows = found["scan"]["rows"]
    assert found["scan"]["counted"] == 16 * 63  # no first tokens
    assert 6 < rows / (16 * 63) / 3 < 24
    bits = compare.agreement(files, made, found)["entropy_bytes_per_row"]
    assert 0 < bits["gaps"] + bits["values"] < found["scan"]["activation_bytes"] / rows
    # float32 beside float32: only rounding at a threshold may tell them apart.
    assert found["script"]["missing"] + found["script"]["surplus"] <= 0.001 * rows
    ours, theirs = (np.load(files[name]) for name in files)
    both, i, j = np.intersect1d(ours["keys1"], theirs["keys1"], return_indices=True)
    assert len(both)
    np.testing.assert_allclose(ours["values1"][i], theirs["values1"][j], rtol=2**-8)
    files["script"].unlink()
    np.savez(files["script"], **{name: column[: len(column) * 9 // 10] for name, column in theirs.items()})
    with pytest.raises(click.ClickException, match="script and scan do not do the same work"):
        compare.agreement(files, made, found)


@pytest.mark.usefixtures("benchmarks")
def test_the_command(tiny_model_no_bos: Path, tmp_path: Path) -> None:
    """Here in this process, but for the arms, which have one each."""
    import compare

    arguments = ["--model", str(tiny_model_no_bos), "--out", str(tmp_path), "--arms", "script"]
    arguments += ["--saes", "2", "--tokens", "512", "--length", "64", "--width", "100", "--l0", "8"]
    done = CliRunner().invoke(compare.main, [*arguments, "--repeat", "2", "--threads", "1"])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert set(found["arms"]) == {"floor", "script"}
    for name, arm in found["arms"].items():
        assert arm["seconds"] == pytest.approx(sum(arm["rounds"]) / 2)
        assert arm["ratio"] == pytest.approx(arm["seconds"] / found["arms"]["floor"]["seconds"])
        assert arm["peak"] >= arm["before"] > 50e6
        assert name in done.stdout
    script = found["arms"]["script"]
    assert 0 < script["activation_bytes"] < script["bytes"]
    assert (found["tokens"], found["counted"], found["rows"]) == (512, 512 - 8, script["rows"])
    if has_matplotlib():
        assert ElementTree.parse(tmp_path / "bench.svg").getroot().tag.endswith("svg")


@pytest.mark.usefixtures("benchmarks")
def test_delphi_is_left_out_where_saes_share_a_layer(capsys: pytest.CaptureFixture[str]) -> None:
    from compare import fit
    from world import BenchSae, World

    def world(*layers: int) -> World:
        saes = tuple(BenchSae(str(i), layer, "") for i, layer in enumerate(layers))
        return World("", "", saes, 8, 4, 1, 1)

    assert fit(["floor", "delphi"], world(0, 1)) == ["floor", "delphi"]
    assert fit(["floor", "delphi"], world(0, 1, 1)) == ["floor"]
    assert "without delphi: it takes one SAE a hookpoint, and some of 3" in capsys.readouterr().err


def has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.usefixtures("benchmarks")
def test_entropy_is_that_of_the_rows() -> None:
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
