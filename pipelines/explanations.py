"""Explanations of features as others publish them, read into rows of the index.

    Neuronpedia   explanations/batch-*.jsonl.gz      an object a line: modelId, layer, index, description, …
    delphi        explanations/<hookpoint>_latent<n>.txt     a JSON string each; scores/<scorer>/ of the same
                  names: a list of judged examples; run_config.json: the explaining model
    JSON lines    an object a line: feature, description and, if it likes, sae, method, model, score, source
    CSV, TSV      the same as columns

A URI is a file, a glob or a folder; of a folder the files in its folders `explanations` are read, or its own
where there is none. Any of .gz .zst .bz2 .xz is read through.
Invariant: a row names a feature that its SAE has, or the whole import is refused with its file and row; what
is read of a line, a file or a description at once is bounded. Files are of unknown origin: nothing in them is
run, opened or trusted to be what it says.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from pipelines.annotation_records import Key
from pipelines.quarantine import Refused
from pipelines.readers import MOST, Damaged, decoded, json_lines, open_stored, parse, split_name
from pipelines.schema import FACTS
from pipelines.storage import open_filesystem
from sae_runtime.errors import InputError, one_line

_LONGEST = 1 << 16  # characters of a description
_FEW = 1 << 20  # bytes of delphi's files
_SOURCES = 256  # each has a key in every record
_BATCH = 1 << 16  # rows that are Python objects at once
_LATENT = re.compile(r"(?P<hookpoint>.+)_latent(?P<number>\d+)\.txt")
_HOOKPOINT = re.compile(r"(?:^|\.)(?:layers|h)\.\d+(?:\.|$)")
_TABLES = {".csv": ",", ".tsv": "\t"}
_LINES = (".jsonl", ".ndjson", ".json")
_DELPHI = "delphi"
Told = Callable[[str], None]


@dataclass(frozen=True)
class Known:
    """What explanations may be of."""

    widths: Mapping[str, int]  # features of each SAE
    sites: Mapping[str, str]  # public path of each SAE's site
    resolve: Callable[[str], str]  # the id that a name stands for; InputError
    saes: Sequence[str]  # whose they are where files do not say: one, or none


@dataclass(frozen=True)
class _Row:
    sae: str | None  # a name
    feature: object
    description: object
    method: object = None
    model: object = None
    score: object = None
    source: object = None


def explanations(uri: str, known: Known, source: str | None, told: Told) -> Iterator[tuple[Key, pa.Table]]:
    """Explanations under a URI: ((SAE, source), rows of FACTS["explanations"]), some at a time.

    `source` stands where files do not say one; without it the URI, or Neuronpedia's name of the set. Raises
    InputError naming file and row, OSError.
    """
    checked = _Checked(known, source or uri.rstrip("/"), source)
    waiting: dict[Key, list[tuple[Any, ...]]] = {}
    runs: dict[str, _Run] = {}
    count = 0
    for file in _files(uri):
        told(f"reading {file}, {count:,} explanations so far")
        for place, row in _rows(file, runs):
            key, values = checked.row(place, row)
            if values is None:
                continue
            waiting.setdefault(key, []).append(values)
            count += 1
            if count % _BATCH == 0:
                yield from ((key, _table(key, rows)) for key, rows in waiting.items())
                waiting = {}
    yield from ((key, _table(key, rows)) for key, rows in waiting.items())


class _Checked:
    """Rows as they are kept: SAE and feature of the index, texts and numbers that can be stored."""

    def __init__(self, known: Known, default: str, given: str | None) -> None:
        self._known, self._default, self._given = known, default, given
        self._named = cache(self._sae)
        self._unknown: set[str] = set()  # names that `--sae` stands for
        self._sources: set[str] = set()

    def row(self, place: str, row: _Row) -> tuple[Key, tuple[Any, ...] | None]:
        """Its key and (feature, description, method, model, score); None of a row without a description."""
        try:
            sae = self._named(row.sae)
            feature = _number(row.feature)
            width = self._known.widths[sae]
            if not 0 <= feature < width:
                raise ValueError(f"feature {feature}: {sae} has features 0 to {width - 1}")
            description = _text(row.description, "description", _LONGEST)
            source = self._given or _text(row.source, "source") or self._default
            self._sources.add(source)
            if len(self._sources) > _SOURCES:
                raise ValueError(f"more than {_SOURCES} sources; put what differs into `method` or `model`")
            method, model = _text(row.method, "method"), _text(row.model, "model")
            score = _score(row.score)
        except (ValueError, InputError) as error:
            raise InputError(f"explanations: {place}: {one_line(error)}") from error
        key = (sae, source)
        return key, (feature, description, method, model, score) if description else None

    def _sae(self, name: str | None) -> str:
        own = self._known.saes
        if len(own) > 1:
            raise ValueError("`--sae` names several SAEs, and explanations are of one")
        if name is None:
            if own:
                return own[0]
            raise ValueError("nothing says which SAE this is of; `--sae SAE` does")
        try:
            found = self._known.resolve(name)
        except InputError as error:
            found = self._at(name)
            if not found and own:
                self._unknown.add(name)
                if len(self._unknown) == 1:
                    return own[0]
                raise ValueError(f"{_both(self._unknown)} cannot both be of {own[0]} (`--sae`)") from error
            if not found:
                raise InputError(
                    f"{one_line(error)}; if it is another's name of one of them, give --sae"
                ) from error
        if own and found != own[0]:
            raise ValueError(f"it is of {found}, not of {own[0]} (`--sae`)")
        return found

    def _at(self, hookpoint: str) -> str:
        """The only SAE at a module's output, as delphi names modules; "" where there is none or several."""
        if not _HOOKPOINT.search(hookpoint):
            return ""
        endings = (f".{hookpoint}", f".{hookpoint}.output")
        found = [sae for sae, site in self._known.sites.items() if f".{site}".endswith(endings)]
        return found[0] if len(found) == 1 else ""


