"""dictionary_learning: thresholds never set, k in two places, sites, norms of the decoder, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import dictionary_learning as fixture

from sae_runtime import reference, suites
from sae_runtime.errors import InputError
from sae_runtime.sae import SaeInfo
from sae_runtime.sites import Site

D, M = 6, 16


def one(
    root: Path, dict_class: str, state: dict[str, Any] | None = None, drop: tuple[str, ...] = (),
    io: str | None = "out", path: str = "trainer_0", **trainer: Any,
) -> str:  # fmt: skip
    """A suite of one SAE; `state` replaces tensors, `trainer` keys of the config."""
    tensors = fixture.classes(np.random.default_rng(4), D, M).get(dict_class, ("", {}))[1]
    tensors = {key: value for key, value in {**tensors, **(state or {})}.items() if key not in drop}
    fixture.save(root / path / "ae.pt", tensors)
    config = fixture.config(dict_class, D, M, **{"layer": 3, "io": io, **trainer})
    (root / path / "config.json").write_text(config)
    return str(root)


def found(uri: str, site: str | None = None) -> SaeInfo:
    (info,) = suites.find(uri, site=site)
    return info


def pre(state: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """relu of the pre-activations of a class that subtracts b_dec and has torch.nn.Linear's matrices."""
    return np.maximum(
        (x - state["b_dec"]) @ state["encoder.weight"].T.astype(np.float64) + state["encoder.bias"], 0
    )


@pytest.mark.parametrize("dict_class", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
@pytest.mark.parametrize(
    ("state", "drop", "message"),
    [
        (
            {"threshold": np.float32(-1)},
            (),
            r"threshold in .*ae.pt is -1, the mark of an unset one: .*depends on",
        ),
        ({}, ("threshold",), "no threshold in .*ae.pt: its top-k over a batch was never calibrated"),
        ({"threshold": np.ones(2, np.float32)}, (), "has 2 values, not one"),
        ({"threshold": np.float32("nan")}, (), "threshold in .*ae.pt is nan"),
    ],
)
def test_a_batch_top_k_without_a_threshold_is_refused(
    tmp_path: Path, dict_class: str, state: dict[str, Any], drop: tuple[str, ...], message: str
) -> None:
    uri = one(tmp_path, dict_class, state, drop)
    with pytest.raises(InputError, match=message):  # by the listing already
        found(uri)


@pytest.mark.parametrize("dict_class", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_threshold_of_zero_is_relu(tmp_path: Path, dict_class: str) -> None:
    sae = suites.load(found(one(tmp_path, dict_class, {"threshold": np.float64(0)})))
    x = np.random.default_rng(0).normal(size=(40, D))
    wanted = pre(fixture.classes(np.random.default_rng(4), D, M)["BatchTopKSAE"][1], x)
    have = reference.encode(torch.from_numpy(x).float(), sae).numpy()
    assert np.allclose(have, wanted, atol=1e-4)


def test_a_batch_top_k_gives_a_token_the_same_in_any_batch(tmp_path: Path) -> None:
    sae = suites.load(found(one(tmp_path, "BatchTopKSAE")))
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(40, D))).float()
    apart = torch.cat([reference.encode(x[i : i + 1], sae) for i in range(40)])
    assert torch.allclose(reference.encode(x, sae), apart, atol=1e-5)
    assert len(set((apart > 0).sum(dim=1).tolist())) > 2  # not k of each token


def test_the_stored_k_outranks_the_configs_and_one_is_needed(tmp_path: Path) -> None:
    both = found(one(tmp_path / "a", "AutoEncoderTopK", k=5))
    config = found(one(tmp_path / "b", "AutoEncoderTopK", drop=("k",), k=5))
    assert (suites.load(both).k, both.nominal_l0) == (fixture.K, fixture.K)
    assert (suites.load(config).k, config.nominal_l0) == (5, 5)
    with pytest.raises(InputError, match=r"no k in .*ae.pt nor in its config.json"):
        found(one(tmp_path / "c", "AutoEncoderTopK", drop=("k",)))
    with pytest.raises(InputError, match=r"k is 17 in .*ae.pt, which has 16 features"):
        suites.load(found(one(tmp_path / "d", "AutoEncoderTopK", {"k": np.int32(17)})))


def test_activations_are_of_raw_weights_and_normalised_ones_differ_by_the_decoders_norms(
    tmp_path: Path,
) -> None:
    state = fixture.classes(np.random.default_rng(4), D, M)["AutoEncoder"][1]
    info = found(one(tmp_path, "AutoEncoder"))
    x = np.random.default_rng(0).normal(size=(40, D)) * 3
    have = reference.encode(torch.from_numpy(x).float(), suites.load(info)).double().numpy()
    norms = np.linalg.norm(state["decoder.weight"].astype(np.float64), axis=0)
    assert norms.std() > 0.1  # or this proves nothing
    E, b = state["encoder.weight"].astype(np.float64) * norms[:, None], state["encoder.bias"] * norms
    library = np.maximum((x - state["bias"]) @ E.T + b, 0)  # from_pretrained(normalize_decoder=True)
    assert np.allclose(have * norms, library, rtol=1e-4, atol=1e-4)
    assert not np.allclose(have, library, rtol=1e-2)
    assert "raw weights" in info.convention
    assert "normalize_decoder=True" in info.convention


