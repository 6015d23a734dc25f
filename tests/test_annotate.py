"""`corpuscope annotate`: output tokens against the real model's own logits, neighbours against all pairs,
explanations row by row; what is refused, replaced, resumed and collected.

The model's side is measured with hooks of the test's own: a decoder row is added at its site, whatever lies
beside its direct path is held as it was, and the logits that change are the definition.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from click.testing import CliRunner

import queries
from jobs.cli import cli
from pipelines import annotate as annotating
from pipelines import annotation_records as records
from pipelines import gc
from pipelines.annotate import Options, Outcome, annotate
from pipelines.audit import audit
from pipelines.storage import Store
from queries.lookup import feature
from sae_runtime import decoder
from sae_runtime.decoder import Columns, Readout, Unmapped, highest
from sae_runtime.errors import CorpuscopeError, DataError, InputError
from sae_runtime.model import locate
from sae_runtime.sae import Input, SaeWeights
from sae_runtime.sites import Site

K = 10
RES, WIDE = "tiny-res/layer_1/width_37/average_l0_2", "tiny-res/layer_1/width_130/average_l0_13"
MLP, ATT = "tiny-mlp/layer_2/width_37/average_l0_10", "tiny-att/layer_1/width_37/average_l0_1"
SITES = {sae.path: sae.site for sae in tiny.SAES}


@pytest.fixture(scope="module")
def annotated(tmp_path_factory: pytest.TempPathFactory, tiny_index: Path) -> Path:
    """A copy of the tiny index with every decoder-side fact. Read only."""
    index = tmp_path_factory.mktemp("annotated") / "index"
    shutil.copytree(tiny_index, index)
    done = run("annotate", str(index), "--format", "json")
    assert done.exit_code == 0, done.output
    assert {row["sae"] for row in json.loads(done.stdout)} == {sae.path for sae in tiny.SAES}
    return index


@pytest.fixture
def fresh(tmp_path: Path, tiny_index: Path) -> Path:
    """A copy of the tiny index without annotations."""
    shutil.copytree(tiny_index, tmp_path / "index")
    return tmp_path / "index"


def run(*arguments: str) -> Any:
    """The command with its errors as the command line's own; output and messages apart."""
    done = CliRunner().invoke(cli, list(arguments))
    if done.exception is not None and not isinstance(done.exception, (SystemExit, CorpuscopeError)):
        raise done.exception
    return done


def refusal(*arguments: str) -> str:
    """What it says when it refuses; one line."""
    with pytest.raises(InputError) as refused:
        CliRunner().invoke(cli, list(arguments), catch_exceptions=False)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def asked(index: Path | str, sql: str) -> list[tuple[Any, ...]]:
    with queries.connect(str(index)) as con:
        return con.execute(sql).fetchall()


# --- output tokens


