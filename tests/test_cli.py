"""The command line as a person or a program meets it: exit codes, one-line errors, output formats."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from rich.cells import cell_len
from rich.console import Console

import queries
from jobs import cli, output
from queries import lookup
from queries.pieces import join_pieces
from queries.show import feature_view, shaded, visible

ROOT = Path(__file__).parent.parent
SAE = "tiny-res/layer_1/width_37/average_l0_2"
READERS = (["status"], ["sql", "SELECT 1"], ["features", SAE], ["feature", SAE, "1"])


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(json.loads(self.out))


@pytest.fixture
def corpuscope(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Done]]:
    """Runs a command in this process."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}

    def run(*args: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["corpuscope", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Done(int(str(ended.value.code)), captured.out, captured.err)

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def refused(corpuscope: Callable[..., Done]) -> Callable[..., str]:
    """Scans inline, expects exit 2, one line on stderr and no index; returns the line."""

    def run(spec: Path, *options: object) -> str:
        done = corpuscope("scan", spec, *(options or ("--executor", "inline")))
        assert done.code == 2, done.err
        assert not done.out
        assert done.err.startswith("error: ")
        assert done.err.count("\n") == 1, done.err
        assert not (spec.parent / "index").exists()
        return done.err

    return run


def a_sae(suites: Path) -> dict[str, np.ndarray]:
    return tiny.load_sae(suites, SAE)


def save_sae(folder: Path, tensors: dict[str, np.ndarray], layer: int = 1) -> dict[str, str]:
    """A suite of one SAE, as an entry of a spec."""
    file = folder / f"own-res/layer_{layer}/width_37/average_l0_2/params.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **tensors)
    return {"uri": str(folder / "own-res")}


# --- scan: wrong input


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"corpus": {"text": "body"}}, "corpus.text: no column 'body' in part_00.jsonl; it has: id, text,"),
        ({"corpus": {"id": "key"}}, "corpus.id: no column 'key' in part_00.jsonl"),
        ({"corpus": {"metadata": ["land"]}}, "corpus.metadata: no column 'land' in part_00.jsonl"),
        ({"corpus": {"uri": "none/*.jsonl"}}, "corpus.uri: no file matches"),
        ({"corpus": {"uri": "."}}, "is a directory; name its files"),
        ({"corpus": {"uri": "foo://a.jsonl"}}, "corpus.uri: foo://a.jsonl: Protocol not known"),
        ({"model": {"uri": "./gone"}}, "model.uri: no such directory"),
        ({"model": {"uri": "."}}, "model.uri: no config.json in directory"),
        ({"model": {"uri": "./spec.yaml"}}, "neither a model's directory nor a .gguf file"),
        ({"model": {"uri": "gone.gguf"}}, "model.uri: no such file"),
        (
            {"model": {"uri": "nobody/nothing-here"}},
            "model.uri: 'nobody/nothing-here': no such directory, and",
        ),
        ({"saes": {"uri": "gone-res"}}, "saes.uri: no such directory"),
        ({"saes": {"uri": "."}}, "saes.uri: no SAEs of a known format under"),
        ({"max_index_bytes": "1kB"}, "max_index_bytes: the index is estimated at"),
        ({"index": "foo://x"}, "index foo://x: Protocol not known"),
        ({"index": "spec.yaml"}, "this is a file, not a folder"),
        ({"index": "spec.yaml/index"}, "this is a file, not a folder"),
    ],
)
def test_what_is_not_there_is_named(
    tmp_path: Path, write_spec: Any, refused: Any, overrides: dict[str, Any], words: str
) -> None:
    assert words in refused(write_spec(tmp_path, **overrides))


def test_the_size_guard_names_cheaper_policies(tmp_path: Path, write_spec: Any, refused: Any) -> None:
    line = refused(write_spec(tmp_path, max_index_bytes="1kB"))
    for policy in ("`keep: documents`", "`keep: none`", "`keep: {sample: 0.01}`"):
        assert policy in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path, write_spec: Any, refused: Any) -> None:
    assert "model.device: cuda is asked for" in refused(write_spec(tmp_path, model={"device": "cuda"}))


def test_arguments_that_do_not_go_together(tmp_path: Path, write_spec: Any, refused: Any) -> None:
    spec = write_spec(tmp_path)
    for more in (["--workers", "2"], ["--address", "auto"]):
        assert "--executor inline: runs in this process" in refused(spec, "--executor", "inline", *more)
    assert "'--workers': 0" in refused(spec, "--workers", "0")
    assert "Did you mean '--workers'" in refused(spec, "--wrokers", "2")
    assert "'--executor': 'dask'" in refused(spec, "--executor", "dask")


