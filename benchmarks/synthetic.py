"""An index of the real schema with made-up activations: what `queries.py` asks, up to a billion rows.

No model runs. Sparse blocks of the shape that an encoder gives go through the product's own summaries, writer
and ledger, unit by unit, and its compaction afterwards, so the files are what a scan and `corpuscope compact`
leave, and `corpuscope verify` passes. The same parameters give the same rows, in any number of processes.

What is drawn is like what SAEs of language models give (examples/saes on the demo's corpus has 4.1 tokens a
feature and document of 128 tokens; so has this): densities are lognormal over features, 2 % are dead; a
feature is on in some documents and fires there again and again, a fifth of the time at the next token, more
often at a document's beginning than at its end; activations are lognormal around a feature's own size. Every
100th feature prefers documents of `lang` en.
"""

from __future__ import annotations

import io
import multiprocessing
import shutil
import sys
import uuid
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numba
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.compaction import compact
from pipelines.contexts import ContextRule, contexts
from pipelines.ledger import Commit, Ledger
from pipelines.partials import Moments, write_summary
from pipelines.registry import FileRecord, Plan, Unit, unit_id
from pipelines.sae_unit import Rows
from pipelines.schema import FORMAT, VOCABULARY, VOCABULARY_SCHEMA, key
from pipelines.storage import Store
from pipelines.writer import UnitWriter, windows_column
from sae_runtime.bfloat import rounded
from sae_runtime.encode import Sparse
from sae_runtime.sae import SaeInfo
from sae_runtime.sites import Site
from sae_runtime.summaries import Chunk, Summary, place_hash

VERSION = 1  # of what is drawn: raise it with any change, and indexes are made anew
SAE = "synthetic-res/layer_{layer}/width_{width}"
LAYER = 12  # of the first SAE; others are at the layers after it
LENGTH = 256  # of a context
DOCUMENT = 125  # counted tokens of one, on average; lognormal
UNIT_TOKENS = 1 << 16  # as a CPU's units have
CHUNK_TOKENS = 1 << 14
SPREAD = 1.5  # of the densities' logarithms
DEAD = 0.02
PREFERRING = 100  # every so many features prefer documents of `lang` en
LANGS = ("en", "de", "fr", "ja")
TOKENS = 1 << 15  # of the vocabulary
METADATA = {"lang": "string"}
CORPUS, FILE, SETTINGS = "synthetic", "synthetic.jsonl", "synthetic"
_RULE = ContextRule(LENGTH, 0, None, np.empty(0, np.int32), False)
_SEGMENT_ROWS = 1 << 24


