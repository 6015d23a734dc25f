"""Finding again what an index was scanned with: its model, its SAEs' files.

Invariant: what is found has the fingerprint that the index holds; anything else is refused by name.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_runtime import suites
from sae_runtime.errors import InputError
from sae_runtime.hub import HubError
from sae_runtime.model import ModelSource, locate, site_paths
from sae_runtime.sae import SaeInfo, SaeWeights
from sae_runtime.sites import KINDS, Site

_COMMIT = re.compile(r"[0-9a-f]{40}")


def model(identity: dict[str, Any], moved: str | None) -> ModelSource:
    """The model that was scanned. InputError where it is not there or not that one."""
    scanned = str(identity["fixed"]["model"])
    uri = moved or str(identity["model"])
    try:
        source = locate(uri, scanned if _COMMIT.fullmatch(scanned) and not Path(uri).exists() else None)
    except InputError as error:
        if moved is not None:
            raise
        raise InputError(f"{error}; --model URI says where it is now") from error
    if source.fingerprint != scanned:
        raise InputError(
            f"model.uri: {uri} is not the model that was scanned ({source.fingerprint}, not {scanned}); "
            "--model URI says where that is"
        )
    return source


def _places(record: dict[str, Any], moved: Sequence[str]) -> list[str]:
    """Roots under which an SAE's suite may be."""
    suite, uri = str(record["suite"]), str(record["uri"])
    if moved:
        return [place for each in moved for place in (each.rstrip("/"), f"{each.rstrip('/')}/{suite}")]
    path = str(record["id"])[len(suite) + 1 :]
    at = uri.rfind(f"/{path}") if path else -1
    if at > 0:
        return [uri[:at]]
    return [uri.rsplit("/", n)[0] for n in range(1, min(4, uri.count("/")))]


def saes(source: ModelSource, records: Sequence[dict[str, Any]], moved: Sequence[str]) -> dict[str, SaeInfo]:
    """What the formats say of SAEs that were scanned. InputError names one that is not where it was."""
    paths: dict[Site, str] = {}

    def at(site: Site) -> str:
        if site not in paths:
            paths[site] = site_paths(source, [site])[site][0]
        return paths[site]

    found: dict[str, SaeInfo] = {}
    left = {str(record["id"]): record for record in records}
    places: dict[tuple[str, str], list[str]] = {}
    rounds = {sae: _places(record, moved) for sae, record in left.items()}
    for turn in range(max(map(len, rounds.values()), default=0)):
        places.clear()
        for sae in left:
            if turn < len(rounds[sae]):
                places.setdefault((rounds[sae][turn], str(left[sae]["suite"])), []).append(sae)
        for (uri, suite), ids in places.items():
            for kind in (None, *KINDS):  # what the files do not say, a spec's `site` said
                ids = [sae for sae in ids if sae in left]
                for info in _listed(uri, suite, ids, kind):
                    record = left.get(info.id)
                    if record is not None and at(info.site) == record["site"]:
                        found[info.id] = info
                        del left[info.id]
    if left:
        sae, record = next(iter(left.items()))
        where = ", ".join(moved) or record["uri"]
        raise InputError(
            f"saes: {sae} ({len(left):,} of {len(records):,} SAEs) is not found at {where}; "
            "--saes URI says where its suite is"
        )
    return found


def _listed(uri: str, suite: str, ids: Sequence[str], kind: str | None) -> list[SaeInfo]:
    """Those of some SAEs that a suite has; none where there is no such suite."""
    if not ids:
        return []
    patterns = [glob.escape(sae) for sae in ids]
    try:
        return suites.find(uri, suite, patterns, kind, refused=lambda error: None)
    except HubError:
        raise
    except InputError:
        return []


def weights(info: SaeInfo, record: dict[str, Any]) -> SaeWeights:
    """An SAE's tensors. InputError where they are not those that were scanned."""
    found = suites.load(info)
    if found.fingerprint() != record["fingerprint"]:
        raise InputError(
            f"saes: {info.uri} is not what was scanned as {record['id']} (fingerprint "
            f"{record['fingerprint']}); --saes URI says where that is"
        )
    return found
