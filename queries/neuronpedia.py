"""An index in Neuronpedia's importable layout: release, model, source set, source, and batches of features.

    <model>/<source>/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl
    <model>/<source>/features/batch-N.jsonl.gz, activations/batch-N.jsonl.gz

Names are those of SAEDashboard's neuronpedia_export.py and of the columns of Neuronpedia's database; the
importer leaves out keys that are no columns (n_nonzero, n_tokens, stratum_contexts). It takes the columns of
a file's first line, so all lines of a file have the same keys, and fails on an empty file, so there is none.

Invariant: a context stands once a feature, among the top ones or in its interval; every value of a window is
exact (windows are what lies within 64 tokens of the maximum, no longer than 128), and 0 means not active or
not counted; nothing is rounded. What ranks and bins is the absolute value, for signed architectures.
Measured (demo index, 2 busy cores): 2,048 features with 122,000 windows take 17 s and 0.6 GB, 6 s of it gzip.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

import duckdb
import numpy as np
import pyarrow as pa

from queries.export import Folder, Sae, Told, ask, now
from sae_runtime.errors import DataError, InputError

CREATOR = "clkht01d40000jv08hvalcvly"  # the user that a fresh Neuronpedia has; SAEDashboard's default too
_REACH = 64  # tokens of a window before the maximum, and from it on
_FETCH = 4096  # features whose windows are in memory at once: some 200 MB with 20 + 80 contexts each
_JOINED = 256  # lines packed at a time
_BARS = 24  # a histogram's bars are at least this part of the maximum wide
_LOW, _HIGH = -10, 14  # octaves between the histogram's open bins, 8 bins each
_UNREADABLE = re.compile("[\udc80-\udcff\0]")

_WINDOWS = """
WITH shown AS (
    SELECT feature, rank, NULL::INTEGER AS stratum, NULL::BIGINT AS stratum_contexts,
        context, position, activation, positions, values
    FROM top_contexts WHERE sae = $1 AND feature BETWEEN $2 AND $3
), sampled AS (
    SELECT feature, NULL::INTEGER AS rank, stratum, stratum_contexts,
        context, position, activation, positions, values
    FROM sampled_contexts WHERE sae = $1 AND feature BETWEEN $2 AND $3
), once AS (
    FROM shown
    UNION ALL
    FROM sampled ANTI JOIN shown USING (feature, context)
)
SELECT
    o.feature, o.rank, o.stratum, o.stratum_contexts, o.context, o.position, o.activation,
    o.positions, o.values, greatest(o.position - $4, 0) AS start,
    c.tokens[greatest(o.position - $4, 0) + 1 : o.position + $4] AS tokens,
    d.corpus, d.source || '#' || d.row || '@' || c.start AS place
