"""A suite's files by name: a directory, any fsspec URL, or `hf://org/repo[@revision][/sub]`.

Invariant: opening a tree lists names and reads nothing else; what a listing of a suite reads after
that are small config files and the headers of the weight files of the SAEs that were selected. The URI
of a tree on the hub carries the commit that was listed, so that everyone reads the same one.
"""

from __future__ import annotations

import collections
import json
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import yaml
from fsspec.implementations.local import LocalFileSystem

from sae_runtime import hub, remote, yamls
from sae_runtime.errors import InputError, one_line

_JSON = 2**24  # bytes of a config
_WAYS = 64  # by which links may lead to one directory


@dataclass(frozen=True)
class Tree:
    """The files under a suite's URI, as paths inside it."""

    uri: str  # without a trailing slash; on the hub, with the commit
    name: str  # of the suite
    files: tuple[str, ...]  # sorted

    def path(self, file: str) -> str:
        """The URI of one of the files; an URI stays itself, with a commit if it is the hub's."""
        if hub.is_hub(file):
            return hub.pin(file)
        return file if "://" in file else f"{self.uri}/{file}"

    def has(self, file: str) -> bool:
        """Whether the file is there."""
        return file in self._set

    def inside(self, folder: str) -> list[str]:
        """Files of a folder, by path; of everything for ""."""
        return [file for file in self.files if not folder or file.startswith(f"{folder}/")]

    def named(self, *names: str) -> list[str]:
        """Files whose last part is one of `names`."""
        return [file for file in self.files if file.rsplit("/", 1)[-1] in names]

    @property
    def last(self) -> str:
        """The last part of the URI, without a revision, whatever the suite is called."""
        if hub.is_hub(self.uri):
            place = hub.parse(self.uri)
            return (place.path or place.repo).rsplit("/", 1)[-1]
        return self.uri.rsplit("/", 1)[-1]

    @cached_property
    def _set(self) -> frozenset[str]:
        return frozenset(self.files)


def open_tree(uri: str, name: str | None = None) -> Tree:
    """List a suite. Raises InputError where there is no directory."""
    if hub.is_hub(uri):
        return _open_hub(uri, name)
    uri = uri.rstrip("/")
    try:
        fs, root = fsspec.core.url_to_fs(uri)
        fs.invalidate_cache()  # what an object store's filesystem remembers of an earlier listing
        there = fs.isdir(root)
        local = isinstance(fs, LocalFileSystem)
        files = (_walk(Path(root)) if local else fs.find(root)) if there else []
    except Exception as error:  # each filesystem has errors of its own for networks and credentials
        raise InputError(f"saes.uri: {uri}: {one_line(error)}") from error
    if not there:
        raise InputError(f"saes.uri: no such directory: {uri}; the URI of a suite, not of a file, is wanted")
    root = str(root).rstrip("/")
    if isinstance(fs, LocalFileSystem) and "://" not in uri:
        uri = root  # whole, so that "." has a name and a worker elsewhere finds the files
    inside = sorted(file[len(root) + 1 :] for file in files if not file.endswith("/"))
    return Tree(uri, name or uri.rsplit("/", 1)[-1], tuple(inside))


def _walk(root: Path) -> list[str]:
    """Every file of a local directory, through links to directories too, but never into one it is within.

    Pipes and devices are left out: reading one would not end. Raises OSError where links multiply.
    """
    ways: collections.Counter[Path] = collections.Counter()

    def walk(at: Path, above: tuple[Path, ...]) -> list[str]:
        real = at.resolve()
        found: list[str] = []
        if real in above:
            return found
        ways[real] += 1
        if ways[real] > _WAYS:
            raise OSError(f"links lead to {real} by more than {_WAYS} ways; remove some")
        for entry in at.iterdir():
            if entry.is_dir():
                found += walk(entry, (*above, real))
            elif not _is_special(entry):
                found.append(entry.as_posix())
        return found

    return walk(root, ())


def _is_special(file: Path) -> bool:
    try:
        return not stat.S_ISREG(os.stat(file).st_mode)
    except OSError:  # a link to nothing or to itself: whoever opens it says so
        return False


def _open_hub(uri: str, name: str | None) -> Tree:
    place = hub.commit(hub.parse(uri))
    files = hub.files(place)
    if not files or files == [""]:
        raise InputError(
            f"saes.uri: no such directory: {place.uri}; the URI of a repository or a folder is wanted"
        )
    tree = Tree(place.uri, "", tuple(sorted(files)))
    return replace(tree, name=name or tree.last)


def read_json(uri: str) -> dict[str, Any]:
    """A JSON object. Raises InputError naming the file."""
    return _read(uri, json.loads, _JSON)


def read_yaml(uri: str) -> dict[str, Any]:
    """A YAML mapping. Raises InputError naming the file."""
    return _read(uri, lambda data: yaml.load(data, yamls.Loader), yamls.LIMIT)


def _read(uri: str, parse: Callable[[bytes], Any], limit: int) -> dict[str, Any]:
    try:
        value = parse(remote.read_bytes(uri, limit))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"saes: cannot read {uri}: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"saes: {uri} does not hold a mapping")
    return value


def folder(file: str) -> str:
    """The folder of a path, "" at the top."""
    return file.rsplit("/", 1)[0] if "/" in file else ""


def stem(file: str, endings: Iterable[str]) -> str:
    """A path without the first of `endings` that it has."""
    return next((file[: -len(end)] for end in endings if file.endswith(end)), file)
