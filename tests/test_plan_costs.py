"""What `plan` says against what scans then take: rows and bytes by table, time, memory; its arithmetic."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import CliRunner, Result
from memory import IMPORT

from jobs.cli import cli
from jobs.planview import Asked, PlanView, look, record
from jobs.specfile import load_spec
from pipelines import compaction, gc
from pipelines.costs import cost, device_of, makespan
from pipelines.ledger import Commit, Ledger
from pipelines.measured import measured
from pipelines.schema import DATA
from pipelines.storage import Store
from pipelines.tables import SaeShape, Units, rows
from sae_runtime.device import device_model
from sae_runtime.errors import InputError

Write = Callable[..., Path]
Scan = Callable[..., Any]


def corpus(folder: Path, seed: int, files: int, documents: int) -> Path:
    """Files of documents of 20 to 200 words."""
    rng = np.random.default_rng(seed)
    for i in range(files):
        lengths = rng.integers(20, 200, documents)
        texts = [" ".join(rng.choice(tiny.WORDS, n)) for n in lengths]
        tiny.write_rows(
            folder / f"{i:02d}.jsonl", [{"id": f"{i}-{j}", "text": text} for j, text in enumerate(texts)]
        )
    return folder


def spec_of(write_spec: Write, folder: Path, texts: Path, **more: Any) -> Path:
    source = {"name": "made", "uri": f"{texts}/*.jsonl", "id": "id", "metadata": []}
    return write_spec(folder, corpus=source, **more)


def plan_of(spec: Path, index: str | None = None, **asked: Any) -> PlanView:
    return look(*load_spec(str(spec), index), Asked(**asked))


def commits_of(index: Path) -> list[Commit]:
    return list(Ledger(Store(str(index))).commits().values())


def written(index: Path) -> tuple[Counter[str], Counter[str]]:
    """(rows, bytes) by table, as the commits name them."""
    number: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for commit in commits_of(index):
        for table, file in commit.files.items():
            number[table] += file.rows
            size[table] += file.bytes
    return number, size


def busy(index: Path) -> float:
    return sum(commit.finished - commit.started for commit in commits_of(index))


def on_disk(index: Path) -> Counter[str]:
    """Bytes of data files by kind."""
    return Counter(
        {folder.name: sum(f.stat().st_size for f in folder.iterdir()) for folder in (index / DATA).iterdir()}
    )


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory, write_spec: Write, scan_inline: Scan) -> Path:
    """The spec of a scanned pilot: eight files of five documents."""
    folder = tmp_path_factory.mktemp("pilot")
    spec = spec_of(write_spec, folder, corpus(folder / "texts", 1, 8, 5))
    assert not scan_inline(spec).failed
    return spec


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory, write_spec: Write) -> Path:
    """The spec of a corpus three times as large, in units twice as large; not scanned."""
    folder = tmp_path_factory.mktemp("larger")
    return spec_of(write_spec, folder, corpus(folder / "texts", 2, 12, 10))


@pytest.fixture(scope="module")
def predicted(larger: Path, pilot: Path) -> PlanView:
    """The plan of the larger scan by the pilot's constants, made before that scan."""
    return plan_of(larger, source=str(pilot.parent / "index"))


@pytest.fixture(scope="module")
def scanned(predicted: PlanView, larger: Path, scan_inline: Scan) -> Path:
    """The larger index, scanned after it was planned."""
    assert not scan_inline(larger).failed
    return larger.parent / "index"


def test_rows_and_bytes_by_table_are_those_of_the_scan_that_follows(
    predicted: PlanView, scanned: Path
) -> None:
    number, size = written(scanned)
    found = predicted.found
    assert {table for table, rows_ in found.rows.items() if rows_} == set(number)
    for table in number:
        assert found.rows[table] == pytest.approx(number[table], rel=0.25), table
        assert found.tables[table] == pytest.approx(size[table], rel=0.25), table
    assert found.tables["activations"] == pytest.approx(size["activations"], rel=0.1)
    registry = sum(f.stat().st_size for f in (scanned / "commits").rglob("*.json"))
    assert found.tables["commits"] == pytest.approx(registry, rel=0.25)
    assert sum(found.tables.values()) == pytest.approx(size.total() + registry, rel=0.15)
    tokens = sum(commit.tokens for commit in commits_of(scanned))
    assert found.tokens == pytest.approx(tokens, rel=0.05)