FROM once AS o
JOIN contexts AS c ON c.context = o.context
JOIN documents AS d ON d.document = c.document
ORDER BY o.feature, o.rank NULLS LAST, o.stratum DESC, abs(o.activation) DESC, o.context
"""


@dataclass(frozen=True)
class Settings:
    """What a person may choose."""

    model: str | None = None  # Neuronpedia's model id
    source_set: str | None = None
    features: int | None = None  # of each SAE the first so many
    batch: int = 512  # features a file; the importer hands 65,000 lines to Postgres at once, 256 MB at most
    creator: str = CREATOR


@dataclass(frozen=True)
class Names:
    """What an SAE is called at Neuronpedia."""

    model: str
    source: str  # "20-gemmascope-res-16k"
    source_set: str  # "gemmascope-res-16k"


@dataclass(frozen=True)
class Written:
    """What was written of one SAE."""

    sae: str
    folder: str
    features: int
    activations: int


def names(sae: Sae, settings: Settings) -> Names:
    """The SAE's published Neuronpedia id, or names made of its suite and path; what is chosen goes first.

    `__` divides a source set's name from what tells its sources of one layer apart, as it does there.
    """
    published = sae.neuronpedia if sae.neuronpedia and "/" in sae.neuronpedia else None
    if published and settings.source_set is None:
        model, source = published.split("/", 1)
        found = re.fullmatch(r"[^-]+-(.+?)(__.*)?", source)
        return Names(settings.model or model, source, found[1] if found else source)
    model = settings.model or (published.split("/", 1)[0] if published else _model(sae.model))
    layer = "e" if sae.layer is None else str(sae.layer)
    source_set = settings.source_set or _slug(sae.suite)
    rest = [part for part in sae.id.removeprefix(sae.suite).split("/") if part]
    apart = "-".join(_slug(part) for part in rest if not re.fullmatch(rf"layers?[._]{layer}", part))
    return Names(model, f"{layer}-{source_set}" + (f"__{apart}" if apart else ""), source_set)


def _model(uri: str) -> str:
    last = uri.rstrip("/").rsplit("/", 1)[-1]
    return _slug(last.split("@")[0].removesuffix(".gguf"))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def write(
    con: duckdb.DuckDBPyConnection, saes: Sequence[Sae], folder: Folder, settings: Settings, told: Told
) -> list[Written]:
    """Write the SAEs. InputError if two of them would have one name."""
    called = {sae.id: names(sae, settings) for sae in saes}
    taken: dict[tuple[str, str], str] = {}
    for sae, name in called.items():
        other = taken.setdefault((name.model, name.source), sae)
        if other != sae:
            raise InputError(
                f"--sae: {other} and {sae} would both be {name.model}/{name.source}; export one at a time, "
                "each with a --source-set of its own"
            )
    spelled = spelling(con)
    return [_Source(con, sae, called[sae.id], folder, settings, spelled).write(told) for sae in saes]


def spelling(con: duckdb.DuckDBPyConnection) -> list[str]:
    """Every token's text as a JSON string, by id.

    Bytes that are no UTF-8 by themselves (parts of a character), and NUL, which Postgres cannot hold, are
    shown as <0xE2>, the way SentencePiece spells its byte tokens.
    """
    rows = ask(con, "SELECT token, bytes FROM vocabulary ORDER BY token")
    found = ['""'] * (max(rows["token"].to_pylist(), default=-1) + 1)
    for token, data in zip(rows["token"].to_pylist(), rows["bytes"].to_pylist(), strict=True):
        found[token] = json.dumps(shown(data), ensure_ascii=False)
    return found


def shown(data: bytes) -> str:
    """A token's bytes as text."""
    text = data.decode(errors="surrogateescape")
    return _UNREADABLE.sub(lambda match: f"<0x{ord(match[0]) & 0xFF:02X}>", text)


def interval(stratum: int, histogram: np.ndarray, highest: float) -> tuple[float, float, int]:
    """(from, to, active tokens in it) of a stratum; what is beyond the histogram's edges is one interval.

    `histogram` int64 [194] as in `features`, `highest` the largest absolute activation.
    """
    if stratum < _LOW:
        return 0.0, 2.0**_LOW, int(histogram[0])
    if stratum >= _HIGH:
        return 2.0**_HIGH, 2.0 ** (math.floor(math.log2(highest)) + 1), int(histogram[-1])
    first = 1 + 8 * (stratum - _LOW)
    return 2.0**stratum, 2.0 ** (stratum + 1), int(histogram[first : first + 8].sum())


def bars(histogram: np.ndarray, highest: float) -> tuple[list[float], list[int]]:
    """(middles, heights) of a histogram that is drawn over a linear axis; heights are exact counts.

    Neighbouring bins of `histogram`, which grow with the activation, are taken together from the highest on
    until a bar is 1/24 of the maximum wide: some 16 bars.
    """
    filled = np.flatnonzero(histogram)
    if not len(filled):
        return [], []
    middles, heights = [], []
    top, count = _edge(int(filled[-1]) + 1, highest), 0
    for bin_ in range(int(filled[-1]), int(filled[0]) - 1, -1):
        count += int(histogram[bin_])
        edge = _edge(bin_, highest)
        if top - edge >= highest / _BARS or bin_ == filled[0]:
            middles.append((top + edge) / 2)
            heights.append(count)
            top, count = edge, 0
    return middles[::-1], heights[::-1]


def _edge(bin_: int, highest: float) -> float:
    """Where a bin begins."""
    if bin_ == 0:
        return 0.0
    return 2.0 ** (_LOW + (bin_ - 1) / 8) if bin_ <= 193 else max(highest, 2.0**_HIGH)


