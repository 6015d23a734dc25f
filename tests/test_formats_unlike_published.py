"""Files that are nearly as published: none is read as something it is not, nor stops those beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from published import circuit_tracer, gemma_scope_2_sets, llama_scope_r1, llamascopium_clt, qwen_scope
from published.saelens import put, tensors
from safetensors.torch import load_file, save_file

from jobs.cli import cli
from sae_runtime import reference, suites
from sae_runtime.errors import InputError
from sae_runtime.sites import Site

D, M, N = 6, 16, 5
V6 = {
    "architecture": "standard",
    "sae_lens_version": "6.1.0",
    "metadata": {"hook_name": "blocks.2.hook_resid_post"},
}


def gemma_scope(folder: Path, n: int = D, **other: np.ndarray) -> Path:
    """One Gemma Scope archive in a folder named as published."""
    rng = np.random.default_rng(0)
    shapes = {"threshold": (M,), "W_enc": (D, M), "b_enc": (M,), "b_dec": (n,), "W_dec": (M, n)}
    made = {name: rng.random(shape).astype(np.float32) for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{**made, **other})
    return folder


def saelens(folder: Path, architecture: str = "standard", more: Any = None, **keys: Any) -> Path:
    """One SAELens SAE in `folder`/sae; `more` are tensors beside its own."""
    made = tensors(np.random.default_rng(0), architecture, D, M, D)
    put(folder / "sae", {**V6, "architecture": architecture, **keys}, {**made, **(more or {})})
    return folder


def sparsify(folder: Path, more: Any = None, **keys: Any) -> Path:
    rng = torch.Generator().manual_seed(0)
    made = {"encoder.weight": torch.randn(M, D, generator=rng), "W_dec": torch.randn(M, D, generator=rng)}
    folder.mkdir(parents=True)
    biases = {"encoder.bias": torch.zeros(M), "b_dec": torch.ones(D)}
    save_file({**made, **biases, **(more or {})}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"k": 3, **keys}))
    return folder


def changed(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def refusal(uri: Path, **options: Any) -> str:
    """The one line with which a suite's only SAE is refused, by a listing or by its loading."""

    def read() -> None:
        for info in suites.find(str(uri), **options):
            suites.load(info)

    with pytest.raises(InputError) as error:
        read()
    assert "\n" not in str(error.value)
    assert str(uri) in str(error.value), "the place is not named"
    return str(error.value)


# --- tensors


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"W_enc": np.ones((D, M), np.int8)}, "W_enc .* holds int8"),
        ({"W_enc": np.ones((D, M), np.complex64)}, "W_enc .* holds complex64"),
        (
            {"W_dec": np.ones((M, N), "f4"), "b_dec": np.ones(N, "f4")},
            r"W_dec .* is \(16, 5\), not \(16, 6\)",
        ),
        ({"threshold": np.full(M, -1, "f4")}, "threshold .* -1 throughout.*never calibrated"),
        ({"b_enc": np.full(M, 1e300)}, "b_enc .* not finite"),
        ({"b_enc": np.float32(0)}, "b_enc"),
    ],
)
def test_tensors_that_would_be_read_as_others_are_refused(tmp_path: Path, other: Any, says: str) -> None:
    suite = tmp_path / "gemma-scope-2b-pt-res"
    gemma_scope(suite / "layer_2/width_16k/average_l0_7", **other)
    with pytest.raises(InputError, match=says):
        suites.load(suites.find(str(suite))[0])


def test_a_batch_top_k_of_saelens_that_was_never_calibrated_is_refused(tmp_path: Path) -> None:
    uri = saelens(tmp_path, "jumprelu", {"threshold": np.full(M, -1, "f4")})
    assert "never calibrated" in refusal(uri)


