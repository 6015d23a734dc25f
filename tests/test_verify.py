"""`corpuscope verify`: nothing is found in a healthy index of any kind, and every damage is, by name.

A damage is done to a copy of a small index: where Parquet files are rewritten their records in the commit or
manifest are made to fit, so that only the check that is meant can find it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tiny
from click.testing import CliRunner

from jobs.cli import cli
from pipelines import compaction, gc
from pipelines.audit import audit
from pipelines.executors.base import Committed
from pipelines.findings import Fault, Findings
from pipelines.storage import Store
from queries.verify import verify
from sae_runtime import suites
from sae_runtime.errors import InputError
from sae_runtime.sae import SaeInfo, SaeWeights

FILES = 6
TOKENS = "tiny-res/layer_1/width_37/average_l0_2"
SAMPLED = "tiny-res/layer_3/width_130/average_l0_6"
DOCUMENTS = "tiny-mlp/layer_2/width_37/average_l0_10"
NONE = "tiny-att/layer_1/width_37/average_l0_1"


def small(tiny_suites: Path, tiny_corpus: Path, **overrides: Any) -> dict[str, Any]:
    """A spec's overrides: the first files, one SAE of each `keep`."""
    saes = [
        {"uri": str(tiny_suites / "tiny-res"), "select": "layer_1/width_37/*"},
        {"uri": str(tiny_suites / "tiny-res"), "select": "layer_3/*", "keep": {"sample": 0.5}},
        {"uri": str(tiny_suites / "tiny-mlp"), "select": "*/width_37/*", "keep": "documents"},
        {"uri": str(tiny_suites / "tiny-att"), "select": "layer_1/*", "keep": "none"},
    ]
    corpus = {"uri": [f"{tiny_corpus}/part_{i:02d}.jsonl" for i in range(FILES)]}
    return {"saes": saes, "corpus": corpus, **overrides}


@pytest.fixture(scope="module")
def small_index(
    tmp_path_factory: pytest.TempPathFactory, write_spec: Callable[..., Path],
    scan_inline: Callable[..., Any], tiny_suites: Path, tiny_corpus: Path,
) -> Path:  # fmt: skip
    spec = write_spec(tmp_path_factory.mktemp("verify"), **small(tiny_suites, tiny_corpus))
    assert not scan_inline(spec).failed
    return spec.parent / "index"


@pytest.fixture(scope="module")
def compact_index(tmp_path_factory: pytest.TempPathFactory, small_index: Path) -> Path:
    index = tmp_path_factory.mktemp("compact") / "index"
    shutil.copytree(small_index, index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "PAGES_SHARE", 0)  # so that there are pages
        compaction.compact(Store(str(index)))
    return index


def check(index: Path) -> Findings:
    return verify(str(index))


def found(index: Path) -> list[str]:
    return [f"{fault.file}: {fault.check}: {fault.detail}" for fault in check(index).faults]


# --- healthy ones


@pytest.mark.parametrize("which", ["small_index", "compact_index"])
def test_a_healthy_index_has_no_fault(which: str, request: pytest.FixtureRequest) -> None:
    findings = check(request.getfixturevalue(which))
    assert findings.faults == []
    assert (findings.units, findings.committed, findings.whole) == (FILES, FILES, True)
    assert findings.checks > 60
    assert findings.rows > 15_000


def test_all_rows_are_read_and_all_bytes(small_index: Path) -> None:
    findings = audit(Store(str(small_index)))
    files = list((small_index / "data").rglob("*.parquet"))
    assert findings.bytes == sum(file.stat().st_size for file in files)
    assert findings.rows == sum(pq.read_metadata(file).num_rows for file in files)


