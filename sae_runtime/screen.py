"""Screen and refine on a CPU: products in bfloat16, and in float32 again where one may be over its floor.

Invariant: every (feature, token) whose float32 product is over the floor is refined, because the screen's
limit is lower than the floor by a bound on its error, never by an estimate; what is refined is decided and
valued by a float32 product of its own. So the screen changes speed and nothing else.

The bound, for feature f and token t, of what the roundings to bfloat16 take from w_f and z_t:

    |screen - product| <= |w_f - bf(w_f)| |z_t| + |w_f| |z_t - bf(z_t)| + d 2^-23 |w_f| |z_t| + 2^-8 |limit|

by Cauchy and Schwarz, with the float32 sums of both products and the rounding of the screen's output (whose
relative error acts on numbers near the limit only). Where z is bfloat16 itself, the second term is 0; where
it is not, the first takes the largest |w - bf(w)| / |w| for all features, so that the bound is still a number
of the feature times one of the token. Numbers under 2^-126, which AMX takes for 0, are in the terms of
2^-125.

Trade-off, measured (2 cores with AMX, 4,096 tokens x 4,096 features x d 576, L0 83): 31 ms, of which the
bfloat16 products are 11, where the float32 product alone takes 70 to 75 (`benchmarks/encode.py`); 1.19
candidates an active pair. In blocks of 512 tokens z stays in the second-level cache; 256 and 768 are slower.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from sae_runtime.bfloat import rounded, value_of
from sae_runtime.jit import jit, lowest_bit, over_limit, summed

TOKENS = 512
FEATURES = 4096
_LANES = 64  # tokens that are compared at a time; the arrays compared have as many to spare


class Screen:
    """One SAE's features, to be compared with a floor each."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, floor: torch.Tensor) -> None:
        """`weight` [width, d], `bias` and `floor` [width], float32 on the CPU: active where the product of a
        row with a token, plus bias, is over the floor."""
        self.cheap = weight.bfloat16()
        self.weight, self.bias, self.floor = weight.numpy(), bias.numpy(), floor.numpy()
        self.d = weight.shape[1]
        lost, norm = (torch.empty(len(weight), dtype=torch.float64) for _ in range(2))
        for start in range(0, len(weight), FEATURES):
            rows = slice(start, start + FEATURES)
            norm[rows] = weight[rows].double().norm(dim=1)
            lost[rows] = (weight[rows].double() - self.cheap[rows].double()).norm(dim=1)
        limit = floor.double() - bias.double()
        self._limit = _down(
            limit
            - 1.01 * 2.0**-8 * limit.abs()
            - 2.0**-22 * (floor.abs() + bias.abs()).double()
            - self.d * 2.0**-125 * (1 + norm)
        )
        # Of weights under 2^-126 more may be lost than 2^-8; such a feature counts as a larger one.
        share = min(float((lost / norm.clamp(min=2.0**-149)).max()), 2.0**-8)
        size = torch.maximum(norm, lost / max(share, 2.0**-40))
        # What is multiplied with a number of the token, by whether z is bfloat16 itself.
        self._slack = {
            True: _up(1.02 * (lost + norm * self.d * 2.0**-23) + self.d * 2.0**-125),
            False: _up(1.02 * size + self.d * 2.0**-125),
        }
        self._share = 1.02 * share + self.d * 2.0**-23

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
        room = TOKENS * min(FEATURES, len(self.bias)) + _LANES
        products = torch.empty(room, dtype=torch.bfloat16)
        screened = products.view(torch.int16).numpy().view(np.uint16)
        scratch = np.empty(room, np.int32), np.empty(room, np.uint16)
        for start in range(0, len(x), TOKENS):
            block = x[start : start + TOKENS]
            z = inputs(block)
            error = _token_errors(z.numpy(), np.inf if exact else self._share)
            narrow = (block if exact else z.bfloat16()).T
            count = np.zeros(len(self.bias), np.int64)
            tokens, codes = [], []
            for first in range(0, len(self.bias), FEATURES):
                rows = slice(first, first + FEATURES)
                cheap = self.cheap[rows]
                torch.mm(cheap, narrow, out=products[: len(cheap) * len(z)].view(len(cheap), len(z)))
                n = _refine(
                    screened, self._limit[rows], self._slack[exact][rows], error,
                    self.weight[rows], z.numpy(), self.bias[rows], self.floor[rows],
                    gain[rows], shift[rows], start, count[rows], *scratch,
                )  # fmt: skip
                tokens.append(scratch[0][:n].copy())
                codes.append(scratch[1][:n].copy())
            found.append((count, _joined(tokens), _joined(codes)))
        return found


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _down(values: torch.Tensor) -> np.ndarray:
    """float32 not above float64 `values`."""
    near = values.numpy().astype(np.float32)
    return np.where(near > values.numpy(), np.nextafter(near, np.float32(-np.inf)), near)


