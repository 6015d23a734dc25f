"""EleutherAI sparsify: what a hookpoint's path says, what makes a transcoder, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import sparsify
from safetensors.torch import load_file, save_file

from sae_runtime import suites
from sae_runtime.errors import InputError
from sae_runtime.sites import Site

D, M = 6, 16


def one(folder: Path, path: str = "layers.2", **how: Any) -> Path:
    sparsify.one(folder, np.random.default_rng(5), D, M, 2, path, **how)
    return folder


def changed(file: Path, **other: Any) -> None:
    """A cfg.json with keys replaced; None removes one."""
    said = {**json.loads(file.read_text()), **other}
    file.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))


@pytest.mark.parametrize(
    ("path", "site"),
    [
        ("layers.2", Site(2, "resid_post")),
        ("model.layers.11", Site(11, "resid_post")),
        ("gpt_neox.layers.3.attention.dense", Site(3, "attention.dense.output")),
        ("transformer.h.4.mlp", Site(4, "mlp.output")),
        ("layers.2/seed12", Site(2, "resid_post")),
        ("run/layers.2.mlp", Site(2, "mlp.output")),
        ("model.embed_tokens", Site(0, "embed")),
    ],
)
def test_a_hookpoint_is_a_module_whose_output_is_read(tmp_path: Path, path: str, site: Site) -> None:
    (info,) = suites.find(str(one(tmp_path, path)))
    assert (info.site, info.out, info.path) == (site, site, path)


@pytest.mark.parametrize("path", ["layers.2", "layers.2/seed1"])
def test_a_hookpoints_own_folder_is_a_suite(tmp_path: Path, path: str) -> None:
    (info,) = suites.find(str(one(tmp_path, path) / path))
    assert (info.site, info.path) == (Site(2, "resid_post"), "")
    suites.load(info)


@pytest.mark.parametrize(
    ("cfg", "run", "suite", "transcoder"),
    [
        ({}, None, "some", False),
        ({}, None, "skip-transcoder-some", True),
        ({"skip_connection": True}, None, "some", True),
        ({}, {"transcode": True}, "some", True),
        ({"transcode": False}, None, "transcoder-some", False),
        ({"transcode": True}, None, "some", True),
    ],
)
def test_what_makes_a_transcoder(
    tmp_path: Path, cfg: dict[str, Any], run: dict[str, Any] | None, suite: str, transcoder: bool
) -> None:
    folder = one(tmp_path / "transcoders" / suite, "layers.2.mlp")  # a folder above is no sign
    changed(folder / "layers.2.mlp/cfg.json", **cfg)
    if cfg.get("skip_connection"):
        file = folder / "layers.2.mlp/sae.safetensors"
        save_file({**load_file(file), "W_skip": torch.zeros(D, D)}, file)
    if run is not None:
        (folder / "config.json").write_text(json.dumps(run))
    (info,) = suites.find(str(folder))
    assert info.site == Site(2, "mlp_in" if transcoder else "mlp.output")
    assert info.out == Site(2, "mlp.output")
    loaded = suites.load(info)
    # The subtraction follows the key alone: early transcoders were trained with it.
    assert (loaded.b_pre is None) == (cfg.get("transcode") is True)
    assert loaded.restore == (not transcoder)


def test_the_nearest_runs_config_gives_the_model(tmp_path: Path) -> None:
    for run in ("a", "b"):
        one(tmp_path / run)
        (tmp_path / run / "config.json").write_text(json.dumps({"model": f"org/{run}"}))
    one(tmp_path / "c")
    (tmp_path / "config.json").write_text(json.dumps({"model": "org/top"}))
    models = {info.path: info.trained_on for info in suites.find(str(tmp_path))}
    assert models == {"a/layers.2": "org/a", "b/layers.2": "org/b", "c/layers.2": "org/top"}


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"activation": "groupmax", "k": 3}, "k 3 in .* does not divide the 16 features"),
        ({"activation": "batchtopk"}, "activation 'batchtopk' in .* known are"),
        ({"activation": "groupmax", "signed": True}, "'groupmax' with signed"),
        ({"d_in": M}, "has 6 inputs, but .* d_in 16"),
        ({"k": None}, "no k in"),
        ({"k": "32"}, "'32', not a number"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, cfg: dict[str, Any], message: str) -> None:
    changed(one(tmp_path) / "layers.2/cfg.json", **cfg)
    with pytest.raises(InputError, match=message):
        suites.find(str(tmp_path))


def test_a_missing_cfg_is_named(tmp_path: Path) -> None:
    (one(tmp_path) / "layers.2/cfg.json").unlink()
    with pytest.raises(InputError, match=r"layers\.2/cfg\.json"):
        suites.find(str(tmp_path))


def test_a_folder_that_is_no_module_says_no_site(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"saes\.site: nothing says which layer .*something/"):
        suites.find(str(one(tmp_path, "something")))


def test_a_file_without_a_decoder_is_refused(tmp_path: Path) -> None:
    file = one(tmp_path) / "layers.2/sae.safetensors"
    save_file({key: t for key, t in load_file(file).items() if key != "W_dec"}, file)
    (info,) = suites.find(str(tmp_path))
    with pytest.raises(InputError, match=r"no decoder\.weight in"):
        suites.load(info)


def test_a_square_decoder_is_not_transposed_by_its_shape(tmp_path: Path) -> None:
    sparsify.one(tmp_path, np.random.default_rng(5), D, D, 2, "layers.2")
    sparsify.one(tmp_path, np.random.default_rng(5), D, D, 2, "layers.3", old=True)
    new, old = (suites.load(info).W_dec for info in suites.find(str(tmp_path)))
    assert new is not None
    assert old is not None
    assert torch.equal(new, old)
    assert torch.equal(new, load_file(tmp_path / "layers.2/sae.safetensors")["W_dec"])
