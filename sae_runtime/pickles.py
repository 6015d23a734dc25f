"""What is in a file of `torch.save`, without its tensors and without running anything it names.

Since PyTorch 1.6 the file is a zip whose `data.pkl` builds containers around tensors, and each tensor names
a storage that is a member of its own; before, one pickle after the other and then the storages.
Invariant: of the names in a pickle only those of `_allowed` mean something, and each means a stand-in that
builds containers, numbers and `Stored`; any other name refuses the file. No class and no function of a
library is ever within the pickle's reach, and what it builds is bounded by its size: Python's own unpickler
in Python is used, because the one in C makes room for twice the highest index of a memo, 32 GB, and hashes
whatever it is given (a tuple of itself, 60 deep, takes for ever). A MB takes 3 s at worst; pickles of SAEs
are a few kB.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO, Any, ClassVar

import torch

from sae_runtime import archives

_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "Untyped": "uint8",
    "ComplexDouble": "complex128", "ComplexFloat": "complex64",
}  # fmt: skip
_LIMIT = 2**20  # bytes of a pickle that holds no tensors
_ITEMS = 1_000_000  # of all containers, each counted as often as it occurs
_OLD_MAGIC = 0x1950A86A20F9469CFC6C  # of files from before PyTorch 1.6
_InPython: Any = pickle._Unpickler  # which typing does not know
_UNUSED = (
    pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.EXT1, pickle.EXT2,
    pickle.EXT4,
)  # fmt: skip  # opcodes that torch.save does not write
_KEYS = (str, bytes, int, float, type(None))


@dataclass(frozen=True)
class Stored:
    """A tensor that was not read: the storage it lies in, and where. Counts of elements."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: str  # a member of the archive, or a key

    @property
    def size(self) -> int:
        """Bytes of the tensor by itself, which a stride of 0 can make larger than its storage."""
        size = _itemsize(self.dtype)
        for n in self.shape:
            size *= n
        return size

    @property
    def span(self) -> tuple[int, int]:
        """First byte and number of bytes of the storage that the tensor reads."""
        size = _itemsize(self.dtype)
        if 0 in self.shape:
            return self.offset * size, 0
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return self.offset * size, (last + 1) * size

    def tensor(self, data: bytearray) -> torch.Tensor:
        """The tensor, from the bytes of its span; it owns them."""
        dtype = getattr(torch, self.dtype)
        if not data:
            return torch.empty(self.shape, dtype=dtype)
        found = torch.frombuffer(data, dtype=dtype).as_strided(self.shape, self.stride)
        return found if found.is_contiguous() else found.clone(memory_format=torch.contiguous_format)


class Saved:
    """A file's containers, with a `Stored` for each tensor, over the open file."""

    def __init__(
        self, value: Any, stream: IO[bytes], sizes: dict[str, int], start: Callable[[str], int]
    ) -> None:
        """`sizes` are bytes of the storages, by name; `start` gives a storage's first byte in the file."""
        self.value = value
        self._stream, self._sizes, self._start = stream, sizes, start
        _check_items(value)

    def check(self, stored: Stored) -> None:
        """UnpicklingError for a tensor that is not wholly within its storage."""
        numbers = (*stored.shape, *stored.stride, stored.offset)
        whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in numbers)
        if not whole or len(stored.shape) != len(stored.stride):
            raise pickle.UnpicklingError(f"it has a tensor of shape {_short(stored.shape)} that is none")
        first, size = stored.span
        there = self._sizes.get(stored.storage)
        if there is None or first + size > there:
            raise pickle.UnpicklingError(
                f"a tensor of shape {_short(stored.shape)} lies outside its storage of {there or 0:,} bytes"
            )

    def read(self, stored: Stored) -> torch.Tensor:
        """A tensor that `check` has passed, read from the file."""
        first, size = stored.span
        if not size:
            return stored.tensor(bytearray())
        self._stream.seek(self._start(stored.storage) + first)
        return stored.tensor(filled(self._stream, size))


