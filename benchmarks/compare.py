"""`make bench`: our scan against its floor, a careful script and delphi, on the same work, in one run.

Invariant: every arm (arms.py) is a process that lives through all rounds and works only when it is its turn,
so that the arms are interleaved, their peaks of memory are their own, and no two run at a time. Medians of
`--repeat` rounds after one batch of warm-up. Afterwards the rows of the arms are compared, key for key, and
the entropy of the scan's own rows is computed.

    python benchmarks/compare.py [--saes 16] [--tokens 16384] [--arms floor,scan,script,delphi] [--curve]

`--curve` measures memory and ratio as the corpus grows tenfold, and as SAEs go from 4 to 32.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import world as worlds
from world import World

HERE = Path(__file__).resolve().parent
NAMES = ("floor", "scan", "script", "delphi")
CURVE_TOKENS = (2048, 4096, 8192, 20480)
CURVE_SAES = (4, 8, 16, 32)
MB = 1e6
# Rows that an arm and the scan may differ in, over the scan's: float32 rounding at a threshold, bfloat16
# products, and a bfloat16 model whose attention has other last bits for other numbers of threads. (With two
# threads those are the same; 0.000002 and 0.015 were measured.)
ALONE = {"script": 0.05, "delphi": 0.05}
QUIET = 0.05  # share of the CPUs that others may take before the result says so

Found = dict[str, Any]


class Child:
    """An arm's process. Its stderr goes to `<out>/<name>.log`."""

    def __init__(self, name: str, world: World, out: Path, peers: Path) -> None:
        self.name, self.log, self.out = name, out / f"{name}.log", out / name
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if name == "delphi":  # its packages are seen by it alone, and replace none of ours
            environment["PYTHONPATH"] = str(peers)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "arms.py"), name, world.folder, str(self.out)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )

    def ask(self, command: str) -> Found:
        """Send a command and wait for its answer."""
        assert self.process.stdin is not None
        if self.process.poll() is None:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Found:
        """The next answer. ClickException with the end of the log if there is none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            end = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-4:]
            raise click.ClickException(f"{self.name} ended, {self.log}: " + "\n".join(end))
        found: Found = json.loads(line)
        return found

    def close(self) -> None:
        """End the process; its pipe's end is its sign."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        shutil.rmtree(self.out, ignore_errors=True)


@contextmanager
def children(names: Sequence[str], world: World, out: Path, peers: Path) -> Iterator[dict[str, Child]]:
    """The arms' processes, each loaded and warm."""
    with ExitStack() as stack:
        found = {}
        for name in names:
            found[name] = Child(name, world, out, peers)
            stack.callback(found[name].close)
        for child in found.values():
            child.answer()  # that it has loaded
        for child in found.values():
            child.ask("warm")
        yield found


def measure(names: Sequence[str], world: World, out: Path, peers: Path, repeat: int, keys: bool) -> Found:
    """All rounds of all arms on one work; with `keys`, what their rows have in common and their entropy."""
    contexts = world.contexts("run")
    found: Found = {
        "saes": len(world.saes),
        "width": world.width,
        "tokens": contexts.size,
        "length": world.length,
    }
    with children(names, world, out, peers) as arms:
        rounds: dict[str, list[Found]] = {name: [] for name in names}
        for turn in range(repeat):
            for name in names:
                os.sync()  # nobody pays for another's writes
                rounds[name].append(arms[name].ask("run"))
            now = "  ".join(f"{name} {rounds[name][-1]['seconds']:.2f}" for name in names)
            click.echo(f"  round {turn + 1}: {now} s", err=True)
        found["arms"] = {name: summary(answers) for name, answers in rounds.items()}
        if keys:
            files = {name: out / f"{name}.npz" for name in names if name != "floor"}
            for name, file in files.items():
                arms[name].ask(f"keys {file}")
            found |= agreement(files, world, found["arms"])
            for file in files.values():
                file.unlink()
    base = found["arms"]["floor"]["seconds"]
    for arm in found["arms"].values():
        arm["ratio"] = arm["seconds"] / base
    counted = found["arms"].get("scan", {}).get("counted", contexts.size - len(contexts))
    rows = next((arm["rows"] for arm in found["arms"].values() if "rows" in arm), 0)
    return found | {"counted": counted, "rows": rows, "l0": rows / counted / len(world.saes)}


