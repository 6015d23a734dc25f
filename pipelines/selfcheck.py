"""What a scan says against itself: SAEs made for another model, or that do not behave as published.

Invariant: only facts decide: the L0 measured against the nominal one, and the fraction of variance
unexplained. A wrong site or normalisation shows as an order of magnitude, so a factor of 2 is loud enough
to be seen and rarely wrong. Nothing is stopped: the values are what the formula gives of what the model
produced, and a person has to judge.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sae_runtime.sae import SaeInfo

MIN_TOKENS = 256  # counted tokens below which a mean says little
FACTOR = 2.0
_SHOWN = 5


@dataclass(frozen=True)
class Measured:
    """One SAE over one unit."""

    sae: str
    n_tokens: int  # counted
    n_active: int  # active (feature, token) pairs
    fvu: float | None  # None without a decoder or a sample


def complaints(saes: Iterable[SaeInfo], measured: Sequence[Measured]) -> list[str]:
    """One line for each SAE whose L0 is more than a factor of 2 off, or that explains nothing."""
    by_id = {found.sae: found for found in measured}
    lines = [line for sae in saes if sae.id in by_id and (line := _complaint(sae, by_id[sae.id]))]
    if len(lines) > _SHOWN:
        lines = [*lines[:_SHOWN], f"and {len(lines) - _SHOWN} more SAEs like these"]
    if lines:
        lines.append(
            "likely causes: another model or revision than the SAEs were trained on, a wrong `site`, text "
            "without the BOS or chat template that they were trained with (`context.bos`, `context.exclude`)"
        )
    return [f"warning: {line}" for line in lines]


def _complaint(sae: SaeInfo, found: Measured) -> str | None:
    if found.n_tokens < MIN_TOKENS:
        return None
    told = []
    l0 = found.n_active / found.n_tokens
    if sae.nominal_l0 and not sae.nominal_l0 / FACTOR <= l0 <= sae.nominal_l0 * FACTOR:
        told.append(f"L0 is {l0:.4g}, nominally {sae.nominal_l0:.4g}")
    if found.fvu is not None and found.fvu >= 1:
        told.append(f"its reconstruction is worse than the mean would be (FVU {found.fvu:.3g})")
    return f"{sae.id}: {' and '.join(told)}, over {found.n_tokens:,} tokens" if told else None


def other_model(saes: Iterable[SaeInfo], uri: str) -> list[str]:
    """One line for each model that SAEs say they were trained on and that `uri`'s name is not.

    Base SAEs on an instruction-tuned model pass every check of shapes, so names are all there is.
    """
    suites: dict[str, set[str]] = {}
    for sae in saes:
        if sae.trained_on is not None and not same_model(sae.trained_on, uri):
            suites.setdefault(sae.trained_on, set()).add(sae.suite)
    return [
        f"warning: {', '.join(sorted(names))} was trained on {model}, by its files, and model.uri is {uri}; "
        "activations of another model are not what its features were found in"
        for model, names in sorted(suites.items())
    ]


def same_model(trained_on: str, uri: str) -> bool:
    """Whether a hub id, directory or .gguf file has the name of the model `trained_on`."""
    cached = re.search(r"models--[^/]+--([^/]+)", uri)  # a directory of the hub's cache
    name = cached[1] if cached else uri.rstrip("/").split("/")[-1]
    wanted, have = _plain(trained_on.split("/")[-1]), _plain(name.removesuffix(".gguf"))
    # A GGUF file's name goes on with its quantisation: SmolLM2-135M.Q4_1.gguf
    ending = have[len(wanted) :] if have.startswith(wanted) else None
    return ending == "" or (
        uri.endswith(".gguf") and ending is not None and bool(re.match(r"[.\-_]i?q\d|[.\-_]b?f\d", ending))
    )


def _plain(name: str) -> str:
    """A model's name without what its owners add to the pretrained one: gemma-3-1b-pt is gemma-3-1b."""
    return name.lower().removesuffix("-pt").removesuffix("-hf")