def filled(stream: IO[bytes], size: int) -> bytearray:
    """The next `size` bytes. Raises EOFError where there are fewer, before memory is taken for them."""
    here = stream.tell()
    if stream.seek(0, io.SEEK_END) - here < size:
        raise EOFError("the file ends before its tensors do")
    stream.seek(here)
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        done = stream.readinto(view[at:])  # type: ignore[attr-defined]  # every stream here has it
        if not done:
            raise EOFError("the file ends before its tensors do")
        at += done
    return data


def saved(stream: IO[bytes]) -> Saved:
    """What was saved to an open file. Raises UnpicklingError for what is not data, BadZipFile for damage."""
    stream.seek(0)
    return _zipped(stream) if stream.read(4) == archives.MAGIC else _old(stream)


def _zipped(stream: IO[bytes]) -> Saved:
    archive = archives.opened(stream)
    names = archive.namelist()
    found = [name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
    name = found[0] if len(found) == 1 else ""
    root = name.partition("/")[0]
    if not name or f"{root}/constants.pkl" in names:
        raise pickle.UnpicklingError("it is a program (TorchScript) or no file of torch.save")
    if f"{root}/byteorder" in names and archive.open(f"{root}/byteorder").read(8) != b"little":
        raise pickle.UnpicklingError("it was written by a machine of the other byte order")
    inside = f"{root}/data/"
    members = {info.filename: info for info in archive.infolist() if info.filename.startswith(inside)}
    with archive.open(name) as member:
        value = _Unpickler(member, lambda key, elements, dtype: f"{inside}{key}").load()

    def start(storage: str) -> int:
        info = members[storage]
        if info.compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError(f"{storage} is compressed, as no file of torch.save is")
        return archives.start(stream, info)

    return Saved(value, stream, {name: info.file_size for name, info in members.items()}, start)


def _old(stream: IO[bytes]) -> Saved:
    """Magic, version, system, the object, and the storages' keys are a pickle each; then the storages."""
    stream.seek(0)
    sizes: dict[str, int] = {}
    starts: dict[str, int] = {}
    itemsizes: dict[str, int] = {}

    def storage(key: str, elements: int, dtype: str) -> str:
        itemsizes[key] = _itemsize(dtype)
        return key

    magic, version, system, value, keys = (_Unpickler(stream, storage).load() for _ in range(5))
    if (magic, version) != (_OLD_MAGIC, 1001) or not isinstance(keys, list):
        raise pickle.UnpicklingError("it is no file of torch.save")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise pickle.UnpicklingError("it was written by a machine of the other byte order")
    end = stream.tell()
    whole = stream.seek(0, io.SEEK_END)
    for key in map(str, keys):
        if key not in itemsizes:
            raise pickle.UnpicklingError(f"it has a storage {key[:60]!r} that no tensor names")
        stream.seek(end)
        (elements,) = struct.unpack("<q", stream.read(8))
        starts[key], sizes[key] = end + 8, max(0, elements) * itemsizes[key]
        end += 8 + sizes[key]
        if end > whole:
            raise EOFError("the file ends before its tensors do")
    return Saved(value, stream, sizes, starts.__getitem__)


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


class _Bounded:
    """At most `_LIMIT` bytes of a stream, as a pickle is read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._left = stream, _LIMIT

    def read(self, size: int) -> bytes:
        return self._taken(self._stream.read(min(size, self._left + 1)))

    def readline(self) -> bytes:
        return self._taken(self._stream.readline(self._left + 1))

    def _taken(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise pickle.UnpicklingError(f"its pickle is larger than {_LIMIT:,} bytes")
        return data


class _Unpickler(_InPython):
    """`storage` names the storage of (key, elements, dtype) for `Stored`."""

    def __init__(self, stream: IO[bytes], storage: Callable[[str, int, str], str]) -> None:
        super().__init__(_Bounded(stream))
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        word = _allowed(module, name)
        if word is None:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, and only tensors and containers are read"
            )
        return word

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        """A storage: ("storage", type, key, device, elements[, no view]) -> (dtype, storage)."""
        whole = isinstance(pid, tuple) and (len(pid) == 5 or (len(pid) == 6 and pid[5] is None))
        if not (whole and pid[0] == "storage" and isinstance(pid[1], _Word)):
            raise pickle.UnpicklingError("it refers to something that is no storage")
        return pid[1].word, self._storage(str(pid[2]), pid[4], pid[1].word)

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], [(key, value)])

    def _load_setitems(self) -> None:
        items = self.pop_mark()
        _set_items(self.stack[-1], _pairs(items))

    def _load_dict(self) -> None:
        found: dict[Any, Any] = {}
        _set_items(found, _pairs(self.pop_mark()))
        self.append(found)

    def _load_build(self) -> None:
        """A state_dict's `_metadata`, which says nothing of tensors, is left out."""
        self.stack.pop()
        if not isinstance(self.stack[-1], OrderedDict):
            raise pickle.UnpicklingError(f"a {type(self.stack[-1]).__name__} cannot be changed")

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it holds something that torch.save does not write")

    dispatch: ClassVar[dict[int, Any]] = {
        **_InPython.dispatch,
        pickle.SETITEM[0]: _load_setitem,
        pickle.SETITEMS[0]: _load_setitems,
        pickle.DICT[0]: _load_dict,
        pickle.BUILD[0]: _load_build,
        **dict.fromkeys(
            (code[0] for code in _UNUSED),
            _refuse,
        ),
    }


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(items[::2], items[1::2], strict=True))


