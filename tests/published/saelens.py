"""SAELens, configs of version 6: every architecture, normalisation and kind of hook name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from published.base import Published, quantile_threshold

Array = np.ndarray


def normalised(x: Array, how: str) -> tuple[Array, Callable[[Array], Array]]:
    """What SAELens encodes of `x` [tokens, d], and how it brings a reconstruction back."""
    if how == "layer_norm":
        mean, centred = x.mean(1, keepdims=True), x - x.mean(1, keepdims=True)
        std = np.sqrt((centred**2).sum(1, keepdims=True) / (x.shape[1] - 1))
        return centred / (std + 1e-5), lambda y: y * std + mean
    if how == "constant_norm_rescale":
        scale = np.sqrt(x.shape[1]) / np.sqrt((x**2).sum(1, keepdims=True))
        return x * scale, lambda y: y / scale
    if how == "center":
        mean = x.mean(1, keepdims=True)
        return x - mean, lambda y: y + mean
    return x, lambda y: y


def top(score: Array, k: int) -> Array:
    """Whether each is among the `k` highest of its row."""
    chosen = np.zeros(score.shape, bool)
    np.put_along_axis(chosen, np.argsort(-score, axis=1, kind="stable")[:, :k], True, axis=1)
    return chosen


def activations(z: Array, T: dict[str, Array], architecture: str, k: int | None, rescale: bool) -> Array:
    """SAELens' encoders, float64."""
    if architecture == "gated":
        u = z @ T["W_enc"]
        return np.where(u + T["b_gate"] > 0, np.maximum(u * np.exp(T["r_mag"]) + T["b_mag"], 0), 0)
    pre = z @ T["W_enc"] + T["b_enc"]
    if rescale:
        pre = pre * np.sqrt((T["W_dec"] ** 2).sum(1))
    if architecture == "topk":
        return np.where(top(pre, k or 0), np.maximum(pre, 0), 0)
    if architecture == "abstopk":
        return np.where(top(np.abs(pre), k or 0), pre, 0)
    if architecture.startswith("jumprelu"):
        threshold = T["threshold"] if "threshold" in T else np.exp(T["log_threshold"])
        return np.where(pre > threshold, np.maximum(pre, 0), 0)
    return np.maximum(pre, 0)


def tensors(
    rng: np.random.Generator, architecture: str, d: int, m: int, n: int, log: bool = False
) -> dict[str, Array]:
    """What SAELens saves, float32, with decoder rows that are not of norm 1."""
    T = {
        "W_enc": rng.normal(size=(d, m)),
        "b_enc": rng.normal(size=m),
        "W_dec": rng.normal(size=(m, n)) * rng.uniform(0.2, 3, size=(m, 1)),
        "b_dec": rng.normal(size=n),
    }
    if architecture == "gated":
        del T["b_enc"]
        T.update(b_gate=rng.normal(size=m), b_mag=rng.normal(size=m), r_mag=rng.normal(size=m) * 0.3)
    if architecture.startswith("jumprelu"):
        threshold = quantile_threshold(rng.normal(size=(500, d)) * 3 @ T["W_enc"] + T["b_enc"], 0.3)
        T["log_threshold" if log else "threshold"] = np.log(threshold) if log else threshold
    if "skip" in architecture:
        T["W_skip"] = rng.normal(size=(n, d))
    return {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in T.items()}


def put(folder: Path, cfg: dict[str, Any], T: dict[str, Array]) -> None:
    """cfg.json and sae_weights.safetensors, and files beside them that do not matter."""
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(T, folder / "sae_weights.safetensors")
    save_file({"sparsity": np.zeros(4, np.float32)}, folder / "sparsity.safetensors")
    (folder / "runner_cfg.json").write_text("{}")


def published(
    path: str, T: dict[str, Array], architecture: str, layer: int, kind: str, *,
    out: tuple[int, str] | None = None, norm: str = "none", subtract: bool = True, k: int | None = None,
    rescale: bool = False, **more: Any,
) -> Published:  # fmt: skip
    """The formulas of what `put` wrote."""
    T = {key: value.astype(np.float64) for key, value in T.items()}
    transcoder = architecture.endswith("transcoder")

    def z(x: Array) -> Array:
        return normalised(x, norm)[0] - (T["b_dec"] if subtract and not transcoder else 0)

    def encode(x: Array) -> Array:
        return activations(z(x), T, architecture, k, rescale)

    def decode(x: Array) -> Array:
        f = encode(x) / (np.sqrt((T["W_dec"] ** 2).sum(1)) if rescale else 1)
        y = f @ T["W_dec"] + T["b_dec"]
        if transcoder:
            return y + x @ T["W_skip"].T if "W_skip" in T else y
        return normalised(x, norm)[1](y)

    return Published(
        path,
        architecture,
        layer,
        kind,
        *T["W_enc"].shape,
        encode,
        decode,
        out=out or (layer, kind, *([more["head"]] if "head" in more else [])),  # type: ignore[arg-type]
        nominal_l0=None if k is None else float(k),
        **more,
    )


