"""Sets of unit ordinals as ranges: a million units that follow each other are one pair of numbers.

Invariant: ranges are ascending, disjoint and do not touch; `unpack(pack(x))` are x without repeats, sorted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

Ranges = tuple[tuple[int, int], ...]  # [first, stop) each


def pack(ordinals: Iterable[int] | np.ndarray) -> Ranges:
    """The ranges that hold exactly these ordinals."""
    have = ordinals if isinstance(ordinals, np.ndarray) else np.fromiter(ordinals, np.int64)
    have = np.unique(have)
    if not len(have):
        return ()
    cuts = np.flatnonzero(np.diff(have) != 1) + 1
    firsts, lasts = have[np.r_[0, cuts]], have[np.r_[cuts - 1, len(have) - 1]]
    return tuple((int(first), int(last) + 1) for first, last in zip(firsts, lasts, strict=True))


def unpack(ranges: Sequence[Sequence[int]]) -> np.ndarray:
    """int64, ascending."""
    parts = [np.arange(first, stop, dtype=np.int64) for first, stop in ranges]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def between(ordinals: np.ndarray, first: int, stop: int) -> np.ndarray:
    """Those of ascending ordinals that are in [first, stop), as a view."""
    low, high = np.searchsorted(ordinals, [first, stop])
    return ordinals[low:high]


class InOrder:
    """Ordinals in an order of their own, of which those of a span are found without going through all."""

    def __init__(self, ordinals: np.ndarray) -> None:
        """`ordinals` int64, in that order, without repeats."""
        self.ordinals = ordinals
        self._order = np.argsort(ordinals, kind="stable")
        self._ascending = ordinals[self._order]

    def __len__(self) -> int:
        return len(self.ordinals)

    def between(self, first: int, stop: int) -> np.ndarray:
        """Those in [first, stop), in that order."""
        low, high = np.searchsorted(self._ascending, [first, stop])
        return self.ordinals[np.sort(self._order[low:high])]


def without(have: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Those of `have` that are not in `taken`; both ascending."""
    return np.setdiff1d(have, taken, assume_unique=True)
