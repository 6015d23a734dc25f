"""Repositories of the Hugging Face hub: `hf://org/repo[@revision][/path]`, always read at one commit.

Invariant: what is listed, read by range and downloaded is of the commit that `commit` saw, so that a
push between a listing and a load changes nothing, here or on another machine. Whole files live in
huggingface_hub's own cache, and a file that is there costs no request.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from sae_runtime.errors import InputError, one_line

_URI = re.compile(
    r"hf://(?P<org>[^/@]+)/(?P<repo>[^/@]+)"
    r"(?:@(?P<at>refs/(?:pr/\d+|convert/[^/]+)|[^/]+))?(?:/(?P<path>.*?))?/*(?:\?revision=(?P<query>[^&]+))?"
)
_SHA = re.compile(r"[0-9a-f]{40}")
_OTHER = ("datasets", "spaces", "buckets", "kernels", "models")  # prefixes of huggingface_hub's own hf://
_PATHS_A_REQUEST = 500


class HubError(InputError):
    """The hub refuses, or cannot be reached: not one file's fault."""


@dataclass(frozen=True)
class Place:
    """A repository, or a file or folder in it."""

    repo: str  # "org/repo"
    revision: str | None  # unquoted; None for the default branch
    path: str  # "" for the whole repository

    @property
    def uri(self) -> str:
        """The URI that `parse` reads."""
        at = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"hf://{self.repo}{at}" + (f"/{self.path}" if self.path else "")

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return self.revision is not None and _SHA.fullmatch(self.revision) is not None


@dataclass(frozen=True)
class Entry:
    """A file of a repository. `sha256` is of its bytes, where the hub says it (large files)."""

    size: int
    sha256: str | None


_entries: dict[tuple[str, str], dict[str, Entry]] = {}  # (repo, commit) -> path -> entry, as listed
_commits: dict[Place, str] = {}  # what `pin` was told


def is_hub(uri: str) -> bool:
    """Whether the hub is meant."""
    return uri.startswith("hf://")


def parse(uri: str) -> Place:
    """A place by its URI; `?revision=` at the end, as circuit-tracer writes it, is read too."""
    match = _URI.fullmatch(uri)
    climbs = match is not None and ".." in (match["org"], match["repo"], *(match["path"] or "").split("/"))
    if match is None or climbs or match["org"] in _OTHER or (match["at"] and match["query"]):
        raise InputError(
            f"saes.uri: {uri}: not a model repository; write hf://org/repo[@revision][/folder], "
            "with %2F for a / in the revision"
        )
    revision = match["at"] or match["query"]
    return Place(f"{match['org']}/{match['repo']}", revision and unquote(revision), match["path"] or "")


def commit(place: Place) -> Place:
    """The place at the commit that its revision names now."""
    if place.pinned:
        return place
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    with _told(place):
        try:
            info = HfApi().repo_info(place.repo, revision=place.revision)
        except OfflineModeIsEnabled:
            found = cached_commit(place)
            if found is None:
                raise
            return found
        repo = place.repo if "/" in place.repo else info.id  # `gpt2` has an owner by now
        return replace(place, repo=repo, revision=info.sha)


def cached_commit(place: Place) -> Place | None:
    """The place at the commit that its revision named when something of it was last fetched, if it was."""
    ref = _cache_folder(place.repo) / "refs" / (place.revision or "main")
    return replace(place, revision=ref.read_text().strip()) if ref.is_file() else None


def pin(uri: str) -> str:
    """The URI at a commit; a branch means the same commit for as long as this process lives."""
    place = parse(uri)
    if not place.pinned:
        key = replace(place, path="")
        if key not in _commits:
            _commits[key] = commit(key).revision or ""
        place = replace(place, revision=_commits[key])
    return place.uri