def test_an_address_where_no_cluster_is_is_refused_at_once(
    tmp_path: Path, write_spec: Any, refused: Any
) -> None:
    pytest.importorskip("ray")
    spec, began = write_spec(tmp_path), time.monotonic()
    assert "no Ray cluster at 127.0.0.1:1" in refused(spec, "--address", "127.0.0.1:1")
    assert "no Ray cluster at ray://127.0.0.1:1" in refused(spec, "--address", "ray://127.0.0.1:1")
    assert "is not HOST:PORT" in refused(spec, "--address", "somewhere")
    assert "corpuscope submit" in refused(spec, "--address", "http://127.0.0.1:1")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("threshold"), "no threshold in"),
        (lambda t: t.pop("W_enc"), "no tensor W_enc in"),
        (lambda t: t.update(W_dec=t["W_dec"].T), "W_dec in"),
        (lambda t: t.update(b_enc=t["b_enc"] * np.nan), "b_enc in"),
        (lambda t: t.update(W_enc=t["b_enc"]), "not two dimensions"),
        (
            lambda t: t.update(W_enc=t["W_enc"][:16], W_dec=t["W_dec"][:, :16], b_dec=t["b_dec"][:16]),
            "own-res/layer_1/width_37/average_l0_2 has d_in 16, but its site model.layers.1.output",
        ),
    ],
)
def test_a_wrong_tensor_is_named(
    tmp_path: Path, write_spec: Any, refused: Any, tiny_suites: Path, change: Any, words: str
) -> None:
    tensors = a_sae(tiny_suites)
    change(tensors)
    line = refused(write_spec(tmp_path, saes=save_sae(tmp_path, tensors)))
    assert words in line
    assert "own-res" in line


@pytest.mark.parametrize("damage", [lambda b: b[:3000], lambda b: b"hello", lambda b: b"", None])
def test_a_damaged_archive_is_named(
    tmp_path: Path, write_spec: Any, refused: Any, tiny_suites: Path, damage: Any
) -> None:
    entry = save_sae(tmp_path, a_sae(tiny_suites))
    file = next(Path(entry["uri"]).rglob("params.npz"))
    data = file.read_bytes()
    middle = len(data) // 3
    file.write_bytes(damage(data) if damage else data[:middle] + b"XXXX" + data[middle + 4 :])
    line = refused(write_spec(tmp_path, saes=entry))
    assert "saes: cannot read" in line
    assert str(file) in line


def test_saes_that_do_not_go_with_the_model_or_each_other(
    tmp_path: Path, write_spec: Any, refused: Any, tiny_suites: Path
) -> None:
    beyond = save_sae(tmp_path, a_sae(tiny_suites), layer=9)
    assert "layer 9 does not exist in the model, which has 4" in refused(write_spec(tmp_path, saes=beyond))
    suite = {"uri": str(tiny_suites / "tiny-res")}
    assert "two SAEs have the id tiny-res/layer_1/" in refused(write_spec(tmp_path, saes=[suite, suite]))
    line = refused(write_spec(tmp_path, saes=suite | {"name": "mine"}))
    assert "saes.site:" in line
    assert "set `site: resid_post`" in line
    assert "saes.select: 'x*' matches none of 3" in refused(
        write_spec(tmp_path, saes=suite | {"select": "x*"})
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "no weights"),
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 100), "cannot read"),
        (lambda d: (d / "config.json").write_text("{"), "config.json"),
        (lambda d: (d / "config.json").write_text('{"model_type": "bert"}'), "has no known sites"),
        (lambda d: (d / "config.json").write_text('{"model_type": "foo"}'), "model type `foo`"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "no tokenizer in"),
    ],
)
def test_a_damaged_model_is_found_before_anything_is_written(
    tmp_path: Path, write_spec: Any, refused: Any, tiny_model: Path, damage: Any, words: str
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    damage(tmp_path / "model")
    line = refused(write_spec(tmp_path, model={"uri": "model"}))
    assert line.startswith("error: model.uri: ")
    assert words in line


def test_a_file_that_only_says_it_is_gguf(tmp_path: Path, write_spec: Any, refused: Any) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    for data in (b"GGUFxxxxxxx", b"nope" * 100):
        (tmp_path / "m.gguf").write_bytes(data)
        line = refused(write_spec(tmp_path, model={"uri": "m.gguf"}))
        assert f"model.uri: cannot read {tmp_path / 'm.gguf'}" in line


# --- scan: what goes wrong on the way


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"id": oops\n', "not JSON"),
        (
            b'{"id": "x", "text": null, "lang": "en", "score": 1.0, "even": true}\n',
            "text column 'text' is None",
        ),
        (b'{"id": "x", "text": "\xff\xfe"}\n', "not UTF-8"),
    ],
)
def test_a_bad_row_is_quarantined_and_mending_it_indexes_it(
    tmp_path: Path, write_spec: Any, corpuscope: Any, tiny_corpus: Path, line: bytes, words: str
) -> None:
    for i in (0, 1, 2):
        shutil.copy(tiny_corpus / f"part_{i:02d}.jsonl", tmp_path)
    bad = tmp_path / "part_01.jsonl"
    good = bad.read_bytes()
    first, _, *rest = good.splitlines(keepends=True)
    bad.write_bytes(b"".join([first, line, *rest]))
    spec = write_spec(tmp_path, corpus={"uri": "part_*.jsonl"})
    done = corpuscope("scan", spec, "--executor", "inline")
    assert done.code == 3, done.err
    index = tmp_path / "index"
    last = done.err.splitlines()[-1]
    assert last.startswith("1 document could not be scanned, everything else is indexed: ")
    assert f'corpuscope sql {index} "SELECT * FROM quarantine"' in last
    (row,) = corpuscope("sql", index, "SELECT * FROM quarantine", "--format", "json").rows
    assert list(row) == ["source", "row", "id", "error"]
    assert (row["source"], row["row"]) == ("part_01.jsonl", 1)
    assert words in row["error"]
    status = corpuscope("status", index, "--format", "json").rows[0]
    assert (status["state"], status["failed"], status["quarantined"]) == ("complete", 0, 1)
    assert "1 quarantined" in corpuscope("status", index).out
    again = corpuscope("scan", spec, "--executor", "inline")
    assert again.code == 3, again.err
    assert [text.split(":")[0] for text in again.err.splitlines()] == ["nothing to scan", last.split(":")[0]]
    bad.write_bytes(good)
    done = corpuscope("scan", spec, "--executor", "inline")
    assert done.code == 0, done.err
    status = corpuscope("status", index, "--format", "json").rows[0]
    assert (status["state"], status["committed"], status["quarantined"]) == ("complete", 3, 0)


