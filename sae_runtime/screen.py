"""Screen and refine on a CPU: products in bfloat16, and in float32 again where one may be over its floor.

Invariant: every (feature, token) whose float32 product is over the floor is refined, because the screen's
limit is lower than the floor by a bound on its error, never by an estimate; what is refined is decided and
valued by a float32 product of its own. So the screen changes speed and nothing else.

The bound, for feature f and token t, with u = 2^-8, the unit roundoff of bfloat16:

    |screen - product| <= |w_f| |z_t| (u [+ u where z is not bfloat16 itself] + d 2^-23) + u |limit|

by Cauchy and Schwarz over the roundings of the weights, over those of z, the float32 sums of both products,
and the rounding of the screen's output (whose relative error acts on numbers near the limit only). Numbers
under 2^-126, which AMX takes for 0, are in the terms of 2^-125.

Trade-off, measured (2 cores with AMX, 2,048 tokens x 4,096 features x d 576, L0 86 to 98, real activations):
1.13 to 1.2 candidates an active pair; the bfloat16 product takes 3.3 ms, one thread's screening 3.5 and
refining 8.5, against 33 ms for the float32 product and 9 for finding what is active in it. In blocks of 512
tokens z stays in the second-level cache; in blocks of 4,096 refining takes twice as long.
"""

from __future__ import annotations

import numpy as np
import torch

from sae_runtime.bfloat import round_code
from sae_runtime.jit import jit, summed

TOKENS = 512
FEATURES = 4096


class Screen:
    """One SAE's features, to be compared with a floor each."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, floor: torch.Tensor) -> None:
        """`weight` [width, d], `bias` and `floor` [width], float32 on the CPU: active where the product of a
        row with a token, plus bias, is over the floor."""
        self.cheap = weight.bfloat16()
        self.weight, self.bias, self.floor = weight.numpy(), bias.numpy(), floor.numpy()
        limit = floor.double() - bias.double()
        norm, d = weight.double().norm(dim=1), weight.shape[1]
        self._limit = _down(
            limit
            - 1.01 * 2.0**-8 * limit.abs()
            - 2.0**-22 * (floor.abs() + bias.abs()).double()
            - d * 2.0**-125
        )
        self._error = {  # times |z_t|; by whether z is bfloat16 itself
            exact: _up(1.02 * norm * (2.0**-8 * (1 if exact else 2) + d * 2.0**-23) + d * 2.0**-125)
            for exact in (True, False)
        }

    def over(
        self, z: torch.Tensor, exact: bool, gain: np.ndarray, shift: np.ndarray
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(rows a feature int64 [width], token int32, code uint16) of each block of TOKENS tokens of `z`.

        `z` float32 [tokens, d], `exact` if its values are bfloat16's. Rows are sorted by feature, then token.
        An activation is the product, or product * gain + shift where those are not empty.
        """
        found = []
        norms = _up(z.double().norm(dim=1) if len(z) < TOKENS else z.norm(dim=1).double() * (1 + 2.0**-16))
        for start in range(0, len(z), TOKENS):
            block = z[start : start + TOKENS]
            narrow = block.bfloat16().T
            count = np.zeros(len(self.bias), np.int64)
            tokens, codes = [], []
            for first in range(0, len(self.bias), FEATURES):
                rows = slice(first, first + FEATURES)
                screened = torch.mm(self.cheap[rows], narrow).view(torch.int16).numpy().view(np.uint16)
                token, code = _refine(
                    screened, self._limit[rows], self._error[exact][rows], norms[start : start + TOKENS],
                    self.weight[rows], block.numpy(), self.bias[rows], self.floor[rows],
                    gain[rows], shift[rows], start, count[rows],
                )  # fmt: skip
                tokens.append(token)
                codes.append(code)
            found.append((count, np.concatenate(tokens), np.concatenate(codes)))
        return found


def _down(values: torch.Tensor) -> np.ndarray:
    """float32 not above float64 `values`."""
    near = values.numpy().astype(np.float32)
    return np.where(near > values.numpy(), np.nextafter(near, np.float32(-np.inf)), near)


def _up(values: torch.Tensor) -> np.ndarray:
    """float32 not below float64 `values`."""
    return -_down(-values)


@summed
def _dots(
    w: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray
) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    """Four products at once: 23.5 ns each at d 576, against 31.8 one by one, for `w` is read once."""
    p, q, r, s = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for i in range(len(w)):
        p += w[i] * a[i]
        q += w[i] * b[i]
        r += w[i] * c[i]
        s += w[i] * d[i]
    return p, q, r, s


@jit
def _refine(
    screened: np.ndarray, limit: np.ndarray, error: np.ndarray, norm: np.ndarray,
    weight: np.ndarray, z: np.ndarray, bias: np.ndarray, floor: np.ndarray,
    gain: np.ndarray, shift: np.ndarray, offset: int, count: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    features, tokens = screened.shape
    token = np.empty(features * tokens, np.int32)
    code = np.empty(features * tokens, np.uint16)
    candidate = np.empty(tokens + 4, np.int32)
    product = np.empty(4, np.float32)
    wide = np.empty(tokens, np.uint32)
    value = wide.view(np.float32)
    active = np.empty(1, np.float32)
    bits = active.view(np.uint32)
    row = 0
    for f in range(features):
        for t in range(tokens):
            wide[t] = np.uint32(screened[f, t]) << np.uint32(16)
        least, slack = limit[f], error[f]
        n = 0
        for t in range(tokens):
            candidate[n] = t
            n += value[t] + slack * norm[t] > least
        # The last one fills up the last four, so that every product is summed by the same code.
        candidate[n : n + 4] = candidate[n - 1] if n else 0
        before = row
        w = weight[f]
        for i in range(0, n, 4):
            one, two, three, four = candidate[i], candidate[i + 1], candidate[i + 2], candidate[i + 3]
            product[0], product[1], product[2], product[3] = _dots(w, z[one], z[two], z[three], z[four])
            for j in range(min(4, n - i)):
                u = product[j] + bias[f]
                if u > floor[f]:
                    active[0] = u * gain[f] + shift[f] if len(gain) else u
                    token[row] = offset + candidate[i + j]
                    code[row] = round_code(bits[0])
                    row += 1
        count[f] = row - before
    return token[:row].copy(), code[:row].copy()
