"""How many rows and bytes a scan writes of every table: laws of what SAEs find in units of given shapes.

Invariant: nothing here reads anything. The laws are sums over SAEs of numbers that follow from width and
active features a token; `pipelines/measured.py` says by how much a finished scan was off, table by table.
Assumed, after the demo: a document of n counted tokens has 1 - (1 + n p / c)^-c of an SAE's features, for p
the share that a token has and c = 0.3; how often features come over documents (or contexts) is then spread
as a beta distribution with first parameter 1, of which the expected top and sampled contexts follow in
closed form; a feature's contexts fall into octaves of activation as in _STRATA.
Measured (SmolLM2's demo, six SAEs of 2,048 and 4,096, two units, L0 42, 2026-11-23): without any correction
there are 0.98 of the real rows of document_features, 1.00 of features, 0.99 of top_contexts, 0.94 of
sampled_contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Rows = dict[str, np.ndarray]  # table -> float64 [units]

SEGMENTS = 8  # of a conversation
_WINDOWS, _WINDOWED = "windows_", ("top_contexts", "sampled_contexts")
_SPREAD = 0.3  # c above
_STRATA = (0.56, 0.28, 0.11, 0.04, 0.01)  # shares of a feature's contexts
SUMMARY_TABLES = ("features", "top_contexts", "sampled_contexts")
SAE_TABLES = ("activations", "document_features", *SUMMARY_TABLES, "saes")
UNIT_TABLES = ("documents", "segments", "contexts")
_PAGE_ROW = 100.0  # bytes of a top context in `pages`
_PAGES_SHARE = 32  # of the index is more than they take, or there are none
FAN = 32  # units or nodes that a scan merges into one

# Bytes, measured (docs/LOG.md, 2026-11-23).
ROW = {
    "activations": 2.25,
    "document_features": 4.5,
    "features": 37.0,
    "top_contexts": 8.7,
    "sampled_contexts": 3.65,
    "saes": 0.0,  # by d_in, below
    "documents": 55.0,
    "segments": 8.0,
    "contexts": 20.0,  # and their tokens
}
TOKEN = 1.4  # of a token of `contexts`, as run
WINDOW = 10.0  # more of a top or sampled context, where `keep` leaves token rows out
SAE_INPUT = 4.4  # of `saes`, for each number of d_in
FILE = 800.0  # of a file of SAEs' rows
UNIT_FILE = {"documents": 1350.0, "segments": 1000.0, "contexts": 1150.0}
METADATA = 110.0  # more of a file of documents, for each metadata column
SAE_IN_FILE = {  # more for each SAE in it, which has row groups of its own
    "activations": 830.0,
    "document_features": 930.0,
    "features": 950.0,
    "top_contexts": 1250.0,
    "sampled_contexts": 1230.0,
    "saes": 1650.0,
}
COMMIT = 1800.0  # of a commit's JSON
# Of a row in merged files; of `features` and contexts more tokens are behind each.
MERGED_ROW = {
    "activations": 2.2,
    "document_features": 4.9,
    "by_document": 4.65,
    "features": 47.0,
    "top_contexts": 12.0,
    "sampled_merged": 12.8,
    "documents": 40.0,
    "segments": 8.0,
    "contexts": 15.0,
}


@dataclass(frozen=True)
class SaeShape:
    """What the laws ask of an SAE."""

    d_in: int
    width: int
    l0: float  # active features of a counted token
    tokens: float  # share of the documents whose token rows are kept
    documents: bool  # whether rows of document_features are

    @classmethod
    def of(cls, d_in: int, width: int, l0: float, keep: str | float) -> SaeShape:
        """With `keep` as `SaeInfo` has it."""
        share = keep if isinstance(keep, float) else float(keep == "tokens")
        return cls(d_in, width, min(l0, width), share, keep != "none")


@dataclass(frozen=True)
class Units:
    """Shapes of units, float64 [units] each, and how many units each entry stands for."""

    documents: np.ndarray
    contexts: np.ndarray
    counted: np.ndarray  # tokens
    run: np.ndarray  # tokens, those of BOS and overlaps too
    segments: np.ndarray  # of conversations
    times: np.ndarray

    @property
    def together(self) -> Units:
        """All of them as one."""
        return self.merged(float(self.times.sum()))

    def merged(self, count: float) -> Units:
        """One of `count` average ones merged."""
        share = count / max(1.0, float(self.times.sum()))
        columns = (self.documents, self.contexts, self.counted, self.run, self.segments)
        return Units(*(np.array([share * float(c @ self.times)]) for c in columns), *[np.ones(1)])


def rows(saes: Sequence[SaeShape], units: Units, top_k: int, sample_k: int) -> Rows:
    """Expected rows of each table in each unit; of `windows_*`, those that have their windows written."""
    zero = np.zeros(len(units.times))
    found = dict.fromkeys((*SAE_TABLES, *map(_WINDOWS.__add__, _WINDOWED)), zero)
    alike: dict[SaeShape, int] = {}
    for sae in saes:
        alike[sae] = alike.get(sae, 0) + 1
    for sae, number in alike.items():
        in_document = _share(sae, _each(units.counted, units.documents))
        in_context = _share(sae, _each(units.counted, units.contexts))
        features = sae.width * _capped(units.documents, in_document, 1)
        top = sae.width * _capped(units.documents, in_document, top_k)
        sampled = sum(
            (sae.width * _capped(units.contexts, in_context * part, sample_k) for part in _STRATA), zero
        )
        own = {
            "activations": sae.l0 * units.counted * sae.tokens,
            "document_features": sae.width * in_document * units.documents * sae.documents,
            "features": features,
            "top_contexts": top,
            "sampled_contexts": sampled,
            "saes": zero + 1,
            "windows_top_contexts": top * (sae.tokens < 1),
            "windows_sampled_contexts": sampled * (sae.tokens < 1),
        }
        found = {table: found[table] + number * own[table] for table in found}
    return found | {"documents": units.documents, "segments": units.segments, "contexts": units.contexts}


def corrected(found: Rows, factors: dict[str, float]) -> Rows:
    """Rows times the measured factors of their tables."""
    return {name: count * factors.get(name.removeprefix(_WINDOWS), 1.0) for name, count in found.items()}


def sizes(
    saes: Sequence[SaeShape], units: Units, found: Rows, groups: int, metadata: int
) -> tuple[Rows, Rows]:
    """(bytes that follow from the rows `found`, bytes that each file has anyway), by table and unit.

    `metadata` is the number of metadata columns.
    """
    inputs, number = sum(sae.d_in for sae in saes), len(saes)
    by_rows: Rows = {table: ROW[table] * found[table] for table in (*SAE_TABLES, *UNIT_TABLES)}
    by_rows["contexts"] = by_rows["contexts"] + TOKEN * units.run
    by_rows["saes"] = by_rows["saes"] + SAE_INPUT * inputs
    for table in _WINDOWED:
        by_rows[table] = by_rows[table] + WINDOW * found[_WINDOWS + table]
    anyway = {}
    for table in by_rows:
        if table in UNIT_FILE:
            files = UNIT_FILE[table] + (METADATA * metadata if table == "documents" else 0.0)
        else:
            files = groups * FILE + number * SAE_IN_FILE[table]
        anyway[table] = files * (found[table] > 0)
    return by_rows, anyway


def compacted(
    saes: Sequence[SaeShape],
    units: Units,
    written: dict[str, float],
    factors: tuple[dict[str, float], dict[str, float]],
    top_k: int,
    sample_k: int,
) -> dict[str, float]:
    """Bytes by table after `compact` and `gc`, from bytes `written` by units.

    `factors` are the measured ones of rows and of a row's bytes. Summaries and contexts of single units stay
    beside the merged ones.
    """
    of_rows, of_bytes = factors
    total = corrected(rows(saes, units, top_k, sample_k), of_rows)
    merged = dict(written)
    for table in ("activations", "document_features", "by_document", "documents", "segments"):
        of = "document_features" if table == "by_document" else table
        merged[table] = float(total[of] @ units.times) * MERGED_ROW[table] * of_bytes.get(of, 1.0)
    merged["contexts"] *= 2
    number, level = float(units.times.sum()), 1
    nodes = [(1.0, units.together)]  # of the whole, and those of each tier
    while FAN**level <= number:
        nodes.append((number // FAN**level, units.merged(FAN**level)))
        level += 1
    tops, merged["sampled_merged"] = 0.0, 0.0
    for count, shape in nodes:
        found = corrected(rows(saes, shape, top_k, sample_k), of_rows)
        tops = tops or float(found["top_contexts"][0])
        for table in SUMMARY_TABLES:
            name = "sampled_merged" if table == "sampled_contexts" else table
            size = float(found[table][0]) * MERGED_ROW[name] * of_bytes.get(table, 1.0)
            merged[name] += count * (size + WINDOW * float(found.get(_WINDOWS + table, np.zeros(1))[0]))
        merged["saes"] += count * SAE_INPUT * sum(sae.d_in for sae in saes)
    pages = tops * _PAGE_ROW
    merged["pages"] = pages if pages * _PAGES_SHARE <= sum(merged.values()) else 0.0
    return merged


def _each(tokens: np.ndarray, number: np.ndarray) -> np.ndarray:
    return np.divide(tokens, number, out=np.zeros_like(tokens), where=number > 0)


def _share(sae: SaeShape, tokens: np.ndarray) -> np.ndarray:
    """The share of an SAE's features that is active somewhere in so many counted tokens of one document."""
    often = sae.l0 / sae.width
    return np.minimum(often * tokens, 1 - (1 + often * tokens / _SPREAD) ** -_SPREAD)


def _capped(trials: np.ndarray, share: np.ndarray, most: int) -> np.ndarray:
    """How many of the trials are expected to have a feature, if no more than `most` of them count.

    The chance of a trial is beta(1, b) distributed over features, with mean `share`: j or more of n have it
    with the product over i < j of (n - i) / (b + n - i).
    """
    least = np.clip(share, 1e-12, 1 - 1e-9)
    b = (1 - least) / least
    chance, total = np.ones_like(b), np.zeros_like(b)
    for i in range(most):
        left = np.maximum(trials - i, 0)
        chance = chance * left / (b + left)
        total = total + chance
    return np.where(share > 0, total, 0.0)
