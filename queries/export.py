"""What every export shares: the SAEs that are asked for, slices of their features, the folder written into.

Invariant: a folder with README.json holds a whole export; while it is being written, and after a run that was
killed, it holds UNFINISHED.json instead. Nothing is written where there is anything, except over an earlier
export. Rows come from the views in slices of features, so memory does not grow with an SAE.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from pipelines.storage import Store
from queries.verify import draws
from sae_runtime.errors import DataError, InputError, one_line

README, UNFINISHED = "README.json", "UNFINISHED.json"
_MAKER = "corpuscope export"
_BATCH = 50_000  # rows of a record batch that is streamed

Told = Callable[[str], None]  # takes what is about to be done


@dataclass(frozen=True)
class Sae:
    """An SAE as `saes` has it."""

    id: str
    suite: str
    model: str  # its URI
    site: str
    layer: int | None
    width: int  # features
    keep: str  # tokens | documents | none | sample r
    neuronpedia: str | None
    uri: str
    n_tokens: int  # counted tokens

    @property
    def rate(self) -> float:
        """The fraction of documents whose token rows are kept."""
        if self.keep.startswith("sample "):
            return float(self.keep.removeprefix("sample "))
        return 1.0 if self.keep == "tokens" else 0.0


def saes(con: duckdb.DuckDBPyConnection, ids: Sequence[str] = ()) -> list[Sae]:
    """The SAEs of these ids in that order; without any, all."""
    columns = "suite, model, site, layer, width, keep, neuronpedia, uri, n_tokens"
    rows = ask(con, f"SELECT sae AS id, {columns} FROM saes ORDER BY layer, sae").to_pylist()
    found = {row["id"]: Sae(**row) for row in rows}
    return [found[sae] for sae in dict.fromkeys(ids)] if ids else list(found.values())


def ask(con: duckdb.DuckDBPyConnection, statement: str, values: Sequence[Any] = ()) -> pa.Table:
    """The rows of one of our own statements. DataError where the index's files cannot be read."""
    return pa.Table.from_batches(*_answer(con, statement, values))


def stream(
    con: duckdb.DuckDBPyConnection, statement: str, values: Sequence[Any] = ()
) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The same, a record batch at a time; the connection is busy until the last one."""
    batches, schema = _answer(con, statement, values)
    return schema, batches


def _answer(
    con: duckdb.DuckDBPyConnection, statement: str, values: Sequence[Any]
) -> tuple[Iterator[pa.RecordBatch], pa.Schema]:
    with _damage(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a relation would save a copy, but it runs the statement lazily
        reader = con.execute(statement, list(values)).to_arrow_reader(_BATCH)
    assert reader is not None

    def batches() -> Iterator[pa.RecordBatch]:
        with _damage():
            yield from reader

    return batches(), reader.schema


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except (duckdb.Error, pa.ArrowInvalid, OSError) as error:
        raise DataError(f"index: damaged: {one_line(error)}") from error


def per_feature(con: duckdb.DuckDBPyConnection, sae: Sae, column: str) -> np.ndarray:
    """int64 [width]: a count of `features`."""
    rows = ask(con, f"SELECT feature, {column} AS n FROM features WHERE sae = $1", [sae.id])
    counts = np.zeros(sae.width, np.int64)
    counts[rows["feature"].to_numpy()] = rows["n"].to_numpy()
    return counts


def slices(counts: np.ndarray, limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of features (first, last) that hold `limit` rows at most, or one feature alone."""
    before = np.concatenate([[0], np.cumsum(counts)])
    first = 0
    while first < len(counts):
        last = int(np.searchsorted(before, before[first] + limit, "right")) - 2
        last = min(max(last, first), len(counts) - 1)
        yield first, last
        first = last + 1


def sampled_documents(con: duckdb.DuckDBPyConnection, rate: float) -> np.ndarray:
    """int64, ascending: documents whose token rows `keep: {sample: rate}` keeps; every one at a rate of 1.

    Those where nothing fired are among them, which the rows alone would not show.
    """
    _, batches = stream(con, "SELECT document, corpus, source, row FROM documents")
    kept = [np.empty(0, np.int64)]
    for batch in batches:
        keys = batch["document"].to_numpy()
        drawn = draws(batch["corpus"], batch["source"], batch["row"]) if rate < 1 else np.zeros(len(keys))
        kept.append(keys[drawn < rate])
    return np.sort(np.concatenate(kept))


class Folder:
    """The folder that an export is written into."""

    def __init__(self, uri: str, overwrite: bool, indexes: Sequence[str]) -> None:
        """InputError where there are files already, or inside an index."""
        try:
            self.store = Store(uri)
        except InputError as error:
            raise InputError(f"-o {uri}: {str(error).split(': ', 1)[-1]}") from error
        for index in indexes:
            if f"{self.store.root}/".startswith(f"{Store(index).root}/"):
                raise InputError(f"-o {uri}: is inside the index {index}; give another folder")
        self.uri = uri
        there = self.store.entries("")
        if there:
            self._clear(there, overwrite)
        self._write(UNFINISHED, {"note": "An export is being written here, or was killed. It is not whole."})

    def _clear(self, there: list[str], overwrite: bool) -> None:
        if not overwrite:
            raise InputError(f"-o {self.uri}: is not empty; give another folder, or --overwrite an export")
        if not any(self._ours(name) for name in (README, UNFINISHED) if name in there):
            raise InputError(f"-o {self.uri}: has files that are no export of ours, so they stay; empty it")
        self._write(UNFINISHED, {"note": "An export is being replaced here."})
        self.store.remove([README])
        self.store.remove([name for name in there if name not in (README, UNFINISHED)])
        if self.store.local:  # delphi takes every folder for a hookpoint, empty ones too
            for place, _, _ in os.walk(self.store.root, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(place)

    def _ours(self, name: str) -> bool:
        try:
            return json.loads(self.store.read(name)).get("made_by") == _MAKER
        except (ValueError, AttributeError):
            return False

    def _write(self, name: str, facts: dict[str, Any]) -> None:
        text = json.dumps({"made_by": _MAKER} | facts, indent=1, ensure_ascii=False)
        self.store.write(name, text.encode())

    def abandon(self) -> None:
        """Leave no trace where nothing was written: what was asked for turned out wrong."""
        if self.store.entries("") == [UNFINISHED]:
            self.store.remove([UNFINISHED])

    def finish(self, facts: dict[str, Any]) -> None:
        """Say what the export holds; it is whole from then on."""
        self._write(README, {"made": now()} | facts)
        self.store.remove([UNFINISHED])


def now() -> str:
    """UTC, ISO 8601 with milliseconds."""
    moment = datetime.datetime.now(datetime.timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
