"""Exports read back with plain Python, against what the raw rows say."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from published.saelens import put, tensors
from safetensors.numpy import load_file

import queries
from jobs import cli
from queries import delphi, export, neuronpedia
from queries.sparse import csr, documents_csr
from sae_runtime.errors import InputError

RES = "tiny-res/layer_1/width_37/average_l0_2"
WIDE = "tiny-res/layer_1/width_130/average_l0_13"
SAMPLED = "tiny-mlp/layer_2/width_64/average_l0_3"
DOCUMENTS = "tiny-att/layer_1/width_37/average_l0_1"
NONE = "tiny-att/layer_3/width_50/average_l0_5"
SIGNED = "signed/mixed"
CTX = 24


class Raw:
    """The rows of an index that keeps them all, and what follows from them."""

    def __init__(self, index: Path) -> None:
        self.con = queries.connect(str(index))
        fetch = "SELECT context, document, start, first, tokens, counted FROM contexts ORDER BY context"
        self.contexts = {row[0]: row[1:] for row in self.con.sql(fetch).fetchall()}
        self.documents = [d for (d,) in self.con.sql("SELECT document FROM documents ORDER BY 1").fetchall()]
        self.bytes = dict(self.con.sql("SELECT token, bytes FROM vocabulary").fetchall())

    @cached_property
    def own(self) -> dict[int, list[int]]:
        """Each document's own tokens."""
        found: dict[int, list[int]] = {document: [] for document in self.documents}
        for document, start, first, tokens, _ in self.contexts.values():
            assert start == len(found[document])
            found[document] += tokens[first:]
        return found

    def rows(self, sae: str) -> list[tuple[int, int, int, float]]:
        """(feature, context, position, activation)"""
        statement = "SELECT feature, context, position, activation FROM activations WHERE sae = ?"
        return self.con.execute(statement, [sae]).fetchall()

    def counted(self) -> int:
        return sum(sum(counted) for *_, counted in self.contexts.values())


@pytest.fixture(scope="module")
def raw(tiny_index: Path) -> Raw:
    return Raw(tiny_index)


@pytest.fixture(scope="module")
def mixed(
    tmp_path_factory: pytest.TempPathFactory,
    write_spec: Callable[..., Path],
    scan_inline: Callable[..., Any],
    tiny_suites: Path,
) -> Path:
    """The same scan as `tiny_index`, whose rows it has as far as its `keep` goes."""
    saes = [
        {"uri": str(tiny_suites / "tiny-res"), "select": "layer_1/*/*"},
        {"uri": str(tiny_suites / "tiny-mlp"), "keep": {"sample": 0.5}},
        {"uri": str(tiny_suites / "tiny-att"), "keep": "documents", "select": "layer_1/*/*"},
        {"uri": str(tiny_suites / "tiny-att"), "keep": "none", "select": "layer_3/*/*"},
    ]
    spec = write_spec(tmp_path_factory.mktemp("mixed"), saes=saes)
    assert not scan_inline(spec).failed
    return spec.parent / "index"


