"""A chunk of a unit: contexts in corpus order, run through the model in batches of like length, or packed.

Invariant: a batch's shape follows from the lengths of the chunk's contexts alone, and the captured
activations come back in corpus order, so nothing downstream sees how contexts were batched. Lengths are
sorted inside a chunk only; sorted over a whole unit, its documents would stay open until the end. Packed
contexts keep their order, and a chunk ends where its rows are full, for a row costs the same however full.
A document that the model cannot run is told by running it alone, in a batch of the same shape whose other
slots hold harmless tokens; once it is known, such tokens stand in its own slots, and its neighbours get the
values that they would have beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipelines.contexts import Context
from pipelines.quarantine import MANY, Poisoned, line
from pipelines.registry import Unit
from sae_runtime.encode import Sparse
from sae_runtime.errors import CorpuscopeError, DataError, is_infrastructure
from sae_runtime.model import LanguageModel
from sae_runtime.packing import Rows, pack, positions, row_length
from sae_runtime.sites import Site
from sae_runtime.summaries import Chunk, place_hash
from sae_runtime.threads import Threads


@dataclass(frozen=True)
class PlacedDocument:
    local: int
    row: int
    id: str | None
    metadata: dict[str, Any]
    ids: np.ndarray


@dataclass(frozen=True)
class Placed:
    """A context in its unit: unit-local numbers of it and its document."""

    local: int
    document: PlacedDocument
    context: Context


HARMLESS = 0  # the token that padding has too


def without(context: Context) -> Context:
    """A context's slots, harmless and counted nowhere."""
    tokens = np.full_like(context.tokens, HARMLESS)
    return Context(context.start, context.first, tokens, np.zeros_like(context.counted))


@dataclass(frozen=True)
class Captured:
    """Activations of a site over a chunk. `token` numbers the chunk's counted tokens."""

    x: torch.Tensor  # [tokens, d], the model's dtype
    token: np.ndarray  # int64 [tokens], ascending
    loud: Captured | None = None  # tokens that are left out; what other sites' SAEs reconstruct has them

    def finished(self, finish: Callable[[torch.Tensor], torch.Tensor]) -> Captured:
        """The same tokens with `finish` done to their activations."""
        return Captured(finish(self.x), self.token, None if self.loud is None else self.loud.finished(finish))

    def in_chunk(self, sparse: Sparse) -> Sparse:
        """Rows that number the tokens of `x`, renumbered as the chunk's counted tokens."""
        if not len(self.token) or self.token[-1] + 1 == len(self.token):  # none is left out before the last
            return sparse
        return Sparse(sparse.indptr, self.token[sparse.token].astype(np.int32), sparse.code)

    def at(self, tokens: np.ndarray) -> torch.Tensor:
        """Activations of some tokens (int64, ascending, all of them here or loud): [len(tokens), d]."""
        if self.loud is None:
            return self.x[np.searchsorted(self.token, tokens)]
        loud = np.isin(tokens, self.loud.token)
        found = self.x.new_empty(len(tokens), self.x.shape[1])
        found[_on(np.flatnonzero(~loud), found)] = Captured(self.x, self.token).at(tokens[~loud])
        found[_on(np.flatnonzero(loud), found)] = self.loud.at(tokens[loud])
        return found


@dataclass(frozen=True)
class Sample:
    """Activations that are reconstructed, of some counted tokens of a chunk, and what is to come out."""

    tokens: np.ndarray  # int64, ascending, numbers of the chunk's counted tokens
    x: torch.Tensor  # [len(tokens), d_in]
    target: torch.Tensor  # [len(tokens), d_out]

    def slots(self, counted: int) -> np.ndarray:
        """int32 [counted]: each token's place in the sample, or -1."""
        slots = np.full(counted, -1, np.int32)
        slots[self.tokens] = np.arange(len(self.tokens))
        return slots


@dataclass(frozen=True)
class Batch:
    """What the model runs at once, each array of one shape [rows, length]."""

    ids: np.ndarray  # int64
    positions: np.ndarray | None  # int64, where contexts are packed
    context: np.ndarray  # int64: numbers the contexts, in the order of their tokens; -1 on what is none's
    counted: np.ndarray  # bool


