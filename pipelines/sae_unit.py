"""One SAE over one unit: its summary, its reconstruction error and the rows held until they are written.

Invariant: an SAE touches its own state alone, so SAEs of a chunk are taken side by side in threads.
"""

from __future__ import annotations

import time

import numpy as np

from pipelines.chunks import Captured, Sample
from pipelines.partials import SampledDocuments
from pipelines.schema import key
from pipelines.stages import Stage
from pipelines.writer import UnitWriter, sae_column
from sae_runtime.bfloat import SUM_BITS, fixed_to_float, to_float
from sae_runtime.encode import Encoder, Sparse, columns, of_tokens
from sae_runtime.sae import SaeInfo
from sae_runtime.summaries import Chunk, DocumentRows, Summary


class SaeUnit:
    """State of one SAE in a unit's scan."""

    def __init__(self, number: int, info: SaeInfo, encoder: Encoder, top_k: int, sample_k: int) -> None:
        self.number, self.info, self.encoder = number, info, encoder
        self.summary = Summary.empty(info.id, info.width, top_k, sample_k)
        self.error = 0.0  # sum of squared errors over the sampled tokens
        self.held = 0  # rows
        self.spent: dict[Stage, float] = {}  # seconds of the thread that took the last chunk
        self._blocks: list[tuple[Sparse, np.ndarray]] = []  # of chunks, with the keys of their tokens
        self._documents: list[DocumentRows] = []

    def take(
        self,
        x: Captured,
        chunk: Chunk,
        keys: np.ndarray,
        sample: Sample | None,
        sampled: SampledDocuments,
    ) -> None:
        """Take in a chunk. `keys` int64 [counted tokens] of the index; no `sample` if nothing is decoded."""
        began = time.perf_counter()
        sparse = x.in_chunk(self.encoder.encode(x.x))
        if sample is not None:
            rows = of_tokens(sparse, sample.slots(len(keys)))
            self.error += self.encoder.squared_error(sample.x, rows, sample.target)
        encoded = time.perf_counter()
        ended = self.summary.update(sparse, chunk)
        if self.info.keep != "none":
            self._documents.append(ended)
            self.held += len(ended.feature)
        kept = sampled.keep(self.number, sparse, chunk)
        if kept is not None:
            self._blocks.append((kept, keys))
            self.held += kept.rows
        self.spent = {"encode": encoded - began, "summarise": time.perf_counter() - encoded}

    def release(self) -> Rows:
        """What is held, for writing; nothing is held afterwards."""
        rows = Rows(self.info, self._blocks, self._documents)
        self._blocks, self._documents, self.held = [], [], 0
        return rows


class Rows:
    """Rows of one SAE that are to be written."""

    def __init__(
        self, info: SaeInfo, blocks: list[tuple[Sparse, np.ndarray]], documents: list[DocumentRows]
    ) -> None:
        self.info, self.blocks, self.documents = info, blocks, documents

    def write(self, writer: UnitWriter, ordinal: int) -> None:
        """Write them, sorted by feature."""
        if self.blocks:
            feature, token, activation = columns(self.blocks, self.info.width)
            writer.write(
                "activations",
                {
                    "sae": sae_column(self.info.id, len(feature)),
                    "feature": feature,
                    "token": token,
                    "activation": activation,
                },
            )
        if not self.documents:
            return
        parts = [np.concatenate(column) for column in zip(*self.documents, strict=True)]
        order = np.argsort(parts[0], kind="stable")
        rows = DocumentRows(*(column[order] for column in parts))
        documents = {
            "sae": sae_column(self.info.id, len(order)),
            "feature": rows.feature,
            "document": rows.document.astype(np.int64) + key(ordinal),
            "n_tokens": rows.tokens,
            "max": to_float(rows.max),
            "sum": fixed_to_float(rows.high, rows.low, SUM_BITS),
        }
        writer.write("document_features", documents)
