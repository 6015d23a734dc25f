"""How large the index of a scan will be, before it runs: tokens, rows and bytes of every table.

Invariant: nothing here runs the model; tokens come from tokenising a sample of the corpus, rows and bytes
from the laws of `tables.py`, corrected by what a finished scan measured (`measured.py`) where there is one.
Active features are measured ones, else each SAE's nominal L0. `costs.py` has time and memory.
Measured (the demo, 83.0 MB of data, 2026-11-23): 83.5 MB without a measured scan, 84.8 by the demo's own.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from pipelines import tables
from pipelines.contexts import tokenize
from pipelines.conversations import Conversations
from pipelines.corpus import Document, read_documents
from pipelines.measured import DEFAULT_L0, Measured
from pipelines.messages import content_bytes
from pipelines.planning import Planned, Prepared
from pipelines.quarantine import culprits_apart
from pipelines.schema import DATA
from pipelines.storage import Store
from pipelines.tables import SaeShape, Units
from pipelines.words import human
from sae_runtime.errors import InputError
from sae_runtime.model import load_tokenizer
from sae_runtime.sae import SaeInfo

_SAMPLE_TEXTS = 200
_SAMPLE_BYTES = 1 << 20
_LOOK = 512  # units whose rows are computed; of more, an even sample stands for all


@dataclass(frozen=True)
class Estimate:
    """The whole index that a plan's live units make. Sizes in bytes."""

    documents: int
    text_bytes: int
    tokens: int  # counted
    tokens_run: int  # by the model, once for each SAE group
    bytes_per_token: float  # of text
    rows: dict[str, int]  # by table, as units write them
    tables: dict[str, int]  # bytes, as units write them
    compacted: dict[str, int]  # bytes after `compact` and `gc`
    peak_bytes: int  # on disk while merged files stand beside those that they replace
    spared: int  # bytes of windows that need not be written because token rows are
    shapes: dict[str, SaeShape]  # by SAE
    l0_known: dict[str, str]  # by SAE: measured | published | given | assumed
    unit_tokens: np.ndarray  # float64, as run, of each unit in the plan's order
    unit_rows: dict[str, float]  # by table, of the largest unit

    @property
    def index_bytes(self) -> int:
        return sum(self.tables.values())

    @property
    def compacted_bytes(self) -> int:
        return sum(self.compacted.values())

    @property
    def kept_bytes(self) -> int:
        """What `max_index_bytes` bounds: the index before or after compaction, whichever is more."""
        return max(self.index_bytes, self.compacted_bytes)


def estimate(
    prepared: Prepared,
    planned: Planned,
    groups: Sequence[Sequence[str]],
    constants: Measured | None = None,
    l0: float | None = None,
) -> Estimate:
    """Estimate the whole index. `constants` of a measured scan correct it; `l0` is then every SAE's."""
    shares = [prepared.spec.share(planned.files[u.corpus, u.path].source) for u in planned.units]
    text_bytes = round(sum(u.bytes * share for u, share in zip(planned.units, shares, strict=True)))
    per_token = bytes_per_token(prepared, planned)
    documents = round(sum(u.documents * share for u, share in zip(planned.units, shares, strict=True)))
    known = {sae.id: _l0(sae, constants, l0) for sae in prepared.saes}
    shapes = {sae.id: SaeShape.of(sae.d_in, sae.width, known[sae.id][0], sae.keep) for sae in prepared.saes}
    every = _units(prepared, planned, shares, per_token, constants)
    units, saes = _some(every), list(shapes.values())
    of_rows = {} if constants is None else constants.rows
    of_bytes = {} if constants is None else constants.bytes
    top_k, sample_k = prepared.spec.top_k, prepared.spec.sample_k
    found = tables.corrected(tables.rows(saes, units, top_k, sample_k), of_rows)
    by_rows, anyway = tables.sizes(saes, units, found, len(groups), len(prepared.spec.metadata))
    sizes = {
        table: float((size * of_bytes.get(table, 1.0) + anyway[table]) @ units.times)
        for table, size in by_rows.items()
    }
    sizes["commits"] = tables.COMMIT * len(planned.units) * len(groups)
    merged = tables.compacted(saes, units, sizes, (of_rows, of_bytes), top_k, sample_k)
    total = {table: float(count @ units.times) for table, count in found.items()}
    spared = sum(
        (total[table] - total[f"windows_{table}"]) * tables.WINDOW
        for table in ("top_contexts", "sampled_contexts")
    )
    largest = int(np.argmax(units.run)) if len(units.run) else None
    return Estimate(
        documents=documents,
        text_bytes=text_bytes,
        tokens=int(every.counted.sum()),
        tokens_run=int(every.run.sum()),
        bytes_per_token=per_token,
        rows={table: round(total[table]) for table in (*tables.UNIT_TABLES, *tables.SAE_TABLES)},
        tables={table: int(size) for table, size in sizes.items()},
        compacted={table: int(size) for table, size in merged.items()},
        peak_bytes=int(_peak(sizes, merged)),
        spared=int(spared),
        shapes=shapes,
        l0_known={sae: how for sae, (_, how) in known.items()},
        unit_tokens=every.run,
        unit_rows={
            table: 0.0 if largest is None else float(count[largest]) for table, count in found.items()
        },
    )