def _both(names: set[str]) -> str:
    return " and ".join(sorted(names))


def _number(value: object) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,10}\s*", value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"`feature` is {str(value)[:60]!r}, not a whole number")
    return value


def _text(value: object, name: str, most: int = 1000) -> str | None:
    """A text that any file can hold, None where there is none."""
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ValueError(f"`{name}` is {str(value)[:60]!r}, not a text")
    if len(value) > most:
        raise ValueError(f"`{name}` has {len(value):,} characters, more than {most:,}")
    # Half of a surrogate pair, which JSON can spell, becomes U+FFFD.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "\ufffd").strip()


def _score(value: object) -> float | None:
    if value is None or value == "":
        return None
    try:
        found = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        found = None
    if found is None:
        raise ValueError(f"`score` is {str(value)[:60]!r}, not a number")
    return found if math.isfinite(found) else None


def _table(key: Key, rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    schema = FACTS["explanations"]
    sae, source = key
    names = ("feature", "description", "method", "model", "score")
    columns: dict[str, Sequence[Any]] = dict(zip(names, zip(*rows, strict=True), strict=True))
    columns |= {"sae": [sae] * len(rows), "source": [source] * len(rows)}
    return pa.Table.from_arrays([pa.array(columns[f.name], f.type) for f in schema], schema=schema)


# --- files


def _files(uri: str) -> list[str]:
    """URIs of the files, in order. InputError where there are none that can be read."""
    try:
        fs, path = open_filesystem(uri)
        fs.invalidate_cache()
        if any(sign in path for sign in "*?[") and not fs.exists(path):
            found = fs.glob(path)
        elif fs.isdir(path):
            found = fs.find(path)
            inside = [file for file in found if PurePosixPath(file).parent.name == "explanations"]
            found = inside or [file for file in found if PurePosixPath(file).parent == PurePosixPath(path)]
        else:
            found = [path] if fs.exists(path) else []
    except Exception as error:  # each filesystem has errors of its own for credentials and names
        raise InputError(f"explanations: {uri}: {one_line(error)}") from error
    readable = [file for file in sorted(found, key=_order) if _reader(file)]
    if not readable:
        why = "no such file" if not found else "nothing there is Neuronpedia's, delphi's, JSON lines or CSV"
        raise InputError(f"explanations: {uri}: {why}")
    return [file if "://" not in uri and "::" not in uri else fs.unstrip_protocol(file) for file in readable]


def _order(file: str) -> tuple[Any, ...]:
    """Numbers as numbers: batch-2 before batch-10."""
    return tuple(
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,18})", file)
    )


def _reader(file: str) -> Callable[[str, dict[str, _Run]], Iterator[tuple[str, _Row]]] | None:
    name = split_name(file)[0]
    ending = PurePosixPath(name).suffix.lower()
    if ending in _LINES:
        return _json_rows
    if ending in _TABLES:
        return _table_rows
    return _delphi_rows if _LATENT.fullmatch(name) else None


def _rows(file: str, runs: dict[str, _Run]) -> Iterator[tuple[str, _Row]]:
    """(place, row) of a file. InputError where it cannot be read."""
    reader = _reader(file)
    assert reader is not None
    try:
        yield from reader(file, runs)
    except (Damaged, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"explanations: {file}: cannot be read: {one_line(error)}") from error
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(f"explanations: {file}: cannot be opened: {one_line(error)}") from error


def _json_rows(file: str, _: dict[str, _Run]) -> Iterator[tuple[str, _Row]]:
    with open_stored(file) as stored:
        for number, text in enumerate(json_lines(stored, file), start=1):
            place = f"{file} row {number}"
            value = parse(text)
            if isinstance(value, Refused):
                raise InputError(f"explanations: {place}: {value.error}")
            if not isinstance(value, dict):
                raise InputError(f"explanations: {place}: not a JSON object")
            yield (
                place,
                _published(value) if {"modelId", "layer", "index"} <= set(value) else _own(place, value),
            )


