"""Gemma Scope 1: which SAE is canonical, thresholds met exactly, and names that say too little."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sae_runtime import reference, suites
from sae_runtime.errors import InputError


def suite(root: Path, name: str, *paths: str) -> str:
    """A suite of tiny SAEs at `paths`."""
    for path in paths:
        place = root / name / path
        place.mkdir(parents=True)
        np.savez(
            place / "params.npz", W_enc=np.eye(2, 3, dtype=np.float32), b_enc=np.zeros(3, np.float32),
            W_dec=np.zeros((3, 2), np.float32), b_dec=np.zeros(2, np.float32),
            threshold=np.array([1.0, -1.0, 0.5], np.float32),
        )  # fmt: skip
    return str(root / name)


def canonical(uri: str) -> list[str]:
    return sorted(sae.path for sae in suites.find(uri, select=["canonical"]))


def test_canonical_is_the_l0_nearest_100_of_each_layer_and_width(tmp_path: Path) -> None:
    uri = suite(
        tmp_path, "gemma-scope-9b-pt-att",
        *(f"layer_23/width_131k/average_l0_{l0}" for l0 in (13, 66, 134, 288)),  # a tie: the smaller
        *(f"layer_27/width_16k/average_l0_{l0}" for l0 in (64, 136, 500)),  # a tie, broken the other way
        *(f"layer_27/width_131k/average_l0_{l0}" for l0 in (64, 136)),
        *(f"layer_3/width_16k/average_l0_{l0}" for l0 in (9, 95, 106)),  # by number, not by name
    )  # fmt: skip
    assert canonical(uri) == [
        "layer_23/width_131k/average_l0_66",
        "layer_27/width_131k/average_l0_64",
        "layer_27/width_16k/average_l0_136",
        "layer_3/width_16k/average_l0_95",
    ]


def test_the_other_way_holds_for_one_repository_only(tmp_path: Path) -> None:
    tie = [f"layer_27/width_16k/average_l0_{l0}" for l0 in (64, 136)]
    assert canonical(suite(tmp_path, "gemma-scope-9b-pt-res", *tie)) == tie[:1]


def test_embeddings_are_never_canonical(tmp_path: Path) -> None:
    uri = suite(
        tmp_path,
        "gemma-scope-2b-pt-res",
        "embedding/width_4k/average_l0_100",
        "layer_0/width_16k/average_l0_7",
    )
    assert canonical(uri) == ["layer_0/width_16k/average_l0_7"]


def test_a_threshold_met_exactly_is_inactive_and_a_negative_one_is_relu(tmp_path: Path) -> None:
    (info,) = suites.find(suite(tmp_path, "gemma-scope-2b-pt-res", "layer_1/width_16k/average_l0_7"))
    x = torch.tensor([[1.0, 0.5], [1.5, -0.5]])  # the pre-activations of features 0 and 1, as W_enc is eye
    assert reference.encode(x, suites.load(info)).tolist() == [[0.0, 0.5, 0.0], [1.5, 0.0, 0.0]]


def test_a_renamed_copy_asks_for_its_site_and_takes_it(tmp_path: Path) -> None:
    uri = suite(tmp_path, "copy", "layer_1/width_16k/average_l0_7")
    with pytest.raises(
        InputError, match=r"saes\.site: .*'copy' says its site; set `site: resid_post` or another of .*attn_z"
    ):
        suites.find(uri)
    (info,) = suites.find(uri, site="attn_z")
    assert (info.site.layer, info.site.kind, info.trained_on, info.neuronpedia) == (1, "attn_z", None, None)


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("gemma-scope-9b-it-res", "gemma-2-9b-it/9-gemmascope-res-131k"),
        ("gemma-scope-27b-pt-res", "gemma-2-27b/9-gemmascope-res-131k"),
        ("gemma-scope-2b-pt-mlp", "gemma-2-2b/9-gemmascope-mlp-131k"),
        ("gemma-scope-2b-pt-transcoders", "gemma-2-2b/9-gemmascope-transcoder-131k"),
    ],
)
def test_pages_are_named_after_the_model_that_was_read(tmp_path: Path, name: str, page: str) -> None:
    (info,) = suites.find(suite(tmp_path, name, "layer_9/width_131k/average_l0_100"))
    assert info.neuronpedia == page
    assert info.trained_on == f"google/{page.split('/')[0]}"
