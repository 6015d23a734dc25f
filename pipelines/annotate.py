"""Annotating an index: output tokens, nearest features and decoder norms from the weights, and explanations.

Invariant: what is written is of the very weights that were scanned: the model's and every SAE's fingerprint
is held against the index's before a row of theirs is written. An SAE is done once it is in a record
(annotation_records.py); whoever is stopped goes on after the last one. Nothing else of the index is touched.
Rows of decoders lie in a temporary folder as mapped files, so that memory holds one SAE's weights, the
unembedding and some blocks, however many SAEs are compared.
Trade-off: SAEs share files, closed and published every PUBLISH seconds: a query opens few files, and what a
killed run repeats is bounded.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import annotation_records, scanned
from pipelines.annotation_records import Annotated, Done, Key
from pipelines.explanations import Known, explanations
from pipelines.ledger import DataFileRecord, Ledger
from pipelines.schema import DATA, FACTS, VOCABULARY
from pipelines.storage import DataFile, Store
from pipelines.words import human
from pipelines.writer import ROWS_PER_GROUP, parquet_options, sae_column
from sae_runtime import decoder
from sae_runtime.decoder import Columns, Highest, Readout, Unmapped, Way
from sae_runtime.errors import InputError
from sae_runtime.sae import SaeInfo, SaeWeights

PUBLISH = 120.0  # seconds of work that a killed run repeats at most
TOKENS, NEIGHBOURS, DECODERS = "feature_tokens", "feature_neighbours", "feature_decoders"
EXPLANATIONS = "explanations"
COMPARE = ("own", "site", "all")
_MAPPED = 1 << 12  # features whose output tokens are found and written at once
_COMPARED = 1 << 16  # features whose neighbours are
Told = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What to add and where the weights are; nothing here changes what a row means but its number."""

    saes: tuple[str, ...] = ()  # ids; all of the index where none is given
    tokens: int | None = 10  # of each sign; None leaves them out
    neighbours: int | None = 10  # of the own SAE, and as many of the others
    compare: str = "all"  # one of COMPARE: with which SAEs
    model: str | None = None  # where the model is, if it moved
    suites: tuple[str, ...] = ()  # where the SAEs' suites are, if they moved
    device: str = "cpu"
    anew: tuple[str, ...] = (TOKENS, NEIGHBOURS, DECODERS)  # kinds that are replaced if made otherwise


@dataclass
class Outcome:
    """What was added."""

    rows: dict[str, dict[str, int]] = field(default_factory=dict)  # by SAE and kind
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (SAE, why it has no rows of some kind)


def annotate(store: Store, options: Options, told: Told, outcome: Outcome) -> None:
    """Add decoder-side facts to an index. What is there already stays, unless `options.anew` has its kind and
    it was made with others.

    `told` is told what is about to be done, `outcome` what was.
    Raises InputError where weights are not where they were and `options` does not say where they are, or are
    not those that were scanned.
    """
    identity = Ledger(store).identity()
    if identity is None:
        raise InputError(f"{store.uri}: no index here (no index.json); `corpuscope scan` makes one")
    wanted = _settings(options)
    held = annotation_records.newest(store).done
    records = {sae["id"]: sae for sae in identity["saes"]}
    todo = {
        sae: [
            kind
            for kind in wanted
            for have in [_done(held, kind, sae)]
            if have is None or (kind in options.anew and have != wanted[kind])
        ]
        for sae in sorted(options.saes or records)
    }
    todo = {sae: kinds for sae, kinds in todo.items() if kinds}
    if not todo:
        return
    with tempfile.TemporaryDirectory(prefix="corpuscope-annotate-") as folder:
        work = _Work(store, identity, records, options, Path(folder), told)
        work.prepare(todo)
        writer = Writer(store, outcome)
        try:
            for sae, kinds in todo.items():
                for kind in kinds:
                    told(f"{kind} of {sae}")
                    try:
                        for columns in work.rows(kind, sae):
                            writer.write(kind, (sae, ""), columns)
                        why = None
                    except Unmapped as error:
                        why = str(error)
                        outcome.skipped.append((sae, f"no {kind}: {why}"))
                    writer.done(kind, sae, Done(wanted[kind], why))
                writer.publish_if_due()
            writer.publish()
        except BaseException:
            writer.abandon()
            raise


