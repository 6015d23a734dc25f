"""Packed rows: each context as it is alone, rows by lengths alone, whole scans, and what is refused."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch

import queries
from pipelines.chunks import Room, norm_above
from sae_runtime import model as model_module
from sae_runtime.errors import InputError
from sae_runtime.model import LanguageModel, locate, text_config
from sae_runtime.packing import check_attention, pack, positions, row_length
from sae_runtime.sites import KINDS, Site

FLEX = tuple(f for f in families.FAMILIES if f not in ("gpt2", "gpt_oss", "qwen3_5"))
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
LENGTHS = (9, 1, 24, 1, 1, 13, 2)  # the families' sliding windows are of 6 tokens
ROW = 64


def some_contexts(lengths: tuple[int, ...] = LENGTHS, seed: int = 4) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.integers(3, 300, length)) for length in lengths]


def row(contexts: list[torch.Tensor], length: int = ROW) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and positions [1, length], written out by hand; the rest is token 0 at position 0."""
    ids, at = torch.zeros(2, 1, length, dtype=torch.int64)
    ids[0, : sum(map(len, contexts))] = torch.cat(contexts)
    at[0, : sum(map(len, contexts))] = torch.cat([torch.arange(len(c)) for c in contexts])
    return ids, at


def load(folder: Path, family: str, dtype: str = "float32", attention: str = "flex_attention") -> Any:
    sites = [Site(n, kind) for n in (0, 3) for kind in KINDS if families.path(family, n, kind)]
    return LanguageModel(locate(str(folder)), sites, dtype, attention=attention)


def distance(x: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((x - wanted).norm() / wanted.norm())


# --- the model


@pytest.mark.parametrize("family", FLEX)
def test_every_site_of_a_packed_context_is_what_the_context_alone_gives(models: Any, family: str) -> None:
    contexts = some_contexts()
    found = load(models(family), family).run(*row(contexts))
    alone = load(models(family), family, attention="sdpa")
    assert len(found) >= 18
    starts = np.cumsum([0, *LENGTHS])
    for i, ids in enumerate(contexts):
        for site, wanted in alone.run(ids[None]).items():
            x = found[site][0, starts[i] : starts[i + 1]]
            assert distance(x, wanted[0]) < 1e-5, (site, i)


@pytest.mark.parametrize("family", FLEX)
def test_no_token_sees_another_context(models: Any, family: str) -> None:
    model, contexts = load(models(family), family), some_contexts()
    before = model.run(*row(contexts))
    start = sum(LENGTHS[:2])
    contexts[2] = some_contexts(seed=5)[2]
    after = model.run(*row(contexts))
    others = torch.ones(ROW, dtype=torch.bool)
    others[start : start + LENGTHS[2]] = False
    for site, x in after.items():
        assert not torch.equal(x[0, ~others], before[site][0, ~others]), site
        if family in MIXTURES:  # an expert's product has as many rows as tokens were sent to it
            assert distance(x[0, others], before[site][0, others]) < 1e-5, site
        else:
            assert torch.equal(x[0, others], before[site][0, others]), site


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_values_do_not_depend_on_how_full_the_row_is(models: Any, family: str) -> None:
    model, contexts = load(models(family), family), some_contexts()
    full, part = model.run(*row(contexts)), model.run(*row(contexts[:3]))
    for site in full:
        assert torch.equal(full[site][:, : sum(LENGTHS[:3])], part[site][:, : sum(LENGTHS[:3])]), site


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_rows_run_side_by_side_and_with_fused_loops(models: Any, family: str) -> None:
    model = load(models(family), family, "bfloat16")
    rows = [row(some_contexts(seed=seed)) for seed in range(8)]
    wanted = [model.run(*inputs) for inputs in rows]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda inputs: model.run(*inputs), rows))
    for one, other in zip(found, wanted, strict=True):
        assert all(torch.equal(one[site], other[site]) for site in other)
    single = load(models(family), family)
    for inputs, activations in zip(rows, wanted, strict=True):
        for site, x in single.run(*inputs).items():
            used = slice(0, sum(LENGTHS))
            assert distance(activations[site][0, used].float(), x[0, used]) < 0.1, site


@pytest.mark.parametrize("family", [*FLEX, "gpt_oss"])
def test_contexts_that_see_each_other_are_noticed_when_a_model_is_loaded(
    models: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(models(family), family)
    if family in FLEX:
        model.check_packing(40)
        run = model.module.forward
        monkeypatch.setattr(model.module, "forward", lambda position_ids, **more: run(**more))
    with pytest.raises(InputError, match=r"model\.attention: .* see each other; use sdpa"):
        model.check_packing(40)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "qwen3", "mistral"])
