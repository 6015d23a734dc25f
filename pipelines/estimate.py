"""What a scan will cost before it runs: tokens, index bytes by table, memory, time.

Invariant: nothing here runs the model; tokens come from tokenising a sample of the corpus. Bytes a row
are measured ones (docs/LOG.md has the runs); active features come from each SAE's nominal L0.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pipelines.contexts import tokenize
from pipelines.conversations import Conversations
from pipelines.corpus import Document, read_documents
from pipelines.messages import content_bytes
from pipelines.planning import Planned, Prepared, sae_bytes
from pipelines.quarantine import culprits_apart
from pipelines.schema import DATA
from pipelines.storage import Store
from pipelines.unit import CHUNK_TOKENS, SEGMENT_ROWS
from pipelines.words import human
from sae_runtime.errors import InputError
from sae_runtime.model import load_tokenizer, model_size
from sae_runtime.sae import SaeInfo

DEFAULT_L0 = 100.0  # where a suite does not say
BYTES = {  # per row, zstd 3, measured (docs/LOG.md, 2026-11-22)
    "contexts": 1.5,  # per token
    "activations": 2.0,
    "document_features": 4.5,
    "summaries": 6.0,  # per row of top_contexts and sampled_contexts
    "windows": 10.0,  # more per such row, where `keep` leaves token rows out
}
_SAMPLE_TEXTS = 200
_SAMPLE_BYTES = 1 << 20
# Sustained rates that the time estimate assumes, FLOP/s.
RATES = {"cpu": 250e9, "H200 at 40 % of its bf16 peak": 0.4 * 989e12}


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes, times in seconds."""

    documents: int
    text_bytes: int
    tokens: int
    bytes_per_token: float
    tables: dict[str, int]
    worker_memory: int
    forward_flops: float  # per token
    encode_flops: float  # per token
    spared: int  # bytes of windows that need not be written because token rows are

    @property
    def index_bytes(self) -> int:
        return sum(self.tables.values())


def estimate(prepared: Prepared, planned: Planned, groups: Sequence[Sequence[str]]) -> Estimate:
    """Estimate the whole index that a plan's live units make."""
    shares = [prepared.spec.share(planned.files[u.corpus, u.path].source) for u in planned.units]
    text_bytes = round(sum(u.bytes * share for u, share in zip(planned.units, shares, strict=True)))
    per_token = bytes_per_token(prepared, planned)
    tokens = int(text_bytes / per_token)
    documents = round(sum(u.documents * share for u, share in zip(planned.units, shares, strict=True)))
    rows = {sae.id: (sae.nominal_l0 or DEFAULT_L0) * tokens for sae in prepared.saes}
    average = max(1.0, tokens / max(1, documents))
    summaries = {s.id: _summary_rows(s, prepared, planned, documents, tokens) for s in prepared.saes}
    spared = int(sum(summaries[s.id] for s in prepared.saes if s.keep == "tokens") * BYTES["windows"])
    windows = int(sum(summaries.values()) * BYTES["windows"]) - spared
    tables = {
        "contexts": int(tokens * BYTES["contexts"]),
        "activations": int(sum(rows[s.id] * _token_share(s) for s in prepared.saes) * BYTES["activations"]),
        "document_features": int(
            sum(_document_rows(s, average) * documents for s in prepared.saes if s.keep != "none")
            * BYTES["document_features"]
        ),
        "summaries": int(sum(summaries.values()) * BYTES["summaries"]) + windows,
    }
    _, used = model_size(prepared.source, [sae.site for sae in prepared.saes])
    return Estimate(
        documents,
        text_bytes,
        tokens,
        per_token,
        tables,
        worker_memory(prepared, groups),
        2.0 * used,  # two operations per weight
        sum(2.0 * s.d_in * s.width for s in prepared.saes),
        spared,
    )


def check_size(prepared: Prepared, planned: Planned, found: Estimate, index: str) -> None:
    """InputError if the index would pass `max_index_bytes` or the free disk, with cheaper policies."""
    limit = prepared.spec.max_index_bytes
    store = Store(index)
    if found.index_bytes > limit:
        raise InputError(
            f"max_index_bytes: the index is estimated at {human(found.index_bytes)}, over the limit of "
            f"{human(limit)}; {_cheaper(found)}"
        )
    if store.local:
        free = shutil.disk_usage(_existing(store.root)).free
        have = sum(store.fs.du(store.path(DATA), total=False).values()) if store.exists(DATA) else 0
        if found.index_bytes - have > free:
            raise InputError(
                f"index: {human(found.index_bytes - have)} are still to be written by estimate, but the disk "
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


def worker_memory(prepared: Prepared, groups: Sequence[Sequence[str]]) -> int:
    """Bytes of one worker: the largest group's SAEs, activations, rows held, the model's layers."""
    by_id = {sae.id: sae for sae in prepared.saes}
    saes = max(sum(sae_bytes(by_id[sae], prepared.device) for sae in group) for group in groups)
    sites = {sae.site: sae.d_in for sae in prepared.saes}
    chunk = CHUNK_TOKENS[prepared.device] * sum(sites.values()) * 4
    weights, _ = model_size(prepared.source, list(sites))
    size = 4 if prepared.spec.model.dtype == "float32" else 2
    return int(saes + chunk + SEGMENT_ROWS * 40 + weights * size + (1 << 30))


def _token_share(sae: SaeInfo) -> float:
    if isinstance(sae.keep, float):
        return sae.keep
    return 1.0 if sae.keep == "tokens" else 0.0


def _document_rows(sae: SaeInfo, tokens: float) -> float:
    """Features of one SAE that fire in a document of so many tokens, by a fit to the demo."""
    return min(sae.width, (sae.nominal_l0 or DEFAULT_L0) * tokens**0.6)


def _summary_rows(sae: SaeInfo, prepared: Prepared, planned: Planned, documents: int, tokens: int) -> float:
    """Rows of an SAE's partial summaries: each unit keeps its own until compaction merges them.

    A fit to the demo's index: nearly all features fill their top slots (one a document), and their
    contexts fill some three and a half strata.
    """
    spec, units = prepared.spec, max(1, len(planned.units))
    contexts = max(documents, tokens / prepared.rule.length) / units
    slots = 0.9 * min(spec.top_k, documents / units) + 3.5 * min(spec.sample_k, contexts)
    return units * min(sae.width * slots, (sae.nominal_l0 or DEFAULT_L0) * tokens / units)


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
