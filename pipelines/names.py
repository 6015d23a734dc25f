"""What an index says of itself is held against what this version writes, before anything acts on it.

An index may come from anybody: its JSON names the files that a reader opens. Invariant: no name from an index
leads out of its `data/` folder, to another kind of rows or to another store; records that are not as this
version writes them are one line.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from pipelines.schema import DATA
from sae_runtime.errors import DataError, one_line

_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


def inside(path: object, kind: str) -> str:
    """A data file's path, which is `data/<kind>/<file>` and nothing else. Raises DataError."""
    folder = f"{DATA}/{kind}/"
    if not (isinstance(path, str) and path.startswith(folder) and _FILE.fullmatch(path[len(folder) :])):
        shown = repr(path)
        shown = shown if len(shown) <= 100 else f"{shown[:99]}…"
        raise DataError(
            f"index: damaged: it names {shown} for its {kind}, which is no file of {folder}; "
            "it was not written by corpuscope"
        )
    return path


@contextlib.contextmanager
def reading(uri: str) -> Iterator[None]:
    """DataError for whatever a reader trips over in records that are not as they should be."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(
            f"index {uri}: damaged: its records are not as this version writes them "
            f"({type(error).__name__}: {one_line(error)}); scan into a new index"
        ) from error
