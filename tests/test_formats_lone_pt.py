"""Lone .pt and .pth files (Goodfire, OpenAI, qresearch): told apart by keys, what is opened and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import goodfire, openai_gpt2

from sae_runtime import suites
from sae_runtime.errors import InputError
from sae_runtime.sites import Site

D, M = 6, 16


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def linear(file: Path, keys: tuple[str, str] = goodfire.KEYS) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    goodfire.one(file, rng(), D, M, keys, 19, None, torch.bfloat16)
    return file


def openai(file: Path, **other: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**openai_gpt2.state_dict(rng(), D, M, topk=True), **other}, file)
    return file


def test_keys_decide_not_names(tmp_path: Path) -> None:
    linear(tmp_path / "a/Llama-3.1-8B-Instruct-SAE-l19.pth", ("encoder", "decoder"))
    linear(tmp_path / "b/DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt")
    openai(tmp_path / "c/sae-l3.pt")
    found = {info.path[0]: info.format for info in suites.find(str(tmp_path), select=["a/*", "b/*"])}
    assert found == {"a": "qresearch", "b": "goodfire"}
    with pytest.raises(InputError, match=r"saes\.site"):
        suites.find(str(tmp_path), select=["c/*"])


def test_goodfires_other_variant_is_refused_with_the_reason(tmp_path: Path) -> None:
    file = linear(tmp_path / "gpt-oss-20b-sae-l15.pt")
    state = torch.load(file, weights_only=True)
    state["decoder.weight"] = state.pop("decoder_linear.weight")
    torch.save(state, file)
    with pytest.raises(InputError, match=r"no decoder_linear\.weight.*orientation"):
        suites.find(str(tmp_path))


@pytest.mark.parametrize("keys", [goodfire.KEYS, ("encoder", "decoder")])
def test_a_name_without_a_layer_is_refused_with_an_example(tmp_path: Path, keys: tuple[str, str]) -> None:
    linear(tmp_path / "sae.pth", keys)
    with pytest.raises(InputError, match=r"layer of .*sae\.pth.*sae-l19\.pth"):
        suites.find(str(tmp_path))


def test_the_spec_may_say_another_site_where_the_files_do_not(tmp_path: Path) -> None:
    linear(tmp_path / "sae-l7.pt")
    (info,) = suites.find(str(tmp_path), site="resid_mid")
    assert (info.site, info.out) == (Site(7, "resid_mid"), Site(7, "resid_mid"))


def test_other_pt_files_are_not_opened(tmp_path: Path) -> None:
    linear(tmp_path / "sae-l7.pt")
    for name in ("optimizer.pt", "run/trainer_state.pt", "run/sae_cfg.pt/README", "x/model19.pt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"not a pickle")
    assert [info.path for info in suites.find(str(tmp_path))] == ["sae-l7"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    file = linear(tmp_path / "sae-l7.pt")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"cannot read .*sae-l7\.pt"):
        suites.find(str(tmp_path))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"activation": "Identity"}, "activation 'Identity'"),
        ({"activation_state_dict": {"k": 4, "postact_fn": "Identity"}}, "postact_fn 'Identity'"),
        ({"activation_state_dict": {}}, "no k in activation_state_dict"),
        ({"activation_state_dict": None}, "activation 'TopK'"),
    ],
)
def test_openai_activations_that_are_not_known_are_refused(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    openai(tmp_path / "resid_post_mlp_v5_32k/autoencoders/6.pt", **other)
    with pytest.raises(InputError, match=message):
        suites.find(str(tmp_path))


def test_openai_outside_its_folders_has_the_specs_site_and_the_files_layer(tmp_path: Path) -> None:
    openai(tmp_path / "mine/6.pt")
    with pytest.raises(InputError, match=r"saes\.site"):
        suites.find(str(tmp_path))
    (info,) = suites.find(str(tmp_path), site="resid_mid")
    assert (info.site, info.format) == (Site(6, "resid_mid"), "openai_gpt2")


@pytest.mark.parametrize("top", ["", "resid_delta_mlp_v5_32k", "resid_delta_mlp_v5_32k/autoencoders"])
def test_openai_folders_are_recognised_from_any_level(tmp_path: Path, top: str) -> None:
    openai(tmp_path / "resid_delta_mlp_v5_32k/autoencoders/6.pt")
    (info,) = suites.find(str(tmp_path / top))
    assert info.site == Site(6, "mlp_out")
    with pytest.raises(InputError, match="resid_post, but"):
        suites.find(str(tmp_path / top), site="resid_post")