def test_sizes_after_compaction(predicted: PlanView, scanned: Path, tmp_path: Path) -> None:
    import shutil

    index = shutil.copytree(scanned, tmp_path / "index")
    store = Store(str(index))
    before = on_disk(index).total()
    done = compaction.compact(store)
    peak = on_disk(index).total()
    gc.collect(store, 0.0, 0.0)
    sizes = on_disk(index)
    assert done.runs == 1
    found = predicted.found.compacted
    assert found["activations"] == pytest.approx(sizes["activations"], rel=0.25)
    assert found["document_features"] == pytest.approx(sizes["document_features"], rel=0.25)
    assert predicted.found.compacted_bytes == pytest.approx(sizes.total(), rel=0.25)
    assert predicted.found.peak_bytes == pytest.approx(peak, rel=0.25)
    assert peak > max(before, sizes.total())


def test_sizes_of_an_index_that_was_merged_as_it_was_scanned(
    tmp_path: Path, write_spec: Write, scan_inline: Scan, few: list[dict[str, str]]
) -> None:
    """Of 32 units there is a run and a node; summaries of units stay beside it."""
    spec = spec_of(write_spec, tmp_path, corpus(tmp_path / "texts", 3, 40, 3), saes=few)
    assert not scan_inline(spec).failed
    index = tmp_path / "index"
    found = plan_of(spec).found
    compaction.compact(Store(str(index)))
    gc.collect(Store(str(index)), 0.0, 0.0)
    sizes = on_disk(index)
    for table in ("activations", "features", "top_contexts"):
        assert found.compacted[table] == pytest.approx(sizes[table], rel=0.25), table
    assert found.compacted_bytes == pytest.approx(sizes.total(), rel=0.25)


def test_what_a_pilot_of_other_saes_and_keeps_says(
    tmp_path: Path, write_spec: Write, scan_inline: Scan, pilot: Path, larger: Path, tiny_suites: Path
) -> None:
    """Tables that `keep` leaves out are none, windows cost, a sample is in proportion."""
    texts = larger.parent / "texts"
    saes = [
        {"uri": str(tiny_suites / "tiny-res"), "keep": "documents"},
        {"uri": str(tiny_suites / "tiny-mlp"), "keep": {"sample": 0.5}},
        {"uri": str(tiny_suites / "tiny-att"), "keep": "none"},
    ]
    spec = spec_of(write_spec, tmp_path, texts, saes=saes)
    found = plan_of(spec, source=str(pilot.parent / "index")).found
    assert not scan_inline(spec).failed
    number, size = written(tmp_path / "index")
    for table in ("document_features", "features", "top_contexts", "sampled_contexts"):
        assert found.rows[table] == pytest.approx(number[table], rel=0.25), table
    assert found.rows["activations"] == pytest.approx(number["activations"], rel=0.35), (
        "half, drawn at random"
    )
    assert found.index_bytes == pytest.approx(size.total(), rel=0.25)


