"""A tiny world to scan: a random Gemma 2, its tokenizers, SAEs in Gemma Scope's layout, a corpus.

Everything is made on the spot from fixed seeds. Nothing here uses the product: the hooks that find
thresholds are the test's own, so that a wrong site in the product does not hide itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

SPECIALS = ["<pad>", "<eos>", "<bos>"]
HIDDEN, HEADS, HEAD_DIM, LAYERS = 32, 4, 12, 4
_WORDS = (
    "the cat sat on a mat while seven red foxes jumped over lazy dogs and raise ValueError if not "
    "found return self value for key in data import numpy as np def main print hello world rain "
    "Paris London river stone light water music number list index error open close north south"
)
WORDS = _WORDS.split()
EMOJI = ["😀", "🦊", "🇨🇭", "👩‍🔬", "日本語", "混ぜる", "Привет", "naïve", "e\u0301", "ß", "\u00a0", "€"]


@dataclass(frozen=True)
class Suite:
    """One SAE to make: where, how wide, stored how, how many active in a thousand tokens."""

    path: str  # suite/layer_*/width_*/average_l0_*
    site: tuple[int, str]
    width: int
    dtype: str
    permille: int


SAES = (
    Suite("tiny-res/layer_1/width_37/average_l0_2", (1, "resid_post"), 37, "float32", 50),
    Suite("tiny-res/layer_1/width_130/average_l0_13", (1, "resid_post"), 130, "float16", 100),
    Suite("tiny-res/layer_3/width_130/average_l0_6", (3, "resid_post"), 130, "float32", 50),
    Suite("tiny-mlp/layer_2/width_37/average_l0_10", (2, "mlp_out"), 37, "float16", 300),
    Suite("tiny-mlp/layer_2/width_64/average_l0_3", (2, "mlp_out"), 64, "float32", 50),
    Suite("tiny-att/layer_1/width_37/average_l0_1", (1, "attn_z"), 37, "float32", 30),
    Suite("tiny-att/layer_3/width_50/average_l0_5", (3, "attn_z"), 50, "float16", 100),
)
SUITES = ("tiny-res", "tiny-mlp", "tiny-att")
# Features of tiny-res/layer_1/width_37 with a part of their own.
DEAD, ALWAYS, NEGATIVE, FAINT = 5, 6, 7, 8


def texts_by_file(files: int = 24) -> list[list[dict[str, Any]]]:
    """Rows of each file: two or three documents, hard cases spread over them."""
    rng = np.random.default_rng(11)

    def words(n: int) -> str:
        return " ".join(rng.choice(WORDS, n))

    def mixed(n: int) -> str:
        return " ".join(str(rng.choice(EMOJI if rng.random() < 0.4 else WORDS)) for _ in range(n))

    twin, twin15 = words(30), words(15)
    special = {
        0: ["", words(900)],
        1: [mixed(250), ""],
        2: ["<bos>" + words(40), "text with <bos> inside and <eos> too " + words(10)],
        3: [twin, twin, "once more: " + twin],
        5: [twin, mixed(6)],
        7: ["a", "😀", "\n"],
        9: ["", ""],  # a unit of empty documents only
        11: [twin + " " + words(3), mixed(60)],
        13: [words(500)],
        # Endings of 15 equal tokens, the 16th before differs: not the same document.
        15: [f"{word} {twin15}" for word in ("London", "music", "open", "north")],
        17: [f"{word} {twin15}" for word in ("Paris", "list", "close")] + [twin15],
    }
    rows: list[list[dict[str, Any]]] = []
    for i in range(files):
        texts = special.get(i) or [words(int(rng.integers(3, 60))) for _ in range(int(rng.integers(2, 4)))]
        rows.append(
            [
                {
                    "id": f"{i}-{j}",
                    "text": text,
                    "lang": ["en", "ja", None][(i + j) % 3],
                    "score": (i * 10 + j) / 4,
                    "even": i % 2 == 0,
                }
                for j, text in enumerate(texts)
            ]
        )
    return rows


def write_corpus(folder: Path, files: int = 24) -> Path:
    """part_00.jsonl, part_01.jsonl, … in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, rows in enumerate(texts_by_file(files)):
        write_rows(folder / f"part_{i:02d}.jsonl", rows)
    return folder


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def make_tokenizer(bos: bool) -> Any:
    """A byte-level BPE tokenizer of some 450 tokens; with `bos`, its post-processor adds <bos>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([" ".join(WORDS * 3), " ".join(EMOJI[:3])], trainer)
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", SPECIALS.index("<bos>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )


def make_model(folder: Path, bos: bool = True) -> Path:
    """A random Gemma 2 of four layers with its tokenizer, saved in `folder`."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    tokenizer = make_tokenizer(bos)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        query_pre_attn_scalar=HEAD_DIM,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
        attn_logit_softcapping=3.0,  # low enough to bend the logits
        max_position_embeddings=512,
        initializer_range=0.35,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(3)
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # zeros by default: every norm would be the same
                parameter.normal_(0, 0.3)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_causal(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The whole model, head included."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


@contextmanager
def tapped(causal: Any, sites: Iterable[tuple[int, str]]) -> Iterator[dict[tuple[int, str], torch.Tensor]]:
    """The test's own hooks: (layer, kind) -> activations [batch, tokens, d] of the last forward."""
    found: dict[tuple[int, str], torch.Tensor] = {}
    handles = []

    def keep(site: tuple[int, str], value: Any) -> None:
        found[site] = value[0] if isinstance(value, tuple) else value

    for site in sites:
        layer = causal.model.layers[site[0]]
        if site[1] == "resid_post":
            handles.append(layer.register_forward_hook(lambda m, a, out, s=site: keep(s, out)))
        elif site[1] == "mlp_out":
            # Gemma Scope reads after the post-norm, where the block has one.
            module = getattr(layer, "post_feedforward_layernorm", layer.mlp)
            handles.append(module.register_forward_hook(lambda m, a, out, s=site: keep(s, out)))
        else:
            # The concatenated heads: whatever the output projection multiplies.
            handles.append(
                layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a, s=site: keep(s, a[0]))
            )
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def dense(
    causal: Any, batches: Iterable[np.ndarray], sites: Iterable[tuple[int, str]]
) -> dict[tuple[int, str], list[torch.Tensor]]:
    """Activations [batch, tokens, d] of each batch of ids, per site, by the test's own hooks."""
    wanted = list(sites)
    out: dict[tuple[int, str], list[torch.Tensor]] = {site: [] for site in wanted}
    with tapped(causal, wanted) as found:
        for ids in batches:
            found.clear()
            causal(input_ids=torch.from_numpy(np.asarray(ids, np.int64)), use_cache=False)
            for site in wanted:
                out[site].append(found[site].clone())
    return out


