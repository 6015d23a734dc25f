"""A chunk of a unit: contexts in corpus order, run through the model in batches of like length.

Invariant: a batch's shape follows from the lengths of the chunk's contexts alone, and the captured
activations come back in corpus order, so nothing downstream sees how contexts were batched. Lengths are
sorted inside a chunk only; sorted over a whole unit, its documents would stay open until the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipelines.contexts import Context
from pipelines.ledger import Unit
from sae_runtime.encode import Sparse
from sae_runtime.errors import DataError
from sae_runtime.model import LanguageModel
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


@dataclass(frozen=True)
class Captured:
    """Activations of a site over a chunk. `token` numbers the chunk's counted tokens."""

    x: torch.Tensor  # [tokens, d], the model's dtype
    token: np.ndarray  # int64 [tokens], ascending

    def in_chunk(self, sparse: Sparse) -> Sparse:
        """Rows that number the tokens of `x`, renumbered as the chunk's counted tokens."""
        if not len(self.token) or self.token[-1] + 1 == len(self.token):  # none is left out before the last
            return sparse
        return Sparse(sparse.indptr, self.token[sparse.token].astype(np.int32), sparse.code)

    def at(self, tokens: np.ndarray) -> torch.Tensor:
        """Rows of `x` of some of its tokens (int64, ascending, all of them there): [len(tokens), d]."""
        return self.x[np.searchsorted(self.token, tokens)]


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
) -> dict[Site, Captured]:
    """Activations of the chunk's counted tokens at every site, less those over `limit` (`norm_above`).

    Of the sites in `sampled` only those tokens (int64, ascending, numbers of the chunk's counted tokens).
    `budget` is the most padded tokens of a batch; batches go side by side in `threads`. Raises DataError
    naming site and document row for an activation that is not finite.
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

    @torch.inference_mode()
    def run(members: list[int]) -> bool:
        """Enter a batch in `found` and `loud`; whether its activations are finite."""
        ids, counted, real = _padded([part[m].context for m in members])
        target = np.concatenate([np.arange(starts[m], starts[m + 1]) for m in members])
        source = np.flatnonzero(counted)
        finite = [torch.ones((), dtype=torch.bool, device=model.device)]
        for site, x in model.run(torch.from_numpy(ids)).items():
            to, of = target, source
            if site in sampled:
                there = np.isin(target, sampled[site])
                to, of = np.searchsorted(sampled[site], target[there]), source[there]
            elif limit is not None:
                over = norm_above(x, torch.from_numpy(real).to(x.device), limit).flatten()
                loud[site][_on(target, x)] = over[_on(source, x)]
            values = x.flatten(0, 1).index_select(0, _on(of, x))
            if len(to) and to[-1] - to[0] + 1 == len(
                to
            ):  # a slice, as it mostly is, is a quarter of the time
                found[site][to[0] : to[-1] + 1] = values
            else:
                found[site].index_copy_(0, _on(to, x), values)
            # NaN goes through the least and the greatest, with no temporary of the size of `values`.
            if len(values):
                finite.append(torch.isfinite(torch.stack(torch.aminmax(values))).all())
        return bool(torch.stack(finite).all())

    lengths = [len(p.context.tokens) for p in part]
    if not all(list(threads.map(run, batches(lengths, budget)))):
        raise _not_finite(found, wanted, model, part, chunk)
    if limit is None:
        return {site: Captured(x, wanted[site]) for site, x in found.items()}
    kept = {site: ~loud[site] for site in loud}
    return {
        site: Captured(x[kept[site]], np.flatnonzero(kept[site].cpu().numpy()))
        if site in kept
        else Captured(x, wanted[site])
        for site, x in found.items()
    }


def _on(index: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    """An index for `x`, on its device."""
    return torch.from_numpy(index).to(x.device)


def _not_finite(
    found: Mapping[Site, torch.Tensor],
    wanted: Mapping[Site, np.ndarray],
    model: LanguageModel,
    part: Sequence[Placed],
    chunk: Chunk,
) -> DataError:
    """The error that names the first site, and its first document, with a number that is not finite."""
    for site, x in found.items():
        bad = torch.nonzero(~torch.isfinite(x).all(dim=1))
        if len(bad):
            token = int(wanted[site][int(bad[0])])
            row = part[int(chunk.context[token]) - chunk.first].document.row
            return DataError(
                f"row {row}: activations at {model.taps[site].path} are not finite in {x.dtype}; "
                "try `dtype: bfloat16` or `float32`"
            )
    raise AssertionError("a batch had a number that is not finite")


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


def norm_above(x: torch.Tensor, real: torch.Tensor, limit: float) -> torch.Tensor:
    """Which tokens of `x` [contexts, length, d] have over `limit` times their context's median norm.

    `real` [contexts, length] is false on padding. The median is over all tokens that were run.
    """
    norms = x.float().norm(dim=-1).masked_fill(~real, float("nan"))
    return norms > limit * norms.nanquantile(0.5, dim=1, keepdim=True)


def _padded(members: Sequence[Context]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids int64, which are counted and which are real, each [contexts, longest], right padded."""
    length = max(len(context.tokens) for context in members)
    ids = np.zeros((len(members), length), np.int64)
    counted = np.zeros((len(members), length), bool)
    real = np.zeros((len(members), length), bool)
    for row, context in enumerate(members):
        ids[row, : len(context.tokens)] = context.tokens
        counted[row, : len(context.tokens)] = context.counted
        real[row, : len(context.tokens)] = True
    return ids, counted, real