@pytest.mark.parametrize(
    ("architecture", "more", "says"),
    [
        ("standard", {"threshold": np.ones(M, "f4")}, "'standard' has no threshold"),
        ("standard", {"log_threshold": np.ones(M, "f4")}, "'standard' has no log_threshold"),
        ("topk", {"b_gate": np.ones(M, "f4"), "r_mag": np.ones(M, "f4")}, "'topk' has no b_gate, r_mag"),
        ("gated", {"b_enc": np.ones(M, "f4")}, "b_enc .* is not zero"),
    ],
)
def test_tensors_of_another_architecture_are_refused(
    tmp_path: Path, architecture: str, more: Any, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        suites.find(str(saelens(tmp_path, architecture, more, k=3)))


def test_a_zero_encoder_bias_of_a_gated_sae_does_not_matter(tmp_path: Path) -> None:
    (info,) = suites.find(str(saelens(tmp_path, "gated", {"b_enc": np.zeros(M, "f4")})))
    assert suites.load(info).rule == "gated"


@pytest.mark.parametrize("scale", [np.array(2, "f4"), np.full(3, 2, "f4")])
def test_a_finetuning_scale_of_another_shape_is_named(tmp_path: Path, scale: Any) -> None:
    uri = saelens(tmp_path, "standard", {"scaling_factor": scale}, finetuning_scaling_factor=True)
    assert "scaling_factor in" in refusal(uri)


def test_what_sparsify_is_not_known_to_have_is_refused(tmp_path: Path) -> None:
    suite = sparsify(tmp_path / "a/layers.2", {"post_enc": torch.ones(M)}).parent
    assert "post_enc in" in refusal(suite)
    suite = sparsify(tmp_path / "b/layers.2", skip_connection=True).parent
    assert "no W_skip" in refusal(suite)


# --- configs


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"apply_b_dec_to_input": None}, "apply_b_dec_to_input is None; write true or false"),
        ({"apply_b_dec_to_input": 0}, "apply_b_dec_to_input is 0"),
        ({"architecture": ["standard"]}, "sae_weights.safetensors"),
        ({"metadata": {"hook_name": ["blocks.2.hook_resid_post"]}}, "sae_weights.safetensors"),
        (
            {"metadata": {"hook_name": "blocks.2.attn.hook_z", "hook_head_index": 1.5}},
            "1.5, not a whole number",
        ),
        (
            {
                "metadata": {
                    **V6["metadata"],
                    "model_from_pretrained_kwargs": {"center_writing_weights": "no"},
                }
            },
            "center_writing_weights in .* is 'no'",
        ),
    ],
)
def test_saelens_keys_of_another_type_are_refused(tmp_path: Path, keys: Any, says: str) -> None:
    changed(saelens(tmp_path) / "sae/cfg.json", **keys)
    with pytest.raises(InputError, match=says) as error:
        suites.find(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["transcode", "signed", "skip_connection"])
def test_sparsifys_flags_are_true_false_or_not_there(tmp_path: Path, key: str) -> None:
    suite = sparsify(tmp_path / "wrong/layers.2.mlp", **{key: "false"}).parent
    assert f"{key} in" in refusal(suite)
    (info,) = suites.find(str(sparsify(tmp_path / "transcoder-some/layers.2.mlp", **{key: None}).parent))
    assert info.site == Site(2, "mlp_in"), "null is not false: the name decides, as without the key"
    assert suites.load(info).b_pre is not None


