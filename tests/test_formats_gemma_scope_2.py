"""Gemma Scope 2: hooks outrank folders, old model names, decoders left unread, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published import gemma_scope_2, gemma_scope_2_sets
from safetensors.numpy import save_file

from sae_runtime import suites
from sae_runtime.errors import InputError
from sae_runtime.sites import Site

NAME = "gemma-scope-2-1b-pt"
HOOK = "model.layers.7.output"


def one(
    root: Path, path: str = "resid_post/layer_7_width_16k_l0_small", file: str = "params.safetensors",
    config: dict[str, Any] | None = None, drop: tuple[str, ...] = (), **more: np.ndarray,
) -> str:  # fmt: skip
    """A suite of one tiny SAE; `config` replaces keys of a published one, None writes none."""
    place = root / path
    place.mkdir(parents=True)
    tensors = {
        "w_enc": np.ones((2, 3)), "b_enc": np.zeros(3), "threshold": np.ones(3), "w_dec": np.ones((3, 2)),
        "b_dec": np.zeros(2), **more,
    }  # fmt: skip
    kept = {key: value.astype(np.float32) for key, value in tensors.items() if key not in drop}
    save_file(kept, place / file)
    if config is not None:
        said = {**json.loads(gemma_scope_2.config("sae", HOOK, HOOK, 3, 12)), **config}
        (place / "config.json").write_text(
            json.dumps({key: value for key, value in said.items() if value is not ...})
        )
    return str(root)


def test_the_hook_outranks_the_folder(tmp_path: Path) -> None:
    hook = "model.layers.3.self_attn.o_proj.input"
    uri = one(tmp_path / NAME, config={"hf_hook_point_in": hook, "hf_hook_point_out": hook})
    (info,) = suites.find(uri)
    assert info.site == info.out == Site(3, "attn_z")


def test_a_key_that_the_config_lacks_is_read_from_the_folder(tmp_path: Path) -> None:
    uri = one(tmp_path / NAME, config={"hf_hook_point_in": ..., "hf_hook_point_out": None, "model_name": ...})
    (info,) = suites.find(uri)
    assert info.site == info.out == Site(7, "resid_post")
    assert info.trained_on == "google/gemma-3-1b-pt"


@pytest.mark.parametrize(
    ("suite", "model", "trained_on"),
    [
        ("copy", "google/gemma-3-12b-it", "google/gemma-3-12b-it"),
        ("copy", "gemma-v3-12b-it", "google/gemma-3-12b-it"),
        ("copy", "google/gemma-v3-4b-pt", "google/gemma-3-4b-pt"),
        ("copy", "google/gemma-3-270m-pt", "google/gemma-3-270m"),
        ("copy", "gemma-3-270m", "google/gemma-3-270m"),
        ("copy", "gemma-3-270m-it", "google/gemma-3-270m-it"),
        ("gemma-scope-2-27b-it", "gemma-v3-27b", "google/gemma-3-27b-it"),
        ("copy", "gemma-v3-27b", None),  # it or pt is not said
        ("gemma-scope-2-27b-it", "someone/tuned", "someone/tuned"),
        ("copy", "", None),
        ("gemma-scope-2-270m-pt", "", "google/gemma-3-270m"),
    ],
)
def test_models_have_the_id_of_the_hub(
    tmp_path: Path, suite: str, model: str, trained_on: str | None
) -> None:
    (info,) = suites.find(one(tmp_path / suite, config={"model_name": model}))
    assert info.trained_on == trained_on


def test_a_folder_of_the_repository_is_a_suite_too(tmp_path: Path) -> None:
    one(tmp_path / NAME, "mlp_out_all/layer_5_width_262k_l0_big")
    (info,) = suites.find(str(tmp_path / NAME / "mlp_out_all"))
    assert info.id == "mlp_out_all/layer_5_width_262k_l0_big"
    assert (info.site, info.trained_on) == (Site(5, "mlp_out"), "google/gemma-3-1b-pt")
    assert info.nominal_l0 is None  # a label is not a number


def test_only_two_kinds_of_folders_have_pages(tmp_path: Path) -> None:
    folders = {
        "resid_post/layer_7_width_65k_l0_medium": "gemma-3-1b/7-gemmascope-2-res-65k",
        "resid_post_all/layer_7_width_65k_l0_medium": None,
        "resid_post/layer_7_width_65k_l0_big": None,
        "resid_post/layer_7_width_65k_l0_medium_seed_1": None,
        "transcoder_all/layer_7_width_16k_l0_small": None,
        "attn_out/layer_7_width_65k_l0_medium": None,
    }
    for folder in folders:
        one(tmp_path / NAME, folder)
    one(tmp_path / NAME, "transcoder_all/layer_7_width_16k_l0_small_affine", affine_skip_connection=np.eye(2))
    folders["transcoder_all/layer_7_width_16k_l0_small_affine"] = "gemma-3-1b/7-gemmascope-2-transcoder-16k"
    assert {sae.path: sae.neuronpedia for sae in suites.find(str(tmp_path / NAME))} == folders


def test_examples_are_no_saes_and_a_set_is_read_without_its_decoders(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    gemma_scope_2.write(tmp_path / "a", rng, 6, 16, 5, 2)  # whose examples.safetensors are not safetensors
    named = {file.rsplit("/", 1)[1] for sae in suites.find(str(tmp_path / "a")) for file in sae.files}
    assert named == {"params.safetensors", "config.json"}
    gemma_scope_2_sets.write(tmp_path / "b", rng, 6, 16, 5, 2)
    found = suites.find(str(tmp_path / "b"))
    assert len(found) == 3 + 3 + 4
    for info in found:
        assert (info.out, sorted(suites.load(info).tensors())) == (None, ["W_enc", "b_enc", "threshold"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "somewhere"}, "no config.json with a type beside it, and its folder is not named"),
        ({"config": {"type": "lorsa"}}, "type 'lorsa' .* known are sae, transcoder, clt, crosscoder"),
        ({"config": {"architecture": "topk"}}, "architecture 'topk' .* is jump_relu"),
        ({"config": {"hf_hook_point_in": "model.norm.output"}}, "hf_hook_point_in .* 'model.norm.output'"),
        ({"config": {"type": "clt"}}, "type 'clt' .* does not go with that file's name"),
        (
            {"config": {"type": "sae"}, "file": "params_layer_0.safetensors"},
            "does not go with that file's name",
        ),
        (
            {
                "config": {"type": "crosscoder", "hf_hook_point_in": "model.layers.{7,9}.output"},
                "file": "params_layer_2.safetensors",
            },
            r"hf_hook_point_in .*\{7,9\}.* names no place",
        ),
        (
            {"path": "transcoder/layer_7_width_16k_l0_small_affine"},
            "affine SAE by its config or folder, but has no affine_skip_connection",
        ),
        ({"affine_skip_connection": np.eye(2)}, "affine_skip_connection .* only transcoders"),
        ({"drop": ("w_enc",)}, "no tensor w_enc"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        suites.find(one(tmp_path / NAME, **arguments))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("key", ["b_enc", "threshold", "w_dec", "b_dec"])
def test_a_missing_tensor_is_named(tmp_path: Path, key: str) -> None:
    (info,) = suites.find(one(tmp_path / NAME, drop=(key,)))
    with pytest.raises(InputError, match=f"no {key} in .*params.safetensors"):
        suites.load(info)
