"""The scan of one unit: documents in, data files out, one commit to publish.

Invariant: everything that is written depends on the unit and the index's settings alone. Contexts go
to the model in chunks of the document order and, inside a chunk, in batches of like length; batch
shapes follow from the unit, because a bfloat16 model gives other values for other shapes (measured
with SmolLM2 on a CPU: halving a batch changed 87 % of them). Right padding needs no mask. Where
`model.attention` packs, a batch is a row of contexts and chunks end where rows do.
A document that cannot be scanned keeps its number and, where it has contexts, their numbers and slots, so
that it changes nothing for its neighbours. Of one that the model cannot run this is known only once it has
been run: what is left of the unit is then run in search of others, and the unit once more without them.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines import logs, staging
from pipelines.age import Age
from pipelines.background import BackgroundWriter
from pipelines.chunks import (
    Captured,
    Placed,
    PlacedDocument,
    Sample,
    capture,
    chunk_tables,
    parts,
    without,
)
from pipelines.contexts import (
    Context,
    ContextRule,
    Segment,
    context_rule,
    contexts,
    plain_segments,
    strip_bos,
    tokenize,
)
from pipelines.conversations import Conversations
from pipelines.corpus import Document, read_documents
from pipelines.faults import crash
from pipelines.files import SourceFile, check_unchanged
from pipelines.ledger import Commit, DataFileRecord, Ledger
from pipelines.partials import Moments, SampledDocuments, write_summary
from pipelines.quarantine import (
    MANY,
    Poisoned,
    Refused,
    check_groups,
    check_unit,
    culprits_apart,
    line,
)
from pipelines.registry import Unit
from pipelines.sae_unit import SaeUnit
from pipelines.schema import LOCAL_MAX, key
from pipelines.selfcheck import Measured
from pipelines.spec import ScanSpec
from pipelines.staged import Staged
from pipelines.stages import Stopwatch
from pipelines.storage import Store
from pipelines.writer import UnitWriter, windows_column
from sae_runtime import suites
from sae_runtime.device import device_model
from sae_runtime.encode import Encoder
from sae_runtime.errors import DataError
from sae_runtime.model import LanguageModel, ModelSource, load_tokenizer
from sae_runtime.sae import SaeInfo
from sae_runtime.sites import Site
from sae_runtime.summaries import Chunk
from sae_runtime.threads import Threads, keep_freed_memory

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
CHUNK_TOKENS = {"cpu": 16384, "cuda": 131072}
HOST_THREADS = 16  # at most, for a worker with a GPU
SEGMENT_ROWS = 1 << 24  # rows of activations and document_features held before they are sorted and written
SAMPLE_EVERY = 64  # counted tokens between those that the reconstruction error is measured on
MAX_AGE = 6 * 3600.0  # seconds from an attempt's first write to its commit; gc waits four times as long
_TOKENIZE = 64  # documents given to the tokenizer at a time


@dataclass(frozen=True)
class Work:
    """One item for a worker: a unit, an SAE group, and where the unit's file is."""

    unit: Unit
    group: int
    file: SourceFile
    run: int


@dataclass(frozen=True)
class Scanned:
    """The commit that stands for a piece of work; `own` if this attempt made it, not another first."""

    commit: Commit
    own: bool
    stages: Mapping[str, float]  # seconds of this attempt by stage (pipelines/stages.py)
    measured: tuple[Measured, ...] = ()


@dataclass(frozen=True)
class Setup:
    """What every worker of a scan is started with."""

    spec: ScanSpec
    source: ModelSource
    device: str
    groups: tuple[tuple[SaeInfo, ...], ...]
    metadata: dict[str, str]
    index: str
    templates: tuple[str | None, ...] = ()  # each source's chat template; None for one of texts
    staged: Staged | None = None  # what workers fetch from the index's store rather than from the hub


