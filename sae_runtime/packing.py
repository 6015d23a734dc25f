"""Rows of tokens in which contexts follow each other, for attention that keeps them apart.

Invariant: which contexts share a row, and the row's length, follow from the contexts' lengths alone, and a
row is a whole number of budgets long however full it is: one shape, so compiled attention compiles once and
a context's values do not depend on how much follows it. Positions restart at each context; from that
transformers finds the contexts, and attention is causal inside each of them only. What is left of a row is
filled with tokens at position 0, each a context of its own: their attention costs nothing, and no position
is beyond those that a model with learned ones has.

`flex_attention` has its masks in blocks on a GPU. A CPU has no use for blocks; there the same masks are
dense and the attention is transformers' plain one, which is why rows there are short (`DENSE_TOKENS`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from sae_runtime.errors import InputError

PACKED = ("flex_attention", "flash_attention_2")  # the values of `model.attention` that pack
DENSE_TOKENS = 4096  # of a context on a CPU: a dense mask and scores of every head have the square of it
_ATTENTION = {"full_attention", "sliding_attention"}  # layer types that mix tokens by attention alone
_UNMASKED = {"gpt_oss"}  # transformers makes their masks without looking at positions


class Rows:
    """Contexts put into rows one after the other, each into the first row that has room for it.

    A context longer than `budget` has a row of its own.
    """

    def __init__(self, budget: int) -> None:
        self.members: list[list[int]] = []  # of each row, ascending
        self._budget, self._count, self._length = budget, 0, 0  # contexts, tokens of all rows
        self._left: list[int] = []

    def take(self, length: int, most: int | None = None) -> bool:
        """Put the next context, of `length` tokens, into a row; false, and nothing done, if `most` budgets
        of tokens do not do. The first context always goes in."""
        row = next((i for i, left in enumerate(self._left) if length <= left), len(self.members))
        if row == len(self.members):
            size = row_length(length, self._budget)
            if most is not None and self.members and self._length + size > most * self._budget:
                return False
            self.members.append([])
            self._left.append(size)
            self._length += size
        self.members[row].append(self._count)
        # A context that is longer than the budget stays alone, so that others' rows have one shape.
        self._left[row] = self._left[row] - length if length <= self._budget else 0
        self._count += 1
        return True


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """The contexts in each row, ascending: all rows of `budget` tokens but those of longer contexts."""
    rows = Rows(budget)
    for length in lengths:
        rows.take(length)
    return rows.members


def row_length(tokens: int, budget: int) -> int:
    """Length of a row of so many tokens: the next multiple of `budget`."""
    return -(-tokens // budget) * budget


def positions(lengths: Sequence[int], row: int) -> np.ndarray:
    """int64 [row]: positions of contexts that follow each other, 0 on what is left of the row."""
    found = np.zeros(row, np.int64)
    found[: sum(lengths)] = np.concatenate([np.arange(length) for length in lengths])
    return found


def check_attention(config: Any, attention: str, dtype: str, device: str, length: int) -> None:
    """InputError unless a text model of `config` can run packed contexts of up to `length` with `attention`.

    Decided from the settings and the packages that are there: no model is loaded, no device asked.
    """
    if attention not in PACKED:
        return
    from transformers import MODEL_MAPPING

    kind = config.model_type
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION)
    if others:
        raise _refusal(
            attention, f"layers of type {others[0]} of a {kind} model carry one context into the next", "sdpa"
        )
    model: Any = MODEL_MAPPING[type(config)]
    if attention == "flex_attention":
        if not model._supports_flex_attn:
            raise _refusal(attention, f"transformers has none for {kind} models", "sdpa")
        if kind in _UNMASKED:
            raise _refusal(attention, f"transformers' masks of {kind} models join packed contexts", "sdpa")
        if device == "cpu" and length > DENSE_TOKENS:
            raise _refusal(
                attention,
                f"on a CPU its masks are dense, which is too much for contexts of {length} tokens "
                f"(the most is {DENSE_TOKENS})",
                "sdpa",
            )
        return
    # A model with a list takes none but what is on it: gpt-oss has sinks, which the second version drops.
    listed = getattr(model, "_compatible_flash_implementations", None)
    if not model._supports_flash_attn or (listed and attention not in listed):
        raise _refusal(attention, f"transformers has none for {kind} models", "sdpa")
    if device != "cuda":
        raise _refusal(attention, "it needs a GPU", "flex_attention or sdpa")
    if dtype == "float32":
        raise _refusal(attention, "it has no float32", "flex_attention or sdpa, or `model.dtype: bfloat16`")
    if importlib.util.find_spec("flash_attn") is None:
        raise _refusal(
            attention, "the package flash-attn is not installed", "flex_attention or sdpa, or install it"
        )


def _refusal(attention: str, why: str, remedy: str) -> InputError:
    return InputError(f"model.attention: {attention} cannot be used: {why}; use {remedy}")