def test_signed_saes_and_several_groups(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_suites: Path,
    tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    load = suites.load

    def load_signed(info: SaeInfo) -> SaeWeights:
        return replace(load(info), rule="abstopk", k=5, threshold=None)

    monkeypatch.setattr(suites, "load", load_signed)
    monkeypatch.setattr("pipelines.planning.memory_budget", lambda workers, device: 200_000)
    assert not scan_inline(write_spec(tmp_path, **small(tiny_suites, tiny_corpus))).failed
    assert len(json.loads((tmp_path / "index/index.json").read_text())["groups"]) > 1
    assert found(tmp_path / "index") == []


def test_overlap_parts_of_files_and_loud_tokens(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_suites: Path,
    tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Units that are parts of a file, several runs in a file, small row groups, a sampled source."""
    monkeypatch.setattr("pipelines.unit.CHUNK_TOKENS", {"cpu": 60})
    monkeypatch.setattr("pipelines.unit.SEGMENT_ROWS", 500)
    monkeypatch.setattr("pipelines.planning.UNIT_BYTES", {"cpu": 3000})
    monkeypatch.setattr("pipelines.writer.ROWS_PER_GROUP", 64)
    over = small(tiny_suites, tiny_corpus)
    over["corpus"] |= {"sample": 0.7}
    over["context"] = {"length": 32, "overlap": 5, "exclude": ["special", {"norm_above": 1.3}]}
    assert not scan_inline(write_spec(tmp_path, **over)).failed
    assert found(tmp_path / "index") == []
    compaction.compact(Store(str(tmp_path / "index")))
    assert found(tmp_path / "index") == []


def test_conversations(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_suites: Path,
    tiny_corpus: Path,
) -> None:  # fmt: skip
    """Segments, roles that are not counted; then a segment that is cut short."""
    rows = [
        {"id": str(i), "chat": [{"role": r, "content": "Paris rain " * (i + 20)} for r in ("system", "user")]}
        for i in range(6)
    ]
    tiny.write_rows(tmp_path / "chats.jsonl", rows)
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    over = small(tiny_suites, tiny_corpus, context={"length": 32, "exclude": [{"roles": ["system"]}]})
    over["corpus"] = {"uri": "chats.jsonl", "messages": "chat", "template": "t.jinja", "metadata": []}
    spec = write_spec(tmp_path, **over)
    assert not scan_inline(spec).failed
    index = tmp_path / "index"
    assert found(index) == []

    def shorter(table: pa.Table) -> pa.Table:
        return put(table, 1, "stop", table["stop"][1].as_py() - 1)

    rewrite(index, "segments", 0, shorter)
    assert any("segments: hold every token of their document once" in line for line in found(index))


def test_an_empty_corpus(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any]
) -> None:
    tiny.write_rows(tmp_path / "empty.jsonl", [])
    scan_inline(write_spec(tmp_path, corpus={"uri": "empty.jsonl"}))
    assert found(tmp_path / "index") == []


def test_an_index_that_grew_shrank_and_was_tidied(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_suites: Path,
    tiny_corpus: Path,
) -> None:  # fmt: skip
    """Added, changed, removed and returned files, a document that cannot be read; merged, collected."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in (1, 2, 3, 5):
        shutil.copy(tiny_corpus / f"part_{i:02d}.jsonl", corpus)
    (corpus / "part_02.jsonl").open("a").write("{not json\n")
    over = small(tiny_suites, tiny_corpus)
    over["corpus"] = {"uri": "corpus/*.jsonl"}
    spec, index = write_spec(tmp_path, **over), tmp_path / "index"
    scan_inline(spec)
    assert check(index).faults == []
    shutil.copy(tiny_corpus / "part_00.jsonl", corpus)
    (corpus / "part_05.jsonl").rename(tmp_path / "away.jsonl")
    with (corpus / "part_03.jsonl").open("a") as stream:
        stream.write('{"id": "new", "text": "London river stone light water"}\n')
    scan_inline(spec, allow_removal=True)
    assert found(index) == []
    compaction.compact(Store(str(index)))
    (tmp_path / "away.jsonl").rename(corpus / "part_05.jsonl")
    scan_inline(spec, allow_removal=True)
    assert found(index) == []
    (corpus / "part_01.jsonl").unlink()
    scan_inline(spec, allow_removal=True)
    gc.collect(Store(str(index)), readers=0, unfinished=0)
    assert found(index) == []
    compaction.compact(Store(str(index)))
    gc.collect(Store(str(index)), readers=0, unfinished=0)
    assert found(index) == []


def test_units_that_are_not_committed_yet_are_no_fault(tmp_path: Path, small_index: Path) -> None:
    index = copy(small_index, tmp_path)
    sorted((index / "commits").rglob("*.json"))[2].unlink()
    findings = check(index)
    assert (findings.faults, findings.units, findings.committed) == ([], FILES, FILES - 1)


def test_while_a_scan_runs(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], tiny_suites: Path,
    tiny_corpus: Path,
) -> None:  # fmt: skip
    seen: list[tuple[int, list[str]]] = []

    def observe(event: Any) -> None:
        if isinstance(event, Committed) and len(seen) < 3:
            findings = check(tmp_path / "index")
            seen.append((findings.committed, [str(fault) for fault in findings.faults]))

    scan_inline(write_spec(tmp_path, **small(tiny_suites, tiny_corpus)), observe=observe)
    assert seen == [(1, []), (2, []), (3, [])]


def test_on_another_filesystem(small_index: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.put(str(small_index), "/verify", recursive=True)
    try:
        findings = verify("memory://verify")
        assert (findings.faults, findings.committed) == ([], FILES)
        name = json.loads(commit_of(small_index, 1).read_text())["files"]["saes"]["path"]
        fs.rm_file(f"/verify/{name}")
        assert [fault.check for fault in verify("memory://verify").faults] == ["files are there"]
    finally:
        fs.rm("/verify", recursive=True)


def test_no_index_is_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no index here"):
        verify(str(tmp_path))


# --- damaged ones


def copy(index: Path, folder: Path) -> Path:
    shutil.copytree(index, folder / "index")
    return folder / "index"


def commit_of(index: Path, ordinal: int) -> Path:
    return index / "commits" / "000000" / f"{ordinal:09d}.0.json"


def edit(file: Path, **values: Any) -> None:
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | values))