@pytest.mark.parametrize("k", [None, [3], "3", 2.5, True])
def test_qwen_scopes_k_is_a_whole_number(tmp_path: Path, k: Any) -> None:
    qwen_scope.write(tmp_path / "suite", np.random.default_rng(0), D, M, N, 2)
    changed(tmp_path / "suite/config.json", k=k)
    assert "k in" in refusal(tmp_path / "suite")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"activation": "topk", "k": 2.5}, "2.5, not a whole number"),
        ({"k": 3}, "no activation that has one"),
        ({"feature_input_hook": "blocks.0.hook_resid_mid"}, "is of layer 0, but"),
    ],
)
def test_circuit_tracers_config_is_of_each_of_its_files(tmp_path: Path, keys: Any, says: str) -> None:
    made = circuit_tracer.tensors(np.random.default_rng(0), D, M, N)
    config = {"model_kind": "transcoder_set", **circuit_tracer.HOOKS, **keys}
    circuit_tracer.put(tmp_path, config, {"layer_2": made})
    assert says in refusal(tmp_path)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"sparsity_include_decoder_norm": "false"}, "'false', not true or false"),
        ({"apply_decoder_bias_to_pre_encoder": True}, "apply_decoder_bias_to_pre_encoder"),
        ({"use_glu_encoder": True}, "no W_E_glu"),
    ],
)
def test_keys_that_change_the_encoding_of_llama_scope_r1_are_refused(
    tmp_path: Path, keys: Any, says: str
) -> None:
    made = llama_scope_r1.write(tmp_path, np.random.default_rng(0), D, M, N, 2)
    changed(tmp_path / made[0].path / "config.json", **keys)
    with pytest.raises(InputError, match=says):
        suites.find(str(tmp_path), select=[made[0].path])


def test_one_layer_for_all_files_of_a_set_is_refused(tmp_path: Path) -> None:
    made = gemma_scope_2_sets.write(tmp_path, np.random.default_rng(0), D, M, N, 2)
    path = next(sae.path for sae in made if "crosscoder" in sae.path)
    changed((tmp_path / path).parent / "config.json", hf_hook_point_in="model.layers.7.output")
    with pytest.raises(InputError, match="does not say the layers of its set"):
        suites.find(str(tmp_path), select=[path])


# --- places


def test_a_damaged_file_does_not_stop_those_beside_it(tmp_path: Path) -> None:
    saelens(tmp_path)
    gemma_scope(tmp_path / "layer_1/width_1k/average_l0_2").joinpath("params.npz").write_bytes(b"PK")
    (tmp_path / "some-sae-l3.pt").write_bytes(b"PK\3\4 cut short")
    llamascopium_clt.write(tmp_path, np.random.default_rng(0), D, M, N, 2)
    for config in (tmp_path / "clt").rglob("config.json"):
        config.write_text('{"sae_type":')
    (tmp_path / "set").mkdir()
    (tmp_path / "set/config.yaml").write_text("a: [1")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/sae_weights.safetensors").write_bytes(b"short")
    (tmp_path / "odd/config.json").write_text("{}")
    (tmp_path / "lists").mkdir()
    listed = {"model_kind": "transcoder_set", **circuit_tracer.HOOKS, "transcoders": ["nowhere.safetensors"]}
    (tmp_path / "lists/config.yaml").write_text(json.dumps(listed))
    assert [info.path for info in suites.find(str(tmp_path), select=["sae"])] == ["sae"]
    told: list[InputError] = []
    assert [info.path for info in suites.find(str(tmp_path), refused=told.append)] == ["sae"]
    for name in ("params.npz", "some-sae-l3.pt", "clt", "set/config.yaml", "lists/config.yaml"):
        assert sum(f"{tmp_path}/" in str(error) and name in str(error) for error in told), name
    done = CliRunner().invoke(cli, ["saes", str(tmp_path)])
    assert done.exit_code == 0
    assert len([line for line in done.stderr.splitlines() if line.startswith("warning: ")]) == len(told)


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    suite, elsewhere = tmp_path / "gemma-scope-2b-pt-res", tmp_path / "disk"
    gemma_scope(suite / "layer_2/width_16k/average_l0_7")
    gemma_scope(elsewhere / "width_16k/average_l0_9")
    (suite / "layer_10").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(suite)
    (suite / "self").symlink_to(suite)
    paths = [info.path for info in suites.find(str(suite))]
    assert paths == ["layer_2/width_16k/average_l0_7", "layer_10/width_16k/average_l0_9"]