class _Source:
    """One SAE being written."""

    def __init__(
        self,
        con: duckdb.DuckDBPyConnection,
        sae: Sae,
        names: Names,
        folder: Folder,
        settings: Settings,
        spelled: list[str],
    ) -> None:
        self.con, self.sae, self.names, self.settings = con, sae, names, settings
        self.store, self.spelled = folder.store, spelled
        self.at = f"{names.model}/{names.source}"
        self.made = now()
        self.mine = {"modelId": names.model, "layer": names.source}
        self.views = set(ask(con, "SELECT view_name FROM duckdb_views()")["view_name"].to_pylist())

    def write(self, told: Told) -> Written:
        told(f"{self.sae.id}: names")
        self._describe()
        width = min(self.sae.width, self.settings.features or self.sae.width)
        step, lines = self.settings.batch, 0
        fetched = max(step, _FETCH // step * step)
        for first in range(0, width, fetched):
            last = min(first + fetched, width) - 1
            told(f"{self.sae.id}: features {first:,} to {last:,} of {width:,}")
            features = self._features(first, last)
            windows = self._windows(first, last)
            batch: dict[int, list[str]] = {n: [] for n in range(first // step, last // step + 1)}
            for feature in features.values():
                batch[feature["feature"] // step].append(self._feature(feature))
            for number, rows in batch.items():
                self._write(f"features/batch-{number}.jsonl.gz", rows)
            number, held = first // step, list[str]()
            for row in windows:
                if row["feature"] // step != number:
                    lines += self._write(f"activations/batch-{number}.jsonl.gz", held)
                    number, held = row["feature"] // step, []
                held.append(self._activation(row, features[row["feature"]]))
            lines += self._write(f"activations/batch-{number}.jsonl.gz", held)
        return Written(self.sae.id, self.at, width, lines)

    def _write(self, name: str, lines: list[str]) -> int:
        """Write a file of lines, which are no more then; their number."""
        if lines:
            with self.store.create(f"{self.at}/{name}") as stream:
                with gzip.GzipFile("", "wb", 5, cast(IO[bytes], stream), mtime=0) as packed:
                    for first in range(0, len(lines), _JOINED):
                        packed.write("".join(f"{line}\n" for line in lines[first : first + _JOINED]).encode())
        return len(lines)

    def _describe(self) -> None:
        """The four files that say what this is. The importer takes no null and no key that is no column."""
        sae, names = self.sae, self.names
        row = ask(
            self.con,
            "SELECT count(*) AS contexts, max(len(tokens)) AS length, "
            "(SELECT list(DISTINCT corpus ORDER BY corpus) FROM documents) AS corpora FROM contexts",
        ).to_pylist()[0]
        common = {"creatorId": self.settings.creator, "createdAt": self.made, "visibility": "PUBLIC"}
        repository = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@[^/]+)?/(.+)", sae.uri)
        weights = (
            {"hfRepoId": repository[1], "hfFolderId": repository[2].rsplit("/", 1)[0]} if repository else {}
        )
        release = f"{names.model}-{names.source_set}" if self.settings.source_set else sae.suite
        tables: dict[str, dict[str, Any]] = {
            "release": {
                "name": release,
                "description": f"{sae.suite}, indexed by Corpuscope",
                "descriptionShort": sae.suite,
                "urls": [],
                "creatorName": "Corpuscope",
            },
            "model": {
                "id": names.model,
                "displayName": names.model,
                "displayNameShort": names.model,
                "instruct": bool(re.search(r"-(it|instruct|chat)\b", names.model.lower())),
                "layers": 0,  # as SAEDashboard has it: the index does not know
                "neuronsPerLayer": 0,
                "owner": "",
            },
            "sourceset": {
                "modelId": names.model,
                "name": names.source_set,
                "description": f"{sae.suite} at {re.sub(r'[.]?[0-9]+', '', sae.site)}",
                "creatorName": "Corpuscope",
                "urls": [],
                "releaseName": release,
                "hasDashboards": True,
            },
            "source": {
                "id": names.source,
                "modelId": names.model,
                "setName": names.source_set,
                "hasDashboards": True,
                "num_prompts": row["contexts"],
                "num_tokens_in_prompt": row["length"] or 0,
                "dataset": ", ".join(row["corpora"] or []),
                "notes": f"{sae.id} at {sae.site}. Densities are over {sae.n_tokens:,} counted tokens "
                "(special ones and what the scan excludes are not counted). One context a document among the "
                "top ones, sampled ones by octave of their maximum; binContains is the share of counted "
                "tokens whose absolute activation lies in the interval.",
                **weights,
            },
        }
        for name, columns in tables.items():
            text = json.dumps(columns | common, ensure_ascii=False) + "\n"
            self.store.write(f"{self.at}/{name}.jsonl", text.encode())

    def _features(self, first: int, last: int) -> dict[int, dict[str, Any]]:
        span = [self.sae.id, first, last]
        where = "WHERE sae = $1 AND feature BETWEEN $2 AND $3"
        columns = "feature, n_tokens, density, max, histogram"
        rows = ask(self.con, f"SELECT {columns} FROM features {where} ORDER BY feature", span).to_pylist()
        found = {row["feature"]: row | {"tokens": {}, "near": []} for row in rows}
        for row in found.values():
            row["histogram"] = np.array(row["histogram"] or [0] * 194, np.int64)
            self._check(row["feature"], [row["max"] or 0.0])
        if "feature_tokens" in self.views:
            logits = (
                f"SELECT feature, sign, token, logit FROM feature_tokens {where} ORDER BY feature, sign, rank"
            )
            for row in ask(self.con, logits, span).to_pylist():
                found[row["feature"]]["tokens"].setdefault(row["sign"], []).append(
                    (row["token"], row["logit"])
                )
        if "feature_neighbours" in self.views:
            near = "SELECT feature, other_feature, cosine FROM feature_neighbours "
            near += f"{where} AND other_sae = sae ORDER BY feature, rank"
            for row in ask(self.con, near, span).to_pylist():
                found[row["feature"]]["near"].append((row["other_feature"], row["cosine"]))
        return found

    def _feature(self, row: dict[str, Any]) -> str:
        middles, heights = bars(row["histogram"], abs(row["max"] or 0.0))
        line: dict[str, Any] = {
            **self.mine,
            "index": str(row["feature"]),
            "sourceSetName": self.names.source_set,
            "creatorId": self.settings.creator,
            "createdAt": self.made,
            "maxActApprox": row["max"] or 0.0,
            "hasVector": False,
            "vector": [],
            "frac_nonzero": row["density"] or 0.0,
            "n_nonzero": row["n_tokens"],
            "n_tokens": self.sae.n_tokens,
            "freq_hist_data_bar_heights": heights,
            "freq_hist_data_bar_values": middles,
            "logits_hist_data_bar_heights": [],
            "logits_hist_data_bar_values": [],
            "topkCosSimIndices": [feature for feature, _ in row["near"]],
            "topkCosSimValues": [cosine for _, cosine in row["near"]],
        }
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)[:-1]
        for name, sign in (("pos", 1), ("neg", -1)):  # tokens are JSON already
            tokens = row["tokens"].get(sign, [])
            text += f', "{name}_str": [{", ".join(self.spelled[token] for token, _ in tokens)}]'
            text += f', "{name}_values": {json.dumps([logit for _, logit in tokens], allow_nan=False)}'
        return text + "}"

    def _windows(self, first: int, last: int) -> Iterator[dict[str, Any]]:
        """Rows in the order of features; a feature's top contexts first, then intervals from the highest."""
        table = ask(self.con, _WINDOWS, [self.sae.id, first, last, _REACH])
        for batch in table.to_batches(max_chunksize=4096):
            columns = {name: _plain(batch[name]) for name in batch.schema.names}
            yield from (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))

    def _activation(self, row: dict[str, Any], feature: dict[str, Any]) -> str:
        start, tokens = row["start"], row["tokens"]
        values, lowest, active = ["0"] * len(tokens), 0.0, 0
        self._check(row["feature"], row["values"])
        for position, value in zip(row["positions"], row["values"], strict=True):
            if 0 <= position - start < len(tokens):
                values[position - start] = repr(value)
                lowest, active = min(lowest, value) if active else value, active + 1
        highest = abs(feature["max"])
        if row["rank"] is not None:
            low, high, share = -1.0, highest, -1.0  # how SAEDashboard marks them
        else:
            low, high, inside = interval(row["stratum"], feature["histogram"], highest)
            share = inside / self.sae.n_tokens
        at = row["position"] - start
        line = {
            **self.mine,
            "index": str(row["feature"]),
            "creatorId": self.settings.creator,
            "maxValue": row["activation"],
            "maxValueTokenIndex": at,
            "minValue": lowest if active == len(tokens) else min(lowest, 0.0),
            "qualifyingTokenIndex": at,
            "binMin": low,
            "binMax": high,
            "binContains": share,
            "stratum_contexts": row["stratum_contexts"],
            "dataSource": row["corpus"],
            "dataIndex": row["place"],  # file # row @ offset of the context in its document
        }
        text = json.dumps(line, ensure_ascii=False)[:-1]
        text += f', "values": [{", ".join(values)}]'
        text += f', "tokens": [{", ".join([self.spelled[token] for token in tokens])}]'
        # The same content has the same id, so that a second import adds nothing.
        number = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
        return f'{text}, "id": "c{number}", "createdAt": "{self.made}"}}'

    def _check(self, feature: int, values: Sequence[float]) -> None:
        if not all(map(math.isfinite, values)):
            raise DataError(
                f"{self.sae.id}: feature {feature} has an infinite activation, which JSON cannot hold"
            )


def _plain(column: pa.Array) -> list[Any]:
    return cast(list[Any], column.to_pylist())