class Scanner:
    """Scans units one after the other; keeps the model and one group's SAEs loaded.

    `progress(documents, tokens)` is called with increments as chunks are done.
    """

    def __init__(self, setup: Setup, progress: Callable[[int, int], None] = lambda d, t: None) -> None:
        keep_freed_memory()
        torch.set_num_threads(setup.spec.model.threads)
        threads, gpu = setup.spec.model.threads, torch.device(setup.device).type == "cuda"
        # Beside a GPU, which runs one batch at a time, the host's work on SAEs may take many cores.
        self.threads = Threads(max(threads, min(HOST_THREADS, os.cpu_count() or 1)) if gpu else threads)
        self.batch_threads = Threads(1) if gpu else self.threads
        self.setup = setup
        self.progress = progress
        self.store = Store(setup.index)
        self.source = staging.here(setup.staged, setup.source, self.store)
        self.tokenizer = load_tokenizer(self.source)
        self.rule: ContextRule = context_rule(setup.spec.context, self.tokenizer)
        self.conversations = {
            text: Conversations(self.tokenizer, text) for text in setup.templates if text is not None
        }
        self.group = -1
        self.watch = Stopwatch()  # of the unit in hand

    def scan(self, work: Work) -> Scanned:
        """Scan, write and commit; the commit that stands may be another attempt's.

        Raises DataError where too many documents, or not those that other SAE groups refuse, cannot be
        scanned, and for a file that has changed since it was planned. What is not a document's fault is
        raised as it is, as is TimeoutError for an attempt that took longer than MAX_AGE.
        """
        crash("before-unit")
        self.watch = Stopwatch()
        logs.tell("unit_started", **logs.of(work))
        self.load(work.group)
        self.watch.lap("load")
        started, age = time.time(), Age()
        poison: dict[int, str] = {}
        while (done := self._attempt(work, poison)) is None:
            pass
        attempt, scan, records = done
        commit = Commit(
            unit=work.unit.unit,
            ordinal=work.unit.ordinal,
            group=work.group,
            attempt=attempt,
            run=work.run,
            documents=scan.documents,
            quarantined=len(scan.quarantine),
            poison=tuple(sorted(poison)),
            contexts=scan.contexts,
            tokens=scan.counted,
            tokens_run=scan.tokens,
            started=started,
            finished=time.time(),
            device=device_model(self.setup.device),
            files=records,
        )
        crash("before-commit")
        check_unchanged(work.file, work.unit.digest)
        self._check_groups(commit, work)
        if age.seconds > MAX_AGE:
            raise TimeoutError(f"{work.unit.path}: the unit took over {MAX_AGE / 3600:.0f} h, so `gc` might "
                               "take its files for left over; it is scanned again")  # fmt: skip
        ledger = Ledger(self.store)
        created = ledger.commit(commit)
        crash("after-commit")
        self.watch.lap("commit")
        _log(work, commit, created, self.watch.seconds)
        if created:
            return Scanned(commit, True, self.watch.seconds, scan.measured())
        [other] = ledger.read_commits([(commit.ordinal, commit.group)])
        return Scanned(other, False, self.watch.seconds)

    def _attempt(
        self, work: Work, poison: dict[int, str]
    ) -> tuple[str, _UnitScan, dict[str, DataFileRecord]] | None:
        """Scan and write without the documents of `poison`; None if there are more, which are then in it."""
        attempt = uuid.uuid4().hex[:8]
        files = UnitWriter(self.store, work.unit.unit, work.group, attempt, self.setup.metadata)
        writer = BackgroundWriter(files)
        scan = _UnitScan(self, work, writer, poison)
        try:
            if scan.run():
                self.watch.lap("read")
                records = writer.close()
                self.watch.lap("write")
                return attempt, scan, records
        except BaseException:
            writer.abandon()
            raise
        writer.abandon()
        self.progress(-scan.told[0], -scan.told[1])
        return None

    def _check_groups(self, commit: Commit, work: Work) -> None:
        """DataError if another group's commit of the unit has found other documents that cannot be run."""
        for group in range(len(self.setup.groups)):
            other = replace(commit, group=group).name
            if group != commit.group and self.store.exists(other):
                have = json.loads(self.store.read(other))["poison"]
                check_groups(work.unit.path, have, commit.poison)

    def load(self, group: int) -> None:
        """Have the model and the SAEs of a group ready."""
        if self.group == group:
            return
        self.infos = self.setup.groups[group]
        self.reads = {info.site for info in self.infos}
        self.targets = {info.out for info in self.infos if info.out is not None}
        model = self.setup.spec.model
        sites = sorted(self.reads | self.targets)
        self.model = LanguageModel(
            self.source, sites, model.dtype, self.setup.device, attention=model.attention
        )
        if self.model.packs:
            self.model.check_packing(BATCH_TOKENS[self.model.device.type])
        self.encoders = [Encoder(suites.load(info), self.model.device) for info in self.infos]
        self.group = group