class Room:
    """Whether another context goes into a chunk of some `tokens`, run `budget` at a time."""

    def __init__(self, packs: bool, budget: int, tokens: int) -> None:
        self._rows = Rows(budget) if packs else None
        self._tokens, self._budgets, self._size = tokens, max(1, tokens // budget), 0

    def take(self, length: int) -> bool:
        """Take the next context, unless it does not fit; the first always does."""
        if self._rows is not None:
            return self._rows.take(length, self._budgets)
        if self._size >= self._tokens:
            return False
        self._size += length
        return True


def parts(
    placed: Iterator[Placed], packs: bool, budget: int, tokens: int
) -> Iterator[tuple[list[Placed], Placed | None]]:
    """Chunks of about `tokens`, run `budget` at a time, each with the context that comes after it, if any."""
    held = next(placed, None)
    while held is not None:
        part: list[Placed] = []
        room = Room(packs, budget, tokens)
        while held is not None and room.take(len(held.context.tokens)):
            part.append(held)
            held = next(placed, None)
        yield part, held


def chunk_tables(part: list[Placed], before: int, after: int, unit: Unit) -> Chunk:
    lengths = [len(p.context.tokens) for p in part]
    counted = [np.flatnonzero(p.context.counted).astype(np.int32) for p in part]
    first = part[0].local
    local = np.arange(first, first + len(part), dtype=np.int32)
    last = part[-1].document.local
    return Chunk(
        context=np.repeat(local, [len(c) for c in counted]),
        position=np.concatenate(counted),
        first=first,
        document=np.array([p.document.local for p in part], np.int32),
        place=np.array(
            [place_hash(unit.corpus, unit.path, p.document.row, p.context.start) for p in part], np.uint64
        ),
        tokens=np.concatenate([p.context.tokens for p in part]),
        offset=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]),
        open_document=before if before == part[0].document.local else -1,
        tail_document=after if after == last else -1,
    )


def capture(
    model: LanguageModel,
    part: Sequence[Placed],
    chunk: Chunk,
    budget: int,
    limit: float | None,
    sampled: Mapping[Site, np.ndarray],
    threads: Threads,
    enough: int = MANY,
) -> dict[Site, Captured]:
    """Activations of the chunk's counted tokens at every site, less those over `limit` (`norm_above`).

    Of the sites in `sampled` only those tokens (int64, ascending, numbers of the chunk's counted tokens).
    `budget` is the most padded tokens of a batch, or the tokens of a packed row; batches go side by side in
    `threads`. Raises Poisoned naming the documents at which the model raises or whose activations are not
    finite: all of the chunk's, or the first `enough`. What is not a document's fault is raised as it is.
    """
    dtype = next(model.module.parameters()).dtype
    total = len(chunk.context)
    everything = np.arange(total)
    wanted = {site: sampled.get(site, everything) for site in model.taps}
    found = {
        site: torch.empty(len(wanted[site]), tap.width, dtype=dtype, device=model.device)
        for site, tap in model.taps.items()
    }
    loud = {
        site: torch.zeros(total, dtype=torch.bool, device=model.device)
        for site in found
        if site not in sampled
    }
    starts = np.searchsorted(chunk.context, np.arange(len(part) + 1) + chunk.first)

    def attempt(members: list[int]) -> Exception | bool:
        try:
            return run(members)
        except Exception as error:
            if isinstance(error, CorpuscopeError) or is_infrastructure(error):
                raise
            return error

    @torch.inference_mode()
    def run(members: list[int]) -> bool:
        """Enter a batch in `found` and `loud`; whether its activations are finite."""
        batch = _batch([part[m].context for m in members], budget if model.packs else None)
        target = np.concatenate([np.arange(starts[m], starts[m + 1]) for m in members])
        source = np.flatnonzero(batch.counted)
        inputs = [torch.from_numpy(a) for a in (batch.ids, batch.positions) if a is not None]
        finite = [torch.ones((), dtype=torch.bool, device=model.device)]
        for site, x in model.run(*inputs).items():
            to, of = target, source
            if site in sampled:
                there = np.isin(target, sampled[site])
                to, of = np.searchsorted(sampled[site], target[there]), source[there]
            elif limit is not None:
                over = norm_above(x, _on(batch.context, x), limit).flatten()
                loud[site][_on(target, x)] = over[_on(source, x)]
            values = x.flatten(0, 1).index_select(0, _on(of, x))
            # `to` ascends; a slice, which it mostly is, takes a quarter of the time.
            if len(to) and to[-1] - to[0] + 1 == len(to):
                found[site][to[0] : to[-1] + 1] = values
            else:
                found[site].index_copy_(0, _on(to, x), values)
            # NaN goes through the least and the greatest, with no temporary of the size of `values`.
            if len(values):
                finite.append(torch.isfinite(torch.stack(torch.aminmax(values))).all())
        return bool(torch.stack(finite).all())

    lengths = [len(p.context.tokens) for p in part]
    work = pack(lengths, budget) if model.packs else batches(lengths, budget)
    results = list(threads.map(attempt, work))
    if any(result is not True for result in results):
        trial = _Trial(model, part, starts, budget if model.packs else None, wanted)
        errors: dict[int, str] = {}
        for members, result in zip(work, results, strict=True):
            if result is not True and len(errors) < enough:
                errors.update(trial.culprits(members, result, enough - len(errors)))
        raise Poisoned(errors)
    if limit is None:
        return {site: Captured(x, wanted[site]) for site, x in found.items()}
    return {
        site: _without(loud[site], x) if site in loud else Captured(x, wanted[site])
        for site, x in found.items()
    }


def _without(loud: torch.Tensor, x: torch.Tensor) -> Captured:
    """What is captured of all counted tokens, those that are `loud` (bool [tokens]) left out."""
    out = loud.cpu().numpy()
    return Captured(x[~loud], np.flatnonzero(~out), Captured(x[loud], np.flatnonzero(out)))


