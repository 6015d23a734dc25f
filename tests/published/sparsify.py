"""EleutherAI sparsify: SAEs by hookpoint, top-k, signed and groupmax, of several seeds and ages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from published.base import Formula, Published

name = "sae-llama-3-8b-32x"
K = 4
MODEL = "meta-llama/Meta-Llama-3-8B"
VARIANTS: dict[str, dict[str, Any]] = {  # by hookpoint's folder; those not given: top-k, as published in 2024
    "layers.{}": {},
    "layers.{}.mlp/seed1": {"kind": "mlp.output", "num_latents": True},
    "layers.{}.mlp/seed2": {"kind": "mlp.output", "bf16": True},
    "layers.{}.attention": {"kind": "attention.output", "num_latents": 0, "transcode": False},
    "layers.{}.mlp.act_fn": {"kind": "mlp.act_fn.output", "rule": "groupmax", "transcode": False},
    "h.{}": {"rule": "abstopk", "old": True},
    "embed_tokens": {"kind": "embed"},
}  # fmt: skip


def topk(x: np.ndarray, k: int) -> np.ndarray:
    return np.where(x >= np.sort(x, axis=1)[:, -k, None], x, 0)


def selected(pre: np.ndarray, rule: str) -> np.ndarray:
    """Activations of `pre` [tokens, m]."""
    if rule == "abstopk":
        return np.where(topk(np.abs(pre), K) > 0, pre, 0)
    if rule == "topk":
        return topk(np.maximum(pre, 0), K)
    f = np.zeros_like(pre)
    size = pre.shape[1] // K
    for group in range(K):
        at = pre[:, group * size : (group + 1) * size].argmax(axis=1) + group * size
        f[np.arange(len(pre)), at] = np.maximum(pre[np.arange(len(pre)), at], 0)
    return f


def write(folder: Path, rng: np.random.Generator, d: int, m: int, n: int, layer: int) -> list[Published]:
    """All of VARIANTS, under a run with a config."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model": MODEL, "dataset": "some", "ctx_len": 2048}))
    return [one(folder, rng, d, m, layer, path.format(layer), **how) for path, how in VARIANTS.items()]


def one(
    folder: Path, rng: np.random.Generator, d: int, m: int, layer: int, path: str, kind: str = "resid_post",
    rule: str = "topk", num_latents: int | bool | None = None, bf16: bool = False, old: bool = False,
    transcode: bool | None = None, skip: bool = False, out: str | None = None, model: str | None = MODEL,
) -> Published:  # fmt: skip
    """An SAE (or, with `out`, a transcoder) on disk, and its formula."""

    def array(*shape: int) -> torch.Tensor:
        made = torch.from_numpy(rng.normal(size=shape)).float()
        return made.bfloat16() if bf16 else made

    state = {"encoder.weight": array(m, d), "encoder.bias": array(m), "b_dec": array(d), "W_dec": array(m, d)}
    E, b, c, D = (value.double().numpy() for value in state.values())
    cfg: dict[str, Any] = {
        "expansion_factor": 32,
        "normalize_decoder": True,
        "k": K,
        "signed": rule == "abstopk",
    }
    if old:
        state["decoder.weight"] = state.pop("W_dec").T.contiguous()
    if num_latents is not None:
        cfg["num_latents"] = m if num_latents is True else num_latents
    if transcode is not None:
        cfg |= {"transcode": transcode, "activation": "groupmax" if rule == "groupmax" else "topk"}
    if skip:
        cfg |= {"multi_topk": False, "skip_connection": True}
        state["W_skip"] = array(d, d)
    S = state["W_skip"].double().numpy() if skip else np.zeros((d, d))
    (folder / path).mkdir(parents=True)
    save_file(state, folder / path / "sae.safetensors")
    (folder / path / "cfg.json").write_text(json.dumps({**cfg, "d_in": d}))
    subtract = not transcode

    def encode(x: np.ndarray) -> np.ndarray:
        return selected((x - c if subtract else x) @ E.T + b, rule)

    decode: Formula = lambda x: encode(x) @ D + c + x @ S.T  # noqa: E731
    at = 0 if kind == "embed" else layer
    architecture = rule + ((("_skip" if skip else "") + "_transcoder") if out else "")
    return Published(
        path, architecture, at, kind, d, m, encode, decode, (at, out or kind), nominal_l0=K, trained_on=model
    )
