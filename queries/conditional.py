"""The exact test of 2x2 tables in strata: is the odds ratio 1, given all margins?

Under that hypothesis the number S of a's units that fire is a sum of independent hypergeometrics, one a
stratum, and p = min(1, 2 min(P(S <= s), P(S >= s))), so that P(p <= alpha) <= alpha at any support.
Thousands of features are computed side by side. A feature's hypergeometrics are tilted by some log odds
ratio theta that brings their mean near s (Fisher's noncentral hypergeometric), so that the tail in question
is a large part of what is summed and keeps its relative precision, down to 1e-300; of the tilted total the
characteristic function is inverted, with the geometric weights that undo the tilt summed in closed form.

Invariant: what is cut off is under `_CUT` of the tilted total's mass. Hypergeometrics, tilted ones too, are
sums of independent indicators (their generating functions have real roots only: Vatutin and Mikhailov, 1982),
so Bennett's inequality says how wide a window must be, and |phi(t)| <= exp(-2 var sin^2(t/2)) how many
frequencies are wanted: some 30, whatever the width.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_CUT = 33.0  # -ln of the mass that may be cut off, on either side: 5e-15
_NEAR = 3.0  # standard deviations that the tilted mean may be from s
_CHUNK = 4096  # features whose windows are laid out at once
_BATCH = 128  # features of like variance that share frequencies; their pmfs of one stratum stay in cache
_PRODUCT = 1 << 18  # multiplications of one matrix product, up to which OpenBLAS starts no threads
_SLICE = 512  # of a window, in such a product
_END = 40  # units from the end of the support: P(a sum of indicators of mean 3.7 is further) < 1e-24


def p_values(fired_a: Ints, fired: Ints, units_a: Ints, units: Ints, tilt: Floats) -> Floats:
    """Two-sided exact p of each feature, [F], for a common odds ratio of 1.

    `fired_a`, `fired` are [F, K]: of `units_a` [K] units of a, and of all `units` [K], how many fire in each
    of K strata. `tilt` [F] is a log odds ratio near the estimate (infinite where s is the end of its
    support); it decides speed, not the value. Features whose margins allow one value only have p 1.
    """
    p = np.ones(len(fired))
    lowest, highest = supports(fired, units_a, units)
    s, first, last = fired_a.sum(1), lowest.sum(1), highest.sum(1)
    for end in (lowest, highest):
        at_end = (first < last) & (s == end.sum(1))
        p[at_end] = np.minimum(1, 2 * np.exp(_log_pmf(end[at_end], fired[at_end], units_a, units).sum(1)))
    inside = (first < s) & (s < last)
    # The Mantel-Haenszel estimate has the sign of this, as sum (ad - bc) / N = s - mean.
    above = s >= (fired * (units_a / np.maximum(units, 1))).sum(1)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for some, x, m, start in (
            (inside & above, fired_a, units_a, tilt),
            (inside & ~above, fired - fired_a, units - units_a, -tilt),  # the other tail, of b's
        ):
            places = np.flatnonzero(some)
            for at in range(0, len(places), _CHUNK):
                part = places[at : at + _CHUNK]
                p[part] = _inside(x[part].sum(1), fired[part], m, units, start[part], threads)
    return p


def supports(fired: Ints, units_a: Ints, units: Ints) -> tuple[Ints, Ints]:
    """Fewest and most of a's units that can fire, given the margins: [F, K] each."""
    return np.maximum(fired + units_a - units, 0), np.minimum(fired, units_a)


