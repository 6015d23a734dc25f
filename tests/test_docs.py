"""The documents say what the code does: commands, views, dependencies and the README's spec."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

import queries
from jobs.cli import cli
from pipelines.spec import ScanSpec
from queries.lookup import rows, select

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_the_readme_shows_every_command_and_each_has_help(command):
    assert f"corpuscope {command} " in README
    assert cli.commands[command].help


def test_the_readme_names_every_view_and_macro():
    views = re.findall(r"CREATE VIEW ([a-z]\w*)", (ROOT / "queries/views.sql").read_text())
    macros = re.findall(r"CREATE MACRO ([a-z]\w*)", (ROOT / "queries/macros.sql").read_text())
    assert len(views) >= 12
    assert len(macros) >= 3
    for name in (*views, *macros):
        assert f"`{name}" in README, name


def test_the_readmes_spec_is_a_spec():
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    specs = [ScanSpec.model_validate(yaml.safe_load(block)) for block in blocks]
    assert [spec.context.length for spec in specs] == [1024]


def test_every_dependency_earns_its_line():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = list(project["project"]["dependencies"])
    for extra in project["project"]["optional-dependencies"].values():
        wanted += extra
    page = (ROOT / "docs/DEPENDENCIES.md").read_text()
    for requirement in [*wanted, *project["dependency-groups"]["dev"]]:
        name = re.match(r"[A-Za-z0-9-]+", requirement)[0]
        assert re.search(rf"\b{re.escape(name)}\b", page), name


def test_every_link_of_the_documents_leads_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)\)", prose):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


# --- examples of docs/QUERIES.md, on the tiny indexes under the names that the page uses

SHOWN_SAE, TINY_SAE = (
    "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
    "tiny-res/layer_1/width_130/average_l0_13",
)


def examples(page: str) -> list[tuple[str, str]]:
    """(language, text) of each example of a page under docs/; shell examples are cut into commands."""
    found = re.findall(r"```(python|sql|sh)\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    cut = [(kind, [text] if kind != "sh" else text.strip().splitlines()) for kind, text in found]
    return [(kind, each.replace(SHOWN_SAE, TINY_SAE)) for kind, texts in cut for each in texts]


@pytest.fixture(scope="module")
def at_home(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_index: Path,
    write_spec: Any,
    scan_inline: Any,
    tiny_suites: Path,
) -> Path:
    """A folder with out/index, and out/more of another SAE."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "out").mkdir()
    (folder / "out" / "index").symlink_to(tiny_index)
    with np.load(next((tiny_suites / "tiny-res").rglob("params.npz"))) as archive:
        tensors = {name: archive[name] * (2 if name == "b_enc" else 1) for name in archive.files}
    (folder / "more-res" / "layer_1" / "width_37" / "average_l0_3").mkdir(parents=True)
    np.savez(folder / "more-res" / "layer_1" / "width_37" / "average_l0_3" / "params.npz", **tensors)
    spec = write_spec(folder, saes=[{"uri": str(folder / "more-res")}], index="out/more")
    assert not scan_inline(spec).failed
    return folder


@pytest.mark.parametrize(("kind", "text"), examples("QUERIES.md"))
def test_the_examples_of_queries_run(
    kind: str, text: str, at_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(at_home)
    if kind == "python":
        exec(compile(text, "QUERIES.md", "exec"), {})
    elif kind == "sql":
        assert list(rows(select(queries.connect("out/index"), text)))
    else:
        program, *arguments = shlex.split(text)
        assert program == "corpuscope"
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 0, done.output
        assert done.output
