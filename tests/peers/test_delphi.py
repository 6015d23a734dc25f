"""Our export against delphi's own loader and constructor (eai-delphi 0.1.3)."""

from __future__ import annotations

import importlib
import sys
import types
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import queries
from queries import delphi, export

pytestmark = pytest.mark.peers

RES = "tiny-res/layer_1/width_37/average_l0_2"
WIDE = "tiny-res/layer_1/width_130/average_l0_13"
CTX = 16


@pytest.fixture
def loader() -> Iterator[Any]:
    """`delphi.latents.loader`. Of the whole package, which wants vLLM and faiss, no more is imported.

    What it imports and does not use here is stood in for; `asyncify` is made the function itself.
    """
    before = dict(sys.modules)
    whole = pytest.importorskip("delphi", reason="eai-delphi is not installed: run `make peers`")
    names = {
        "faiss": {},
        "sentence_transformers": {"SentenceTransformer": object},
        "asyncer": {"asyncify": lambda function: function},
        "blobfile": {},
        "orjson": {},
    }
    for name, content in names.items():
        stand_in = types.ModuleType(name)
        vars(stand_in).update(content)
        sys.modules[name] = stand_in
    latents = types.ModuleType("delphi.latents")
    latents.__path__ = [str(Path(whole.__file__).parent / "latents")]
    sys.modules["delphi.latents"] = latents
    yield importlib.import_module("delphi.latents.loader")
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] in {"delphi", *names}:
            del sys.modules[name]
    sys.modules.update({name: before[name] for name in names if name in before})


@pytest.fixture
def exported(tiny_index: Path, tmp_path: Path) -> Path:
    con = queries.connect(str(tiny_index))
    into = export.Folder(str(tmp_path / "out"), False, [])
    saes = export.saes(con, [RES, WIDE])
    delphi.write(con, saes, into, delphi.Settings(CTX, 3), lambda words: None)
    into.finish({})
    return tmp_path / "out" / delphi.FOLDER


def dense(index: Path, sae: str) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """The windows' tokens [windows, CTX], and feature -> activations [windows, CTX], from the raw rows."""
    con = queries.connect(str(index))
    own: dict[int, list[int]] = defaultdict(list)
    values: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
    rows = con.execute("SELECT context, position, feature, activation FROM activations WHERE sae = ?", [sae])
    for context, position, feature, activation in rows.fetchall():
        values[context, position][feature] = activation
    fired: list[dict[int, float]] = []
    tokens: list[int] = []
    contexts = con.sql("SELECT context, document, first, tokens FROM contexts ORDER BY context").fetchall()
    by_document: dict[int, list[dict[int, float]]] = defaultdict(list)
    for context, document, first, ids in contexts:
        own[document] += ids[first:]
        by_document[document] += [values[context, i] for i in range(first, len(ids))]
    for document in sorted(own):
        whole = len(own[document]) // CTX * CTX
        tokens += own[document][:whole]
        fired += by_document[document][:whole]
    found: dict[int, np.ndarray] = {}
    for i, row in enumerate(fired):
        for feature, value in row.items():
            found.setdefault(feature, np.zeros(len(fired), np.float32))[i] = value
    shape = (len(tokens) // CTX, CTX)
    return np.array(tokens).reshape(shape), {feature: x.reshape(shape) for feature, x in found.items()}


def made_by(loader: Any, exported: Path, **options: Any) -> Any:
    config = importlib.import_module("delphi.config")
    # `center_examples` is read the wrong way round: True gives the windows as they are.
    examples = config.ConstructorConfig(example_ctx_len=CTX, min_examples=1, n_non_activating=4)
    return loader.LatentDataset(exported, config.SamplerConfig(), examples, tokenizer=Tokenizer(), **options)


class Tokenizer:
    """As much of one as delphi's examples need."""

    def batch_decode(self, tokens: Any) -> list[str]:
        return [str(int(token)) for token in tokens]


@pytest.mark.parametrize("chosen", [None, [0, 6, 36]])
def test_its_loader_reads_what_the_rows_say(
    loader: Any, exported: Path, tiny_index: Path, chosen: list[int] | None
) -> None:
    names = {f"layers.1@{sae.replace('/', '-')}": sae for sae in (RES, WIDE)}
    assert {folder.name for folder in exported.iterdir()} == set(names)
    options = {} if chosen is None else {"latents": {name: torch.tensor(chosen) for name in names}}
    data = made_by(loader, exported, **options)
    assert set(data.modules) == set(names)
    wanted = {name: dense(tiny_index, sae) for name, sae in names.items()}
    assert np.array_equal(data.tokens.numpy(), wanted[next(iter(names))][0])
    seen = defaultdict(set)
    for buffer in data.buffers:
        tokens, activations = wanted[buffer.module_path]
        for latent in buffer:
            number = latent.latent.latent_index
            locations, values = latent.activation_data
            found = np.zeros(tokens.shape, np.float32)
            found[locations[:, 0], locations[:, 1]] = values.float().numpy()
            assert (locations[:, 2] == number).all()
            assert np.array_equal(found, activations[number]), (buffer.module_path, number)
            assert len(values) == np.count_nonzero(found)
            seen[buffer.module_path].add(number)
    for name, (_, activations) in wanted.items():
        assert seen[name] == {f for f in activations if chosen is None or f in chosen}


def test_its_constructor_makes_examples_of_it(loader: Any, exported: Path, tiny_index: Path) -> None:
    name = f"layers.1@{WIDE.replace('/', '-')}"
    tokens, activations = dense(tiny_index, WIDE)
    data = made_by(loader, exported, modules=[name])
    windows = {tuple(row): i for i, row in enumerate(tokens.tolist())}
    examples = others = 0
    for buffer in data.buffers:
        for latent in buffer:
            number = latent.latent.latent_index
            record = loader.constructor(
                loader.LatentRecord(latent.latent),
                latent.activation_data,
                data.constructor_cfg,
                data.tokens,
                data.tokenizer,
            )
            for example in record.examples:
                at = windows[tuple(example.tokens.tolist())]
                if (tokens == tokens[at]).all(axis=1).sum() == 1:
                    assert np.array_equal(example.activations.float().numpy(), activations[number][at])
                    examples += 1
            # Windows where nothing fired are taken for that: none may be one whose rows are missing.
            for example in record.not_active:
                at = windows[tuple(example.tokens.tolist())]
                if (tokens == tokens[at]).all(axis=1).sum() == 1:
                    assert not activations[number][at].any()
                    others += 1
    assert examples > 1000
    assert others > 100