def lower_bound(fired: Ints, units_a: Ints, units: Ints, tail: float = 0.025) -> Floats:
    """The log odds ratio at which P(S = the most) is `tail`, [F]: the exact lower bound of those seen there.

    The number D of a's units that could fire beyond those that do is a sum of independent indicators; where
    P(D = 0) = 0.025 their mean is at most ln 40, so terms up to `_END` are all that count. NaN where margins
    allow one value only.
    """
    lowest, highest = supports(fired, units_a, units)
    room = highest - lowest
    a_rest, b_rest = units_a - highest, fired - highest  # one of them is 0
    both_rest = units - units_a - fired + highest
    first = highest * both_rest / ((a_rest + 1) * (b_rest + 1))  # weight of one fewer, relative to the most
    first = np.where(room > 0, first, 0.0).sum(1)
    with np.errstate(divide="ignore"):
        theta = np.log(first / -np.log(tail))  # P(D = 0) >= tail here, as weights are <= first^d / d!
    total = np.zeros((len(fired), _END + 1))
    total[:, 0] = 1
    d = np.arange(_END)
    for k in range(fired.shape[1]):
        one = np.ones_like(total)
        if not room[:, k].any():
            continue
        ratio = (highest[:, k, None] - d) * (both_rest[:, k, None] - d)
        ratio = ratio / ((a_rest[:, k, None] + 1 + d) * (b_rest[:, k, None] + 1 + d))
        with np.errstate(over="ignore"):
            ratio = np.where(d < room[:, k, None], ratio * np.exp(-theta)[:, None], 0.0)
        one[:, 1:] = np.cumprod(ratio, axis=1)
        before, total = total, np.zeros_like(total)
        for step in range(_END + 1):
            total[:, step:] += one[:, step, None] * before[:, : _END + 1 - step]
    # P(D = 0) is 1 / polynomial(exp(-psi)), psi relative to theta, and psi in [-ln(1 / tail), 0].
    low, high = np.full(len(fired), np.log(tail)), np.zeros(len(fired))
    for _ in range(60):
        middle = (low + high) / 2
        above = (total * np.exp(-np.outer(middle, np.arange(_END + 1)))).sum(1) > 1 / tail
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.where(first > 0, theta + high, np.nan)


def _log_pmf(x: Ints, fired: Ints, units_a: Ints, units: Ints) -> Floats:
    """ln P(X = x) of hypergeometrics, [F, K]; relative precision of P some 1e-13 at any size.

    Stirling's formula for each factorial; what remains of the large terms is deviances of the four cells
    (Loader, Fast and accurate computation of binomial probabilities, 2000), which do not cancel.
    """
    cells = (x, units_a - x, fired - x, units - units_a - fired + x)
    rows, columns = (units_a, units - units_a), (fired, units - fired)
    size = np.maximum(units, 1)
    out: Floats = _stirling(fired) + _stirling(units - fired)
    out += _stirling(units_a) + _stirling(units - units_a) - _stirling(units)
    for cell, row, column in zip(cells, (*rows[:1] * 2, *rows[1:] * 2), columns * 2, strict=True):
        out -= _deviance(cell, row * column / size) + _stirling(cell)
    return out


