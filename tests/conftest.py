"""Fixtures: the tiny world of tests/tiny.py, specs over it, and scans of it in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import families
import hostile
import tiny
import yaml

from sae_runtime.cache import cache_dir


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Converted models go to this session's folder, so that a test sees no earlier one's.

    Compiled loops, which are named after their sources, stay where they are: each new process that found
    none would compile for 15 s.
    """
    before, own = os.environ.get("CORPUSCOPE_CACHE"), tmp_path_factory.mktemp("cache")
    loops = cache_dir() / "numba"
    loops.mkdir(parents=True, exist_ok=True)
    (own / "numba").symlink_to(loops.absolute(), target_is_directory=True)
    os.environ["CORPUSCOPE_CACHE"] = str(own)
    yield
    os.environ.pop("CORPUSCOPE_CACHE")
    if before is not None:
        os.environ["CORPUSCOPE_CACHE"] = before


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`models(family)` is the directory of a random model of the family (tests/families)."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = families.make(family, tmp_path_factory.mktemp("families") / family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random Gemma 2 whose tokenizer adds <bos>."""
    return tiny.make_model(tmp_path_factory.mktemp("model") / "tiny-gemma-2")


@pytest.fixture(scope="session")
def tiny_model_no_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a tokenizer that adds nothing."""
    return tiny.make_model(tmp_path_factory.mktemp("model") / "tiny-gemma-2-no-bos", bos=False)


@pytest.fixture(scope="session")
def tiny_suites(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Folder that holds the suites tiny-res, tiny-mlp and tiny-att."""
    return tiny.make_suites(tmp_path_factory.mktemp("suites"), tiny_model)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 24 jsonl files with columns id, text, lang, score, even. Read only: copy to change."""
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def write_spec(tiny_model: Path, tiny_suites: Path, tiny_corpus: Path) -> Callable[..., Path]:
    """`write_spec(folder, **overrides)` writes folder/spec.yaml and returns its path.

    Mappings in `overrides` are merged into the default's (`model={"dtype": "bfloat16"}`), other values
    replace it. The default scans the tiny corpus with every tiny SAE in float32 into folder/index.
    """

    def write(folder: Path, **overrides: Any) -> Path:
        spec: dict[str, Any] = {
            "corpus": {
                "name": "tiny",
                "uri": f"{tiny_corpus}/*.jsonl",
                "id": "id",
                "metadata": ["lang", "score", "even"],
            },
            "model": {"uri": str(tiny_model), "dtype": "float32", "device": "cpu", "threads": 1},
            "saes": [{"uri": str(tiny_suites / suite)} for suite in tiny.SUITES],
            "context": {"length": 96},
            "top_k": 4,
            "sample_k": 3,
            "index": "index",
        }
        for key, value in overrides.items():
            merge = isinstance(value, dict) and isinstance(spec.get(key), dict)
            spec[key] = {**spec[key], **value} if merge else value
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "spec.yaml"
        file.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="session")
def scan_inline() -> Callable[..., Any]:
    """`scan_inline(spec_path, index=None, observe=…)` scans in this process and returns the Outcome."""
    from jobs.specfile import load_spec
    from pipelines.scan import ScanOptions, run_scan

    def scan(
        spec: Path,
        index: str | None = None,
        observe: Callable[[Any], None] = lambda event: None,
        notice: Callable[[str], None] = lambda text: None,
        allow_removal: bool = False,
    ) -> Any:
        loaded, text = load_spec(str(spec), index)
        options = ScanOptions(executor="inline", allow_removal=allow_removal)
        return run_scan(loaded, text, options, observe, notice)

    return scan


@pytest.fixture(scope="session")
def tiny_index(
    tmp_path_factory: pytest.TempPathFactory, write_spec: Callable[..., Path], scan_inline: Callable[..., Any]
) -> Path:
    """The index of the default spec, scanned once. Read only."""
    spec = write_spec(tmp_path_factory.mktemp("scan"))
    outcome = scan_inline(spec)
    assert not outcome.failed
    return spec.parent / "index"


@pytest.fixture(scope="session")
def few(tiny_suites: Path) -> list[dict[str, str]]:
    """`saes` of a spec: a seventh of the rows, for tests of histories, in which each SAE has the same one."""
    return [{"uri": str(tiny_suites / "tiny-att")}]


@pytest.fixture(scope="session")
def few_index(
    tmp_path_factory: pytest.TempPathFactory,
    write_spec: Callable[..., Path],
    scan_inline: Callable[..., Any],
    few: list[dict[str, str]],
) -> Path:
    """The index of the default corpus and two SAEs, scanned once. Read only."""
    spec = write_spec(tmp_path_factory.mktemp("few"), saes=few)
    assert not scan_inline(spec).failed
    return spec.parent / "index"


@pytest.fixture(scope="session")
def hostile_index(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    tiny_suites: Path,
    write_spec: Callable[..., Path],
    scan_inline: Callable[..., Any],
) -> hostile.Hostile:
    """An index whose every text and name means harm (tests/hostile.py), scanned once. Read only."""
    return hostile.make(tmp_path_factory.mktemp("harm"), tiny_model, tiny_suites, write_spec, scan_inline)