def test_changed_settings_are_named_one_by_one(
    tmp_path: Path, write_spec: Any, corpuscope: Any, tiny_index: Path
) -> None:
    index = shutil.copytree(tiny_index, tmp_path / "index")
    before = sorted(index.rglob("*"))
    spec = write_spec(tmp_path, top_k=5, context={"length": 64}, model={"dtype": "bfloat16"})
    done = corpuscope("scan", spec, "--executor", "inline")
    assert done.code == 2
    assert done.err.count("\n") == 1
    for words in ("top_k (4 there, 5 here)", "context.length (96 there, 64 here)", "model.dtype (float32"):
        assert words in done.err
    assert "scan into another index" in done.err
    assert corpuscope("plan", spec).code == 2
    assert sorted(index.rglob("*")) == before


def test_a_finished_scan_again_says_there_is_nothing_to_do(
    tmp_path: Path, write_spec: Any, corpuscope: Any, tiny_index: Path
) -> None:
    done = corpuscope("scan", write_spec(tmp_path), "--index", tiny_index, "--executor", "inline")
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith("nothing to scan: every unit of the corpus is committed (run 1,")


def test_many_removed_documents_need_a_yes(
    tmp_path: Path, write_spec: Any, corpuscope: Any, tiny_corpus: Path, tiny_index: Path
) -> None:
    index = shutil.copytree(tiny_index, tmp_path / "index")
    corpus = shutil.copytree(tiny_corpus, tmp_path / "corpus")
    for i in range(4, 10):
        (corpus / f"part_{i:02d}.jsonl").unlink()
    spec = write_spec(tmp_path, corpus={"uri": "corpus/*.jsonl"})
    done = corpuscope("scan", spec, "--executor", "inline")
    assert done.code == 2
    assert re.search(
        r"corpus.uri: \d+ of \d+ documents are gone \(part_04.jsonl, .*--allow-removal", done.err
    )
    documents = "SELECT count(*) AS n, count(*) FILTER (source = $$part_05.jsonl$$) AS gone FROM documents"
    assert corpuscope("sql", index, documents, "--format", "json").rows[0]["gone"] > 0
    done = corpuscope("scan", spec, "--executor", "inline", "--allow-removal")
    assert done.code == 0
    assert "6 units of changed or removed files leave the index" in done.err
    left = corpuscope("sql", index, documents, "--format", "json").rows[0]
    assert left["gone"] == 0
    assert left["n"] == sum(len(f.read_text().splitlines()) for f in corpus.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_scan_says_so_and_goes_on(
    tmp_path: Path, write_spec: Any, corpuscope: Any, tiny_index: Path, number: int
) -> None:
    spec = write_spec(tmp_path)
    code = (
        "import time, sys, pipelines.unit as u; old = u.Scanner.scan\n"
        "def scan(self, work):\n    time.sleep(0.3); return old(self, work)\n"
        "u.Scanner.scan = scan\n"
        "from jobs.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "scan", str(spec), "--executor", "inline"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it puts in the background, such as these tests, with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        commits = tmp_path / "index" / "commits" / "000000"
        deadline = time.monotonic() + 90
        while not (commits.is_dir() and len(list(commits.glob("*.json"))) >= 2):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        assert corpuscope("status", tmp_path / "index", "--format", "json").rows[0]["state"] == "running"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert not out
    assert err.splitlines()[-1] == "stopped; run the same command again to go on"
    assert "Traceback" not in err
    status = corpuscope("status", tmp_path / "index", "--format", "json").rows[0]
    assert status["state"] == "incomplete"
    assert 2 <= status["committed"] < status["units"]
    assert status["running"] == 0
    visible = corpuscope("sql", tmp_path / "index", "SELECT count(DISTINCT source) AS n FROM documents",
                         "--format", "json").rows  # fmt: skip
    assert visible == [{"n": status["committed"]}]  # whole units, while others are to come
    assert corpuscope("features", tmp_path / "index", SAE).code == 0
    done = corpuscope("scan", spec, "--executor", "inline")
    assert done.code == 0
    assert f"{status['committed']} already committed" in done.err
    same = "SELECT * EXCLUDE (run) FROM documents ORDER BY document"
    one = corpuscope("sql", tmp_path / "index", same, "--format", "csv")
    assert one.out == corpuscope("sql", tiny_index, same, "--format", "csv").out


@pytest.mark.cluster
def test_a_stopped_scan_on_ray_says_so_too(tmp_path: Path, write_spec: Any) -> None:
    """Ray puts a SIGTERM handler of its own over the command's when it starts."""
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "jobs.cli", "scan", str(write_spec(tmp_path)), "--workers", "1"]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert first.startswith("run 1: 24 units"), first
        process.terminate()
        out, err = process.communicate(timeout=90)
    assert process.returncode == 75, err
    assert not out
    assert err.splitlines()[-1] == "stopped; run the same command again to go on"
    assert "Traceback" not in err


def test_progress_without_a_terminal_is_plain_lines(
    tmp_path: Path, write_spec: Any, corpuscope: Any, tiny_corpus: Path
) -> None:
    spec = write_spec(tmp_path, corpus={"uri": f"{tiny_corpus}/part_0[0-3].jsonl"})
    done = corpuscope("scan", spec, "--executor", "inline")
    assert (done.code, done.out) == (0, "")
    assert "\x1b" not in done.err
    first, *_, progress, last = done.err.splitlines()
    assert re.fullmatch(r"run 1: 4 units with \d+ documents, 1 worker", first)
    assert re.fullmatch(r"100%  (\d+)/\1 documents  [\d,]+ tokens/s  units 4/4  0:00 left", progress)
    assert re.fullmatch(r"run 1: \d+ documents, [\d,]+ counted tokens in .* -> .*/index", last)


# --- indexes that are none, or hold nothing


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader[0])
def test_no_index_is_one_line(tmp_path: Path, corpuscope: Any, reader: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("hello")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.json").write_text('{"format": 2}')
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "index.json").write_text('{"format": 1}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "index.json").write_text("{")
    command, *rest = reader
    for where in ("gone", "empty", "file", "other", "old", "broken", "foo://x"):
        place = where if "://" in where else tmp_path / where
        done = corpuscope(command, place, *rest)
        assert (done.code, done.out) == (2, ""), where
        assert done.err.startswith("error: ")
        assert str(place) in done.err
        assert done.err.count("\n") == 1
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda i: next((i / "data" / "features").iterdir()).unlink(), "No files found that match"),
        (lambda i: next((i / "data" / "features").iterdir()).write_bytes(b"x" * 100), "data/features/"),
        (lambda i: (i / "vocabulary.parquet").unlink(), "vocabulary.parquet"),
        (lambda i: next((i / "commits").rglob("*.json")).write_text("{"), "commits/"),
        (lambda i: (i / "plans" / "000000.json").write_text("[1]"), "plans/000000.json"),
    ],
)
def test_a_damaged_index_names_the_file_in_one_line(
    tmp_path: Path, corpuscope: Any, tiny_index: Path, damage: Any, words: str
) -> None:
    index = shutil.copytree(tiny_index, tmp_path / "index")
    damage(index)
    done = corpuscope("features", index, SAE)
    assert (done.code, done.out) == (1, ""), done.err
    assert words in done.err
    assert "damaged" in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("rows", [[], [{"id": "a", "text": ""}, {"id": "b", "text": ""}]])
