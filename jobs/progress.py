"""A scan as a person watches it: a bar on a terminal, plain lines every ten seconds elsewhere.

Invariant: both go to stderr and say the same: documents, counted tokens per second, units done and
failed, time left. Time left comes from units and the share of those in flight, not from guesses.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from jobs.output import clock, count, message, placed
from pipelines.counts import Counts
from pipelines.executors.base import Event, Failed
from pipelines.scan import Started
from pipelines.words import left
from sae_runtime.terminal import plain

_LINE_EVERY = 10.0  # seconds


class ScanProgress:
    """Takes the driver's events; use as a context manager."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.started: Started | None = None
        self.began = self.last_line = time.monotonic()
        self.counts = Counts(0, 0)
        self.bar: Progress | None = None
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("scan"),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                TextColumn("{task.fields[words]}"),
                console=self.console,
                refresh_per_second=4,
            )

    def __enter__(self) -> ScanProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, event: Started | Event) -> None:
        """Take in an event and show it."""
        if isinstance(event, Started):
            self._start(event)
            return
        self.counts.take(event)
        if isinstance(event, Failed):
            unit = event.work.unit
            rows = f"rows {unit.start:,} to {unit.stop:,} are not scanned"
            self._say(f"failed: {placed(unit.path, event.error)} ({rows})")
        self._show()

    def _start(self, event: Started) -> None:
        self.started = event
        self.counts = Counts(event.items, event.bytes)
        self.began = time.monotonic()
        done = f", {event.items_done:,} already committed" if event.items_done else ""
        more = " now, as many as the cluster gets" if event.elastic else ""
        self._say(
            f"run {event.run}: {count(event.items, 'unit')} with {count(event.documents, 'document')}, "
            f"{count(event.workers, 'worker')}{more}{done}"
        )
        if self.bar is not None:
            self.bar.start()
            self.bar.add_task("scan", total=1.0, words="starting: model, SAEs, first tokens")
        else:
            message("loading the model and the SAEs")

    def _show(self) -> None:
        words, share = self._words()
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=share, words=words)
        elif self.counts.ended or time.monotonic() - self.last_line >= _LINE_EVERY:
            self.last_line = time.monotonic()
            message(f"{share:4.0%}  {words}")

    def _words(self) -> tuple[str, float]:
        assert self.started is not None
        counts, elapsed = self.counts, time.monotonic() - self.began
        failed = f", {counts.failed} failed" if counts.failed else ""
        return (
            f"{counts.documents:,}/{self.started.documents:,} documents  "
            f"{counts.tokens / max(elapsed, 1e-9):,.0f} tokens/s  "
            f"units {counts.done:,}/{counts.items:,}{failed}  {clock(left(elapsed, counts.share))} left",
            counts.share,
        )

    def _say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.console.print(plain(text), markup=False)
        else:
            message(text)


class Listing:
    """A suite's listing: a line every ten seconds, so none where it is quick."""

    def __init__(self) -> None:
        self.last_line = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Take in how many SAEs of how many have been looked at."""
        if time.monotonic() - self.last_line >= _LINE_EVERY:
            self.last_line = time.monotonic()
            message(f"{done / total:4.0%}  looked at {done:,} of {count(total, 'SAE')}")


class Steps:
    """Steps whose number nobody knows ahead: a line every ten seconds, so none where it is quick."""

    def __init__(self) -> None:
        self.last_line = time.monotonic()
        self.done = 0

    def __call__(self, words: str) -> None:
        """Take in what is about to be done."""
        if time.monotonic() - self.last_line >= _LINE_EVERY:
            self.last_line = time.monotonic()
            message(f"step {self.done + 1:,}: {words}")
        self.done += 1
