"""Spec files: YAML in, a checked `ScanSpec` out, with relative paths made absolute.

Invariant: whatever is wrong with the text of a spec is an InputError of one line that names the key;
a path without a scheme is relative to the spec's own folder, never to the current one.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipelines.spec import (
    ContextSettings,
    CorpusSource,
    Exclusion,
    ModelSettings,
    SaeEntry,
    Sample,
    ScanSpec,
    Schedule,
)
from sae_runtime import yamls
from sae_runtime.errors import InputError, one_line
from sae_runtime.terminal import plain

_MODELS: dict[str, type[BaseModel]] = {
    "corpus": CorpusSource,
    "model": ModelSettings,
    "saes": SaeEntry,
    "context": ContextSettings,
    "keep": Sample,
    "exclude": Exclusion,
    "schedule": Schedule,
}


class _Loader(yamls.Loader):
    """YAML in which a key that is given twice is an error, not the last one's."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
    loader.flatten_mapping(node)
    return dict(loader.construct_mapping(node, deep=True))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_spec(path: str, index: str | None = None) -> tuple[ScanSpec, str]:
    """The spec at `path` and its text; `index` replaces the spec's own. Raises InputError."""
    file = Path(path)
    try:
        with open(file, "rb") as stream:
            raw = stream.read(yamls.LIMIT + 1)
        if len(raw) > yamls.LIMIT:
            raise InputError(f"{path}: a spec has at most {yamls.LIMIT:,} bytes; shorten lists by globs")
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"{path}: cannot read the spec: {problem}") from error
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or one_line(error)
        line = "".join(text.splitlines()[mark.line : mark.line + 1]) if mark else ""
        if re.match(r"\s*(schedule|cron)\s*:\s*\*", line):
            problem = "a cron line that begins with * must stand in quotes"
        raise InputError(f"{path}{where}: not a spec in YAML: {problem}") from error
    if data is None:
        raise InputError(f"{path}: the spec is empty; it needs the keys corpus, model, saes and index")
    if not isinstance(data, dict):
        raise InputError(f"{path}: a spec is a mapping with the keys {', '.join(ScanSpec.model_fields)}")
    if index is not None:
        data["index"] = str(Path(index).absolute()) if _is_path(index) else index
    try:
        spec = ScanSpec.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{path}: {_words(error)}") from error
    return _absolute(spec, file.absolute().parent), text


def _words(error: ValidationError) -> str:
    """The first problem, as `key: what, remedy`; unknown keys come first, they explain missing ones."""
    problems = _essential(error.errors(include_url=False))
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    place = _place(first)
    same = [p for p in problems if _place(p) == place]
    others = len({tuple(_place(p)) for p in problems}) - 1
    more = f" (and {others} more)" if others else ""
    return f"{_dotted(place)}: {_what(place, same)}{more}"


def _essential(problems: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Without those that only repeat, of a list or a union, that something inside it is wrong."""
    places = [_place(problem) for problem in problems]

    def repeats(place: list[Any]) -> bool:
        return any(len(p) > len(place) and p[: len(place)] == place for p in places)

    return [
        p for p, place in zip(problems, places, strict=True) if p["type"] == "missing" or not repeats(place)
    ]


def _place(problem: Mapping[str, Any]) -> list[Any]:
    """Keys and list positions, without the names that pydantic adds for the branches of a union."""
    return [part for part in problem["loc"] if not _is_tag(part)]


def _is_tag(part: Any) -> bool:
    return isinstance(part, str) and (part.startswith(("literal[", "function-", "tuple[")) or part in _TAGS)


_TAGS = {"bool", "Exclusion", "Sample", "str"}


def _dotted(place: Sequence[Any]) -> str:
    key = ".".join(f"[{part}]" if isinstance(part, int) else str(part) for part in place)
    return plain(key if len(key) <= 200 else f"{key[:199]}…").replace(".[", "[") or "spec"


def _what(place: list[Any], problems: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong at one place; a union of types has one problem for each of them."""
    first = problems[0]
    if first["type"] == "extra_forbidden":
        return f"unknown key{_suggestion(place)}"
    if first["type"] == "invalid_key":
        return "a key is text; no key of a spec is anything else"
    if first["type"] == "missing":
        return "this key is missing"
    own = next((problem for problem in problems if problem["type"] == "value_error"), None)
    if own is not None:
        return str(own["msg"]).removeprefix("Value error, ")
    wanted = " or ".join(dict.fromkeys(_wanted(place, problem) for problem in problems))
    return f"{wanted} is wanted{_given(first.get('input'))}"


def _wanted(place: list[Any], problem: Mapping[str, Any]) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "").replace(" or ", ", ")
    if kind in ("model_type", "dict_type"):
        model = _model(place)
        return f"a mapping with the key{'s' * (len(model.model_fields) > 1)} {', '.join(model.model_fields)}"
    bounds = {"greater_than": "more than {gt}", "greater_than_equal": "{ge} or more"}
    bounds |= {"less_than": "less than {lt}", "less_than_equal": "{le} or less"}
    if kind in bounds:
        return "a number of " + bounds[kind].format(**context)
    return _KINDS.get(kind, str(problem["msg"]))


_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "tuple_type": "a list",
    "too_short": "a list of at least one",
}


def _given(value: Any) -> str:
    if value is None:
        return " (given: null)"
    shown = repr(value) if not isinstance(value, bool) else str(value).lower()
    return f" (given: {shown if len(shown) <= 60 else shown[:59] + '…'})"


def _suggestion(place: list[Any]) -> str:
    names = list(_model(place[:-1]).model_fields)
    near = difflib.get_close_matches(str(place[-1]), names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(names)}"


def _model(place: Sequence[Any]) -> type[BaseModel]:
    """The settings that a place of the spec holds."""
    return next((_MODELS[part] for part in reversed(place) if part in _MODELS), ScanSpec)


def _absolute(spec: ScanSpec, folder: Path) -> ScanSpec:
    """Paths made absolute; URIs with a scheme and hub ids are left alone."""
    corpus = tuple(
        source.model_copy(
            update={
                "uri": tuple(_join(folder, uri) for uri in source.uri),
                "template": source.template if source.template == "auto" else _join(folder, source.template),
            }
        )
        for source in spec.corpus
    )
    saes = tuple(entry.model_copy(update={"uri": _join(folder, entry.uri)}) for entry in spec.saes)
    uri = spec.model.uri
    explicit = uri.startswith((".", "/", "~")) or uri.endswith(".gguf") or (folder / uri).exists()
    model = spec.model.model_copy(update={"uri": _join(folder, uri) if explicit else uri})
    return spec.model_copy(
        update={"corpus": corpus, "saes": saes, "model": model, "index": _join(folder, spec.index)}
    )


def _is_path(uri: str) -> bool:
    return "://" not in uri


def _join(folder: Path, uri: str) -> str:
    try:
        return os.path.normpath(folder / Path(uri).expanduser()) if _is_path(uri) else uri
    except RuntimeError as error:
        raise InputError(f"{uri}: there is no such home directory; write the path without ~") from error