def data_file(index: Path, kind: str, ordinal: int) -> Path:
    return index / json.loads(commit_of(index, ordinal).read_text())["files"][kind]["path"]


def rewrite(
    index: Path, kind: str, ordinal: int, change: Callable[[pa.Table], pa.Table], sae: str | None = None
) -> None:
    """Change the rows of a unit's file, or those of one SAE in it, and its record in the commit."""
    head = commit_of(index, ordinal)
    record = json.loads(head.read_text())["files"][kind]
    write(index / record["path"], change, sae)
    fit(index, head, record["path"])


def write(file: Path, change: Callable[[pa.Table], pa.Table], sae: str | None) -> None:
    """Row groups stay as they are, but for those that are changed."""
    keyed = "sae" in pq.read_schema(file).names
    old = pq.ParquetFile(file, read_dictionary=["sae"] if keyed else [])
    groups = [old.read_row_group(i) for i in range(old.num_row_groups)]
    mine = [sae is None or group["sae"][0].as_py() == sae for group in groups]
    assert any(mine)
    at = mine.index(True)
    changed = change(
        pa.concat_tables([g for g, own in zip(groups, mine, strict=True) if own]).unify_dictionaries()
    )
    kept = [g for g, own in zip(groups, mine, strict=True) if not own]
    with pq.ParquetWriter(file, changed.schema) as writer:
        for group in [*kept[:at], changed, *kept[at:]]:
            writer.write_table(group.cast(changed.schema), row_group_size=max(1, group.num_rows))


def fit(index: Path, head: Path, path: str) -> None:
    """Make the record of a file, in a commit or manifest, what the file is."""
    data, content = json.loads(head.read_text()), (index / path).read_bytes()
    for records in data["files"].values():
        for record in records if isinstance(records, list) else [records]:
            if record["path"] == path:
                record["rows"] = pq.read_metadata(index / path).num_rows
                record["bytes"] = len(content)
                record["digest"] = hashlib.blake2b(content, digest_size=16).hexdigest()
    head.write_text(json.dumps(data))


def put(table: pa.Table, row: int, column: str, value: Any) -> pa.Table:
    """A table with one value replaced."""
    at = table.schema.get_field_index(column)
    values = table[column].to_pylist()
    values[row] = value
    return table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))


def add(column: str, by: Any, row: int = 0) -> Callable[[pa.Table], pa.Table]:
    return lambda table: put(table, row, column, table[column][row].as_py() + by)


def step(column: str, row: int = 0) -> Callable[[pa.Table], pa.Table]:
    """One bfloat16 number up."""

    def change(table: pa.Table) -> pa.Table:
        bits = np.float32(table[column][row].as_py()).view(np.uint32) + np.uint32(1 << 16)
        return put(table, row, column, float(bits.view(np.float32)))

    return change


def drop(row: int) -> Callable[[pa.Table], pa.Table]:
    return lambda table: pa.concat_tables([table.slice(0, row), table.slice(row + 1)])


def twice(row: int) -> Callable[[pa.Table], pa.Table]:
    return lambda table: pa.concat_tables([table.slice(0, row + 1), table.slice(row)])


def swapped(table: pa.Table) -> pa.Table:
    return table.take([1, 0, *range(2, table.num_rows)])