def write_sae(
    file: Path, rng: np.random.Generator, x: np.ndarray, width: int, dtype: str, permille: int
) -> dict[str, np.ndarray]:
    """A random JumpReLU SAE whose thresholds are quantiles of its pre-activations on `x` [tokens, d]."""
    d = x.shape[1]
    W_enc = rng.normal(size=(d, width)).astype(dtype)
    b_enc = rng.normal(scale=0.5, size=width).astype(dtype)
    pre = x.astype(np.float64) @ W_enc.astype(np.float64) + b_enc.astype(np.float64)
    share = np.clip(permille / 1000 * np.exp(rng.normal(scale=0.7, size=width)), 0.002, 0.6)
    threshold = np.array([np.quantile(pre[:, f], 1 - share[f]) for f in range(width)])
    W_dec = W_enc.T.astype(np.float64) / 64
    tensors = {
        "W_enc": W_enc,
        "b_enc": b_enc,
        "threshold": np.maximum(threshold, 1e-3).astype(dtype),
        "W_dec": W_dec.astype(dtype),
        "b_dec": x.mean(axis=0).astype(dtype),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **tensors)
    return tensors


def make_suites(folder: Path, model: Path) -> Path:
    """The suites tiny-res, tiny-mlp and tiny-att under `folder`."""
    causal, tokenizer = load_causal(model), make_tokenizer(bos=True)
    texts = [row["text"] for rows in texts_by_file() for row in rows if row["text"]]
    batches = [np.array([tokenizer(text)["input_ids"][:96]]) for text in texts]
    sites = sorted({sae.site for sae in SAES})
    found = dense(causal, batches, sites)
    x = {site: torch.cat([a[0, 1:] for a in found[site]]).numpy() for site in sites}
    for i, sae in enumerate(SAES):
        file = folder / sae.path / "params.npz"
        rng = np.random.default_rng(100 + i)
        tensors = write_sae(file, rng, x[sae.site], sae.width, sae.dtype, sae.permille)
        if i == 0:
            tensors["threshold"][DEAD] = 1e9
            tensors["b_enc"][ALWAYS] = 3e4  # beyond the histogram's last edge
            tensors["W_dec"][ALWAYS] = 0
            tensors["threshold"][NEGATIVE] = -3.0
            for name in ("W_enc", "b_enc", "threshold"):  # below its first edge
                tensors[name][..., FAINT] *= 2.0**-18
            np.savez(file, **tensors)
    return folder