@dataclass(frozen=True)
class Shape:
    """What is drawn; part of the index's name."""

    rows: int  # of activations of one SAE, about
    width: int
    units: int
    l0: float = 80.0
    seed: int = 1
    n_saes: int = 1

    @classmethod
    def of(cls, rows: float, width: int = 16384, units: int = 0, l0: float = 80.0, n_saes: int = 1) -> Shape:
        """`units` 0: as many as a scan on a CPU makes."""
        tokens = max(int(rows / l0), DOCUMENT)
        units = min(units or -(-tokens // UNIT_TOKENS), -(-tokens // DOCUMENT))
        return cls(int(rows), width, units, l0, n_saes=n_saes)

    @property
    def documents(self) -> int:
        return max(self.units, round(self.rows / self.l0 / DOCUMENT))

    @property
    def name(self) -> str:
        """A folder's name."""
        rows = f"{self.rows:.3g}".replace("e+0", "e")
        drawn = f"l0-{self.l0:g}-seed{self.seed}-v{VERSION}.{FORMAT}"
        several = f"{self.n_saes}saes-" if self.n_saes > 1 else ""
        return f"{several}{rows}x{self.width}-{self.units}units-{drawn}"

    @property
    def saes(self) -> list[SaeInfo]:
        return [self._sae(LAYER + n) for n in range(self.n_saes)]

    def _sae(self, layer: int) -> SaeInfo:
        return SaeInfo(
            id=SAE.format(layer=layer, width=self.width),
            suite="synthetic-res",
            path=f"layer_{layer}/width_{self.width}",
            format="gemma_scope",
            files=("synthetic",),
            site=Site(layer, "resid_post"),
            out=None,
            architecture="jumprelu",
            d_in=2304,
            width=self.width,
            nominal_l0=self.l0,
            trained_on=None,
            convention="drawn",
        )


@dataclass(frozen=True)
class Features:
    """How each feature behaves."""

    share: np.ndarray  # float64 [width]: of documents it is on in
    rate: np.ndarray  # float64 [width]: of tokens, where it is on
    size: np.ndarray  # float32 [width]: its median activation
    prefers: np.ndarray  # bool [width]: documents of `lang` en


def make(root: Path, shape: Shape, processes: int = 2, compacted: bool = True) -> Path:
    """The index's folder below `root`, made unless it is there."""
    folder = root / (shape.name if compacted else f"{shape.name}-units")
    if (folder / "done").exists():
        return folder / "index"
    shutil.rmtree(folder, ignore_errors=True)
    store = Store(str(folder / "index"))
    _register(store, shape)
    ordinals = range(shape.units)
    if processes > 1:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            for n, _ in enumerate(pool.map(partial(_write_unit, store.uri, shape), ordinals)):
                _tell(f"unit {n + 1} of {shape.units}")
    else:
        for ordinal in ordinals:
            _write_unit(store.uri, shape, ordinal)
    if compacted:
        done = compact(store, told=lambda job: _tell(job.words))
        for name in done.replaced:  # what `gc` would remove
            (folder / "index" / name).unlink()
    (folder / "done").touch()
    return folder / "index"


def _tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


# --- the index but for its data


def _register(store: Store, shape: Shape) -> None:
    """index.json, vocabulary and plan."""
    saes = shape.saes
    records = []
    for sae in saes:
        record = {k: v for k, v in asdict(sae).items() if k not in ("path", "files", "out", "options")}
        site, layer = f"model.layers.{sae.site.layer}.output", sae.site.layer
        records.append(record | {"uri": sae.uri, "site": site, "layer": layer, "fingerprint": "synthetic"})
    fixed = {
        "model": "synthetic",
        "model.dtype": "bfloat16",
        "model.device": "cpu",
        "model.threads": 2,
        "model.attention": "sdpa",
        "context.length": LENGTH,
        "context.overlap": 0,
        "context.bos": None,
        "context.exclude": [],
        "top_k": 20,
        "sample_k": 10,
        "metadata": METADATA,
        "saes": {each["id"]: f"synthetic at {each['site']}, keep tokens" for each in records},
    }
    identity = {
        "format": FORMAT,
        "fixed": fixed,
        "model": "synthetic",
        "groups": [[sae.id for sae in saes]],
        "duplicates": {},
        "saes": records,
    }
    ledger = Ledger(store)
    ledger.create(identity)
    sink = io.BytesIO()
    pq.write_table(_vocabulary(), sink, compression="zstd")
    store.write(VOCABULARY, sink.getvalue())
    units = tuple(_unit(shape, ordinal) for ordinal in range(shape.units))
    file = FileRecord(0, CORPUS, FILE, "0" * 32, 0, "", shape.documents, SETTINGS)
    spec = f"corpus: {{uri: {FILE}, metadata: [lang]}}\nmodel: {{uri: synthetic}}\nsaes: {{uri: synthetic}}\n"
    ledger.add_plan(Plan(1, 0.0, spec, "0", "cpu", {}, (file,), units, ()))


def _unit(shape: Shape, ordinal: int) -> Unit:
    start, stop = (shape.documents * n // shape.units for n in (ordinal, ordinal + 1))
    name = unit_id(CORPUS, FILE, "0" * 32, SETTINGS, start, stop)
    return Unit(name, ordinal, CORPUS, FILE, "0" * 32, SETTINGS, start, stop, DOCUMENT * (stop - start) * 4)


def _vocabulary() -> pa.Table:
    """Words of one to four syllables, the commonest shortest."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = []
    for token in range(TOKENS):
        word, rest = "", token
        while True:
            word += syllables[rest % len(syllables)]
            rest = rest // len(syllables) - 1
            if rest < 0:
                break
        words.append(f" {word}")
    return pa.table(
        {"token": range(TOKENS), "text": words, "bytes": [word.encode() for word in words]},
        schema=VOCABULARY_SCHEMA,
    )


# --- what is drawn


def features(shape: Shape, sae: int = 0) -> Features:
    """Shares and rates of the n-th SAE, whose products are lognormal densities that add up to `l0`."""
    rng = np.random.default_rng((shape.seed, 0, sae) if sae else (shape.seed, 0))
    density = np.exp(rng.normal(0, SPREAD, shape.width))
    density[rng.random(shape.width) < DEAD] = 0
    for _ in range(20):  # cutting the densest ones off takes from the sum
        density = np.minimum(density * shape.l0 / density.sum(), 0.3)
    rate = np.maximum(density, np.minimum(0.9, 0.17 * density**0.45))
    share = np.divide(density, rate, out=np.zeros(shape.width), where=density > 0)
    size = np.exp(rng.normal(np.log(4), 0.6, shape.width)).astype(np.float32)
    prefers = np.arange(shape.width) % PREFERRING == 0
    return Features(np.where(prefers, np.minimum(1, share * 1.4), share), rate, size, prefers)


def lengths(shape: Shape) -> np.ndarray:
    """int64 [documents]: tokens of each."""
    rng = np.random.default_rng((shape.seed, 1))
    drawn = rng.lognormal(np.log(DOCUMENT) - 0.32, 0.8, shape.documents)
    return np.clip(drawn, 8, 4096).astype(np.int64)


def languages(shape: Shape) -> np.ndarray:
    """int64 [documents]: number of each one's `lang`."""
    return np.random.default_rng((shape.seed, 2)).choice(len(LANGS), shape.documents, p=(0.4, 0.3, 0.2, 0.1))


# Quantiles of the activations' logarithms around their median: exp(0.6 z).
_VALUES = np.exp(0.6 * np.array([NormalDist().inv_cdf((i + 0.5) / 4096) for i in range(4096)]))


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _draw(
    seed: np.uint64, share: np.ndarray, rate: np.ndarray, size: np.ndarray, prefers: np.ndarray,
    starts: np.ndarray, english: np.ndarray, values: np.ndarray,
    indptr: np.ndarray, token: np.ndarray, code: np.ndarray,
) -> int:  # fmt: skip
    """Fill a block of documents that begin at `starts`; the number of rows, or -1 where there is no room."""
    documents, out, state = len(starts) - 1, 0, seed
    for f in range(len(share)):
        if share[f] > 0:
            document = -1
            to_next = 0.0 if share[f] >= 1 else 1 / np.log1p(-share[f])
            # A gap is 1 in a fifth of the cases, else geometric, so that gaps have a mean of 1 / rate.
            far = min(1.0, 0.8 / max(0.8, 1 / rate[f] - 0.2))
            to_far = 0.0 if far >= 1 else 1 / np.log1p(-far)
            while True:
                state += np.uint64(0x9E3779B97F4A7C15)
                document += 1 + int(np.log(_uniform(_mixed(state))) * to_next)
                if document >= documents:
                    break
                state += np.uint64(0x9E3779B97F4A7C15)
                drawn = _mixed(state)
                if prefers[f] and not english[document] and drawn & np.uint64(1):
                    continue
                first, end = starts[document], starts[document + 1]
                at = first + int(np.log(_uniform(drawn)) * to_far)
                while at < end:
                    if out == len(token):
                        return -1
                    state += np.uint64(0x9E3779B97F4A7C15)
                    drawn = _mixed(state)
                    token[out] = at
                    code[out] = rounded(np.float32(size[f] * values[drawn & np.uint64(4095)]))
                    out += 1
                    gap = 0
                    if (drawn >> np.uint64(12)) % np.uint64(5) > 0:
                        later = 0.75 + 0.5 * (at - first) / (end - first)
                        gap = int(np.log(_uniform(drawn)) * to_far * later)
                    at += 1 + gap
        indptr[f + 1] = out
    return out


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _mixed(value: np.uint64) -> np.uint64:
    """The finaliser of splitmix64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _uniform(bits: np.uint64) -> float:
    """In (0, 1), of the upper bits."""
    return (np.float64(bits >> np.uint64(15)) + 0.5) / 2.0**49


# --- a unit


def _write_unit(uri: str, shape: Shape, ordinal: int) -> None:
    """Draw, write and commit a unit."""
    unit, rule = _unit(shape, ordinal), _RULE
    rng = np.random.default_rng((shape.seed, 3, ordinal))
    size = lengths(shape)[unit.start : unit.stop]
    lang = languages(shape)[unit.start : unit.stop]
    writer = UnitWriter(Store(uri), unit.unit, 0, uuid.uuid4().hex[:8], METADATA)
    local = 0
    chunks: list[_Drawn] = []
    cuts = np.flatnonzero(np.diff(np.cumsum(size) // CHUNK_TOKENS, prepend=0)) + 1
    for first, stop in zip(np.r_[0, cuts], np.r_[cuts, len(size)], strict=True):
        if first == stop:
            continue
        own = size[first:stop]
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(own)])
        ids = np.minimum(TOKENS ** rng.random(starts[-1]), TOKENS - 1).astype(np.int32)
        seed = int(rng.integers(1 << 63))
        windows = [
            (int(first) + n, window)
            for n, (a, b) in enumerate(pairwise(starts))
            for window in contexts(ids[a:b], rule)
        ]
        chunk = _chunk(unit, windows, local, ids)
        chunks.append((chunk, starts, lang[first:stop] == 0, seed))
        _write_contexts(writer, ordinal, windows, chunk)
        local += len(windows)
    active = [_write_sae(writer, shape, n, ordinal, chunks) for n in range(shape.n_saes)]
    counted = int(size.sum())
    for sae, rows in zip(shape.saes, active, strict=True):  # one SAE a call, as a scan does
        writer.write(
            "saes",
            {
                "sae": [sae.id],
                "unit": [ordinal],
                "n_tokens": [counted],
                "n_active": [rows],
                "sample_tokens": [0],
            }
            | Moments(0).columns(0.0),
        )
    _write_documents(writer, unit, size, lang)
    files = writer.close()
    commit = Commit(
        unit.unit, ordinal, 0, files["saes"].path.rsplit("-", 1)[1].removesuffix(".parquet"), 1,
        documents=len(size), quarantined=0, poison=(), contexts=local, tokens=counted, tokens_run=counted,
        started=float(ordinal), finished=float(ordinal + 1), device="cpu", files=files,
    )  # fmt: skip
    Ledger(Store(uri)).commit(commit)


_Drawn = tuple[Chunk, np.ndarray, np.ndarray, int]  # a chunk, its documents' starts, which are en, a seed


def _write_sae(writer: UnitWriter, shape: Shape, n: int, ordinal: int, chunks: list[_Drawn]) -> int:
    """Draw and write what the n-th SAE has in a unit; how many rows."""
    sae, behave = shape.saes[n], features(shape, n)
    summary = Summary.empty(sae.id, sae.width, 20, 10)
    blocks: list[tuple[Sparse, np.ndarray]] = []
    ended: list[Any] = []
    held = 0
    for chunk, starts, english, seed in chunks:
        sparse = _block(behave, starts, english, np.uint64((seed + n * 0x9E3779B97F4A7C15) % (1 << 64)))
        ended.append(summary.update(sparse, chunk))
        keys = (chunk.context.astype(np.int64) + key(ordinal)) * LENGTH + chunk.position
        blocks.append((sparse, keys))
        held += sparse.rows
        if held >= _SEGMENT_ROWS:
            Rows(sae, blocks, ended).write(writer, ordinal)
            blocks, ended, held = [], [], 0
    Rows(sae, blocks, ended).write(writer, ordinal)
    write_summary(writer, sae, summary, ordinal)
    return int(summary.counts.tokens.sum())


def _block(behave: Features, starts: np.ndarray, english: np.ndarray, seed: np.uint64) -> Sparse:
    width = len(behave.share)
    rows = int(1.2 * starts[-1] * (behave.share * behave.rate).sum()) + 1024
    indptr = np.zeros(width + 1, np.int64)
    while True:
        token, code = np.empty(rows, np.int32), np.empty(rows, np.uint16)
        n = _draw(
            seed, behave.share, behave.rate, behave.size, behave.prefers, starts, english, _VALUES,
            indptr, token, code,
        )  # fmt: skip
        if n >= 0:
            return Sparse(indptr, token[:n].copy(), code[:n].copy())
        rows *= 2


def _chunk(unit: Unit, windows: list[tuple[int, Any]], first: int, ids: np.ndarray) -> Chunk:
    """The contexts of whole documents, every token of which is counted."""
    length = np.array([len(window.tokens) for _, window in windows])
    offset = np.concatenate([np.zeros(1, np.int64), np.cumsum(length)])
    places = [place_hash(unit.corpus, unit.path, unit.start + n, window.start) for n, window in windows]
    return Chunk(
        context=np.repeat(np.arange(first, first + len(windows), dtype=np.int32), length),
        position=(np.arange(len(ids)) - np.repeat(offset[:-1], length)).astype(np.int32),
        first=first,
        document=np.array([n for n, _ in windows], np.int32),
        place=np.array(places, np.uint64),
        tokens=ids,
        offset=offset,
        open_document=-1,
        tail_document=-1,
    )


def _write_contexts(writer: UnitWriter, ordinal: int, windows: list[tuple[int, Any]], chunk: Chunk) -> None:
    length = np.diff(chunk.offset)
    counted = np.ones(len(chunk.tokens), bool)
    writer.write(
        "contexts",
        {
            "context": np.arange(chunk.first, chunk.first + len(windows)) + key(ordinal),
            "document": chunk.document.astype(np.int64) + key(ordinal),
            "start": np.array([window.start for _, window in windows], np.int32),
            "first": np.zeros(len(windows), np.int32),
            "tokens": windows_column(chunk.tokens, chunk.offset[:-1], length, pa.int32()),
            "counted": windows_column(counted, chunk.offset[:-1], length, pa.bool_()),
            "place_hash": chunk.place,
        },
    )


def _write_documents(writer: UnitWriter, unit: Unit, size: np.ndarray, lang: np.ndarray) -> None:
    n = len(size)
    row = np.arange(unit.start, unit.stop)
    writer.write(
        "documents",
        {
            "document": np.arange(n) + key(unit.ordinal),
            "id": [f"d{i:07d}" for i in row],
            "corpus": [CORPUS] * n,
            "source": [FILE] * n,
            "row": row,
            "run": np.ones(n, np.int32),
            "n_tokens": size.astype(np.int32),
            "_length": size.astype(np.int32),
            "lang": [LANGS[i] for i in lang],
        },
    )
