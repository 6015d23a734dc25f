"""Llama Scope, its R1 suite and llamascopium 2: the other convention, what is refused, what is recognised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import llama_scope as scope
from published import llama_scope_r1 as r1
from published import llamascopium as scopium
from published import llamascopium_clt as clt
from safetensors.torch import load_file, save_file

from sae_runtime import reference, suites, weights
from sae_runtime.errors import InputError
from sae_runtime.formats import llama_scope, llama_scope_r1, llamascopium
from sae_runtime.tree import Tree, open_tree

D, M, LAYER = 6, 16, 2


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def changed(file: Path, **other: Any) -> None:
    """A config with keys replaced; None removes one."""
    said = {**json.loads(file.read_text()), **other}
    file.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))


# Llama Scope


def scope_suite(folder: Path) -> Path:
    scope.write(folder, rng(), D, M, M, LAYER)
    return folder


def test_the_other_convention_is_named_and_follows_from_the_activation(tmp_path: Path) -> None:
    suite, path = scope_suite(tmp_path / "lx"), f"Llama3_1-8B-Base-L{LAYER}R-8x"
    (info,) = suites.find(str(suite), select=[path])
    x = np.random.default_rng(7).normal(size=(300, D)) * 3
    f = reference.encode(torch.from_numpy(x), suites.load(info)).double().numpy()
    stored = {
        key: t.double().numpy()
        for key, t in load_file(suite / path / "checkpoints/final.safetensors").items()
    }
    s, n = np.sqrt(D) / scope.NORM, np.linalg.norm(stored["decoder.weight"], axis=0)
    p = (s * x) @ stored["encoder.weight"].T + stored["encoder.bias"]
    active = f > 0
    assert active.any()
    assert np.allclose((f * s / n)[active], p[active], rtol=1e-4)
    assert (active == (n * p > s * scope.THRESHOLD)).mean() > 0.999
    assert (active != (p > s * scope.THRESHOLD)).any(), "column norms that change nothing prove nothing"
    assert "p_j = f_j * s / n_j" in info.convention
    assert f"sqrt(d) / {scope.NORM}" in info.convention


def test_a_decoder_column_of_norm_zero_never_fires(tmp_path: Path) -> None:
    suite, path = scope_suite(tmp_path / "lx"), f"Llama3_1-8B-Base-L{LAYER}R-8x"
    file = suite / path / "checkpoints/final.safetensors"
    stored = load_file(file)
    stored["decoder.weight"][:, 3] = 0
    save_file(stored, file)
    (info,) = suites.find(str(suite), select=[path])
    f = reference.encode(torch.randn(500, D) * 5, suites.load(info))
    assert (f[:, 3] == 0).all()
    assert (f != 0).any()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"act_fn": "topk"}, "act_fn"),
        ({"norm_activation": "token-wise"}, "norm_activation"),
        ({"apply_decoder_bias_to_pre_encoder": True}, "apply_decoder_bias_to_pre_encoder"),
        ({"sparsity_include_decoder_norm": False}, "sparsity_include_decoder_norm"),
        ({"jump_relu_threshold": None}, "no jump_relu_threshold"),
        ({"jump_relu_threshold": "0.5"}, "'0.5', not a number"),
        ({"dataset_average_activation_norm": {"in": 3.0}}, "no out"),
        ({"dataset_average_activation_norm": {"in": 3.0, "out": [3.0]}}, "not a number"),
        ({"dataset_average_activation_norm": {"in": 0.0, "out": 3.0}}, "not an average norm"),
        ({"dataset_average_activation_norm": None}, "no dataset_average_activation_norm"),
        ({"d_model": M}, "d_model 16"),
        ({"hook_point_in": f"blocks.{LAYER}.hook_q"}, "hook_q"),
    ],
)
def test_llama_scope_that_is_not_as_published_is_refused(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    suite, path = scope_suite(tmp_path / "lx"), f"Llama3_1-8B-Base-L{LAYER}R-8x"
    changed(suite / path / "hyperparams.json", **other)
    with pytest.raises(InputError, match=message):
        suites.find(str(suite), select=[path])


def test_an_saes_own_folder_is_a_suite(tmp_path: Path) -> None:
    suite = scope_suite(tmp_path / "lx") / f"Llama3_1-8B-Base-L{LAYER}M-8x"
    (info,) = suites.find(str(suite))
    assert (info.id, info.site.kind) == (suite.name, "mlp_out")
    assert info.neuronpedia == f"llama3.1-8b/{LAYER}-llamascope-mlp-32k"
    suites.load(info)


# R1 and llamascopium 2: the same names of files


def test_r1_and_llamascopium_are_told_apart_by_keys(tmp_path: Path) -> None:
    r1.write(tmp_path, rng(), D, M, M, LAYER)
    scopium.write(tmp_path, rng(), D, M, M, LAYER)
    (tmp_path / f"0-Slimpajama-800M-OpenR1-Math-220k/L{LAYER}R").rename(tmp_path / "renamed")
    found = {info.path: info.format for info in suites.find(str(tmp_path))}
    assert found["renamed"] == found[f"800M-Slimpajama-0-OpenR1-Math-220k/L{LAYER}R"] == "llama_scope_r1"
    assert sum(name == "llamascopium" for name in found.values()) == len(scopium.VARIANTS)


def test_r1_without_hooks_reads_the_folders_letter(tmp_path: Path) -> None:
    wanted = r1.write(tmp_path, rng(), D, M, M, LAYER)[0]
    changed(tmp_path / wanted.path / "config.json", hook_point_in=None, hook_point_out=None)
    (info,) = suites.find(str(tmp_path), select=[wanted.path])
    assert (info.site.layer, info.site.kind, info.out) == (LAYER, "resid_post", info.site)


@pytest.mark.parametrize(
    ("other", "message"),
    [({"act_fn": "topk"}, "act_fn"), ({"norm_activation": "batch-wise"}, "norm_activation")],
)
def test_r1_of_another_formula_is_refused(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    wanted = r1.write(tmp_path, rng(), D, M, M, LAYER)[0]
    changed(tmp_path / wanted.path / "config.json", **other)
    with pytest.raises(InputError, match=message):
        suites.find(str(tmp_path), select=[wanted.path])


def test_r1_without_its_norm_is_refused(tmp_path: Path) -> None:
    wanted = r1.write(tmp_path, rng(), D, M, M, LAYER)[0]
    file = tmp_path / wanted.path / "sae_weights.safetensors"
    save_file({key: t for key, t in load_file(file).items() if "average" not in key}, file)
    with pytest.raises(InputError, match=r"no dataset_average_activation_norm\.in"):
        suites.find(str(tmp_path), select=[wanted.path])


def one(folder: Path, **how: Any) -> Path:
    """A suite with a llamascopium SAE; `how` changes its config afterwards."""
    scopium.one(folder, rng(), D, M, LAYER, "some/thing")
    changed(folder / "some/thing/config.json", **how)
    return folder


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"sae_type": "crosscoder"}, "crosscoder.*several layers at once"),
        ({"sae_type": "lorsa"}, "lorsa.*replaces attention"),
        ({"sae_type": "molt"}, "molt.*linear maps"),
        ({"sae_type": "other"}, "other.*known are"),
        ({"act_fn": "batchtopk"}, "batchtopk.*depend on its batch"),
        ({"act_fn": "batchlayertopk"}, "depend on its batch"),
        ({"act_fn": "layertopk"}, "those of the other layers"),
        ({"act_fn": "gelu"}, "known are relu, jumprelu, topk"),
        ({"norm_activation": "batch-wise"}, "batch-wise.*other tokens"),
        ({"norm_activation": None}, "norm_activation"),
        ({"sparsity_include_decoder_norm": None}, "no sparsity_include_decoder_norm"),
        ({"sparsity_include_decoder_norm": "yes"}, "not true or false"),
        ({"act_fn": "topk", "top_k": None}, "no top_k"),
        ({"act_fn": "topk", "top_k": 2.5}, "not a whole number"),
        ({"sae_type": "clt", "hook_points_in": "blocks.0.hook_resid_mid"}, "not a list of hooks"),
        (
            {"sae_type": "clt", "hook_points_in": ["a"], "hook_points_out": ["a", "b"]},
            "differ in length",
        ),
        ({"hook_point_in": "blocks.2.hook_resid_pre"}, r"average_activation_norm\.blocks\.2\.hook_resid_pre"),
        ({"d_model": M}, "d_model 16"),
    ],
)
def test_llamascopium_that_cannot_be_exact_is_refused(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        suites.find(str(one(tmp_path, **other)))


def test_an_average_norm_that_was_never_set_is_refused(tmp_path: Path) -> None:
    file = one(tmp_path) / "some/thing/sae_weights.safetensors"
    state = load_file(file)
    key = f"dataset_average_activation_norm.blocks.{LAYER}.hook_resid_post"
    save_file({**state, key: torch.zeros(())}, file)
    (info,) = suites.find(str(tmp_path))
    with pytest.raises(InputError, match="is 0, not an average norm"):
        suites.load(info)


def test_a_distributed_checkpoint_is_refused_with_a_remedy_unless_there_are_tensors_too(
    tmp_path: Path,
) -> None:
    folder = one(tmp_path) / "some/thing"
    (folder / "sae_weights.dcp").mkdir()
    (folder / "sae_weights.dcp/.metadata").write_bytes(b"x")
    (folder / "sae_weights.dcp/__0_0.distcp").write_bytes(b"x")
    assert suites.find(str(tmp_path))[0].uri.endswith(".safetensors")
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"sae_weights\.dcp is a distributed checkpoint.*sae_weights\.safetensors"
    ):
        suites.find(str(tmp_path))


def test_a_pt_file_without_sae_in_it_is_refused(tmp_path: Path) -> None:
    folder = one(tmp_path) / "some/thing"
    torch.save(load_file(folder / "sae_weights.safetensors"), folder / "sae_weights.pt")
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(InputError, match="no sae in"):
        suites.find(str(tmp_path))


def test_a_clts_layers_are_selected_one_by_one(tmp_path: Path) -> None:
    clt.write(tmp_path, rng(), D, M, M, LAYER)
    found = suites.find(str(tmp_path), select=["*_relu/layer_1"])
    assert [(info.path, info.site.layer, info.out) for info in found] == [
        ("clt/8x/clt_8x_relu/layer_1", 1, None)
    ]
    hooks = ["blocks.0.hook_resid_mid"] * 9
    changed(tmp_path / "clt/8x/clt_8x_relu/config.json", hook_points_in=hooks, hook_points_out=hooks)
    with pytest.raises(InputError, match="not one matrix for each"):
        suites.find(str(tmp_path), select=["*_relu/layer_8"])


def test_a_config_of_something_else_is_no_sae(tmp_path: Path) -> None:
    one(tmp_path, sae_type=None, expansion_factor=None)
    with pytest.raises(InputError, match="no SAEs of a known format"):
        suites.find(str(tmp_path))


def test_published_names_are_recognised_without_opening_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"a/L{i}R" for i in range(9)] + [f"b/layer{i}_transcoder_8x_k64" for i in range(9)]
    files = [f"{name}/{file}" for name in names for file in ("config.json", "sae_weights.safetensors")]
    files += [
        "x/hyperparams.json",
        "x/checkpoints/final.safetensors",
        "y/cfg.json",
        "y/sae_weights.safetensors",
    ]
    tree = Tree(str(tmp_path), "suite", tuple(sorted(files)))
    monkeypatch.setattr(weights, "headers", lambda uri: pytest.fail(f"{uri} was opened"))
    monkeypatch.setattr(llamascopium, "read_json", lambda uri: pytest.fail(f"{uri} was opened"))
    assert len(llama_scope_r1.candidates(tree)) == 9
    assert [c.path for c in llama_scope.candidates(tree)] == ["x"]
    assert {c.path for c in llamascopium.candidates(tree)} >= {name for name in names if name[0] == "b"}
    assert "y" not in {c.path for c in llamascopium.candidates(tree)}


def test_an_empty_tree_has_no_candidates(tmp_path: Path) -> None:
    tree = open_tree(str(tmp_path))
    assert not llama_scope.candidates(tree) + llama_scope_r1.candidates(tree) + llamascopium.candidates(tree)
