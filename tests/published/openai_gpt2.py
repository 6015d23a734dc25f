"""OpenAI's GPT-2 small SAEs: v5 (TopK, layer norm) of each location, and the older ReLU ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from published.base import Published

name = "gpt2-small"
K = 4
PLACES = {  # folder -> kind, and whether it is of TopK
    "resid_delta_attn_v5_32k": ("attn_out", True),
    "resid_post_attn_v5_32k": ("resid_mid", True),
    "resid_delta_mlp_v5_128k": ("mlp_out", True),
    "resid_post_mlp_v5_32k": ("resid_post", True),
    "mlp_post_act_v5_32k": ("mlp_hidden", True),
    "mlp_post_act_v4": ("mlp_hidden", False),
    "resid_delta_mlp": ("mlp_out", False),
}  # fmt: skip


def state_dict(rng: np.random.Generator, d: int, m: int, topk: bool) -> dict[str, object]:
    """As the files hold it: tensors, and the activation's name and state."""
    made: dict[str, object] = {
        "pre_bias": torch.from_numpy(rng.normal(size=d)).float(),
        "latent_bias": torch.from_numpy(rng.normal(size=m)).float(),
        "stats_last_nonzero": torch.zeros(m, dtype=torch.long),
        "latents_activation_frequency": torch.zeros(m, dtype=torch.long),
        "latents_mean_square": torch.zeros(m),
        "encoder.weight": torch.from_numpy(rng.normal(size=(m, d))).float(),
        "decoder.weight": torch.from_numpy(rng.normal(size=(d, m))).float(),
    }
    if topk:
        made |= {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
    return made


def write(folder: Path, rng: np.random.Generator, d: int, m: int, n: int, layer: int) -> list[Published]:
    """One of each place; the v4 one names its ReLU, the oldest does not."""
    found = []
    for place, (kind, topk) in PLACES.items():
        path = f"{place}/autoencoders/{layer}"
        state = state_dict(rng, d, m, topk)
        if place.endswith("v4"):
            state |= {"activation": "ReLU", "activation_state_dict": {}}
        (folder / path).parent.mkdir(parents=True)
        torch.save(state, folder / f"{path}.pt")
        c, b, E, D = (
            state[key].double().numpy()  # type: ignore[attr-defined]
            for key in ("pre_bias", "latent_bias", "encoder.weight", "decoder.weight")
        )

        def moments(x: np.ndarray, topk: bool = topk) -> tuple[np.ndarray, np.ndarray]:
            ones = np.ones((len(x), 1))
            deviation = np.sqrt(
                ((x - x.mean(1, keepdims=True)) ** 2).sum(1, keepdims=True) / (x.shape[1] - 1)
            )
            return (x.mean(1, keepdims=True), deviation + 1e-5) if topk else (0 * ones, ones)

        def encode(
            x: np.ndarray, c: np.ndarray = c, b: np.ndarray = b, E: np.ndarray = E, topk: bool = topk,
            moments: object = moments,
        ) -> np.ndarray:  # fmt: skip
            mean, deviation = moments(x)  # type: ignore[operator]
            pre = ((x - mean) / deviation - c) @ E.T + b
            kept = pre >= np.sort(pre, axis=1)[:, -K, None] if topk else np.ones(pre.shape, bool)
            return np.maximum(pre, 0) * kept

        def decode(
            x: np.ndarray, f: object = encode, D: np.ndarray = D, c: np.ndarray = c, moments: object = moments
        ) -> np.ndarray:
            mean, deviation = moments(x)  # type: ignore[operator]
            return (f(x) @ D.T + c) * deviation + mean  # type: ignore[operator]

        found.append(
            Published(
                path,
                "topk" if topk else "standard",
                layer,
                kind,
                d,
                m,
                encode,
                decode,
                (layer, kind),
                nominal_l0=K if topk else None,
                trained_on="openai-community/gpt2",
            )
        )
    return found