def files(place: Place) -> list[str]:
    """Every file under a pinned place, as paths inside it; [] where there is no such folder."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.hf_api import RepoFile

    prefix = f"{place.path}/" if place.path else ""
    with _told(place):
        try:
            listed = HfApi().list_repo_tree(
                place.repo, place.path or None, recursive=True, revision=place.revision
            )
            found = {item.path: _entry(item) for item in listed if isinstance(item, RepoFile)}
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return []
        except OfflineModeIsEnabled:  # what an earlier `hf download` left
            root = _cache_folder(place.repo) / "snapshots" / str(place.revision)
            found = {
                file.relative_to(root).as_posix(): Entry(file.stat().st_size, None)
                for file in (root / place.path).rglob("*")
                if file.is_file()
            }
            if not found:
                raise
    _entries.setdefault((place.repo, str(place.revision)), {}).update(found)
    return [path[len(prefix) :] for path in found if path.startswith(prefix)]


def entries(places: Iterable[Place]) -> dict[Place, Entry]:
    """Sizes and digests of files; only what no listing has shown is asked for, and many at a time."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    places = [parse(pin(place.uri)) for place in places]
    missing: dict[tuple[str, str], list[Place]] = {}
    for place in places:
        key = place.repo, str(place.revision)
        if place.path not in _entries.setdefault(key, {}):
            missing.setdefault(key, []).append(place)
    for (repo, sha), wanted in missing.items():
        for i in range(0, len(wanted), _PATHS_A_REQUEST):
            paths = [place.path for place in wanted[i : i + _PATHS_A_REQUEST]]
            with _told(wanted[i]):
                for item in HfApi().get_paths_info(repo, paths, revision=sha):
                    if isinstance(item, RepoFile):
                        _entries[repo, sha][item.path] = _entry(item)
    for place in places:
        if place.path not in _entries[place.repo, str(place.revision)]:
            raise InputError(f"saes: no such file: {place.uri}")
    return {place: _entries[place.repo, str(place.revision)][place.path] for place in places}


def fetch(place: Place, start: int, stop: int) -> bytes:
    """Bytes start to stop of a file at a pinned place."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # its own way of exporting
        build_hf_headers,
        hf_raise_for_status,
        http_backoff,
    )

    url = hf_hub_url(place.repo, place.path, revision=place.revision)
    with _told(place):
        answer = http_backoff(
            "GET", url, headers={**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}, timeout=30
        )
        hf_raise_for_status(answer)
        content: bytes = answer.content
        return content[start:stop] if answer.status_code == 200 else content


def cached(place: Place) -> str | None:
    """The local copy of a file at a pinned place, if there is one."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(place.repo, place.path, revision=place.revision)
    return found if isinstance(found, str) else None


def download(place: Place) -> str:
    """A local copy of a file at a pinned place; safe among processes, and free where it is there already."""
    found = cached(place)
    if found is not None:
        return found
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):  # workers and threads share stderr: a bar only where a person looks
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            quiet = (kwargs.get("total") or 0) < 2**20 or not sys.stderr.isatty()
            super().__init__(*args, **{**kwargs, "disable": quiet or kwargs.get("disable")})

    with _told(place):
        return str(hf_hub_download(place.repo, place.path, revision=place.revision, tqdm_class=Bar))


def _entry(item: Any) -> Entry:
    return Entry(item.size, item.lfs.sha256 if item.lfs else None)


def _cache_folder(repo: str) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    return Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


@contextmanager
def _told(place: Place) -> Iterator[None]:
    """The hub's errors as one line with a remedy."""
    from huggingface_hub import errors
    from huggingface_hub.constants import ENDPOINT

    page = f"{ENDPOINT}/{place.repo}"
    remedy = f"accept its conditions at {page} and run `hf auth login` (or set HF_TOKEN)"
    try:
        yield
    except InputError:
        raise
    except (errors.GatedRepoError, errors.DisabledRepoError) as error:
        raise HubError(f"saes.uri: {place.uri}: no access to this repository; {remedy}") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"saes.uri: {place.uri}: no such model repository at {ENDPOINT}, or a private one; "
            "check the name, or run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"saes.uri: {place.uri}: the repository has no revision {place.revision}; {page} lists them"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise InputError(f"saes: no such file: {place.uri}") from error
    except errors.OfflineModeIsEnabled as error:
        raise HubError(
            f"saes.uri: {place.uri} is not in the local cache and HF_HUB_OFFLINE is set; "
            f"unset it, or run `hf download {place.repo}` where there is a network"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise HubError(f"saes.uri: {place.uri}: no access ({status}); {remedy}") from error
        raise HubError(f"saes.uri: {place.uri}: {one_line(error)}; try again later") from error
    except Exception as error:  # no route, no name, a timeout: of the HTTP library, whichever it is
        raise HubError(
            f"saes.uri: {place.uri}: cannot read from {ENDPOINT}: {one_line(error)}; "
            "check the network and HF_ENDPOINT"
        ) from error
