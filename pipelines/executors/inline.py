"""The inline executor: units one after the other in this process, without Ray.

Invariant: the values are those of any other executor, because batch shapes and threads are the unit's
and the spec's, not the executor's.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence

from pipelines.executors.base import Committed, Failed, Observer, Progress
from pipelines.unit import Scanner, Setup, Work
from sae_runtime.errors import DataError, InputError, one_line


class InlineExecutor:
    """One scanner in this process."""

    workers = 1

    def __init__(self, setup: Setup) -> None:
        self.scanner = Scanner(setup)

    def run(self, items: Sequence[Work], observe: Observer) -> None:
        for work in items:
            self._one(work, observe)

    def close(self) -> None:
        pass

    def _one(self, work: Work, observe: Observer) -> None:
        done = [0, 0]

        def progress(documents: int, tokens: int) -> None:
            done[0] += documents
            done[1] += tokens
            observe(Progress(work, *done))

        self.scanner.progress = progress
        try:
            scanned = self.scanner.scan(work)
        except DataError as error:
            observe(Failed(work, str(error)))
        except InputError:
            raise
        except Exception as error:
            observe(Failed(work, f"{type(error).__name__}: {one_line(error)}", traceback.format_exc()))
        else:
            observe(Committed(work, scanned.commit, scanned.own, scanned.measured))
