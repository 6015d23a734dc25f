"""What is in `staged/` of an index: files of the hub, which `staging.py` puts there for a cluster's machines.

Invariant: a record `staged/<key>.json` is written after the object that it names, and is the only way to
it. No data of the index depends on either: what is missing comes from the hub again.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.registry import objects
from pipelines.schema import STAGED
from pipelines.storage import Store
from sae_runtime.errors import DataError


@dataclass(frozen=True)
class StagedFile:
    """A file of the hub on the index's store."""

    uri: str  # hf://…, at a commit
    name: str  # of the object
    bytes: int
    digest: str  # blake2b-128, hex

    @property
    def last(self) -> str:
        """What the hub calls it, without its folder."""
        return self.uri.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Staged:
    """What workers fetch from the store of the index; small, and crosses processes."""

    model: tuple[StagedFile, ...]
    saes: tuple[StagedFile, ...]


def recorded(store: Store) -> dict[str, StagedFile]:
    """Every record, by its name. DataError names one that is damaged."""
    items = [f"{STAGED}/{name}" for name in store.entries(STAGED) if name.endswith(".json")]
    found = {}
    for item, record in zip(items, objects(store, items), strict=True):
        try:
            found[item] = StagedFile(**record)
        except TypeError as error:
            raise DataError(
                f"{store.uri}/{item}: damaged; remove {STAGED}/ of the index and run again"
            ) from error
    return found


def sizes(store: Store) -> dict[str, int]:
    """Bytes of every object there, by its name."""
    return {f"{STAGED}/{entry.name}": entry.size for entry in store.details(STAGED)}