def test_an_index_without_tokens_answers(
    tmp_path: Path, write_spec: Any, corpuscope: Any, rows: list[dict[str, Any]]
) -> None:
    tiny.write_rows(tmp_path / "empty.jsonl", rows)
    spec = write_spec(tmp_path, corpus={"uri": "empty.jsonl", "metadata": []})
    index = tmp_path / "index"
    done = corpuscope("scan", spec, "--executor", "inline")
    assert done.code == 0, done.err
    assert corpuscope("scan", spec, "--executor", "inline").code == 0
    status = corpuscope("status", index, "--format", "json").rows[0]
    assert (status["state"], status["documents"], status["tokens"]) == ("complete", len(rows), 0)
    for view in ("documents", "segments", "contexts", "activations", "document_features", "features", "saes",
                 "top_contexts", "sampled_contexts", "vocabulary", "runs"):  # fmt: skip
        done = corpuscope("sql", index, f"SELECT count(*) AS n FROM {view}", "--format", "json")
        wanted = {"documents": len(rows), "segments": len(rows), "saes": 7, "runs": 1}
        assert done.code == 0, done.err
        assert done.rows[0]["n"] == wanted.get(
            view, done.rows[0]["n"] if view in ("vocabulary", "features") else 0
        )
    table = corpuscope("features", index, SAE, "--format", "json").rows
    assert {row["n_tokens"] for row in table} == {0}
    assert "dead" in corpuscope("feature", index, SAE, "1").out
    assert corpuscope("plan", spec, "--format", "json").rows[0]["tokens"] == 0


# --- features and SAEs


