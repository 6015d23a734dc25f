"""What screens leave to refine: candidates an active pair, of an fp8 screen that there is not and of ours.

Products in e4m3 with a scale per token and per feature, of activations centred by their mean and with the 32
loudest dimensions in float32 beside; emulated, so this counts and times nothing. A pair is a candidate where
the cheap product plus a margin is over the threshold. Two margins: the error's bound by Cauchy and Schwarz,

    |z - q(z)| |w| + |q(z)| |w - q(w)|

which never misses and is ours too (sae_runtime/cheap.py), and six standard deviations of the error, which
may. Only SAEs with thresholds.

    python benchmarks/candidates.py SPEC.yaml [--tokens 4096]
"""

from __future__ import annotations

import tempfile
from typing import Any

import click
import numpy as np
import scan
import torch

from sae_runtime import screen, suites
from sae_runtime.cheap import Bfloat, Cheap, Int8
from sae_runtime.encode import Encoder
from sae_runtime.sae import SaeWeights

LOUDEST = 32


def rounded(x: torch.Tensor, dim: int) -> torch.Tensor:
    """`x` through e4m3, scaled so that the largest of each line along `dim` is the largest e4m3."""
    scale = (x.abs().amax(dim, keepdim=True) / 448).clamp(min=1e-30)
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def candidates(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, floor: torch.Tensor) -> dict[str, float]:
    """Counts for activations [tokens, d], encoder [d, width], bias and thresholds [width]."""
    z = x - x.mean(dim=0)
    pre = x @ W + b
    apart = torch.zeros(x.shape[1], dtype=torch.bool)
    apart[z.square().sum(dim=0).topk(LOUDEST).indices] = True
    rest, weight = z.masked_fill(apart, 0), W.masked_fill(apart[:, None], 0)
    near, cheap_weight = rounded(rest, 1), rounded(weight, 0)
    cheap = near @ cheap_weight + z[:, apart] @ W[apart] + (x.mean(dim=0) @ W + b)
    bound = (rest - near).norm(dim=1)[:, None] * weight.norm(dim=0)
    bound += near.norm(dim=1)[:, None] * (weight - cheap_weight).norm(dim=0)
    size = rest.norm(dim=1)[:, None] * weight.norm(dim=0)
    deviation = ((cheap - pre) / size).square().mean().sqrt()
    active, six = pre > floor, cheap + 6 * deviation * size > floor
    n = float(active.sum())
    return {
        "l0": n / len(x),
        "bound": float((cheap + bound > floor).sum()) / n,
        "six": float(six.sum()) / n,
        "missed": float((active & ~six).sum()),
        "missed by the bound": float((active & ~(cheap + bound > floor)).sum()),
    }


def refined(x: torch.Tensor, sae: SaeWeights, kind: type[Cheap]) -> float:
    """Candidates an active pair that our screen has with activations [tokens, d] in bfloat16."""
    seen = np.zeros(2, np.int64)
    inner, worth = screen._refine, screen.worth_refining

    def counting(*args: Any) -> tuple[int, int]:
        found = inner(*args)
        seen[:] += found
        return found

    encoder = Encoder(sae, torch.device("cpu"))
    assert encoder.cut is not None
    encoder.screen = screen.Screen(encoder.weight, encoder.bias[:, 0], encoder.cut.floor, kind)
    try:
        screen._refine, screen.worth_refining = counting, lambda: 1.0  # however many, not another type
        encoder.encode(x)
    finally:
        screen._refine, screen.worth_refining = inner, worth
    return float(seen[1] / seen[0])


@click.command()
@click.argument("spec")
@click.option("--tokens", default=4096, show_default=True)
def main(spec: str, tokens: int) -> None:
    """Print candidates an active pair for every SAE of a spec."""
    with tempfile.TemporaryDirectory() as folder:
        scanner, prepared, planned = scan.loaded_scanner(spec, folder)
        (ids, *_) = scan.floor_batches(scanner, prepared, planned, 1, tokens)
    found = scanner.model.run(ids)
    for info in scanner.infos:
        sae = suites.load(info)
        if sae.threshold is None:
            continue
        x = found[info.site][:, 1:].flatten(0, 1).float()
        x = x[x.norm(dim=1) < 10 * x.norm(dim=1).median()]
        counts = candidates(x, sae.W_enc, sae.b_enc, sae.threshold.clamp(min=0))
        ours = ", ".join(f"{kind.__name__} {refined(x.bfloat16(), sae, kind):.2f}" for kind in (Bfloat, Int8))
        click.echo(
            f"{info.id}: L0 {counts['l0']:.0f}, width/L0 {info.width / counts['l0']:.0f}: "
            f"candidates an active pair {counts['bound']:.1f} by the bound "
            f"(missed {counts['missed by the bound']:.0f}), "
            f"{counts['six']:.2f} by six deviations (missed {counts['missed']:.0f}); ours {ours}"
        )


if __name__ == "__main__":
    main()