def in_a_sampled_unit(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    """Change the activations of SAMPLED in the first unit that has some, and more than one document."""

    def damage(index: Path) -> None:
        ordinal = next(o for o, _, _ in candidates(index, "activations", SAMPLED))
        rewrite(index, "activations", ordinal, change, SAMPLED)

    return damage


def rewritten(
    kind: str, change: Callable[[pa.Table], pa.Table], sae: str | None = None, ordinal: int = 3
) -> Callable[[Path], None]:
    return lambda index: rewrite(index, kind, ordinal, change, sae)


def lists(column: str, change: Callable[[list[Any]], None], row: int = 0) -> Callable[[pa.Table], pa.Table]:
    """A list in a row changed in place."""

    def changed(table: pa.Table) -> pa.Table:
        value = table[column][row].as_py()
        change(value)
        return put(table, row, column, value)

    return changed


def flip(at: int) -> Callable[[list[Any]], None]:
    def change(value: list[Any]) -> None:
        value[at] = not value[at]

    return change


def bump(at: int) -> Callable[[list[Any]], None]:
    def change(value: list[Any]) -> None:
        value[at] += 1

    return change


# Damages of files, commits and the registry.


def flip_a_byte(index: Path) -> None:
    file = data_file(index, "activations", 2)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def truncate(index: Path) -> None:
    file = data_file(index, "contexts", 2)
    file.write_bytes(file.read_bytes()[:-7])


def swap_commits(index: Path) -> None:
    one, other = commit_of(index, 1), commit_of(index, 2)
    first, second = one.read_text(), other.read_text()
    one.write_text(second)
    other.write_text(first)


def outside(index: Path) -> None:
    data = json.loads(commit_of(index, 1).read_text())
    data["files"]["saes"]["path"] = "../stolen.parquet"
    commit_of(index, 1).write_text(json.dumps(data))


def more_rows_recorded(index: Path) -> None:
    data = json.loads(commit_of(index, 1).read_text())
    data["files"]["features"]["rows"] += 1
    commit_of(index, 1).write_text(json.dumps(data))


def other_columns(index: Path) -> None:
    rewrite(index, "documents", 1, lambda table: table.rename_columns(["doc", *table.schema.names[1:]]))


def plan_table(index: Path, kind: str, change: Callable[[pa.Table], pa.Table]) -> None:
    [file] = (index / "plans").glob(f"*.{kind}.parquet")
    pq.write_table(change(pq.read_table(file)), file)


def spoil(name: str, text: str) -> Callable[[Path], None]:
    return lambda index: (index / name).write_text(text) and None


FILE_DAMAGES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    # name: (damage, file (its beginning), check)
    "a byte is flipped": (flip_a_byte, "data/activations/", "checksum"),
    "a file is truncated": (truncate, "data/contexts/", "size"),
    "a file is gone": (lambda i: data_file(i, "features", 2).unlink(), "data/features/", "files are there"),
    "a commit is no JSON": (
        spoil("commits/000000/000000001.0.json", "{"),
        "commits/",
        "commits are readable",
    ),
    "a commit lacks a key": (
        spoil("commits/000000/000000001.0.json", "{}"),
        "commits/",
        "commits are readable",
    ),
    "a commit counts in words": (
        lambda i: edit(commit_of(i, 1), contexts="two"),
        "commits/",
        "commits are readable",
    ),
    "a document is not accounted for": (
        lambda i: edit(commit_of(i, 1), documents=1),
        "commits/000000/000000001",
        "documents read = indexed + quarantined",
    ),
    "more contexts are counted": (lambda i: edit(commit_of(i, 1), contexts=99), "commits/", "counts"),
    "more tokens are counted than run": (
        lambda i: edit(commit_of(i, 1), tokens=1 << 20),
        "commits/",
        "counts",
    ),
    "commits are swapped": (swap_commits, "commits/000000/000000001", "commits are readable"),
    "a commit of no unit": (
        lambda i: shutil.copy(commit_of(i, 1), commit_of(i, 77)),
        "commits/000000/000000077",
        "commits lie where they belong",
    ),
    "a commit in another folder": (
        lambda i: shutil.copytree(i / "commits/000000", i / "commits/000001"),
        "commits/000001/",
        "commits lie where they belong",
    ),
    "a commit of another unit's id": (
        lambda i: edit(commit_of(i, 1), unit="ab" * 12),
        "commits/",
        "commits are of their unit",
    ),
    "a commit of another run": (
        lambda i: edit(commit_of(i, 1), run=7),
        "commits/",
        "commits are of their unit",
    ),
    "a path outside": (outside, "commits/000000/000000001", "commits are readable"),
    "more rows are recorded": (more_rows_recorded, "data/features/", "rows"),
    "a column has another name": (other_columns, "data/documents/", "columns"),
    "a plan is gone": (
        lambda i: (i / "plans/000000.json").rename(i / "plans/000001.json"),
        "plans",
        "plans are numbered",
    ),
    "a plan is no JSON": (spoil("plans/000000.json", "["), "plans/000000", "plans are readable"),
    "a plan has another number": (
        lambda i: edit(i / "plans/000000.json", run=3),
        "plans/000000",
        "plans are numbered",
    ),
    "a unit has other rows": (
        lambda i: plan_table(i, "units", add("stop", -1)),
        "plans/000000",
        "units are what they say",
    ),
    "a file has fewer rows": (
        lambda i: plan_table(i, "files", add("rows", -1)),
        "plans/000000",
        "units are what they say",
    ),
    "an ordinal is given twice": (
        lambda i: plan_table(i, "units", add("ordinal", -1, 2)),
        "plans/000000",
        "ordinals",
    ),
    "a unit is dropped that is not there": (
        lambda i: edit(i / "plans/000000.json", dropped=[[70, 71]]),
        "plans/000000",
        "dropped units",
    ),
    "index.json is no JSON": (spoil("index.json", "{"), "index.json", "identity"),
    "index.json is gone": (lambda i: (i / "index.json").unlink(), "index.json", "identity"),
    "index.json has other SAEs": (
        lambda i: edit(i / "index.json", groups=[[TOKENS]]),
        "index.json",
        "identity",
    ),
    "the vocabulary is gone": (lambda i: (i / "vocabulary.parquet").unlink(), "vocabulary", "vocabulary"),
}


