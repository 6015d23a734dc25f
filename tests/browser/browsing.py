"""What the browser's tests share: an explorer at work, and a window on it that sees what goes wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).parent.parent.parent
WIDE, PHONE = {"width": 1200, "height": 900}, {"width": 360, "height": 740}
SAE = "tiny-res/layer_1/width_130/average_l0_13"


def chromium_path() -> str:
    """The program: $CHROMIUM, or a system's own."""
    names = ("chromium", "chromium-browser", "google-chrome")
    named = [os.environ["CHROMIUM"]] if os.environ.get("CHROMIUM") else names
    path = next(filter(None, map(shutil.which, named)), None)
    assert path, f"no Chromium: set CHROMIUM, or install one of {', '.join(names)}"
    return path


@dataclass
class Site:
    """An explorer at work."""

    index: Path
    base: str


@contextmanager
def serving(index: Path) -> Iterator[Site]:
    """`corpuscope explore` over an index; it must end well, without a line in its log."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "explore", str(index), "--port", "0"],
        stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stderr
    lines = []
    try:
        while not (found := re.match(r"(http://127\.0\.0\.1:\d+)/ ", line := process.stderr.readline())):
            lines.append(line)
            assert line, "".join(lines)
        yield Site(index, found[1])
        process.terminate()
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == ""  # not a line in its log
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@dataclass
class Window:
    """A browser's page, and what went wrong in it."""

    page: Any
    base: str
    problems: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)  # parts of messages that are as they should be

    def open(self, address: str) -> int:
        """Go there and wait until all is drawn; the status."""
        answer = self.page.goto(self.base + address)
        self.drawn()
        return int(answer.status)

    def drawn(self) -> None:
        """Wait for what the page still fetches and draws."""
        self.page.wait_for_load_state("networkidle")
        self.page.wait_for_function(
            "[...document.querySelectorAll('figure[data-chart]')]"
            ".every(f => 'drawn' in f.dataset || !f.checkVisibility() || f.chart?.error)"
        )

    def check(self, where: str = "") -> None:
        """Nothing has gone wrong so far."""
        wrong = [each for each in self.problems if not any(part in each for part in self.expected)]
        assert not wrong, (where or self.page.url, wrong)

    def is_wide(self) -> str:
        """What sticks out of the window, if the page can be scrolled sideways."""
        return str(self.page.evaluate(_STICKS_OUT))

    def address(self) -> str:
        parts = urlsplit(self.page.url)
        return parts.path + (f"?{parts.query}" if parts.query else "")


_STICKS_OUT = """() => {
  const room = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= room) return "";
  const all = [...document.querySelectorAll("body *")];
  const out = all.filter((each) => each.getBoundingClientRect().right > room + 1);
  const names = out.slice(0, 3).map((each) => each.outerHTML.slice(0, 120));
  return `${document.documentElement.scrollWidth} of ${room}: ${names.join(" | ")}`;
}"""
