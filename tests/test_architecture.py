"""The rooms: who may import whom, what may be missing, what starts fast."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("sae_runtime", "pipelines", "queries", "jobs")
MAY_IMPORT = {
    "sae_runtime": {"sae_runtime"},
    "pipelines": {"pipelines", "sae_runtime"},
    "queries": {
        "queries",
        "pipelines.audit",
        "pipelines.contents",
        "pipelines.findings",
        "pipelines.names",
        "pipelines.schema",
        "pipelines.storage",
        "pipelines.summary",
        "sae_runtime.errors",
        "sae_runtime.terminal",
    },
    "jobs": set(ROOMS),
}


def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    found = {}
    for room in ROOMS:
        for file in sorted((ROOT / room).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imports(file: Path, top_only: bool = False) -> Iterator[str]:
    """Dotted names that a module imports; `from a import b` gives a.b where that is a module, else a."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in _statements(tree) if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in MODULES else str(node.module)


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported: not the insides of functions, nor of TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _statements(node)


def within(name: str, allowed: str) -> bool:
    return name == allowed or name.startswith(f"{allowed}.")


@pytest.mark.parametrize("name", MODULES)
def test_a_room_imports_only_the_rooms_below_it(name: str) -> None:
    room = name.split(".")[0]
    for wanted in imports(MODULES[name]):
        if wanted.split(".")[0] in ROOMS:
            assert any(within(wanted, allowed) for allowed in MAY_IMPORT[room]), f"{name} imports {wanted}"


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        name: {wanted for wanted in imports(file, top_only=True) if wanted in MODULES and wanted != name}
        for name, file in MODULES.items()
    }
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for wanted in graph[name]:
                walk(wanted, [*path, name])
            done.add(name)

    for name in graph:
        walk(name, [])


@pytest.mark.parametrize("name", MODULES)
def test_ray_and_duckdb_stay_in_their_rooms(name: str) -> None:
    packages = {wanted.split(".")[0] for wanted in imports(MODULES[name])}
    if "ray" in packages:
        inside = ("pipelines.executors.ray", "pipelines.executors.metrics", "jobs", "pipelines.scan")
        assert any(within(name, each) for each in inside)
    if name == "pipelines.scan":  # it may end a cluster that it started, and only that
        assert "ray" not in {wanted.split(".")[0] for wanted in imports(MODULES[name], top_only=True)}
    if "duckdb" in packages:
        assert within(name, "queries")
    if within(name, "queries"):
        assert "torch" not in packages


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is(name: str) -> None:
    assert ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8")))


def python(code: str, *args: str) -> str:
    """What a fresh interpreter prints; it must end well."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_reading_commands_start_without_torch_and_ray() -> None:
    python(
        """
        import sys
        import queries, queries.lookup, queries.show, jobs.cli, pipelines.status, pipelines.words
        slow = {"torch", "ray", "transformers", "numba"} & set(sys.modules)
        assert not slow, slow
        """
    )


def test_an_inline_scan_needs_neither_ray_nor_duckdb(
    tmp_path: Path, write_spec: Callable[..., Path], tiny_corpus: Path
) -> None:
    one = {"uri": str(tiny_corpus / "part_00.jsonl")}
    spec = write_spec(tmp_path, corpus=one)
    out = python(
        """
        import sys
        from importlib.abc import MetaPathFinder

        class Blocker(MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name.split(".")[0] in ("ray", "duckdb"):
                    raise ImportError(f"{name} is blocked")

        sys.meta_path.insert(0, Blocker())
        import pkgutil, sae_runtime
        for module in pkgutil.walk_packages(sae_runtime.__path__, "sae_runtime."):
            __import__(module.name)
        sys.argv = ["corpuscope", "scan", sys.argv[1], "--executor", "inline"]
        from jobs.cli import main
        try:
            main()
        except SystemExit as end:
            print("exit", end.code)
        """,
        str(spec),
    )
    assert out == "exit 0\n"
    assert list((tmp_path / "index" / "commits").rglob("*.json"))


def test_without_ray_the_default_executor_says_what_to_do(
    tmp_path: Path, write_spec: Callable[..., Path], tiny_corpus: Path
) -> None:
    out = python(
        """
        import sys
        sys.modules["ray"] = None
        sys.argv = ["corpuscope", "scan", sys.argv[1]]
        sys.stderr = sys.stdout
        from jobs.cli import main
        try:
            main()
        except SystemExit as end:
            print("exit", end.code)
        """,
        str(write_spec(tmp_path, corpus={"uri": str(tiny_corpus / "part_00.jsonl")})),
    )
    assert "Ray is not installed" in out
    assert out.endswith("exit 2\n")
    assert not (tmp_path / "index").exists()
