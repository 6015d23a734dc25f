"""Suites: finding the SAEs under a URI and reading their weights. Gemma Scope 1 layout so far.

    <suite>/layer_20/width_16k/average_l0_71/params.npz      W_enc [d,m] W_dec b_enc b_dec threshold

Invariant: widths and d_in come from the tensors, never from a folder's name; the site comes from
the suite's name (`-res`, `-mlp`, `-att`) unless the spec gives it, because the files do not say it.
Only the headers inside the npz are read to list a suite (a few kB of each file).
"""

from __future__ import annotations

import fnmatch
import re
import zipfile
from collections.abc import Sequence
from typing import IO, Any

import fsspec
import numpy as np
import torch

from sae_runtime.errors import InputError, one_line
from sae_runtime.sae import SaeInfo, SaeWeights
from sae_runtime.sites import Site

_FILE = "params.npz"
_SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}
_KEYS = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")
_PATH = re.compile(r"(?:^|/)layer_(\d+)/(width_[^/]+)/average_l0_([\d.]+)$")


def find(
    uri: str,
    name: str | None = None,
    select: Sequence[str] | None = None,
    site: str | None = None,
    keep: str | float = "tokens",
) -> list[SaeInfo]:
    """The SAEs of a suite, sorted by layer and path.

    `select` holds globs over ids or paths, or the word `canonical` (nominal L0 nearest 100 per layer
    and width, ties to the smaller). Raises InputError when there is nothing, naming the key.
    """
    suite = name or uri.rstrip("/").split("/")[-1]
    fs, root = _open_suite(uri)
    root = root.rstrip("/")
    files = [f for f in sorted(fs.find(root)) if f.rsplit("/", 1)[-1] == _FILE]
    paths = {f[len(root) + 1 : -len(_FILE) - 1]: f for f in files}
    known = {path: match for path in paths if (match := _PATH.search(path))}
    if not known:
        raise InputError(f"saes.uri: no layer_*/width_*/average_l0_*/{_FILE} under {uri}")
    chosen = _select(suite, known, select)
    kind = site or _site_of(suite, uri)
    found = []
    for path in chosen:
        match = known[path]
        d_in, width = _shape(fs, paths[path])
        found.append(
            SaeInfo(
                id=f"{suite}/{path}",
                suite=suite,
                path=path,
                uri=fs.unstrip_protocol(paths[path]) if "://" in uri else paths[path],
                site=Site(int(match[1]), kind),
                architecture="jumprelu",
                d_in=d_in,
                width=width,
                nominal_l0=float(match[3]),
                trained_on=_trained_on(suite),
                keep=keep,
            )
        )
    return sorted(found, key=lambda sae: (sae.site.layer, sae.path))


def load(info: SaeInfo) -> SaeWeights:
    """The tensors of an SAE, as float32. InputError names a tensor that is missing or misshapen."""
    try:
        with fsspec.open(info.uri, "rb") as stream, np.load(stream) as archive:
            tensors = {key: torch.from_numpy(archive[key].astype(np.float32)) for key in _KEYS}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"saes: cannot read {info.uri}: {one_line(error)}") from error
    d, m = info.d_in, info.width
    shapes = {"W_enc": (d, m), "b_enc": (m,), "threshold": (m,), "W_dec": (m, d), "b_dec": (d,)}
    for key, shape in shapes.items():
        if tuple(tensors[key].shape) != shape:
            raise InputError(f"saes: {key} in {info.uri} is {tuple(tensors[key].shape)}, not {shape}")
        if not torch.isfinite(tensors[key]).all():
            raise InputError(f"saes: {key} in {info.uri} has values that are not finite")
    return SaeWeights(**tensors)


def _open_suite(uri: str) -> tuple[Any, str]:
    try:
        fs, root = fsspec.core.url_to_fs(uri)
        there = fs.isdir(root)
    except Exception as error:  # each filesystem has errors of its own for networks and credentials
        raise InputError(f"saes.uri: {uri}: {one_line(error)}") from error
    if not there:
        raise InputError(f"saes.uri: no such directory: {uri}; the URI of a suite, not of a file, is wanted")
    return fs, str(root)


def _site_of(suite: str, uri: str) -> str:
    ending = suite.rsplit("-", 1)[-1]
    if ending not in _SITES:
        raise InputError(
            f"saes.site: the files under {uri} do not say their site and the suite's name {suite!r} does "
            f"not end in -res, -mlp or -att; set `site: resid_post`, `mlp_out` or `attn_z`"
        )
    return _SITES[ending]


def _trained_on(suite: str) -> str | None:
    match = re.match(r"gemma-scope-(2b|9b|27b)-(pt|it)-", suite)
    if not match:
        return None
    return f"google/gemma-2-{match[1]}" + ("-it" if match[2] == "it" else "")


def _select(suite: str, known: dict[str, re.Match[str]], select: Sequence[str] | None) -> list[str]:
    """Paths that any of the patterns names. Every pattern must name one."""
    if not select:
        return list(known)
    chosen: set[str] = set()
    for pattern in select:
        named = _canonical(known) if pattern == "canonical" else _matching(suite, known, pattern)
        if not named:
            raise InputError(
                f"saes.select: {pattern!r} matches none of {len(known)} SAEs of {suite}, "
                f"e.g. {', '.join(list(known)[:3])}"
            )
        chosen.update(named)
    return [path for path in known if path in chosen]


def _matching(suite: str, known: dict[str, re.Match[str]], pattern: str) -> list[str]:
    return [
        path
        for path in known
        if fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(f"{suite}/{path}", pattern)
    ]


def _canonical(known: dict[str, re.Match[str]]) -> list[str]:
    groups: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
    for path, match in known.items():
        l0 = float(match[3])
        groups.setdefault((match[1], match[2]), []).append((abs(l0 - 100), l0, path))
    return [min(group)[2] for group in groups.values()]


def _shape(fs: Any, file: str) -> tuple[int, int]:
    """(d_in, width) from the header of W_enc alone."""
    try:
        with fs.open(file, "rb") as stream, zipfile.ZipFile(stream) as archive:
            with archive.open("W_enc.npy") as member:
                shape = _npy_shape(member)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"saes: cannot read W_enc in {file}: {one_line(error)}") from error
    if len(shape) != 2:
        raise InputError(f"saes: W_enc in {file} has shape {shape}, not [d_in, width]")
    return shape[0], shape[1]


def _npy_shape(member: IO[bytes]) -> tuple[int, ...]:
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)[0]
    return np.lib.format.read_array_header_2_0(member)[0]
