"""Every fixture of tests/published is read by a peer here, or is named with the reason why none does."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import published
import pytest

pytestmark = pytest.mark.peers

WITHOUT: dict[str, str] = {}  # fixture -> why no peer reads it


def test_every_fixture_has_a_peer() -> None:
    text = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    fixtures = {name for _, name, _ in pkgutil.iter_modules(published.__path__) if name != "base"}
    unread = {name for name in fixtures if f'"{name}"' not in text}
    assert unread == set(WITHOUT), unread
