"""What a review of the CPU's fast path found wrong or untested: borders of blocks, threads, errors, sites."""

from __future__ import annotations

import ast
import gc
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import queries
import sae_runtime
from pipelines.background import BackgroundWriter
from pipelines.chunks import Captured, Placed, PlacedDocument, capture, chunk_tables
from pipelines.contexts import Context
from pipelines.quarantine import Poisoned
from pipelines.registry import Unit
from pipelines.writer import UnitWriter
from sae_runtime import fused, reference, screen
from sae_runtime.encode import Encoder, Sparse, columns, merge, of_tokens
from sae_runtime.errors import DataError, InputError
from sae_runtime.jit import _SOURCES
from sae_runtime.sae import SaeWeights
from sae_runtime.sites import Site
from sae_runtime.threads import Threads
from sae_runtime.weights import headers, read

CPU = torch.device("cpu")
Rows = list[tuple[int, int, float]]


def rows(sparse: Sparse) -> Rows:
    feature = np.repeat(np.arange(len(sparse.indptr) - 1), np.diff(sparse.indptr))
    value = (sparse.code.astype(np.uint32) << 16).view(np.float32)
    return list(zip(feature.tolist(), sparse.token.tolist(), value.tolist(), strict=True))


def integers(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """Small ones, whose sums have no error in any order."""
    return torch.from_numpy(rng.integers(-5, 6, shape).astype(np.float32))


def test_cached_machine_code_depends_on_every_file_with_loops() -> None:
    folder = Path(sae_runtime.__file__).parent
    uses = {"jit.py"}  # what it makes is compiled into the loops of all others
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "sae_runtime.jit":
                uses.add(file.name)
    assert set(_SOURCES) == uses


def test_archives_are_read_in_several_threads(tmp_path: Path) -> None:
    """Python 3.11 loses count of how deep it is in a header where a collection lets another thread in."""
    file, numbers = tmp_path / "a.npz", np.arange(6, dtype=np.float32).reshape(2, 3)
    np.savez(file, **{f"a{i}": numbers for i in range(20)})

    def use(i: int) -> bool:
        shapes = {header.shape for header in headers(str(file)).values()}
        return shapes == {(2, 3)} and all((numbers == t.numpy()).all() for t in read(str(file)).values())

    def let_in(*_: Any) -> None:
        sum(range(300))

    often, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.callbacks.append(let_in)
    gc.set_threshold(20)
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(use, range(60)))
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*often)
        gc.callbacks.remove(let_in)


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-8])
@torch.inference_mode()
def test_a_norm_that_differs_for_faint_rows_only_keeps_its_own_code(eps: float) -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eps, self.weight = eps, nn.Parameter(torch.randn(64).bfloat16())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = x.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).clamp(min=self.eps))
            return self.weight * wide.to(x.dtype)

    norm = Clamped()
    fused.fuse(norm)
    x = (torch.randn(50, 64) * eps**0.5 / 3).bfloat16()
    assert torch.equal(norm(x), Clamped.forward(norm, x))


