"""circuit-tracer, attention and temporal SAEs: what is refused and why, and links to other repositories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from published.circuit_tracer import HOOKS, put, tensors
from safetensors.numpy import save_file

from sae_runtime import reference, suites
from sae_runtime.errors import InputError
from sae_runtime.formats import circuit_tracer
from sae_runtime.tree import open_tree

D, M, N = 6, 16, 5
SET = {"model_kind": "transcoder_set", **HOOKS}


def layer(**more: Any) -> dict[str, Any]:
    return {**tensors(np.random.default_rng(0), D, M, N), **more}


def clt(**more: Any) -> dict[str, Any]:
    T = tensors(np.random.default_rng(0), D, M, D)
    return {**{f"{key}_0": T[key] for key in ("W_enc", "b_enc", "b_dec")}, **more}


REFUSED = {
    "no config": (None, {"layer_0": layer()}, "config.yaml is missing"),
    "kind": ({**SET, "model_kind": "lorsa"}, {"layer_0": layer()}, "model_kind 'lorsa' is unknown"),
    "no hook": ({"model_kind": "transcoder_set"}, {"layer_0": layer()}, "no feature_input_hook"),
    "hook": ({**SET, "feature_input_hook": "hook_q"}, {"layer_0": layer()}, "'hook_q' is no known site"),
    "activation": ({**SET, "activation": "gelu"}, {"layer_0": layer()}, "activation 'gelu' is unknown"),
    "no k": ({**SET, "activation": "topk"}, {"layer_0": layer()}, "activation topk, but no k"),
    "no threshold": ({**SET, "activation": "jumprelu"}, {"layer_0": layer()}, "without activation_function"),
    "other tensors": (SET, {"layer_0": {"weight": np.ones((2, 2), "f4")}}, "no tensor W_enc"),
    "turned": (SET, {"layer_0": layer(W_enc=np.ones((D, M), "f4"))}, f"W_enc in .*({D}, {M}), but b_enc"),
    "topk clt": ({**SET, "activation": "topk", "k": 3}, {"W_enc_0": clt()}, "topk of a cross-layer"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_encoded_is_refused_by_name(tmp_path: Path, case: str) -> None:
    config, files, reason = REFUSED[case]
    put(tmp_path, config, files)
    with pytest.raises(InputError) as error:
        suites.find(str(tmp_path))
    first, _, rest = reason.partition(".*")
    assert first in str(error.value)
    assert rest in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_list_elsewhere_becomes_uris(tmp_path: Path) -> None:
    """circuit-tracer writes the revision as a query, fsspec after an @ with its slashes quoted."""
    entries = {
        "hf://google/gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_76/params.npz": None,
        "hf://org/repo/a/b.safetensors?revision=main": "hf://org/repo@main/a/b.safetensors",
        "hf://org/repo/b.safetensors?revision=refs/pr/3": "hf://org/repo@refs%2Fpr%2F3/b.safetensors",
        "hf://org/repo@v2/b.safetensors": None,
        "https://host/b.safetensors?token=x": None,
        "below/mine.safetensors": "set/below/mine.safetensors",
    }
    config = {"model_kind": "transcoder_set", **HOOKS, "transcoders": list(entries)}
    put(tmp_path / "set", config, {})
    put(tmp_path / "set" / "below", None, {"mine": layer()})
    found = circuit_tracer.candidates(open_tree(str(tmp_path)))
    assert [candidate.path for candidate in found] == [f"set/layer_{i}" for i in range(len(entries))]
    assert [c.files[0] for c in found] == [wanted or entry for entry, wanted in entries.items()]


def test_a_list_of_files_that_are_not_there_is_an_error(tmp_path: Path) -> None:
    put(tmp_path, {**SET, "transcoders": ["mine.safetensors"]}, {})
    with pytest.raises(InputError, match=r"transcoders lists 'mine\.safetensors', which is not in the suite"):
        suites.find(str(tmp_path))


def test_a_list_and_weights_of_its_own_contradict(tmp_path: Path) -> None:
    put(tmp_path, {**SET, "transcoders": ["hf://org/repo/a.safetensors"]}, {"layer_0": layer()})
    with pytest.raises(InputError, match="lists transcoders elsewhere, but there are weights beside it"):
        suites.find(str(tmp_path))


def test_a_config_beside_other_weights_is_not_read(tmp_path: Path) -> None:
    """There may be thousands, of any shape."""
    put(tmp_path / "set", SET, {"layer_0": layer()})
    put(tmp_path / "other", None, {"model": layer()})
    (tmp_path / "other" / "config.yaml").write_text("- not\n- a mapping\n")
    assert [sae.path for sae in suites.find(str(tmp_path))] == ["set/layer_0"]


def test_another_products_config_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"transcoders": ["x"], "seed": 1}))
    with pytest.raises(InputError, match="no SAEs of a known format"):
        suites.find(str(tmp_path))


def test_k_may_be_in_the_file(tmp_path: Path) -> None:
    put(tmp_path / "same", {**SET}, {"layer_0": layer(k=np.array(3))})
    put(tmp_path / "other", {**SET, "activation": "topk", "k": 4}, {"layer_0": layer(k=np.array(3))})
    other, same = suites.find(str(tmp_path))
    assert suites.load(same).k == 3
    assert same.architecture == "topk_transcoder"
    with pytest.raises(InputError, match=r"k is 3 in .*, but 4 in its config"):
        suites.load(other)


def test_k_of_metas_set_is_circuit_tracers_own(tmp_path: Path) -> None:
    """Its config.yaml says topk without a k, and circuit-tracer fixes 128 for that repository."""
    put(tmp_path / "crv-8b-instruct-transcoders", {**SET, "activation": "topk"}, {"layer_0": layer()})
    (info,) = suites.find(str(tmp_path / "crv-8b-instruct-transcoders"))
    assert info.nominal_l0 == 128


def test_top_k_keeps_the_sign(tmp_path: Path) -> None:
    eye, zero = np.eye(3, dtype="f4"), np.zeros(3, "f4")
    T = {"W_enc": eye, "b_enc": zero, "W_dec": eye, "b_dec": zero}
    put(tmp_path, {**SET, "activation": "topk", "k": 2}, {"layer_0": T})
    weights = suites.load(suites.find(str(tmp_path))[0])
    assert reference.encode(torch.tensor([[1.0, -2.0, -3.0]]), weights).tolist() == [[1.0, -2.0, 0.0]]


def test_a_layer_of_a_clt_has_no_decoder_of_its_own(tmp_path: Path) -> None:
    put(tmp_path, {"model_kind": "cross_layer_transcoder", **HOOKS}, {"W_enc_0": clt()})
    (info,) = suites.find(str(tmp_path))
    weights = suites.load(info)
    assert info.out is None
    assert weights.W_dec is None
    assert weights.b_dec is None


def test_the_old_orientation_of_a_decoder_is_turned_and_a_square_one_is_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    old, square = layer(), tensors(rng, 4, 4, 4)
    put(tmp_path, SET, {"layer_0": {**old, "W_dec": np.ascontiguousarray(old["W_dec"].T)}, "layer_1": square})
    for info, T in zip(suites.find(str(tmp_path)), (old, square), strict=True):
        W_dec = suites.load(info).W_dec
        assert W_dec is not None
        assert np.array_equal(W_dec.numpy(), T["W_dec"])


def test_temporal_saes_are_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-2-2B" / "layer_12" / "temporal"
    folder.mkdir(parents=True)
    save_file({"D": np.ones((M, D), "f4"), "b": np.ones(D, "f4")}, folder / "latest_ckpt.safetensors")
    (folder / "conf.yaml").write_text("llm:\n  dimin: 6\n")
    with pytest.raises(InputError, match="is a temporal SAE: its features depend on the tokens before"):
        suites.find(str(tmp_path))


@pytest.mark.parametrize(
    ("cfg", "reason"),
    [
        ({"act_size": D}, "no act_name"),
        ({"act_name": "blocks.0.hook_nothing"}, "no known site"),
        ({"act_name": "blocks.0.attn.hook_z", "dict_size": M + 1}, f"dict_size is {M + 1}"),
    ],
)
def test_attention_saes_of_an_odd_config_are_refused(
    tmp_path: Path, cfg: dict[str, Any], reason: str
) -> None:
    torch.save({"W_enc": torch.ones(D, M)}, tmp_path / "a.pt")
    (tmp_path / "a_cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(InputError, match=reason):
        suites.find(str(tmp_path))


def test_attention_saes_of_another_suite_have_no_neuronpedia_id(tmp_path: Path) -> None:
    torch.save({"W_enc": torch.ones(D, M)}, tmp_path / "a.pt")
    (tmp_path / "a_cfg.json").write_text(json.dumps({"act_name": "blocks.3.attn.hook_z"}))
    (info,) = suites.find(str(tmp_path))
    assert (info.neuronpedia, info.trained_on) == (None, None)