def _on(index: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    """An index for `x`, on its device."""
    return torch.from_numpy(index).to(x.device)


class _Trial:
    """Runs the documents of a batch each alone, to tell at which of them the model fails."""

    def __init__(
        self,
        model: LanguageModel,
        part: Sequence[Placed],
        starts: np.ndarray,
        budget: int | None,
        wanted: Mapping[Site, np.ndarray],
    ) -> None:
        self.model, self.part, self.starts, self.budget, self.wanted = model, part, starts, budget, wanted

    def culprits(self, members: list[int], result: Exception | bool, most: int) -> dict[int, str]:
        """Rows of the documents at which a batch failed, `most` of them, and how each fails.

        `result` is what the batch raised, or False where its activations are not finite. It is raised
        where no document is to blame.
        """
        if isinstance(result, Exception):
            self._error(members, set())  # raises what comes without any document
        found: dict[int, str] = {}
        for row in dict.fromkeys(self.part[m].document.row for m in members):
            own = {m for m in members if self.part[m].document.row == row}
            error = self._error(members, own)
            if error is not None:
                found[row] = error
            if len(found) == most:
                break
        if found:
            return found
        if isinstance(result, Exception):
            raise result
        rows = sorted({self.part[m].document.row for m in members})
        raise DataError(
            f"rows {rows[0]} to {rows[-1]}: activations are not finite where these documents share a batch, "
            "and finite where each is alone; try `dtype: bfloat16` or `float32`"
        )

    @torch.inference_mode()
    def _error(self, members: list[int], own: set[int]) -> str | None:
        """How a batch fails in which only the contexts of `own` are themselves; None if it does not."""
        contexts = [self.part[m].context if m in own else without(self.part[m].context) for m in members]
        batch = _batch(contexts, self.budget)
        inputs = [torch.from_numpy(a) for a in (batch.ids, batch.positions) if a is not None]
        try:
            activations = self.model.run(*inputs)
        except Exception as error:
            if not own or isinstance(error, CorpuscopeError) or is_infrastructure(error):
                raise
            return line(error)
        if not own:
            return None
        source = np.flatnonzero(batch.counted)
        target = np.concatenate([np.arange(self.starts[m], self.starts[m + 1]) for m in members if m in own])
        for site, x in activations.items():
            there = np.isin(target, self.wanted[site])
            values = x.flatten(0, 1).index_select(0, _on(source[there], x))
            if not torch.isfinite(values).all():
                return (
                    f"activations at {self.model.taps[site].path} are not finite in {x.dtype}; "
                    "try `dtype: bfloat16` or `float32`"
                )
        return None


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Members of each batch: like lengths together, at most `budget` padded tokens (or one member)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    found: list[list[int]] = []
    for member in order:
        # The first member is the longest, so it sets the padded length.
        if found and (len(found[-1]) + 1) * lengths[found[-1][0]] <= budget:
            found[-1].append(member)
        else:
            found.append([member])
    return [sorted(batch) for batch in found]


def norm_above(x: torch.Tensor, context: torch.Tensor, limit: float) -> torch.Tensor:
    """Which tokens of `x` [rows, length, d] have over `limit` times their context's median norm.

    `context` int64 [rows, length] numbers the contexts, each in one piece; -1 is none, never above. The
    median is over all of a context's tokens that were run: of an even number the mean of the middle two.
    """
    inside = torch.nonzero(context.flatten() >= 0)[:, 0]
    of = context.flatten()[inside]
    norms = x.float().norm(dim=-1).flatten()[inside]
    order = norms.argsort()
    ordered = norms[order[of[order].argsort(stable=True)]]  # by context, in each by norm
    _, which, lengths = torch.unique(of, return_inverse=True, return_counts=True)
    starts = lengths.cumsum(0) - lengths
    low, high = ordered[starts + (lengths - 1) // 2], ordered[starts + lengths // 2]
    above = torch.zeros(context.numel(), dtype=torch.bool, device=x.device)
    above[inside] = norms > (limit * torch.lerp(low, high, 0.5))[which]
    return above.view(context.shape)


def _batch(members: Sequence[Context], budget: int | None) -> Batch:
    """Contexts packed into one row of a multiple of `budget` or, of None, right padded to the longest."""
    lengths = [len(context.tokens) for context in members]
    shape = (len(members), max(lengths)) if budget is None else (1, row_length(sum(lengths), budget))
    at = (
        (np.arange(shape[1]) < np.array(lengths)[:, None]).flatten()
        if budget is None
        else slice(sum(lengths))
    )
    batch = Batch(
        ids=np.zeros(shape, np.int64),
        positions=None if budget is None else positions(lengths, shape[1])[None],
        context=np.full(shape, -1, np.int64),
        counted=np.zeros(shape, bool),
    )
    batch.ids.reshape(-1)[at] = np.concatenate([context.tokens for context in members])
    batch.counted.reshape(-1)[at] = np.concatenate([context.counted for context in members])
    batch.context.reshape(-1)[at] = np.repeat(np.arange(len(members)), lengths)
    return batch