def load_sae(suites: Path, sae: str) -> dict[str, np.ndarray]:
    """The published tensors of an SAE by its id, as they are on disk."""
    with np.load(suites / sae / "params.npz") as archive:
        return {key: archive[key] for key in archive.files}


VIEWS = (
    "saes", "documents", "segments", "contexts", "activations", "document_features", "features",
    "top_contexts", "sampled_contexts", "vocabulary",
)  # fmt: skip
_PLACE = "d.corpus, d.source, d.row"
_CONTENT = {
    "saes": "SELECT * FROM saes",
    "documents": "SELECT * EXCLUDE (document, run) FROM documents",
    "contexts": f"SELECT {_PLACE}, c.* EXCLUDE (context, document) "
    "FROM contexts c JOIN documents d USING (document)",
    "document_features": f"SELECT {_PLACE}, f.* EXCLUDE (document) "
    "FROM document_features f JOIN documents d USING (document)",
    "features": "SELECT * FROM features",
    "vocabulary": "SELECT * FROM vocabulary",
} | {
    view: f"SELECT {_PLACE}, c.start, v.* EXCLUDE (context) "
    f"FROM {view} v JOIN contexts c USING (context) JOIN documents d USING (document)"
    for view in ("activations", "top_contexts", "sampled_contexts")
}  # fmt: skip


def views(uri: Path | str) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every view that holds data, keys included, in one order; and what runs say they did."""
    import queries

    con = queries.connect(str(uri))
    found = {view: con.sql(f"SELECT * FROM {view} ORDER BY ALL").fetchall() for view in VIEWS}
    found["runs"] = con.sql("SELECT run, documents, tokens FROM runs ORDER BY run").fetchall()
    return found


def content(uri: Path | str) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every view with places (corpus, source, row, start) instead of keys and runs."""
    import queries

    con = queries.connect(str(uri))
    return {view: con.sql(f"{sql} ORDER BY ALL").fetchall() for view, sql in _CONTENT.items()}


def differences(one: dict[str, list[Any]], other: dict[str, list[Any]]) -> list[str]:
    """What differs between two dumps, in words: an assertion on this shows a line, not megabytes."""
    found = []
    for view in sorted({*one, *other}):
        a, b = one.get(view), other.get(view)
        if a is None or b is None:
            found.append(f"{view}: only in one")
        elif len(a) != len(b):
            found.append(f"{view}: {len(a)} rows against {len(b)}")
        elif a != b:
            at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
            found.append(f"{view}: row {at}: {str(a[at])[:300]} against {str(b[at])[:300]}")
    return found
