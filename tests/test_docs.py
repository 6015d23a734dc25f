"""The documents say what the code does: commands, views, dependencies and the README's spec."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from jobs.cli import cli
from pipelines.spec import ScanSpec

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