@pytest.mark.parametrize("name", FILE_DAMAGES)
def test_damaged_files_are_named(name: str, tmp_path: Path, small_index: Path) -> None:
    damage, file, wanted = FILE_DAMAGES[name]
    index = copy(small_index, tmp_path)
    damage(index)
    faults = audit(Store(str(index)), quick=True).faults
    assert any(f.file.startswith(file) and f.check == wanted for f in faults), faults


# Damages of rows that a file shows by itself.


def of_another_unit(column: str) -> Callable[[pa.Table], pa.Table]:
    return lambda table: put(table, table.num_rows - 1, column, table[column][-1].as_py() + (1 << 40))


ROW_DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "an activation twice": (rewritten("activations", twice(5), TOKENS), "activations: order"),
    "activations out of order": (rewritten("activations", swapped, TOKENS), "activations: order"),
    "NaN": (
        rewritten("activations", lambda t: put(t, 3, "activation", float("nan")), TOKENS),
        "activations: values",
    ),
    "zero": (rewritten("activations", lambda t: put(t, 3, "activation", 0.0), TOKENS), "activations: values"),
    "no bfloat16": (
        rewritten("activations", lambda t: put(t, 3, "activation", 1.0001), TOKENS),
        "activations: values",
    ),
    "a feature too many": (
        rewritten("activations", lambda t: put(t, t.num_rows - 1, "feature", 37), TOKENS),
        "activations: keys",
    ),
    "of another unit": (rewritten("activations", of_another_unit("token"), TOKENS), "activations: keys"),
    "a NULL": (rewritten("documents", lambda t: put(t, 0, "source", None)), "documents: values"),
    "a document twice": (rewritten("documents", twice(0)), "documents: order"),
    "a context twice": (rewritten("contexts", twice(0)), "contexts: order"),
    "BOS is counted": (rewritten("contexts", lists("counted", flip(0))), "contexts: counts"),
    "a token without a spelling": (
        rewritten("contexts", lists("tokens", lambda tokens: tokens.__setitem__(1, 9999))),
        "contexts: keys",
    ),
    "a mark is missing": (rewritten("contexts", lists("counted", list.pop)), "contexts: counts"),
    "a document's row twice": (
        rewritten("document_features", twice(0), DOCUMENTS),
        "document_features: order",
    ),
    "no active token": (
        rewritten("document_features", lambda t: put(t, 0, "n_tokens", 0), DOCUMENTS),
        "document_features: counts",
    ),
    "a histogram's count": (
        rewritten("features", lists("bin_tokens", bump(0)), NONE, 0),
        "features: counts",
    ),
    "more documents than contexts": (
        rewritten("features", add("n_documents", 50), NONE, 0),
        "features: counts",
    ),
    "a window without its middle": (
        rewritten("top_contexts", lists("offsets", bump(0)), NONE, 0),
        "top_contexts: windows",
    ),
    "a window where rows are kept": (
        rewritten("top_contexts", lambda t: put(t, 0, "offsets", [0]), TOKENS),
        "top_contexts: windows",
    ),
    "another stratum": (
        rewritten("sampled_contexts", add("stratum", -9), NONE, 0),
        "sampled_contexts: values",
    ),
    "no size of a stratum": (
        rewritten("sampled_contexts", lambda t: put(t, 0, "population", 0), NONE, 0),
        "sampled_contexts: counts",
    ),
    "more sampled than counted": (rewritten("saes", add("sample_tokens", 1 << 20)), "saes: counts"),
}