def test_feature_and_sae_names(corpuscope: Any, tiny_index: Path) -> None:
    def error(*args: object) -> str:
        done = corpuscope(*args)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        return str(done.err)

    assert "has features 0 to 36, not 37" in error("feature", tiny_index, SAE, "37")
    assert "has features 0 to 36, not -1" in error("feature", tiny_index, SAE, "--", "-1")
    assert "'one' is not a valid integer" in error("feature", tiny_index, SAE, "one")
    assert "'-k': 0" in error("feature", tiny_index, SAE, "1", "-k", "0")
    assert "'--limit': 0" in error("features", tiny_index, SAE, "--limit", "0")
    assert "is the ending of 2 ids" in error("features", tiny_index, "3")
    assert "names no SAE of this index; there are" in error("features", tiny_index, "gone")
    assert "names no SAE" in error("features", tiny_index, "")
    assert "--sort: no column 'size'; there are feature, n_tokens," in error(
        "features", tiny_index, SAE, "--sort", "size"
    )
    for name in (SAE, "layer_1/width_37/average_l0_2", "average_l0_2", "l0_2"):
        assert corpuscope("feature", tiny_index, name, "1", "--format", "json").rows[0]["sae"] == SAE


def test_feature_asks_no_view_that_it_does_not_open(tiny_index: Path) -> None:
    whole, some = (
        queries.connect(str(tiny_index)),
        queries.connect(str(tiny_index), views=lookup.FEATURE_VIEWS),
    )
    for sae, number in whole.sql("SELECT sae, feature FROM features WHERE feature % 29 = 0").fetchall():
        assert lookup.resolve_sae(some, sae) == sae
        assert lookup.feature(some, sae, number, 3) == lookup.feature(whole, sae, number, 3)


def test_features_sorts_both_ways(corpuscope: Any, tiny_index: Path) -> None:
    def values(sort: str) -> list[Any]:
        done = corpuscope("features", tiny_index, SAE, "--sort", sort, "--limit", 100, "--format", "json")
        return [row[sort.removeprefix("-")] for row in done.rows]

    for column in ("n_tokens", "max", "density"):
        down, up = values(column), values(f"-{column}")
        alive = [v for v in down if v is not None]
        assert len(down) == len(up) == 37
        assert alive == sorted(alive, reverse=True)
        assert [v for v in up if v is not None] == sorted(alive)
        assert down[len(alive) :] == [None] * (37 - len(alive))
    assert values("feature") == list(range(37))


def test_a_dead_feature(corpuscope: Any, tiny_index: Path) -> None:
    done = corpuscope("feature", tiny_index, SAE, tiny.DEAD)
    assert done.code == 0
    assert "dead: never active" in done.out
    row = corpuscope("feature", tiny_index, SAE, tiny.DEAD, "--format", "json").rows[0]
    assert (row["n_tokens"], row["density"], row["contexts"]) == (0, 0.0, [])
    assert {row[name] for name in ("mean_active", "std_active", "max", "p50", "p90", "p99")} == {None}
    header = corpuscope("feature", tiny_index, SAE, tiny.DEAD, "--format", "csv").out
    assert header == "sae,feature,rank,activation,id,corpus,source,row,context,position,text,pieces\n"


def test_feature_marks_the_active_tokens(corpuscope: Any, tiny_index: Path) -> None:
    table = corpuscope("features", tiny_index, SAE, "--sort", "-density", "--format", "json").rows
    number = next(row["feature"] for row in table if row["n_tokens"])
    found = corpuscope("feature", tiny_index, SAE, number, "-k", 2, "--format", "json").rows[0]
    shown = corpuscope("feature", tiny_index, SAE, number, "-k", 2).out
    assert found["contexts"]
    assert "\x1b" not in shown
    for context in found["contexts"]:
        assert "".join(text for text, _ in context["pieces"]) == context["text"]
        highest = max(context["pieces"], key=lambda piece: piece[1])
        assert highest[1] == context["activation"]
        assert f"[[{highest[0]}]]" in shown or "\n" in highest[0]
        assert f"{context['source']} row {context['row']}" in shown
    example = corpuscope("features", tiny_index, SAE, "--format", "json").rows[0]["example"]
    assert re.search(r"\[.+\]", example, re.DOTALL)


PIECES = [["a", 0.0], [" hot", 8.0], ["\n", 2.0], ["日", 0.0]]


def test_shades_and_brackets_say_the_same() -> None:
    plain = shaded(PIECES, 8.0, color=False)
    assert plain.plain == "a[[ hot]][↵]日"
    text = shaded(PIECES, 8.0, color=True)
    assert text.plain == "a hot↵日"
    assert [(span.start, span.end) for span in text.spans] == [(1, 5), (5, 6)]
    strong, weak = (span.style for span in text.spans)
    assert strong.bgcolor.triplet.green < weak.bgcolor.triplet.green


def test_control_characters_cannot_reach_the_terminal() -> None:
    assert visible("a\tb\r\x1b[31m\u202e日\u00a0") == "a→b␍\\u{1b}[31m\\u{202e}日\\u{a0}"


