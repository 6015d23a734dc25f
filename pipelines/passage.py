"""A passage of one's own, run as a scan of the index would run it: what fires on each of its tokens.

Invariant: tokens, windows, what is counted, batches and the rounding of activations are those of a scan of a
corpus that holds this document alone, by the same code; weights are held against the index's fingerprints.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipelines import scanned
from pipelines.chunks import Placed, PlacedDocument, capture, chunk_tables, parts
from pipelines.contexts import (
    Context,
    ContextRule,
    contexts,
    plain_segments,
    special_ids,
    strip_bos,
    tokenize,
)
from pipelines.quarantine import Poisoned
from pipelines.registry import Unit
from pipelines.unit import BATCH_TOKENS, CHUNK_TOKENS, HOST_THREADS
from sae_runtime.bfloat import to_float
from sae_runtime.encode import Encoder
from sae_runtime.errors import InputError
from sae_runtime.model import LanguageModel, load_tokenizer
from sae_runtime.sae import SaeInfo
from sae_runtime.threads import Threads

MOST_TOKENS = 4096  # of a passage
_ENCODERS = 4  # SAEs that stay loaded


@dataclass(frozen=True)
class Passage:
    """What fires on a text. Row i says that `feature[i]` has `activation[i]` at `position[i]` of a window."""

    contexts: tuple[Context, ...]  # the windows, in order
    counted: int  # tokens
    feature: np.ndarray  # int32 [rows], ascending
    context: np.ndarray  # int32 [rows], numbers the windows
    position: np.ndarray  # int32 [rows], in the window, as run
    activation: np.ndarray  # float32 [rows], as an index holds them: rounded to bfloat16
    notes: tuple[str, ...] = ()  # in what it may differ from a scan


class PassageModel:
    """The model of an index, its tokenizer and its SAEs as they are asked for."""

    def __init__(self, identity: dict[str, Any], moved: str | None, suites: Sequence[str]) -> None:
        fixed = identity["fixed"]
        excluded: list[str] = fixed["context.exclude"]
        self._identity, self._suites = identity, suites
        self._records = {str(record["id"]): record for record in identity["saes"]}
        self._source = scanned.model(identity, moved)
        self._tokenizer = load_tokenizer(self._source)
        self._rule = ContextRule(
            fixed["context.length"],
            fixed["context.overlap"],
            fixed["context.bos"],
            np.array(sorted(special_ids(self._tokenizer)) if "special" in excluded else [], np.int32),
            "first" in excluded and fixed["context.bos"] is None,
            skip_roles=frozenset(word.removeprefix("role ") for word in excluded if word.startswith("role ")),
        )
        limits = [word.removeprefix("norm_above ") for word in excluded if word.startswith("norm_above ")]
        self._limit = float(limits[0]) if limits else None
        device, attention = fixed["model.device"], fixed["model.attention"]
        notes = []
        if device != "cpu" and not torch.cuda.is_available():
            notes.append(
                f"the index was made on {device}, this is a cpu: values may differ in their last bits"
            )
            device, attention = "cpu", attention if attention != "flash_attention_2" else "sdpa"
        self._notes = tuple(notes)
        if fixed["model.threads"] is not None:
            torch.set_num_threads(fixed["model.threads"])
        gpu = device != "cpu"
        cores = min(HOST_THREADS, os.cpu_count() or 1)
        self._threads = Threads(1 if gpu else fixed["model.threads"] or cores)
        self._infos: dict[str, SaeInfo] = scanned.saes(self._source, list(self._records.values()), suites)
        sites = sorted({info.site for info in self._infos.values()})
        self._model: LanguageModel = LanguageModel(
            self._source, sites, fixed["model.dtype"], device, attention=attention
        )
        self._encoders: OrderedDict[str, Encoder] = OrderedDict()

    def encoder(self, sae: str) -> Encoder:
        """An SAE, loaded if it is none of the last few."""
        encoder = self._encoders.pop(sae, None)
        if encoder is None:
            while len(self._encoders) >= _ENCODERS:
                self._encoders.popitem(last=False)
            weights = scanned.weights(self._infos[sae], self._records[sae])
            encoder = Encoder(weights, self._model.device)
        self._encoders[sae] = encoder
        return encoder

    def passage(self, sae: str, text: str) -> Passage:
        """What an SAE has on a text. Raises InputError."""
        encoder = self.encoder(sae)
        ids = strip_bos(tokenize(self._tokenizer, [text])[0], self._rule)
        if len(ids) > MOST_TOKENS:
            raise InputError(f"text: {len(ids):,} tokens; a passage has at most {MOST_TOKENS:,}")
        windows = contexts(ids, self._rule, plain_segments(ids))
        document = PlacedDocument(0, 0, None, {}, ids)
        unit = Unit("", 0, "", "", "", "", 0, 1, 0)
        site = self._infos[sae].site
        others = dict.fromkeys(self._model.taps.keys() - {site}, np.zeros(0, np.int64))
        kind = self._model.device.type
        columns: list[list[np.ndarray]] = [[], [], [], []]
        placed = (Placed(i, document, window) for i, window in enumerate(windows))
        budget = BATCH_TOKENS[kind]
        for part, after in parts(placed, self._model.packs, budget, CHUNK_TOKENS[kind]):
            chunk = chunk_tables(part, -1, -1 if after is None else 0, unit)
            try:
                found = capture(self._model, part, chunk, budget, self._limit, others, self._threads)
            except Poisoned as error:
                raise InputError(f"text: {next(iter(error.errors.values()))}") from error
            x = found[site].finished(self._model.taps[site].finish)
            sparse = x.in_chunk(encoder.encode(x.x))
            columns[0].append(np.repeat(np.arange(encoder.width, dtype=np.int32), np.diff(sparse.indptr)))
            columns[1].append(chunk.context[sparse.token])
            columns[2].append(chunk.position[sparse.token])
            columns[3].append(to_float(sparse.code))
        kinds = (np.int32, np.int32, np.int32, np.float32)
        whole = [
            np.concatenate([np.zeros(0, kind), *column]) for kind, column in zip(kinds, columns, strict=True)
        ]
        order = np.argsort(whole[0], kind="stable")
        counted = int(sum(window.counted.sum() for window in windows))
        feature, context, position, activation = (column[order] for column in whole)
        return Passage(tuple(windows), counted, feature, context, position, activation, self._notes)
