"""The work that `compare.py` measures: a corpus of whole contexts, JumpReLU SAEs on a model's layers, a spec.

Invariant: for one model, Python and version of this file the work is the same every time, a small corpus is
the beginning of a larger one (but for where its end is cut), and the text of every document tokenises back
to the whole contexts that it was made of.

The SAEs are random directions whose thresholds are quantiles of the model's own activations, feature by
feature, so that densities are lognormal with a mean of L0 / width. Speed and file sizes depend on how much
fires where, not on what it means: activations, positions and values are real. Nobody has published SAEs of
this size for a model that runs in seconds on a CPU.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

BATCH_TOKENS = 4096  # that every arm but the scan runs at a time: of 512 to 4,096 what they are fastest with
SPREAD = 1.0  # of the densities' logarithms
_DOCUMENT = 16  # contexts of the longest document
_CALIBRATION = 32  # contexts that thresholds are taken from
_LOUD = 10  # tokens of over this many times the median norm (attention sinks) set no thresholds


@dataclass(frozen=True)
class BenchSae:
    id: str
    layer: int
    path: str  # params.npz


@dataclass(frozen=True)
class World:
    """The work, as every arm is told of it; JSON in `folder`/world.json."""

    folder: str
    model: str  # a directory that transformers loads
    saes: tuple[BenchSae, ...]
    width: int
    length: int  # tokens a context
    batch: int  # contexts run at a time, of which `contexts` are a multiple
    threads: int

    def contexts(self, part: str) -> np.ndarray:
        """Token ids int32 [contexts, length] of a part: `run`, or `warm`, the first batch of it."""
        found: np.ndarray = np.load(Path(self.folder) / f"{part}.npy")
        return found

    def spec(self, part: str) -> str:
        """Path of the spec that scans a part."""
        return str(Path(self.folder) / f"{part}.yaml")

    def save(self) -> None:
        (Path(self.folder) / "world.json").write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> World:
        found = json.loads((folder / "world.json").read_text(encoding="utf-8"))
        return cls(**{**found, "saes": tuple(BenchSae(**sae) for sae in found["saes"])})


def make(
    root: Path, model: str, saes: int, tokens: int, width: int, l0: float, length: int, threads: int
) -> World:
    """Write corpora, specs and contexts under `root`; SAEs that are there already are used again.

    `model` is what a spec may name; one whose tokenizer puts a BOS first is refused. `tokens` is rounded
    down to whole batches.
    """
    from sae_runtime.model import load_config, load_tokenizer, locate

    source = locate(model)
    tokenizer = load_tokenizer(source)
    if tokenizer("a")["input_ids"] != tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ValueError(f"{model}: its tokenizer adds tokens; the arms' contexts have none")
    batch = min(tokens // length, BATCH_TOKENS // length)
    if not batch:
        raise ValueError(f"{tokens} tokens are less than a context of {length}")
    wanted = tokens // (batch * length) * batch
    version = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=4).hexdigest()
    layers = np.linspace(0, load_config(source).num_hidden_layers - 1, saes).round().astype(int)
    suite = root / f"{source.fingerprint}-{length}-{version}" / f"{saes}x{width}-l0-{l0:g}" / "bench-res"
    found = _placed(suite, layers.tolist(), width, l0)
    if not (suite.parent / "done").exists():
        shutil.rmtree(suite, ignore_errors=True)
        sample = _corpus(tokenizer, 2 * _CALIBRATION, length)[1][::2]
        _write_saes(found, source, sample, width, l0)
        (suite.parent / "done").touch()
    folder = suite.parent / f"{wanted * length}-tokens"
    folder.mkdir(parents=True, exist_ok=True)
    for part, n in (("run", wanted), ("warm", batch)):
        texts, contexts = _corpus(tokenizer, n, length)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")
        np.save(folder / f"{part}.npy", contexts)
        (folder / f"{part}.yaml").write_text(
            f"corpus: {{uri: {part}.jsonl}}\n"
            f"model: {{uri: {source.path}, dtype: bfloat16, threads: {threads}, device: cpu}}\n"
            f"saes: {{uri: {suite}}}\ncontext: {{length: {length}}}\nindex: index\n",
            encoding="utf-8",
        )
    world = World(str(folder), source.path, found, width, length, batch, threads)
    world.save()
    return world


def _placed(suite: Path, layers: list[int], width: int, l0: float) -> tuple[BenchSae, ...]:
    """Where each SAE is, layer by layer, as the scan orders them. Two on one layer differ in nominal L0."""
    names = []
    for i, layer in enumerate(layers):
        again = layers[:i].count(layer)
        names.append((f"layer_{layer}/width_{width}/average_l0_{round(l0) + again}", layer))
    return tuple(
        BenchSae(f"{suite.name}/{name}", layer, str(suite / name / "params.npz")) for name, layer in names
    )


def _corpus(tokenizer: Any, contexts: int, length: int) -> tuple[list[str], np.ndarray]:
    """Documents that make so many contexts: their texts, and the contexts int32 [contexts, length]."""
    texts: list[str] = []
    found: list[np.ndarray] = []
    left = contexts
    for text in _texts():
        # No token is longer than 16 characters on average, so this much text is enough.
        text = text[: 16 * _DOCUMENT * length]
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for n in range(min(left, _DOCUMENT, len(ids) // length), 0, -1):
            own = ids[: n * length]
            back = tokenizer.decode(own)
            if tokenizer(back, add_special_tokens=False, verbose=False)["input_ids"] == own:
                texts.append(back)
                found.append(np.array(own, np.int32).reshape(n, length))
                left -= n
                break
        if not left:
            return texts, np.concatenate(found)
    raise ValueError(f"the manual and the library do not have {contexts} contexts of {length} tokens")


@cache
def _texts() -> tuple[str, ...]:
    """The Python manual's topics and the standard library's modules, in turn."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
    from corpus import manual, stdlib

    both = chain.from_iterable(zip_longest(manual(), stdlib()))
    return tuple(document["text"] for document in both if document is not None)


