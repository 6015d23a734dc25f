"""Activations to train the example SAEs on: SmolLM2-135M read once, one file of bfloat16 rows per site.

Invariant: a row is a counted token of a window of one document. Position 0 is run but not written (it is
an attention sink), nor are tokens whose norm at the site exceeds NORM_ABOVE times the window's median.
Windows are shuffled before the model sees them, so that any stretch of a file mixes many documents.
Trade-off: 17 GB of scratch for 2.9 million tokens at five sites, so that the model's 14 minutes (3,400
tokens/s on two cores) are paid once, not for every SAE and epoch, and every epoch can shuffle all tokens.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import corpus
import torch
from model import smollm2

from sae_runtime.model import LanguageModel, load_tokenizer, locate
from sae_runtime.sites import Site

SITES = (
    Site(9, "resid_post"),
    Site(15, "resid_post"),
    Site(21, "resid_post"),
    Site(15, "mlp_out"),
    Site(15, "attn_z"),
)
LENGTH = 256  # tokens per window
SHORTEST = 16  # tokens; a document's last window is dropped below this
BATCH = 16  # windows per forward
NORM_ABOVE = 10.0
HELD_OUT = 20  # one document in this many is kept for evaluation, by hash
# The manual is 4 % of the text but 40 % of the demo, so it is read at four alignments of the windows.
MANUAL_OFFSETS = (0, 64, 128, 192)


@dataclass(frozen=True)
class Split:
    """The cached rows of one split ("train" or "held_out"): rows per site, and what was run."""

    folder: Path
    name: str
    rows: dict[str, int]
    contexts: int
    tokens: int  # run, position 0 included
    seconds: float

    def load(self, site: Site) -> torch.Tensor:
        """The rows of `site` [tokens, width] in bfloat16, mapped from the file, never copied."""
        key = site_key(site)
        file, rows = _file(self.folder, self.name, key), self.rows[key]
        width = file.stat().st_size // 2 // rows
        flat = torch.from_file(str(file), shared=False, size=rows * width, dtype=torch.bfloat16)
        return flat.view(rows, width)


def site_key(site: Site) -> str:
    """A site's name in file names: "resid_post-15"."""
    return f"{site.kind}-{site.layer}"


def cached(folder: Path, name: str) -> Split:
    """The split `name` in `folder`, made by running the model when it is not there yet."""
    marker = folder / f"{name}.json"
    if not marker.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        facts = _run(folder, name, windows(name))
        marker.write_text(json.dumps(facts))  # last: a marker means that the files are whole
    return Split(folder, name, **json.loads(marker.read_text()))


def windows(name: str) -> list[list[int]]:
    """Token ids of every window of the split `name`, shuffled."""
    tokenizer = load_tokenizer(locate(str(smollm2())))
    found: list[list[int]] = []
    for document in corpus.manual() + corpus.stdlib():
        if (int(corpus.order(document), 16) % HELD_OUT == 0) != (name == "held_out"):
            continue
        ids = tokenizer(document["text"], add_special_tokens=False)["input_ids"]
        repeated = document["kind"] == "manual" and name == "train"
        for offset in MANUAL_OFFSETS if repeated else (0,):
            found += _cut(ids[offset:])
    random.Random(0).shuffle(found)
    return found


def _cut(ids: list[int]) -> list[list[int]]:
    parts = [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)]
    return [part for part in parts if len(part) >= SHORTEST]


def _run(folder: Path, name: str, contexts: list[list[int]]) -> dict[str, object]:
    """Run the model over `contexts` and append each site's counted rows to its file."""
    model = LanguageModel(locate(str(smollm2())), SITES, dtype="bfloat16")
    files = {site: _file(folder, name, site_key(site)).open("wb") for site in SITES}
    rows = dict.fromkeys(map(site_key, SITES), 0)
    started, tokens = time.monotonic(), 0
    try:
        for batch, (ids, real) in enumerate(_batches(contexts)):
            for site, x in model.run(ids).items():
                counted = x[_counted(x, real)]
                files[site].write(counted.view(torch.int16).numpy())
                rows[site_key(site)] += len(counted)
            tokens += int(real.sum())
            if batch % 50 == 0:
                rate = tokens / (time.monotonic() - started)
                click.echo(f"{name}: {batch * BATCH}/{len(contexts)} windows, {rate:,.0f} tokens/s")
    finally:
        for file in files.values():
            file.close()
    seconds = round(time.monotonic() - started, 1)
    return {"rows": rows, "contexts": len(contexts), "tokens": tokens, "seconds": seconds}


def _batches(contexts: Sequence[list[int]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids [BATCH, longest], right padded with 0, and which of them are real."""
    for start in range(0, len(contexts), BATCH):
        group = contexts[start : start + BATCH]
        longest = max(map(len, group))
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in group])
        lengths = torch.tensor([len(ids) for ids in group])
        yield ids, torch.arange(longest) < lengths[:, None]


def _counted(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    norms = x.float().norm(dim=-1)
    medians = norms.masked_fill(~real, torch.nan).nanmedian(dim=1, keepdim=True).values
    counted = real & (norms <= NORM_ABOVE * medians)
    counted[:, 0] = False
    return counted


def _file(folder: Path, name: str, key: str) -> Path:
    return folder / f"{name}-{key}.bf16"
