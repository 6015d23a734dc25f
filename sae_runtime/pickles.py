"""What is in a file of `torch.save`, without its tensors and without running anything it names.

The file is a zip whose `data.pkl` builds containers around tensors, and each tensor names a storage that
is a member of its own. Invariant: of the names in a pickle only those of `_allowed` mean something, and
each means a stand-in that builds containers, numbers and `Stored`; any other name refuses the file.
No class and no function of a library is ever within the pickle's reach.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import torch

_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "Untyped": "uint8",
    "ComplexDouble": "complex128", "ComplexFloat": "complex64",
}  # fmt: skip
_LIMIT = 2**26  # bytes of a pickle that holds no tensors
MAGIC = b"PK\x03\x04"


@dataclass(frozen=True)
class Stored:
    """A tensor that was not read: the member that holds its storage, and where in it. Counts of elements."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    member: str

    def tensor(self, data: bytes) -> torch.Tensor:
        """The tensor, from the storage's bytes."""
        if not data:
            return torch.empty(self.shape, dtype=getattr(torch, self.dtype))
        flat = torch.frombuffer(bytearray(data), dtype=getattr(torch, self.dtype))
        return flat.as_strided(self.shape, self.stride, self.offset).clone()


class _Word:
    """What a name of the pickle stands for. It cannot be changed from within the pickle."""

    __slots__ = ("call", "word")
    call: Callable[..., Any] | None
    word: str

    def __init__(self, word: str, call: Callable[..., Any] | None = None) -> None:
        object.__setattr__(self, "word", word)
        object.__setattr__(self, "call", call)

    def __call__(self, *args: Any) -> Any:
        if self.call is None:
            raise pickle.UnpicklingError(f"{self.word} is no function")
        return self.call(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"{self.word} cannot be changed")


def outline(archive: zipfile.ZipFile) -> Any:
    """The object that was saved, a `Stored` for each tensor. Raises UnpicklingError for what is not data."""
    names = archive.namelist()
    (name,) = [name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)] or [""]
    root = name.partition("/")[0]
    if not name or f"{root}/constants.pkl" in names:
        raise pickle.UnpicklingError("it is a program (TorchScript) or no file of torch.save")
    if archive.getinfo(name).file_size > _LIMIT:
        raise pickle.UnpicklingError(f"its pickle is larger than {_LIMIT:,} bytes")
    with archive.open(name) as stream:
        return _Unpickler(stream, root).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], root: str) -> None:
        super().__init__(stream)
        self._root = root

    def find_class(self, module: str, name: str) -> Any:
        word = _allowed(module, name)
        if word is None:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, and only tensors and containers are read"
            )
        return word

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        """A storage: ("storage", type, key, device, elements) -> (dtype, member of the archive)."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise pickle.UnpicklingError("it refers to something that is no storage")
        return pid[1].word, f"{self._root}/data/{pid[2]}"


def _allowed(module: str, name: str) -> _Word | None:
    if module in ("torch", "torch.storage"):
        storage = re.fullmatch(r"(\w+?)Storage", name)
        if storage and storage[1] in _STORAGES:
            return _Word(_STORAGES[storage[1]])
        if isinstance(getattr(torch, name, None), torch.dtype):
            return _Word(name)
    plain: dict[tuple[str, str], Callable[..., Any]] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "set"): set,
        ("torch", "Size"): tuple,
        ("torch", "device"): lambda *args: ":".join(map(str, args)),
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
        ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    }
    call = plain.get((module, name))
    return None if call is None else _Word(name, call)


def _tensor(storage: tuple[str, str], offset: int, size: Any, stride: Any, *_: Any) -> Stored:
    return Stored(storage[0], tuple(size), tuple(stride), offset, storage[1])


def _typed_tensor(
    storage: Any, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: _Word
) -> Stored:
    return Stored(dtype.word, tuple(size), tuple(stride), offset, storage[1])
