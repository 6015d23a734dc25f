"""Numbers and places in words, for messages and tables; imports nothing: reading commands start fast."""

from __future__ import annotations


def human(size: float) -> str:
    """1.5 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def count(number: int, noun: str) -> str:
    """`1 unit`, `2,000 units`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def left(seconds: float, share: float) -> float | None:
    """Seconds that the rest takes, when so many took a share; None where nothing is done yet."""
    return seconds * (1 - share) / share if share > 0 else None


def placed(path: str, error: str) -> str:
    """An error with the file it is about, named once."""
    return error if error.startswith(path) else f"{path}: {error}"