def import_explanations(
    store: Store,
    uris: Sequence[str],
    source: str | None,
    saes: Sequence[str],
    resolve: Callable[[str], str],
    outcome: Outcome,
    told: Told = lambda words: None,
) -> None:
    """Add explanations to an index, in place of those of the same SAEs from the same sources.

    `saes` is the one SAE that they are of where files do not say, `resolve` gives the id that a name stands
    for (InputError). Raises InputError for files that are not as they should be; nothing is added then.
    """
    identity = Ledger(store).identity()
    if identity is None:
        raise InputError(f"{store.uri}: no index here (no index.json); `corpuscope scan` makes one")
    widths = {sae["id"]: int(sae["width"]) for sae in identity["saes"]}
    sites = {sae["id"]: str(sae["site"]) for sae in identity["saes"]}
    known = Known(widths, sites, resolve, saes)
    tables: dict[Key, list[pa.Table]] = {}
    for uri in uris:
        told(f"reading {uri}")
        for key, table in explanations(uri, known, source, told):
            tables.setdefault(key, []).append(table)
    if not tables:
        raise InputError(f"--explanations: there are none in {', '.join(uris)}")
    writer = Writer(store, outcome)
    try:
        for key in sorted(tables):
            whole = pa.concat_tables(tables.pop(key))
            # A stable sort: several explanations of a feature stay in the order of their files.
            order = np.argsort(whole["feature"].to_numpy(), kind="stable")
            writer.write(EXPLANATIONS, key, whole.take(pa.array(order)))
        writer.publish()
    except BaseException:
        writer.abandon()
        raise


def _settings(options: Options) -> dict[str, str]:
    """What makes facts of a kind what they are, for each kind that is wanted."""
    wanted = {DECODERS: "as published"}
    if options.tokens is not None:
        wanted[TOKENS] = f"{options.tokens} of each sign"
    if options.neighbours is not None:
        wanted[NEIGHBOURS] = f"{options.neighbours}, compared with {options.compare}"
    return wanted


def _done(held: Mapping[str, Mapping[str, Done]], kind: str, sae: str) -> str | None:
    found = held.get(kind, {}).get(sae)
    return None if found is None else found.settings


# --- writing


class Writer:
    """Files of annotations, a kind each, that hold rows of several SAEs until they are published.

    Rows of one SAE come together and sorted by feature, SAEs in any order.
    """

    def __init__(self, store: Store, outcome: Outcome) -> None:
        self._store, self._outcome = store, outcome
        self._open: dict[str, tuple[str, DataFile, pq.ParquetWriter]] = {}
        self._rows: dict[str, int] = {}
        self._keys: dict[str, set[Key]] = {}
        self._done: dict[str, dict[str, Done]] = {}
        self._since = time.monotonic()

    def write(self, kind: str, key: Key, table: pa.Table) -> None:
        """Append rows (columns of FACTS[kind]) of one SAE, of explanations from one source."""
        if not table.num_rows:
            return
        if kind not in self._open:
            path = f"{DATA}/{kind}/annotation-{uuid.uuid4().hex[:12]}.parquet"
            stream = self._store.create(path)
            schema = FACTS[kind]
            self._open[kind] = path, stream, pq.ParquetWriter(stream, schema, **parquet_options(kind, schema))
            self._rows[kind], self._keys[kind] = 0, set()
        self._open[kind][2].write_table(table, row_group_size=ROWS_PER_GROUP)
        self._rows[kind] += table.num_rows
        self._keys[kind].add(key)
        counts = self._outcome.rows.setdefault(key[0], {})
        counts[kind] = counts.get(kind, 0) + table.num_rows

    def done(self, kind: str, sae: str, done: Done) -> None:
        """All rows of a kind of an SAE have been written."""
        self._done.setdefault(kind, {})[sae] = done

    def publish_if_due(self) -> None:
        """Publish after PUBLISH seconds."""
        if time.monotonic() - self._since >= PUBLISH:
            self.publish()

    def publish(self) -> None:
        """Finish the files and make the record that names them."""
        files = []
        for kind, (path, stream, writer) in self._open.items():
            writer.close()
            stream.close()
            record = DataFileRecord(path, self._rows[kind], stream.bytes, stream.digest)
            files.append(Annotated(kind, record, tuple(sorted(self._keys[kind]))))
        self._open.clear()
        if files or self._done:
            annotation_records.publish(self._store, files, self._done)
        self._done = {}
        self._since = time.monotonic()

    def abandon(self) -> None:
        """End without a record; `gc` removes what is left."""
        for _, stream, writer in self._open.values():
            stream.discard()
            writer.close()
            stream.close()
        self._open.clear()


# --- the facts


@dataclass(frozen=True)
class _Units:
    """Rows of an SAE's decoder of length 1; those that are zero are left out."""

    sae: str
    features: np.ndarray  # int64 [n], ascending
    rows: np.ndarray  # float32 [n, d]