def _write_saes(saes: Iterable[BenchSae], source: Any, contexts: np.ndarray, width: int, l0: float) -> None:
    import torch

    from sae_runtime.model import LanguageModel
    from sae_runtime.sites import Site

    layers = sorted({sae.layer for sae in saes})
    model = LanguageModel(source, [Site(layer, "resid_post") for layer in layers], "bfloat16")
    batches = torch.from_numpy(contexts.astype(np.int64)).split(_CALIBRATION // 2)
    runs = [model.run(batch) for batch in batches]
    for seed, sae in enumerate(saes):
        x = torch.cat([run[Site(sae.layer, "resid_post")][:, 1:].flatten(0, 1).float() for run in runs])
        norm = x.norm(dim=1)
        _write_sae(Path(sae.path), x[norm < _LOUD * norm.median()], width, l0, seed)


def _write_sae(file: Path, x: Any, width: int, l0: float, seed: int) -> None:
    """A random JumpReLU SAE with lognormal densities on activations `x` float32 [tokens, d]."""
    import torch

    rng = np.random.default_rng(seed)
    W = torch.from_numpy(rng.standard_normal((x.shape[1], width), dtype=np.float32))
    mean = x.mean(0)
    W = W / W.norm(dim=0) / (x - mean).norm(dim=1).mean() * 8  # activations of some units
    b = -(mean @ W)
    density = np.exp(rng.normal(0, SPREAD, width))
    density = np.clip(density / density.mean() * l0 / width, 1e-4, 0.3)
    pre = torch.addmm(b[:, None], W.T, x.T).sort(dim=1).values  # [width, tokens], ascending
    at = len(x) - torch.from_numpy((density * len(x)).astype(np.int64)).clamp(1, len(x) - 1)
    # Halfway between two tokens: at one of them, float32 rounding would decide whether it is active.
    threshold = (pre.gather(1, at[:, None]) + pre.gather(1, at[:, None] - 1))[:, 0] / 2
    threshold = threshold.clamp(min=1e-3)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        file,
        W_enc=W.numpy(),
        b_enc=b.numpy(),
        threshold=threshold.numpy(),
        W_dec=np.ascontiguousarray(W.T.numpy()),
        b_dec=mean.numpy(),
    )
