"""Spec files: YAML in, a checked `ScanSpec` out, with relative paths made absolute.

Invariant: whatever is wrong with the text of a spec is an InputError of one line that names the key;
a path without a scheme is relative to the spec's own folder, never to the current one.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipelines.spec import ContextSettings, CorpusSource, ModelSettings, SaeEntry, ScanSpec
from sae_runtime.errors import InputError, one_line

_MODELS: dict[str, type[BaseModel]] = {
    "corpus": CorpusSource,
    "model": ModelSettings,
    "saes": SaeEntry,
    "context": ContextSettings,
}


def load_spec(path: str, index: str | None = None) -> tuple[ScanSpec, str]:
    """The spec at `path` and its text; `index` replaces the spec's own. Raises InputError."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read the spec: {one_line(error)}") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or one_line(error)
        raise InputError(f"{path}{where}: not YAML: {problem}") from error
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
    """The first problem, as `key: what, remedy`."""
    problems = error.errors(include_url=False)
    problem = problems[0]
    place = [part for part in problem["loc"] if not _is_tag(part)]
    key = ".".join(f"[{part}]" if isinstance(part, int) else str(part) for part in place).replace(".[", "[")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggestion(place)}{more}"
    if problem["type"] == "missing":
        return f"{key}: this key is missing{more}"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    shown = f" (given: {given!r})" if isinstance(given, (str, int, float, bool)) else ""
    return f"{key or 'spec'}: {message}{shown}{more}"


def _is_tag(part: Any) -> bool:
    """Names that pydantic adds for the branches of a union."""
    return isinstance(part, str) and (part.startswith(("literal[", "function-", "tuple[")) or part in _TAGS)


_TAGS = {"bool", "Sample", "str"}


def _suggestion(place: list[Any]) -> str:
    model = next((_MODELS[part] for part in place[:-1] if part in _MODELS), ScanSpec)
    names = list(model.model_fields)
    near = difflib.get_close_matches(str(place[-1]), names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(names)}"


def _absolute(spec: ScanSpec, folder: Path) -> ScanSpec:
    """Paths made absolute; URIs with a scheme and hub ids are left alone."""
    corpus = tuple(
        source.model_copy(update={"uri": tuple(_join(folder, uri) for uri in source.uri)})
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
    return str(folder / Path(uri).expanduser()) if _is_path(uri) else uri
