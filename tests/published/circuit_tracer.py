"""circuit-tracer: transcoder sets and cross-layer transcoders, one folder each; and sets listed elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from published.base import Published, quantile_threshold

Array = np.ndarray
HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}


def tensors(
    rng: np.random.Generator, d: int, m: int, n: int, *, skip: bool = False, jump: bool = False
) -> dict[str, Array]:
    """One layer's, by circuit-tracer's names and as it lays them: W_enc [m,d], W_dec [m,n], W_skip [n,d]."""
    T = {
        "W_enc": rng.normal(size=(m, d)),
        "b_enc": rng.normal(size=m),
        "W_dec": rng.normal(size=(m, n)),
        "b_dec": rng.normal(size=n),
    }
    if jump:
        pre = rng.normal(size=(500, d)) * 3 @ T["W_enc"].T + T["b_enc"]
        T["activation_function.threshold"] = quantile_threshold(pre, 0.3)
    if skip:
        T["W_skip"] = rng.normal(size=(n, d))
    return {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in T.items()}


def put(folder: Path, config: dict[str, Any] | None, files: dict[str, dict[str, Array]]) -> None:
    """A set's folder: config.yaml and files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for name, T in files.items():
        save_file(T, folder / f"{name}.safetensors")


def published(
    path: str, T: dict[str, Array], architecture: str, layer: int, kind: str = "mlp_in",
    *, k: int | None = None, out: tuple[int, str] | None = None, **more: Any,
) -> Published:  # fmt: skip
    """The formulas of one layer's tensors, W_dec as [m,n]."""
    T = {key: value.astype(np.float64) for key, value in T.items()}
    m, d = T["W_enc"].shape

    def encode(x: Array) -> Array:
        pre = x @ T["W_enc"].T + T["b_enc"]
        if k is not None:  # a gate of ones on the k highest: the sign stays
            chosen = np.zeros(pre.shape, bool)
            np.put_along_axis(chosen, np.argsort(-pre, axis=1, kind="stable")[:, :k], True, axis=1)
            return np.where(chosen, pre, 0)
        if architecture.startswith("jumprelu"):
            return np.where(pre > T["activation_function.threshold"], np.maximum(pre, 0), 0)
        return np.maximum(pre, 0)

    def decode(x: Array) -> Array:
        y = encode(x) @ T["W_dec"] + T["b_dec"]
        return y + x @ T["W_skip"].T if "W_skip" in T else y

    clt = architecture.endswith("_clt")
    l0 = None if k is None else float(k)
    return Published(
        path, architecture, layer, kind, d, m, encode, None if clt else decode,
        None if clt else out or (layer, "mlp_out"), nominal_l0=l0, **more,
    )  # fmt: skip


