"""What a person does on the pages: brushes, filters, sorts, steps by keys, points, asks, compares."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from browsing import SAE, Site, Window

import queries

pytestmark = pytest.mark.browser


def question(window: Window) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(window.page.url).query).items()}


def listed(window: Window) -> list[int]:
    """The features that the table links to, in its order."""
    links = window.page.eval_on_selector_all(
        "main table a[href^='/feature?']", "all => all.map((each) => each.getAttribute('href'))"
    )
    numbers = [int(parse_qs(urlsplit(link).query)["feature"][0]) for link in links]
    return list(dict.fromkeys(numbers))


def test_the_brush_narrows_the_table_to_what_sql_says(site: Site, window: Callable[..., Window]) -> None:
    here = window(site)
    here.open(f"/sae?{urlencode({'sae': SAE})}")
    before = listed(here)
    canvas = here.page.locator("figure[data-chart] canvas").first
    box = canvas.bounding_box()
    mouse = here.page.mouse
    mouse.move(box["x"] + box["width"] * 0.45, box["y"] + box["height"] * 0.15)
    mouse.down()
    mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.4, steps=4)
    mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] * 0.75, steps=4)
    mouse.up()
    here.page.wait_for_url("**min_density=**")
    here.drawn()
    asked = question(here)
    bounds = [float(asked[name]) for name in ("min_density", "max_density", "min_max", "max_max")]
    con = queries.connect(str(site.index))
    wanted = con.execute(
        "SELECT feature FROM features WHERE sae = ? AND density BETWEEN ? AND ? AND abs(max) BETWEEN ? AND ?",
        [SAE, *bounds],
    ).fetchall()
    here.page.wait_for_function(f"document.querySelectorAll('main tbody tr').length <= {max(1, len(wanted))}")
    chosen = {feature for (feature,) in wanted}
    assert 0 < len(chosen) < 130
    shown = listed(here)
    assert set(shown) <= chosen
    assert len(shown) == min(50, len(chosen))
    here.page.reload()  # the address says it all
    here.drawn()
    assert listed(here) == shown
    assert shown != before


SORTS = {
    "density": "density DESC",
    "-density": "density",
    "max": "abs(max) DESC",
    "n_tokens": "n_tokens DESC",
}


@pytest.mark.parametrize(("sort", "order"), SORTS.items())
def test_the_table_is_sorted_as_sql_sorts(
    site: Site, window: Callable[..., Window], sort: str, order: str
) -> None:
    here = window(site)
    here.open(f"/sae?{urlencode({'sae': SAE, 'sort': sort})}")
    con = queries.connect(str(site.index))
    wanted = con.execute(
        f"SELECT feature FROM features WHERE sae = ? ORDER BY {order} NULLS LAST, feature LIMIT 20", [SAE]
    ).fetchall()
    assert listed(here)[:20] == [feature for (feature,) in wanted]
    assert here.page.locator("th[aria-sort]").count() == 1


def test_a_filter_is_kept_while_sorting(site: Site, window: Callable[..., Window]) -> None:
    here = window(site)
    here.open(f"/sae?{urlencode({'sae': SAE, 'min_density': 0.05})}")
    before = set(listed(here))
    here.page.locator("main th a").first.click()
    here.drawn()
    assert float(question(here)["min_density"]) == 0.05
    assert "sort" in question(here)
    con = queries.connect(str(site.index))
    [(n,)] = con.execute("SELECT count(*) FROM features WHERE sae = ? AND density >= 0.05", [SAE]).fetchall()
    assert len(before) == len(listed(here)) == min(50, n)


def test_keys_are_told_and_work(site: Site, window: Callable[..., Window]) -> None:
    here = window(site)
    keyboard = here.page.keyboard
    here.open("/")
    keyboard.press("?")
    dialog = here.page.locator("dialog[open]")
    assert dialog.locator("kbd").count() >= 6
    keyboard.press("Escape")
    assert here.page.locator("dialog[open]").count() == 0
    for key, path in (("q", "/sql"), ("c", "/compare"), ("d", "/documents"), ("t", "/text"), ("i", "/")):
        here.open("/recipes")
        keyboard.press(key)
        here.page.wait_for_url(f"{here.base}{path}")
        here.drawn()
    here.open("/sql")
    keyboard.press("/")
    assert here.page.evaluate("document.activeElement.matches('main textarea, main input')")
    keyboard.type("?qi")  # typing is not a key
    assert here.page.locator("dialog[open]").count() == 0
    assert here.page.evaluate("document.activeElement.value").endswith("?qi")


def test_stepping_through_rows_and_features(site: Site, window: Callable[..., Window]) -> None:
    here = window(site)
    here.open(f"/sae?{urlencode({'sae': SAE})}")
    order = listed(here)
    keyboard = here.page.keyboard
    for key in "jjjk":
        keyboard.press(key)
    keyboard.press("Enter")
    here.page.wait_for_url("**/feature?**")
    assert int(question(here)["feature"]) == order[1]
    here.open(f"/feature?{urlencode({'sae': SAE, 'feature': 3})}")
    keyboard.press("]")
    here.page.wait_for_url(re.compile(r"feature=4\b"))
    here.drawn()
    keyboard.press("[")
    here.page.wait_for_url(re.compile(r"feature=3\b"))
    here.drawn()


def test_the_theme_is_kept(site: Site, window: Callable[..., Window]) -> None:
    here = window(site)
    here.open("/")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = here.page.evaluate(paper)
    here.page.locator("#theme").click()
    dark = here.page.evaluate(paper)
    assert dark != light
    assert here.page.locator("#theme").inner_text() == "Light"
    here.open(f"/sae?{urlencode({'sae': SAE})}")
    assert here.page.evaluate(paper) == dark
    here.page.reload()
    here.drawn()
    assert here.page.evaluate(paper) == dark
    here.page.locator("#theme").click()
    here.drawn()
    assert here.page.evaluate(paper) == light


def test_pointing_at_a_token_shows_its_value(site: Site, window: Callable[..., Window]) -> None:
    here = window(site)
    here.open(f"/feature?{urlencode({'sae': SAE, 'feature': 3})}")
    token = here.page.locator(".tokens .t[data-v]").first
    token.hover()
    label = here.page.locator("output.value:not(.tip)")
    assert label.is_visible()
    assert label.inner_text().split("\n")[0].startswith(token.get_attribute("data-v"))
    con = queries.connect(str(site.index))
    [(highest,)] = con.execute("SELECT max FROM features WHERE sae = ? AND feature = 3", [SAE]).fetchall()
    peak = here.page.locator(".tokens .t.peak").first
    assert float(peak.get_attribute("data-v")) == pytest.approx(highest, rel=1e-3)


def test_tokens_are_stepped_through_by_keys(site: Site, window: Callable[..., Window]) -> None:
    here = window(site)
    here.open(f"/feature?{urlencode({'sae': SAE, 'feature': 3})}")
    values = here.page.eval_on_selector_all("[data-v]", "all => all.map((each) => each.dataset.v)")
    label = here.page.locator("output.value:not(.tip)")
    keyboard = here.page.keyboard
    keyboard.press("v")
    assert label.inner_text() == values[0]
    for _ in range(3):
        keyboard.press("ArrowRight")
    assert label.inner_text() == values[3]
    keyboard.press("ArrowLeft")
    assert label.inner_text() == values[2]
    keyboard.press("Escape")
    assert not label.is_visible()


def test_a_context_opens_to_its_document(site: Site, window: Callable[..., Window]) -> None:
    here = window(site)
    here.open(f"/feature?{urlencode({'sae': SAE, 'feature': 3})}")
    before = here.page.locator(".tokens .t").count()
    with here.page.expect_response("**/document.html?**"):
        here.page.locator("[data-expand], details.expand > summary, .expand").first.click()
    here.drawn()
    here.page.wait_for_function(f"document.querySelectorAll('.tokens .t').length > {before}")


def test_sql_answers_and_refuses(site: Site, window: Callable[..., Window]) -> None:
    here = window(site)
    here.open("/sql")
    field = here.page.locator("main textarea")
    field.fill("SELECT 6 * 7 AS answer, NULL AS nothing, '<b>x</b>' AS html")
    field.press("Control+Enter")
    here.page.wait_for_url("**q=SELECT**")
    here.drawn()
    cells = here.page.locator("main table.result td, main table td").all_inner_texts()
    assert "42" in cells
    assert "<b>x</b>" in cells
    here.check()
    here.expected.append("400")
    for wrong in (
        "SELECT nothing_of_this",
        "COPY (SELECT 1) TO '/tmp/corpuscope-x'",
        "FROM read_csv('/etc/passwd')",
    ):
        here.page.locator("main textarea").fill(wrong)
        here.page.locator("main textarea").press("Control+Enter")
        here.page.wait_for_load_state("networkidle")
        said = here.page.locator("main [role=alert], main .error").first.inner_text()
        assert said.startswith("sql:"), said
        assert "\n" not in said.strip()
        assert here.page.locator("main textarea").input_value() == wrong


def test_a_text_of_ones_own_is_run_and_shaded(site: Site, window: Callable[..., Window]) -> None:
    here = window(site)
    here.open("/text")
    field = here.page.locator("main textarea")
    field.fill("the cat sat\non a mat")
    here.page.locator("main select[name=sae]").select_option(SAE)
    field.press("Control+Enter")
    here.page.wait_for_selector("main .tokens.document", timeout=60_000)  # once the model is loaded
    here.drawn()
    assert here.page.locator(".tokens.document").inner_text().replace("↵", "") == "the cat sat\non a mat"
    token = here.page.locator(".tokens.document .t[data-v]").first
    token.hover()
    label = here.page.locator("output.value:not(.tip)")
    assert re.match(r"\d+: [\d.]+", label.inner_text())
    strongest = int(label.inner_text().split(":")[0])
    here.page.locator("main tbody tr a", has_text="shade").first.click()
    here.page.wait_for_url("**feature=**")
    here.drawn()
    assert here.page.locator(".tokens.document .t[data-v]").count() >= 1
    assert strongest in listed(here)
    con = queries.connect(str(site.index))
    [(density,)] = con.execute(
        "SELECT density FROM features WHERE sae = ? AND feature = ?", [SAE, listed(here)[0]]
    ).fetchall()
    row = here.page.locator("main tbody tr").first.inner_text()
    assert f"{density:.4g}" in row


def test_parts_of_a_feature_s_page_are_fetched(site: Site, window: Callable[..., Window]) -> None:
    here = window(site)
    here.open(f"/feature?{urlencode({'sae': SAE, 'feature': 3})}")
    here.page.wait_for_selector("details ol.contexts .tokens")
    con = queries.connect(str(site.index))
    [(n,)] = con.execute(
        "SELECT count(*) FROM sampled_contexts WHERE sae = ? AND feature = 3", [SAE]
    ).fetchall()
    assert here.page.locator("details ol.contexts > li").count() == n
    here.page.locator("form[data-expand] select").select_option("all")
    here.page.locator("form[data-expand] button").click()
    here.page.wait_for_selector(".taken table.result tbody tr")
    assert here.page.locator(".taken table.result tbody tr").count() == 20
    assert here.page.locator("h1").count() == 1
    assert "/feature?" in here.page.url


def test_a_point_of_a_chart_opens_what_it_stands_for(site: Site, window: Callable[..., Window]) -> None:
    here = window(site)
    here.open("/")
    here.page.wait_for_selector("figure[data-drawn] canvas")
    bar = here.page.evaluate(
        """() => {
          const figure = document.querySelector("figure[data-chart]");
          const walk = (item, dx, dy) => {
            const ox = dx + (item.items && item.x ? item.x : 0);
            const oy = dy + (item.items && item.y ? item.y : 0);
            if (item.datum?.sae && item.height > 2) {
              return [ox + item.x + item.width / 2, oy + item.y + item.height / 2, item.datum.sae];
            }
            for (const each of item.items ?? []) {
              const got = walk(each, ox, oy);
              if (got) return got;
            }
          };
          const [px, py] = figure.view.origin();
          const got = walk(figure.view.scenegraph().root, 0, 0);
          const box = figure.querySelector("canvas").getBoundingClientRect();
          return [box.left + px + got[0], box.top + py + got[1], got[2]];
        }"""
    )
    here.page.mouse.click(bar[0], bar[1])
    here.page.wait_for_url("**/sae?**")
    here.drawn()
    assert question(here)["sae"] == bar[2]


def test_sets_are_chosen_by_a_column(site: Site, window: Callable[..., Window]) -> None:
    here = window(site)
    here.open("/compare")
    form = here.page.locator("form", has=here.page.locator("input[name=column][value=lang]"))
    form.locator("select[name=value]").select_option("en")
    form.locator("button").click()
    here.page.wait_for_selector("main table a[href^='/feature?']", timeout=60_000)
    here.drawn()
    assert question(here)["column"] == "lang"
    assert "IS DISTINCT FROM 'en'" in here.page.locator("main").inner_text()
    here.page.go_back()
    assert here.page.locator("form[aria-busy]").count() == 0


def test_two_sets_are_compared(site: Site, window: Callable[..., Window]) -> None:
    from queries.diff import diff

    here = window(site)
    here.open(f"/compare?{urlencode({'a': 'even', 'b': 'NOT even', 'min_documents': 5})}")
    here.page.wait_for_selector("main table a[href^='/feature?']", timeout=60_000)
    here.drawn()
    con = queries.connect(str(site.index))
    wanted = diff(con, "even", "NOT even", min_documents=5).table.to_pylist()
    first = here.page.locator("main table a[href^='/feature?']").first.get_attribute("href")
    asked = parse_qs(urlsplit(first).query)
    assert (asked["sae"][0], int(asked["feature"][0])) == (wanted[0]["sae"], wanted[0]["feature"])
    assert here.page.locator("figure[data-chart] canvas").count() >= 1