def test_blocks_on_a_gpu_are_the_dense_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(families, "_HEAD_DIM", 16)  # the least that the kernels take
    folder = families.make(family, tmp_path / family)
    source, sites = locate(str(folder)), [Site(3, "resid_post"), Site(3, "attn_z")]
    fast = LanguageModel(source, sites, "float32", "cuda", attention="flex_attention")
    plain = LanguageModel(source, sites, "float32", "cpu")
    for lengths in ((9, 1, 100, 300, 1, 13, 2), (500, 8), (3,)):
        contexts = some_contexts(lengths)
        found = fast.run(*row(contexts, 512))
        starts = np.cumsum([0, *lengths])
        for i, ids in enumerate(contexts):
            for site, wanted in plain.run(ids[None]).items():
                x = found[site][0, starts[i] : starts[i + 1]].cpu()
                assert distance(x, wanted[0]) < 1e-4, (site, i)


# --- rows


def test_contexts_go_into_the_first_row_with_room_in_their_order() -> None:
    # 6 and 3 fill the first row up to 9 of 10, 5 and 4 the second; 1 goes back to the first.
    assert pack([6, 5, 3, 4, 1, 1, 1], 10) == [[0, 2, 4], [1, 3, 5], [6]]
    assert pack([], 10) == []
    # What is longer than a row is alone, whatever is left after it.
    assert pack([2, 25, 3, 10], 10) == [[0, 2], [1], [3]]
    assert [row_length(n, 10) for n in (1, 10, 11, 25)] == [10, 10, 20, 30]


def test_every_context_is_in_one_row_that_is_not_overfull() -> None:
    rng = np.random.default_rng(0)
    for budget in (16, 100):
        lengths = rng.integers(1, 60, 500).tolist()
        rows = pack(lengths, budget)
        assert sorted(m for members in rows for m in members) == list(range(500))
        assert all(members == sorted(members) for members in rows)
        assert all(sum(lengths[m] for m in members) <= budget or len(members) == 1 for members in rows)
        # Two rows that one would do for were wrongly two.
        fill = [sum(lengths[m] for m in members) for members in rows if lengths[members[0]] <= budget]
        assert sum(2 * n <= budget for n in fill) <= 1


def test_positions_restart_and_what_is_left_is_at_the_beginning() -> None:
    assert positions([3, 1, 2], 9).tolist() == [0, 1, 2, 0, 0, 1, 0, 0, 0]


def test_a_chunk_ends_where_its_rows_are_full() -> None:
    lengths = [7, 7, 3, 3, 5, 4, 2]
    room = Room(packs=True, budget=10, tokens=20)
    assert [room.take(n) for n in lengths] == [True, True, True, True, False, False, False]
    room = Room(packs=False, budget=10, tokens=20)
    assert [room.take(n) for n in lengths] == [True, True, True, True, False, False, False]
    room = Room(packs=True, budget=10, tokens=20)
    assert room.take(45), "the first context has a chunk whatever its length"
    assert not room.take(1)


def test_loud_tokens_are_found_by_their_own_context_in_a_row() -> None:
    norms = torch.tensor([[1.0, 1.0, 5.0, 1.0, 40.0, 50.0, 50.0, 9.0, 0.0]])
    context = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, -1]])
    found = norm_above(norms[..., None].expand(1, 9, 4) / 2, context, 3)
    assert found.tolist() == [[False, False, True, False, False, False, False, False, False]]
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 12, 30)
    x = torch.from_numpy(rng.lognormal(0, 1, (1, int(lengths.sum()), 3)).astype(np.float32))
    of = torch.from_numpy(np.repeat(np.arange(30), lengths))[None]
    found = norm_above(x, of, 1.5)[0].numpy()
    length = np.linalg.norm(x[0].numpy(), axis=1)
    medians = np.array([np.median(length[of[0].numpy() == i]) for i in range(30)])
    assert found.tolist() == (length > 1.5 * medians[of[0].numpy()]).tolist()
    assert 0 < found.sum() < len(found)


# --- scans


