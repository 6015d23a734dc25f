"""One scan over a mixed suite, for a tiny model of each family: every kind of site, many formats, every rule.

What must be in the index is computed by the fixtures' own formulas (float64, tests/published) from what the
tests' own hooks see in the whole model (tests/families), context by context. The scan's batches have other
shapes, so where a change of the activations by some 2^-17 of their norm turns a decision, either is right.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import numpy as np
import published
import pytest
import tiny
import torch
from published.base import Published
from published.saelens import activations, put, tensors

import queries

FAMILIES = ("gemma2", "gemma3_text", "gemma3", "llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2")
LAYER, WIDTH = 2, 24
NOISE = 2.0**-16
HOOKS = {
    "embed": "hook_embed",
    "resid_pre": f"blocks.{LAYER}.hook_resid_pre",
    "resid_mid": f"blocks.{LAYER}.hook_resid_mid",
    "resid_post": f"blocks.{LAYER}.hook_resid_post",
    "attn_z": f"blocks.{LAYER}.attn.hook_z",
    "attn_out": f"blocks.{LAYER}.hook_attn_out",
    "mlp_in": f"blocks.{LAYER}.mlp.hook_in",
    "mlp_in_unit": f"blocks.{LAYER}.ln2.hook_normalized",
    "mlp_hidden": f"blocks.{LAYER}.mlp.hook_post",
    "mlp_out": f"blocks.{LAYER}.hook_mlp_out",
}
ARCHITECTURES = ("jumprelu", "topk", "standard", "gated", "abstopk")


@dataclass(frozen=True)
class Wanted:
    """One SAE of the mixed suite: its id, where it reads, and its formula."""

    id: str
    layer: int
    kind: str
    head: int | None
    encode: Callable[[np.ndarray], np.ndarray]
    width: int


def every_site(folder: Path, family: str) -> list[Wanted]:
    """SAELens SAEs at every kind of site that the family has, and at one head; architectures in turn."""
    found = []
    kinds = [kind for kind in HOOKS if families.path(family, LAYER, kind)]
    for i, (kind, head) in enumerate([*((kind, None) for kind in kinds), ("attn_z", 1)]):
        architecture = ARCHITECTURES[i % len(ARCHITECTURES)]
        k = 5 if architecture.endswith("topk") else None
        d = families.head_dim(family) if head is not None else families.width(family, kind)
        T = tensors(np.random.default_rng(50 + i), architecture, d, WIDTH, d)
        config = {
            "sae_lens_version": "6.0.0", "architecture": architecture, "d_in": d, "d_sae": WIDTH,
            "dtype": "float32", "apply_b_dec_to_input": i % 2 == 0, "normalize_activations": "none",
            "metadata": {"hook_name": HOOKS[kind], "hook_head_index": head},
        } | ({"k": k} if k else {})  # fmt: skip
        path = kind if head is None else f"{kind}_head_{head}"
        put(folder / path, config, T)
        pre = T["b_dec"] if i % 2 == 0 else 0.0

        def encode(
            x: np.ndarray, T: Any = T, a: str = architecture, k: int | None = k, pre: Any = pre
        ) -> np.ndarray:
            wide = {name: value.astype(np.float64) for name, value in T.items()}
            return activations(x - pre, wide, a, k, False)

        layer = 0 if kind == "embed" else LAYER
        found.append(Wanted(f"{folder.name}/{path}", layer, kind, head, encode, WIDTH))
    return found


def every_format(folder: Path, family: str) -> tuple[list[Wanted], list[dict[str, Any]], set[str]]:
    """Those SAEs of the formats' fixtures whose sites are as wide here as the model's hidden states."""
    wanted, entries, formats = [], [], set()
    for _, name, _ in pkgutil.iter_modules(published.__path__):
        if name == "base":
            continue
        module: Any = importlib.import_module(f"published.{name}")
        suite = folder / getattr(module, "name", name.replace("_", "-"))
        d = families.HIDDEN
        there: list[Published] = [
            sae
            for sae in module.write(suite, np.random.default_rng(9), d, WIDTH, d, LAYER)
            if sae.head is None
            and sae.layer < families.LAYERS
            and sae.kind in HOOKS | {"embed_unscaled": ""}
            and sae.d_in == families.width(family, sae.kind)
            and families.path(family, sae.layer, sae.kind)
            and (sae.out is None or families.path(family, *sae.out))
        ][:3]
        if not there:
            continue
        formats.add(name)
        entries.append({"uri": str(suite), "select": [sae.path for sae in there]})
        if there[0].site_option:
            entries[-1]["site"] = there[0].site_option
        wanted += [
            Wanted(f"{suite.name}/{sae.path}", sae.layer, sae.kind, sae.head, sae.encode, sae.width)
            for sae in there
        ]
    return wanted, entries, formats


def normalised(family: str, x: np.ndarray, eps: float) -> np.ndarray:
    """The norm's core, float64."""
    if family.startswith(("gpt2", "gpt_neox")):
        x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_suite_is_what_the_formulas_say(
    family: str, tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any]
) -> None:
    model = families.make(family, tmp_path / "model")
    wanted = every_site(tmp_path / "everywhere", family)
    more, entries, formats = every_format(tmp_path, family)
    assert len(formats) >= 6, formats
    wanted += more
    rows = [{"text": row["text"]} for rows in tiny.texts_by_file(8) for row in rows if len(row["text"]) < 600]
    tiny.write_rows(tmp_path / "corpus.jsonl", rows)
    spec = write_spec(
        tmp_path,
        corpus={"uri": str(tmp_path / "corpus.jsonl"), "id": None, "metadata": []},
        model={"uri": str(model)},
        saes=[{"uri": str(tmp_path / "everywhere")}, *entries],
    )
    outcome = scan_inline(spec)
    assert not outcome.failed, outcome.failed[0].detail
    con = queries.connect(str(tmp_path / "index"))
    assert con.sql("SELECT count(*) FROM saes").fetchall() == [(len(wanted),)]
    x = seen(con, model, family, {(sae.layer, sae.kind) for sae in wanted})
    n_rows = 0
    for sae in wanted:
        n_rows += check(con, sae, x[sae.layer, sae.kind], families.head_dim(family))
        fvu = con.execute("SELECT fvu FROM saes WHERE sae = $1", [sae.id]).fetchall()[0][0]
        assert fvu is None or fvu > 0
    assert n_rows > 5000


