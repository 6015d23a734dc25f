"""Weights from the hub on the index's own store, so that the machines of a cluster fetch them there.

    staged/<key>-<attempt>     a file of a model or of SAEs, as the hub has it at a commit
    staged/<key>.json          which of these holds, with its bytes and digest

The driver fetches from the hub once, at the commit that it has resolved, and puts files here before the first
worker is asked for; each machine fetches a file once (`sae_runtime/cache.py`), and checks it. Invariant: a
record is written after its object, and no worker loads a byte that the driver has not digested, or that is
not of that commit. What can fail:
- the driver is killed: objects without a record, which `gc` removes; the next scan goes on with the rest;
- two drivers: each record is one of the two's, of the same content;
- an object is gone (`gc`, a person): that machine asks the hub itself, at the same commit;
- an object is damaged: the scan stops and names it.
It is a cache: `staged/` may be removed whenever no scan runs.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from pipelines.registry import dump
from pipelines.schema import STAGED
from pipelines.staged import Staged, StagedFile, recorded, sizes
from pipelines.storage import Store
from pipelines.words import human
from sae_runtime import cache, hub, remote
from sae_runtime.errors import InputError
from sae_runtime.model import ModelSource, hub_files, on_this_machine
from sae_runtime.sae import SaeInfo

_BLOCK = 1 << 24  # bytes that are moved at a time
_SIDE_BY_SIDE = 4  # files to the store, or blocks from it
_TRIES = 2  # of a copy whose content is not what it should be


def stage(
    store: Store, source: ModelSource, saes: Iterable[SaeInfo], notice: Callable[[str], None]
) -> Staged:
    """Put what a scan loads from the hub on the store, unless it is there. Raises InputError as the hub does,
    and for a file whose SHA-256 is not the hub's."""
    model = hub_files(source)
    files = dict.fromkeys(file for sae in saes for file in sae.files if hub.is_hub(file))
    weights = [hub.parse(hub.pin(file)) for file in files]
    there = sizes(store)
    have = {file.uri: file for file in recorded(store).values() if there.get(file.name) == file.bytes}
    missing = [place for place in dict.fromkeys((*model, *weights)) if place.uri not in have]
    entries = hub.entries(missing) if missing else {}
    if missing:
        size = human(sum(entry.size for entry in entries.values()))
        notice(
            f"note: {len(missing):,} files of the hub ({size}) go to {store.uri}/{STAGED}, for the workers"
        )
    pool = ThreadPoolExecutor(_SIDE_BY_SIDE)
    try:
        for file in pool.map(lambda place: _put(store, place, entries[place].sha256), missing):
            have[file.uri] = file
    finally:
        pool.shutdown(cancel_futures=True)
    return Staged(tuple(have[p.uri] for p in model), tuple(have[p.uri] for p in weights))


def here(staged: Staged | None, source: ModelSource, store: Store) -> ModelSource:
    """The model as this machine loads it; SAEs that are staged come from the store from now on.

    InputError where there is no room for the model, or what is on the store is damaged.
    """
    if staged is None:
        return on_this_machine(source)
    remote.offer(
        {
            file.uri: remote.Elsewhere(file.bytes, file.digest, partial(_get, store, file))
            for file in staged.saes
        }
    )
    if all(hub.cached(hub.parse(file.uri)) is not None for file in staged.model):
        return on_this_machine(source)

    def fill(folder: Path) -> None:
        for file in staged.model:
            _get(store, file, folder / file.last)

    key = _digest(json.dumps([(file.last, file.digest) for file in staged.model]))
    try:
        folder = cache.kept(key, sum(file.bytes for file in staged.model), fill, source.uri)
    except FileNotFoundError:  # gone from the store: transformers asks the hub, at the commit
        return source
    return replace(source, path=str(folder), revision=None)


def _put(store: Store, place: hub.Place, sha256: str | None) -> StagedFile:
    path = hub.download(place)
    key, seen = _digest(place.uri), hashlib.sha256()
    name = f"{STAGED}/{key}-{uuid.uuid4().hex[:8]}"
    target = store.create(name)
    try:
        with open(path, "rb") as stream:
            while block := stream.read(_BLOCK):
                target.write(block)
                seen.update(block)
        if sha256 not in (None, seen.hexdigest()):
            raise InputError(f"{path}: damaged, not what the hub has at {place.uri}; remove it and run again")
    except BaseException:
        target.discard()
        raise
    target.close()
    file = StagedFile(place.uri, name, target.bytes, target.digest)
    store.write(f"{STAGED}/{key}.json", dump(asdict(file)))
    return file


def _get(store: Store, file: StagedFile, path: Path) -> None:
    """Fetch an object, checked. FileNotFoundError where there is none."""
    for _ in range(_TRIES):
        if _copied(store, file, path) == file.digest:
            return
    raise InputError(
        f"{store.uri}/{file.name}: damaged, not the {file.uri} that was put there; remove {STAGED}/ of the "
        "index and run again"
    )


def _copied(store: Store, file: StagedFile, path: Path) -> str:
    """The digest of what was copied."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("wb") as out, ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
        for spans in _waves(file.bytes):
            for block in pool.map(lambda span: store.read_range(file.name, *span), spans):
                out.write(block)
                digest.update(block)
    return digest.hexdigest()


def _waves(size: int) -> Iterable[Sequence[tuple[int, int]]]:
    """Spans of an object, as many together as are read side by side, so that memory stays small."""
    spans = [(start, min(start + _BLOCK, size)) for start in range(0, size, _BLOCK)]
    return [spans[i : i + _SIDE_BY_SIDE] for i in range(0, len(spans), _SIDE_BY_SIDE)]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