def summary(rounds: Sequence[Found]) -> Found:
    """One arm's rounds as one: median seconds (and of its parts), the highest peak, what it left."""
    last = rounds[-1]
    found = {
        **last,
        "rounds": [r["seconds"] for r in rounds],
        "seconds": median(r["seconds"] for r in rounds),
    }
    found["peak"] = max(r["peak"] for r in rounds)
    found["others"] = max(r["others"] for r in rounds)
    if "parts" in last:
        found["parts"] = {part: median(r["parts"][part] for r in rounds) for part in last["parts"]}
    if last.get("rows"):
        found["bytes_per_row"] = last["bytes"] / last["rows"]
        found["activation_bytes_per_row"] = last["activation_bytes"] / last["rows"]
    return found


def agreement(files: dict[str, Path], world: World, arms: Found) -> Found:
    """Rows that one of the scan and another arm has alone, in `arms`; and the entropy of the scan's rows."""
    if "scan" not in files:
        return {}
    bits = {"gaps": 0.0, "gaps given density": 0.0, "values": 0.0}
    ours, total, merged = np.load(files["scan"]), 0, 0
    for i in range(len(world.saes)):
        rows = len(ours[f"keys{i}"])
        total += rows
        for name, each in entropy(ours[f"keys{i}"], ours[f"values{i}"], world).items():
            bits[name] += each * rows
        merged += one_run(ours[f"keys{i}"], ours[f"values{i}"], world)
    for name, file in files.items():
        if name == "scan":
            continue
        theirs = np.load(file)
        alone = [0, 0]
        for i in range(len(world.saes)):
            a, b = ours[f"keys{i}"], theirs[f"keys{i}"]
            both = len(np.intersect1d(a, b, assume_unique=True))
            alone = [alone[0] + len(a) - both, alone[1] + len(b) - both]
        arms[name] |= {"missing": alone[0], "surplus": alone[1]}
        if sum(alone) > ALONE[name] * total:
            raise click.ClickException(
                f"{name} and scan do not do the same work: of {total:,} rows of the scan's {alone[0]:,} are "
                f"missing there, and {alone[1]:,} are there only"
            )
    return {
        "entropy_bytes_per_row": {name: each / total / 8 for name, each in bits.items()},
        "merged_bytes_per_row": merged / total,
    }


def one_run(keys: np.ndarray, values: np.ndarray, world: World) -> int:
    """Bytes of one SAE's rows written by our writer as one run, which is what compaction is to leave."""
    from pipelines.storage import Store
    from pipelines.writer import UnitWriter, sae_column

    feature, token = np.divmod(keys, world.contexts("run").size)
    with tempfile.TemporaryDirectory() as folder:
        writer = UnitWriter(Store(folder), "merged", 0, "bench", {})
        writer.write(
            "activations",
            {
                "sae": sae_column("bench", len(keys)),
                "feature": feature.astype(np.int32),
                "token": token,
                "activation": values.astype(np.float32),
            },
        )
        return writer.close()["activations"].bytes


def entropy(keys: np.ndarray, values: np.ndarray, world: World) -> dict[str, float]:
    """Bits a row of one SAE's rows, each column by itself.

    `gaps`: from a feature's row to its next, from one distribution for the whole SAE; a coder of that
    column cannot do better without knowing features apart. `gaps given density`: as if every feature fired
    at random with its own density. `values`: of the bfloat16 codes, one distribution for the whole SAE.
    """
    feature, token = np.divmod(keys, world.contexts("run").size)
    gap = np.diff(token, prepend=-1)
    first = np.diff(feature, prepend=-1) > 0
    gap[first] = token[first] + 1
    n = np.bincount(feature)
    p = n[n > 0] / (world.contexts("run").size)
    chance = -(p * np.log2(p) + (1 - p) * np.log2(np.maximum(1 - p, 1e-300))) / p
    codes = values.astype(np.float32).view(np.uint32) >> 16
    return {
        "gaps": _bits(gap),
        "gaps given density": float((chance * n[n > 0]).sum() / n.sum()),
        "values": _bits(codes),
    }


def _bits(symbols: np.ndarray) -> float:
    p = np.unique(symbols, return_counts=True)[1] / len(symbols)
    return float(-(p * np.log2(p)).sum())


def disturbed(arms: Found) -> list[str]:
    """A line of warning where other processes had part of the machine."""
    worst = max(arm["others"] for arm in arms.values())
    if worst < QUIET:
        return []
    return [f"NOT QUIET: other processes, or the host, took up to {worst:.0%} of the CPUs during a round"]


