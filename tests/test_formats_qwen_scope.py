"""Qwen Scope: the k highest as they are, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import qwen_scope

from sae_runtime import reference, suites
from sae_runtime.errors import InputError


def made(root: Path, **other: Any) -> str:
    """The fixture's suite with keys of its config replaced; `...` takes one out."""
    qwen_scope.write(root, np.random.default_rng(1), 6, 16, 5, 2)
    file = root / "config.json"
    said = {**json.loads(file.read_text()), **other}
    file.write_text(json.dumps({key: value for key, value in said.items() if value is not ...}))
    return str(root)


def test_negative_ones_of_the_k_highest_stay(tmp_path: Path) -> None:
    info = suites.find(made(tmp_path / "suite"))[0]
    f = reference.encode(torch.full((1, 6), 0.01), suites.load(info))
    assert int((f != 0).sum()) == qwen_scope.K
    assert (f < 0).any()
    assert "negative" in info.convention


def test_layers_are_in_order_of_number(tmp_path: Path) -> None:
    assert [sae.path for sae in suites.find(made(tmp_path / "suite"))] == ["layer2", "layer11"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"model_type": "relu_sae"}, "model_type 'relu_sae' in .*config.json; Qwen Scope is topk_sae"),
        ({"hook_point": "mlp_out"}, "hook_point 'mlp_out' in .*config.json"),
        ({"k": ...}, "no k in .*config.json"),
        (
            {"d_sae": 6, "d_model": 16},
            r"W_enc in .*layer\d+.sae.pt is \(16, 6\), but .* d_sae 6 and d_model 16",
        ),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        suites.find(made(tmp_path / "suite", **other))


def test_without_a_config_k_is_unknown(tmp_path: Path) -> None:
    uri = made(tmp_path / "suite")
    (tmp_path / "suite/config.json").unlink()
    with pytest.raises(InputError, match=r"no config.json beside .*; k is in it"):
        suites.find(uri)


def test_a_file_that_runs_code_is_refused(tmp_path: Path) -> None:
    uri = made(tmp_path / "suite")
    torch.save({"W_enc": Path("x")}, tmp_path / "suite/layer2.sae.pt")
    with pytest.raises(InputError, match=r"cannot read .*layer2.sae.pt"):
        suites.find(uri)
