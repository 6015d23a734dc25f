"""The common odds ratio of 2x2 tables in strata, of many features at once."""

from __future__ import annotations

import numpy as np

from queries.conditional import Floats, Ints, lower_bound

_NORMAL = 1.959963984540054  # 0.975 quantile


def mantel_haenszel(fired_a: Ints, fired: Ints, units_a: Ints, units: Ints) -> tuple[Floats, Floats, Floats]:
    """Log odds ratio (natural) of a against b and its 95 % interval, [F] each.

    `fired_a`, `fired` are [F, K], `units_a`, `units` [K]; as of `conditional.p_values`. Mantel and Haenszel's
    estimate with the variance of Robins, Breslow and Greenland (1986). Where it is infinite, its finite bound
    is the exact one; where margins allow one value only, all three are NaN.
    """
    a, b = fired_a, units_a - fired_a
    c, d = fired - fired_a, units - units_a - fired + fired_a
    size = np.maximum(units, 1)
    p, q = (a + d) / size, (b + c) / size
    r, s = a * d / size, b * c / size
    sum_r, sum_s = r.sum(1), s.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        estimate = np.log(sum_r / sum_s)
        variance = (p * r).sum(1) / (2 * sum_r**2) + (q * s).sum(1) / (2 * sum_s**2)
        variance += (p * s + q * r).sum(1) / (2 * sum_r * sum_s)
        reach = _NORMAL * np.sqrt(variance)
    low, high = estimate - reach, estimate + reach
    most = (sum_s == 0) & (sum_r > 0)  # every one of a's that could fire does
    low[most], high[most] = lower_bound(fired[most], units_a, units), np.inf
    least = (sum_r == 0) & (sum_s > 0)
    low[least], high[least] = -np.inf, -lower_bound(fired[least], units - units_a, units)
    return estimate, low, high
