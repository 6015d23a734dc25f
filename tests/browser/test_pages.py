"""Every page in a real browser: no error, no request elsewhere, nothing sticks out, every link leads on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browsing import PHONE, SAE, WIDE, Site, Window

import queries

pytestmark = pytest.mark.browser
OF_A_KIND = 4  # pages of a path that are opened
ASKED = 12  # of a path that are asked for besides
MOST = 80


def links(window: Window) -> list[str]:
    """Where a page's links lead, within the explorer."""
    found = window.page.eval_on_selector_all("a[href]", "all => all.map((each) => each.href)")
    return [each.removeprefix(window.base).split("#")[0] for each in found if each.startswith(window.base)]


def is_page(address: str) -> bool:
    """Not a download, JSON or a part of a page."""
    return "." not in urlsplit(address).path.rsplit("/", 1)[-1] and "download=" not in address


def visit(window: Window, seeds: list[str], at: Callable[[str], None]) -> dict[str, list[str]]:
    """Open pages breadth first, some of each path; what was opened and asked for, by path."""
    waiting = list(seeds)
    opened: dict[str, list[str]] = {}
    asked: dict[str, list[str]] = {}
    while waiting:
        address = waiting.pop(0)
        path = urlsplit(address).path
        own, others = opened.setdefault(path, []), asked.setdefault(path, [])
        if address in own or address in others:
            continue
        if is_page(address) and len(own) < OF_A_KIND and sum(map(len, opened.values())) < MOST:
            own.append(address)
            assert window.open(address) == 200, address
            window.check(address)
            at(address)
            waiting += links(window)
        elif len(others) < ASKED:
            others.append(address)
            answer = window.page.request.get(window.base + address)
            assert answer.status == 200, (address, answer.text()[:300])
    return {path: own + asked[path] for path, own in opened.items() if own or asked[path]}


def headings(window: Window) -> None:
    levels = window.page.eval_on_selector_all(
        "main h1, main h2, main h3, main h4", "all => all.map((each) => Number(each.tagName[1]))"
    )
    assert levels[:1] == [1], window.page.url
    assert levels.count(1) == 1, window.page.url
    assert all(b - a <= 1 for a, b in pairwise(levels)), (window.page.url, levels)


UNNAMED = """() => [...document.querySelectorAll("input, select, textarea, button, a[href], summary")]
  .filter((each) => each.checkVisibility() && each.type !== "hidden")
  .filter((each) => !(each.labels?.length || each.getAttribute("aria-label")
    || each.getAttribute("aria-labelledby") || each.textContent.trim()
    || (each.type === "submit" && each.value)))
  .map((each) => each.outerHTML.slice(0, 150))"""
NESTED = """() => document.querySelectorAll(
  "a a, a button, button a, label label, form form, p div, table table").length"""


def test_every_page_and_every_link_of_it(
    site: Site, window: Callable[..., Window], keep: Callable[[Window, str], None]
) -> None:
    here = window(site)
    page, kinds = here.page, set()

    def look(address: str) -> None:
        headings(here)
        assert page.evaluate(UNNAMED) == [], address
        assert page.evaluate(NESTED) == 0, address
        assert here.is_wide() == "", address
        page.set_viewport_size(PHONE)
        assert here.is_wide() == "", address
        page.set_viewport_size(WIDE)
        kind = urlsplit(address).path.strip("/").replace("/", "-") or "index"
        if kind not in kinds:
            kinds.add(kind)
            keep(here, kind)

    found = visit(here, ["/"], look)
    con = queries.connect(str(site.index))
    saes = {name for (name,) in con.execute("SELECT sae FROM saes").fetchall()}
    assert len(found["/sae"]) >= len(saes)
    assert set(found) >= {
        "/",
        "/sae",
        "/feature",
        "/document",
        "/documents",
        "/compare",
        "/sql",
        "/recipes",
        "/recipe",
    }


def test_pages_in_the_dark_draw_without_a_fault(site: Site, window: Callable[..., Window]) -> None:
    here = window(site, color_scheme="dark", viewport=PHONE, has_touch=True, is_mobile=True)
    seen: dict[str, int] = {}

    def look(address: str) -> None:
        path = urlsplit(address).path
        seen[path] = seen.get(path, 0) + 1
        paper = here.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(map(int, paper.strip("rgb()").split(", "))) < 60

    here.open("/")
    for address in dict.fromkeys(["/", *filter(is_page, links(here))]):
        if seen.get(urlsplit(address).path, 0) < 1:
            assert here.open(address) == 200
            look(address)
    assert len(seen) >= 4


def test_hostile_pages_do_no_harm(hostile_site: Site, window: Callable[..., Window]) -> None:
    here = window(hostile_site)
    page = here.page

    def look(address: str) -> None:
        assert page.evaluate("'evil' in window") is False, address
        for token in page.locator(".t[data-v], [onmouseover]").all()[:3]:
            token.hover()
        page.set_viewport_size(PHONE)
        assert here.is_wide() == "", address
        page.set_viewport_size(WIDE)
        assert page.evaluate("'evil' in window") is False, address
        assert (
            page.locator(
                "img, iframe, evil-x, style, base, main script:not([type='application/json'])"
            ).count()
            == 0
        )
        assert page.locator("a[href^='javascript']").count() == 0

    found = visit(here, ["/"], look)
    assert len(found) >= 5


def test_without_scripts_pages_are_whole(site: Site, window: Callable[..., Window]) -> None:
    here = window(site, java_script_enabled=False)
    con = queries.connect(str(site.index))
    for address in ("/", f"/sae?sae={SAE}", f"/feature?sae={SAE}&feature=3"):
        answer = here.page.goto(here.base + address)
        assert answer.status == 200, address
        assert here.page.locator("main a[href]").count() > 3
    text = here.page.locator("main").inner_text()
    [(tokens,)] = con.execute("SELECT n_tokens FROM features WHERE sae = ? AND feature = 3", [SAE]).fetchall()
    assert f"{tokens:,}" in text


def test_a_report_opens_from_a_file(
    site: Site, window: Callable[..., Window], tmp_path: Path, keep: Callable[[Window, str], None]
) -> None:
    from queries.explorer.report import Wanted, report

    file = tmp_path / "report.html"
    file.write_text(report([str(site.index)], Wanted(SAE, limit=5)).html, encoding="utf-8")
    here = window(file.parent.as_uri(), offline=True)
    here.page.goto(file.as_uri())
    assert here.page.locator("svg").count() == 2 + 5
    sizes = here.page.eval_on_selector_all(
        "svg", "all => all.map((each) => each.getBoundingClientRect().width)"
    )
    assert min(sizes) > 200
    shaded = here.page.locator(".contexts .t[title]").first
    assert float(shaded.get_attribute("title")) != 0
    assert shaded.evaluate("(each) => getComputedStyle(each).backgroundColor") != "rgba(0, 0, 0, 0)"
    ink = here.page.evaluate(
        "getComputedStyle(document.querySelector('svg .role-mark path, svg .mark-symbol path')).fill"
    )
    assert ink.startswith(("rgb", "color")), "a colour of the sheet"
    assert here.is_wide() == ""
    here.page.set_viewport_size(PHONE)
    assert here.is_wide() == ""
    here.page.set_viewport_size(WIDE)
    keep(here, "report")
