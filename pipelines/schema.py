"""The index on disk: its files, their columns, and the keys. Written here once, for writer and reader.

    index.json                     what fixes the values: model, SAEs, contexts, settings
    vocabulary.parquet             token, text, bytes
    plans/000000.json              registry, append-only: files, units with their ordinals, what is dropped
    commits/<range>/<unit>.<group>.json    the only truth about data: files with rows, bytes, checksum
    snapshots/<range>/<number>.json    which merged files stand for which units; manifests/ name those files
    data/<kind>/<unit>.<group>-<attempt>.parquet
    failures/<unit>.<group>-<number>.<kind>.<token>.json    one failed attempt each
    annotations/<number>.json      which files hold facts of decoders and explanations
    staged/<key>.json              what the driver put there for workers: files of the hub; a cache
    devices/<number>.json          the models of device that units are scanned on, each once
    schedules/<name>/<due>.<attempt>.began.json    which due times were served; .ended.json how
    runs/<run>/changes.json        features that the run's documents brought, moved and lost
    leases/<term>.json             who may scan; heartbeat.json says that they live
    runs/<run>/summary-<term>.json what an attempt at a run did and cost

Keys: `document` and `context` are (unit ordinal << 20) | number inside the unit; `token` in activation
rows is context * context length + position. Dense ordinals keep the position column small (design
note: 3.2 bytes a row at density 1e-5, against 6.2 with hashed keys).
Every data file is sorted by (sae, feature, ...) within runs of row groups; no row group has two SAEs.
Merged files (pipelines/merge.py) are data/<kind>/<stem>-<number>.parquet, of the same columns; three kinds
are found among them alone: by_document, pages, and sampled_merged in place of sampled_contexts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

FORMAT = 3
LOCAL_BITS = 20
LOCAL_MAX = 1 << LOCAL_BITS
SAMPLE_BITS = 24  # sums over the sample are in units of 2^-24
WINDOW = 64  # positions on either side of a maximum; sae_runtime/summaries.py gathers as many
NEAR = 24  # tokens on either side that a page about a feature shows

INDEX = "index.json"
VOCABULARY = "vocabulary.parquet"
PLANS, COMMITS, FAILURES, DATA = "plans", "commits", "failures", "data"
SNAPSHOTS, MANIFESTS = "snapshots", "manifests"
ANNOTATIONS, DEVICES, RUNS = "annotations", "devices", "runs"
SCHEDULES, STAGED = "schedules", "staged"

_SAE = pa.field("sae", pa.dictionary(pa.int32(), pa.string()))
_FEATURE = pa.field("feature", pa.int32())
# A context with the window around its maximum: NULL where `keep: tokens` has the rows in activations.
_WINDOW = [
    pa.field("context", pa.int64()),
    pa.field("position", pa.int32()),
    pa.field("activation", pa.float32()),
    pa.field("offsets", pa.list_(pa.field("element", pa.int8(), nullable=False))),  # from `position`
    pa.field("values", pa.list_(pa.field("element", pa.float32(), nullable=False))),
]


def _full(columns: Iterable[Any]) -> pa.Schema:
    """A schema without NULLs, except for windows: writing takes a seventh less."""
    windows = ("offsets", "values")
    return pa.schema([field.with_nullable(field.name in windows) for field in pa.schema(columns)])


_DOCUMENT_FEATURES = _full(
    [
        _SAE,
        _FEATURE,
        ("document", pa.int64()),
        ("n_tokens", pa.int32()),
        ("max", pa.float32()),
        ("sum", pa.float64()),
    ]
)
VOCABULARY_SCHEMA = pa.schema([("token", pa.int32()), ("text", pa.string()), ("bytes", pa.binary())])

# Per unit and SAE group, except documents, quarantine, segments and contexts: per unit, with group 0.
SCHEMAS: dict[str, pa.Schema] = {
    # Documents that could not be scanned, keyed as if they were in documents.
    "quarantine": pa.schema(
        [
            ("document", pa.int64()),
            ("source", pa.string()),
            ("row", pa.int64()),
            ("id", pa.string()),
            ("error", pa.string()),
        ]
    ),
    # Of conversations only; any other document is one segment of role `text`.
    "segments": pa.schema(
        [
            ("document", pa.int64()),
            ("segment", pa.int32()),
            ("role", pa.string()),
            ("start", pa.int32()),  # offsets in the document's tokens
            ("stop", pa.int32()),
        ]
    ),
    "contexts": pa.schema(
        [
            ("context", pa.int64()),
            ("document", pa.int64()),
            ("start", pa.int32()),  # offset of the first own token in the document's tokens
            ("first", pa.int32()),  # index of that token in `tokens`
            ("tokens", pa.list_(pa.int32())),
            ("counted", pa.list_(pa.bool_())),
            ("place_hash", pa.uint64()),  # of its place in the corpus; samples are drawn by it
        ]
    ),
    "activations": _full([_SAE, _FEATURE, ("token", pa.int64()), ("activation", pa.float32())]),
    "document_features": _DOCUMENT_FEATURES,
    "by_document": _DOCUMENT_FEATURES,  # once more, by document, SAE and feature: merged files only
    # Features active in the unit only. sum = (high * 2^64 + low) / 2^64; squares the same over 2^56.
    "features": _full(
        [
            _SAE,
            _FEATURE,
            ("n_tokens", pa.int64()),
            ("n_contexts", pa.int64()),
            ("n_documents", pa.int64()),
            ("sum_high", pa.int64()),
            ("sum_low", pa.uint64()),
            ("squares_high", pa.int64()),
            ("squares_low", pa.uint64()),
            ("max", pa.float32()),
            ("bins", pa.list_(pa.uint8())),  # histogram, sparse: bin numbers ...
            ("bin_tokens", pa.list_(pa.int64())),  # ... and their counts
        ]
    ),
    # The unit's best, by feature and context: at most top_k a feature, one a document, endings distinct.
    # `ending` is the lower 48 bits of their hash: two different endings among the 20 highest of any of
    # 10^6 features are taken for one with probability 10^6 * 20^2 / 2^49 = 7e-7.
    "top_contexts": _full([_SAE, _FEATURE, *_WINDOW, ("ending", pa.int64())]),
    # At most sample_k a feature and stratum, by feature, stratum and context; their hashes follow from
    # `place_hash`. `population` is on a stratum's first row, 0 on the others.
    "sampled_contexts": _full(
        [_SAE, _FEATURE, ("stratum", pa.int32()), ("population", pa.int64()), *_WINDOW]
    ),
    # The same in merged files, with the hash: a unit's `place_hash` need not be read again.
    "sampled_merged": _full(
        [
            _SAE,
            _FEATURE,
            ("stratum", pa.int32()),
            ("population", pa.int64()),
            ("hash", pa.uint64()),
            *_WINDOW,
        ]
    ),
    # The top contexts of the whole index once more, by feature and rank, with windows and the tokens around.
    "pages": _full(
        [
            _SAE,
            _FEATURE,
            ("rank", pa.int32()),
            *_WINDOW,
            ("document", pa.int64()),
            ("first", pa.int32()),  # place of the first of `tokens` in the context
            ("tokens", pa.list_(pa.field("element", pa.int32(), nullable=False))),
        ]
    ),
    # One row an SAE. The sample is every 64th counted token of the unit. Sums are rounded once a unit.
    "saes": pa.schema(
        [
            ("sae", pa.string()),
            ("unit", pa.int64()),  # its ordinal; of merged units the first one's
            ("n_tokens", pa.int64()),  # counted
            ("n_active", pa.int64()),  # active (feature, token) pairs
            ("sample_tokens", pa.int64()),
            ("sample_sum", pa.list_(pa.int64())),  # of x, [d_in], in units of 2^-24
            ("squares_high", pa.int64()),  # of |x|^2: (high * 2^64 + low) / 2^24
            ("squares_low", pa.uint64()),
            ("error_high", pa.int64()),  # of |x - x_hat|^2, the same
            ("error_low", pa.uint64()),
        ]
    ),
}
KINDS = ("documents", *SCHEMAS)
ROWS = ("activations", "document_features", "by_document")  # of SAEs, merged over many units
# Sorted by SAE and feature in merged files, of which each row group has one SAE.
BY_FEATURE = ("activations", "document_features", "features", "top_contexts", "sampled_merged", "pages")
KEYED = ("documents", "segments", "contexts", "quarantine")  # in order of their keys
# Of a unit in a run, whose summaries stay, and so its contexts, from whose place samples are drawn.
REPLACED = ("activations", "document_features", "documents", "segments", "quarantine")
SUMMARIES = ("features", "top_contexts", "sampled_contexts", "sampled_merged", "pages", "saes")

# Facts of features that do not come from the corpus, by SAE and feature; annotations/ names their files.
FACTS: dict[str, pa.Schema] = {
    "feature_tokens": _full(
        [
            _SAE,
            _FEATURE,
            ("sign", pa.int32()),  # 1: the highest logits, -1: the lowest
            ("rank", pa.int32()),  # from 1
            ("token", pa.int32()),
            ("logit", pa.float32()),
        ]
    ),
    "feature_neighbours": _full(
        [
            _SAE,
            _FEATURE,
            ("rank", pa.int32()),  # from 1, over those of the same SAE and the others together
            pa.field("other_sae", pa.dictionary(pa.int32(), pa.string())),
            ("other_feature", pa.int32()),
            ("cosine", pa.float32()),
        ]
    ),
    "feature_decoders": _full([_SAE, _FEATURE, ("norm", pa.float32())]),
    "explanations": pa.schema(
        [
            _SAE.with_nullable(False),
            _FEATURE.with_nullable(False),
            pa.field("description", pa.string(), nullable=False),
            ("method", pa.string()),
            ("model", pa.string()),
            ("score", pa.float64()),
            pa.field("source", pa.string(), nullable=False),
        ]
    ),
}

# What a run still knows of each unit in it.
UNITS = "units"
UNIT_FACTS = pa.schema(
    [
        ("ordinal", pa.int64()),
        ("run", pa.int32()),
        ("documents", pa.int64()),
        ("quarantined", pa.int64()),
        ("contexts", pa.int64()),
        ("tokens", pa.int64()),  # counted
        ("started", pa.float64()),  # seconds since 1970, UTC
        ("finished", pa.float64()),
        ("bytes", pa.int64()),  # of its own data files, as committed
    ]
)

# Types of metadata columns, frozen by the first scan. `json` is JSON text, timestamps are UTC.
METADATA_TYPES = {
    "bool": pa.bool_(),
    "int64": pa.int64(),
    "double": pa.float64(),
    "string": pa.string(),
    "timestamp": pa.timestamp("us"),
    "date": pa.date32(),
    "json": pa.string(),
    "null": pa.null(),
}
_DOCUMENT = [
    ("document", pa.int64()),
    ("id", pa.string()),
    ("corpus", pa.string()),
    ("source", pa.string()),
    ("row", pa.int64()),
    ("run", pa.int32()),
    ("n_tokens", pa.int32()),  # counted
    ("_length", pa.int32()),  # all tokens of the document; shows in `segments`
]


def metadata_type(name: str) -> pa.DataType:
    """The Arrow type that holds a metadata type."""
    return METADATA_TYPES[name]


def documents_schema(metadata: dict[str, pa.DataType]) -> pa.Schema:
    """Columns of documents; `metadata` maps names to the types frozen by the first scan."""
    columns = metadata_columns(metadata)
    return pa.schema([*_DOCUMENT, *((columns[name], kind) for name, kind in metadata.items())])


def metadata_columns(names: Iterable[str]) -> dict[str, str]:
    """Metadata names -> columns of documents. Its own name each, or `name_1` where that is taken.

    The contract's example has a metadata column `source` beside the file's `source`; SQL does not tell
    upper from lower case.
    """
    taken = {name for name, _ in _DOCUMENT}
    columns = {}
    for name in names:
        number, column = 0, name
        while column.lower() in taken:
            number += 1
            column = f"{name}_{number}"
        taken.add(column.lower())
        columns[name] = column
    return columns


def key(ordinal: int, local: int = 0) -> int:
    """A document's or context's key from its unit's ordinal and its number inside the unit."""
    return (ordinal << LOCAL_BITS) | local


def sample_seed(sae: str) -> int:
    """What the hashes of an SAE's samples begin with; sae_runtime/summaries.py has the same."""
    return int.from_bytes(hashlib.blake2b(sae.encode(), digest_size=8).digest(), "little")