def test_a_feature_fits_a_narrow_terminal(corpuscope: Any, tiny_index: Path) -> None:
    found = corpuscope("feature", tiny_index, SAE, tiny.ALWAYS, "--format", "json").rows[0]
    found["histogram"] = [7] * 194  # the widest there is
    for color in (False, True):
        out = Console(width=80, file=io.StringIO(), force_terminal=color, color_system="256", no_color=False)
        out.print(feature_view(found, color))
        lines = re.sub(r"\x1b\[[0-9;]*m", "", out.file.getvalue()).splitlines()
        assert max(map(cell_len, lines)) <= 80
        assert lines[0] == f"{SAE}  feature {tiny.ALWAYS}"
        assert any("█" * 40 in line and line.endswith("(log)") for line in lines)


def test_characters_cut_over_tokens_are_joined() -> None:
    whole = "日".encode()
    tokens = [b"a", whole[:1], whole[1:], whole[:2], b"b"]
    assert join_pieces(tokens, [0.0, 1.0, 3.0, 2.0, 0.0]) == [("a", 0.0), ("日", 3.0), ("\ufffdb", 2.0)]
    assert join_pieces([whole[1:], whole[:1]], [1.0, 0.0]) == [("\ufffd\ufffd", 1.0), ("\ufffd", 0.0)]


# --- sql


@pytest.mark.parametrize(
    "statement",
    [
        "COPY (SELECT 1) TO '{out}'",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{out}'",
        "explain (analyze) COPY (SELECT 1) TO '{out}'",
        "EXPLAIN /* */ ANALYZE COPY (SELECT 1) TO '{out}'",
        "INSERT INTO runs VALUES (1)",
        "CREATE TABLE t AS SELECT 1",
        "DELETE FROM documents",
        "DROP VIEW documents",
        "ATTACH '{out}'",
        "EXPORT DATABASE '{out}'",
        "SET threads = 1",
        "PRAGMA threads = 1",
        "CALL pragma_version()",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SELECT 1; SELECT 2",
        "SELECT 1; COPY (SELECT 1) TO '{out}'",
        "BEGIN",
        "",
        ";",
        "SELEC 1",
        "SELECT $1",
        "SELECT 'a'::INTEGER",
    ],
)
def test_sql_only_reads_one_statement(
    tmp_path: Path, corpuscope: Any, tiny_index: Path, statement: str
) -> None:
    out = tmp_path / "written"
    done = corpuscope("sql", tiny_index, statement.format(out=out))
    assert (done.code, done.out) == (2, ""), done.err
    assert done.err.startswith("error: sql: ")
    assert done.err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "statement",
    [
        "FROM saes SELECT sae",
        "WITH a AS (SELECT 1) SELECT * FROM a",
        "VALUES (1), (2)",
        "DESCRIBE features",
        "SUMMARIZE documents",
        "SHOW TABLES",
        "EXPLAIN SELECT * FROM features",
        "EXPLAIN ANALYZE SELECT 1",
        "EXPLAIN (FORMAT json) SELECT 1",
        "SELECT 1;",
    ],
)
def test_sql_takes_every_way_of_reading(corpuscope: Any, tiny_index: Path, statement: str) -> None:
    done = corpuscope("sql", tiny_index, statement)
    assert done.code == 0, done.err
    assert done.out


def test_sql_errors_keep_the_names_that_are_meant(corpuscope: Any, tiny_index: Path) -> None:
    assert '"n_tokens"' in corpuscope("sql", tiny_index, "SELECT n_token FROM features").err
    assert 'Did you mean "features"' in corpuscope("sql", tiny_index, "SELECT * FROM feature").err
    assert "IN (value, …)" in corpuscope("sql", tiny_index, "PIVOT documents ON lang").err


AWKWARD = (
    "SELECT '[red]x' AS m, 'a\nb' AS n, 'x'::BLOB AS b, 1.5::DECIMAL(4, 2) AS dec, 'NaN'::DOUBLE AS nan, "
    "TIMESTAMP '2020-01-01 00:00:00' AS ts, DATE '2020-01-01' AS d, MAP {1: 2} AS map, [1.5, NULL] AS l, "
    "{'a': 'ü'} AS s, NULL AS z, 1 AS a, 2 AS a, true AS t"
)


def test_formats_are_clean(corpuscope: Any, tiny_index: Path) -> None:
    wanted = {
        "m": "[red]x", "n": "a\nb", "b": "78", "dec": 1.5, "nan": None, "ts": "2020-01-01T00:00:00",
        "d": "2020-01-01", "map": {"1": 2}, "l": [1.5, None], "s": {"a": "ü"}, "z": None, "a": 1, "a_1": 2,
        "t": True,
    }  # fmt: skip
    done = corpuscope("sql", tiny_index, AWKWARD, "--format", "json")
    assert (done.rows, done.err) == ([wanted], "")
    assert json.loads(corpuscope("sql", tiny_index, AWKWARD, "--format", "jsonl").out) == wanted
    header, row = csv.reader(io.StringIO(corpuscope("sql", tiny_index, AWKWARD, "--format", "csv").out))
    assert header == list(wanted)
    assert row[header.index("n")] == "a\nb"
    assert row[header.index("z")] == ""
    table = corpuscope("sql", tiny_index, AWKWARD).out.splitlines()
    assert len(table) == 2
    assert "[red]x" in table[1]
    assert "a↵b" in table[1]