class _UnitScan:
    """State of one unit's scan."""

    def __init__(
        self, scanner: Scanner, work: Work, writer: BackgroundWriter, poison: dict[int, str]
    ) -> None:
        spec = scanner.setup.spec
        self.s, self.work, self.writer = scanner, work, writer
        self.source = spec.corpus[work.file.source]
        self.poison = poison  # by row; grows
        self.known = len(poison)
        self.read = self.documents = self.contexts = self.counted = self.tokens = 0
        self.placed = 0  # contexts that have a number, those of poison too
        self.quarantine: dict[int, Refused] = {}  # by number in the unit
        self.told = [0, 0]  # documents and tokens of which progress was told
        self.encoded = 0  # counted tokens of the chunks done so far
        infos = scanner.infos
        self.saes = [
            SaeUnit(i, info, encoder, spec.top_k, spec.sample_k)
            for i, (info, encoder) in enumerate(zip(infos, scanner.encoders, strict=True))
        ]
        taps = scanner.model.taps
        self.moments = {
            (info.site, info.out): Moments(taps[info.out].width if info.out is not None else 0)
            for info in infos
        }
        self.sampled = SampledDocuments(infos, work.unit)
        self.document_columns: list[tuple[Any, ...]] = []
        self.segment_columns: list[tuple[int, int, str, int, int]] = []  # of conversations

    def run(self) -> bool:
        """Scan; whether that is done, and not all in vain because of documents that are in `poison` now."""
        kind = torch.device(self.s.setup.device).type
        budget, tokens = BATCH_TOKENS[kind], CHUNK_TOKENS[kind]
        before = -1
        for part, held in parts(self._placed(), self.s.model.packs, budget, tokens):
            after = held.document.local if held is not None else -1
            try:
                self._chunk(part, before, after, budget, held is None)
            except DataError as error:
                raise DataError(f"{self.work.unit.path} {error}") from error
            except Poisoned as error:
                self.poison.update(error.errors)
                self._check_share(self.work.unit.documents)
            before = part[-1].document.local
        self._check_share(self.read)
        if len(self.poison) > self.known:
            return False
        self._finish()
        return True

    def _check_share(self, read: int) -> None:
        """DataError if, of so many documents read, too many cannot be scanned."""
        errors = {each.row: each.error for each in self.quarantine.values()} | self.poison
        check_unit(self.work.unit.path, read, list(errors.values()))

    def _placed(self) -> Iterator[Placed]:
        """Contexts in corpus order; every document is entered in `documents` or `quarantine` as it passes."""
        unit = self.work.unit
        rows = read_documents(self.work.file, self.source, self.s.setup.metadata, unit.start, unit.stop)
        while batch := list(islice(rows, _TOKENIZE)):
            readable = [row for row in batch if isinstance(row, Document)]
            tokenized = iter(culprits_apart(self._tokenized, readable))
            for row in batch:
                number = self.read
                self.read += 1
                self.sampled.enter(row.row)
                if isinstance(row, Refused):
                    self.quarantine[number] = row
                    continue
                found = next(tokenized)
                if isinstance(found, BaseException):
                    self.quarantine[number] = Refused(row.row, line(found), row.id)
                    continue
                yield from self._contexts(number, row, *found)

    def _contexts(
        self, number: int, row: Document, ids: np.ndarray, segments: tuple[Segment, ...]
    ) -> Iterator[Placed]:
        """A document's contexts, harmless ones where the model cannot run it."""
        metadata = dict(zip(self.source.metadata, row.metadata, strict=True))
        document = PlacedDocument(number, row.row, row.id, metadata, ids)
        windows = contexts(ids, self.s.rule, segments)
        if max(self.read, self.placed + len(windows)) >= LOCAL_MAX:
            unit = self.work.unit
            raise DataError(
                f"{unit.path} rows {unit.start} to {unit.stop}: more than {LOCAL_MAX:,} contexts in one "
                "unit; split the longest documents or raise context.length"
            )
        if row.row in self.poison:
            windows = [without(window) for window in windows]
            self.quarantine[number] = Refused(row.row, self.poison[row.row], row.id)
        else:
            if row.messages is not None:
                self._enter_segments(document, segments)
            self._enter(document, windows)
        for window in windows:
            yield Placed(self.placed, document, window)
            self.placed += 1

    def _tokenized(self, batch: list[Document]) -> list[tuple[np.ndarray, tuple[Segment, ...]]]:
        """Token ids of each document, without a BOS of its own, and their segments."""
        rule = self.s.rule
        if self.source.messages is None:
            texts = [document.text for document in batch]
            bare = [strip_bos(ids, rule) for ids in tokenize(self.s.tokenizer, texts)]
            return [(ids, plain_segments(ids)) for ids in bare]
        template = self.s.setup.templates[self.work.file.source]
        assert template is not None
        found = []
        for tokens in self.s.conversations[template].tokenize(batch):
            ids = strip_bos(tokens.ids, rule)
            found.append((ids, tokens.segments(len(tokens.ids) - len(ids))))
        return found

    def _enter_segments(self, document: PlacedDocument, segments: tuple[Segment, ...]) -> None:
        number = key(self.work.unit.ordinal, document.local)
        self.segment_columns.extend((number, i, s.role, s.start, s.stop) for i, s in enumerate(segments))

    def _enter(self, document: PlacedDocument, windows: list[Context]) -> None:
        counted = int(sum(window.counted.sum() for window in windows))
        unit = self.work.unit
        own = (document.metadata.get(column) for column in self.s.setup.metadata)
        self.document_columns.append(
            (
                key(unit.ordinal, document.local),
                document.id,
                unit.corpus,
                unit.path,
                document.row,
                self.work.run,
                counted,
                len(document.ids),
                *own,
            )
        )
        self.documents += 1
        self.contexts += len(windows)
        self.counted += counted

    def _chunk(self, part: list[Placed], before: int, after: int, batch_tokens: int, last: bool) -> None:
        chunk = chunk_tables(part, before, after, self.work.unit)
        watch = self.s.watch
        watch.lap("read")
        x, samples = self._capture(part, chunk, batch_tokens)
        watch.lap("model")
        if len(self.poison) > self.known:
            return  # only in search of others
        ordinal = self.work.unit.ordinal
        keys = (chunk.context.astype(np.int64) + key(ordinal)) * self.s.rule.length + chunk.position

        def take(sae: SaeUnit) -> SaeUnit:
            began = time.perf_counter()
            self.writer.room()
            waited = time.perf_counter() - began
            sample = samples.get((sae.info.site, sae.info.out))
            sae.take(x[sae.info.site], chunk, keys, sample, self.sampled)
            sae.spent["write"] = waited
            return sae

        # Rows of a full segment, and all of them at the end, are written while the other SAEs go on.
        full = SEGMENT_ROWS // len(self.saes)
        self.writer.flushed()
        watch.lap("write")
        for sae in self.s.threads.map(take, self.saes):
            if last or sae.held >= full:
                self.writer.submit_rows(partial(sae.release().write, ordinal=ordinal))
            if last:
                self._submit_summary(sae)
        watch.divide(sae.spent for sae in self.saes)
        self.encoded += len(chunk.context)
        self._write_contexts(part, chunk)
        self.tokens += sum(len(p.context.tokens) for p in part)
        first = part[0].document.local + (part[0].document.local == before)
        documents = part[-1].document.local + 1 - first
        self.told = [self.told[0] + documents, self.told[1] + len(chunk.context)]
        self.s.progress(documents, len(chunk.context))

    def _capture(
        self, part: list[Placed], chunk: Chunk, batch_tokens: int
    ) -> tuple[dict[Site, Captured], dict[tuple[Site, Site | None], Sample]]:
        """Activations at the sites that SAEs read; and for each pair of a site read and one reconstructed
        those of every 64th counted token, whose moments are taken in."""
        numbers = np.arange(len(chunk.context))
        sampled = numbers[(numbers + self.encoded) % SAMPLE_EVERY == 0]
        only_targets = dict.fromkeys(self.s.targets - self.s.reads, sampled)
        limit = self.s.setup.spec.context.norm_above
        # As many as make the unit fail, and no more: each takes a batch of its own.
        enough = max(MANY, self.work.unit.documents // 10 + 1) - len(self.poison)
        threads = self.s.batch_threads
        found = capture(self.s.model, part, chunk, batch_tokens, limit, only_targets, threads, enough)
        x = {site: at.finished(self.s.model.taps[site].finish) for site, at in found.items()}
        samples: dict[tuple[Site, Site | None], Sample] = {}
        for (site, out), moments in self.moments.items():
            counted = np.intersect1d(x[site].token, sampled, assume_unique=True)
            if out is not None:
                sample = Sample(counted, x[site].at(counted), x[out].at(counted))
                samples[site, out] = sample
                moments.add(sample.target, len(x[site].x))
            else:
                moments.counted += len(x[site].x)
        return {site: x[site] for site in self.s.reads}, samples

    def measured(self) -> tuple[Measured, ...]:
        """L0 and FVU of each SAE over the unit."""
        return tuple(
            Measured(
                sae.info.id,
                self.moments[sae.info.site, sae.info.out].counted,
                int(sae.summary.counts.tokens.sum()),
                self.moments[sae.info.site, sae.info.out].fvu(sae.error)
                if sae.info.out is not None
                else None,
            )
            for sae in self.saes
        )

    def _write_contexts(self, part: list[Placed], chunk: Chunk) -> None:
        part = [p for p in part if p.document.local not in self.quarantine]
        if self.work.group or not part:
            return
        ordinal = self.work.unit.ordinal
        lengths = np.array([len(p.context.tokens) for p in part])
        starts = np.cumsum(lengths) - lengths
        tokens = np.concatenate([p.context.tokens for p in part])
        counted = np.concatenate([p.context.counted for p in part])
        self.writer.write(
            "contexts",
            {
                "context": [key(ordinal, p.local) for p in part],
                "document": [key(ordinal, p.document.local) for p in part],
                "start": [p.context.start for p in part],
                "first": [p.context.first for p in part],
                "tokens": windows_column(tokens, starts, lengths, pa.int32()),
                "counted": windows_column(counted, starts, lengths, pa.bool_()),
                "place_hash": chunk.place[[p.local - chunk.first for p in part]],
            },
        )

    def _write_rows(self, kind: str, rows: Sequence[tuple[Any, ...]]) -> None:
        schema = self.writer.writer.schema(kind)
        columns = list(zip(*rows, strict=True)) or [()] * len(schema)
        self.writer.write(kind, dict(zip(schema.names, columns, strict=True)))

    def _finish(self) -> None:
        """Have written what is known at the unit's end."""
        if not self.work.group:
            self._write_rows("documents", self.document_columns)
            self._write_rows("segments", self.segment_columns)
            path, ordinal = self.work.unit.path, self.work.unit.ordinal
            refused = [
                (key(ordinal, local), path, each.row, each.id, each.error)
                for local, each in sorted(self.quarantine.items())
            ]
            self._write_rows("quarantine", refused)
        if not self.placed:  # there was no last chunk
            for sae in self.saes:
                self._submit_summary(sae)

    def _submit_summary(self, sae: SaeUnit) -> None:
        """Have written what the unit says of an SAE."""
        ordinal = self.work.unit.ordinal
        self.writer.submit(partial(write_summary, info=sae.info, summary=sae.summary, ordinal=ordinal))
        moments = self.moments[sae.info.site, sae.info.out]
        self.writer.write(
            "saes",
            {
                "sae": [sae.info.id],
                "unit": [ordinal],
                "n_tokens": [moments.counted],
                "n_active": [int(sae.summary.counts.tokens.sum())],
                "sample_tokens": [moments.tokens],
                **moments.columns(sae.error),
            },
        )


def _log(work: Work, commit: Commit, own: bool, stages: Mapping[str, float]) -> None:
    logs.tell(
        "unit_scanned",
        **logs.of(work),
        attempt=commit.attempt,
        own=own,
        device=commit.device,
        documents=commit.documents,
        quarantined=commit.quarantined,
        tokens=commit.tokens,
        seconds=round(sum(stages.values()), 3),
        stages={stage: round(seconds, 3) for stage, seconds in stages.items()},
        rows={kind: file.rows for kind, file in commit.files.items()},
        bytes=sum(file.bytes for file in commit.files.values()),
    )


def device_name(device: str) -> str:
    """The kind of device, with the GPU's model where it is in this machine."""
    return torch.cuda.get_device_name(device) if device == "cuda" and torch.cuda.is_available() else device