class _Work:
    """The weights of an index and what is made of them, loaded as it is asked for."""

    def __init__(
        self, store: Store, identity: dict[str, Any], records: dict[str, dict[str, Any]],
        options: Options, folder: Path, told: Told,
    ) -> None:  # fmt: skip
        self.store, self.identity, self.records = store, identity, records
        self.options, self.folder, self.told = options, folder, told
        self._infos: dict[str, SaeInfo] = {}
        self._loaded: tuple[str, SaeWeights] | None = None
        # By SAE, and whether in the residual stream.
        self._kept: dict[tuple[str, bool], _Units | Unmapped] = {}

    def prepare(self, todo: Mapping[str, Sequence[str]]) -> None:
        """Find the weights of what is to be done before any is read. Raises InputError."""
        across = self.options.compare != "own" and any(NEIGHBOURS in kinds for kinds in todo.values())
        ids = list(self.records) if across else list(todo)
        source = scanned.model(self.identity, self.options.model)
        self.told("finding the SAEs")
        self._infos = scanned.saes(source, [self.records[sae] for sae in ids], self.options.suites)
        self.source = source
        with self.store.open(VOCABULARY) as stream:
            self.vocabulary = pq.read_metadata(stream).num_rows
        if across:
            need = 2 * 4 * sum(self.records[sae]["width"] * self.records[sae]["d_in"] for sae in ids)
            free = shutil.disk_usage(self.folder).free
            if need > free:
                raise InputError(
                    f"--compare {self.options.compare}: the decoders take {human(need)} in "
                    f"{self.folder.parent}, which has {human(free)} left; set TMPDIR, or give --compare own"
                )

    @cached_property
    def readout(self) -> Readout:
        """The model's, loaded when it is first needed."""
        self.told("loading the model's unembedding")
        outs = sorted({info.out for info in self._infos.values() if info.out is not None})
        return Readout(self.source, outs)

    def rows(self, kind: str, sae: str) -> Iterator[pa.Table]:
        """Rows of a kind of an SAE, by feature. Raises Unmapped where it can have none."""
        if kind == DECODERS:
            norm = decoder.norms(self._weights(sae))
            yield _table(kind, sae, np.arange(len(norm)), norm=norm)
        elif kind == TOKENS:
            yield from self._tokens(sae)
        else:
            yield from self._neighbours(sae)

    def _weights(self, sae: str) -> SaeWeights:
        """An SAE's tensors; the last ones stay in memory. InputError where they are not what was scanned."""
        if self._loaded is not None and self._loaded[0] == sae:
            return self._loaded[1]
        self._loaded = None
        found = scanned.weights(self._infos[sae], self.records[sae])
        self._loaded = sae, found
        return found

    def _way(self, sae: str) -> Way:
        out = self._infos[sae].out
        if out is None:
            raise Unmapped("its files do not say where its decoder writes")
        return self.readout.way(out)

    def _tokens(self, sae: str) -> Iterator[pa.Table]:
        assert self.options.tokens is not None
        way = self._way(sae)
        rows = decoder.decoder(self._weights(sae))
        unembedding = self.readout.unembedding[: self.vocabulary].numpy()
        columns = Columns([unembedding])
        for first in range(0, len(rows), _MAPPED):
            part = rows[first : first + _MAPPED]
            readers = self.readout.readers(way(part)).float().numpy()
            features = first + np.flatnonzero((part != 0).any(dim=1).numpy())
            some = readers[features - first]
            self.told(f"{TOKENS} of {sae}, {first:,} of {len(rows):,}")
            top, bottom = decoder.highest(some, columns, self.options.tokens, self.options.device, (1, -1))
            yield _token_rows(sae, features, top, bottom)

    def _neighbours(self, sae: str) -> Iterator[pa.Table]:
        k = self.options.neighbours
        assert k is not None
        own, here = self._units(sae, False), self._infos[sae].out
        beside: list[_Units] = []  # at the same site, compared there
        across: list[_Units] = []  # elsewhere, compared in the residual stream
        mine = None
        if self.options.compare != "own" and here is not None:
            beside = self._those((o for o in self.records if o != sae and self._infos[o].out == here), False)
        if self.options.compare == "all":
            with contextlib.suppress(Unmapped):
                mine = self._units(sae, True)
            if mine is not None:
                across = self._those((o for o in self.records if self._infos[o].out != here), True)
        for first in range(0, len(own.rows), _COMPARED):
            self.told(f"{NEIGHBOURS} of {sae}, {first:,} of {len(own.rows):,}")
            rows = own.rows[first : first + _COMPARED]
            features = own.features[first : first + _COMPARED]
            same = self._nearest(rows, [own], k, first)
            others = self._nearest(rows, beside, k)
            if mine is not None:
                far = _nothing(len(features), k)
                there = np.isin(features, mine.features)
                at = np.searchsorted(mine.features, features[there])
                found = self._nearest(mine.rows[at], across, k)
                far.columns[there], far.values[there] = found.columns, found.values
                others = decoder.merged(others, far, k)
            yield _neighbour_rows(sae, features, decoder.merged(same, others, 2 * k), self._order)

    def _those(self, saes: Iterable[str], in_residual: bool) -> list[_Units]:
        found = []
        for sae in sorted(saes):
            self.told(f"decoder of {sae}")
            with contextlib.suppress(Unmapped):  # it is told of the SAE itself
                found.append(self._units(sae, in_residual))
        return found

    def _nearest(self, rows: np.ndarray, those: Sequence[_Units], k: int, own: int | None = None) -> Highest:
        """The nearest of some SAEs' rows; as columns place of the SAE << 32 | feature."""
        if not those:
            return _nothing(len(rows), k)
        columns = Columns([each.rows for each in those])
        [found] = decoder.highest(rows, columns, k, self.options.device, own=own)
        codes = np.concatenate([(self._order.index(each.sae) << 32) | each.features for each in those])
        return Highest(np.where(found.columns < 0, -1, codes[found.columns]), found.values)

    @cached_property
    def _order(self) -> list[str]:
        return sorted(self.records)

    def _units(self, sae: str, in_residual: bool) -> _Units:
        """An SAE's rows of length 1, at its own site or in the residual stream, in a mapped file.

        Raises Unmapped where there are none.
        """
        if in_residual and self._way(sae).straight:
            in_residual = False
        if (sae, in_residual) not in self._kept:
            self._kept[sae, in_residual] = self._write_units(sae, in_residual)
        found = self._kept[sae, in_residual]
        if isinstance(found, Unmapped):
            raise found
        return found

    def _write_units(self, sae: str, in_residual: bool) -> _Units | Unmapped:
        try:
            way = self._way(sae) if in_residual else Way()
            rows = decoder.decoder(self._weights(sae))
        except Unmapped as why:
            return why
        file = self.folder / f"{len(self._kept)}.rows"
        features, width, first = [], 0, 0
        with file.open("wb") as stream:
            for part in decoder.mapped(rows, way):
                there = (part != 0).any(axis=1)
                decoder.units(part[there]).tofile(stream)
                features.append(first + np.flatnonzero(there))
                width, first = part.shape[1], first + len(part)
        numbers = np.concatenate(features)
        if not len(numbers):
            return Unmapped("every row of its decoder is zero")
        return _Units(sae, numbers, np.memmap(file, np.float32, "r", shape=(len(numbers), width)))