class Direct:
    """The whole model in double precision with everything but the direct path from a site held as it was."""

    def __init__(self, path: Path) -> None:
        self.causal = tiny.load_causal(path, torch.float64)
        self.ids = torch.tensor([[2, 17, 40, 99, 7, 250, 31, 5]])
        self.norms = {(99, "norm"): self.causal.model.norm}
        for number, layer in enumerate(self.causal.model.layers):
            for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
                self.norms[number, name] = getattr(layer, name)
        self.kept: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}  # what each norm saw and gave

        def keep(key: Any) -> Callable[..., None]:
            return lambda module, args, out: self.kept.update({key: (args[0].clone(), out.clone())})

        self._run({key: keep(key) for key in self.norms}, None)

    def change(self, site: tuple[int, str], direction: np.ndarray) -> np.ndarray:
        """How much each logit changes, [vocabulary], times the denominators of the norms on the way."""
        layer, kind = site
        on_path = [(99, "norm"), *([(layer, "post_attention_layernorm")] if kind == "attn_z" else [])]
        sizes = {
            key: (self.kept[key][0].square().mean(-1, keepdim=True) + self.norms[key].eps).sqrt()
            for key in on_path
        }
        added = torch.from_numpy(direction)

        def held(key: Any, add: torch.Tensor) -> Callable[..., torch.Tensor]:
            def hook(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
                if key in sizes:  # on the path: linear, with the denominator as it was
                    return args[0] / sizes[key] * (1 + module.weight)
                given = self.kept[key][1]  # beside it: what it gave before
                here = (kind, key) == ("mlp_out", (layer, "post_feedforward_layernorm"))
                return given + add if here else given

            return hook

        with_, without = (
            self._run({key: held(key, add) for key in self.norms}, (layer, kind, add))
            for add in (added, torch.zeros_like(added))
        )
        whole = (with_ - without) * torch.stack(list(sizes.values())).prod(0)
        assert torch.allclose(whole, whole[:, :1], rtol=1e-9, atol=1e-9)  # the same at every position
        return whole[0, -1].numpy()

    @torch.inference_mode()
    def _run(self, hooks: dict[Any, Any], add: tuple[int, str, torch.Tensor] | None) -> torch.Tensor:
        """The head's products, before Gemma caps them, [1, tokens, vocabulary]."""
        products: list[torch.Tensor] = []
        handles = [self.norms[key].register_forward_hook(hook) for key, hook in hooks.items()]
        head = self.causal.lm_head
        handles.append(head.register_forward_hook(lambda m, a, out: products.append(out.clone())))
        if add is not None:
            block = self.causal.model.layers[add[0]]
            if add[1] == "resid_post":
                handles.append(block.register_forward_hook(lambda m, a, out: out + add[2]))
            elif add[1] == "attn_z":
                handles.append(
                    block.self_attn.o_proj.register_forward_pre_hook(lambda m, a: (a[0] + add[2], *a[1:]))
                )
        self.causal(input_ids=self.ids, use_cache=False)
        for handle in handles:
            handle.remove()
        return products[0]


@pytest.mark.parametrize("sae", [sae.path for sae in tiny.SAES])
def test_logits_are_what_the_real_model_adds_along_the_direct_path(
    annotated: Path, tiny_model: Path, tiny_suites: Path, sae: str
) -> None:
    direct = Direct(tiny_model)
    rows = tiny.load_sae(tiny_suites, sae)["W_dec"].astype(np.float64)
    found = asked(
        annotated,
        f"SELECT feature, sign, rank, token, logit FROM feature_tokens WHERE sae = '{sae}' "
        "ORDER BY feature, sign DESC, rank",
    )
    told = {(f, s): [(t, v) for g, h, _, t, v in found if (g, h) == (f, s)] for f, s, *_ in found}
    assert {f for f, _ in told} == {f for f in range(len(rows)) if rows[f].any()}
    assert [row[2] for row in found] == list(range(1, K + 1)) * len(told)
    for f in (0, len(rows) // 2, len(rows) - 1):
        change = direct.change(SITES[sae], rows[f])
        for sign in (1, -1):
            order = np.lexsort((np.arange(len(change)), -sign * change))[:K]
            tokens, logits = zip(*told[f, sign], strict=True)
            assert list(tokens) == order.tolist()
            np.testing.assert_allclose(logits, change[order], rtol=2e-6)


LINEAR = {"attn_z": "o_proj", "mlp_hidden": "down_proj"}


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_s_ways_norm_and_unembedding_are_its_modules_own(
    models: Callable[[str], Path], name: str
) -> None:
    path = models(name)
    source = locate(str(path))
    layer = families.LAYERS - 1
    kinds = [
        kind
        for kind in ("attn_z", "mlp_hidden", "mlp_out", "attn_out", "resid_post")
        if families.path(name, layer, kind)
    ]
    sites = {kind: Site(layer, kind) for kind in kinds} | {"mlp_in": Site(layer, "mlp_in")}
    readout = Readout(source, list(sites.values()))
    causal = tiny.load_causal(path).double()
    torch.manual_seed(0)
    d = families.HIDDEN

    # The head: two residuals of equal mean and size differ by what the readout says.
    bare = causal.base_model if name != "gemma3" else causal.model.language_model
    norm = next(m for key, m in bare.named_children() if key in ("norm", "final_layer_norm", "ln_f"))
    x = torch.randn(1, d, dtype=torch.float64)
    centred = isinstance(norm, torch.nn.LayerNorm)
    middle = x - x.mean() if centred else x
    size = (middle.square().mean() + getattr(norm, "eps", getattr(norm, "variance_epsilon", 0))).sqrt()
    with torch.inference_mode():
        logits = causal.get_output_embeddings()(norm(x))
        if centred:
            logits = logits - causal.get_output_embeddings()(norm.bias[None])
    mine = readout.readers(x) @ readout.unembedding.double().T / size
    torch.testing.assert_close(mine, logits, rtol=1e-5, atol=1e-5)

    # The ways: what a module gives for a difference at its input, then the gain of the norm behind it.
    for kind in kinds:
        way, v = readout.way(sites[kind]), torch.randn(3, families.width(name, kind), dtype=torch.float64)
        if kind not in LINEAR:
            assert torch.equal(way(v), v), kind
            continue
        where = families.path(name, layer, kind)
        assert where is not None
        module = causal.get_submodule(where.removesuffix(".input"))
        with torch.inference_mode():
            given = module(v) - module(torch.zeros_like(v))
            if name.startswith(("gemma2", "gemma3")):
                after = "post_attention_layernorm" if kind == "attn_z" else "post_feedforward_layernorm"
                weight = next(
                    w for key, w in causal.named_parameters() if key.endswith(f"{layer}.{after}.weight")
                )
                given = given * (1 + weight)
        torch.testing.assert_close(way(v), given, rtol=1e-5, atol=1e-6)
    with pytest.raises(Unmapped, match="no linear map"):
        readout.way(sites["mlp_in"])


def test_one_head_s_way_is_its_rows_and_a_path_before_a_post_norm_has_the_gain(tiny_model: Path) -> None:
    source = locate(str(tiny_model))
    sites = [
        Site(1, "attn_z"),
        Site(1, "attn_z", 2),
        Site(2, "mlp.output"),
        Site(2, "self_attn.output"),
        Site(0, "embed_unscaled"),
    ]
    readout = Readout(source, sites)
    whole, head, mlp, attention, embedding = (readout.way(site) for site in sites)
    v = torch.randn(4, tiny.HEAD_DIM, dtype=torch.float64)
    padded = torch.zeros(4, tiny.HEADS * tiny.HEAD_DIM, dtype=torch.float64)
    padded[:, 2 * tiny.HEAD_DIM : 3 * tiny.HEAD_DIM] = v
    torch.testing.assert_close(head(v), whole(padded))
    layer = tiny.load_causal(tiny_model).model.layers[2]
    ones = torch.ones(1, tiny.HIDDEN)
    for way, norm in ((mlp, layer.post_feedforward_layernorm), (attention, layer.post_attention_layernorm)):
        torch.testing.assert_close(way(ones)[0].float(), 1 + norm.weight.detach())
    assert embedding.scale == pytest.approx(tiny.HIDDEN**0.5)


def test_a_decoder_is_in_its_site_s_units_and_its_norm_as_published() -> None:
    sae = SaeWeights(
        "relu", torch.zeros(3, 2), torch.zeros(2), torch.tensor([[3.0, 0, 4], [0, 0, 0]]), torch.zeros(3),
        input=Input(scale=2.0),
    )  # fmt: skip
    assert decoder.decoder(sae).tolist() == [[1.5, 0, 2], [0, 0, 0]]
    assert decoder.norms(sae).tolist() == [5, 0]
    transcoder = SaeWeights(**{**sae.__dict__, "restore": False})
    assert decoder.decoder(transcoder).tolist() == [[3, 0, 4], [0, 0, 0]]
    with pytest.raises(Unmapped):
        decoder.decoder(SaeWeights("relu", torch.zeros(3, 2), torch.zeros(2)))


# --- nearest features


def brute(
    tiny_suites: Path, tiny_model: Path, compare: str
) -> dict[tuple[str, int], list[tuple[str, int, float]]]:
    """Every feature's neighbours from all pairs, float64: K of the own SAE and K of others, highest first."""
    model = tiny.load_causal(tiny_model).model
    raw, mapped = {}, {}
    for sae, (layer, kind) in SITES.items():
        rows = tiny.load_sae(tiny_suites, sae)["W_dec"].astype(np.float64)
        raw[sae] = unit(rows)
        if kind == "attn_z":
            block = model.layers[layer]
            rows = rows @ block.self_attn.o_proj.weight.detach().double().numpy().T
            rows = rows * (1 + block.post_attention_layernorm.weight.detach().double().numpy())
        mapped[sae] = unit(rows)
    found = {}
    for sae in SITES:
        for f in range(len(raw[sae])):
            if not raw[sae][f].any():
                continue
            own, others = [], []
            for other in SITES:
                same = SITES[other] == SITES[sae]
                if other != sae and (compare == "own" or (compare == "site" and not same)):
                    continue
                rows, v = (raw[other], raw[sae][f]) if same else (mapped[other], mapped[sae][f])
                for g in range(len(rows)):
                    if rows[g].any() and (other, g) != (sae, f):
                        (own if other == sae else others).append((-float(rows[g] @ v), other, g))
            both = sorted([*sorted(own)[:K], *sorted(others)[:K]])
            found[sae, f] = [(other, g, -minus) for minus, other, g in both]
    return found


def unit(rows: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1)


@pytest.mark.parametrize("compare", ["all", "site", "own"])
def test_neighbours_are_those_of_all_pairs(
    annotated: Path, tmp_path: Path, tiny_index: Path, tiny_suites: Path, tiny_model: Path, compare: str
) -> None:
    index = annotated
    if compare != "all":
        index = tmp_path / "index"
        shutil.copytree(tiny_index, index)
        assert run("annotate", str(index), "--only", "neighbours", "--compare", compare).exit_code == 0
        assert asked(index, "SELECT count(*) FROM feature_tokens") == [(0,)]
    wanted = brute(tiny_suites, tiny_model, compare)
    found: dict[tuple[str, int], list[tuple[str, int, float]]] = {}
    for sae, f, rank, other, g, cosine in asked(
        index, "SELECT * FROM feature_neighbours ORDER BY sae, feature, rank"
    ):
        assert rank == len(found.setdefault((sae, f), [])) + 1
        found[sae, f].append((other, g, cosine))
    assert set(found) == set(wanted)
    assert (RES, tiny.ALWAYS) not in found  # its row is zero
    for key, near in wanted.items():
        assert [each[:2] for each in found[key]] == [each[:2] for each in near], key
        np.testing.assert_allclose([each[2] for each in found[key]], [each[2] for each in near], atol=1e-6)


def test_decoder_norms_are_those_of_the_published_rows(annotated: Path, tiny_suites: Path) -> None:
    for sae in SITES:
        norms = np.linalg.norm(tiny.load_sae(tiny_suites, sae)["W_dec"].astype(np.float64), axis=1)
        found = asked(annotated, f"SELECT norm FROM feature_decoders WHERE sae = '{sae}' ORDER BY feature")
        np.testing.assert_allclose([norm for (norm,) in found], norms, rtol=1e-6)


@pytest.mark.parametrize("own", [None, 3])
def test_ties_go_to_the_lower_column_whatever_the_blocks(
    monkeypatch: pytest.MonkeyPatch, own: int | None
) -> None:
    rng = np.random.default_rng(5)
    base = rng.integers(-2, 3, (9, 6)).astype(np.float32)
    columns = np.concatenate([base[rng.integers(0, 9, 150)], rng.normal(size=(50, 6)).astype(np.float32)])
    rows = columns[3:40] if own is not None else rng.normal(size=(37, 6)).astype(np.float32)
    exact = rows.astype(np.float64) @ columns.astype(np.float64).T
    if own is not None:
        exact[np.arange(37), np.arange(37) + own] = -np.inf
    answers = []
    for blocks in ((7, 13), (50, 1000)):
        monkeypatch.setattr(decoder, "_BLOCKS", {"cpu": blocks})
        split = Columns([columns[:61], columns[61:62], columns[62:]])
        signs = (1,) if own is not None else (1, -1)
        answers.append(highest(rows, split, 12, signs=signs, own=own))
        for sign, found in zip(signs, answers[-1], strict=True):
            for i in range(37):
                # Sums of small numbers' products are exact to more than nine digits: rounded, equal ones tie.
                best = sorted((-round(sign * exact[i, j], 9), j) for j in range(200))[:12]
                assert found.columns[i].tolist() == [j for _, j in best]
                np.testing.assert_allclose(-found.values[i], [value for value, _ in best], atol=1e-8)
    few = highest(rows[:2], Columns([columns[:3]]), 12)[0]
    assert (few.columns[:, 3:] == -1).all()
    assert sorted(few.columns[0, :3].tolist()) == [0, 1, 2]


# --- records, resumption, collection


def test_nothing_else_of_the_index_changes_and_a_second_time_is_a_no_op(
    annotated: Path, tiny_index: Path
) -> None:
    assert tiny.differences(tiny.views(annotated), tiny.views(tiny_index)) == []
    before = records.newest(Store(str(annotated)))
    done = run("annotate", str(annotated))
    assert (done.exit_code, done.stdout) == (0, "")
    assert "annotated so already" in done.stderr
    assert records.newest(Store(str(annotated))) == before
    assert audit(Store(str(annotated))).faults == []
    for view in ("feature_tokens", "feature_neighbours", "feature_decoders", "explanations"):
        assert asked(tiny_index, f"SELECT * FROM {view}") == []


def test_other_options_make_an_sae_anew_and_gc_takes_what_they_replaced(fresh: Path) -> None:
    store = Store(str(fresh))
    for sae in (MLP, ATT):
        assert run("annotate", str(fresh), "--sae", sae, "--only", "tokens").exit_code == 0
    both = "SELECT sae, count(*) FROM feature_tokens GROUP BY sae ORDER BY sae"
    assert asked(fresh, both) == [(ATT, 740), (MLP, 740)]
    together = Outcome()
    writer = annotating.Writer(store, together)  # one file of two SAEs, of which one is replaced below
    for sae in (RES, WIDE):
        table = annotating._table("feature_decoders", sae, np.arange(3), norm=np.ones(3))
        writer.write("feature_decoders", (sae, ""), table)
        writer.done("feature_decoders", sae, records.Done("by hand"))
    writer.publish()
    annotate(store, Options(saes=(MLP, RES), tokens=2, neighbours=None), lambda words: None, Outcome())
    assert asked(fresh, both) == [(ATT, 740), (MLP, 148), (RES, 144)]
    norms = "SELECT sae, count(*) FROM feature_decoders GROUP BY sae ORDER BY sae"
    held = [(ATT, 37), (MLP, 37), (WIDE, 3), (RES, 37)]
    assert asked(fresh, norms) == sorted(held)
    assert audit(store).faults == []
    # A default replaces nothing.
    assert "annotated so already" in run("annotate", str(fresh), "--sae", MLP, "--only", "tokens").stderr
    named = records.newest(store).paths
    replaced = {
        f"data/feature_tokens/{file.name}" for file in (fresh / "data/feature_tokens").iterdir()
    } - named
    assert len(replaced) == 1
    assert gc.collect(store).removed == 0  # somebody may still be reading
    assert gc.collect(store, 0, 0).removed == 1 + 3  # and the records before the newest
    assert not any((fresh / path).exists() for path in replaced)
    assert asked(fresh, both) == [(ATT, 740), (MLP, 148), (RES, 144)]
    assert asked(fresh, norms) == sorted(held)
    assert audit(store).faults == []


def test_of_two_at_once_both_are_in_the_record(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, real = Store(str(fresh)), Store.put_if_absent
    first = [True]

    def slow(self: Store, name: str, data: bytes) -> bool:
        if first[0]:  # another annotate publishes in between
            first[0] = False
            records.publish(Store(str(fresh)), [], {"feature_decoders": {ATT: records.Done("x", "none")}})
        return real(self, name, data)

    monkeypatch.setattr(Store, "put_if_absent", slow)
    annotate(store, Options(saes=(MLP,), tokens=None, neighbours=None), lambda words: None, Outcome())
    found = records.newest(store)
    assert found.number == 1
    assert set(found.done["feature_decoders"]) == {ATT, MLP}


def test_whoever_is_stopped_goes_on_after_the_last_published(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annotating, "PUBLISH", 0.0)
    options = Options(tokens=2, neighbours=None)
    stop_at = sorted(SITES)[3]

    def told(words: str) -> None:
        if stop_at in words:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        annotate(Store(str(fresh)), options, told, Outcome())
    assert {sae for (sae,) in asked(fresh, "SELECT DISTINCT sae FROM feature_tokens")} == set(
        sorted(SITES)[:3]
    )
    rest = Outcome()
    annotate(Store(str(fresh)), options, lambda words: None, rest)
    assert set(rest.rows) == set(sorted(SITES)[3:])
    assert {sae for (sae,) in asked(fresh, "SELECT DISTINCT sae FROM feature_tokens")} == set(SITES)


@pytest.mark.parametrize("damage", ["byte", "missing", "record", "stranger"])
def test_verify_finds_a_damaged_annotation(annotated: Path, tmp_path: Path, damage: str) -> None:
    index = tmp_path / "index"
    shutil.copytree(annotated, index)
    record = index / "annotations" / "000000000.json"
    file = next((index / "data" / "feature_neighbours").iterdir())
    if damage == "byte":
        data = bytearray(file.read_bytes())
        data[100] ^= 1
        file.write_bytes(data)
    elif damage == "missing":
        file.unlink()
    elif damage == "record":
        record.write_text(record.read_text()[:200])
    else:
        record.write_text(record.read_text().replace(MLP, "nobody"))
    found = audit(Store(str(index)), quick=True)
    named = {"byte": file.name, "missing": file.name, "record": "annotations", "stranger": "nobody"}[damage]
    assert any(named in f"{fault.file} {fault.detail}" for fault in found.faults), found.faults


def test_a_record_leads_to_no_file_outside_the_index(annotated: Path, tmp_path: Path) -> None:
    shutil.copytree(annotated, tmp_path / "index")
    record = tmp_path / "index" / "annotations" / "000000000.json"
    data = json.loads(record.read_text())
    data["files"][0]["path"] = "data/../../secret.parquet"
    record.write_text(json.dumps(data))
    with pytest.raises(DataError, match="not written by corpuscope"):
        queries.connect(str(tmp_path / "index"))


# --- where the weights are


def moved(index: Path, old: str, new: str) -> None:
    file = index / "index.json"
    file.write_text(file.read_text().replace(old, new))


def test_weights_that_moved_are_found_again_and_others_are_refused(
    fresh: Path, tmp_path: Path, tiny_suites: Path, tiny_model: Path
) -> None:
    moved(fresh, str(tiny_suites), "/nowhere/suites")
    said = refusal("annotate", str(fresh), "--sae", MLP)
    assert "7 of 7 SAEs" in said  # the others are compared with it
    assert "--saes URI" in said
    other = tmp_path / "other"
    shutil.copytree(tiny_suites, other)
    again = other / f"{MLP}/params.npz"
    tensors = tiny.load_sae(other, MLP)
    tensors["W_dec"][3, 4] += 1
    np.savez(again, **tensors)
    said = refusal("annotate", str(fresh), "--sae", MLP, "--compare", "own", "--saes", str(other))
    assert "is not what was scanned" in said
    assert asked(fresh, "SELECT count(*) FROM feature_tokens") == [(0,)]
    for place in (tiny_suites, tiny_suites / "tiny-mlp"):
        done = run(
            "annotate", str(fresh), "--sae", MLP, "--compare", "own", "--saes", str(place), "--tokens", "3"
        )
        assert done.exit_code == 0, done.output
    moved(fresh, str(tiny_model), "/nowhere/model")
    assert "--model URI" in refusal("annotate", str(fresh), "--sae", ATT, "--saes", str(tiny_suites))
    wrong = tmp_path / "model"
    shutil.copytree(tiny_model, wrong)
    (wrong / "extra.json").write_text("{}")
    where = ["--saes", str(tiny_suites), "--sae", ATT, "--compare", "own"]
    assert "not the model that was scanned" in refusal("annotate", str(fresh), *where, "--model", str(wrong))
    assert run("annotate", str(fresh), *where, "--model", str(tiny_model)).exit_code == 0


def test_a_site_that_leads_nowhere_is_skipped_with_the_reason(
    tmp_path: Path,
    write_spec: Callable[..., Path],
    scan_inline: Callable[..., Any],
    tiny_suites: Path,
    tiny_corpus: Path,
) -> None:
    """The spec said its site, which the files do not: it is found again all the same."""
    entry = {
        "uri": str(tiny_suites / "tiny-res"),
        "name": "odd",
        "select": "layer_1/width_37/*",
        "site": "mlp_in",
    }
    spec = write_spec(tmp_path, saes=[entry], corpus={"uri": f"{tiny_corpus}/part_05.jsonl"})
    scan_inline(spec)
    index = tmp_path / "index"
    done = run("annotate", str(index))
    assert done.exit_code == 0, done.output
    assert "no feature_tokens: it writes to pre_feedforward_layernorm.output" in done.stderr
    assert asked(index, "SELECT count(*) FROM feature_tokens") == [(0,)]
    assert asked(index, "SELECT count(*), count(DISTINCT feature) FROM feature_neighbours") == [(360, 36)]
    assert "annotated so already" in run("annotate", str(index)).stderr


def test_an_index_on_another_store_is_annotated_in_place(tiny_index: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.put(str(tiny_index), "/annotate-index", recursive=True)
    try:
        uri = "memory://annotate-index"
        assert run("annotate", uri, "--sae", MLP).exit_code == 0
        assert asked(uri, "SELECT count(*) FROM feature_neighbours") == [(37 * 2 * K,)]
    finally:
        fs.rm("/annotate-index", recursive=True)


# --- explanations


def rows_of(index: Path) -> list[tuple[Any, ...]]:
    return asked(index, "SELECT * FROM explanations ORDER BY ALL")


def add(index: Path, *arguments: str) -> Any:
    done = run("annotate", str(index), "--only", "explanations", *arguments)
    assert done.exit_code == 0, done.output
    return done


def jsonl(file: Path, *rows: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


def test_explanations_of_a_table_replace_their_own_source_s_only(fresh: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text(
        "feature,description,sae,score,method\n"
        f'3,"cats, on mats",{MLP},0.5,hand\n1,dogs,layer_2/width_37/average_l0_10,,\n1,also dogs,{MLP},,\n'
        f"0,,{MLP},,\n2,foxes,{ATT},0.25,hand\n"
    )
    add(fresh, "--explanations", str(file))
    source = str(file)
    mine = [
        (ATT, 2, "foxes", "hand", None, 0.25, source),
        (MLP, 1, "also dogs", None, None, None, source),
        (MLP, 1, "dogs", None, None, None, source),
        (MLP, 3, "cats, on mats", "hand", None, 0.5, source),
    ]
    assert rows_of(fresh) == mine
    other = jsonl(
        tmp_path / "other.jsonl.gz",
        {"feature": 3, "description": "mats\ud800", "source": "Ann", "model": "m"},
    )
    add(fresh, "--explanations", str(other), "--sae", MLP)
    theirs = (MLP, 3, "mats\ufffd", None, "m", None, "Ann")
    assert rows_of(fresh) == sorted([*mine, theirs], key=lambda row: (*row[:3],))
    file.write_text(f"feature,description,sae\n7,birds,{MLP}\n")
    for _ in range(2):  # the same again changes nothing
        add(fresh, "--explanations", str(file))
        assert rows_of(fresh) == sorted([mine[0], theirs, (MLP, 7, "birds", None, None, None, source)])
    store = Store(str(fresh))
    assert audit(store).faults == []
    gc.collect(store, 0, 0)
    assert rows_of(fresh) == sorted([mine[0], theirs, (MLP, 7, "birds", None, None, None, source)])
    assert audit(store).faults == []


def test_neuronpedia_s_export(fresh: Path, tmp_path: Path) -> None:
    data = json.loads((fresh / "index.json").read_text())
    for sae in data["saes"]:
        if sae["id"] == MLP:
            sae["neuronpedia"] = "tiny/2-mlp-37"
    (fresh / "index.json").write_text(json.dumps(data))
    base = {
        "modelId": "tiny",
        "layer": "2-mlp-37",
        "typeName": "oai",
        "explanationModelName": "gpt",
        "embedding": [1],
    }
    folder = tmp_path / "v1" / "tiny" / "2-mlp-37"
    jsonl(
        folder / "explanations" / "batch-0.jsonl.gz",
        base | {"index": "5", "description": "five", "scores": [{"value": 0.5}, {"value": 1}]},
    )
    jsonl(
        folder / "explanations" / "batch-1.jsonl.gz",
        base | {"index": "36", "description": "last"},
        base | {"index": "4", "description": ""},
    )
    jsonl(folder / "features" / "batch-0.jsonl.gz", {"index": "900"})  # is none of an explanation's
    add(fresh, "--explanations", str(folder))
    source = "neuronpedia tiny/2-mlp-37"
    wanted = [(MLP, 5, "five", "oai", "gpt", 0.75, source), (MLP, 36, "last", "oai", "gpt", None, source)]
    assert rows_of(fresh) == wanted
    add(fresh, "--explanations", str(folder / "explanations" / "batch-*.jsonl.gz"), "--source", "again")
    assert len(rows_of(fresh)) == 4
    # A name that the index does not know needs --sae, which can stand for one name only.
    strange = jsonl(tmp_path / "s.jsonl", base | {"layer": "9-x", "index": 1, "description": "a"})
    assert "s.jsonl row 1" in refusal("annotate", str(fresh), "--explanations", str(strange))
    add(fresh, "--explanations", str(strange), "--sae", ATT)
    assert (ATT, 1, "a", "oai", "gpt", None, "neuronpedia tiny/9-x") in rows_of(fresh)
    jsonl(strange, *(base | {"layer": layer, "index": 1, "description": "a"} for layer in ("9-x", "9-y")))
    assert "cannot both be" in refusal("annotate", str(fresh), "--explanations", str(strange), "--sae", ATT)
    mine = jsonl(tmp_path / "m.jsonl", base | {"index": 1, "description": "a"})
    assert "not of tiny-att" in refusal("annotate", str(fresh), "--explanations", str(mine), "--sae", ATT)


def test_delphi_s_output(fresh: Path, tmp_path: Path) -> None:
    run_ = tmp_path / "results" / "run"
    for name in ("explanations", "scores/fuzz", "scores/detection", "latents"):
        (run_ / name).mkdir(parents=True)
    (run_ / "run_config.json").write_text(json.dumps({"explainer_model": "llama", "x": [1]}))
    hook = "layers.2.post_feedforward_layernorm"
    (run_ / "explanations" / f"{hook}_latent5.txt").write_text(json.dumps("fifth"))
    (run_ / "explanations" / f"{hook}_latent12.txt").write_text(json.dumps("twelfth"))

    def judged(*pairs: tuple[bool, bool | None]) -> str:
        return json.dumps([{"activating": a, "correct": c, "str_tokens": ["x"]} for a, c in pairs])

    # 3 of 4 and 1 of 2; all right; one without an answer counts nowhere.
    (run_ / "scores/fuzz" / f"{hook}_latent5.txt").write_text(
        judged(
            (True, True),
            (True, True),
            (True, True),
            (True, False),
            (False, True),
            (False, False),
            (True, None),
        )
    )
    (run_ / "scores/detection" / f"{hook}_latent5.txt").write_text(judged((True, True), (False, True)))
    said = refusal("annotate", str(fresh), "--explanations", str(run_))
    assert "_latent5.txt" in said  # two SAEs are at this site
    assert "--sae" in said
    add(fresh, "--explanations", str(run_), "--sae", MLP)
    source = str(run_)
    assert rows_of(fresh) == [
        (MLP, 5, "fifth", "delphi", "llama", pytest.approx((0.625 + 1) / 2), source),
        (MLP, 12, "twelfth", "delphi", "llama", None, source),
    ]
    for file in list((run_ / "explanations").iterdir()):
        file.rename(file.with_name(file.name.replace("layers.2.post_feedforward_layernorm", "layers.3")))
    add(fresh, "--explanations", str(run_ / "explanations"))  # one SAE alone is at that module's output
    assert [row[0] for row in rows_of(fresh)].count("tiny-res/layer_3/width_130/average_l0_6") == 2


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "feature,description,sae\n37,x,MLP\n", "a.csv row 2: feature 37: MLP has features 0 to 36"),
        ("a.csv", "feature,description,sae\n1,x,MLP\n-1,x,MLP\n", "a.csv row 3: `feature` is '-1'"),
        ("a.csv", "feature,description,sae\n1,x,nobody\n", "a.csv row 2: sae: 'nobody' names no SAE"),
        ("a.csv", "feature,description,sae\n1,x,3\n", "a.csv row 2: sae: '3' is the ending of 2 ids"),
        ("a.csv", "feature,description\n1,x\n", "`--sae SAE` does"),
        ("a.csv", "feature,text\n1,x\n", "no `description`"),
        ("a.csv", "feature,description,sae\n1,x\n", "another number of cells"),
        ("a.csv", "feature,description,sae\n1,x,MLP,more\n", "another number of cells"),
        ("a.csv", 'feature,description,sae\n1,"x,MLP\n', "cannot be read"),
        ("a.csv", f"feature,description,sae\n1,{'x' * 70000},MLP\n", "more than 65,536"),
        ("a.csv", f"feature,description,sae\n1,{'x' * 140000},MLP\n", "cannot be read"),
        ("a.csv", "feature,description,sae,score\n1,x,MLP,good\n", "`score` is 'good'"),
        ("a.csv", "feature,description,sae\n", "there are none"),
        ("a.jsonl", '{"feature": 1.5, "description": "x", "sae": "MLP"}\n', "`feature` is '1.5'"),
        ("a.jsonl", '{"feature": true, "description": "x", "sae": "MLP"}\n', "`feature` is 'True'"),
        ("a.jsonl", '{"feature": 1, "description": ["x"], "sae": "MLP"}\n', "`description` is"),
        ("a.jsonl", '{"feature": 1, "description": "x", "sae": 5}\n', "`sae` is '5'"),
        ("a.jsonl", "[" * 100_000 + "\n", "not a JSON object"),
        ("a.jsonl", "3\n", "not a JSON object"),
        ("a.jsonl.gz", "not gzip at all", "cannot be read"),
        ("a.txt", "x", "nothing there is"),
        ("layers.1_latent99999999999999.txt", '"x"', "whole number"),
        ("layers.2_latent3.txt", "{}", "not one JSON text"),
        ("layers.2_latent3.txt", f'"{"x" * (1 << 20)}"', "more than 1,048,576 bytes"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_row_is_refused_by_file_and_row(
    fresh: Path, tmp_path: Path, name: str, text: str, says: str
) -> None:
    file = tmp_path / name
    file.write_text(text.replace("MLP", MLP))
    extra = ["--sae", MLP] if name.startswith("layers.1") else []
    said = refusal("annotate", str(fresh), "--explanations", str(file), "--only", "explanations", *extra)
    assert says.replace("MLP", MLP) in said
    assert "annotations" not in {path.name for path in fresh.iterdir()}  # nothing was added


def test_many_explanations_come_in_batches_and_stay_in_order(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import explanations as reader

    monkeypatch.setattr(reader, "_BATCH", 7)
    rows = [{"feature": (i * 17) % 37, "description": f"{i}", "sae": [MLP, ATT][i % 2]} for i in range(60)]
    add(fresh, "--explanations", str(jsonl(tmp_path / "many.jsonl", *rows)))
    files = records.newest(Store(str(fresh))).of("explanations")
    table = pq.read_table(fresh / files[0].file.path)
    found = list(zip(*(table[name].to_pylist() for name in ("sae", "feature", "description")), strict=True))
    wanted = [(row["sae"], row["feature"], row["description"]) for row in rows]
    assert found == sorted(wanted, key=lambda row: row[:2])  # a stable sort


def test_explanations_need_neither_model_nor_saes_and_say_what_is_missing(
    fresh: Path, tmp_path: Path, tiny_suites: Path
) -> None:
    moved(fresh, str(tiny_suites), "/nowhere/suites")
    file = jsonl(tmp_path / "e.jsonl", {"feature": 1, "description": "x", "sae": MLP})
    done = run("annotate", str(fresh), "--explanations", str(file))
    assert done.exit_code == 0
    assert "warning" in done.stderr
    assert "--saes URI" in done.stderr
    assert len(rows_of(fresh)) == 1
    assert "leaves them out" in refusal(
        "annotate", str(fresh), "--explanations", str(file), "--only", "tokens"
    )
    assert "is missing" in refusal("annotate", str(fresh), "--only", "explanations")
    assert "one index at a time" in refusal("annotate", f"{fresh},{fresh}")


# --- what people see


def test_feature_shows_what_was_added(annotated: Path, tmp_path: Path, tiny_index: Path) -> None:
    shutil.copytree(annotated, tmp_path / "index")
    index = tmp_path / "index"
    file = jsonl(
        tmp_path / "e.jsonl",
        {"feature": 2, "description": "bad \x1b[31m news", "sae": MLP, "score": 0.9, "model": "gpt"},
        {"feature": 2, "description": "worse", "sae": MLP, "score": 0.1},
    )
    add(index, "--explanations", str(file), "--source", "me")
    with queries.connect(str(index)) as con:
        found = feature(con, MLP, 2, 1)
        words = dict(con.execute("SELECT token, bytes FROM vocabulary").fetchall())
    assert [each["description"] for each in found["explanations"]] == ["bad \x1b[31m news", "worse"]
    for name, sign in (("top_tokens", 1), ("bottom_tokens", -1)):
        told = asked(
            index,
            f"SELECT token, logit FROM feature_tokens WHERE sae = '{MLP}' AND feature = 2 "
            f"AND sign = {sign} ORDER BY rank",
        )
        assert [(each["token"], each["logit"]) for each in found[name]] == told
        assert all(each["text"] == words[each["token"]].decode(errors="replace") for each in found[name])
    assert len(found["neighbours"]) == 2 * K
    page = run("feature", str(index), MLP, "2", "-k", "1").stdout
    assert "news  (gpt, me, score 0.9)" in page
    assert "\x1b" not in page
    for word in ("promotes", "suppresses", "alike", "elsewhere"):
        assert word in page
    bare = run("feature", str(tiny_index), MLP, "2", "-k", "1").stdout
    assert "promotes" not in bare
    assert "alike" not in bare
    [record] = json.loads(run("feature", str(tiny_index), MLP, "2", "--format", "json").stdout)
    assert (record["neighbours"], record["top_tokens"], record["explanations"]) == ([], [], [])