def write(folder: Path, rng: np.random.Generator, d: int, m: int, n: int, layer: int) -> list[Published]:
    """Sets in their folders, each with a config.yaml."""
    found = []
    llama = {"trained_on": "meta-llama/Llama-3.2-1B"}
    qwen = {"trained_on": "Qwen/Qwen3-4B"}
    middle = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "mlp.hook_out"}
    template = {"feature_input_hook": "blocks.{layer}.hook_resid_pre"}
    for name, architecture, config, make, more in (
        ("relu", "transcoder", {"model_name": "Qwen/Qwen3-4B"}, {}, qwen),
        ("jump", "jumprelu_transcoder", {"model_name": "qwen3-4b", "scan": "x"}, {"jump": True}, qwen),
        ("skip", "skip_transcoder", {"model_name": "llama-3.2-1b", **middle}, {"skip": True},
         {"kind": "resid_mid", **llama}),
        ("jump_skip", "jumprelu_skip_transcoder", {"model_name": None}, {"skip": True, "jump": True}, {}),
        # A threshold in the file has the last word over `activation: relu`.
        ("forced", "jumprelu_transcoder", {"model_name": "unheard-of", "activation": "relu"}, {"jump": True},
         {"trained_on": "unheard-of"}),
        ("topk", "topk_transcoder", {"activation": "topk", "k": 5}, {}, {"k": 5}),
        ("template", "transcoder", template, {}, {"kind": "resid_pre"}),
    ):  # fmt: skip
        files = {}
        for at in (layer, layer + 1):
            T = tensors(rng, d, m, n, **make)
            found.append(published(f"{name}/layer_{at}", T, architecture, at, **more))
            files[f"layer_{at}"] = T
        put(folder / name, {"model_kind": "transcoder_set", **HOOKS, **config}, files)

    # Decoders as [n,m], and one threshold for all: told by the biases, unless the matrix is square.
    T = tensors(rng, d, m, n, jump=True)
    T["activation_function.threshold"] = np.full(1, 1.5, np.float32)
    found.append(published(f"old/layer_{layer}", T, "jumprelu_transcoder", layer))
    turned = T if m == n else {**T, "W_dec": np.ascontiguousarray(T["W_dec"].T)}
    put(folder / "old", {**HOOKS}, {f"layer_{layer}": turned})

    clt = {"model_kind": "cross_layer_transcoder", "model_name": "gemma-2-2b", **middle}
    for name, jump in (("clt", False), ("jump_clt", True)):
        files = {}
        for at in range(3):  # the last layer too
            T = tensors(rng, d, m, d, jump=jump)
            names = {"activation_function.threshold": f"threshold_{at}"}
            own = {names.get(key, f"{key}_{at}"): value for key, value in T.items() if key != "W_dec"}
            files[f"W_enc_{at}"] = own
            files[f"W_dec_{at}"] = {f"W_dec_{at}": rng.normal(size=(m, 3 - at, d)).astype(np.float32)}
            architecture = "jumprelu_clt" if jump else "standard_clt"
            found.append(
                published(
                    f"{name}/W_enc_{at}", T, architecture, at, "resid_mid", trained_on="google/gemma-2-2b"
                )
            )
        put(folder / name, clt, files)

    # A list of files that are elsewhere, of this format and of both of Gemma Scope.
    away = folder.parent / "elsewhere"
    away.mkdir()
    T, G, H = (tensors(rng, d, m, n, jump=True, skip=at == 2) for at in range(3))
    put(away, None, {"own": T})
    npz = {"W_enc": G["W_enc"].T, "threshold": G["activation_function.threshold"]}
    np.savez(away / "params.npz", **npz, **{key: G[key] for key in ("b_enc", "W_dec", "b_dec")})
    second = {"W_enc": "w_enc", "W_dec": "w_dec", "W_skip": "affine_skip_connection"}
    second["activation_function.threshold"] = "threshold"
    turned = {
        second.get(key, key): np.ascontiguousarray(H[key].T if key in ("W_enc", "W_skip") else H[key])
        for key in H
    }
    put(away, None, {"params": turned})
    listed = [f"file://{away}/{name}" for name in ("own.safetensors", "params.npz", "params.safetensors")]
    put(folder / "listed", {"model_kind": "transcoder_set", **HOOKS, "transcoders": listed}, {})
    for at, (tensor, skip) in enumerate(((T, ""), (G, ""), (H, "skip_"))):
        found.append(published(f"listed/layer_{at}", tensor, f"jumprelu_{skip}transcoder", at))

    # The same of a cross-layer transcoder, as Gemma Scope 2 stores one: every layer's decoder in each file.
    T = tensors(rng, d, m, d, jump=True)
    stored = {"w_enc": np.ascontiguousarray(T["W_enc"].T), "w_dec": rng.normal(size=(m, 3, d)).astype("f4")}
    stored["threshold"] = T["activation_function.threshold"]
    put(away, None, {"params_layer_0": {**stored, "b_enc": T["b_enc"], "b_dec": T["b_dec"]}})
    put(folder / "listed_clt", {**clt, "transcoders": [f"file://{away}/params_layer_0.safetensors"]}, {})
    found.append(
        published("listed_clt/layer_0", T, "jumprelu_clt", 0, "resid_mid", trained_on="google/gemma-2-2b")
    )
    return found