def write(folder: Path, rng: np.random.Generator, d: int, m: int, n: int, layer: int) -> list[Published]:
    """One SAE or transcoder of each kind, each in a folder."""
    found = []
    hook = f"blocks.{layer}.hook_resid_post"
    base = {"hook_name": hook, "model_name": "gemma-2-2b", "sae_lens_version": "6.12.1"}
    module = f"model.layers.{layer}"
    mlp = {
        "hook_name": f"blocks.{layer}.mlp.hook_in",
        "hook_name_out": f"blocks.{layer}.hook_mlp_out",
        "model_name": "Qwen/Qwen3-4B",
    }
    unit = {**mlp, "hook_name": f"blocks.{layer}.ln2.hook_normalized"}
    # A name that TransformerLens gives to something else: the module's own name decides.
    by_module = {
        **mlp,
        "hook_name": f"blocks.{layer}.hook_mlp_in",
        "hf_hook_name": f"{module}.pre_feedforward_layernorm.output",
        "hf_hook_name_out": f"{module}.post_feedforward_layernorm.output",
        "hook_name_out": None,
    }
    head = {"hook_name": f"blocks.{layer}.attn.hook_z", "hook_head_index": 3}
    centred = {"model_from_pretrained_kwargs": {"center_writing_weights": True}, "model_name": "gpt2-small"}
    whole = {**centred, "hook_name": f"blocks.{layer}.attn.hook_z"}
    hidden = {
        "hook_name": f"{module}.mlp",
        "model_class_name": "AutoModelForCausalLM",
        "model_name": "gpt2-xl",
    }
    gemma, qwen = "google/gemma-2-2b", "Qwen/Qwen3-4B"
    gpt2, out = "openai-community/gpt2", (layer, "mlp_out")
    for path, architecture, top_level, meta, kind, more in (
        ("standard", "standard", {}, {"neuronpedia_id": "gemma-2-2b/2-res-x"}, "resid_post",
         {"neuronpedia": "gemma-2-2b/2-res-x"}),
        ("kept", "standard", {"apply_b_dec_to_input": False}, {}, "resid_post", {"subtract": False}),
        ("gated", "gated", {"sae_lens_version": "6.0.0-rc.1"}, {"sae_lens_version": None}, "resid_post", {}),
        ("jumprelu", "jumprelu", {"apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True}, {},
         "resid_post", {"subtract": False}),
        ("log", "jumprelu", {}, {}, "resid_post", {"log": True}),
        ("topk", "topk", {"k": 3}, {"k": 5, "rescale_acts_by_decoder_norm": True}, "resid_post", {"k": 3}),
        ("rescaled", "topk", {"k": 3, "rescale_acts_by_decoder_norm": True}, {}, "resid_post",
         {"k": 3, "rescale": True}),
        ("abstopk", "abstopk", {"k": 4}, {}, "resid_post", {"k": 4}),
        ("both", "abstopk", {"k": 4, "rescale_acts_by_decoder_norm": True}, {}, "resid_post",
         {"k": 4, "rescale": True}),
        ("layer_norm", "topk", {"k": 3, "normalize_activations": "layer_norm"}, centred, "resid_post",
         {"k": 3, "norm": "layer_norm", "trained_on": gpt2}),
        ("constant", "standard", {"normalize_activations": "constant_norm_rescale"}, {}, "resid_post",
         {"norm": "constant_norm_rescale"}),
        ("centred", "standard", {"normalize_activations": None}, centred, "resid_post",
         {"norm": "center", "trained_on": gpt2}),
        ("whole", "standard", {"reshape_activations": "hook_z"}, whole, "attn_z", {"trained_on": gpt2}),
        ("head", "standard", {"reshape_activations": "hook_z"}, head, "attn_z", {"head": 3}),
        ("module", "standard", {}, hidden, "mlp.output", {"trained_on": "openai-community/gpt2-xl"}),
        ("transcoder", "transcoder", {}, mlp, "mlp_in", {"out": out, "trained_on": qwen}),
        ("skip", "skip_transcoder", {}, unit, "mlp_in_unit", {"out": out, "trained_on": qwen}),
        ("jump_transcoder", "jumprelu_transcoder", {}, by_module, "mlp_in", {"out": out, "trained_on": qwen}),
        ("jump_skip", "jumprelu_skip_transcoder", {}, mlp, "mlp_in", {"out": out, "trained_on": qwen}),
        ("rescaled_input", "transcoder", {"normalize_activations": "constant_norm_rescale"}, mlp, "mlp_in",
         {"out": out, "trained_on": qwen, "norm": "constant_norm_rescale"}),
    ):  # fmt: skip
        transcoder = architecture.endswith("transcoder")
        options: dict[str, Any] = {"trained_on": gemma, **more}
        T = tensors(rng, architecture, d, m, n if transcoder else d, log=options.pop("log", False))
        cfg = {
            "architecture": architecture,
            "d_in": d,
            "d_sae": m,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": not transcoder,
            "normalize_activations": "none",
            "reshape_activations": "none",
            **top_level,
            "metadata": {**base, "prepend_bos": True, **meta},
        }
        put(folder / path, cfg, T)
        found.append(published(path, T, architecture, layer, kind, **options))
    return found
