"""Random SIGKILLs over scans, compactions and collections; then every row compared with undisturbed scans.

    python benchmarks/soak.py --kills 200 --seed 1            # inline, a fork a command
    python benchmarks/soak.py --kills 0 --ray 20 --seed 1     # a cluster of its own each time

Invariant: a round changes the corpus, kills what works on it until it has had its share, lets it finish and
compares the content with a fresh scan that nobody disturbed; between kills a reader looks, who must see whole
units. Kills fall evenly on the phases: a phase is drawn, then which time it comes, then a delay. Only
processes that were started here are killed. Exit code 1 if a row differs or a command fails otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import psutil  # noqa: E402
import tiny  # noqa: E402
import yaml  # noqa: E402
from forks import FREE, Fork, fork  # noqa: E402

import queries  # noqa: E402

FAN = 4
MARK = "CORPUSCOPE_SOAK_MARK"
# Phase -> the points after which it is on, and the longest delay after one, in seconds.
SCAN_PHASES: dict[str, tuple[tuple[str, ...], float]] = {
    "planning": ((), 0.6),
    "registering": (("before-lease", "lease-taken", "before-index", "before-plan", "plan-tables"), 0.03),
    "unit": (("before-unit", "data-opened"), 0.15),
    "commit": (("before-commit", "put-linked", "after-commit"), 0.01),
    "compaction": (("merge-file", "compact-files", "compact-manifest", "compact-published"), 0.02),
    "end": (("after-commit",), 0.2),  # of the last unit
}
COMPACT_PHASES: dict[str, tuple[tuple[str, ...], float]] = {
    "planning": ((), 0.4),
    "compaction": SCAN_PHASES["compaction"],
}
GC_PHASES: dict[str, tuple[tuple[str, ...], float]] = {
    "collection": (("gc-retired", "gc-listed", "object-removed", "gc-removing"), 0.01)
}
TABLES = ("documents", "contexts", "activations", "document_features")
Rows = dict[str, list[tuple[Any, ...]]]


@dataclass
class Tally:
    """What happened."""

    seed: int
    kills: int = 0
    rounds: int = 0
    phases: Counter[str] = field(default_factory=Counter)  # in which kills fell, by the last point reached
    commands: Counter[str] = field(default_factory=Counter)  # that were killed
    points: Counter[str] = field(default_factory=Counter)  # the last before a kill; "none": before any
    two_at_once: int = 0  # kills while two drivers were at work without a lease
    refused: int = 0  # second drivers that the lease sent away
    looks: int = 0  # of readers between kills
    rows_compared: int = 0
    rows_seen_between: int = 0
    differing: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


def phase_of(last: str | None, reached: dict[Any, int]) -> str:
    """The phase in which a command was, by the points that it had reached and the last of them."""
    if last is None:
        return "planning"
    if last.startswith("gc-") or last == "object-removed":
        return "collection"
    if last.startswith(("merge-", "compact-")):
        return "compaction"
    begun, written, done = (
        reached.get(point, 0) for point in ("before-unit", "before-commit", "after-commit")
    )
    if not begun:
        return "registering or loading"
    if begun > written:
        return "unit"
    return "commit" if written > done else "between units or after"


class World:
    """Model, SAEs, a corpus that changes, the index that is disturbed and fresh ones to compare with."""

    def __init__(self, home: Path, generator: random.Random) -> None:
        self.home, self.random = home, generator
        self.model = tiny.make_model(home / "model")
        self.suites = tiny.make_suites(home / "suites", self.model)
        self.pool = tiny.write_corpus(home / "pool")
        self.corpus = home / "corpus"
        self.corpus.mkdir()
        self.names = sorted(f.name for f in self.pool.iterdir())
        self.spec, self.index = self._spec(home / "disturbed"), home / "disturbed" / "index"
        self.logs = home / "logs"
        self.version = self.changed = 0
        self.committed = 0
        for name in generator.sample(self.names, 14):
            self._put(name)

    def _spec(self, folder: Path) -> Path:
        spec = {
            "corpus": {"name": "tiny", "uri": f"{self.corpus}/*.jsonl", "id": "id",
                       "metadata": ["lang", "score", "even"]},
            "model": {"uri": str(self.model), "dtype": "float32", "device": "cpu", "threads": 1},
            "saes": [{"uri": str(self.suites / suite)} for suite in tiny.SUITES],
            "context": {"length": 96}, "top_k": 4, "sample_k": 3, "index": "index",
        }  # fmt: skip
        folder.mkdir(parents=True)
        (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
        return folder / "spec.yaml"

    def _put(self, name: str) -> None:
        """A file of the pool, mostly with a row more than there, and now and then a damaged one."""
        text = (self.pool / name).read_text(encoding="utf-8")
        if self.random.random() < 0.8:
            self.version += 1
            text += (
                json.dumps({"id": f"new-{self.version}", "text": f"seven red foxes {self.version}"}) + "\n"
            )
            if self.random.random() < 0.2:
                text += '{"id": "damaged", "text": \n'
        (self.corpus / name).write_text(text, encoding="utf-8")
        self.changed += 1

    def change(self) -> None:
        """Files go, change and come."""
        self.changed, self.committed = 0, len(self.commits)
        there = sorted(f.name for f in self.corpus.iterdir())
        for name in self.random.sample(there, min(len(there) - 5, self.random.randint(0, 5))):
            (self.corpus / name).unlink()
        there = sorted(f.name for f in self.corpus.iterdir())
        for name in self.random.sample(there, self.random.randint(4, 5)):
            self._put(name)
        absent = sorted(set(self.names) - set(there))
        for name in self.random.sample(absent, min(len(absent), self.random.randint(3, 6))):
            self._put(name)

    def scan(self, spec: Path | None = None) -> list[str]:
        return ["scan", str(spec or self.spec), "--executor", "inline", "--allow-removal"]

    def reference(self, number: int) -> Rows:
        """The content of a scan of the corpus as it is now that nobody disturbs."""
        folder = self.home / f"fresh-{number}"
        done = fork(self.logs, [self.scan(self._spec(folder))], fan=1 << 20)
        code = done.wait()
        assert code == 0, done.log.read_text()
        rows = content(folder / "index")
        shutil.rmtree(folder)
        return rows

    @property
    def plans(self) -> int:
        """Of scans: a collection has plans too."""
        heads = (json.loads(f.read_text()) for f in (self.index / "plans").glob("[!.]*.json"))
        return sum(head["kind"] == "scan" for head in heads)

    @property
    def commits(self) -> list[Path]:
        return list((self.index / "commits").rglob("[!.]*.json"))

    @property
    def units_left(self) -> int:
        """Files that came or changed and are not committed; at least 1."""
        return max(1, self.changed - len(self.commits) + self.committed)


def content(index: Path) -> Rows:
    """Every row of every view, with places for keys."""
    found = tiny.content(index)
    rows = queries.connect(str(index)).sql("SELECT source, row, id, error FROM quarantine ORDER BY ALL")
    return {**found, "quarantine": rows.fetchall()}


class Soak:
    """Kills, and what came of them."""

    def __init__(self, world: World, tally: Tally, wanted: int) -> None:
        self.world, self.tally, self.wanted, self.random = world, tally, wanted, world.random
        self.before: Rows = {}
        self.ended = False  # a scan of the round came to its end

    def rounds(self, disturb: Callable[[], None], share: int) -> None:
        """Rounds of at most some `share` kills by `disturb` until there were enough."""
        while self.tally.kills < self.wanted:
            if self.tally.rounds:
                self.world.change()
            fresh = self.world.reference(self.tally.rounds)
            plans = self.world.plans
            aim = min(self.wanted, self.tally.kills + share)
            self.ended = False
            while self.tally.kills < aim and not self.ended:
                disturb()
                if self.random.random() < 0.3:
                    self._look(plans, fresh)
            self._finish(fresh)
            self.before = fresh
            self.tally.rounds += 1
            self._say()

    def _say(self) -> None:
        done = self.tally
        print(
            f"round {done.rounds}: {done.kills} kills, {done.rows_compared:,} rows compared, "
            f"{done.differing} differ, {len(done.wrong)} wrong",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def inline(self) -> None:
        """One command, or two at once, killed somewhere unless it ends before."""
        index = str(self.world.index)
        kind = self.random.choices(("scan", "two", "compact", "gc"), (10, 3, 2, 2))[0]
        if kind in ("compact", "gc") and not self.world.plans:
            kind = "scan"
        if kind == "scan":
            self._killed(fork(self.world.logs, [self.world.scan()], FAN), "scan", SCAN_PHASES)
        elif kind == "compact":
            self._killed(fork(self.world.logs, [["compact", index]], FAN), "compact", COMPACT_PHASES)
        elif kind == "gc":
            unfinished = self.random.choice(("0", "86400"))
            line = ["gc", index, "--grace", "0", "--unfinished", unfinished]
            self._killed(fork(self.world.logs, [line], FAN), "gc", GC_PHASES)
        else:
            self._two_at_once()

    def _two_at_once(self) -> None:
        """Two drivers: the lease sends one away, or there is none and both work."""
        free = [FREE] if self.random.random() < 0.75 else []
        one, two = (fork(self.world.logs, [[*free, *self.world.scan()]], FAN) for _ in range(2))
        kills = self._killed(one, "scan", SCAN_PHASES) + self._killed(two, "scan", {"at once": ((), 0.2)})
        self.tally.two_at_once += kills if free else 0

    def _killed(self, work: Fork, command: str, phases: dict[str, tuple[tuple[str, ...], float]]) -> int:
        """Kill it in a phase that is drawn; 1, or 0 if it ended before that."""
        phase = self.random.choice(list(phases))
        points, delay = phases[phase]
        if points:
            point = self.random.choice(points)
            last = self.world.units_left
            times = self._times(phase, point, last)
            # A scan that does not come to the point is killed about its end.
            while (
                work.process.is_alive()
                and (reached := work.reached()).get(point, 0) < times
                and (command != "scan" or reached.get("after-commit", 0) < last)
            ):
                time.sleep(0.0005)
        time.sleep(self.random.uniform(0, delay))
        with contextlib.suppress(ProcessLookupError):
            work.process.kill()
        code = work.wait()
        if code == -signal.SIGKILL:
            self.tally.kills += 1
            self.tally.commands[command] += 1
            self.tally.points[work.last() or "none"] += 1
            self.tally.phases[phase_of(work.last(), work.reached())] += 1
            return 1
        said = work.log.read_text()
        if code == 75 and "another scan" in said:
            self.tally.refused += 1
        elif code != 0:
            self._wrong(f"{command} ended with {code}: {said[-2000:]}")
        else:
            self.ended = self.ended or command == "scan"
        return 0

    def _times(self, phase: str, point: str, units: int) -> int:
        """Which time that the point is reached, of a command with so many units to scan."""
        if phase == "end":
            return units
        if phase in ("registering", "collection") or point.startswith("compact-"):
            return 1
        if point in ("merge-file", "data-opened"):  # some a unit
            return self.random.randint(1, 12)
        return self.random.randint(1, 1 + units // 2)

    def _look(self, plans: int, fresh: Rows) -> None:
        """What a reader sees now is the old content, or whole units of the new one."""
        if not self.world.plans:
            return
        found = content(self.world.index)
        self.tally.looks += 1
        self.tally.rows_seen_between += sum(map(len, found.values()))
        if self.world.plans == plans:
            self._compare(self.before, found)
            return
        shown = {row[:3] for row in found["contexts"]}
        have = {view: [row for row in found[view] if row[:3] in shown] for view in TABLES[1:]}
        want = {view: [row for row in fresh[view] if row[:3] in shown] for view in TABLES[1:]}
        self._compare(want, have)

    def _finish(self, fresh: Rows) -> None:
        """Let it end, sometimes compacted or collected, and compare everything."""
        index = str(self.world.index)
        lines = [self.world.scan()]
        if self.random.random() < 0.5:
            lines.append(["compact", index])
        if self.random.random() < 0.5:
            lines.append(["gc", index, "--grace", "0", "--unfinished", "0"])
        done = fork(self.world.logs, lines, FAN)
        if done.wait():
            self._wrong(f"{lines}: {done.log.read_text()[-2000:]}")
        found = content(self.world.index)
        self.tally.rows_compared += sum(map(len, fresh.values()))
        self._compare(fresh, found)
        shutil.rmtree(self.world.logs)

    def _compare(self, wanted: Rows, found: Rows) -> None:
        if wanted == found:
            return
        for view in sorted({*wanted, *found}):
            one, other = (Counter(map(repr, rows.get(view, ()))) for rows in (wanted, found))
            self.tally.differing += (one - other).total() + (other - one).total()
        self._wrong("; ".join(tiny.differences(wanted, found)))

    def _wrong(self, words: str) -> None:
        print(
            f"WRONG (seed {self.tally.seed}, round {self.tally.rounds}): {words}", file=sys.stderr, flush=True
        )
        self.tally.wrong.append(words)

    # --- Ray

    def ray(self) -> None:
        """A driver with a cluster of its own; its workers are killed, or it is, or it ends before."""
        world, mark = self.world, uuid.uuid4().hex
        code = f"from pipelines import compaction; compaction.FAN = {FAN}; from jobs.cli import main; main()"
        options = ["--allow-removal", "--workers", "2"]
        env = {
            **os.environ,
            "HOME": str(world.home),
            "RAY_AUTH_MODE": "disabled",
            "PYTHONPATH": str(ROOT),
            MARK: mark,
        }
        log = world.home / "ray.log"
        with log.open("w") as stream:
            driver = subprocess.Popen(
                [sys.executable, "-c", code, "scan", str(world.spec), *options], cwd=ROOT, env=env,
                stdout=stream, stderr=stream,
            )  # fmt: skip
        try:
            while self.tally.kills < self.wanted and driver.poll() is None:
                victim = self.random.choice(("driver", "worker", "worker"))
                aim = len(world.commits) + self.random.randint(0, world.units_left - 1)
                while driver.poll() is None and (
                    len(world.commits) < aim or (victim == "worker" and not _workers(mark))
                ):
                    time.sleep(0.01)
                time.sleep(self.random.uniform(0, 0.3))
                if driver.poll() is None:
                    self._kill_of_cluster(driver, mark, victim)
            code_ = driver.wait(300)
            if code_ in (0, 3):
                self.ended = True
            elif code_ != -signal.SIGKILL:
                self._wrong(f"a driver with workers killed ended with {code_}: {log.read_text()[-2000:]}")
        finally:
            _gone(mark)

    def _kill_of_cluster(self, driver: subprocess.Popen[bytes], mark: str, victim: str) -> None:
        if victim == "driver":
            driver.kill()
            driver.wait()
        else:
            workers = _workers(mark)
            if not workers:
                return
            with contextlib.suppress(psutil.NoSuchProcess):
                self.random.choice(workers).kill()
        self.tally.kills += 1
        self.tally.commands[f"ray {victim}"] += 1


def _marked(mark: str) -> list[psutil.Process]:
    """Processes that live and were started with the mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def _workers(mark: str) -> list[psutil.Process]:
    found = []
    for process in _marked(mark):
        with contextlib.suppress(psutil.Error):
            if "ScanWorker" in process.name():
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def _gone(mark: str) -> None:
    """Wait for a cluster whose driver has ended; what stays is killed."""
    until = time.monotonic() + 60
    while left := _marked(mark):
        if time.monotonic() > until:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="of commands without Ray (200)")
    parser.add_argument("--ray", type=int, default=0, help="kills of drivers and workers of Ray (0)")
    parser.add_argument(
        "--seed", type=int, help="of everything that is drawn; else a new one, which is printed"
    )
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}", file=sys.stderr, flush=True)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    result = []
    for how, wanted, share in (("inline", arguments.kills, 12), ("ray", arguments.ray, 4)):
        if not wanted:
            continue
        began, tally = time.monotonic(), Tally(seed)
        with tempfile.TemporaryDirectory(prefix="corpuscope-soak-") as home:
            os.environ["CORPUSCOPE_CACHE"] = f"{home}/cache"
            soak = Soak(World(Path(home), random.Random(f"{seed} {how}")), tally, wanted)
            soak.rounds(soak.inline if how == "inline" else soak.ray, share)
        tally.seconds = round(time.monotonic() - began, 1)
        result.append({"how": how, **vars(tally)})
    print(json.dumps(result, indent=1))
    return int(any(part["wrong"] or part["differing"] for part in result))


if __name__ == "__main__":
    sys.exit(main())
