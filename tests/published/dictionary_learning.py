"""dictionary_learning: a trainer's folder with ae.pt and config.json, of each of its seven classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from published.base import Formula, Published

name = "saebench_pythia70m_sweep"
MODEL = "EleutherAI/pythia-70m-deduped"
K = 3


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def topk(x: np.ndarray, k: int) -> np.ndarray:
    return np.where(x >= np.sort(x, axis=1)[:, -k, None], x, 0)


def classes(
    rng: np.random.Generator, d: int, m: int
) -> dict[str, tuple[str, dict[str, Any], Formula, np.ndarray, np.ndarray]]:
    """Of each class: its name here, its state_dict, its encoder, and its decoder [m,d] and bias."""

    def array(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    E, b, D, c = array(m, d), array(m), array(d, m), array(d)  # E x + b, D f + c; no unit norms
    gate, mag, r = array(m), array(m), array(m) / 3
    theta = np.abs(array(m)) + 1
    theta[1] = -1.0
    linear = {"encoder.weight": E, "encoder.bias": b, "decoder.weight": D}
    plain = {"W_enc": E.T, "b_enc": b, "W_dec": D.T, "b_dec": c}
    k, scalar = np.asarray(K, np.int32), np.asarray(1.7, np.float32)
    E64 = E.astype(np.float64)

    def gated(x: np.ndarray) -> np.ndarray:
        u = (x - c) @ E64.T
        return (u + gate > 0) * relu(np.exp(r.astype(np.float64)) * u + mag)

    def jump(x: np.ndarray) -> np.ndarray:
        pre = x @ E64.T + b
        return relu(pre * (pre > theta))

    def subtracted(x: np.ndarray) -> np.ndarray:
        return relu((x - c) @ E64.T + b)

    def batch(x: np.ndarray) -> np.ndarray:
        f = subtracted(x)
        return f * (f > 1.7)

    groups = np.asarray([m // 4, m - m // 4], np.int64)
    return {
        "AutoEncoder": ("standard", {**linear, "bias": c}, subtracted, D.T, c),
        "AutoEncoderNew": ("standard", {**linear, "decoder.bias": c}, lambda x: relu(x @ E64.T + b), D.T, c),
        "GatedAutoEncoder": (
            "gated",
            {
                "encoder.weight": E, "decoder.weight": D, "decoder_bias": c, "gate_bias": gate,
                "mag_bias": mag, "r_mag": r,
            },
            gated, D.T, c,
        ),
        "JumpReluAutoEncoder": ("jumprelu", {**plain, "threshold": theta}, jump, D.T, c),
        "AutoEncoderTopK": (
            "topk", {**linear, "b_dec": c, "k": k, "threshold": np.asarray(-1.0, np.float32)},
            lambda x: topk(subtracted(x), K), D.T, c,
        ),
        "BatchTopKSAE": ("batchtopk", {**linear, "b_dec": c, "k": k, "threshold": scalar}, batch, D.T, c),
        "MatryoshkaBatchTopKSAE": (
            "matryoshka_batchtopk", {**plain, "k": k, "threshold": scalar, "group_sizes": groups},
            batch, D.T, c,
        ),
    }  # fmt: skip


def save(file: Path, state: dict[str, Any]) -> None:
    """A state_dict as the library saves it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: torch.from_numpy(np.array(value)) for key, value in state.items()}, file)


def config(dict_class: str, d: int, m: int, layer: int | str, io: str | None = "out", **other: Any) -> str:
    """The keys of a trainer's config.json that matter, and some that do not."""
    trainer = {
        "trainer_class": "SomeTrainer", "dict_class": dict_class, "activation_dim": d, "dict_size": m,
        "lr": 1e-3, "layer": layer, "lm_name": MODEL, "submodule_name": f"resid_post_layer_{layer}", **other,
    }  # fmt: skip
    return json.dumps(
        {
            "trainer": trainer,
            **({} if io is None else {"buffer": {"d_submodule": d, "io": io, "ctx_len": 128}}),
        }
    )


def write(folder: Path, rng: np.random.Generator, d: int, m: int, n: int, layer: int) -> list[Published]:
    """Each class as a trainer, two layouts of checkpoints, an older file without k, and other sites."""
    known = classes(rng, d, m)
    found: list[Published] = []

    def add(
        path: str, file: str, dict_class: str, kind: str = "resid_post", l0: float | None = None,
        io: str | None = "out", drop: tuple[str, ...] = (), place: str | None = None, **other: Any,
    ) -> None:  # fmt: skip
        architecture, state, encode, D, c = known[dict_class]
        save(folder / file, {key: value for key, value in state.items() if key not in drop})
        (folder / (place or path) / "config.json").write_text(
            config(dict_class, d, m, **{"layer": layer, "io": io, **other})
        )
        at = 0 if kind == "embed" else layer
        found.append(
            Published(
                path,
                architecture,
                at,
                kind,
                d,
                m,
                encode,
                lambda x: encode(x) @ D.astype(np.float64) + c,
                (at, kind),
                nominal_l0=l0,
                trained_on=MODEL,
            )
        )

    base = f"resid_post_layer_{layer}"
    for i, dict_class in enumerate(known):
        has_k = "TopK" in dict_class
        path = f"{base}/trainer_{i}"
        add(path, f"{path}/ae.pt", dict_class, l0=K if has_k else None, **({"k": K} if has_k else {}))
    path = f"{base}/trainer_0/checkpoints/ae_5000"
    add(path, f"{path}.pt", "AutoEncoder", place=f"{base}/trainer_0")
    path = f"sweep/{base}_checkpoints/trainer_4_step_1220"
    add(path, f"{path}/ae.pt", "AutoEncoderTopK", l0=K, drop=("k", "threshold"), k=K, io=None)
    for label, io, kind in (
        (f"mlp_out_layer_{layer}", "out", "mlp_out"),
        (f"attn_out_layer{layer}", "out", "attn_out"),
        ("mlp", "in", "mlp_in"),
        ("resid", "in", "resid_pre"),
        (f"blocks.{layer}.hook_resid_post", None, "resid_post"),
        ("embed", "out", "embed"),
    ):
        path = f"sites/{kind}/trainer_0"
        add(path, f"{path}/ae.pt", "JumpReluAutoEncoder", kind, 80.0, io, target_l0=80, submodule_name=label)
    path = f"nameless/mlp_out_layer_{layer}/10_1024"
    add(path, f"{path}/ae.pt", "AutoEncoder", "mlp_out", submodule_name=None, layer="")
    return found
