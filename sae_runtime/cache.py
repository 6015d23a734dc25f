"""Where Corpuscope keeps what it can make again: converted models and compiled loops."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$CORPUSCOPE_CACHE, else ~/.cache/corpuscope."""
    return Path(os.environ.get("CORPUSCOPE_CACHE") or Path.home() / ".cache" / "corpuscope")
