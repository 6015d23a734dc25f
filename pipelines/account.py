"""The books of one attempt at a run: what its events add up to, put into the index when it ends.

Invariant: the summary is written however the attempt ends (done, failed, stopped by a signal), while the
lease is still held; a process that is killed writes none, and nothing misses it. It costs an object a run.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType

from pipelines import logs, summary
from pipelines.counts import Counts
from pipelines.executors.base import Attempted, Committed, Event, Failed
from pipelines.faults import crash
from pipelines.lease import Done
from pipelines.storage import Store
from pipelines.summary import RunSummary
from pipelines.words import count, placed
from sae_runtime.errors import QUARANTINED, CorpuscopeError, exit_code, one_line

DONE, NOTHING = "done", "nothing was to be scanned"


class Account:
    """Use as a context manager, inside the lease; `take` every event, then `close` at a good end."""

    def __init__(
        self,
        store: Store,
        run: int,
        term: int,
        code: str,
        executor: str,
        device: str,
        price: float | None,
        notice: Callable[[str], None],
    ) -> None:
        """`price` is of a worker that is held for an hour. `device` is its kind, `cpu` or `cuda`."""
        self._store, self._run, self._term, self._notice = store, run, term, notice
        self._code, self._executor, self._device, self._price = code, executor, device, price
        self._started, self._began = time.time(), time.monotonic()
        self._counts = Counts(0, 0)
        self._sums: Counter[str] = Counter()
        self._devices: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._rows: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._stages: dict[str, float] = {}
        self.held, self._most, self._looked = 0, 0, self._began  # workers
        self.worker_seconds = 0.0
        self.merged_bytes = 0
        self._error = ""
        self._end = (0, NOTHING)

    def begin(self, items: int, size: int) -> None:
        """So many (unit, SAE group) pairs, of so many bytes of text, are to be done."""
        self._counts = Counts(items, size)
        logs.tell("scan_started", run=self._run, index=self._store.uri, term=self._term, units=items)

    def take(self, event: Event, held: int) -> None:
        """Take in an event; so many workers are held now."""
        self.hold(held)
        self._counts.take(event)
        if isinstance(event, Committed):
            for stage, seconds in event.stages.items():
                self._stages[stage] = self._stages.get(stage, 0.0) + seconds
            if event.own:
                self._commit(event)
        elif isinstance(event, Attempted):
            self._failures[event.kind] += 1
            self._sums["retries"] += not event.final
            self._error = placed(event.work.unit.path, event.error)
        elif isinstance(event, Failed):
            self._sums["given_up"] += 1
        else:
            return
        _log(event)

    def hold(self, held: int) -> None:
        """So many workers are held now; until now it was as many as told the last time."""
        now = time.monotonic()
        self.worker_seconds += self.held * (now - self._looked)
        self.held, self._looked, self._most = held, now, max(self._most, held)

    def _commit(self, event: Committed) -> None:
        commit = event.commit
        self._devices[commit.device] += 1
        self._sums["committed"] += 1
        self._sums["tokens_run"] += commit.tokens_run
        if not commit.group:
            self._sums["documents"] += commit.documents
            self._sums["quarantined"] += commit.quarantined
            self._sums["tokens"] += commit.tokens
        for kind, file in commit.files.items():
            self._rows[kind] += file.rows
            self._bytes[kind] += file.bytes

    @property
    def ended(self) -> bool:
        """Every unit is committed or given up."""
        return self._counts.ended

    @property
    def flying(self) -> dict[str, int]:
        """Units in flight with the counted tokens done of each."""
        return {unit: event.tokens for (unit, _), event in self._counts.flying.items()}

    @property
    def done(self) -> Done:
        """How far it is."""
        counts = self._counts
        return Done(
            seconds=time.monotonic() - self._began,
            units=counts.items,
            committed=counts.done,
            given_up=counts.failed,
            documents=counts.documents,
            tokens=counts.tokens,
            share=counts.share,
            failures=dict(self._failures),
            error=self._error,
        )

    @property
    def summary(self) -> RunSummary:
        """What there is to say by now."""
        code, reason = self._end
        hours = self.worker_seconds / 3600
        return RunSummary(
            run=self._run,
            attempts=1,
            code=(self._code,),
            devices=dict(self._devices),
            executor=self._executor,
            host=socket.gethostname(),
            process=os.getpid(),
            workers=self._most,
            started=self._started,
            finished=time.time(),
            seconds=time.monotonic() - self._began,
            units=self._counts.items,
            committed=self._sums["committed"],
            documents=self._sums["documents"],
            quarantined=self._sums["quarantined"],
            tokens=self._sums["tokens"],
            tokens_run=self._sums["tokens_run"],
            retries=self._sums["retries"],
            failures=dict(self._failures),
            given_up=self._sums["given_up"],
            rows=dict(self._rows),
            bytes=dict(self._bytes),
            merged_bytes=self.merged_bytes,
            worker_seconds=self.worker_seconds,
            gpu_seconds=self.worker_seconds if self._device == "cuda" else 0.0,
            stages={stage: round(seconds, 3) for stage, seconds in self._stages.items()},
            cost=None if self._price is None else hours * self._price,
            exit_code=code,
            reason=reason,
            error=self._error,
        )

    def close(self, failed: int, quarantined: int) -> None:
        """It came to its end: so many pairs were given up, and so many documents are in quarantine."""
        if failed:
            self._end = CorpuscopeError.exit_code, f"{failed:,} of {self._counts.items:,} units were given up"
        elif quarantined:
            self._end = QUARANTINED, f"{DONE}; {count(quarantined, 'document')} could not be scanned"
        else:
            self._end = 0, DONE

    def __enter__(self) -> Account:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is not None:
            words = "stopped by a signal" if isinstance(value, KeyboardInterrupt) else one_line(value)
            self._end = exit_code(value), words
        crash("before-summary")
        found = self.summary
        try:
            summary.write(self._store, self._term, found)
        except OSError as error:
            self._notice(f"note: the run's summary could not be written: {one_line(error)}")
        # The reason may quote a document, so the log has the kind of it only.
        logs.tell(
            "scan_ended",
            run=self._run,
            term=self._term,
            exit_code=found.exit_code,
            error_type=None if kind is None else kind.__name__,
            seconds=round(found.seconds, 3),
            documents=found.documents,
            tokens=found.tokens,
            committed=found.committed,
            given_up=found.given_up,
            worker_seconds=round(found.worker_seconds, 3),
        )


def _log(event: Event) -> None:
    about = logs.of(event.work)
    if isinstance(event, Committed):
        logs.tell("unit_committed", **about, own=event.own, tokens=event.commit.tokens)
    elif isinstance(event, Attempted):
        # What a task failed on may quote a document; machines, networks and stores know none.
        quoted = {"error": event.error} if event.kind != "task" else {}
        told = {"kind": event.kind, "worker_host": event.host, "final": event.final, **quoted}
        logs.tell("attempt_failed", logs.WARNING, **about, **told)
    elif isinstance(event, Failed):
        logs.tell("unit_given_up", logs.ERROR, **about)