def test_a_suite_that_is_one_sae_is_selected_by_its_id(tmp_path: Path) -> None:
    uri = str(saelens(tmp_path) / "sae") + "/"
    for pattern in ("sae", "s*", "*"):
        assert [info.id for info in suites.find(uri, select=[pattern])] == ["sae"]


def test_what_the_registry_says_is_not_lost_with_the_suites_name(tmp_path: Path) -> None:
    suite = tmp_path / "GPT2-Small-SAEs-Reformatted"
    saelens(suite)
    x = np.random.default_rng(1).normal(size=(9, D)) + 3
    T = {name: t.double().numpy() for name, t in load_file(suite / "sae/sae_weights.safetensors").items()}
    centred = x - x.mean(axis=1, keepdims=True)
    wanted = np.maximum((centred - T["b_dec"]) @ T["W_enc"] + T["b_enc"], 0)
    for uri, name in ((suite, None), (suite, "mine"), (suite / "sae", None)):
        f = reference.encode(torch.from_numpy(x), suites.load(suites.find(str(uri), name)[0]))
        np.testing.assert_allclose(f.numpy(), wanted, rtol=1e-4, atol=1e-4)


def test_gemma_scope_by_the_folders_that_are_named_so(tmp_path: Path) -> None:
    one = "layer_20/width_16k/average_l0_71"
    gemma_scope(tmp_path / "copies/gemma-scope-2b-pt-mlp" / one)
    gemma_scope(tmp_path / "copies/gemma-scope-2b-pt-transcoders" / one, n=N)
    found = {
        info.path.split("/")[0].rsplit("-", 1)[-1]: info for info in suites.find(str(tmp_path / "copies"))
    }
    assert found["mlp"].site == Site(20, "mlp_out")
    assert (found["transcoders"].site, found["transcoders"].out) == (
        Site(20, "mlp_in_unit"),
        Site(20, "mlp_out"),
    )
    (own,) = suites.find(str(tmp_path / "copies/gemma-scope-2b-pt-mlp" / one))
    assert (own.id, own.site) == ("average_l0_71", Site(20, "mlp_out"))
    assert own.neuronpedia is None, "whether it is the canonical one is not known from it alone"
    (tmp_path / "copies").rename(tmp_path / "all-res")
    with pytest.raises(InputError, match=r"is of gemma-scope-2b-pt-.*'all-res' says resid_post"):
        suites.find(str(tmp_path / "all-res"))


def test_the_name_above_says_the_place_of_a_suite_that_is_one_sae(tmp_path: Path) -> None:
    folder = tmp_path / "mlp_out_layer_12/trainer_0"
    folder.mkdir(parents=True)
    linear = {"encoder.weight": (M, D), "encoder.bias": (M,), "decoder.weight": (D, M), "bias": (D,)}
    torch.save({name: torch.ones(shape) for name, shape in linear.items()}, folder / "ae.pt")
    trainer = {"dict_class": "AutoEncoder", "lm_name": "EleutherAI/pythia-70m"}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    for uri in (folder, folder.parent, tmp_path):
        assert suites.find(str(uri))[0].site == Site(12, "mlp_out")
    hookpoint = sparsify(tmp_path / "transcoder-some/layers.10.mlp")
    assert (
        suites.find(str(hookpoint))[0].site
        == suites.find(str(hookpoint.parent))[0].site
        == Site(10, "mlp_in")
    )


def test_an_unknown_site_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"saes\.site: 'resid' is unknown; known are embed"):
        suites.find(str(tmp_path / "not-there"), site="resid")


def test_what_reads_the_normalised_input_has_no_reconstruction_of_it(tmp_path: Path) -> None:
    gemma_scope(tmp_path / "own/layer_2/width_16k/average_l0_7", n=N)
    (info,) = suites.find(str(tmp_path / "own"), site="mlp_in_unit")
    assert (info.site, info.out) == (Site(2, "mlp_in_unit"), None)
    assert not suites.load(info).restore
