"""Token rows in delphi's cache layout: latents/<hookpoint>/<first>_<last>.safetensors and config.json.

A file holds a range of features: `locations` [rows, 3] (window, position, feature - first) in that order,
uint16 where they fit, as delphi's loader has it, else uint32; `activations` [rows], float16 where that holds
each value exactly, else float32; `tokens` int32 [windows, ctx], the same in every file, as delphi wants it.

Invariant: every window is `ctx` tokens of one document, in document order, without BOS and without the
overlap that a scan repeats; a document's last tokens that fill no window are dropped, and nothing is padded.
A missing row means that the feature did not fire or that the token is not counted, never that a row was not
kept: of a sample only its documents are written, and of SAEs that keep less nothing is.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import duckdb
import numpy as np
import pyarrow as pa

from queries.export import Folder, Sae, Told, ask, per_feature, sampled_documents, stream
from sae_runtime.errors import InputError

FOLDER = "latents"  # what delphi's LatentDataset takes; it holds hookpoints and nothing else
MOST_CTX = 1 << 16  # positions are uint16 in delphi's files
_SPLITS = 5  # delphi's default
_ROWS = 16_000_000  # of a split, in memory at once: some 1 GB
_WINDOWS = 16_384  # whose tokens are in memory at once
_COPIED = 8 << 20
_SMALL = 1 << 16

_CUT = """
CREATE OR REPLACE TEMP TABLE _cut AS
WITH lengths AS (
    SELECT document, sum(len(tokens) - first)::BIGINT AS n FROM contexts
    WHERE document IN (SELECT document FROM _chosen) GROUP BY document
), placed AS (
    SELECT document, n // $ctx AS windows, (sum(n // $ctx) OVER (ORDER BY document))::BIGINT AS upto
    FROM lengths
)
SELECT
    c.context, c.document, c.start, c.first, len(c.tokens) - c.first AS own, p.upto - p.windows AS base,
    p.windows * $ctx AS stop,
    len(list_filter(
        c.counted[c.first + 1 : c.first + p.windows * $ctx - c.start], lambda x: NOT x
    )) AS uncounted
FROM contexts AS c JOIN placed AS p ON p.document = c.document
"""
_ROWS_OF = """
SELECT w.base + (w.start - w.first + a.position) // {ctx} AS row,
    (w.start - w.first + a.position) % {ctx} AS position, a.feature, a.activation