@pytest.mark.cluster  # runs alone there, and this is about time
def test_time_by_a_measured_run_is_within_twice_of_the_scan(
    tmp_path: Path, pilot: Path, larger: Path, scan_inline: Scan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By processor time, which other work stretches little; twice in turn, and the better counts."""
    clock = SimpleNamespace(**dict.fromkeys(("time", "monotonic", "perf_counter"), time.process_time))
    monkeypatch.setattr("pipelines.unit.time", clock)
    ratios = []
    for turn in ("a", "b"):
        one, other = tmp_path / f"pilot-{turn}", tmp_path / f"larger-{turn}"
        assert not scan_inline(pilot, str(one)).failed
        plan = plan_of(larger, str(other), source=str(one)).cost
        assert not scan_inline(larger, str(other)).failed
        assert plan.source == "measured"
        ratios.append(plan.busy / busy(other))
    assert min(abs(math.log2(ratio)) for ratio in ratios) < 1, ratios


@pytest.mark.cluster  # takes a process of its own, which loads everything anew
def test_memory_of_a_worker_is_near_the_peak_of_a_scan(tmp_path: Path, larger: Path) -> None:
    """A process of its own, in which this one's memory does not count."""
    script = (
        f"{IMPORT}from jobs.cli import cli\ncli.main(sys.argv[1:], standalone_mode=False)\nprint(peak())\n"
    )
    command = ["scan", str(larger), "--index", str(tmp_path / "index"), "--executor", "inline"]
    done = subprocess.run(
        [sys.executable, "-c", script, *command], capture_output=True, text=True, check=True, env=os.environ
    )
    peak = int(done.stdout.split()[-1])
    said = record(plan_of(larger))["worker_memory"]
    assert peak / 1.5 < said < peak * 1.5, (peak, said)


def test_groups_repeat_the_forward_pass_and_read_again(pilot: Path) -> None:
    view = plan_of(pilot, str(pilot.parent / "nowhere"))
    ids = [sae.id for sae in view.prepared.saes]
    todo = [True] * len(view.planned.units)
    device = device_of("H100", replace(view.prepared, device="cuda"))

    def busy_of(groups: list[list[str]]) -> float:
        return cost(view.prepared, groups, view.found, todo, device, 1).busy

    one, many = busy_of([ids]), busy_of([[sae] for sae in ids])
    assert many > 3 * one
    half = cost(view.prepared, [ids], view.found, [i % 2 == 0 for i in range(len(todo))], device, 1)
    assert half.busy == pytest.approx(one / 2, rel=0.2)
    none = cost(view.prepared, [ids], view.found, [False] * len(todo), device, 4)
    assert (none.busy, none.wall, none.worker_hours) == (0, 0, 0)


def test_a_plan_of_a_finished_scan_has_sizes_and_nothing_left_to_do(pilot: Path) -> None:
    row = record(plan_of(pilot))
    assert (row["committed"], row["units"]) == (8, 8)
    assert row["wall_seconds"] == row["worker_hours"] == row["gpu_hours"] == 0
    assert row["index_bytes"] > 100_000
    assert row["tokens_per_second"] > 0
    assert "nothing is left to scan" in run("plan", pilot).output


def test_workers_start_tail_and_price() -> None:
    assert makespan([np.array([4.0, 1, 1, 1, 1])], 2, [0.0]) == 4
    assert makespan([np.array([1.0, 1, 1, 1, 4])], 2, [0.0]) == 6, "the largest comes last"
    assert makespan([np.array([1.0, 1]), np.array([1.0, 1])], 2, [0.0, 10.0]) == 12
    assert makespan([np.array([1.0, 1]), np.array([1.0, 1])], 1, [0.0, 10.0]) == 14
    assert makespan([np.empty(0)], 3, [0.0]) == 0


def test_given_speed_and_price_are_what_the_cost_is_made_of(pilot: Path) -> None:
    view = plan_of(pilot, str(pilot.parent / "nowhere"), rate=100.0, workers=5, price=3.0)
    row = record(view)
    assert (row["speed"], row["workers"]) == ("given", 5)
    assert row["worker_seconds"] == pytest.approx(row["tokens"] / 100, rel=1e-3)
    assert row["tokens_per_second"] == pytest.approx(100, rel=1e-3)
    assert row["wall_seconds"] == pytest.approx(
        row["startup_seconds"] + row["work_seconds"] + row["compaction_seconds"]
    )
    assert row["work_seconds"] == pytest.approx(row["worker_seconds"] / 5 + row["tail_seconds"])
    assert row["cost"] == pytest.approx(3 * 5 * row["wall_seconds"] / 3600)
    assert any("as given" in words for words in row["assumptions"])


def test_l0_scales_what_depends_on_it(pilot: Path) -> None:
    one, two = (plan_of(pilot, str(pilot.parent / "nowhere"), l0=value).found for value in (3.0, 6.0))
    assert two.rows["activations"] == pytest.approx(2 * one.rows["activations"])
    assert one.rows["document_features"] < two.rows["document_features"] < 2 * one.rows["document_features"]
    assert one.rows["contexts"] == two.rows["contexts"]


@pytest.mark.parametrize("most", [1, 3, 20])
def test_the_law_of_contexts_is_that_of_features_spread_as_a_beta_distribution(most: int) -> None:
    """Against a draw: features of a share each, documents that have them, at most so many taken."""
    documents, length = 30, 50
    sae = SaeShape(8, 4000, 20.0, 1.0, True)
    shape = [documents, documents, documents * length, documents * length, 0, 1]
    found = rows([sae], Units(*(np.array([float(n)]) for n in shape)), most, 1)
    share = float(found["document_features"][0]) / documents / sae.width
    assert 0 < share < 1
    rng = np.random.default_rng(most)
    own = rng.beta(1, (1 - share) / share, 200_000)
    drawn = np.minimum(rng.binomial(documents, own), most).mean() * sae.width
    assert float(found["top_contexts"][0]) == pytest.approx(drawn, rel=0.02)
    assert found["features"][0] <= found["top_contexts"][0] <= most * sae.width


def test_constants_are_the_last_runs_and_of_bounded_reading(pilot: Path, monkeypatch: Any) -> None:
    index = str(pilot.parent / "index")
    found = measured(Store(index))
    assert found is not None
    assert (found.run, found.device, found.units) == (1, device_model("cpu"), 8)
    number, _ = written(Path(index))
    tokens = sum(commit.tokens for commit in commits_of(Path(index)))
    assert sum(found.l0.values()) * tokens == pytest.approx(number["activations"], rel=0.05)
    assert found.rows["activations"] == pytest.approx(1, rel=0.05)
    monkeypatch.setattr("pipelines.measured.SAMPLE", 4)
    few = measured(Store(index))
    assert few is not None
    assert few.units == 3, "the first two, of which one is spread over the whole too"
    assert measured(Store(str(pilot.parent / "nowhere"))) is None


def test_a_run_on_another_model_gives_rows_and_no_speed(
    pilot: Path, tmp_path: Path, write_spec: Write
) -> None:
    spec = spec_of(write_spec, tmp_path, pilot.parent / "texts", model={"dtype": "bfloat16"})
    view = plan_of(spec, source=str(pilot.parent / "index"))
    assert (view.cost.source, record(view)["measured_run"]) == ("assumed", 1)
    assert any("not used" in words for words in view.cost.assumptions)


# --- the command


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def test_the_table_says_what_it_assumes_last(pilot: Path, tmp_path: Path) -> None:
    done = run(
        "plan", pilot, "--index", tmp_path / "new", "--from", pilot.parent / "index", "--workers", 3,
        "--price-per-hour", 2,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    named = [line.split("  ")[0] for line in lines if line.strip() and not line.startswith(" ")]
    assert named == [
        "index", "SAEs", "corpus", "tokens", "units", "index size", "workers", "speed", "wall time",
        "worker-hours", "cost", "GPU-hours", "bottleneck", "memory", "assumptions",
    ]  # fmt: skip
    assert "3 on cpu" in done.output
    assert "(measured)" in done.output
    assert "at 2 a worker-hour" in done.output
    tables = [line for line in lines if line.startswith("  ")]
    assert {len(line) for line in tables[:8]} <= {max(map(len, tables[:8]))}, "right-aligned"


def test_a_gpu_that_is_not_here_can_be_planned_for(pilot: Path, tmp_path: Path, write_spec: Write) -> None:
    spec = spec_of(write_spec, tmp_path, pilot.parent / "texts", model={"device": "auto"})
    done = run("plan", spec, "--device", "a100", "--workers", 8, "--format", "json")
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)
    assert (row["device"], row["gpu"], row["speed"]) == ("A100", "A100", "assumed")
    assert row["gpu_hours"] == row["worker_hours"]
    assert row["device_memory"] > 0
    assert row["workers"] == row["units"] == 8
    table = run("plan", spec, "--device", "a100").output
    assert "312 TFLOP/s" in table
    assert "GPU memory" in table


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "TPU"], "--device TPU: not known; give the nearest of cpu, B200, H200"),
        (["--device", "H100"], "--device H100: the spec's model.device is cpu"),
        (["--from", "nowhere"], "--from nowhere: no index here"),
    ],
)
def test_what_cannot_be_planned_is_one_line(pilot: Path, options: list[str], words: str) -> None:
    with pytest.raises(InputError) as refused:
        CliRunner().invoke(cli, ["plan", str(pilot), *options], catch_exceptions=False, standalone_mode=False)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_size_guard_uses_the_measured_run(pilot: Path, tmp_path: Path, write_spec: Write) -> None:
    """What an index has measured of itself decides whether it may grow."""
    from pipelines.estimate import check_size

    view = plan_of(pilot)
    assert view.constants is not None
    spec = view.prepared.spec
    small = replace(
        view.prepared, spec=spec.model_copy(update={"max_index_bytes": view.found.kept_bytes - 1})
    )
    with pytest.raises(InputError, match=r"max_index_bytes: .*`keep: documents` makes it"):
        check_size(small, view.planned, view.found, spec.index)
    enough = replace(view.prepared, spec=spec.model_copy(update={"max_index_bytes": view.found.kept_bytes}))
    check_size(enough, view.planned, view.found, spec.index)