@torch.inference_mode()
def test_rotary_angles_of_each_context_and_halves_that_no_loop_fits() -> None:
    """Positions that differ by context; and a head of which only a part is turned keeps its own code."""
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=12)
    config._attn_implementation = "eager"
    attention = LlamaAttention(config, 0).bfloat16().eval()
    assert fused.fuse(attention) == 1
    code = attention.forward.__func__.__globals__["apply_rotary_pos_emb"]
    assert code is not apply_rotary_pos_emb
    for batch, angles, length in ((3, 3, 5), (3, 1, 5), (1, 1, 1)):
        q, k = (torch.randn(batch, length, heads, 12).bfloat16().transpose(1, 2) for heads in (4, 2))
        cos, sin = (torch.randn(angles, length, 12).bfloat16() for _ in range(2))
        for found, wanted in zip(code(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
            assert torch.equal(found, wanted)
    with pytest.raises(RuntimeError):  # as in the model's own code
        code(q, k, cos[..., :6], sin[..., :6])


@pytest.mark.parametrize("rule", ["relu", "jumprelu", "gated"])
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 257])
def test_borders_of_the_screens_blocks(rule: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 128 tokens and 7 features; widths from 1 on, none or all features in one block."""
    monkeypatch.setattr(screen, "TOKENS", 128)
    monkeypatch.setattr(screen, "FEATURES", 7)
    rng = np.random.default_rng(tokens)
    active = 0
    for d, width in ((1, 1), (3, 6), (17, 7), (2, 8), (33, 29)):
        sae = SaeWeights(
            cast("Any", rule), integers(rng, d, width), integers(rng, width), integers(rng, width, d),
            integers(rng, d), b_pre=integers(rng, d) if d == 3 else None,
            threshold=integers(rng, width) * 3 if rule == "jumprelu" else None,
            b_gate=integers(rng, width) * 3 if rule == "gated" else None,
            r_mag=torch.zeros(width) if rule == "gated" else None,
        )  # fmt: skip
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = integers(rng, tokens, d).to(dtype)
            encoder = Encoder(sae, CPU)
            assert encoder.screen is not None
            found = encoder.encode(x)
            f = reference.stored(reference.encode(x, sae))
            wanted = [(int(a), int(t), float(f[t, a])) for a, t in torch.nonzero(f.T).tolist()]
            assert rows(found) == wanted
            active += len(wanted)
            error = (x.float() - reference.decode(f, x, sae)).double().square().sum()
            assert encoder.squared_error(x, found) == float(error)
    assert active or tokens == 1


def test_numbers_at_the_ends_of_float32() -> None:
    """Features without weights, of the tiniest, cut off by infinite ones; tokens of zeros and loud ones."""
    rng = np.random.default_rng(1)
    d, width, tokens = 40, 20, 200
    W = rng.normal(size=(d, width)).astype(np.float32)
    b, threshold = rng.normal(size=width).astype(np.float32), np.full(width, 3, np.float32)
    W[:, 0], b[0], threshold[0] = 0, 5, 4  # always active
    W[:, 1], b[1], threshold[1] = 0, 0, -1
    W[:, 2], b[2], threshold[2] = W[:, 2] * np.float32(1e-42), 0, 0
    W[:, 3], b[3], threshold[3] = W[:, 3] * np.float32(1e-30), 0, 0
    b[4], threshold[5] = -np.inf, np.inf
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.from_numpy(rng.normal(size=(tokens, d))).to(dtype)
        x[5], x[6], x[7] = 0, x[6] * 1e-39, x[7] * 1e9
        x[8] = -x[8] * 0
        sae = SaeWeights("jumprelu", *map(torch.from_numpy, (W, b)), threshold=torch.from_numpy(threshold))
        f = np.zeros((tokens, width))
        for feature, token, value in rows(Encoder(sae, CPU).encode(x)):
            f[token, feature] = value
        wanted = reference.stored(reference.encode(x, sae)).numpy()
        assert ((f > 0) == (wanted > 0)).all()
        assert (f[:, 0] == 5).all()
        assert np.count_nonzero(f[:, 3]) > 80
        assert not f[:, [1, 4, 5]].any()
        assert np.allclose(f, wanted, rtol=2**-7, atol=0)


def test_the_bound_is_of_the_feature_that_loses_most() -> None:
    """Inputs that are not the model's own: one feature is half a bfloat16 step off, 63 lose nothing."""
    d, width = 514, 64
    W = np.ones((d, width))
    W[:, 40] += 2.0**-7 * 0.499
    x = torch.ones(70, d)
    product = d * (1 + 2.0**-7 * 0.499)
    threshold = np.full(width, product * (1 - 2.0**-18), np.float32)
    sae = SaeWeights(
        "jumprelu", torch.from_numpy(W).float(), torch.zeros(width), threshold=torch.from_numpy(threshold)
    )
    assert {(f, t) for f, t, _ in rows(Encoder(sae, CPU).encode(x))} == {(40, t) for t in range(70)}


def random_sparse(rng: np.random.Generator, width: int, tokens: int, share: float) -> tuple[Sparse, Rows]:
    active = rng.random((width, tokens)) < share
    feature, token = np.nonzero(active)
    code = rng.integers(0x3F80, 0x4100, len(token)).astype(np.uint16)
    sparse = Sparse(np.searchsorted(feature, np.arange(width + 1)), token.astype(np.int32), code)
    return sparse, rows(sparse)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_rows_of_some_tokens_and_of_several_blocks(share: float) -> None:
    rng = np.random.default_rng(2)
    width = 9
    for sizes in ((1,), (5, 1, 30), (30, 0, 7)):
        blocks, offset, merged, wanted = [], 0, [], []
        for tokens in sizes:
            sparse, all_rows = random_sparse(rng, width, tokens, share)
            keys = np.sort(rng.choice(10**12, tokens, replace=False))
            keys += offset * 10**13
            blocks.append((sparse, keys))
            merged.append(Sparse(sparse.indptr, sparse.token + np.int32(offset), sparse.code))
            wanted += [(f, int(keys[t]), v) for f, t, v in all_rows]
            offset += tokens
            slot = np.full(tokens, -1, np.int32)
            chosen = np.flatnonzero(rng.random(tokens) < 0.4)
            slot[chosen] = np.arange(len(chosen))
            place = {int(t): i for i, t in enumerate(chosen)}
            assert rows(of_tokens(sparse, slot)) == [(f, place[t], v) for f, t, v in all_rows if t in place]
        feature, key, value = columns(blocks, width)
        assert (feature.dtype, key.dtype, value.dtype) == (np.int32, np.int64, np.float32)
        assert list(zip(feature.tolist(), key.tolist(), value.tolist(), strict=True)) == sorted(wanted)
        one = rows(merge(merged, width))
        assert one == sorted(one)
        assert sorted(one) == sorted(r for part in merged for r in rows(part))


READ, WRITTEN = Site(0, "mlp_in"), Site(0, "mlp_out")


class Model:
    """Gives at every site (token id, position), and for id 7 what is not finite or, at one site, loud."""

    packs = False
    device = CPU

    def __init__(self, bad: float = 7.0, delay: float = 0.0) -> None:
        self.module = nn.Linear(1, 1)
        self.taps = {site: SimpleNamespace(width=2, path=f"at.{site.kind}") for site in (READ, WRITTEN)}
        self.bad, self.delay, self.threads = bad, delay, set[int]()

    def run(self, ids: torch.Tensor) -> dict[Site, torch.Tensor]:
        self.threads.add(threading.get_ident())
        time.sleep(self.delay)
        x = torch.stack([ids.float(), torch.arange(ids.shape[1]).expand(ids.shape).float()], -1)
        read = x.clone()
        read[ids == 7] = self.bad
        return {READ: read, WRITTEN: x}


def a_part(contexts: list[list[int]], counted: Callable[[int], bool]) -> tuple[list[Placed], Any]:
    """Contexts of a document each, rows 10, 11, … of their file."""
    part = []
    for i, ids in enumerate(contexts):
        document = PlacedDocument(i, 10 + i, None, {}, np.array(ids))
        flags = np.array([counted(token) for token in ids])
        part.append(Placed(i, document, Context(0, 0, np.array(ids, np.int32), flags)))
    return part, chunk_tables(part, -1, -1, Unit("u", 0, "c", "f", "d", "s", 0, len(part), 1))


CONTEXTS = [[2, 3, 4, 5, 6], [9], [3, 3], [8, 7, 6, 5], [1, 1, 1], [4, 5, 6, 8, 9, 2], [5, 7, 4]]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("budget", [1, 6, 8, 100])
def test_activations_come_back_in_the_corpus_order(threads: int, budget: int) -> None:
    part, chunk = a_part(CONTEXTS, lambda token: token not in (1, 8))
    wanted = torch.tensor(
        [(t, i) for ids in CONTEXTS for i, t in enumerate(ids) if t not in (1, 8)], dtype=torch.float32
    )
    model, pool = Model(bad=100.0, delay=0.001), Threads(threads)
    sampled = np.array([0, 3, 9, len(wanted) - 1])
    found = capture(cast("Any", model), part, chunk, budget, None, {WRITTEN: sampled}, pool)
    assert torch.equal(found[WRITTEN].x, wanted[sampled])
    loud = wanted[:, 0] == 7
    assert torch.equal(found[READ].x[~loud], wanted[~loud])
    assert (found[READ].x[loud] == 100).all()

    found = capture(cast("Any", model), part, chunk, budget, 3.0, {}, pool)
    pool.close()
    assert torch.equal(found[READ].x, wanted[~loud])
    assert found[READ].token.tolist() == np.flatnonzero(~loud).tolist()
    # What an SAE of another site reconstructs does not lack what is loud at its own.
    every = found[READ].at(np.arange(len(wanted)))
    assert torch.equal(every[~loud], wanted[~loud])
    assert (every[loud] == 100).all()
    assert torch.equal(found[READ].finished(lambda x: x + 1).at(np.arange(len(wanted))), every + 1)
    assert torch.equal(found[WRITTEN].at(np.array([1, 5])), wanted[[1, 5]])
    if threads > 1 and budget == 1:
        assert len(model.threads) > 1


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_every_document_that_is_not_finite_is_named(threads: int, bad: float) -> None:
    """They are in several batches or share one with others; uncounted tokens say nothing."""
    pool = Threads(threads)
    for budget in (4, 6, 100):
        part, chunk = a_part(CONTEXTS, lambda token: token != 1)
        with pytest.raises(Poisoned) as caught:
            capture(cast("Any", Model(bad)), part, chunk, budget, None, {}, pool)
        assert sorted(caught.value.errors) == [13, 16]
        assert all(e.startswith("activations at at.mlp_in are not") for e in caught.value.errors.values())
        with pytest.raises(Poisoned) as caught:
            capture(cast("Any", Model(bad)), part, chunk, budget, None, {}, pool, enough=1)
        assert len(caught.value.errors) == 1
        part, chunk = a_part(CONTEXTS, lambda token: token != 7)
        found = capture(cast("Any", Model(bad)), part, chunk, budget, None, {}, pool)
        assert torch.isfinite(found[READ].x).all()
    pool.close()


def test_rows_of_what_is_captured_number_the_chunks_tokens() -> None:
    sparse = Sparse(np.array([0, 2, 3]), np.array([0, 2, 1], np.int32), np.array([1, 2, 3], np.uint16))
    x = torch.zeros(3, 1)
    for token in ([0, 1, 2], [0, 1, 3], [5, 7, 9], [1, 2, 3]):
        assert Captured(x, np.array(token)).in_chunk(sparse).token.tolist() == [token[0], token[2], token[1]]


class Files:
    """Writes down what is written; a kind named `slow` waits for `gate`."""

    def __init__(self) -> None:
        self.gate, self.done, self.state = threading.Event(), list[Any](), "open"

    def put(self, name: Any) -> None:
        if name == "slow":
            assert self.gate.wait(20)
        if name == "bad":
            raise OSError("the disk is full")
        self.done.append(name)

    def close(self) -> dict[str, Any]:
        self.state = "closed"
        return {}

    def abandon(self) -> None:
        self.state = "abandoned"


def background() -> tuple[BackgroundWriter, Files]:
    files = Files()
    return BackgroundWriter(cast("UnitWriter", files)), files


def test_lanes_keep_their_order_and_do_not_wait_for_each_other() -> None:
    writer, files = background()
    for name in ("slow", 1, 2):
        writer.submit_rows(lambda f, name=name: f.put(name))
    for name in "abc":
        writer.submit(lambda f, name=name: f.put(name))
    while len(files.done) < 3:
        time.sleep(0.001)
    assert files.done == ["a", "b", "c"]
    files.gate.set()
    assert writer.close() == {}
    assert files.done == ["a", "b", "c", "slow", 1, 2]
    assert files.state == "closed"


def test_room_is_for_two_saes_rows_and_comes_back_also_after_an_error() -> None:
    writer, files = background()
    for name in ("slow", "bad"):
        writer.submit_rows(lambda f, name=name: f.put(name))
    writer.room()
    writer.submit_rows(lambda f: f.put(3))
    entered = threading.Thread(target=writer.room, daemon=True)
    entered.start()
    entered.join(0.2)
    assert entered.is_alive()
    files.gate.set()
    entered.join(20)
    assert not entered.is_alive()
    with pytest.raises(OSError, match="the disk is full"):
        writer.flushed()
    writer.abandon()
    assert files.state == "abandoned"


def test_what_is_abandoned_frees_those_who_wait_for_room() -> None:
    writer, files = background()
    for name in ("slow", 1, 2, 3):
        writer.submit_rows(lambda f, name=name: f.put(name))
    waits = threading.Thread(target=writer.room, daemon=True)
    waits.start()
    threading.Timer(0.05, files.gate.set).start()
    writer.abandon()
    waits.join(20)
    assert not waits.is_alive()
    assert files.done == ["slow"]


@pytest.mark.parametrize("kind", ["activations", "features", "contexts", "saes"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_write_that_fails_is_told_and_leaves_neither_a_commit_nor_an_open_file(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch, kind: str, threads: int,
) -> None:  # fmt: skip
    """Also of what is written last, after the last chunk, when nothing is left to be computed."""
    write, abandon = UnitWriter.write, UnitWriter.abandon
    closed = []

    def failing(self: UnitWriter, of: str, table: dict[str, Any]) -> None:
        if of == kind:
            raise DataError("no room for it")
        write(self, of, table)

    monkeypatch.setattr(UnitWriter, "write", failing)
    monkeypatch.setattr(UnitWriter, "abandon", lambda self: (closed.append(self), abandon(self))[1])
    rows_of = [{"text": "the cat sat on a mat"}, {"text": "seven red foxes"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows_of)) + "\n")
    corpus = {"uri": "a.jsonl", "id": None, "metadata": []}
    outcome = scan_inline(write_spec(tmp_path, corpus=corpus, model={"threads": threads}))
    assert [failed.error for failed in outcome.failed] == ["no room for it"]
    assert len(closed) == 1
    assert all(stream.closed for stream, _ in closed[0]._open.values())
    assert not list((tmp_path / "index").glob("commits/*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_change_nothing_in_a_tiny_model(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_corpus: Path,
    monkeypatch: pytest.MonkeyPatch, dtype: str,
) -> None:  # fmt: skip
    """Rows, statistics, samples, reconstruction errors; several chunks a unit, several batches a chunk."""
    monkeypatch.setattr("pipelines.unit.CHUNK_TOKENS", {"cpu": 150})
    monkeypatch.setattr("pipelines.unit.BATCH_TOKENS", {"cpu": 64})
    monkeypatch.setattr("pipelines.unit.SEGMENT_ROWS", 500)
    lines = [
        line for i in range(8) for line in (tiny_corpus / f"part_{i:02d}.jsonl").read_text().splitlines()
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    suites = write_spec(tmp_path / "any").parent
    wanted = None
    for threads in (1, 2, 3):
        spec = write_spec(
            suites / str(threads), corpus={"uri": str(tmp_path / "a.jsonl")}, context={"length": 32},
            model={"threads": threads, "dtype": dtype},
        )  # fmt: skip
        assert not scan_inline(spec).failed
        found = tiny.content(spec.parent / "index")
        wanted = found if wanted is None else wanted
        assert not tiny.differences(wanted, found)
    assert wanted is not None
    assert len(wanted["activations"]) > 5000


def test_a_reconstruction_is_of_its_target_wherever_that_is_loud(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_suites: Path,
) -> None:  # fmt: skip
    """An SAE that reads a transcoder's target, with loud tokens of its own, leaves the transcoder's FVU."""
    rng = np.random.default_rng(4)
    file = tmp_path / "tiny-transcoders" / "layer_2" / "width_20" / "average_l0_5" / "params.npz"
    tiny.write_sae(file, rng, rng.normal(size=(500, tiny.HIDDEN)), 20, "float32", 200)
    context = {"length": 96, "exclude": ["special", "first", {"norm_above": 1.3}]}
    found = []
    for name, suites in (("alone", []), ("beside", [tiny_suites / "tiny-mlp"])):
        saes = [{"uri": str(uri)} for uri in (tmp_path / "tiny-transcoders", *suites)]
        assert not scan_inline(write_spec(tmp_path / name, saes=saes, context=context)).failed
        con = queries.connect(str(tmp_path / name / "index"))
        sql = "SELECT n_tokens, measured_l0, fvu FROM saes WHERE starts_with(sae, 'tiny-transcoders')"
        found += con.sql(sql).fetchall()
        if suites:
            ((other,),) = con.sql("SELECT max(n_tokens) FROM saes WHERE sae LIKE 'tiny-mlp%'").fetchall()
            assert other != found[0][0], "sites must differ in what is loud"
    assert found[0] == found[1]


def test_contexts_whose_angles_would_depend_on_their_batch_are_refused(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_model: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "long")
    config = json.loads((folder / "config.json").read_text())
    half = tiny.HEAD_DIM // 2
    config["rope_parameters"] = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * half,
        "long_factor": [4.0] * half, "original_max_position_embeddings": 64, "factor": 8.0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"context\.length: 96 tokens are more than the 64 up to which"):
        scan_inline(write_spec(tmp_path, model={"uri": str(folder)}))
    assert not scan_inline(write_spec(tmp_path, model={"uri": str(folder)}, context={"length": 64})).failed


def test_rows_are_written_as_segments_fill_and_saes_wait_for_room(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Else a unit's rows would all be held until its end."""
    room, submit, calls = BackgroundWriter.room, BackgroundWriter.submit_rows, {"room": 0, "rows": 0}

    def counted(name: str, call: Callable[..., None]) -> Callable[..., None]:
        def counting(*arguments: Any) -> None:
            calls[name] += 1
            call(*arguments)

        return counting

    monkeypatch.setattr(BackgroundWriter, "room", counted("room", room))
    monkeypatch.setattr(BackgroundWriter, "submit_rows", counted("rows", submit))
    monkeypatch.setattr("pipelines.unit.CHUNK_TOKENS", {"cpu": 150})
    monkeypatch.setattr("pipelines.unit.SEGMENT_ROWS", 1)
    shutil.copy(tiny_corpus / "part_13.jsonl", tmp_path / "a.jsonl")  # one document of 500 words
    assert not scan_inline(write_spec(tmp_path, corpus={"uri": "a.jsonl"})).failed
    chunks, rest = divmod(calls["room"], len(tiny.SAES))
    assert chunks > 2
    assert rest == 0
    assert calls["rows"] > 2 * len(tiny.SAES)


def test_saes_are_there_where_no_unit_has_a_context(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any]
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": ""}) + "\n")
    spec = write_spec(tmp_path, corpus={"uri": "a.jsonl", "id": None, "metadata": []})
    assert not scan_inline(spec).failed
    con = queries.connect(str(tmp_path / "index"))
    assert con.sql("SELECT n_tokens FROM saes").fetchall() == [(0,)] * len(tiny.SAES)
    assert list((tmp_path / "index").glob("data/saes/*"))