FROM {view} AS a JOIN _cut AS w ON w.context = a.context
WHERE a.sae = $1 AND a.feature BETWEEN $2 AND $3 AND w.start - w.first + a.position < w.stop
"""


@dataclass(frozen=True)
class Settings:
    """What a person may choose."""

    ctx: int = 256  # tokens of a window
    splits: int | None = None  # files of each SAE; more where one would hold more than _ROWS rows


@dataclass(frozen=True)
class Cut:
    """The windows of a set of documents."""

    windows: int
    documents: int
    tokens: int  # of all of them
    dropped: int  # tokens that are in no window
    uncounted: int  # tokens in windows that are not counted, so that they have no rows


@dataclass(frozen=True)
class Written:
    """What was written of one SAE."""

    sae: str
    folder: str
    rows: int
    splits: int
    cut: Cut


def hookpoints(saes: Sequence[Sae]) -> dict[str, str]:
    """SAE -> delphi's hookpoint, the site's module without the model's prefix; a folder's name.

    SAEs of one site, of which delphi knows one, have their ids behind it.
    """
    plain = {sae.id: re.sub(r"^model\.|\.output$", "", sae.site).replace("/", "-") for sae in saes}
    taken = list(plain.values())
    return {
        sae: name if taken.count(name) == 1 else f"{name}@{sae.replace('/', '-')}"
        for sae, name in plain.items()
    }


def refuse(saes: Sequence[Sae]) -> None:
    """InputError that names the SAEs whose token rows were not kept."""
    lacking = [f"{sae.id} (keep: {sae.keep})" for sae in saes if not sae.rate]
    if lacking:
        some = ", ".join(lacking[:4]) + (", …" if len(lacking) > 4 else "")
        raise InputError(
            f"--format delphi: needs token rows, and {some} kept none; name others with --sae, or scan with "
            "`keep: tokens`"
        )


def write(
    con: duckdb.DuckDBPyConnection, saes: Sequence[Sae], folder: Folder, settings: Settings, told: Told
) -> list[Written]:
    """Write the SAEs, each in a folder of its own. InputError where no document fills a window."""
    refuse(saes)
    if not 1 <= settings.ctx <= MOST_CTX:
        raise InputError(f"--ctx {settings.ctx}: delphi's files hold 1 to {MOST_CTX:,} positions")
    named = hookpoints(saes)
    written = {}
    for rate in sorted({sae.rate for sae in saes}, reverse=True):
        told(f"windows of {settings.ctx} tokens")
        cut = _cut(con, rate, settings.ctx)
        if not cut.windows:
            raise InputError(
                f"--ctx {settings.ctx}: none of the {cut.documents:,} documents has so many tokens; give less"
            )
        with tempfile.TemporaryFile() as tokens:
            _spool(con, cut, settings.ctx, tokens)
            for sae in saes:
                if sae.rate == rate:
                    at = f"{FOLDER}/{named[sae.id]}"
                    written[sae.id] = _write(con, sae, folder, at, settings, cut, tokens, told)
    for table in ("_cut", "_chosen"):
        con.execute(f"DROP TABLE {table}")
    return [written[sae.id] for sae in saes]


def _cut(con: duckdb.DuckDBPyConnection, rate: float, ctx: int) -> Cut:
    """Make `_cut`: where each context's own tokens come to lie among the windows."""
    documents = pa.table({"document": sampled_documents(con, rate)})
    con.register("_given", documents)
    con.execute("CREATE OR REPLACE TEMP TABLE _chosen AS SELECT document FROM _given")
    con.unregister("_given")
    con.execute(_CUT.replace("$ctx", str(ctx)))
    row = ask(
        con,
        f"""
        SELECT coalesce(sum(own), 0)::BIGINT AS tokens, coalesce(sum(uncounted), 0)::BIGINT AS uncounted,
            coalesce(max(base + stop // {ctx}), 0)::BIGINT AS windows FROM _cut
        """,
    ).to_pylist()[0]
    dropped = row["tokens"] - row["windows"] * ctx
    return Cut(row["windows"], len(documents), row["tokens"], dropped, row["uncounted"])


def _spool(con: duckdb.DuckDBPyConnection, cut: Cut, ctx: int, into: IO[bytes]) -> None:
    """The windows' tokens, int32 [windows, ctx], a span of documents at a time."""
    spans = ask(
        con,
        f"SELECT base // {_WINDOWS} AS span, min(context) AS low, max(context) AS high FROM _cut "
        "WHERE start < stop GROUP BY span ORDER BY span",
    ).to_pylist()
    for span in spans:
        _, batches = stream(
            con,
            f"""
            SELECT c.tokens[w.first + 1 : w.first + w.stop - w.start] AS own
            FROM contexts AS c JOIN _cut AS w ON w.context = c.context
            WHERE w.base // {_WINDOWS} = $1 AND w.start < w.stop AND c.context BETWEEN $2 AND $3
            ORDER BY w.document, w.start
            """,
            [span["span"], span["low"], span["high"]],
        )
        for batch in batches:
            into.write(batch["own"].flatten().to_numpy().astype("<i4").tobytes())
    if into.tell() != cut.windows * ctx * 4:
        raise AssertionError(f"{into.tell()} bytes of tokens for {cut.windows} windows of {ctx}")