def test_the_decoders_bias_of_a_jumprelu_is_not_subtracted(tmp_path: Path) -> None:
    sae = suites.load(found(one(tmp_path, "JumpReluAutoEncoder")))
    assert sae.b_pre is None
    assert suites.load(found(one(tmp_path / "new", "AutoEncoderNew"))).b_pre is None


@pytest.mark.parametrize(
    ("label", "io", "model", "kind"),
    [
        ("resid_post_layer_3", "out", "Qwen/Qwen3-8B", "resid_post"),
        ("resid_out_layer3", None, "EleutherAI/pythia-70m", "resid_post"),
        ("resid_pre_layer_3", "out", "openai-community/gpt2", "resid_pre"),
        ("mlp_layer_3", "out", "google/gemma-2b", "mlp_out"),  # Gemma 1: no norm after the MLP
        ("mlp_layer_3", "in", "google/gemma-2-2b", "mlp_in"),
    ],
)
def test_submodule_and_io_say_the_site(
    tmp_path: Path, label: str, io: str | None, model: str, kind: str
) -> None:
    info = found(one(tmp_path, "AutoEncoder", io=io, submodule_name=label, lm_name=model))
    assert info.site == info.out == Site(3, kind)
    assert info.trained_on == model


@pytest.mark.parametrize(
    ("label", "io", "model"),
    [
        ("dit_block_residual", "out", "a/b"),
        ("resid_post_layer_3", "in", "a/b"),  # the input of a layer is not what the name says
        ("attn_layer_3", "in", "a/b"),
        ("mlp_out_layer_3", "out", "google/gemma-2-2b"),  # of the module, or after the norm that follows?
        ("attn_out_layer_3", "out", "google/gemma-3-4b-pt"),
    ],
)
def test_a_name_that_does_not_say_the_site_asks_for_it(
    tmp_path: Path, label: str, io: str, model: str
) -> None:
    uri = one(tmp_path, "AutoEncoder", io=io, submodule_name=label, lm_name=model)
    with pytest.raises(InputError, match=r"saes\.site: neither .*ae.pt nor .* says its site"):
        found(uri)
    assert found(uri, site="mlp_out").site == Site(3, "mlp_out")


def test_a_site_that_contradicts_the_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"saes\.site: mlp_out, but .*ae.pt is for resid_post"):
        found(one(tmp_path, "AutoEncoder"), site="mlp_out")


def test_a_layer_that_only_names_say(tmp_path: Path) -> None:
    by_label = found(one(tmp_path / "a", "AutoEncoder", layer=None, submodule_name="resid_post_layer_11"))
    by_folder = found(
        one(tmp_path / "b", "AutoEncoder", layer=None, submodule_name=None, path="resid_out_layer5/10_512")
    )
    assert (by_label.site, by_folder.site) == (Site(11, "resid_post"), Site(5, "resid_post"))
    assert by_folder.id == "b/resid_out_layer5/10_512"
    with pytest.raises(InputError, match=r"layer is None in .*config.json, and no name says it"):
        found(one(tmp_path / "c", "AutoEncoder", layer=None, submodule_name="resid_post", path="width_16"))


def test_only_an_id_of_the_hub_is_what_it_was_trained_on(tmp_path: Path) -> None:
    for i, name in enumerate(("/data/models/pythia", "pythia-70m", None)):
        assert found(one(tmp_path / str(i), "AutoEncoder", lm_name=name)).trained_on is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"dict_class": "CrossCoder"},
            "dict_class 'CrossCoder' in .*config.json is unknown; known are AutoEncoder,",
        ),
        ({"dict_class": "IdentityDict"}, "dict_class 'IdentityDict'"),
        ({"io": "in_and_out"}, "io 'in_and_out' in .*config.json: .* not transcoders"),
        ({"layer": None, "submodule_name": None}, "layer is None in .*config.json, and no name says it"),
        (
            {"activation_dim": 16, "dict_size": 6},
            r"encoder.weight in .* is \(16, 6\), but .* activation_dim 16",
        ),
        ({"drop": ("encoder.weight",)}, "no tensor encoder.weight in .*ae.pt; it has bias, decoder.weight"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        found(one(tmp_path, **{"dict_class": "AutoEncoder", **arguments}))
    assert "\n" not in str(raised.value)


def test_the_keys_of_another_class_are_refused(tmp_path: Path) -> None:
    """A decoder's bias under the other name means another class: whether it is subtracted is unknown."""
    info = found(one(tmp_path, "AutoEncoder", {"decoder.bias": np.zeros(D, np.float32)}, drop=("bias",)))
    with pytest.raises(InputError, match=r"no bias in .*ae.pt"):
        suites.load(info)


def test_without_a_config_the_class_is_unknown(tmp_path: Path) -> None:
    uri = one(tmp_path, "AutoEncoder")
    (tmp_path / "trainer_0/config.json").unlink()
    with pytest.raises(InputError, match=r"no config.json with .*ae.pt; its dict_class says how to encode"):
        found(uri)
