"""Zip archives of unknown origin: opened within bounds, and where a member's bytes begin.

Invariant: what an archive makes this process hold is bounded before it is read. A directory of members is
at most `_DIRECTORY` bytes (Python takes some eight times that for it), and no name is there twice, so that
two readers of one archive see the same members.
"""

from __future__ import annotations

import collections
import struct
import zipfile
from typing import IO, Any, cast

MAGIC = b"PK\x03\x04"
_DIRECTORY = 2**24  # bytes: some 200,000 members


def opened(stream: IO[bytes]) -> zipfile.ZipFile:
    """The archive. Raises BadZipFile where it is none, or one that no writer of tensors makes."""
    bounded = _Bounded(stream)
    archive = zipfile.ZipFile(cast(IO[bytes], bounded))
    bounded.limit = None
    names = collections.Counter(archive.namelist())
    for name, times in names.most_common(1):
        if times > 1:
            raise zipfile.BadZipFile(f"it has {name} twice")
    return archive


def start(stream: IO[bytes], info: zipfile.ZipInfo) -> int:
    """The place of a member's first byte: `ZipFile.open` would read 4 kB at least to know it."""
    stream.seek(info.header_offset)
    fixed = stream.read(30)
    if fixed[:4] != MAGIC or len(fixed) < 30:
        raise zipfile.BadZipFile(f"{info.filename} is not where the archive says")
    return info.header_offset + 30 + sum(struct.unpack("<HH", fixed[26:]))


class _Bounded:
    """A stream that gives no more than `limit` bytes at once: zipfile reads a directory in one piece."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.limit: int | None = _DIRECTORY

    def read(self, size: int = -1) -> bytes:
        if self.limit is not None and size > self.limit:
            raise zipfile.BadZipFile(f"its directory of {size:,} bytes is larger than {self.limit:,}")
        return self._stream.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