def _l0(sae: SaeInfo, constants: Measured | None, given: float | None) -> tuple[float, str]:
    """Active features of a token, and where the number is from."""
    if given is not None:
        return given, "given"
    if constants is not None and sae.id in constants.l0:
        return constants.l0[sae.id], "measured"
    return (DEFAULT_L0, "assumed") if sae.nominal_l0 is None else (sae.nominal_l0, "published")


def _units(
    prepared: Prepared,
    planned: Planned,
    shares: Sequence[float],
    per_token: float,
    constants: Measured | None,
) -> Units:
    """The shape of every unit."""
    share = np.array(shares, float)
    text = np.array([unit.bytes for unit in planned.units], float) * share / per_token
    documents = np.array([unit.documents for unit in planned.units], float) * share
    length, overlap = prepared.rule.length, prepared.rule.overlap
    # The last window of a document is half full on average.
    windows = np.divide(text, documents * (length - overlap), out=np.zeros_like(text), where=documents > 0)
    contexts = documents * np.maximum(1.0, windows + 0.5)
    chats = [prepared.templates[planned.files[u.corpus, u.path].source] is not None for u in planned.units]
    return Units(
        documents=documents,
        contexts=contexts,
        counted=text * (1.0 if constants is None else constants.counted),
        run=text * length / (length - overlap),
        segments=documents * np.array(chats, float) * tables.SEGMENTS,
        times=np.ones(len(planned.units)),
    )


def _some(units: Units) -> Units:
    """An even sample, where there are many, each standing for as many as there are to one."""
    number = len(units.times)
    if number <= _LOOK:
        return units
    places = np.linspace(0, number - 1, _LOOK).astype(int)
    part = Units(*(getattr(units, name)[places] for name in Units.__dataclass_fields__))
    return replace(part, times=np.full(_LOOK, number / _LOOK))


def _peak(written: dict[str, float], merged: dict[str, float]) -> float:
    """Merged rows replace written ones, or other merged ones, which go later than they come."""
    replaced = sum(written[table] for table in ("activations", "document_features", "documents", "segments"))
    return sum(merged.values()) + replaced


def check_size(prepared: Prepared, planned: Planned, found: Estimate, index: str) -> None:
    """InputError if the index would pass `max_index_bytes` or the free disk, with cheaper policies."""
    limit = prepared.spec.max_index_bytes
    store = Store(index)
    if found.kept_bytes > limit:
        raise InputError(
            f"max_index_bytes: the index is estimated at {human(found.kept_bytes)}, over the limit of "
            f"{human(limit)}; {_cheaper(found)}"
        )
    if store.local:
        free = shutil.disk_usage(_existing(store.root)).free
        have = sum(store.fs.du(store.path(DATA), total=False).values()) if store.exists(DATA) else 0
        if found.kept_bytes - have > free:
            raise InputError(
                f"index: {human(found.kept_bytes - have)} are still to be written by estimate, but the disk "
                f"of {index} has {human(free)} free; {_cheaper(found)}"
            )


def bytes_per_token(prepared: Prepared, planned: Planned) -> float:
    """UTF-8 bytes per token over a sample of the corpus; 4 where it is empty."""
    tokenizer = load_tokenizer(prepared.source)
    spec = prepared.spec
    size = count = 0
    step = max(1, len(planned.units) // 8)
    for unit in planned.units[::step]:
        file = planned.files[unit.corpus, unit.path]
        source = spec.corpus[file.source].model_copy(update={"metadata": (), "id": None})
        rows = islice(read_documents(file, source, {}, unit.start, unit.stop), _SAMPLE_TEXTS // 8)
        template = prepared.templates[file.source]
        chat = None if template is None else Conversations(tokenizer, template)

        def measured(documents: list[Document], chat: Conversations | None = chat) -> list[tuple[int, int]]:
            """Bytes of text and tokens."""
            if chat is None:
                texts = [document.text[: _SAMPLE_BYTES // _SAMPLE_TEXTS] for document in documents]
                sizes = [len(text.encode()) for text in texts]
                return list(zip(sizes, map(len, tokenize(tokenizer, texts)), strict=True))
            sizes = [content_bytes(document.messages or ()) for document in documents]
            return list(zip(sizes, (len(each.ids) for each in chat.tokenize(documents)), strict=True))

        readable = [row for row in rows if isinstance(row, Document)]
        for found in culprits_apart(measured, readable):
            if isinstance(found, tuple):  # what cannot be tokenised will not be in the index either
                size, count = size + found[0], count + found[1]
    return size / count if count else 4.0


def _cheaper(found: Estimate) -> str:
    tables = found.tables
    documents = found.index_bytes - tables["activations"] + found.spared
    none = documents - tables["document_features"]
    return (
        f"`keep: documents` makes it {human(documents)}, `keep: none` {human(none)}, "
        f"`keep: {{sample: 0.01}}` {human(documents + 0.01 * tables['activations'])}"
    )


def _existing(path: str) -> str:
    folder = Path(path)
    while not folder.exists():
        folder = folder.parent
    return str(folder)
