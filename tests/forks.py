"""The real command in forks of a process that has everything imported: a run costs its work, not its imports.

The forks come from multiprocessing's fork server, which has no threads: a process with pytest or Ray in it
is none to fork. What a child reaches (pipelines/faults.py) can be watched from outside, as it goes on.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import struct
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from pipelines import faults
from pipelines.faults import POINTS, Point

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["jobs.cli", "jobs.progress", "jobs.specfile", "pipelines.scan", "pipelines.gc", "queries",
     "transformers.models.gemma2.modeling_gemma2", "tests.warm"]
)  # fmt: skip
FREE = "--free"  # before a command: it does not heed the lease


@dataclass(frozen=True)
class Fork:
    """Commands at work in one process, one after the other."""

    process: ForkServerProcess
    log: Path  # of stdout and stderr
    told: Path

    def wait(self) -> int:
        """The exit code: of the first command that did not end well, -9 of a process that was killed."""
        self.process.join()
        code = self.process.exitcode
        assert code is not None
        return code

    def reached(self) -> dict[Point, int]:
        """How often it was at each point that it was at."""
        return {point: times for point, times in zip(POINTS, self._numbers()[1:], strict=True) if times}

    def last(self) -> Point | None:
        """The last point that it was at."""
        number = self._numbers()[0]
        return POINTS[number - 1] if number else None

    def _numbers(self) -> tuple[int, ...]:
        return struct.unpack(f"<{len(POINTS) + 1}I", self.told.read_bytes())


class _Told(Counter[str]):
    """`faults.reached`, in a file that another process reads."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        with file.open("r+b") as stream:
            self._map = mmap.mmap(stream.fileno(), 0)

    def __setitem__(self, point: Any, times: int) -> None:
        super().__setitem__(point, times)
        number = 1 + POINTS.index(point)
        struct.pack_into("<I", self._map, 4 * number, times)
        struct.pack_into("<I", self._map, 0, number)


def fork(folder: Path, lines: Sequence[Sequence[str]], fan: int, plan: str = "none") -> Fork:
    """Start command lines of `corpuscope`, one after the other until one fails, merging `fan` at once.

    `plan` is a fault. Log and told points go to files in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("*.log")))
    log, told = folder / f"{number}.log", folder / f"{number}.told"
    log.touch()
    told.write_bytes(bytes(4 * (len(POINTS) + 1)))
    process = _context.Process(
        target=_run, args=(lines, {**os.environ, "CORPUSCOPE_CRASH": plan}, fan, log, told)
    )
    process.start()
    return Fork(process, log, told)


def _run(lines: Sequence[Sequence[str]], env: dict[str, str], fan: int, log: Path, told: Path) -> None:
    from jobs.cli import main
    from pipelines import compaction
    from pipelines.lease import Lease

    stream = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ.update(env)
    faults.reached = _Told(told)
    compaction.FAN = fan
    for line in lines:
        if line[0] == FREE:
            Lease.look = Lease.take = Lease.check = lambda self, *_: None  # type: ignore[method-assign]
            Lease.term = os.getpid()  # type: ignore[assignment,method-assign]
            line = line[1:]
        sys.argv = ["corpuscope", *line]
        try:
            main()
        except SystemExit as ended:
            if ended.code not in (0, 3):
                raise
