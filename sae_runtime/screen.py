"""Screen and refine on a CPU: cheap products first, and in float32 again where one may be over its floor.

Invariant: every (feature, token) whose float32 product is over the floor is refined, because the screen's
limit is lower than the floor by a bound on its error (cheap.py), never by an estimate; what is refined is
decided and valued by a float32 product of its own. So the screen changes speed and nothing else.

Int8 products have the wider bound. An SAE of which they leave so many pairs to refine in vain that bfloat16
products would have cost less goes on with those.

Trade-off, measured (4,096 tokens x 4,096 features x d 576, L0 83): with AMX, in bfloat16, 31 ms, of which 11
are cheap products, where the float32 product alone takes 70 to 75; an EPYC without, one core, in int8 47 ms,
of which 24 are products and 15 refining, and in bfloat16 61. Blocks of 1,024 tokens and features stay in
caches (`benchmarks/encode.py --threads 1`).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch

from sae_runtime.bfloat import rounded
from sae_runtime.cheap import STEP, Bfloat, Cheap, Int8, fastest, worth_refining
from sae_runtime.jit import jit, number_of, summed
from sae_runtime.vectors import LANES, four_products, over_floor, over_limit, prefetch, put_places

TOKENS = 1024
FEATURES = 1024


class Screen:
    """One SAE's features, to be compared with a floor each."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor, floor: torch.Tensor, cheap: type[Cheap] | None = None
    ) -> None:
        """`weight` [width, d], `bias` and `floor` [width], float32 on the CPU: active where the product of a
        row with a token, plus bias, is over the floor. `cheap` is the fastest here if it is not given."""
        self._given = weight, bias, floor
        self.weight, self.bias, self.floor = weight.numpy(), bias.numpy(), floor.numpy()
        self.cheap = (cheap or fastest())(*self._given)

    def over(
        self,
        x: torch.Tensor,
        exact: bool,
        inputs: Callable[[torch.Tensor], torch.Tensor],
        gain: np.ndarray,
        shift: np.ndarray,
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(rows a feature int64 [width], token int32, code uint16) of each block of TOKENS tokens of `x`.

        `inputs(x)` is z, float32 [tokens, d]; `exact` if that is `x` and bfloat16. Rows are sorted by
        feature, then token. An activation is the product, or product * gain + shift where there is a gain.
        """
        counts, ends = [], [0]
        width = len(self.bias)
        products = None
        room = TOKENS * min(FEATURES, width)
        token, code = np.empty(room, np.int32), np.empty(room, np.uint16)
        for start in range(0, len(x), TOKENS):
            block = x[start : start + TOKENS]
            z = _codes(block) if exact else inputs(block).contiguous().numpy()
            if products is None:
                products = self.cheap.products(z)
                cheap = torch.empty(room + STEP, dtype=products.dtype)
                screened = cheap.numpy() if cheap.dtype == torch.int32 else _codes(cheap)
            block_tokens = products.tokens(z)
            pairs = _paired(z, *_halves(z.shape[1])) if exact else z
            count = np.empty(width, np.int64)
            vain, row = 0, ends[-1]  # how many were refined and are not active
            for first in range(0, width, FEATURES):
                rows = slice(first, first + FEATURES)
                features = len(self.bias[rows])
                products.multiply(
                    rows, block_tokens.columns, cheap[: features * len(z)].view(features, len(z))
                )
                token, code = _with_room(token, row, room), _with_room(code, row, room)
                n, candidates = _refine(
                    screened, *block_tokens[1:], products.lost[rows], products.norm[rows],
                    products.limit[rows], self.weight[rows], z, pairs, self.bias[rows], self.floor[rows],
                    gain[rows], shift[rows], start, count[rows], token, code, row,
                )  # fmt: skip
                row, vain = row + n, vain + candidates - n
            counts.append(count)
            ends.append(row)
            if isinstance(self.cheap, Int8) and vain > worth_refining() * width * len(z):
                self.cheap = Bfloat(*self._given)
                products = None
        if len(ends) == 2:  # which nobody copies into one, and the room behind it would be held with it
            token, code = token[:row].copy(), code[:row].copy()
        parts = (slice(a, b) for a, b in pairwise(ends))
        return [(count, token[rows], code[rows]) for count, rows in zip(counts, parts, strict=True)]


def _codes(x: torch.Tensor) -> np.ndarray:
    """The codes of bfloat16 numbers, uint16."""
    return x.contiguous().view(torch.int16).numpy().view(np.uint16)


def _with_room(column: np.ndarray, rows: int, room: int) -> np.ndarray:
    """`column`, or a larger one with its first `rows`, so that there is room for so many more."""
    if len(column) - rows >= room:
        return column
    larger = np.empty(2 * len(column) + room, column.dtype)
    larger[:rows] = column[:rows]
    return larger


@jit
def _paired(z: np.ndarray, columns: int, apart: int) -> np.ndarray:
    """Columns j and `apart` + j of codes [tokens, d] in one, for j < `columns`: uint32 [tokens, columns]."""
    out = np.empty((len(z), columns), np.uint32)
    for t in range(len(z)):
        low, high = z[t], z[t, apart:]
        for j in range(columns):
            out[t, j] = np.uint32(low[j]) | np.uint32(high[j]) << np.uint32(16)
    return out


@summed
def _refine(
    screened: np.ndarray, scale: np.ndarray, near: np.ndarray, off: np.ndarray,
    lost: np.ndarray, norm: np.ndarray, limit: np.ndarray,
    weight: np.ndarray, z: np.ndarray, pairs: np.ndarray, bias: np.ndarray, floor: np.ndarray,
    gain: np.ndarray, shift: np.ndarray, offset: int, count: np.ndarray,
    token: np.ndarray, code: np.ndarray, row: int,
) -> tuple[int, int]:  # fmt: skip
    """Rows into `token` and `code` from `row` on, their number a feature into `count`; gives their number and
    candidates'.

    `screened` begins with the cheap products [features, tokens]; z is float32 and `pairs` the same, or z is
    codes of bfloat16 and `pairs` what `_paired` makes of their columns.
    """
    features, tokens = len(limit), len(z)
    d = weight.shape[1]
    columns, apart = _halves(d)
    candidate = np.empty(tokens + LANES, np.int32)
    product = np.empty(tokens + LANES, np.float32)
    active = np.empty(tokens + LANES, np.int32)
    first, refined = row, 0
    for f in range(features):
        n = 0
        if f + 1 < features:  # rows of weights come from far, and comparing leaves time for the next
            for begun in range(0, d, 16):
                prefetch(weight, (f + 1) * d + begun)
        for start in range(0, tokens, STEP):
            word = np.uint64(0)
            for part in range(0, STEP, LANES):
                at = start + part
                over = over_limit(screened, scale, near, off, f * tokens + at, at, lost[f], norm[f], limit[f])
                word |= over << np.uint64(part)
            if tokens - start < STEP:
                word &= (np.uint64(1) << np.uint64(tokens - start)) - np.uint64(1)
            if word:
                for part in range(0, STEP, LANES):
                    n = put_places(word >> np.uint64(part), start + part, candidate, n)
        refined += n
        # The last one fills up the last four, so that every product is summed by the same code.
        candidate[n : n + 3] = candidate[n - 1] if n else 0
        for i in range(0, n, 4):  # at once, for a row of weights is read once
            four_products(weight, f, pairs, columns, apart, candidate, i, product)
        if apart + columns < d:
            for i in range(n):
                product[i] += _rest(weight[f], z[candidate[i]], columns, apart)
        for i in range(n):
            product[i] += bias[f]
        product[n : n + LANES] = -np.inf
        found = 0
        for i in range(0, n, LANES):
            found = put_places(over_floor(product, i, floor[f]), i, active, found)
        for i in range(found):
            token[row + i] = offset + candidate[active[i]]
            code[row + i] = rounded(product[active[i]])
        if len(gain):
            _scale(product, active[:found], gain[f], shift[f], code[row : row + found])
        count[f] = found
        row += found
    return row - first, refined


@jit
def _halves(d: int) -> tuple[int, int]:
    """How many columns are multiplied in pairs, and how far apart the two of a pair are."""
    return d // 2 // LANES * LANES, d // 2


@summed
def _rest(weight: np.ndarray, z: np.ndarray, columns: int, apart: int) -> np.float32:
    """The product over the columns that are in no pair."""
    total = np.float32(0)
    for j in range(columns, apart):
        total += weight[j] * number_of(z[j])
    for j in range(apart + columns, len(weight)):
        total += weight[j] * number_of(z[j])
    return total


@jit
def _scale(u: np.ndarray, which: np.ndarray, gain: np.float32, shift: np.float32, code: np.ndarray) -> None:
    """Codes of u * gain + shift; a function of its own, for here the product is rounded before the sum."""
    for i in range(len(which)):
        code[i] = rounded(u[which[i]] * gain + shift)
