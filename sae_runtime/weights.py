"""Reading weight files: what is in them without reading it all, and tensors. No code runs from a file.

    .npz            zip of .npy             the header of each member
    .safetensors                            the JSON header by range
    .pt .pth        torch's zip             `weights_only=True`, and pickles of tensors, containers, numbers

Invariant: `headers` reads a few kB of an .npz or .safetensors file however large it is; floating
tensors come out as float32, integers as they are.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, Any

import fsspec
import numpy as np
import torch

from sae_runtime.errors import InputError, one_line


@dataclass(frozen=True)
class Header:
    """A tensor's place in a file."""

    dtype: str
    shape: tuple[int, ...]


def headers(uri: str) -> dict[str, Header]:
    """Names, dtypes and shapes of a file's tensors. Raises InputError naming the file."""
    try:
        with fsspec.open(uri, "rb") as stream:
            if uri.endswith(".npz"):
                return _npz_headers(stream)
            if uri.endswith(".safetensors"):
                return _safetensors_headers(stream)
            return {
                name: Header(str(value.dtype).removeprefix("torch."), tuple(value.shape))
                for name, value in _pickle(stream, "meta").items()
                if isinstance(value, torch.Tensor)
            }
    except InputError:
        raise
    except Exception as error:  # a damaged file raises what its reader happens to raise
        raise InputError(f"saes: cannot read {uri}: {one_line(error)}") from error


def read(uri: str, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Tensors of a file by name, all or those of `names` that are there; floating ones as float32."""
    wanted = None if names is None else set(names)
    try:
        found = _read(uri, wanted)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"saes: cannot read {uri}: {one_line(error)}") from error
    return {name: t.float() if t.is_floating_point() else t for name, t in found.items()}


def read_pickle(uri: str) -> dict[str, Any]:
    """Everything in a .pt file: tensors (as stored), numbers, strings, containers."""
    try:
        with fsspec.open(uri, "rb") as stream:
            return _pickle(stream, "cpu")
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"saes: cannot read {uri}: {one_line(error)}") from error


def _read(uri: str, wanted: set[str] | None) -> dict[str, torch.Tensor]:
    def take(name: str) -> bool:
        return wanted is None or name in wanted

    if uri.endswith(".npz"):
        with fsspec.open(uri, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files if take(name)}
    if uri.endswith(".safetensors"):
        from safetensors.torch import load

        with fsspec.open(uri, "rb") as stream:
            return {name: tensor for name, tensor in load(stream.read()).items() if take(name)}
    found = read_pickle(uri)
    return {name: t for name, t in found.items() if isinstance(t, torch.Tensor) and take(name)}


def _pickle(stream: IO[bytes], device: str) -> dict[str, Any]:
    found = torch.load(stream, map_location=device, weights_only=True)
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not tensors by name")
    return found


def _npz_headers(stream: IO[bytes]) -> dict[str, Header]:
    found = {}
    with zipfile.ZipFile(stream) as archive:
        for name in archive.namelist():
            with archive.open(name) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0
                shape, _, dtype = (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(member)
            found[name.removesuffix(".npy")] = Header(str(dtype), shape)
    return found


def _safetensors_headers(stream: IO[bytes]) -> dict[str, Header]:
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > 100_000_000:
        raise ValueError("its header is not one of safetensors")
    header = json.loads(stream.read(length))
    return {
        name: Header(entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }
