"""Fingerprints of SAEs, remembered for as long as their files stay as they are.

Invariant: an answer is what `suites.load(sae).fingerprint()` gives; it is remembered under the format, its
options and each file's size and stamp, as the corpus's digests are. Without this a finished scan, which
loads nothing else, would read a suite of 500 GB again only to find that nothing has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass

from sae_runtime import remote, suites
from sae_runtime.cache import cache_dir
from sae_runtime.sae import SaeInfo

_VERSION = 2  # to be raised whenever a loader or `SaeWeights.fingerprint` gives something else


@dataclass(frozen=True)
class Print:
    """What a scan has to know of an SAE's tensors before it begins."""

    digest: str
    d_out: int | None  # numbers that it decodes to; None without a decoder


def fingerprint(info: SaeInfo) -> Print:
    """Of an SAE, checked as `suites.load` checks it. Raises InputError as that does."""
    file = cache_dir() / "fingerprints" / _key(info)
    with contextlib.suppress(OSError, ValueError, TypeError):  # not there, or cut short: read the weights
        return Print(**json.loads(file.read_text()))
    weights = suites.load(info)
    found = Print(weights.fingerprint(), None if weights.b_dec is None else len(weights.b_dec))
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as stream:
        json.dump(found.__dict__, stream)
    os.replace(stream.name, file)
    return found


def _key(info: SaeInfo) -> str:
    digest = hashlib.blake2b(f"{_VERSION} {info.format} {info.options} {info.out}".encode(), digest_size=16)
    for uri in info.files:
        digest.update(f"{uri} {remote.stamp(uri)}".encode())
    return digest.hexdigest()
