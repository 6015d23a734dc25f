"""Causal attention of a bfloat16 model on a CPU, with the bits of torch's, without what torch does in vain.

torch multiplies with later keys too, and through MKL, which has its plain kernels on processors of AMD.

Invariant: never another bit than `scaled_dot_product_attention` gives. `same_as_torch` compares first, sums
that nearly cancel among others, where another order shows; a torch or an MKL that sums in another order, as
with AMX, keeps its own code, and so do lengths at which its order is not known. It is

scores    dimension by dimension, then times the scale
exponent  16 at a time by a polynomial (vectors.py), of the last keys that fill no 16 the C library's
sum       in 32 lanes, the last 16 keys with the first lanes; halved until one is left; then the last keys
values    weights in bfloat16, key by key
products  of up to 192 numbers at once, of fewer than 384 in two halves, else 192 after 192
keys      512 at a time; for the next, sums so far are made smaller where a score is the highest yet

Trade-off, measured (an EPYC, one thread, 9 heads of 64): 6.5 ms for torch's 15.7 of 8 contexts of 256 tokens,
17 for 43 of 2 of 1,024. Of 3.7 billion numbers of random lengths, heads and dimensions none has another bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from sae_runtime.bfloat import rounded, value_of
from sae_runtime.jit import jit
from sae_runtime.vectors import LANES, highest, powers, tile

_ROWS, _COLUMNS = 4, 32  # of a tile
_BLOCK = 192  # numbers that are summed up at once
_PIECE = 512  # keys that torch takes at a time
_SHORTEST, _FEWEST = 12, 4  # tokens, and queries at the end: MKL has another order for fewer
_UNUSUAL = ("is_causal", "position_bias", "cache", "softcap", "output_attentions")
_TOO_LOUD = 0x5380  # the code of 2^40: products of less are finite


def fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `causal` takes them, bfloat16 [contexts, heads, tokens, d], in memory token by token."""
    d, length = query.shape[-1], query.shape[2]
    together = 32 if length < 192 else 64 if length < 768 else 256  # queries that torch takes at a time
    return (
        length >= _SHORTEST
        and not 0 < length % together < _FEWEST
        and d % _COLUMNS == 0
        and key.shape == value.shape == (len(query), key.shape[1], length, d)
        and query.shape[1] % key.shape[1] == 0
        and all(
            x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.transpose(1, 2).is_contiguous()
            for x in (query, key, value)
        )
    )


def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor | None:
    """Attention [contexts, tokens, heads, d] of what `fits`; None if a number is infinite, NaN, over 2^40."""
    q, k, v = (x.transpose(1, 2).view(torch.int16).numpy().view(np.uint16) for x in (query, key, value))
    if max(_loudest(x.reshape(-1)) for x in (q, k, v)) >= _TOO_LOUD:
        return None
    out = torch.empty(q.shape, dtype=torch.bfloat16)
    _attend(q, k, v, np.float32(scale), out.view(torch.int16).numpy().view(np.uint16))
    return out