def _deviance(x: Ints, mean: Floats) -> Floats:
    """x ln(x / mean) - x + mean."""
    beyond = (x - mean) / np.where(mean > 0, mean, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(x > 0, x * np.log1p(beyond) - (x - mean), mean)


def _stirling(n: Ints) -> Floats:
    """ln n! - (n ln n - n)."""
    small = np.minimum(n, 15)
    exact = gammaln(small + 1) - np.where(small > 0, small * np.log(np.maximum(small, 1)), 0) + small
    large = np.maximum(n, 16).astype(np.float64)
    inverse = 1 / large**2
    series = (1 / 12 - inverse * (1 / 360 - inverse * (1 / 1260 - inverse / 1680))) / large
    return np.where(n < 16, exact, 0.5 * np.log(2 * np.pi * large) + series)


def _reach(variance: Floats) -> Floats:
    """How far from its mean a sum of indicators of this variance can be but for a mass of exp(-_CUT)."""
    return np.interp(np.log(np.maximum(variance, _GRID[0])), np.log(_GRID), _REACHES)


def _bennett(variance: Floats) -> Floats:
    """The t at which var h(t / var) = _CUT, h(u) = (1 + u) ln(1 + u) - u, a little more than that."""
    low, high = np.zeros_like(variance), np.full_like(variance, _CUT) + 10 * np.sqrt(_CUT * variance)
    for _ in range(60):
        middle = (low + high) / 2
        u = middle / variance
        more = variance * ((1 + u) * np.log1p(u) - u) < _CUT
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    return 1.01 * high


_GRID = np.geomspace(1e-3, 1e12, 400)
_REACHES = _bennett(_GRID)


@dataclass(frozen=True)
class _Windows:
    """Where tilted hypergeometrics have their mass. Arrays are [F, K]."""

    start: Ints
    width: Ints
    variance: Floats  # not less than the true one


def _windows(fired: Ints, units_a: Ints, units: Ints, tilt: Floats) -> _Windows:
    """Windows around the modes (in closed form, as the pmf's ratios are)."""
    lowest, highest = supports(fired, units_a, units)
    odds = np.exp(tilt)[:, None]
    a = odds - 1
    b = odds * (fired + units_a + 2) + (units - fired - units_a)
    c = odds * (fired + 1) * (units_a + 1)
    mode = np.floor(2 * c / (b + np.sqrt(np.maximum(b * b - 4 * a * c, 0))))
    mode = np.clip(mode, lowest, highest)
    cells = (mode, units_a - mode, fired - mode, units - units_a - fired + mode)
    variance = 1 / sum(1 / (cell + 1) for cell in cells)
    reach = np.ceil(_reach(variance)) + 1
    start = np.maximum(lowest, mode - reach).astype(np.int64)
    stop = np.minimum(highest, mode + reach).astype(np.int64) + 1
    return _Windows(start, stop - start, variance)


def _inside(
    s: Ints, fired: Ints, units_a: Ints, units: Ints, tilt: Floats, threads: ThreadPoolExecutor
) -> Floats:
    """`p_values` of features whose s is not below its mean without a tilt, nor at an end of its support."""
    p = np.empty(len(s))
    tilt = np.maximum(tilt, 1e-9)  # or weights would not be a geometric series
    low, high = np.zeros(len(s)), np.full(len(s), np.inf)
    rest = np.arange(len(s))
    while len(rest):
        windows = _windows(fired[rest], units_a, units, tilt[rest])
        order = np.argsort(windows.variance.sum(1), kind="stable")

        def batch(some: Ints, rest: Ints = rest, windows: _Windows = windows) -> Ints:
            part = rest[some]
            total = _Total(fired[part], units_a, units, tilt[part], windows.start[some], windows.width[some])
            off = s[part] - total.mean
            done = np.abs(off) <= _NEAR * np.sqrt(total.variance)
            p[part[done]] = total.two_sided(s[part[done]], done)
            # Where the tilt did not bring the mean near s, Newton's step, or halving where it leaves what
            # is known of the right one.
            low[part] = np.where(off > 0, tilt[part], low[part])
            high[part] = np.where(off > 0, high[part], tilt[part])
            better = tilt[part] + np.clip(off / total.variance, -2, 2)
            lost = (better <= low[part]) | (better >= high[part])
            better = np.where(lost, (low[part] + high[part]) / 2, better)
            tilt[part] = np.where(done, tilt[part], better)
            return part[~done]

        batches = [order[at : at + _BATCH] for at in range(0, len(order), _BATCH)]
        rest = np.concatenate(list(threads.map(batch, batches)))
    return p


class _Total:
    """The tilted total of a batch of features: its moments and its characteristic function.

    `mean`, `variance` are [B].
    """

    def __init__(
        self, fired: Ints, units_a: Ints, units: Ints, tilt: Floats, start: Ints, width: Ints
    ) -> None:
        self.tilt = tilt
        self.start = start.sum(1)
        lowest, highest = supports(fired, units_a, units)
        self.most = highest.sum(1)
        size = int((self.most - lowest.sum(1)).max()) + 1
        self.log_mass = _log_pmf(start, fired, units_a, units).sum(1)  # ln E exp(tilt (S - start))
        self.mean = self.start.astype(np.float64)
        self.variance = np.zeros(len(tilt))
        odds = np.exp(tilt)[:, None]
        pmfs = []
        for k in np.flatnonzero((width > 1).any(0)):
            pmf = _tilted(start[:, k, None], width[:, k].max(), fired[:, k, None], units_a[k], units[k], odds)
            mass = pmf.sum(1)
            pmf /= mass[:, None]
            d = np.arange(pmf.shape[1], dtype=np.float64)
            first, second = (pmf @ np.stack([d, d * d], axis=1)).T
            self.log_mass += np.log(mass)
            self.mean += first
            self.variance += np.maximum(second - first * first, 0)
            pmfs.append(pmf)
        self.variance = np.maximum(self.variance, 1e-300)
        self.reach = np.ceil(_reach(self.variance)).astype(np.int64) + 1
        # One period for all, not below a window of each, odd so that every frequency but 0 has a mirror.
        self.period = min(2 * int(self.reach.max()) + 1, size) | 1
        self.phi = self._characteristic(pmfs)

    def _characteristic(self, pmfs: list[Floats]) -> npt.NDArray[np.complex128]:
        """E exp(i t (S - start)) at t = 2 pi j / period, j = 0, 1, ... as far as it counts: [B, J]."""
        sine = min(1.0, np.sqrt(_CUT / (2 * self.variance.min())))
        count = int(np.ceil(self.period * np.arcsin(sine) / np.pi)) + 1
        j = np.arange(min(count, self.period // 2) + 1)
        longest = max((pmf.shape[1] for pmf in pmfs), default=1)
        waves = self._waves(np.outer(np.arange(longest), j))
        both = np.concatenate([waves.real, waves.imag], axis=1)
        phi = np.ones((len(self.tilt), len(j)), np.complex128)
        for pmf in pmfs:
            product = _product(pmf, both)
            phi *= product[:, : len(j)] + 1j * product[:, len(j) :]
        return phi

    def _waves(self, turns: Ints) -> npt.NDArray[np.complex128]:
        """exp(2 pi i turns / period), the whole turns left out first, which would cost precision."""
        return np.exp(2j * np.pi / self.period * (turns % self.period))

    def two_sided(self, s: Ints, which: npt.NDArray[np.bool_]) -> Floats:
        """2 min(P(S <= s), P(S >= s)), at most 1, of the untilted totals `which`; their tilts fit `s`."""
        j = np.arange(self.phi.shape[1])
        tilt, start = self.tilt[which], self.start[which]
        phi = self.phi[which] * self._waves(np.outer(start - s, j))
        weight = np.where(j > 0, 2.0, 1.0) / self.period
        # The window of the total ends at its reach; the period keeps what is below s out of it.
        end = np.floor(self.mean[which] + self.reach[which]).astype(np.int64)
        end = np.minimum(self.most[which], end) - s + 1.0
        step = -tilt[:, None] - 2j * np.pi / self.period * j
        geometric = np.expm1(step * end[:, None]) / np.expm1(step)
        scale = np.exp(self.log_mass[which] - tilt * (s - start))
        upper = scale * ((phi * geometric).real @ weight)
        point = scale * (phi.real @ weight)
        p: Floats = np.clip(2 * np.minimum(upper, 1 - upper + point), 0, 1)
        return p


def _product(pmf: Floats, waves: Floats) -> Floats:
    """pmf @ waves[: its width], [B, 2 J], in parts too small for BLAS to start threads.

    Batches go side by side already, and threads that wait for one another took ten times as long on cores
    that others use too.
    """
    out = np.zeros((len(pmf), waves.shape[1]))
    for first in range(0, pmf.shape[1], _SLICE):
        some = pmf[:, first : first + _SLICE]
        other = waves[first : first + some.shape[1]]
        rows = max(1, _PRODUCT // other.size)
        for at in range(0, len(pmf), rows):
            out[at : at + rows] += some[at : at + rows] @ other
    return out


def _tilted(start: Ints, width: int, fired: Ints, units_a: int, units: int, odds: Floats) -> Floats:
    """The tilted pmf at start, start + 1, ... relative to that at start: [B, width].

    Beyond its support it is 0, as one of the ratios is; so precise as `width` products are, some 1e-14.
    """
    d = np.arange(width - 1, dtype=np.float64)
    ratio = ((fired - start).astype(np.float64) - d) * ((units_a - start).astype(np.float64) - d)
    ratio *= odds
    ratio /= ((start + 1.0) + d) * ((units - fired - units_a + start + 1.0) + d)
    out = np.ones((len(start), width))
    np.cumprod(ratio, axis=1, out=out[:, 1:])
    return out