def _published(value: dict[str, Any]) -> _Row:
    """Of Neuronpedia's; the score is the mean of its scores."""
    name = f"{value['modelId']}/{value['layer']}"
    scores = value.get("scores")
    numbers = [
        score["value"]
        for score in (scores if isinstance(scores, list) else [])
        if isinstance(score, dict) and type(score.get("value")) in (int, float)
    ]
    return _Row(
        name,
        value["index"],
        value.get("description"),
        value.get("typeName"),
        value.get("explanationModelName"),
        sum(numbers) / len(numbers) if numbers else None,
        f"neuronpedia {name}",
    )


def _own(place: str, value: Mapping[str, Any]) -> _Row:
    missing = [name for name in ("feature", "description") if name not in value]
    if missing:
        raise InputError(
            f"explanations: {place}: no `{missing[0]}`; there are {', '.join(map(str, list(value)[:8]))}"
        )
    sae = value.get("sae")
    if sae is not None and not isinstance(sae, str):
        raise InputError(f"explanations: {place}: `sae` is {str(sae)[:60]!r}, not a name")
    rest = {name: value.get(name) for name in ("method", "model", "score", "source")}
    return _Row(sae or None, value["feature"], value["description"], **rest)


def _table_rows(file: str, _: dict[str, _Run]) -> Iterator[tuple[str, _Row]]:
    delimiter = _TABLES[PurePosixPath(split_name(file)[0]).suffix.lower()]
    with open_stored(file) as stored:
        stream = decoded(stored, file)

        def lines() -> Iterator[str]:
            first = True
            while text := stream.readline(MOST + 1):
                if len(text) > MOST:
                    raise Damaged(f"a line has more than {MOST >> 20} MiB")
                yield text.decode("utf-8-sig" if first else "utf-8")
                first = False

        for number, value in enumerate(csv.DictReader(lines(), delimiter=delimiter, strict=True), start=2):
            place = f"{file} row {number}"  # as an editor of tables counts: the header is row 1
            if None in value or None in value.values():
                raise InputError(f"explanations: {place}: it has another number of cells than the header")
            yield place, _own(place, value)


@dataclass(frozen=True)
class _Run:
    """What a delphi run says beside its explanations."""

    model: str | None  # that explained
    scores: Mapping[str, Sequence[str]]  # files by name, one a scorer


def _delphi_rows(file: str, runs: dict[str, _Run]) -> Iterator[tuple[str, _Row]]:
    """One file of delphi's; the score is the mean over scorers of its class-balanced accuracy."""
    match = _LATENT.fullmatch(PurePosixPath(file).name)
    assert match is not None
    description = _small_json(file)
    if not isinstance(description, str):
        raise InputError(f"explanations: {file}: not one JSON text, as delphi writes it")
    folder, _, name = file.rpartition("/")
    if folder not in runs:
        above, _, last = folder.rpartition("/")
        is_run = last == "explanations"
        runs[folder] = _Run(_explainer(above), _scored(above)) if is_run else _Run(None, {})
    run = runs[folder]
    scores = [_accuracy(_small_json(each)) for each in run.scores.get(name, ())]
    numbers = [score for score in scores if score is not None]
    yield (
        file,
        _Row(
            match["hookpoint"],
            int(match["number"]) if len(match["number"]) < 11 else match["number"],
            description,
            _DELPHI,
            run.model,
            sum(numbers) / len(numbers) if numbers else None,
        ),
    )


def _scored(folder: str) -> dict[str, list[str]]:
    """Files of scores by name, of a delphi run."""
    fs, path = open_filesystem(f"{folder}/scores")
    found: dict[str, list[str]] = {}
    for file in sorted(fs.find(path)) if fs.isdir(path) else []:
        uri = fs.unstrip_protocol(file) if "://" in folder else file
        found.setdefault(file.rpartition("/")[2], []).append(uri)
    return found


def _explainer(folder: str) -> str | None:
    """The model that explained, of a delphi run, where it says so."""
    fs, path = open_filesystem(f"{folder}/run_config.json")
    if not fs.isfile(path):
        return None
    config = _small_json(f"{folder}/run_config.json")
    model = config.get("explainer_model") if isinstance(config, dict) else None
    return model if isinstance(model, str) else None


def _accuracy(judged: Any) -> float | None:
    """The mean over activating and other examples of how many were judged rightly; None without any."""
    rates = []
    for activating in (True, False):
        right = [
            each["correct"]
            for each in (judged if isinstance(judged, list) else [])
            if isinstance(each, dict)
            and each.get("activating") is activating
            and isinstance(each.get("correct"), bool)
        ]
        if right:
            rates.append(sum(right) / len(right))
    return sum(rates) / len(rates) if rates else None


def _small_json(file: str) -> Any:
    """A whole small JSON file. InputError."""
    with open_stored(file) as stored:
        data = stored.read(_FEW + 1)
    if len(data) > _FEW:
        raise InputError(f"explanations: {file}: it has more than {_FEW:,} bytes")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"explanations: {file}: not JSON: {one_line(error)}") from error