def table(found: Found) -> str:
    """The result as lines of text."""
    lines = [
        f"{found['tokens']:,} tokens in contexts of {found['length']}, {found['counted']:,} counted; "
        f"{found['saes']} SAEs of {found['width']:,}, L0 {found['l0']:.1f}; {found['rows']:,} rows",
        f"{'':8}{'seconds':>9}{'over floor':>12}{'tokens/s':>10}{'rows':>13}{'alone*':>9}"
        f"{'B/row act.':>12}{'B/row all':>11}{'peak MB':>9}{'of it work':>12}",
    ]
    for name, arm in found["arms"].items():
        line = f"{name:8}{arm['seconds']:9.2f}{arm['ratio']:12.2f}{found['counted'] / arm['seconds']:10,.0f}"
        if "rows" in arm:
            alone = f"{(arm['missing'] + arm['surplus']) / found['rows']:.2%}" if "missing" in arm else ""
            line += f"{arm['rows']:13,}{alone:>9}{arm['activation_bytes_per_row']:12.2f}"
            line += f"{arm['bytes_per_row']:11.2f}"
        else:
            line += " " * 45
        work = arm["peak"] - arm["before"]
        parts = "  ".join(f"{part} {seconds:.2f}" for part, seconds in arm.get("parts", {}).items())
        lines.append(f"{line}{arm['peak'] / MB:9,.0f}{work / MB:12,.0f}" + (f"   {parts}" if parts else ""))
    if "entropy_bytes_per_row" in found:
        h = found["entropy_bytes_per_row"]
        lines.append(
            f"entropy, bytes a row: gaps {h['gaps']:.2f} (given each density {h['gaps given density']:.2f}) "
            f"+ bfloat16 values {h['values']:.2f} = {h['gaps'] + h['values']:.2f}"
        )
        lines.append(
            f"activations as one run a feature, as compaction is to leave them: "
            f"{found['merged_bytes_per_row']:.2f} bytes a row, "
            f"{found['merged_bytes_per_row'] / (h['gaps'] + h['values']):.2f} times the entropy"
        )
        lines.append("* rows that only one of this arm and the scan has, over the scan's")
    return "\n".join(lines + disturbed(found["arms"]))


def curve_table(points: Sequence[Found]) -> str:
    """A line for each point: ratio to the floor and peak memory of each arm."""
    names = list(points[0]["arms"])
    lines = [
        f"{'SAEs':>5}{'tokens':>8}{'rows':>12}" + "".join(f"{name + ' x':>11}{'MB':>7}" for name in names)
    ]
    for point in points:
        line = f"{point['saes']:5}{point['tokens']:8,}{point['rows']:12,}"
        for name in names:
            arm = point["arms"].get(name)
            line += f"{arm['ratio']:11.2f}{arm['peak'] / MB:7,.0f}" if arm else f"{'-':>11}{'-':>7}"
        lines.append(line)
    worst = max((point["arms"] for point in points), key=lambda arms: max(a["others"] for a in arms.values()))
    return "\n".join(lines + disturbed(worst))


def plot(found: Found, file: Path) -> None:
    """Bars of time, bytes and memory for one work, or lines for the points of a curve."""
    try:
        import matplotlib
    except ImportError:
        click.echo("no plot: matplotlib is missing; `make bench` installs it", err=True)
        return
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    if "points" in found:
        figure, grid = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
        for axes, (key, label) in zip(grid, (("tokens", "tokens"), ("saes", "SAEs")), strict=True):
            points = [point for point in found["points"] if point["grows"] == key]
            _lines(axes[0], points, key, label, "ratio", 1, "seconds over the floor")
            _lines(axes[1], points, key, label, "peak", MB, "peak memory, MB")
    else:
        figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
        arms = found["arms"]
        kept = [name for name in arms if "rows" in arms[name]]
        _bars(axes[0], list(arms), [arm["ratio"] for arm in arms.values()], "seconds over the floor")
        _bars(axes[1], kept, [arms[name]["bytes_per_row"] for name in kept], "bytes a row, all files")
        if "entropy_bytes_per_row" in found:
            h = found["entropy_bytes_per_row"]
            axes[1].axvline(h["gaps"] + h["values"], color="black", linestyle=":")
        _bars(axes[2], list(arms), [arm["peak"] / MB for arm in arms.values()], "peak memory, MB")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="svg", metadata={"Date": None})


def _bars(axes: Any, names: Sequence[str], values: Sequence[float], title: str) -> None:
    bars = axes.barh(list(names), values, color=[f"C{NAMES.index(name)}" for name in names])
    axes.bar_label(bars, fmt="{:,.1f}" if max(values) < 100 else "{:,.0f}", padding=2)
    axes.set_title(title)
    axes.margins(x=0.2)
    axes.invert_yaxis()


def _lines(
    axes: Any, points: Sequence[Found], key: str, label: str, value: str, unit: float, title: str
) -> None:
    for name in points[0]["arms"]:
        there = [point for point in points if name in point["arms"]]
        y = [point["arms"][name][value] / unit for point in there]
        axes.plot([point[key] for point in there], y, marker="o", label=name, color=f"C{NAMES.index(name)}")
    axes.set(xlabel=label, title=title, ylim=(0, None))
    axes.legend()