def _nothing(rows: int, k: int) -> Highest:
    return Highest(np.full((rows, k), -1, np.int64), np.full((rows, k), -np.inf))


def _token_rows(sae: str, features: np.ndarray, top: Highest, bottom: Highest) -> pa.Table:
    many = top.columns.shape[1]
    tokens = np.stack([top.columns, bottom.columns], axis=1)  # [features, signs, ranks]
    logits = np.stack([top.values, -bottom.values], axis=1)
    there = tokens >= 0
    shape = tokens.shape
    return _table(
        TOKENS,
        sae,
        np.broadcast_to(features[:, None, None], shape)[there],
        sign=np.broadcast_to(np.array([1, -1])[None, :, None], shape)[there],
        rank=np.broadcast_to(np.arange(1, many + 1), shape)[there],
        token=tokens[there],
        logit=logits[there],
    )


def _neighbour_rows(sae: str, features: np.ndarray, found: Highest, order: Sequence[str]) -> pa.Table:
    there = found.columns >= 0
    shape = there.shape
    codes = found.columns[there]
    others = pa.DictionaryArray.from_arrays(pa.array((codes >> 32).astype(np.int32)), pa.array(order))
    return _table(
        NEIGHBOURS,
        sae,
        np.broadcast_to(features[:, None], shape)[there],
        rank=np.broadcast_to(np.arange(1, shape[1] + 1), shape)[there],
        other_sae=others,
        other_feature=codes & 0xFFFFFFFF,
        cosine=np.clip(found.values[there], -1, 1),
    )


def _table(kind: str, sae: str, features: np.ndarray, **columns: Any) -> pa.Table:
    schema = FACTS[kind]
    found = {"sae": sae_column(sae, len(features)), "feature": features} | columns
    arrays = [
        value if isinstance(value, pa.Array) else pa.array(value).cast(field.type)
        for field in schema
        for value in [found[field.name]]
    ]
    return pa.Table.from_arrays(arrays, schema=schema)
