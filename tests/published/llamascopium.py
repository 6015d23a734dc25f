"""llamascopium 2: every activation function, normalisation and file that can be read exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from published.base import Published, quantile_threshold

name = "Llama-Scope-2-Qwen3-1.7B"
K, NORM, NORM_OUT = 3, 21.0, 4.5
VARIANTS: dict[str, dict[str, Any]] = {  # by folder; those not given: jumprelu, dataset-wise, gated by norms
    "sae/8x/k64/layer{}_sae_8x_k64": {"l0": 64.0},
    "sae/8x/k64/layer{}_sae_8x_plain": {"gated": False, "norm": "inference", "l0": 64.0},
    "sae/topk/layer{}_sae_8x": {"act": "topk", "l0": K},
    "sae/topk/layer{}_sae_token": {"act": "TopK", "norm": "token-wise", "gated": False, "l0": K},
    "sae/relu/layer{}_sae_glu": {"act": "relu", "glu": True, "bias": False},
    "sae/jumprelu/layer{}_sae_glu": {"glu": True},
    "sae/pt/layer{}_sae_8x": {"ending": "pt"},
    "transcoder/8x/k64/layer{}_transcoder_8x_k64": {"to": "hook_mlp_out", "at": "mlp.hook_in", "l0": 64.0},
    "transcoder/8x/layer{}_transcoder_token": {
        "to": "hook_mlp_out", "at": "mlp.hook_in", "norm": "token-wise", "type": "transcoder",
    },
    "some_name": {"act": "relu"},
}  # fmt: skip


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def topk(x: np.ndarray, k: int) -> np.ndarray:
    return np.where(x >= np.sort(x, axis=1)[:, -k, None], x, 0)


def config(d: int, m: int, **other: Any) -> str:
    """config.json of an SAE; `other` is what differs."""
    return json.dumps(
        {
            "sae_type": "sae", "d_model": d, "expansion_factor": m / d, "act_fn": "jumprelu", "top_k": K,
            "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True,
            "use_decoder_bias": True, "use_glu_encoder": False, "dtype": "torch.float32", **other,
        }
    )  # fmt: skip


def save(file: Path, state: dict[str, np.ndarray]) -> None:
    """As save_pretrained does, by the file's ending."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in state.items()}
    if file.suffix == ".pt":
        torch.save({"sae": tensors, "version": "2.0.0b34"}, file)
    else:
        save_file(tensors, file)


def write(folder: Path, rng: np.random.Generator, d: int, m: int, n: int, layer: int) -> list[Published]:
    """All of VARIANTS."""
    return [one(folder, rng, d, m, layer, path.format(layer), **how) for path, how in VARIANTS.items()]


def one(
    folder: Path, rng: np.random.Generator, d: int, m: int, layer: int, path: str, act: str = "jumprelu",
    norm: str = "dataset-wise", gated: bool = True, glu: bool = False, bias: bool = True,
    ending: str = "safetensors", at: str = "hook_resid_post", to: str | None = None, type: str = "sae",
    l0: float | None = None,
) -> Published:  # fmt: skip
    """An SAE or transcoder on disk, and its formula."""

    def array(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    E, b, D, c, G, g = array(d, m), array(m), array(m, d) * 2, array(d), array(d, m), array(m)
    hooks = f"blocks.{layer}.{at}", f"blocks.{layer}.{to or at}"
    factors = np.sqrt(d) / NORM, np.sqrt(d) / (NORM_OUT if to else NORM)
    column = np.linalg.norm(D.astype(np.float64), axis=1) if gated else np.ones(m)

    def rank(x: np.ndarray) -> np.ndarray:
        if norm == "dataset-wise":
            x = x * factors[0]
        elif norm == "token-wise":
            x = x * np.sqrt(d) / np.linalg.norm(x, axis=1, keepdims=True)
        pre = x @ E.astype(np.float64) + b
        if glu:
            pre = pre / (1 + np.exp(-(x @ G.astype(np.float64) + g)))
        return pre * column

    theta = quantile_threshold(rank(rng.normal(size=(500, d)) * 3), 0.3)
    log = np.log(theta).astype(np.float32)

    def encode(x: np.ndarray) -> np.ndarray:
        z = rank(x)
        if act.lower() == "jumprelu":
            return relu(z * (z > np.exp(log.astype(np.float64)))) / column
        return (topk(relu(z), K) if act.lower() == "topk" else relu(z)) / column

    def decode(x: np.ndarray) -> np.ndarray:
        y = encode(x) @ D.astype(np.float64) + (c if bias else 0)
        if norm == "dataset-wise":
            return y / factors[1]
        return y * np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(d) if norm == "token-wise" else y

    state = {"W_E": E, "b_E": b, "W_D": D}
    if bias:
        state["b_D"] = c
    if glu:
        state |= {"W_E_glu": G, "b_E_glu": g}
    if act == "jumprelu":
        state["activation_function.log_jumprelu_threshold"] = log
    for hook, value in zip(hooks, (NORM, NORM_OUT if to else NORM), strict=True):
        if norm == "dataset-wise":
            state[f"dataset_average_activation_norm.{hook}"] = np.asarray(value, np.float32)
    save(folder / path / f"sae_weights.{ending}", state)
    (folder / path / "config.json").write_text(
        config(
            d,
            m,
            sae_type=type,
            act_fn=act,
            norm_activation=norm,
            sparsity_include_decoder_norm=gated,
            use_decoder_bias=bias,
            use_glu_encoder=glu,
            hook_point_in=hooks[0],
            hook_point_out=hooks[1],
        )
    )
    unknown = to is not None and norm == "token-wise"  # the output's own norm would be needed
    base = {"relu": "standard"}.get(act, act.lower())
    return Published(
        path, base + ("_transcoder" if to else ""), layer, "mlp_in" if to else "resid_post", d, m, encode,
        None if unknown else decode, None if unknown else (layer, "mlp_out" if to else "resid_post"),
        nominal_l0=l0,
    )  # fmt: skip