@pytest.fixture(scope="module")
def overlapping(
    tmp_path_factory: pytest.TempPathFactory,
    write_spec: Callable[..., Path],
    scan_inline: Callable[..., Any],
    tiny_suites: Path,
) -> Path:
    """A few documents in short contexts that overlap, and a signed SAE."""
    folder = tmp_path_factory.mktemp("overlapping")
    d = tiny.HIDDEN
    config = {
        "sae_lens_version": "6.0.0", "architecture": "abstopk", "d_in": d, "d_sae": 20, "k": 4,
        "dtype": "float32", "apply_b_dec_to_input": False, "normalize_activations": "none",
        "metadata": {"hook_name": "blocks.1.hook_resid_post"},
    }  # fmt: skip
    put(folder / "signed" / "mixed", config, tensors(np.random.default_rng(5), "abstopk", d, 20, d))
    spec = write_spec(
        folder,
        corpus={"limit": 9},
        saes=[
            {"uri": str(tiny_suites / "tiny-res"), "select": "*/width_37/*"},
            {"uri": str(folder / "signed")},
        ],
        context={"length": 40, "overlap": 8},
    )
    assert not scan_inline(spec).failed
    return folder / "index"


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """`run("export", …)` gives the exit code and stderr; nothing may be on stdout."""

    def command(*args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["corpuscope", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert captured.out == ""
        return int(str(ended.value.code)), captured.err

    return command


def lines(file: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line) for line in text.splitlines()]


def batches(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("batch-*.jsonl.gz"), key=lambda file: int(re.findall(r"\d+", file.name)[0]))
    return [line for file in files for line in lines(file)]


# --- neuronpedia


@pytest.fixture(scope="module")
def dashboards(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SAE -> the folder of its source."""
    folder = tmp_path_factory.mktemp("neuronpedia")
    con = queries.connect(str(mixed))
    into = export.Folder(str(folder), False, [str(mixed)])
    settings = neuronpedia.Settings(batch=30)
    written = neuronpedia.write(con, export.saes(con), into, settings, lambda words: None)
    return {one.sae: folder / one.folder for one in written}


@pytest.mark.parametrize("sae", [RES, WIDE, SAMPLED, DOCUMENTS, NONE])
def test_features_have_their_densities_and_histograms(
    sae: str, dashboards: dict[str, Path], raw: Raw
) -> None:
    values = defaultdict(list)
    for feature, _, _, value in raw.rows(sae):
        values[feature].append(abs(value))
    found = batches(dashboards[sae] / "features")
    assert [line["index"] for line in found] == [str(i) for i in range(len(found))]
    assert len(found) == int(re.search(r"width_(\d+)", sae)[1])
    for line in found:
        mine = np.array(values[int(line["index"])])
        assert (line["n_nonzero"], line["n_tokens"]) == (len(mine), raw.counted())
        assert line["frac_nonzero"] == len(mine) / raw.counted()
        assert line["maxActApprox"] == mine.max(initial=0.0)
        assert line["pos_str"] == line["neg_values"] == []
        heights, middles = line["freq_hist_data_bar_heights"], line["freq_hist_data_bar_values"]
        assert sum(heights) == len(mine)
        if not len(mine):
            continue
        # From the highest edge downwards, middles give the edges.
        octave = math.floor(8 * (math.log2(mine.max()) + 1e-12))
        top = 2.0 ** ((octave + 1) / 8) if mine.max() < 2**14 else mine.max()
        if mine.max() < 2**-10:
            top = 2.0**-10
        for middle, height in zip(middles[::-1], heights[::-1], strict=True):
            edge = 2 * middle - top
            inside = (mine >= edge - 1e-9 * top) & (mine < top - 1e-9 * top)
            if top == mine.max():
                inside |= mine == top
            assert inside.sum() == height, (line["index"], edge, top)
            top = edge
        assert min(np.diff(middles), default=1.0) > 0
        assert len(heights) <= 24


@pytest.mark.parametrize("sae", [RES, WIDE, SAMPLED, DOCUMENTS, NONE])
def test_windows_are_what_the_rows_say(sae: str, dashboards: dict[str, Path], raw: Raw, mixed: Path) -> None:
    active: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
    for feature, context, position, value in raw.rows(sae):
        active[feature, context][position] = value
    con = queries.connect(str(mixed))
    columns = "feature, context, position, activation"
    top = con.execute(f"SELECT {columns} FROM top_contexts WHERE sae = ?", [sae]).fetchall()
    drawn = con.execute(
        f"SELECT {columns}, stratum_contexts FROM sampled_contexts WHERE sae = ?", [sae]
    ).fetchall()
    weights = {(feature, context): n for feature, context, _, _, n in drawn}
    places = dict(
        con.sql(
            "SELECT source || '#' || row || '@' || start, context "
            "FROM contexts JOIN documents USING (document)"
        ).fetchall()
    )
    found = batches(dashboards[sae] / "activations")
    assert len({line["id"] for line in found}) == len(found)
    assert len({frozenset(line) for line in found}) == 1  # the importer takes the columns of the first
    seen, order = set(), []
    for line in found:
        feature, context = int(line["index"]), places[line["dataIndex"]]
        key = (feature, context)
        assert key not in seen
        seen.add(key)
        tokens, at = raw.contexts[context][3], line["maxValueTokenIndex"]
        position = max(active[key], key=lambda p: (abs(active[key][p]), -p))
        start = max(position - 64, 0)
        assert at == line["qualifyingTokenIndex"] == position - start
        wanted = [active[key].get(i, 0.0) for i in range(start, min(position + 64, len(tokens)))]
        assert line["values"] == wanted
        assert (line["maxValue"], line["minValue"]) == (active[key][position], min(wanted))
        assert b"".join(map(unspelled, line["tokens"])) == b"".join(
            raw.bytes[t] for t in tokens[start : position + 64]
        )
        assert len(line["tokens"]) == len(wanted) <= 128
        if line["binMin"] == -1:
            assert line["binContains"] == -1
            assert line["stratum_contexts"] is None
        else:
            values = [abs(v) for k, vs in active.items() if k[0] == feature for v in vs.values()]
            inside = sum(line["binMin"] <= v < line["binMax"] for v in values)
            assert line["binMin"] <= abs(line["maxValue"]) < line["binMax"]
            assert line["binContains"] == inside / raw.counted()
            assert line["stratum_contexts"] == weights[key]
        order.append((feature, line["binMin"] != -1, -line["binMin"]))
    assert order == sorted(order)
    tops = {row[:2] for row in top}
    assert {key for key in seen if key in tops} == tops
    assert seen == tops | set(weights)
    assert [(int(x["index"]), places[x["dataIndex"]]) in tops for x in found] == [
        x["binMin"] == -1 for x in found
    ]


def unspelled(token: str) -> bytes:
    """A token's bytes from its text."""
    parts = re.split(r"<0x([0-9A-F]{2})>", token)
    return b"".join(bytes([int(p, 16)]) if i % 2 else p.encode() for i, p in enumerate(parts))


def test_tokens_show_parts_of_characters_as_bytes(dashboards: dict[str, Path]) -> None:
    tokens = {token for line in batches(dashboards[WIDE] / "activations") for token in line["tokens"]}
    assert any(re.fullmatch(r"(<0x[0-9A-F]{2}>)+", token) for token in tokens)
    assert not any("\ufffd" in token or "\0" in token for token in tokens)
    assert "<bos>" in tokens
    assert neuronpedia.shown("ßa".encode()[1:] + b"\0" + "日".encode()) == "<0x9F>a<0x00>日"


def test_what_neuronpedias_importer_reads(dashboards: dict[str, Path], raw: Raw) -> None:
    for folder in dashboards.values():
        assert {file.name for file in folder.iterdir() if file.is_file()} == {
            "release.jsonl", "model.jsonl", "sourceset.jsonl", "source.jsonl"
        }  # fmt: skip
        described = {
            name: lines(folder / f"{name}.jsonl") for name in ("release", "model", "sourceset", "source")
        }
        (release,), (model,), (source_set,), (source,) = described.values()
        assert model["id"] == source["modelId"] == source_set["modelId"] == folder.parent.name
        assert source["id"] == folder.name
        assert source["setName"] == source_set["name"]
        assert source_set["releaseName"] == release["name"]
        assert None not in {
            value for row in (release, model, source_set, source) for value in map(str, row.values())
        }
        assert not any(
            value is None for row in (release, model, source_set, source) for value in row.values()
        )
        assert f"{raw.counted():,} counted tokens" in source["notes"]
        assert (source["num_prompts"], source["num_tokens_in_prompt"]) == (len(raw.contexts), 96)
        for kind in ("features", "activations"):
            for file in (folder / kind).iterdir():
                number = int(re.fullmatch(r"batch-(\d+)\.jsonl\.gz", file.name)[1])
                rows = lines(file)
                assert rows
                assert {int(row["index"]) // 30 for row in rows} == {number}
                assert {(row["modelId"], row["layer"]) for row in rows} == {(folder.parent.name, folder.name)}
    assert len(set(dashboards.values())) == len(dashboards)


def sae_of(**given: Any) -> export.Sae:
    facts: dict[str, Any] = {
        "id": "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", "suite": "gemma-scope-2b-pt-res",
        "model": "google/gemma-2-2b", "site": "model.layers.20.output", "layer": 20, "width": 8,
        "keep": "tokens",
        "neuronpedia": None, "uri": "hf://google/x/y.npz", "n_tokens": 1,
    }  # fmt: skip
    return export.Sae(**facts | given)


@pytest.mark.parametrize(
    ("given", "settings", "wanted"),
    [
        (
            {"neuronpedia": "gemma-2-2b/20-gemmascope-res-16k"},
            {},
            ("gemma-2-2b", "20-gemmascope-res-16k", "gemmascope-res-16k"),
        ),
        (
            {"neuronpedia": "gemma-2-2b/20-gemmascope-res-16k"},
            {"model": "mine"},
            ("mine", "20-gemmascope-res-16k", "gemmascope-res-16k"),
        ),
        (
            {"neuronpedia": "gemma-2-2b/20-gemmascope-res-16k"},
            {"source_set": "ours"},
            ("gemma-2-2b", "20-ours__width-16k-average-l0-71", "ours"),
        ),
        (
            {},
            {},
            ("gemma-2-2b", "20-gemma-scope-2b-pt-res__width-16k-average-l0-71", "gemma-scope-2b-pt-res"),
        ),
        (
            {"model": "/data/Smol LM.gguf", "id": "gemma-scope-2b-pt-res", "layer": None},
            {},
            ("smol-lm", "e-gemma-scope-2b-pt-res", "gemma-scope-2b-pt-res"),
        ),
    ],
)
def test_names(given: dict[str, Any], settings: dict[str, Any], wanted: tuple[str, str, str]) -> None:
    found = neuronpedia.names(sae_of(**given), neuronpedia.Settings(**settings))
    assert (found.model, found.source, found.source_set) == wanted


def test_two_saes_of_one_name_are_refused(mixed: Path, tmp_path: Path) -> None:
    con = queries.connect(str(mixed))
    pair = [sae_of(id="s/a_b", suite="s"), sae_of(id="s/a.b", suite="s")]
    into = export.Folder(str(tmp_path / "out"), False, [])
    with pytest.raises(InputError, match=r"s/a_b and s/a\.b would both be"):
        neuronpedia.write(con, pair, into, neuronpedia.Settings(), lambda words: None)


def test_signed_windows_and_bins(overlapping: Path, tmp_path: Path) -> None:
    raw, con = Raw(overlapping), queries.connect(str(overlapping))
    into = export.Folder(str(tmp_path / "out"), False, [])
    written = neuronpedia.write(
        con, export.saes(con, [SIGNED]), into, neuronpedia.Settings(features=11), lambda words: None
    )
    assert (written[0].features, written[0].sae) == (11, SIGNED)
    rows = [row for row in raw.rows(SIGNED) if row[0] < 11]
    folder = tmp_path / "out" / written[0].folder
    negative = 0
    for line in batches(folder / "features"):
        mine = [value for feature, _, _, value in rows if feature == int(line["index"])]
        assert line["maxActApprox"] == max(mine, key=lambda v: (abs(v), v))
        assert sum(line["freq_hist_data_bar_heights"]) == len(mine)
        negative += line["maxActApprox"] < 0
    assert negative
    found = batches(folder / "activations")
    assert len(found) == written[0].activations
    for line in found:
        assert abs(line["maxValue"]) == max(map(abs, line["values"]))
        assert line["values"][line["maxValueTokenIndex"]] == line["maxValue"]
        assert line["minValue"] == min(line["values"])
        if line["binMin"] != -1:
            mine = [abs(row[3]) for row in rows if row[0] == int(line["index"])]
            inside = sum(line["binMin"] <= value < line["binMax"] for value in mine)
            assert line["binContains"] == inside / raw.counted()


# --- delphi


def windows(raw: Raw, documents: list[int], ctx: int) -> tuple[list[list[int]], dict[tuple[int, int], int]]:
    """The windows' tokens, and (document, offset) of each window's first token -> its row."""
    found, rows = [], {}
    for document in documents:
        own = raw.own[document]
        for start in range(0, len(own) - ctx + 1, ctx):
            rows[document, start] = len(found)
            found.append(own[start : start + ctx])
    return found, rows


def located(
    raw: Raw, sae: str, rows: dict[tuple[int, int], int], ctx: int
) -> list[tuple[int, int, int, float]]:
    """(window, position, feature, activation) in delphi's order."""
    found = []
    for feature, context, position, value in raw.rows(sae):
        document, start, first, *_ = raw.contexts[context]
        offset = start + position - first
        if (document, offset - offset % ctx) in rows:
            found.append((rows[document, offset - offset % ctx], offset % ctx, feature, value))
    return sorted(found)


def caches(folder: Path) -> list[tuple[int, int, dict[str, np.ndarray]]]:
    found = []
    for file in folder.glob("*.safetensors"):
        first, last = map(int, file.stem.split("_"))
        found.append((first, last, load_file(file)))
    return sorted(found, key=lambda part: part[0])


def check_cache(folder: Path, raw: Raw, sae: str, documents: list[int], width: int, ctx: int = CTX) -> None:
    tokens, rows = windows(raw, documents, ctx)
    wanted = located(raw, sae, rows, ctx)
    assert wanted
    parts = caches(folder)
    edges = [(first, last) for first, last, _ in parts]
    assert (edges[0][0], edges[-1][1]) == (0, width - 1)
    assert all(b[0] == a[1] + 1 for a, b in itertools.pairwise(edges))
    total = 0
    for first, last, part in parts:
        mine = [row for row in wanted if first <= row[2] <= last]
        assert np.array_equal(part["tokens"], tokens)
        locations = part["locations"].astype(np.int64)
        assert [tuple(row) for row in locations.tolist()] == [(w, p, f - first) for w, p, f, _ in mine]
        assert part["activations"].astype(float).tolist() == [value for *_, value in mine]
        total += len(mine)
    assert total == len(wanted)


def test_delphis_cache(overlapping: Path, tmp_path: Path, run: Callable[..., tuple[int, str]]) -> None:
    raw = Raw(overlapping)
    code, err = run("export", overlapping, "--format", "delphi", "-o", tmp_path / "out", "--ctx", CTX)
    assert code == 0
    folder = tmp_path / "out" / "latents"
    names = {RES: f"layers.1@{RES.replace('/', '-')}", SIGNED: f"layers.1@{SIGNED.replace('/', '-')}"}
    assert {f.name for f in folder.iterdir()} == set(
        names.values()
    )  # which is what delphi takes for hookpoints
    check_cache(folder / names[RES], raw, RES, raw.documents, 37)
    check_cache(folder / names[SIGNED], raw, SIGNED, raw.documents, 20)
    own = sum(map(len, raw.own.values()))
    tokens, rows = windows(raw, raw.documents, CTX)
    dropped = own - len(tokens) * CTX
    assert f"{dropped:,} of {own:,} tokens ({dropped / own:.2%}) are dropped" in err
    uncounted = sum(
        not counted and i >= first and (document, (start + i - first) // CTX * CTX) in rows
        for document, start, first, _, mask in raw.contexts.values()
        for i, counted in enumerate(mask)
    )
    assert f"{uncounted:,} in windows are not counted" in err
    config = json.loads((folder / names[RES] / "config.json").read_text())
    assert (config["cache_ctx_len"], config["n_tokens"]) == (CTX, len(tokens) * CTX)
    assert config["sae"] == RES
    assert {part["locations"].dtype.name for _, _, part in caches(folder / names[RES])} == {"uint16"}


def test_delphi_gets_the_documents_of_a_sample(mixed: Path, raw: Raw, tmp_path: Path, run: Any) -> None:
    options = ("-o", tmp_path / "out", "--ctx", 16, "--splits", 2, "--sae", SAMPLED, "--sae", RES)
    code, err = run("export", mixed, "--format", "delphi", *options)
    assert code == 0
    sampled = drawn(mixed)
    assert 0 < len(sampled) < len(raw.documents)
    check_cache(tmp_path / "out/latents/layers.2.post_feedforward_layernorm", raw, SAMPLED, sampled, 64, 16)
    check_cache(tmp_path / "out/latents/layers.1", raw, RES, raw.documents, 37, 16)
    assert "keep: sample 0.5" in err
    assert "keep: tokens" in err
    assert len(list((tmp_path / "out/latents/layers.1").glob("*.safetensors"))) == 2


def drawn(mixed: Path) -> list[int]:
    """Documents of the sample, by the contract's hash, written out."""

    def number(place: str) -> float:
        return int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "little") / 2**64

    rows = (
        queries.connect(str(mixed))
        .sql("SELECT document, corpus, source, row FROM documents ORDER BY 1")
        .fetchall()
    )
    return [document for document, *place in rows if number("\0".join(map(str, ["keep", *place]))) < 0.5]


def test_delphis_wide_locations(overlapping: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file has more windows or features than uint16 holds."""
    monkeypatch.setattr(delphi, "_SMALL", 8)
    con, raw = queries.connect(str(overlapping)), Raw(overlapping)
    into = export.Folder(str(tmp_path / "out"), False, [])
    saes = export.saes(con, [RES])
    (written,) = delphi.write(con, saes, into, delphi.Settings(CTX, 1), lambda words: None)
    assert {part["locations"].dtype.name for *_, part in caches(tmp_path / "out" / written.folder)} == {
        "uint32"
    }
    check_cache(tmp_path / "out" / written.folder, raw, RES, raw.documents, 37)


@pytest.mark.parametrize(
    ("values", "kind"),
    [([1.0, -65280.0, 2.0**-14], "float16"), ([1.0, 65536.0], "float32"), ([2.0**-18 + 2.0**-25], "float32")],
)
def test_delphis_activations_are_exact(values: list[float], kind: str, tmp_path: Path) -> None:
    n = len(values)
    rows = {"row": pa.array(range(n), pa.int64()), "position": [0] * n, "feature": [5] * n}
    table = pa.table(rows | {"activation": pa.array(values, pa.float32())})
    with (tmp_path / "5_5.safetensors").open("wb") as stream:
        delphi._split(stream, table, 5, 5, delphi.Cut(n, 1, n, 0, 0), 1, io.BytesIO(bytes(4 * n)))
    part = load_file(tmp_path / "5_5.safetensors")
    assert part["activations"].dtype == kind
    assert part["activations"].tolist() == values
    assert part["locations"].tolist() == [[i, 0, 0] for i in range(n)]


def test_what_delphi_cannot_have(mixed: Path, tmp_path: Path, run: Callable[..., tuple[int, str]]) -> None:
    out = ("--format", "delphi", "-o", tmp_path / "out")
    code, err = run("export", mixed, *out)
    assert code == 2
    assert f"{DOCUMENTS} (keep: documents), {NONE} (keep: none) kept none" in err
    code, err = run("export", mixed, *out, "--sae", RES, "--ctx", 4000)
    assert code == 2
    assert "--ctx 4000: none of the" in err
    code, err = run("export", mixed, *out, "--sae", RES, "--ctx", 70_000)  # nothing is left in the way
    assert code == 2
    assert "--ctx 70000: delphi's files hold 1 to 65,536 positions" in err


@pytest.mark.parametrize("counts", [[0] * 7, [5], [1, 2, 3, 4, 100, 0, 0, 1], [9, 0, 0, 9], list(range(50))])
def test_slices_and_shares_cover_every_feature_once(counts: list[int]) -> None:
    array = np.array(counts, np.int64)
    for limit in (1, 4, 10, 1000):
        parts = list(export.slices(array, limit))
        assert [f for a, b in parts for f in range(a, b + 1)] == list(range(len(counts)))
        assert all(sum(counts[a : b + 1]) <= limit or a == b for a, b in parts)
        assert all(sum(counts[a : b + 2]) > limit for a, b in parts[:-1])  # no slice could be longer
    for number in (1, 2, 5, 100):
        parts = list(delphi.shares(array, number))
        assert [f for a, b in parts for f in range(a, b + 1)] == list(range(len(counts)))
        assert len(parts) <= number


# --- parquet


def test_parquet_has_every_row_of_the_views(
    mixed: Path, tmp_path: Path, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from queries import export_parquet

    for name in ("_ROWS", "_CONTEXTS"):  # so that there are many slices, of contexts too
        monkeypatch.setattr(export_parquet, name, 1500)
    names = [RES, SAMPLED, DOCUMENTS, NONE]
    options = [part for sae in names for part in ("--sae", sae)]
    code, err = run("export", mixed, "--format", "parquet", "-o", tmp_path / "out", *options)
    assert code == 0
    con = queries.connect(str(mixed))
    everything = {"features", "top_contexts", "sampled_contexts"}
    wanted = {
        RES: everything | {"document_features", "activations"},
        SAMPLED: everything | {"document_features", "sampled_activations"},
        DOCUMENTS: everything | {"document_features"},
        NONE: everything,
    }
    for sae, views in wanted.items():
        assert {file.stem for file in (tmp_path / "out" / sae).iterdir()} == views
        for view in views:
            rows = con.execute(f"SELECT * FROM {view} WHERE sae = ?", [sae])
            columns = [column for column, *_ in rows.description]
            same_rows(tmp_path / "out" / sae / f"{view}.parquet", columns, rows.fetchall())
    for view in ("documents", "segments", "contexts", "vocabulary"):
        rows = con.execute(f"SELECT * FROM {view}")
        same_rows(tmp_path / "out" / f"{view}.parquet", [c for c, *_ in rows.description], rows.fetchall())
    assert pq.read_table(tmp_path / "out" / "saes.parquet")["sae"].to_pylist() == sorted(names)
    assert f"{NONE}: keep: none has no document_features and no activations" in err
    assert f"{SAMPLED}: keep: sample 0.5 has no activations; sampled_activations has" in err
    facts = json.loads((tmp_path / "out/README.json").read_text())
    assert {name: pq.read_metadata(tmp_path / "out" / name).num_rows for name in facts["files"]} == facts[
        "files"
    ]
    assert set(facts["not_kept"]) == {SAMPLED, DOCUMENTS, NONE}


def same_rows(file: Path, columns: list[str], wanted: list[tuple[Any, ...]]) -> None:
    table = pq.read_table(file)
    assert table.column_names == columns
    found = [tuple(row.values()) for row in table.to_pylist()]
    assert sorted(map(repr, found)) == sorted(map(repr, wanted)), file
    if file.stem in ("activations", "sampled_activations"):
        assert found == sorted(found)


# --- matrices


@pytest.mark.parametrize("sae", [RES, SIGNED])
def test_a_document_as_a_matrix(sae: str, overlapping: Path) -> None:
    raw, con = Raw(overlapping), queries.connect(str(overlapping))
    width = 37 if sae == RES else 20
    for document in raw.documents:
        dense = np.zeros((len(raw.own[document]), width), np.float32)
        for feature, context, position, value in raw.rows(sae):
            of, start, first, *_ = raw.contexts[context]
            if of == document:
                dense[start + position - first, feature] = value
        found = csr(con, sae.split("/", 1)[-1], document)
        assert found.dtype == np.float32
        assert found.shape == dense.shape
        assert np.array_equal(found.toarray(), dense)
        assert found.nnz == np.count_nonzero(dense)
    assert any(len(own) > 40 for own in raw.own.values())  # some in several contexts
    assert any(not own for own in raw.own.values())


def test_a_sampled_document_as_a_matrix(mixed: Path, raw: Raw) -> None:
    con, sampled = queries.connect(str(mixed)), drawn(mixed)
    whole = raw.con
    for document in sampled[:4]:
        assert (csr(con, SAMPLED, document) != csr(whole, SAMPLED, document)).nnz == 0
    left_out = next(d for d in raw.documents if d not in sampled)
    for sae, document in ((SAMPLED, left_out), (DOCUMENTS, sampled[0]), (NONE, sampled[0])):
        with pytest.raises(
            InputError, match=rf"activations of {sae} were not kept in document {document} \(keep: "
        ):
            csr(con, sae, document)
    with pytest.raises(InputError, match="there is no document 12345 in this index"):
        csr(con, RES, 12345)


@pytest.mark.parametrize("sae", [RES, DOCUMENTS, SAMPLED])
def test_documents_as_a_matrix(sae: str, mixed: Path, raw: Raw) -> None:
    con = queries.connect(str(mixed))
    width = int(re.search(r"width_(\d+)", sae)[1])
    place = {document: i for i, document in enumerate(raw.documents)}
    values: dict[tuple[int, int], list[float]] = defaultdict(list)
    for feature, context, _, value in raw.rows(sae):
        values[place[raw.contexts[context][0]], feature].append(value)
    for name, of in (("max", max), ("n_tokens", len), ("sum", math.fsum)):
        dense = np.zeros((len(place), width))
        for at, mine in values.items():
            dense[at] = of(mine)
        found, keys = documents_csr(con, sae, name)
        assert keys.tolist() == raw.documents
        assert np.array_equal(found.toarray(), dense), name
        some = raw.documents[7:2:-1]
        part, keys = documents_csr(con, sae, name, some)
        assert keys.tolist() == some
        assert np.array_equal(part.toarray(), dense[7:2:-1])
    assert documents_csr(con, sae, documents=[])[0].shape == (0, width)


def test_what_is_no_matrix(mixed: Path, raw: Raw) -> None:
    con, one = queries.connect(str(mixed)), raw.documents[0]
    with pytest.raises(InputError, match=rf"document_features of {NONE} were not kept \(keep: none\)"):
        documents_csr(con, NONE)
    with pytest.raises(InputError, match="there is no document 12345"):
        documents_csr(con, RES, documents=[one, 12345])
    with pytest.raises(InputError, match="one is given twice"):
        documents_csr(con, RES, documents=[one, one])
    with pytest.raises(InputError, match="'mean' is none of max, n_tokens, sum"):
        documents_csr(con, RES, "mean")  # type: ignore[arg-type]


# --- the folder


def test_a_folder_is_whole_or_says_so(
    mixed: Path, tmp_path: Path, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ("export", mixed, "--format", "neuronpedia", "-o", out, "--features", 3, "--sae")
    con, into = queries.connect(str(mixed)), export.Folder(str(out), False, [])
    saes, settings = export.saes(con, [RES]), neuronpedia.Settings()
    with monkeypatch.context() as patch:
        patch.setattr(neuronpedia._Source, "_activation", killed)
        with pytest.raises(RuntimeError, match="killed"):
            neuronpedia.write(con, saes, into, settings, lambda words: None)
    assert {file.name for file in out.iterdir()} == {"UNFINISHED.json", "tiny-gemma-2"}
    code, err = run(*command, RES)
    assert code == 2
    assert err.startswith(f"error: -o {out}: is not empty;")
    assert run(*command, RES, "--overwrite")[0] == 0
    before = {file: file.read_bytes() for file in out.rglob("*.json*") if file.is_file()}
    assert out / "README.json" in before
    assert out / "UNFINISHED.json" not in before
    assert run(*command, NONE, "--overwrite")[0] == 0
    assert not any(
        RES.split("/")[1].replace("_", "-") in str(file) and "tiny-res" in str(file)
        for file in out.rglob("*")
    )
    assert json.loads((out / "README.json").read_text())["saes"] == [NONE]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.json").write_text('{"made_by": "me"}')
    code, err = run("export", mixed, "--format", "parquet", "-o", tmp_path / "mine", "--overwrite")
    assert code == 2
    assert "has files that are no export of ours" in err
    assert (tmp_path / "mine" / "README.json").read_text() == '{"made_by": "me"}'


def killed(*args: Any) -> None:
    raise RuntimeError("killed")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "parquet", "-o", "OUT", "--ctx", 9], "--ctx: is for --format delphi, not parquet"),
        (
            ["--format", "delphi", "-o", "OUT", "--features", 9],
            "--features: is for --format neuronpedia, not delphi",
        ),
        (["--format", "parquet", "-o", "OUT", "--sae", "nothing"], "'nothing' names no SAE of this index"),
        (["--format", "parquet", "-o", "INDEX/out"], "is inside the index"),
        (["--format", "parquet", "-o", "nowhere://x"], "-o nowhere://x: "),
        (["--format", "parquet"], "Missing option"),
        (["--format", "csv", "-o", "OUT"], "'csv' is not one of"),
    ],
)
def test_what_is_refused(
    options: list[Any], said: str, mixed: Path, tmp_path: Path, run: Callable[..., tuple[int, str]]
) -> None:
    filled = [str(o).replace("OUT", str(tmp_path / "out")).replace("INDEX", str(mixed)) for o in options]
    code, err = run("export", mixed, *filled)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not (mixed / "out").exists()


def test_a_folder_may_be_anywhere(mixed: Path, tmp_path: Path, run: Callable[..., tuple[int, str]]) -> None:
    for to in (tmp_path / "out", "memory://exported"):
        assert run("export", mixed, "--format", "delphi", "--ctx", 16, "-o", to, "--sae", RES)[0] == 0
    memory = fsspec.filesystem("memory")
    there = {name.removeprefix("/exported/"): memory.cat_file(name) for name in memory.find("/exported")}
    local = {
        str(f.relative_to(tmp_path / "out")): f.read_bytes()
        for f in (tmp_path / "out").rglob("*")
        if f.is_file()
    }
    assert there.keys() == local.keys()
    assert {n: d for n, d in there.items() if n != "README.json"} == {
        n: d for n, d in local.items() if n != "README.json"
    }
    memory.rm("/exported", recursive=True)