def attended(
    theirs: Callable[..., tuple[torch.Tensor, None]],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' `sdpa`, which is `theirs`, gives: [contexts, tokens, heads, d], and no weights."""
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    plain = mask is None and not dropout and all(more.get(name) is None for name in _UNUSUAL)
    if (
        plain
        and getattr(module, "is_causal", True)
        and fits(query, key, value)
        and same_as_torch(query.shape[-1], scale)
    ):
        out = causal(query, key, value, scale)
        if out is not None:
            return out, None
    return theirs(module, query, key, value, mask, dropout=dropout, scaling=scaling, **more)


@cache
def same_as_torch(d: int, scale: float) -> bool:
    """Whether random numbers, long sums that nearly cancel among them, get the bits of torch's attention."""
    generator = torch.Generator().manual_seed(0)
    for length in (12, 36, 64, 191, 255, 300, 383, 474, 512, 700, 772, 1100):
        for spread in (0.0, 0.5, 2.0):
            q, k, v = (torch.randn((1, length, heads, d), generator=generator) for heads in (4, 2, 2))
            v = v * torch.exp2(torch.randint(0, 10, v.shape, generator=generator))
            _cancel(v, 1, generator)
            if spread == 2:
                q = q * torch.exp2(torch.randint(0, 10, q.shape, generator=generator))
                q[..., d // 2 :] = q[..., : d // 2]
                _cancel(k, 3, generator)
            query, key, value = (
                x.bfloat16().transpose(1, 2) for x in (q * spread / (scale * d) ** 0.5, k, v)
            )
            found, wanted = causal(query, key, value, scale), torch_causal(query, key, value, scale)
            if found is None or not torch.equal(found.view(torch.int16), wanted.view(torch.int16)):
                return False
    return True


def _cancel(x: torch.Tensor, dim: int, generator: torch.Generator) -> None:
    """Make sums of numbers along a dimension small beside them."""
    half = x.shape[dim] // 2
    first, second = x.narrow(dim, 0, half), x.narrow(dim, half, half)
    second.copy_(torch.randn(first.shape, generator=generator) / 64 - first)


def torch_causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """torch's own, [contexts, tokens, heads, d]."""
    grouped = key.shape[1] != query.shape[1]
    out = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2).contiguous()


@jit
def _loudest(codes: np.ndarray) -> np.uint16:
    """The highest code without its sign; those that are not finite are above all others."""
    most = np.uint16(0)
    for i in range(len(codes)):
        most = max(most, codes[i] & np.uint16(0x7FFF))
    return most


@jit
def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: np.float32, out: np.ndarray) -> None:
    """Attention of codes [contexts, length, heads, d]; `k` and `v` may have fewer heads, for several each."""
    contexts, length, heads, d = q.shape
    groups = k.shape[2]
    padded = -(-length // _COLUMNS) * _COLUMNS
    keys = np.zeros((d, padded + LANES), np.float32)  # dimensions of a key at other places of a cache
    values = np.zeros((padded, d), np.float32)
    queries = np.zeros((_ROWS, d), np.float32)
    weights = np.zeros((_ROWS, padded), np.float32)
    sums = np.zeros((_ROWS, d), np.float32)
    softened = np.empty((_ROWS, 2), np.float32)
    for b in range(contexts):
        for g in range(groups):
            for j in range(length):
                for i in range(d):
                    keys[i, j] = value_of(k[b, j, g, i])
                    values[j, i] = value_of(v[b, j, g, i])
            for h in range(g * (heads // groups), (g + 1) * (heads // groups)):
                for first in range(0, length, _ROWS):
                    rows = min(_ROWS, length - first)
                    softened[:, 0], softened[:, 1] = -np.inf, 0
                    for r in range(rows):
                        for i in range(d):
                            queries[r, i] = value_of(q[b, first + r, h, i])
                    for begin in range(0, first + rows, _PIECE):
                        piece = min(_PIECE, length - begin)
                        end = min(begin + piece, first + rows)
                        block = _block(d)
                        for column in range(begin, end, _COLUMNS):
                            for at in range(0, d, block):
                                tile(queries, keys, at, min(block, d - at), column, weights, at)
                        for r in range(rows):
                            n = min(first + r + 1, end) - begin
                            less = _soften(weights[r, begin:], n, piece, scale, softened[r])
                            if begin:
                                for i in range(d):
                                    sums[r, i] *= less
                        block = _block(piece)
                        for at in range(begin, end, block):
                            for column in range(0, d, _COLUMNS):
                                tile(weights, values, at, min(block, end - at), column, sums, at)
                    for r in range(rows):
                        inverse = np.float32(1) / softened[r, 1]
                        for i in range(d):
                            out[b, first + r, h, i] = rounded(sums[r, i] * inverse)


@jit
def _block(n: int) -> int:
    """Of n numbers, how many are summed up before their sum is added to the others'."""
    return n if n <= _BLOCK else n // 2 if n < 2 * _BLOCK else _BLOCK


@jit
def _soften(row: np.ndarray, n: int, piece: int, scale: np.float32, softened: np.ndarray) -> np.float32:
    """Scores of the first n keys of a piece into weights, as bfloat16, and of further ones into 0, to the end
    of a tile.

    `softened` has the highest score and the sum of weights so far; gives by what earlier weights are to be
    multiplied, and their sum has been.
    """
    end = -(-n // _COLUMNS) * _COLUMNS
    row[n:end] = -np.inf
    most = highest(row, end, scale, softened[0])
    alone = min(end, piece // LANES * LANES)
    total = powers(row, alone, most)
    for j in range(alone, end):
        e = np.float32(np.exp(row[j] - most))
        total += e
        row[j] = value_of(rounded(e))
    less = np.float32(np.exp(softened[0] - most))
    softened[0] = most
    softened[1] = np.float32(np.float64(less) * np.float64(softened[1]) + np.float64(total))  # rounded once
    return less
