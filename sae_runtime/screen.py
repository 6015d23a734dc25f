"""Screen and refine on a CPU: cheap products first, and in float32 again where one may be over its floor.

Invariant: every (feature, token) whose float32 product is over the floor is refined, because the screen's
limit is lower than the floor by a bound on its error (cheap.py), never by an estimate; what is refined is
decided and valued by a float32 product of its own. So the screen changes speed and nothing else.

Int8 products have the wider bound. An SAE of which they leave so many pairs to refine that bfloat16 products
would have cost less goes on with those.

Trade-off, measured (4,096 tokens x 4,096 features x d 576, L0 83): with AMX, in bfloat16, 31 ms, of which 11
are cheap products, where the float32 product alone takes 70 to 75; an EPYC without, one core, in int8 51 ms,
of which 26 are products and 23 refining, and in bfloat16 63. Blocks of 1,024 tokens and features stay in
caches (`benchmarks/encode.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from sae_runtime.bfloat import rounded
from sae_runtime.cheap import LANES, Bfloat, Cheap, Int8, fastest, worth_refining
from sae_runtime.jit import jit, lowest_bit, number_of, over_limit, prefetch, summed

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
        found = []
        width = len(self.bias)
        products = None
        room = TOKENS * min(FEATURES, width) + LANES
        scratch = np.empty(room, np.int32), np.empty(room, np.uint16)
        for start in range(0, len(x), TOKENS):
            block = x[start : start + TOKENS]
            z = _codes(block) if exact else inputs(block).contiguous().numpy()
            if products is None:
                products = self.cheap.products(z)
                cheap = torch.empty(room, dtype=products.dtype)
                screened = cheap.numpy() if cheap.dtype == torch.int32 else _codes(cheap)
            block_tokens = products.tokens(z)
            count = np.zeros(width, np.int64)
            refined, tokens, codes = 0, [], []
            for first in range(0, width, FEATURES):
                rows = slice(first, first + FEATURES)
                features = len(self.bias[rows])
                products.multiply(
                    rows, block_tokens.columns, cheap[: features * len(z)].view(features, len(z))
                )
                n, candidates = _refine(
                    screened, *block_tokens[1:], products.lost[rows], products.norm[rows],
                    products.limit[rows], self.weight[rows], z, self.bias[rows], self.floor[rows],
                    gain[rows], shift[rows], start, count[rows], *scratch,
                )  # fmt: skip
                refined += candidates
                tokens.append(scratch[0][:n].copy())
                codes.append(scratch[1][:n].copy())
            found.append((count, _joined(tokens), _joined(codes)))
            if isinstance(self.cheap, Int8) and refined > worth_refining() * width * len(z):
                self.cheap = Bfloat(*self._given)
                products = None
        return found


def _codes(x: torch.Tensor) -> np.ndarray:
    """The codes of bfloat16 numbers, uint16."""
    return x.contiguous().view(torch.int16).numpy().view(np.uint16)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


@summed
def _refine(
    screened: np.ndarray, scale: np.ndarray, near: np.ndarray, off: np.ndarray,
    lost: np.ndarray, norm: np.ndarray, limit: np.ndarray,
    weight: np.ndarray, z: np.ndarray, bias: np.ndarray, floor: np.ndarray,
    gain: np.ndarray, shift: np.ndarray, offset: int, count: np.ndarray,
    token: np.ndarray, code: np.ndarray,
) -> tuple[int, int]:  # fmt: skip
    """Rows into `token` and `code`, their number a feature into `count`; gives their number and candidates'.

    `screened` begins with the cheap products [features, tokens]; z is float32, or codes of bfloat16.
    """
    features, tokens = len(limit), len(z)
    d = weight.shape[1]
    candidate = np.empty(tokens + 4, np.int32)
    product = np.empty(tokens + 4, np.float32)
    row, refined = 0, 0
    for f in range(features):
        n = 0
        if f + 1 < features:  # rows of weights come from far, and comparing leaves time for the next
            for begun in range(0, d, 16):
                prefetch(weight, (f + 1) * d + begun)
        for start in range(0, tokens, LANES):
            word = np.uint64(0)
            for part in range(0, LANES, 16):
                at = start + part
                over = over_limit(screened, scale, near, off, f * tokens + at, at, lost[f], norm[f], limit[f])
                word |= over << np.uint64(part)
            if tokens - start < LANES:
                word &= (np.uint64(1) << np.uint64(tokens - start)) - np.uint64(1)
            while word:
                candidate[n] = start + lowest_bit(word)
                n += 1
                word &= word - np.uint64(1)
        refined += n
        # The last one fills up the last four, so that every product is summed by the same code.
        candidate[n : n + 3] = candidate[n - 1] if n else 0
        # Four at once, for `weight` is read once.
        for i in range(0, n, 4):
            one, two, three, four = candidate[i], candidate[i + 1], candidate[i + 2], candidate[i + 3]
            p, q, r, s = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for j in range(d):
                p += weight[f, j] * number_of(z[one, j])
                q += weight[f, j] * number_of(z[two, j])
                r += weight[f, j] * number_of(z[three, j])
                s += weight[f, j] * number_of(z[four, j])
            product[i], product[i + 1], product[i + 2], product[i + 3] = p, q, r, s
        before = row
        for i in range(n):
            u = product[i] + bias[f]
            product[i] = u
            token[row] = offset + candidate[i]
            code[row] = rounded(u)
            candidate[row - before] = i
            row += u > floor[f]
        if len(gain):
            _scale(product, candidate[: row - before], gain[f], shift[f], code[before:row])
        count[f] = row - before
    return row, refined


@jit
def _scale(u: np.ndarray, which: np.ndarray, gain: np.float32, shift: np.float32, code: np.ndarray) -> None:
    """Codes of u * gain + shift; a function of its own, for here the product is rounded before the sum."""
    for i in range(len(which)):
        code[i] = rounded(u[which[i]] * gain + shift)
