"""SAELens: what is refused and why, and what only shows by hand-made values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published.saelens import put, tensors

from sae_runtime import reference, suites
from sae_runtime.errors import InputError
from sae_runtime.formats.hub_names import hub_id
from sae_runtime.sites import Site

D, M = 6, 16
FLAT = {"architecture": "standard", "hook_point": "blocks.2.hook_resid_pre", "d_in": D, "d_sae": M}
V6 = {"architecture": "standard", "sae_lens_version": "6.1.0"}
META = {"hook_name": "blocks.2.hook_resid_post"}
MLP = {"hook_name": "blocks.2.mlp.hook_in", "hook_name_out": "blocks.2.hook_mlp_out"}


def suite(
    folder: Path, cfg: dict[str, Any], meta: dict[str, Any] | None = None, T: dict[str, Any] | None = None
) -> str:
    """A suite of one SAE; `meta` makes its config one of version 6."""
    architecture = str(cfg.get("architecture"))
    made = tensors(np.random.default_rng(0), architecture, D, M, D) if T is None else T
    put(folder / "sae", cfg if meta is None else {**cfg, "metadata": meta}, made)
    return str(folder)


def old(**keys: Any) -> tuple[dict[str, Any], None]:
    return {**FLAT, **keys}, None


def new(meta: dict[str, Any] | None = None, **keys: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return {**V6, **keys}, META if meta is None else meta


SCALAR = "expected_average_only_in, but its scalar (norm_scaling_factor) is not in the files"
REFUSED = {
    "matching pursuit": (new(architecture="matching_pursuit"), "subtracts one decoder row after another"),
    "temporal": (new(architecture="temporal"), "depend on the tokens before"),
    "batch topk": (new(architecture="batchtopk", k=3), "save it for inference"),
    "matryoshka": (new(architecture="matryoshka_batchtopk", k=3), "save it for inference"),
    "unheard of": (new(architecture="crosscoder"), "'crosscoder' is unknown; known are standard"),
    "scalar": (new(normalize_activations="expected_average_only_in"), SCALAR),
    "scalar, old": (old(normalize_activations=True), SCALAR),
    "fold": (old(normalize_activations=True), "fold_activation_norm_scaling_factor"),
    "whitening": (new(normalize_activations="covariance_whitening"), "whitening is not in the files"),
    "normalisation": (new(normalize_activations="batch"), "normalize_activations 'batch' is unknown"),
    "a factor": (new(activation_normalization_factor=0.3), "activation_normalization_factor is not part of"),
    "shape": (new(reshape_activations="heads"), "reshape_activations 'heads' is unknown"),
    "activation": (old(activation_fn_str="tanh-relu"), "activation_fn 'tanh-relu' is unknown"),
    "gated topk": (
        old(architecture="gated", activation_fn="topk", activation_fn_kwargs={"k": 3}),
        "activation_fn topk with architecture 'gated'",
    ),
    "no k": (old(activation_fn="topk"), "k is None; a top-k SAE needs a whole number"),
    "half a k": (new(architecture="topk", k=2.5), "k is 2.5"),
    "post": (
        old(activation_fn="topk", activation_fn_kwargs={"k": 3, "postact_fn": "Identity"}),
        "activation_fn_kwargs.postact_fn 'Identity' is unknown",
    ),
    "subtracting transcoder": (
        new(MLP, architecture="transcoder", apply_b_dec_to_input=True),
        "its b_dec belongs to the output",
    ),
    "transcoder of nothing": (new({}, architecture="transcoder"), "no hook_name"),
    "normalised skip": (
        new(MLP, architecture="skip_transcoder", normalize_activations="layer_norm"),
        "reads the raw activation",
    ),
    "hook": (new({"hook_name": "blocks.2.attn.hook_q"}), "'blocks.2.attn.hook_q', which is no known site"),
    "head": (new({**META, "hook_head_index": 0}), "only attn.hook_z is read by head"),
    "value biases": (
        new({
            "hook_name": "blocks.2.attn.hook_z",
            "model_from_pretrained_kwargs": {"fold_value_biases": True},
        }),
        "model_from_pretrained_kwargs.fold_value_biases changes what attn_z holds",
    ),
    "gain": (
        new({**MLP, "model_from_pretrained_kwargs": {"fold_ln": True}}, architecture="transcoder"),
        "model_from_pretrained_kwargs.fold_ln changes what mlp_in holds",
    ),
    "centred and rescaled": (
        new(
            {**META, "model_from_pretrained_kwargs": {"center_writing_weights": True}},
            normalize_activations="constant_norm_rescale",
        ),
        "of a centred site",
    ),
    "centred somewhere": (
        new({"hook_layer": 1, "model_from_pretrained_kwargs": {"center_writing_weights": True}}),
        "center_writing_weights without a hook_name",
    ),
    "width": (new(d_in=D, d_sae=M + 1), f"d_sae is {M + 1}, but W_enc in"),
    "transposed": (new(d_in=M, d_sae=D), f"d_in is {M}, but W_enc in"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_encoded_is_refused_by_name(tmp_path: Path, case: str) -> None:
    (cfg, meta), reason = REFUSED[case]
    with pytest.raises(InputError) as error:
        suites.find(suite(tmp_path, cfg, meta))
    assert reason in str(error.value)
    assert str(tmp_path / "sae") in str(error.value), "the file is not named"
    assert "\n" not in str(error.value)


def test_a_refused_one_does_not_hide_the_others(tmp_path: Path) -> None:
    suite(tmp_path, *new())
    put(
        tmp_path / "bad",
        {**V6, "architecture": "temporal", "metadata": META},
        {"W_dec": np.ones((M, D), "f4")},
    )
    told: list[InputError] = []
    assert [sae.path for sae in suites.find(str(tmp_path), refused=told.append)] == ["sae"]
    assert len(told) == 1


def test_a_site_that_no_key_names_is_asked_for(tmp_path: Path) -> None:
    uri = suite(tmp_path, *new({}, hook_layer=4))
    with pytest.raises(InputError, match=r"saes\.site"):
        suites.find(uri)
    assert suites.find(uri, site="mlp_out")[0].site == Site(4, "mlp_out")


@pytest.mark.parametrize("key", ["scaling_factor", "finetuning_scaling_factor"])
def test_a_scale_of_unknown_meaning_is_refused(tmp_path: Path, key: str) -> None:
    T = tensors(np.random.default_rng(0), "standard", D, M, D)
    uri = suite(tmp_path, *old(), {**T, key: np.full(M, 1.01, np.float32)})
    (info,) = suites.find(uri)
    with pytest.raises(InputError, match=f"{key} in .* is not all ones"):
        suites.load(info)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    T = tensors(np.random.default_rng(0), "jumprelu", D, M, D)
    del T["threshold"]
    (info,) = suites.find(suite(tmp_path, *new(architecture="jumprelu"), T))
    with pytest.raises(InputError, match="no threshold in"):
        suites.load(info)


def test_weights_without_a_config_are_not_ours(tmp_path: Path) -> None:
    uri = suite(tmp_path, *new())
    (tmp_path / "sae" / "cfg.json").unlink()
    with pytest.raises(InputError, match="no SAEs of a known format"):
        suites.find(uri)


def test_rescaling_by_the_decoder_changes_what_is_chosen(tmp_path: Path) -> None:
    """Pre-activations 3, 2, 1 under decoder norms 1, 2, 10 are 3, 4, 10: the highest of before drops out."""
    eye = np.eye(3, dtype=np.float32)
    zero = np.zeros(3, "f4")
    T = {"W_enc": eye, "b_enc": zero, "W_dec": np.diag([1, 2, 10]).astype("f4"), "b_dec": zero}
    cfg = {**V6, "architecture": "topk", "k": 2, "rescale_acts_by_decoder_norm": True}
    (info,) = suites.find(suite(tmp_path, cfg, META, T))
    weights, x = suites.load(info), torch.tensor([[3.0, 2.0, 1.0]])
    f = reference.encode(x, weights)
    assert f.tolist() == [[0.0, 4.0, 10.0]]
    assert reference.decode(f, x, weights).tolist() == [[0.0, 4.0, 10.0]]  # f / norm, through the same rows


def test_a_dead_decoder_row_stays_finite(tmp_path: Path) -> None:
    T = tensors(np.random.default_rng(0), "topk", D, M, D)
    T["W_dec"][3] = 0
    cfg = {**V6, "architecture": "topk", "k": M, "rescale_acts_by_decoder_norm": True}
    weights = suites.load(suites.find(suite(tmp_path, cfg, META, T))[0])
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
    f = reference.encode(x, weights)
    assert (f[:, 3] == 0).all()
    assert torch.isfinite(reference.decode(f, x, weights)).all()


def test_a_threshold_met_exactly_is_inactive_and_one_below_zero_is_relu(tmp_path: Path) -> None:
    eye = np.eye(3, dtype=np.float32)
    zero = np.zeros(3, "f4")
    T = {"W_enc": eye, "b_enc": zero, "W_dec": eye, "b_dec": zero, "threshold": np.array([2, 2, -5], "f4")}
    (info,) = suites.find(suite(tmp_path, {**V6, "architecture": "jumprelu"}, META, T))
    x = torch.tensor([[2.0, 2.5, -1.0], [0.0, 1.0, 0.5]])
    assert reference.encode(x, suites.load(info)).tolist() == [[0.0, 2.5, 0.0], [0.0, 0.0, 0.5]]


@pytest.mark.parametrize(
    ("name", "files_say", "wanted"),
    [
        ("GPT2-Small-SAEs-Reformatted", "none", ("center", 1.0)),
        ("GPT2-Small-Feature-Splitting-Experiment-Layer-8", "none", ("center", 1.0)),
        ("Mistral-7B-Residual-Stream-SAEs", "none", ("constant_norm", 1.0)),
        ("gpt2-small-mlp-out-saes", "expected_average_only_in", ("center", 1.6411934982190302)),
        ("gpt2-small-mlp-out-saes", "none", ("center", 1.0)),
        ("some-other-saes", "none", ("none", 1.0)),
    ],
)
def test_what_only_the_registry_says_is_known_by_the_suites_name(
    tmp_path: Path, name: str, files_say: str, wanted: tuple[str, float]
) -> None:
    uri = suite(tmp_path / name, *old(normalize_activations=files_say))
    how = suites.load(suites.find(uri)[0]).input
    assert (how.norm, how.scale) == wanted


def test_centring_is_of_what_is_written_to_the_residual_only(tmp_path: Path) -> None:
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    for hook, wanted in (
        ("hook_embed", "center"), ("blocks.1.hook_resid_mid", "center"), ("blocks.1.hook_attn_out", "center"),
        ("blocks.1.hook_mlp_out", "center"), ("blocks.1.attn.hook_z", "none"),
        ("blocks.1.mlp.hook_post", "none"), ("blocks.1.ln2.hook_normalized", "none"),
    ):  # fmt: skip
        uri = suite(tmp_path / hook, *new({"hook_name": hook, **kwargs}))
        assert suites.load(suites.find(uri)[0]).input.norm == wanted, hook


def test_the_top_of_a_config_outranks_its_metadata(tmp_path: Path) -> None:
    """Metadata of version 6 may carry the trainer's own keys of the same names: they do not encode."""
    meta = {**META, "k": 1, "normalize_activations": "layer_norm", "apply_b_dec_to_input": False}
    (info,) = suites.find(suite(tmp_path, *new(meta, architecture="topk", k=4)))
    options = json.loads(info.options)
    assert (options["k"], options["norm"], options["subtract"]) == (4, "none", True)


@pytest.mark.parametrize(
    ("short", "hub"),
    [
        ("gpt2-small", "openai-community/gpt2"),
        ("gpt2-xl", "openai-community/gpt2-xl"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("gemma-2b-it", "google/gemma-2b-it"),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
        ("llama-3-8b", "meta-llama/Meta-Llama-3-8B"),
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("llama3.1-8b-it", "meta-llama/Llama-3.1-8B-Instruct"),
        ("Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"),
        ("qwen3-0.6b", "Qwen/Qwen3-0.6B"),
        ("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("google/gemma-3-1b-pt", "google/gemma-3-1b-pt"),
        ("my-own-model", "my-own-model"),
        ("", None),
        (None, None),
    ],
)
def test_short_model_names_become_the_hubs(short: str | None, hub: str | None) -> None:
    assert hub_id(short) == hub