def seen(
    con: Any, model: Path, family: str, sites: set[tuple[int, str]]
) -> dict[tuple[int, str], np.ndarray]:
    """Counted tokens of all contexts in order, by the tests' own hooks: float64 [tokens, width] per site."""
    causal = tiny.load_causal(model)
    config = causal.config.get_text_config()
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
    eps = next(getattr(config, name) for name in names if hasattr(config, name))
    parts: dict[tuple[int, str], list[np.ndarray]] = {site: [] for site in sites}
    for tokens, counted in con.sql("SELECT tokens, counted FROM contexts ORDER BY context").fetchall():
        found = families.activations(causal, family, torch.tensor([tokens]), sorted(sites))
        for site in sites:
            a = found[site][0].detach().double().numpy()[np.array(counted)]
            parts[site].append(normalised(family, a, eps) if site[1] == "mlp_in_unit" else a)
    return {site: np.concatenate(all_) for site, all_ in parts.items()}


def check(con: Any, sae: Wanted, x: np.ndarray, head_dim: int) -> int:
    """The stored rows of an SAE against its formula; how many there are."""
    if sae.head is not None:
        x = x[:, sae.head * head_dim : (sae.head + 1) * head_dim]
    table = np.zeros((len(x), sae.width))
    rows = con.execute(
        """
        WITH counted AS (
            SELECT context, unnest(range(len(tokens))) AS position, unnest(counted) AS counted FROM contexts
        ), numbered AS (
            SELECT *, row_number() OVER (ORDER BY context, position) - 1 AS token FROM counted WHERE counted
        )
        SELECT token, feature, activation FROM activations JOIN numbered USING (context, position)
        WHERE sae = $1
        """,
        [sae.id],
    ).fetchall()
    for token, feature, value in rows:
        table[token, feature] = value
    f = sae.encode(x)
    rng = np.random.default_rng(1)
    size = np.abs(x).max() * NOISE
    moved = [sae.encode(x + rng.normal(size=x.shape) * size) for _ in range(6)]
    doubtful = np.any([(g != 0) != (f != 0) for g in moved], axis=0)
    wrong = ((table != 0) != (f != 0)) & ~doubtful
    assert not wrong.any(), (sae.id, wrong.sum(), np.argwhere(wrong)[:3])
    assert doubtful.mean() < 0.02, (sae.id, doubtful.mean())
    both = (table != 0) & (f != 0)
    slack = np.max([np.abs(g - f) for g in moved], axis=0)[both] * 2
    assert (np.abs(table - f)[both] <= np.abs(f)[both] * 2.0**-8 + slack + 1e-6).all(), sae.id
    return int(both.sum())