def here(threads: int) -> Found:
    """What the numbers were measured on."""
    import torch

    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":")[1].strip() if names else processor
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "processor": processor,
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def demo_model() -> str:
    """The demo's GGUF file."""
    sys.path.append(str(HERE.parent / "examples"))
    from model import smollm2

    return str(smollm2())


def chosen(arms: str | None, peers: Path) -> list[str]:
    """The arms to run, in their order; by default all that are installed."""
    there = (peers / "delphi").is_dir()
    if arms is None:
        if not there:
            click.echo(f"without delphi: it is not in {peers}; `make bench` installs it", err=True)
        return [name for name in NAMES if name != "delphi" or there]
    wanted = {"floor", *arms.split(",")}
    if unknown := sorted(wanted - set(NAMES)):
        raise click.UsageError(f"--arms: {', '.join(unknown)}: there are {', '.join(NAMES)}")
    if "delphi" in wanted and not there:
        raise click.UsageError(f"--arms: delphi is not in {peers}; `make bench` installs it")
    return [name for name in NAMES if name in wanted]


def fit(names: Sequence[str], world: World) -> list[str]:
    """The arms that can do this work: delphi takes one SAE a hookpoint, and is left out with a line."""
    if "delphi" not in names or len({sae.layer for sae in world.saes}) == len(world.saes):
        return list(names)
    why = f"it takes one SAE a hookpoint, and some of {len(world.saes)} share a layer"
    click.echo(f"without delphi: {why}", err=True)
    return [name for name in names if name != "delphi"]


@click.command()
@click.option("--saes", default=16, show_default=True, help="SAEs, spread over the model's layers.")
@click.option("--tokens", default=16384, show_default=True, help="Tokens to run, in whole batches.")
@click.option("--arms", help=f"Comma-separated, of {', '.join(NAMES)}; default: all that are installed.")
@click.option("--repeat", type=int, help="Rounds; default 3, of a curve 1.")
@click.option("--curve", is_flag=True, help="Grow corpus and SAEs instead.")
@click.option("--width", default=4096, show_default=True, help="Features of an SAE.")
@click.option("--l0", default=80.0, show_default=True, help="Active features a token that SAEs are made for.")
@click.option("--length", default=256, show_default=True, help="Tokens a context.")
@click.option("--threads", default=2, show_default=True)
@click.option("--model", help="A model's directory or .gguf file; default: the demo's.")
@click.option("--out", default="out/bench", show_default=True, type=click.Path(path_type=Path))
@click.option("--peers", type=click.Path(path_type=Path), help="Where delphi is; default: <out>/peers.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Default: in <out>.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="SVG; default: in <out>.")
def main(
    saes: int,
    tokens: int,
    arms: str | None,
    repeat: int | None,
    curve: bool,
    width: int,
    l0: float,
    length: int,
    threads: int,
    model: str | None,
    out: Path,
    peers: Path | None,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Measure every arm on the same work; print a table, write JSON and a plot."""
    out = out.resolve()
    peers = (peers or out / "peers").resolve()
    out.mkdir(parents=True, exist_ok=True)
    names = chosen(arms, peers)
    began = time.monotonic()

    def work(saes: int, tokens: int) -> World:
        click.echo(f"{saes} SAEs, {tokens:,} tokens", err=True)
        return worlds.make(out / "worlds", model or demo_model(), saes, tokens, width, l0, length, threads)

    found = here(threads)
    if curve:
        grows = [("tokens", saes, n) for n in CURVE_TOKENS] + [("saes", n, 4096) for n in CURVE_SAES]
        points = []
        for key, n_saes, n_tokens in grows:
            made = work(n_saes, n_tokens)
            able = fit(names, made)
            points.append({"grows": key} | measure(able, made, out, peers, repeat or 1, keys=False))
        found["points"] = points
        click.echo(curve_table(points))
    else:
        made = work(saes, tokens)
        found |= measure(fit(names, made), made, out, peers, repeat or 3, keys=True)
        click.echo(table(found))
    stem = "curve" if curve else "bench"
    json_file, plot_file = json_file or out / f"{stem}.json", plot_file or out / f"{stem}.svg"
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot(found, plot_file)
    click.echo(
        f"{found['processor']}, {threads} threads, torch {found['torch']}; "
        f"{time.monotonic() - began:.0f} s in all; {json_file}, {plot_file}"
    )


if __name__ == "__main__":
    main()