def _set_items(found: Any, pairs: Iterable[tuple[Any, Any]]) -> None:
    if not isinstance(found, dict):
        raise pickle.UnpicklingError(f"a {type(found).__name__} cannot be changed")
    for key, value in pairs:
        found[_key(key)] = value


def _key(value: Any) -> Any:
    """A value that is hashed in no time."""
    if not isinstance(value, _KEYS):
        raise pickle.UnpicklingError(f"it has a {type(value).__name__} for a key")
    return value


def _allowed(module: str, name: str) -> _Word | None:
    if module in ("torch", "torch.storage"):
        storage = re.fullmatch(r"(\w+?)Storage", name)
        if storage and storage[1] in _STORAGES:
            return _Word(_STORAGES[storage[1]])
        if isinstance(getattr(torch, name, None), torch.dtype):
            return _Word(name)
    plain: dict[tuple[str, str], Callable[..., Any]] = {
        ("collections", "OrderedDict"): _ordered,
        ("builtins", "set"): lambda items=(): {_key(item) for item in items},
        ("__builtin__", "set"): lambda items=(): {_key(item) for item in items},
        ("torch", "Size"): tuple,
        ("torch", "device"): lambda *args: ":".join(map(str, args)),
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
        ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    }
    call = plain.get((module, name))
    return None if call is None else _Word(name, call)


def _ordered(pairs: Iterable[Iterable[Any]] = ()) -> OrderedDict[Any, Any]:
    found: OrderedDict[Any, Any] = OrderedDict()
    _set_items(found, ((key, value) for key, value in pairs))
    return found


def _tensor(storage: tuple[str, str], offset: int, size: Any, stride: Any, *_: Any) -> Stored:
    return Stored(storage[0], tuple(size), tuple(stride), offset, storage[1])


def _typed_tensor(
    storage: Any, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: _Word
) -> Stored:
    return Stored(dtype.word, tuple(size), tuple(stride), offset, storage[1])


def _check_items(value: Any) -> None:
    """UnpicklingError for containers within themselves, or that are small only because parts are shared."""
    counted: dict[int, int] = {}  # by id; `value` keeps them alive

    def count(value: Any) -> int:
        if not isinstance(value, (dict, list, tuple, set)):
            return 1
        known = counted.get(id(value))
        if known is None:
            counted[id(value)] = _ITEMS  # while it is being counted: within itself, it is too large
            known = 1 + sum(map(count, value.values() if isinstance(value, dict) else value))
            counted[id(value)] = known
        if known >= _ITEMS:
            raise pickle.UnpicklingError(f"it has more than {_ITEMS:,} items, or one within itself")
        return known

    count(value)


def _itemsize(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)


def _short(shape: tuple[Any, ...]) -> str:
    text = str(shape)
    return text if len(text) <= 60 else f"{text[:59]}…"
