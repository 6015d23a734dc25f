"""What the explorer keeps between requests: a connection to the index as it was at one moment, and its like.

Invariant: a request sees one moment (`Snapshot`) from its beginning to its end. While a scan goes on a newer
one is made beside it, in a thread, and takes its place; the older one ends with its last request.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import duckdb

from pipelines.contents import Contents
from pipelines.storage import Store
from queries.connect import opened, resolved
from queries.lookup import ask
from queries.pruning import remember
from queries.relations import name as identifier
from sae_runtime.errors import CorpuscopeError, DataError

T = TypeVar("T")
_LOOK_SECONDS = 5.0  # between looks for new commits, at least
_SHARE = 0.05  # of the time at most that goes into such looks
_KEPT = 64  # answers that a snapshot remembers
_COLUMNS = "feature, n_tokens, n_documents, density, mean_active, max"
_TABLES = 16  # of SAEs' features that it holds in memory


class Snapshot:
    """An index, or several, at one moment."""

    def __init__(self, found: Sequence[Contents]) -> None:
        """Raises DataError, InputError."""
        self.found = tuple(found)
        self.when = time.time()  # seconds since 1970
        self.named = frozenset(path for each in found for path in each.named)
        self._con = opened(found)
        self._idle: queue.SimpleQueue[duckdb.DuckDBPyConnection] = queue.SimpleQueue()
        self._answers: OrderedDict[Any, Future[Any]] = OrderedDict()
        self._tables: OrderedDict[tuple[str, bool], str] = OrderedDict()
        self._lock, self._making = threading.Lock(), threading.Lock()

    @property
    def told(self) -> str:
        """When it was, in UTC."""
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.when))

    @property
    def saes(self) -> list[dict[str, Any]]:
        """What the indexes' identities say of their SAEs: `id`, `site`, `layer`, `width`, `keep`, …"""
        return [sae for each in self.found for sae in each.identity["saes"]]

    @contextlib.contextmanager
    def connection(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection of one's own for a while; several are used side by side."""
        try:
            con = self._idle.get_nowait()
        except queue.Empty:
            con = self._con.cursor()
            remember(con, self.found)
        try:
            yield con
        finally:
            self._idle.put(con)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` gives, made once for a key; who comes meanwhile waits. An exception is not kept."""
        with self._lock:
            future, mine = self._answers.get(key), False
            if future is None:
                future, mine = self._answers.setdefault(key, Future()), True
            self._answers.move_to_end(key)
            while len(self._answers) > _KEPT:
                self._answers.popitem(last=False)
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:
                with self._lock:
                    self._answers.pop(key, None)
                future.set_exception(error)
                raise
        return future.result()

    def features(self, con: duckdb.DuckDBPyConnection, sae: str, quantiles: bool = False) -> str:
        """The name of a table in memory with an SAE's rows of `features`, of the columns that pages show.

        The view merges partial summaries for each question; a page asks several. Quantiles, which take the
        histograms, are there where they are asked for: of 16,384 features 0.3 s, without them 0.06.
        """
        key, columns = (sae, quantiles), _COLUMNS + (", p50, p99" if quantiles else "")
        with self._making:
            table = self._tables.pop(key, None)
            if table is None:
                table = f"_features_of_{time.monotonic_ns()}"
                ask(
                    con,
                    f"CREATE TABLE {identifier(table)} AS SELECT {columns} FROM features WHERE sae = $1",
                    [sae],
                )
            self._tables[key] = table
            while len(self._tables) > _TABLES:
                _, old = self._tables.popitem(last=False)
                ask(con, f"DROP TABLE {identifier(old)}")
            return table


class Reader(Protocol):
    """Reads passages; what comes is a `pipelines.passage.Passage`."""

    doing: str

    def read(self, identity: dict[str, Any], sae: str, text: str) -> Future[Any]:
        """What an SAE of an index has on a text."""
        ...


@dataclass
class Outside:
    """What the explorer is handed, since this room may not know of it."""

    # What an index says of itself (pipelines/status.py): counts, state, progress.
    status: Callable[[str], Any]
    # Runs a model on a text (pipelines/reading.py); None where that is not wanted.
    reader: Reader | None = None


@dataclass
class Session:
    """All that the explorer keeps. Make it by `open_session`."""

    uris: tuple[str, ...]
    outside: Outside
    snapshot: Snapshot
    seconds: float = 30.0  # that a page's queries may take
    rows: int = 1000  # that a table of SQL shows
    trouble: str = ""  # why the last look at the index failed
    _look_at: float = field(default_factory=lambda: time.monotonic() + _LOOK_SECONDS)
    _looking: threading.Lock = field(default_factory=threading.Lock)

    def current(self) -> Snapshot:
        """The newest snapshot that there is; looks for a newer one in the background now and then."""
        if time.monotonic() >= self._look_at and self._looking.acquire(blocking=False):
            threading.Thread(target=self._look, name="explorer-look", daemon=True).start()
        return self.snapshot

    def renew(self) -> Snapshot:
        """A snapshot of now, where files of the last one are gone. Raises DataError, InputError."""
        self.snapshot = Snapshot([resolved(Store(uri)) for uri in self.uris])
        return self.snapshot

    def _look(self) -> None:
        began = time.monotonic()
        try:
            found = [resolved(Store(uri)) for uri in self.uris]
            named = frozenset(path for each in found for path in each.named)
            if named != self.snapshot.named:
                self.snapshot = Snapshot(found)
            self.trouble = ""
        except CorpuscopeError as error:  # what was opened stays; pages say that it grows old
            self.trouble = str(error)
        finally:
            took = time.monotonic() - began
            self._look_at = time.monotonic() + max(_LOOK_SECONDS, took / _SHARE)
            self._looking.release()


def open_session(uris: Sequence[str], outside: Outside, **settings: Any) -> Session:
    """Open an index, or several over the same documents. Raises InputError, DataError."""
    try:
        snapshot = Snapshot([resolved(Store(uri)) for uri in uris])
    except DataError:  # compacted meanwhile
        snapshot = Snapshot([resolved(Store(uri)) for uri in uris])
    return Session(tuple(uris), outside, snapshot, **settings)