@pytest.mark.parametrize("name", ROW_DAMAGES)
def test_damaged_rows_are_named(name: str, tmp_path: Path, small_index: Path) -> None:
    damage, wanted = ROW_DAMAGES[name]
    index = copy(small_index, tmp_path)
    damage(index)
    findings = audit(Store(str(index)))
    assert wanted in [fault.check for fault in findings.faults], findings.faults
    # Tables can be compared all the same (of a scan's rows, only counts in the commit may differ).
    assert findings.whole


# Damages that only tables together show. They are done to one index, each to what the others leave alone,
# and looked for at once: one comparison takes as long as another.


@dataclass(frozen=True)
class Seen:
    table: str
    check: str
    detail: str = ""

    def among(self, faults: list[Fault]) -> bool:
        return any(
            fault.file == self.table and fault.check == self.check and self.detail in fault.detail
            for fault in faults
        )


def uncounted(table: pa.Table) -> pa.Table:
    """The last token of the first context is not counted."""
    return lists("counted", flip(-1))(table)


def higher(table: pa.Table) -> pa.Table:
    """Every row's activation eight times as high, in the middle of its window too."""
    for row in range(table.num_rows):
        value = table["activation"][row].as_py()
        middle = table["offsets"][row].as_py().index(0)
        table = lists("values", lambda values, at=middle, v=value: values.__setitem__(at, 8 * v), row)(table)
        table = put(table, row, "activation", 8 * value)
    return table


TOP, DRAWN = f"top_contexts of {TOKENS}", f"sampled_contexts of {TOKENS}"
TABLE_DAMAGES: list[tuple[str, list[Callable[[Path], None]], list[Seen]]] = [
    (
        "documents and contexts",
        [
            rewritten("documents", add("row", 1), ordinal=0),
            rewritten("contexts", uncounted, ordinal=2),
            rewritten("contexts", add("start", 1, -1), ordinal=0),
            rewritten("contexts", add("place_hash", 1), ordinal=1),
            rewritten("contexts", add("first", 1), ordinal=4),
            rewritten("documents", lambda t: put(t, 0, "run", 2), ordinal=5),
            lambda index: edit(
                commit_of(index, 3), tokens=json.loads(commit_of(index, 3).read_text())["tokens"] - 1
            ),
        ],
        [
            Seen("documents", "read = indexed + quarantined, each row once"),
            Seen("documents", "are of their unit", "run 2"),
            Seen("documents", "are as many as were committed", "unit 3"),
            Seen("contexts", "count what documents count"),
            Seen("contexts", "hold every token of their document once"),
            Seen("contexts", "have the hash of their place"),
            Seen("contexts", "begin as the settings say"),
            Seen(f"activations of {TOKENS}", "are at counted tokens"),
            Seen(f"saes of {NONE}", "counts are those of documents and features"),
        ],
    ),
    (
        "rows that are left out",
        [
            rewritten("activations", drop(1), TOKENS),
            rewritten("document_features", drop(1), DOCUMENTS),
            in_a_sampled_unit(drop(0)),
            rewritten("sampled_contexts", drop(1), NONE, 0),
        ],
        [
            Seen(f"document_features of {TOKENS}", "are recomputed from activations"),
            Seen(f"features of {TOKENS}", "are recomputed from activations"),
            Seen(f"features of {TOKENS}", "histograms are recomputed from activations"),
            Seen(f"document_features of {DOCUMENTS}", "add up to features"),
            Seen(f"document_features of {SAMPLED}", "are recomputed from activations"),
        ],
    ),
    (
        "values that are changed by one step",
        [
            rewritten("activations", step("activation", 2), TOKENS),
            in_a_sampled_unit(step("activation")),
            rewritten("document_features", add("sum", 1e-3, 7), DOCUMENTS),
            rewritten("features", step("max"), NONE, 0),
            rewritten("saes", lambda t: put(t, 3, "n_active", 1)),
            rewritten("top_contexts", add("ending", 1), NONE, 0),
        ],
        [
            Seen(f"document_features of {TOKENS}", "are recomputed from activations"),
            Seen(f"features of {TOKENS}", "are recomputed from activations", "sums differ"),
            Seen(f"document_features of {SAMPLED}", "are recomputed from activations"),
            Seen(f"document_features of {DOCUMENTS}", "add up to features"),
            Seen(f"top_contexts of {NONE}", "have the hash of their ending"),
        ],
    ),
    (
        "summaries of SAEs whose rows are not kept",
        [
            rewritten("top_contexts", lambda t: put(t, 0, "position", 0), DOCUMENTS, 0),
            rewritten("sampled_contexts", lambda t: put(t, 0, "position", 0), NONE, 0),
            rewritten("top_contexts", higher, DOCUMENTS, 2),
            rewritten("document_features", add("n_tokens", 10_000, 3), DOCUMENTS, 0),
        ],
        [
            Seen(f"top_contexts of {DOCUMENTS}", "are at counted tokens"),
            Seen(f"windows of {DOCUMENTS}", "are at counted tokens"),
            Seen(f"sampled_contexts of {NONE}", "are at counted tokens"),
            Seen(f"top_contexts of {DOCUMENTS}", "are the documents' maxima"),
            Seen(f"document_features of {DOCUMENTS}", "are of documents with that many tokens"),
        ],
    ),
    (
        "sums by the last bit",
        [rewritten("features", add("squares_low", 1, 9), TOKENS, 0)],
        [Seen(f"features of {TOKENS}", "are recomputed from activations", "sums differ")],
    ),
]


