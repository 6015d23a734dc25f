"""`corpuscope report`: its numbers are the views', it needs nothing but itself, nothing harms."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import hostile
import pytest
from click.testing import CliRunner

import queries
from jobs.cli import cli
from queries.explorer.report import Wanted, report
from queries.explorer.web import figure
from sae_runtime.errors import InputError

SAE = "tiny-res/layer_1/width_37/average_l0_2"
DEAD = 5  # tests/tiny.py


def look(html: str) -> hostile.Look:
    return hostile.Look(html, drawings=True)


def run(*arguments: Any) -> Any:
    done = CliRunner().invoke(cli, ["report", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, (SystemExit, InputError)):
        raise done.exception
    return done


@pytest.fixture(scope="module")
def page(tiny_index: Path) -> str:
    return report([str(tiny_index)], Wanted(SAE, sort="max", limit=5, contexts=3)).html


def test_an_saes_numbers_are_those_of_the_views(page: str, tiny_index: Path) -> None:
    con = queries.connect(str(tiny_index))
    text = look(page).text
    [(dead, width)] = con.execute(
        "SELECT count(*) FILTER (n_tokens = 0), count(*) FROM features WHERE sae = ?", [SAE]
    ).fetchall()
    assert f"{dead} of {width} features are dead" in text
    [(l0,)] = con.execute("SELECT measured_l0 FROM saes WHERE sae = ?", [SAE]).fetchall()
    assert f"{figure(l0)} measured" in text
    top = con.execute(
        "SELECT feature, n_tokens, density, mean_active, max FROM features WHERE sae = ? "
        "ORDER BY abs(max) DESC NULLS LAST, feature LIMIT 5",
        [SAE],
    ).fetchall()
    rows = re.findall(r"<tr><td.*?</tr>", page, re.DOTALL)
    assert len(rows) == 5
    for row, (feature, n_tokens, density, mean, highest) in zip(rows, top, strict=True):
        cells = re.findall(r'<td class="n">(.*?)</td>', row)
        assert re.sub("<.*?>", "", cells[0]) == str(feature)
        assert cells[1:3] == [figure(density), figure(n_tokens)]
        assert [cells[4], cells[6]] == [figure(mean), figure(highest)]
    assert [int(n) for n in re.findall(r"<h2>Feature (\d+)", page)] == [row[0] for row in top]


def test_tokens_are_shaded_and_their_values_are_titles(page: str, tiny_index: Path) -> None:
    con = queries.connect(str(tiny_index))
    [feature] = re.findall(r"<h2>Feature (\d+)", page)[:1]
    section = page.split(f"<h2>Feature {feature}")[1].split("</section>")[0]
    highest = con.execute(
        "SELECT activation FROM top_contexts WHERE sae = ? AND feature = ? AND rank <= 3 ORDER BY rank",
        [SAE, int(feature)],
    ).fetchall()
    contexts = section.split("<li>")[1:]
    assert len(contexts) == len(highest) == 3
    for context, (activation,) in zip(contexts, highest, strict=True):
        assert re.search(rf'class="t p\d+[^"]* peak" title="{re.escape(format(activation, ".4g"))}"', context)
    assert 'class="t p20 half peak"' in contexts[0]


def test_a_report_needs_nothing_but_itself(page: str) -> None:
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in page
    assert "<script" not in page
    assert not re.search(r'(src|href|action)="(?!#)', page.replace("xmlns", "")), "something is fetched"
    assert "url(" not in page
    assert "@import" not in page
    found = look(page)
    assert not found.problems
    for link in found.links:
        assert link.removeprefix("#") in found.ids
    assert page.count("<svg") == 2 + 5
    assert found.headings[0] == 1


def test_features_by_name_dead_ones_and_repeats(tiny_index: Path, tmp_path: Path) -> None:
    other = "tiny-att/layer_3/width_50/average_l0_5"
    listed = tmp_path / "list.txt"
    listed.write_text(f"{SAE}:{DEAD}\n\n{other}:3\n{SAE}:{DEAD}\n")
    done = run(
        tiny_index, "-o", tmp_path / "a.html", "--feature", "average_l0_2:0", "--features", listed, "-k", 2
    )
    assert done.exit_code == 0, done.output
    assert done.stderr.startswith("3 features with ")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    heads = re.findall(r"<h2>Feature (\d+) <small>(.*?)</small>", page)
    assert heads == [("0", SAE), (str(DEAD), SAE), ("3", other)]
    assert page.count("Dead: active on no token.") == 1
    assert "features by" not in page
    assert not look(page).problems


def test_a_page_that_grows_too_large_says_what_it_leaves_out(tiny_index: Path) -> None:
    made = report([str(tiny_index)], Wanted(SAE, limit=6, contexts=4), most_bytes=1)
    assert made.cut == 5
    assert "5 of 6 features are without their contexts" in made.html
    assert made.html.count("Its contexts are left out") == 5
    assert made.html.count("<ol") == 1


def test_more_than_can_be_drawn_is_counted_in_cells(
    page: str, tiny_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import queries.explorer.report as room

    marks = page.split("<svg")[1].count("role-mark")
    monkeypatch.setattr(room, "_DRAWN", 10)
    seen: list[Any] = []
    before = room.feature_map
    monkeypatch.setattr(room, "feature_map", lambda *given: seen.append(given) or before(*given))
    html = report([str(tiny_index)], Wanted(SAE, limit=2, contexts=0)).html
    [(points, cells, marked)] = seen
    con = queries.connect(str(tiny_index))
    live = con.execute("SELECT count(*) FROM features WHERE sae = ? AND n_tokens > 0", [SAE]).fetchall()
    assert [(sum(cell["features"] for cell in cells),)] == live
    assert {point["feature"] for point in points} == marked
    assert html.split("<svg")[1].count("role-mark") == marks


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "the index has 7 SAEs; --sae chooses one"),
        (("--sae", "nothing"), "names no SAE"),
        (("--feature", "average_l0_2"), "SAE:N is wanted"),
        (("--feature", "average_l0_2:-1"), "SAE:N is wanted"),
        (("--feature", "average_l0_2:37"), "has features 0 to 36, not 37"),
        (("--sae", SAE, "--sort", "nothing"), "no column 'nothing'"),
    ],
)
def test_what_is_not_there_is_said_in_a_line(
    arguments: tuple[str, ...], words: str, tiny_index: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=re.escape(words)) as refused:
        CliRunner().invoke(
            cli,
            ["report", str(tiny_index), "-o", str(tmp_path / "x.html"), *arguments],
            catch_exceptions=False,
        )
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_at_once_or_not_at_all(
    few_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jobs.report as room

    target = tmp_path / "r.html"
    target.write_text("before")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room.os, "replace", full)
    done = CliRunner().invoke(
        cli, ["report", str(few_index), "-o", str(target), "--feature", "average_l0_1:1"]
    )
    assert isinstance(done.exception, OSError)
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]
    monkeypatch.undo()
    assert run(few_index, "-o", target, "--feature", "average_l0_1:1").exit_code == 0
    assert target.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [target]


def test_without_the_extra_it_says_what_to_install(
    few_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(InputError, match=r"pip install 'corpuscope\[explore\]'"):
        CliRunner().invoke(cli, ["report", str(few_index), "-o", str(tmp_path / "x")], catch_exceptions=False)


def test_annotations_are_shown(tiny_index: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_index, tmp_path / "index")
    words = tmp_path / "words.csv"
    words.write_text(f"sae,feature,description\n{SAE},0,{hostile.ACTS[0]}\n", encoding="utf-8")
    done = CliRunner().invoke(cli, ["annotate", str(tmp_path / "index"), "--explanations", str(words)])
    assert done.exit_code == 0, done.output
    html = report([str(tmp_path / "index")], Wanted(features=[(SAE, 0)], contexts=1)).html
    found = look(html)
    assert not found.problems
    assert hostile.ACTS[0] in found.text
    con = queries.connect(str(tmp_path / "index"))
    near = con.execute(
        "SELECT other_feature FROM feature_neighbours WHERE sae = ? AND feature = 0 AND rank = 1", [SAE]
    ).fetchall()
    assert near
    assert f"<dt>decoder like</dt><dd>{near[0][0]}" in html
    assert "promotes" in found.text


def test_nothing_hostile_gets_through(hostile_index: hostile.Hostile) -> None:
    tokens = ""
    con = queries.connect(str(hostile_index.index))
    for sae in hostile_index.saes:
        live = con.execute(
            "SELECT feature FROM top_contexts JOIN contexts USING (context) JOIN vocabulary "
            "ON list_contains(tokens, token) WHERE sae = ? AND text IN (SELECT unnest(?)) "
            "GROUP BY feature ORDER BY max(length(text)) DESC, feature",
            [sae, list(hostile.TOKENS)],
        ).fetchall()
        assert live
        chosen = [(sae, feature) for (feature,) in live[:12]]
        html = report([str(hostile_index.index)], Wanted(sae, chosen, limit=5, contexts=4)).html
        found = look(html)
        assert not found.problems
        assert "3703701" not in found.text
        assert hostile.shown(sae) in found.text
        assert hostile.shown(sae).replace("\n", " ") in found.title
        assert len(html) < 8_000_000
        assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)
        tokens += found.tokens
    assert f"… {hostile.LONG - 2000:,} characters more" in tokens
    for token in hostile.TOKENS[1:]:
        assert hostile.shown(token) in tokens
