"""A real Chromium before a real `corpuscope explore`, and an eye on whatever goes wrong in it.

Chromium is $CHROMIUM, or a system's own. Nothing but the explorer is ever asked: any other request is cut
off and counts as a fault. Screenshots go into out/screenshots.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import pytest
from browsing import PHONE, ROOT, SAE, WIDE, Site, Window, chromium_path, serving
from click.testing import CliRunner

from jobs.cli import cli

SCREENSHOTS = ROOT / "out" / "screenshots"


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path())
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_index: Path) -> Iterator[Site]:
    """Over the tiny index with annotations and an explanation."""
    folder = tmp_path_factory.mktemp("browser")
    index = folder / "index"
    shutil.copytree(tiny_index, index)
    words = folder / "words.csv"
    words.write_text(f"sae,feature,description\n{SAE},3,words about rain\n", encoding="utf-8")
    done = CliRunner().invoke(cli, ["annotate", str(index), "--explanations", str(words)])
    assert done.exit_code == 0, done.output
    with serving(index) as found:
        yield found


@pytest.fixture(scope="session")
def hostile_site(hostile_index: hostile.Hostile) -> Iterator[Site]:
    with serving(hostile_index.index) as found:
        yield found


@pytest.fixture
def window(chromium: Any) -> Iterator[Callable[..., Window]]:
    """`window(site)` is a new window, with nothing remembered; what went wrong in it fails the test."""
    made: list[tuple[Any, Window]] = []

    def make(base: str | Site, **settings: Any) -> Window:
        base = base.base if isinstance(base, Site) else base
        context = chromium.new_context(**({"viewport": WIDE, "accept_downloads": True} | settings))
        found = Window(context.new_page(), base)
        told = found.problems.append

        def routed(route: Any) -> None:
            if route.request.url.startswith((f"{base}/", "data:")):
                route.continue_()
            else:
                told(f"a request leaves: {route.request.url[:200]}")
                route.abort()

        context.route("**/*", routed)
        context.set_default_timeout(20_000)
        page = found.page
        page.on(
            "console",
            lambda m: told(f"console {m.type}: {m.text}") if m.type in ("error", "warning") else None,
        )
        page.on("pageerror", lambda error: told(f"page error: {error}"))
        page.on("dialog", lambda dialog: (told(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("requestfailed", lambda request: told(f"failed: {request.url[:200]} {request.failure}"))
        page.on(
            "response",
            lambda answer: told(f"{answer.status}: {answer.url[:300]}") if answer.status >= 400 else None,
        )
        page.on("popup", lambda popup: told(f"popup: {popup.url}"))
        made.append((context, found))
        return found

    yield make
    for context, found in made:
        found.check()
        context.close()


@pytest.fixture(scope="session")
def keep() -> Callable[[Window, str], None]:
    """`keep(window, name)` keeps screenshots of what a window shows: light, dark, and as on a phone."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)

    def shoot(window: Window, name: str) -> None:
        page = window.page
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            window.drawn()
            page.screenshot(path=SCREENSHOTS / f"{name}-{scheme}.png")
        page.set_viewport_size(PHONE)
        window.drawn()
        page.screenshot(path=SCREENSHOTS / f"{name}-phone.png")
        page.set_viewport_size(WIDE)

    return shoot
