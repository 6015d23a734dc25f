"""What a scan says against itself: wrong models, wrong sites, duplicates; and that right ones are silent."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import queries
from pipelines.selfcheck import Measured, complaints, same_model
from queries.lookup import resolve_sae
from sae_runtime.sae import SaeInfo
from sae_runtime.sites import Site


def info(name: str, nominal: float | None) -> SaeInfo:
    site = Site(1, "resid_post")
    return SaeInfo(name, "s", name, "gemma_scope", ("f",), site, site, "jumprelu", 4, 8, nominal, None, "")


@pytest.mark.parametrize(
    ("nominal", "active", "fvu", "words"),
    [
        (50.0, 100_000, 0.3, None),  # exactly twice is not more than twice
        (50.0, 100_100, 0.3, "L0 is 100.1, nominally 50"),
        (50.0, 24_900, 0.3, "L0 is 24.9, nominally 50"),
        (50.0, 0, None, "L0 is 0, nominally 50"),
        (None, 500_000, 0.99, None),
        (None, 500_000, 1.5, "worse than the mean would be (FVU 1.5)"),
    ],
)
def test_a_factor_of_two_is_told(nominal: float | None, active: int, fvu: float | None, words: str) -> None:
    told = complaints([info("a", nominal)], [Measured("a", 1000, active, fvu)])
    assert bool(told) == (words is not None)
    if words is not None:
        assert words in told[0]
        assert all(line.startswith("warning: ") for line in told)
        assert all(cause in told[-1] for cause in ("site", "BOS", "model"))


def test_few_tokens_say_nothing_and_many_saes_are_summed_up() -> None:
    assert complaints([info("a", 50.0)], [Measured("a", 255, 0, 9.0)]) == []
    saes = [info(f"a{i}", 50.0) for i in range(9)]
    told = complaints(saes, [Measured(sae.id, 1000, 0, None) for sae in saes])
    assert len(told) == 5 + 1 + 1
    assert "4 more" in told[5]


@pytest.mark.parametrize(
    ("trained_on", "uri", "same"),
    [
        ("google/gemma-2-2b", "google/gemma-2-2b", True),
        ("google/gemma-2-2b", "google/gemma-2-2b-it", False),
        ("google/gemma-2-2b", "/models/gemma-2-2b/", True),
        ("google/gemma-2-2b", "google/gemma-2-9b", False),
        ("google/gemma-3-270m-pt", "google/gemma-3-270m", True),
        ("google/gemma-3-1b-it", "google/gemma-3-1b-pt", False),
        ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B", False),
        ("HuggingFaceTB/SmolLM2-135M", "x/SmolLM2-135M.Q4_1.gguf", True),
        ("HuggingFaceTB/SmolLM2-135M", "x/SmolLM2-135M-Instruct.Q4_1.gguf", False),
        ("google/gemma-2-2b", "/c/models--google--gemma-2-2b/snapshots/0123456789abcdef", True),
    ],
)
def test_models_are_told_apart_by_name(trained_on: str, uri: str, same: bool) -> None:
    assert same_model(trained_on, uri) is same


def test_a_suite_of_another_model_is_told_before_the_scan(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_suites: Path
) -> None:
    shutil.copytree(tiny_suites / "tiny-res", tmp_path / "gemma-scope-2b-pt-res")
    told: list[str] = []
    scan_inline(
        write_spec(tmp_path, saes=[{"uri": str(tmp_path / "gemma-scope-2b-pt-res")}], corpus={"limit": 2}),
        notice=told.append,
    )
    (line,) = [line for line in told if "was trained on" in line]
    assert "gemma-scope-2b-pt-res was trained on google/gemma-2-2b" in line


def test_thresholds_out_of_place_are_told_after_the_first_unit(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_suites: Path
) -> None:
    suite = tmp_path / "s-res"
    for l0, scale in ((40, 1.0), (6, 1.0)):
        file = suite / f"layer_3/width_1/average_l0_{l0}/params.npz"
        file.parent.mkdir(parents=True)
        tensors = tiny.load_sae(tiny_suites, "tiny-res/layer_3/width_130/average_l0_6")
        np.savez(file, **(tensors | {"b_dec": tensors["b_dec"] * scale + l0}))
    told: list[str] = []
    scan_inline(write_spec(tmp_path, saes=[{"uri": str(suite)}]), notice=told.append)
    off = [line for line in told if "nominally" in line]
    assert len(off) == 1
    assert "average_l0_40: L0 is" in off[0]


def test_equal_saes_are_scanned_once_and_found_by_either_name(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_suites: Path
) -> None:
    tensors = tiny.load_sae(tiny_suites, "tiny-res/layer_3/width_130/average_l0_6")
    for name, site in (("a", "resid_post"), ("b", "resid_post"), ("c", "mlp_out")):
        file = (
            tmp_path
            / f"{name}-{'mlp' if site == 'mlp_out' else 'res'}/layer_3/width_1/average_l0_6/params.npz"
        )
        file.parent.mkdir(parents=True)
        np.savez(file, **tensors)
    saes = [
        {"uri": str(tmp_path / "a-res"), "keep": "none"},
        {"uri": str(tmp_path / "b-res"), "keep": "tokens"},
        {"uri": str(tmp_path / "c-mlp")},
    ]
    told: list[str] = []
    spec = write_spec(tmp_path, saes=saes, corpus={"limit": 2})
    scan_inline(spec, notice=told.append)
    (line,) = [line for line in told if "same tensors" in line]
    assert line.startswith("note: a-res/layer_3/width_1/average_l0_6 has the same tensors as b-res/")
    con = queries.connect(str(spec.parent / "index"))
    kept = con.sql("SELECT sae, keep FROM saes ORDER BY sae").fetchall()
    # The one of which more is kept stays; the same tensors at another site are another SAE.
    assert kept == [
        ("b-res/layer_3/width_1/average_l0_6", "tokens"),
        ("c-mlp/layer_3/width_1/average_l0_6", "tokens"),
    ]
    assert resolve_sae(con, "a-res/layer_3/width_1/average_l0_6") == kept[0][0]
    assert not scan_inline(spec).items, "the same spec again is a no-op"