def _up(values: torch.Tensor) -> np.ndarray:
    """float32 not below float64 `values`."""
    return -_down(-values)


@summed
def _token_errors(z: np.ndarray, share: float) -> np.ndarray:
    """float32 [tokens], not below |z|; or not below share |z| + |z - bf(z)| if `share` is finite.

    As many zeros follow as `_refine` may read past the end.
    """
    error = np.zeros(len(z) + _LANES, np.float32)
    for t in range(len(z)):
        whole, lost = 0.0, 0.0
        for i in range(z.shape[1]):
            whole += np.float64(z[t, i]) * np.float64(z[t, i])
        if share < np.inf:
            for i in range(z.shape[1]):
                off = np.float64(z[t, i]) - np.float64(value_of(rounded(z[t, i])))
                lost += off * off
            whole = share * np.sqrt(whole) + np.sqrt(lost)
        else:
            whole = np.sqrt(whole)
        error[t] = np.float32(whole * (1 + 2.0**-20))
    return error


@summed
def _refine(
    screened: np.ndarray, limit: np.ndarray, slack: np.ndarray, error: np.ndarray,
    weight: np.ndarray, z: np.ndarray, bias: np.ndarray, floor: np.ndarray,
    gain: np.ndarray, shift: np.ndarray, offset: int, count: np.ndarray,
    token: np.ndarray, code: np.ndarray,
) -> int:  # fmt: skip
    """Rows into `token` and `code`, their number a feature into `count`; gives their number.

    `screened` begins with the codes of the cheap products [features, tokens].
    """
    features, tokens = len(limit), len(z)
    candidate = np.empty(tokens + 4, np.int32)
    product = np.empty(tokens + 4, np.float32)
    row = 0
    for f in range(features):
        n = 0
        for start in range(0, tokens, _LANES):
            word = np.uint64(0)
            for part in range(0, _LANES, 16):
                at = start + part
                over = over_limit(screened, error, f * tokens + at, at, slack[f], limit[f])
                word |= over << np.uint64(part)
            if tokens - start < _LANES:
                word &= (np.uint64(1) << np.uint64(tokens - start)) - np.uint64(1)
            while word:
                candidate[n] = start + lowest_bit(word)
                n += 1
                word &= word - np.uint64(1)
        # The last one fills up the last four, so that every product is summed by the same code.
        candidate[n : n + 3] = candidate[n - 1] if n else 0
        # Four at once, for `weight` is read once: 23.5 ns each at d 576, against 31.8 one by one.
        for i in range(0, n, 4):
            one, two, three, four = candidate[i], candidate[i + 1], candidate[i + 2], candidate[i + 3]
            p, q, r, s = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for j in range(weight.shape[1]):
                p += weight[f, j] * z[one, j]
                q += weight[f, j] * z[two, j]
                r += weight[f, j] * z[three, j]
                s += weight[f, j] * z[four, j]
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
    return row


@jit
def _scale(u: np.ndarray, which: np.ndarray, gain: np.float32, shift: np.float32, code: np.ndarray) -> None:
    """Codes of u * gain + shift; a function of its own, for here the product is rounded before the sum."""
    for i in range(len(which)):
        code[i] = rounded(u[which[i]] * gain + shift)