@pytest.fixture(scope="module")
def scans(
    tmp_path_factory: pytest.TempPathFactory, write_spec: Callable[..., Path], scan_inline: Callable[..., Any]
) -> tuple[Any, Any]:
    """Views of one corpus scanned padded and packed, loud tokens left out."""
    folder = tmp_path_factory.mktemp("scans")
    context = {"length": 48, "overlap": 7, "exclude": ["special", "first", {"norm_above": 1.3}]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.unit.CHUNK_TOKENS", {"cpu": 512})
        patch.setattr("pipelines.unit.BATCH_TOKENS", {"cpu": 128})
        for name, attention in (("padded", "sdpa"), ("packed", "flex_attention")):
            spec = write_spec(folder / name, context=context, model={"attention": attention})
            assert not scan_inline(spec).failed
    padded, packed = (queries.connect(str(folder / name / "index")) for name in ("padded", "packed"))
    return padded, packed


def test_a_packed_scan_has_the_same_documents_and_contexts(scans: tuple[Any, Any]) -> None:
    for view, order in (
        ("documents", "document"),
        ("contexts", "context"),
        ("segments", "document, segment"),
    ):
        padded, packed = (index.sql(f"SELECT * FROM {view} ORDER BY {order}").fetchall() for index in scans)
        assert padded == packed
        assert len(padded) > 50


def test_a_packed_scan_has_the_same_rows_but_for_rounding(scans: tuple[Any, Any]) -> None:
    query = "SELECT sae, feature, context, position, activation FROM activations"
    padded, packed = ({row[:4]: row[4] for row in index.sql(query).fetchall()} for index in scans)
    assert len(padded) > 10_000
    assert len(padded.keys() ^ packed.keys()) <= 0.001 * len(padded)
    both = [(padded[key], packed[key]) for key in padded.keys() & packed.keys()]
    assert max(abs(a - b) / abs(a) for a, b in both) <= 2.0**-7, "no further off than one bfloat16 step"
    assert sum(a != b for a, b in both) <= 0.01 * len(both)
    counted = "SELECT sae, n_tokens FROM saes ORDER BY sae"
    padded, packed = (index.sql(counted).fetchall() for index in scans)
    assert all(abs(a[1] - b[1]) <= 2 for a, b in zip(padded, packed, strict=True))


def test_attention_is_part_of_what_an_index_is(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any]
) -> None:
    corpus = {"limit": 3}
    scan_inline(write_spec(tmp_path, corpus=corpus))
    spec = write_spec(tmp_path, corpus=corpus, model={"attention": "flex_attention"})
    with pytest.raises(InputError, match=r"model\.attention \(sdpa there, flex_attention here\)"):
        scan_inline(spec)


# --- refusals


def refusal(folder: Path, attention: str, dtype: str, device: str, length: int = 64) -> str:
    with pytest.raises(InputError) as caught:
        check_attention(text_config(locate(str(folder))), attention, dtype, device, length)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_layers_that_carry_a_state_are_refused(models: Any, attention: str) -> None:
    assert refusal(models("qwen3_5"), attention, "bfloat16", "cuda") == (
        f"model.attention: {attention} cannot be used: layers of type linear_attention of a qwen3_5_text "
        "model carry one context into the next; use sdpa"
    )


def test_what_transformers_does_not_have_is_refused(models: Any) -> None:
    assert refusal(models("gpt2"), "flex_attention", "bfloat16", "cuda") == (
        "model.attention: flex_attention cannot be used: transformers has none for gpt2 models; use sdpa"
    )
    assert "masks of gpt_oss models join" in refusal(models("gpt_oss"), "flex_attention", "bfloat16", "cuda")
    assert "none for gpt_oss" in refusal(models("gpt_oss"), "flash_attention_2", "bfloat16", "cuda")


def test_flash_attention_is_refused_where_it_cannot_run(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = models("llama")
    assert "needs a GPU; use flex_attention or sdpa" in refusal(llama, "flash_attention_2", "bfloat16", "cpu")
    assert "no float32; use" in refusal(llama, "flash_attention_2", "float32", "cuda")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert "flash-attn is not installed" in refusal(llama, "flash_attention_2", "bfloat16", "cuda")
    package = types.ModuleType("flash_attn")
    package.__spec__ = types.SimpleNamespace(name="flash_attn")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    check_attention(text_config(locate(str(llama))), "flash_attention_2", "bfloat16", "cuda", 8192)


def test_dense_masks_of_long_contexts_are_refused_on_a_cpu_alone(models: Any) -> None:
    llama = models("llama")
    assert "dense" in refusal(llama, "flex_attention", "float32", "cpu", 4097)
    for family in FLEX:
        config = text_config(locate(str(models(family))))
        check_attention(config, "flex_attention", "float32", "cpu", 4096)
        check_attention(config, "flex_attention", "float32", "cuda", 1 << 17)
        check_attention(config, "sdpa", "float32", "cpu", 1 << 17)


def test_a_scan_is_refused_before_anything_is_written(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any]
) -> None:
    with pytest.raises(
        InputError, match=r"model\.attention: flash_attention_2 cannot be used: it needs a GPU"
    ):
        scan_inline(write_spec(tmp_path, model={"attention": "flash_attention_2"}))
    assert not (tmp_path / "index").exists()


def test_a_cpu_has_transformers_plain_attention_and_a_gpu_what_is_asked_for() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    named = model_module._implementation
    assert [named(a, cpu) for a in ("sdpa", "flex_attention")] == [None, "eager"]
    assert [named(a, cuda) for a in ("sdpa", "flex_attention", "flash_attention_2")] == [
        None, "flex_attention", "flash_attention_2",
    ]  # fmt: skip