@pytest.mark.parametrize("case", TABLE_DAMAGES, ids=[case[0] for case in TABLE_DAMAGES])
def test_damaged_tables_are_named(
    case: tuple[str, list[Callable[[Path], None]], list[Seen]], tmp_path: Path, small_index: Path
) -> None:
    index = copy(small_index, tmp_path)
    for damage in case[1]:
        damage(index)
    faults = check(index).faults
    missing = [seen for seen in case[2] if not seen.among(faults)]
    assert not missing, faults


def candidates(index: Path, kind: str, sae: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(ordinal, row among the SAE's, row) of all partials."""
    for ordinal in range(FILES):
        head = json.loads(commit_of(index, ordinal).read_text())
        if kind in head["files"]:
            table = pq.read_table(index / head["files"][kind]["path"])
            rows = table.filter(pc.equal(table["sae"].cast(pa.string()), sae)).to_pylist()
            yield from ((ordinal, number, row) for number, row in enumerate(rows))


def test_tops_and_samples_that_are_not_the_right_ones_are_named(
    tmp_path: Path, small_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best context left out, another position, a population and a lot that are wrong."""
    monkeypatch.setattr("queries.verify._EXAMPLES", 99)
    index = copy(small_index, tmp_path)
    best: dict[int, tuple[int, int, dict[str, Any]]] = {}
    for item in candidates(index, "top_contexts", TOKENS):
        feature, value = item[2]["feature"], item[2]["activation"]
        if feature not in best or value > best[feature][2]["activation"]:
            best[feature] = item
    (ordinal, row, lost), (other, at, moved) = best[9], best[11]
    assert ordinal != other or row > at
    rewrite(index, "top_contexts", ordinal, drop(row), TOKENS)
    rewrite(index, "top_contexts", other, add("position", -1, at), TOKENS)
    samples = list(candidates(index, "sampled_contexts", TOKENS))
    populated = next(item for item in samples if item[2]["population"] and item[2]["feature"] == 12)
    rewrite(index, "sampled_contexts", populated[0], add("population", 1, populated[1]), TOKENS)
    drawn = next(item for item in samples if not item[2]["population"] and item[2]["feature"] == 14)
    rewrite(index, "sampled_contexts", drawn[0], drop(drawn[1]), TOKENS)
    faults = check(index).faults
    context = lost["context"]
    wanted = [
        Seen(TOP, "begin with the features' maxima", "feature 9:"),
        Seen(TOP, "are recomputed from activations", f"feature 9, rank 1: context {context} "),
        Seen(
            TOP,
            "are recomputed from activations",
            f"not {moved['context']} position {moved['position'] - 1} ",
        ),
        Seen(DRAWN, "strata hold all contexts of a feature", "feature 12"),
        Seen(DRAWN, "are recomputed from activations", f"feature 14, stratum {drawn[2]['stratum']}"),
    ]
    assert not [seen for seen in wanted if not seen.among(faults)], faults


# Damages of what compaction made.


def manifest_of(index: Path, kind: str) -> tuple[Path, str]:
    for head in sorted((index / "manifests").glob("*.json")):
        for records in json.loads(head.read_text())["files"].get(kind, []):
            return head, records["path"]
    raise AssertionError(kind)


def rewrite_merged(
    index: Path, kind: str, change: Callable[[pa.Table], pa.Table], sae: str | None = None
) -> None:
    head, path = manifest_of(index, kind)
    write(index / path, change, sae)
    fit(index, head, path)


def edit_manifest(index: Path, beginning: str, **values: Any) -> None:
    [head] = (index / "manifests").glob(f"{beginning}-*.json")
    edit(head, **values)


MERGED_DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "facts of a unit": (lambda i: rewrite_merged(i, "units", add("tokens", 1)), "what runs know of units"),
    "a commit is gone": (lambda i: commit_of(i, 2).unlink(), "runs hold committed units"),
    "a manifest is gone": (lambda i: next((i / "manifests").glob("run-*")).unlink(), "files are there"),
    "a manifest is no JSON": (
        lambda i: next((i / "manifests").glob("node-*")).write_text("!"),
        "manifests are readable",
    ),
    "a snapshot is no JSON": (
        lambda i: max((i / "snapshots").rglob("*.json")).write_text("!"),
        "snapshots are readable",
    ),
    "a run of fewer units": (lambda i: edit_manifest(i, "run", units=[[0, 3]]), "what runs know of units"),
    "a unit that is not given up": (lambda i: edit_manifest(i, "run", gone=[[2, 3]]), "runs are apart"),
    "a child that is gone": (
        lambda i: edit_manifest(i, "node", children=["manifests/x.json"]),
        "files are there",
    ),
    "rows out of order": (lambda i: rewrite_merged(i, "activations", swapped, TOKENS), "activations: order"),
    "a document out of order": (
        lambda i: rewrite_merged(i, "by_document", lambda t: t.take([*range(1, t.num_rows), 0])),
        "by_document: order",
    ),
    "ranks out of order": (lambda i: rewrite_merged(i, "pages", swapped, TOKENS), "pages: order"),
    "a rank of nobody": (lambda i: rewrite_merged(i, "pages", add("rank", -1), TOKENS), "pages: counts"),
    "a window that is not there": (
        lambda i: rewrite_merged(i, "pages", lambda t: put(t, 0, "offsets", None), TOKENS),
        "pages: windows",
    ),
    "a token of no vocabulary": (
        lambda i: rewrite_merged(i, "pages", lambda t: put(t, 0, "tokens", [1 << 30]), TOKENS),
        "pages: values",
    ),
    "tokens from elsewhere": (
        lambda i: rewrite_merged(i, "pages", add("first", 1), TOKENS),
        "pages: windows",
    ),
}


@pytest.mark.parametrize("name", MERGED_DAMAGES)
def test_damage_of_merged_files_is_named(name: str, tmp_path: Path, compact_index: Path) -> None:
    damage, wanted = MERGED_DAMAGES[name]
    index = copy(compact_index, tmp_path)
    damage(index)
    faults = audit(Store(str(index))).faults
    assert wanted in [fault.check for fault in faults], faults


def test_merged_tables_that_differ_are_named(tmp_path: Path, compact_index: Path) -> None:
    index = copy(compact_index, tmp_path)
    rewrite_merged(index, "by_document", drop(3))
    rewrite_merged(index, "sampled_merged", add("hash", 1), NONE)
    rewrite_merged(index, "pages", add("document", 1), TOKENS)
    faults = check(index).faults
    assert Seen("by_document", "has the rows of document_features").among(faults)
    assert Seen(f"pages of {TOKENS}", "have what the views show").among(faults)
    assert Seen(f"sampled_contexts of {NONE}", "have their hash").among(faults)


# --- the command


def test_the_command(tmp_path: Path, small_index: Path) -> None:
    run = CliRunner().invoke
    whole = run(cli, ["verify", str(small_index)])
    assert (whole.exit_code, whole.stdout) == (0, "")
    assert "6 of 6 units read" in whole.stderr
    assert whole.stderr.endswith("is sound\n")
    index = copy(small_index, tmp_path)
    flip_a_byte(index)
    broken = run(cli, ["verify", "--quick", str(index)])
    assert broken.exit_code == 1
    assert broken.stdout.startswith("data/activations/")
    assert "checksum" in broken.stdout
    assert len(broken.stdout.splitlines()) == 1
    listed = run(cli, ["verify", str(index), "--format", "json"])
    assert listed.exit_code == 1
    [fault] = json.loads(listed.stdout)
    assert list(fault) == ["file", "check", "detail"]
    assert "1 fault" in listed.stderr


def test_a_quick_check_reads_without_pyarrows_datasets(tmp_path: Path, few_index: Path) -> None:
    """Their threads may outlive a read, and abort a process that ends just then."""
    index = Path(shutil.copytree(few_index, tmp_path / "index"))
    code = (
        "import sys; from pipelines.audit import audit; from pipelines.compaction import compact;"
        "from pipelines.storage import Store; store = Store(sys.argv[1]);"
        "assert compact(store).runs and not audit(store, quick=True).faults;"
        "print('pyarrow.dataset' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(index)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
