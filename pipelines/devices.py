"""Which models of device an index was scanned on: `devices/000000.json` and on, one for each.

Invariant: a record is put-if-absent and stays, so whatever races, there is one first model, and whoever does
not allow mixtures works on that alone. A model stands here before the first unit is scanned on it; which
units were is in their commits (`device`), which compaction keeps.
"""

from __future__ import annotations

import json

from pipelines.registry import dump
from pipelines.schema import DEVICES
from pipelines.storage import Store, names
from sae_runtime.errors import DataError


def recorded(store: Store) -> tuple[str, ...]:
    """The models in the order in which they came; none before the first scan. DataError if damaged."""
    found = [f"{DEVICES}/{name}.json" for name in names(store, DEVICES, ".json")]
    return tuple(_model(store, name, data) for name, data in zip(found, store.read_many(found), strict=True))


def record(store: Store, model: str, run: int, alone: bool) -> tuple[str, ...]:
    """Add a model unless it is there, or, `alone`, unless any is. Returns what is recorded then."""
    while True:
        have = recorded(store)
        if model in have or (have and alone):
            return have
        data = dump({"device": model, "run": run})
        try:
            store.put_if_absent(f"{DEVICES}/{len(have):06d}.json", data)
        except (ConnectionError, TimeoutError):  # it may have been made
            if model not in recorded(store):
                raise


def _model(store: Store, name: str, data: bytes) -> str:
    try:
        return str(json.loads(data)["device"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{store.uri}/{name}: damaged, not a record of a device") from error
