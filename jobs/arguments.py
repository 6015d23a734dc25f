"""Kinds of arguments that several commands take.

Invariant: what is no number is refused as wrong input. click's own ranges let `nan` through, which is neither
below a least value nor above a greatest one.
"""

from __future__ import annotations

import math
from typing import Any

import click


class Finite(click.FloatRange):
    """A number within a range, neither infinite nor NaN."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


NOT_NEGATIVE = Finite(min=0)
POSITIVE = Finite(min=0, min_open=True)
