"""The files of a corpus: found by URI or glob on any fsspec filesystem, in corpus order.

Invariant: the order is (source, path relative to the glob's fixed part), whatever the filesystem's own;
a file's stamp changes when its bytes may have, so that a known digest is trusted or the file re-read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pipelines import readers
from pipelines.spec import CorpusSource
from pipelines.storage import open_filesystem
from sae_runtime.errors import DataError, InputError, one_line

ENDINGS = {
    "jsonl": ("jsonl", "ndjson", "json"),
    "parquet": ("parquet", "pq"),
    "arrow": ("arrow", "feather", "ipc"),
    "text": ("txt", "md", "rst", "py", "html", "tex"),
}
FORMAT_OF = {ending: name for name, endings in ENDINGS.items() for ending in endings}
_ETAGS = ("ETag", "etag", "blob_id")
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created", "date_time")


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus."""

    source: int  # index of the spec's source
    corpus: str  # documents.corpus: the source's name, else the file name's stem
    uri: str  # what fsspec opens
    path: str  # relative to the glob's fixed part; the base name where there is no wildcard
    format: str  # jsonl | parquet | arrow | text
    size: int  # bytes as stored; 0 where the filesystem does not say
    stamp: str  # etag, or times of change, or "": with size, says whether a known digest still holds


def list_files(sources: Sequence[CorpusSource]) -> list[SourceFile]:
    """The corpus's files in corpus order: source, then path relative to the glob's fixed part.

    A file that several URIs of a source match counts once, as the first of them has it. InputError
    for a URI that matches nothing or is a directory, an unknown format, and a path that occurs twice.
    """
    return [file for index, source in enumerate(sources) for file in _source_files(index, source)]


def check_unchanged(file: SourceFile, digest: str) -> None:
    """DataError if a file's bytes are no longer those of `digest`; they are read only if its stamp moved."""
    fs, path = open_filesystem(file.uri)
    fs.invalidate_cache()
    info = _info(fs, path)
    if info is not None and (info.get("size") or 0, _stamp(info)) == (file.size, file.stamp):
        return
    found = hashlib.blake2b(digest_size=16)
    if info is not None:
        with fs.open(path, "rb") as stream:
            while block := stream.read(1 << 22):
                found.update(block)
    if info is None or found.hexdigest() != digest:
        raise DataError(f"{file.path}: it has changed since the scan was planned; scan again")


def _source_files(index: int, source: CorpusSource) -> list[SourceFile]:
    found: dict[str, SourceFile] = {}
    uris: set[str] = set()
    for pattern in source.uri:
        for uri, path, info in _matches(pattern):
            if uri in uris:
                continue
            uris.add(uri)
            if path in found:
                raise InputError(
                    f"corpus.uri: {found[path].uri} and {uri} have the same relative path {path}; "
                    "use one glob above both, or a source each"
                )
            found[path] = SourceFile(
                index, source.name or _stem(path), uri, path, _format(path, source), info.get("size") or 0,
                _stamp(info),
            )  # fmt: skip
    return [found[path] for path in sorted(found)]


def _matches(uri: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(URI, relative path, fsspec's info) of each file that a URI or glob names."""
    try:
        fs, pattern = open_filesystem(uri)
        fs.invalidate_cache()
        exact = _info(fs, pattern)  # first: a name may hold a bracket, and a URL a question mark
        glob = exact is None and any(sign in pattern for sign in "*?[")
        found = fs.glob(pattern, detail=True) if glob else {pattern: exact} if exact else {}
    except Exception as error:  # each filesystem has errors of its own for credentials and names
        raise InputError(f"corpus.uri: {uri}: {one_line(error)}") from error
    if exact and exact["type"] == "directory":
        raise InputError(f"corpus.uri: {uri} is a directory; name its files, as in {uri.rstrip('/')}/*.jsonl")
    found = {path: info for path, info in found.items() if info["type"] != "directory"}
    if not found:
        raise InputError(f"corpus.uri: no file matches {uri}")
    fixed = _fixed_part(pattern) if glob else None
    for path, info in found.items():
        if info["type"] != "file":
            raise InputError(f"corpus.uri: {path} is not a file or a link to one; remove it or narrow {uri}")
        inside = fixed is not None and path.startswith(fixed)
        yield _uri(fs, uri, path), path[len(fixed or "") :] if inside else path.rsplit("/", 1)[-1], info


def _info(fs: Any, path: str) -> dict[str, Any] | None:
    try:
        return fs.info(path)
    except FileNotFoundError:
        return None


def _fixed_part(pattern: str) -> str:
    """The directories before the first wildcard, with the slash after them."""
    first = min(pattern.index(sign) for sign in "*?[" if sign in pattern)
    return pattern[: pattern.rfind("/", 0, first) + 1]


def _uri(fs: Any, pattern: str, path: str) -> str:
    """What opens `path`: plain on local disk, else with its scheme and the chain it was found through."""
    head, chained, rest = pattern.partition("::")
    if chained:  # "zip://*.jsonl::x.zip" or "simplecache::s3://bucket/*.jsonl"
        outer = f"{head.split('://')[0]}://{path}::{rest}"
        return outer if "://" in head else f"{head}::{fs.unstrip_protocol(path)}"
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return path if "file" in protocols else fs.unstrip_protocol(path)


def _stamp(info: dict[str, Any]) -> str:
    """The entity tag, else all times known: on local disk a write that restores mtime moves ctime."""
    for key in _ETAGS:
        if info.get(key):
            return str(info[key])
    return "/".join(str(info[key]) for key in _TIMES if info.get(key))


def _stem(path: str) -> str:
    return PurePosixPath(readers.split_name(path)[0]).stem


def _format(path: str, source: CorpusSource) -> str:
    if source.format != "auto":
        return source.format
    ending = PurePosixPath(readers.split_name(path)[0]).suffix.lower().lstrip(".")
    if ending not in FORMAT_OF:
        raise InputError(f"corpus.format: the name of {path} does not say a format; set `format:` to one of "
                         f"{', '.join(ENDINGS)}")  # fmt: skip
    return FORMAT_OF[ending]