def test_no_rows(corpuscope: Any, tiny_index: Path, tmp_path: Path) -> None:
    none = "SELECT sae, feature FROM features WHERE false"
    assert corpuscope("sql", tiny_index, none, "--format", "json").rows == []
    assert corpuscope("sql", tiny_index, none, "--format", "jsonl").out == ""
    assert corpuscope("sql", tiny_index, none, "--format", "csv").out == "sae,feature\n"
    done = corpuscope("sql", tiny_index, none)
    assert done.out.split() == ["sae", "feature"]
    assert done.err == "(no rows)\n"
    file = tmp_path / "none.parquet"
    assert corpuscope("sql", tiny_index, none, "--format", "parquet", "-o", file).code == 0
    assert pq.read_table(file).column_names == ["sae", "feature"]


def test_parquet_goes_to_a_file(corpuscope: Any, tiny_index: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    done = corpuscope("sql", tiny_index, "SELECT * FROM features", "--format", "parquet", "-o", file)
    assert (done.code, done.out) == (0, "")
    assert done.err.endswith(f" rows -> {file}\n")
    assert done.err.count("\n") == 1
    rows = corpuscope("sql", tiny_index, "SELECT * FROM features", "--format", "json").rows
    assert pq.read_table(file).num_rows == len(rows)
    assert pq.read_schema(file).field("feature").type == "int32"
    for args in (["--format", "parquet"], ["-o", file], ["--format", "json", "-o", file]):
        assert "go together" in corpuscope("sql", tiny_index, "SELECT 1", *args).err
    gone = corpuscope(
        "sql", tiny_index, "SELECT 1", "--format", "parquet", "-o", tmp_path / "no" / "x.parquet"
    )
    assert gone.code == 2
    assert "cannot be written" in gone.err


@pytest.mark.parametrize("format_", ["json", "jsonl", "csv"])
def test_every_reading_command_has_the_machine_formats(
    corpuscope: Any, tiny_index: Path, tiny_suites: Path, write_spec: Any, tmp_path: Path, format_: str
) -> None:
    spec = write_spec(tmp_path)
    commands = [
        ["status", tiny_index],
        ["saes", tiny_suites / "tiny-res"],
        ["plan", spec],
        ["features", tiny_index, SAE],
        ["feature", tiny_index, SAE, tiny.ALWAYS],
    ]
    for command in commands:
        done = corpuscope(*command, "--format", format_)
        assert (done.code, done.err) == (0, ""), command
        if format_ == "json":
            assert all(isinstance(row, dict) for row in done.rows)
        elif format_ == "jsonl":
            assert all(isinstance(json.loads(line), dict) for line in done.out.splitlines())
        else:
            header, *rows = csv.reader(io.StringIO(done.out))
            assert rows
            assert all(len(row) == len(header) for row in rows)
    assert not (tmp_path / "index").exists()  # `plan` writes nothing


def test_a_long_table_is_cut_and_says_so(
    corpuscope: Any, tiny_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "TABLE_ROWS", 5)
    done = corpuscope("sql", tiny_index, "FROM range(6)")
    assert done.out.split() == ["range", "0", "1", "2", "3", "4"]
    assert "--format csv or jsonl gives all" in done.err
    assert corpuscope("sql", tiny_index, "FROM range(5)").err == ""


def test_the_script_gives_the_same_rows_in_any_duckdb(corpuscope: Any, tiny_index: Path) -> None:
    done = corpuscope("sql", tiny_index, "--script")
    assert (done.code, done.err) == (0, "")
    con = duckdb.connect()
    con.execute(done.out)
    for statement in (
        "FROM features ORDER BY ALL",
        "FROM top_contexts ORDER BY ALL",
        "FROM documents ORDER BY ALL",
    ):
        ours = corpuscope("sql", tiny_index, statement, "--format", "json").rows
        plain = con.execute(statement)
        names = [column[0] for column in plain.description]
        assert [list(row) for row in ours] == [names] * len(ours)
        assert [tuple(_listed(v) for v in row.values()) for row in ours] == [
            tuple(_listed(v) for v in row) for row in plain.fetchall()
        ]
    text = "SELECT context_text(context) AS text FROM contexts ORDER BY context LIMIT 5"
    ours = corpuscope("sql", tiny_index, text, "--format", "json").rows
    assert [(row["text"],) for row in ours] == con.execute(text).fetchall()


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_what_keep_left_out_is_refused_by_name(
    tmp_path: Path, write_spec: Any, corpuscope: Any, tiny_suites: Path, tiny_corpus: Path
) -> None:
    keeps = {"tiny-res": "documents", "tiny-mlp": "none", "tiny-att": {"sample": 0.5}}
    spec = write_spec(
        tmp_path,
        corpus={"uri": f"{tiny_corpus}/part_0[0-5].jsonl"},
        saes=[{"uri": str(tiny_suites / suite), "keep": keep} for suite, keep in keeps.items()],
    )
    assert corpuscope("scan", spec, "--executor", "inline").code == 0
    index = tmp_path / "index"

    def ask(view: str, suite: str) -> Done:
        where = f"sae LIKE '{suite}/%'" if suite else "true"
        return corpuscope("sql", index, f"SELECT count(*) AS n FROM {view} WHERE {where}", "--format", "json")

    for view, suites in {"activations": ["tiny-res", "tiny-mlp", "tiny-att", ""],
                         "document_features": ["tiny-mlp", ""]}.items():  # fmt: skip
        for suite in suites:
            done = ask(view, suite)
            assert (done.code, done.out) == (2, ""), (view, suite)
            assert "`keep" in done.err
            assert done.err.count("\n") == 1
    for suite in ("tiny-res", "tiny-att"):
        assert ask("document_features", suite).rows[0]["n"] > 0
    for view in ("features", "top_contexts", "sampled_contexts"):
        assert ask(view, "").rows[0]["n"] > 0
    assert corpuscope("feature", index, SAE, tiny.ALWAYS).code == 0


# --- plan, status, help


def test_plan_says_what_a_scan_would_cost(tmp_path: Path, write_spec: Any, corpuscope: Any) -> None:
    spec = write_spec(tmp_path)
    row = corpuscope("plan", spec, "--format", "json").rows[0]
    assert (row["units"], row["committed"], row["saes"], row["groups"]) == (24, 0, 7, 1)
    assert row["documents"] > 40
    assert row["index_bytes"] == sum(row[name] for name in row if name.startswith("bytes_"))
    assert row["worker_memory"] > 0
    assert row["bottleneck"] == "writing", "seven tiny SAEs behind a tinier model"
    assert (row["device"], row["speed"], row["gpu"]) == ("cpu", "assumed", "H200")
    assert row["wall_seconds"] > row["work_seconds"] > 0
    assert row["gpu_hours"] > 0
    done = corpuscope("plan", spec)
    assert done.err == ""
    for words in (
        "24, 0 of them committed",
        "per worker",
        "max_index_bytes is 1.0 TB",
        "GPU-hours",
        "TFLOP/s",
        "speed: assumed",
    ):
        assert words in done.out
    assert not (tmp_path / "index").exists()


def test_status_of_a_finished_index(corpuscope: Any, tiny_index: Path) -> None:
    out = corpuscope("status", tiny_index).out
    for words in ("complete", "24 of 24 committed, 0 running, 0 waiting, 0 failed", "0 quarantined", "ago"):
        assert words in out
    row = corpuscope("status", tiny_index, "--format", "json").rows[0]
    documents = "SELECT count(*) AS n, sum(n_tokens)::BIGINT AS tokens FROM documents"
    assert corpuscope("sql", tiny_index, documents, "--format", "json").rows == [
        {"n": row["documents"], "tokens": row["tokens"]}
    ]


def test_usage_is_one_line_and_help_is_help(corpuscope: Any) -> None:
    for args in (["nonsense"], ["scan"], ["sql"], ["saes", "x", "--format", "xml"], ["--nope"]):
        done = corpuscope(*args)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), args
    for command in ("scan", "plan", "status", "saes", "sql", "feature", "features"):
        done = corpuscope(command, "--help")
        assert done.code == 0
        assert done.out.startswith(f"Usage: corpuscope {command} ")
    assert "corpuscope" in corpuscope("--version").out
    for group in ([], ["schedule"]):  # without a word there is something to choose from
        done = corpuscope(*group)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(" ".join(["Usage: corpuscope", *group]))
        assert "\n  -h, --help  Show" in done.err
    choices = corpuscope("schedule", "export", "x")
    assert choices.err == (
        "error: Missing option '--format'. Choose from: crontab, systemd, k8s "
        "(see corpuscope schedule export --help)\n"
    )


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "many"])
def test_what_is_no_number_is_wrong_input(
    tmp_path: Path, write_spec: Any, corpuscope: Any, tiny_index: Path, value: str
) -> None:
    spec = write_spec(tmp_path)
    for command in (
        ("plan", spec, "--l0"),
        ("plan", spec, "--tokens-per-second"),
        ("plan", spec, "--price-per-hour"),
        ("scan", spec, "--executor", "inline", "--price-per-hour"),
        ("sql", tiny_index, "SELECT 1", "--timeout"),
        ("gc", tiny_index, "--grace"),
    ):
        done = corpuscope(*command, value)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), command
        assert command[-1] in done.err


def test_a_closed_pipe_is_no_error(tiny_index: Path) -> None:
    command = f"{sys.executable} -m jobs.cli sql {tiny_index} 'FROM range(300000)' --format csv | head -1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=60,
        cwd=ROOT, env=os.environ | {"PYTHONPATH": "."},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "range\n", "")


def test_asking_for_more_contexts_than_were_kept_says_so(
    tiny_index: Path, corpuscope: Callable[..., Done]
) -> None:
    sae = "tiny-res/layer_1/width_37/average_l0_2"
    done = corpuscope("feature", tiny_index, sae, 6, "-k", 50, "--format", "json")
    assert done.code == 0
    kept = len(done.rows[0]["contexts"])
    assert f"note: {kept} contexts are kept of this feature" in done.err
