"""Documents become contexts: windows of one document's tokens, with what is counted.

Invariant: every token of a document is the own token of exactly one context, at `start + i`; BOS and
overlap are run but never counted; no context crosses documents; a short last window is kept and an
empty document has none. Segments partition a document's tokens, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.spec import ContextSettings
from sae_runtime.errors import InputError


@dataclass(frozen=True)
class ContextRule:
    """`ContextSettings` resolved for a tokenizer."""

    length: int
    overlap: int
    bos: int | None  # token id put first, or None
    uncounted: np.ndarray  # int32, sorted ids that are never counted
    skip_first: bool  # position 0 is not counted where there is no BOS (an attention sink)
    skip_template: bool = False  # tokens that come from a chat template are not counted
    skip_roles: frozenset[str] = frozenset()  # nor are tokens of these roles


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of a document that have one role."""

    role: str
    start: int
    stop: int
    template: bool = False  # they come from the chat template, not from a message


@dataclass(frozen=True)
class Context:
    """One window. `tokens` as run; `counted` of the same length; own tokens begin at `first`."""

    start: int
    first: int
    tokens: np.ndarray  # int32
    counted: np.ndarray  # bool


def context_rule(settings: ContextSettings, tokenizer: Any) -> ContextRule:
    """Resolve BOS and special tokens. InputError if a BOS is asked for and the tokenizer has none."""
    bos = _bos(settings, tokenizer)
    uncounted = sorted(special_ids(tokenizer)) if "special" in settings.exclude else []
    return ContextRule(
        settings.length,
        settings.overlap,
        bos,
        np.array(uncounted, np.int32),
        "first" in settings.exclude and bos is None,
        "template" in settings.exclude,
        settings.roles,
    )


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that the tokenizer flags special."""
    special = set(tokenizer.all_special_ids)
    return special | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def plain_segments(ids: np.ndarray) -> tuple[Segment, ...]:
    """A document that is no conversation is one segment."""
    return (Segment("text", 0, len(ids)),)


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids (int32) of each text, without anything added."""
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [np.array(ids, np.int32) for ids in encoded["input_ids"]]


def strip_bos(ids: np.ndarray, rule: ContextRule) -> np.ndarray:
    """A document that spells BOS at its beginning, once or more, gets ours instead: never two."""
    own = 0
    while own < len(ids) and ids[own] == rule.bos:
        own += 1
    return ids[own:]


def contexts(ids: np.ndarray, rule: ContextRule, segments: Sequence[Segment] = ()) -> list[Context]:
    """The windows of a document's token ids (without BOS), by which `segments` are numbered."""
    wanted = np.ones(len(ids), bool)
    for segment in segments:
        if segment.role in rule.skip_roles or (segment.template and rule.skip_template):
            wanted[segment.start : segment.stop] = False
    room = rule.length - (rule.bos is not None)
    lead = [] if rule.bos is None else [rule.bos]
    found = []
    start = 0
    while start < len(ids):
        overlap = min(rule.overlap, start)
        stop = min(len(ids), start + room - overlap)
        tokens = np.concatenate([np.array(lead, np.int32), ids[start - overlap : stop]])
        first = len(lead) + overlap
        counted = ~np.isin(tokens, rule.uncounted)
        counted[:first] = False
        counted[first:] &= wanted[start:stop]
        if rule.skip_first:
            counted[0] = False
        found.append(Context(start, first, tokens, counted))
        start = stop
    return found


def _bos(settings: ContextSettings, tokenizer: Any) -> int | None:
    bos = tokenizer.bos_token_id
    if settings.bos is True and bos is None:
        raise InputError("context.bos: the model's tokenizer has no BOS token; set `bos: auto`")
    if settings.bos == "auto":
        # What the tokenizer does, asked by doing: flags such as add_bos_token lie in some of them.
        ids = tokenizer("a")["input_ids"]
        return bos if bos is not None and ids and ids[0] == bos else None
    return bos if settings.bos else None