def _write(
    con: duckdb.DuckDBPyConnection,
    sae: Sae,
    folder: Folder,
    at: str,
    settings: Settings,
    cut: Cut,
    tokens: IO[bytes],
    told: Told,
) -> Written:
    counts = per_feature(con, sae, "n_tokens")
    parts = list(shares(counts, max(settings.splits or _SPLITS, -(-int(counts.sum()) // _ROWS))))
    view = "activations" if sae.rate >= 1 else "sampled_activations"
    rows = 0
    for first, last in parts:
        told(f"{sae.id}: features {first:,} to {last:,} of {sae.width:,}")
        found = ask(con, _ROWS_OF.format(view=view, ctx=settings.ctx), [sae.id, first, last])
        rows += found.num_rows
        with folder.store.create(f"{at}/{first}_{last}.safetensors") as stream_:
            _split(stream_, found, first, last, cut, settings.ctx, tokens)
    corpora = ask(con, "SELECT DISTINCT corpus FROM documents ORDER BY corpus")["corpus"].to_pylist()
    config = {
        "dataset_repo": ", ".join(corpora),  # no repository: the loader has the tokens in the files
        "dataset_split": "",
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": 1,
        "cache_ctx_len": settings.ctx,
        "ctx_len": settings.ctx,
        "n_tokens": cut.windows * settings.ctx,
        "n_splits": len(parts),
        "model_name": sae.model,
        "sae": sae.id,
        "width": sae.width,
    }
    folder.store.write(f"{at}/config.json", json.dumps(config, indent=4, ensure_ascii=False).encode())
    return Written(sae.id, at, rows, len(parts), cut)


def shares(counts: np.ndarray, number: int) -> Iterator[tuple[int, int]]:
    """At most `number` ranges of features (first, last) of about as many rows each."""
    upto = np.cumsum(counts + 1.0)  # so that features without rows have a file too
    edges = np.searchsorted(upto, np.linspace(0, upto[-1], number + 1)[1:-1] - 0.5) + 1
    edges = np.unique([0, *np.minimum(edges, len(counts)), len(counts)])
    yield from ((int(a), int(b) - 1) for a, b in itertools.pairwise(edges))


def _split(
    stream_: Any, found: pa.Table, first: int, last: int, cut: Cut, ctx: int, tokens: IO[bytes]
) -> None:
    """Write one safetensors file: its header by hand, so that the tokens need not be in memory."""
    row, position, feature = (found[name].to_numpy() for name in ("row", "position", "feature"))
    width = last - first + 1
    order = np.argsort((row * ctx + position) * width + (feature - first), kind="stable")
    small = width <= _SMALL and cut.windows <= _SMALL
    locations = np.empty((len(order), 3), "<u2" if small else "<u4")
    for column, values in enumerate((row, position, feature - first)):
        locations[:, column] = values[order]
    activations = found["activation"].to_numpy()[order]
    with np.errstate(over="ignore"):
        half = activations.astype("<f2")
    if (half.astype(np.float32) == activations).all():
        activations = half
    parts: list[tuple[str, str, tuple[int, ...], int]] = [
        ("tokens", "I32", (cut.windows, ctx), cut.windows * ctx * 4),
        (
            "activations",
            "F16" if activations.dtype == half.dtype else "F32",
            activations.shape,
            activations.nbytes,
        ),
        ("locations", "U16" if small else "U32", locations.shape, locations.nbytes),
    ]  # the widest first, so that each is aligned
    header, begin = {}, 0
    for name, dtype, shape, size in parts:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, begin + size)}
        begin += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stream_.write(len(text).to_bytes(8, "little") + text)
    tokens.seek(0)
    shutil.copyfileobj(tokens, stream_, _COPIED)
    stream_.write(activations.data)
    stream_.write(locations.data)


def counted(con: duckdb.DuckDBPyConnection) -> int:
    """Counted tokens of the index, before what `norm_above` leaves out at single sites."""
    return int(ask(con, "SELECT coalesce(sum(n_tokens), 0)::BIGINT AS n FROM documents")["n"][0].as_py())
