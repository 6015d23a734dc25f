"""S3 by its own protocol: s3fs over HTTP to a moto server on loopback, compared with local disk.

The undisturbed index is on local disk; the same scan with corpus and index in a bucket must give its rows.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from click.testing import CliRunner
from forks import fork

from pipelines import compaction
from pipelines.contents import contents
from pipelines.retries import Patience
from pipelines.storage import Store
from sae_runtime.errors import CorpuscopeError, InputError

_REASON = "needs moto[server] and s3fs, which the dev group installs"
moto_server = pytest.importorskip("moto.server", reason=_REASON, exc_type=ImportError)
s3fs = pytest.importorskip("s3fs", reason=_REASON, exc_type=ImportError)

from pipelines.s3 import PatientS3  # noqa: E402

UNITS = 12
BUCKET = "bucket"
INDEX = f"s3://{BUCKET}/index"


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A bucket on a server of this module's own, and s3fs configured for it by environment alone."""
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, os.devnull)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "HTTP_PROXY", "http_proxy"):
            patch.delenv(name, raising=False)
        PatientS3.clear_instance_cache()
        fs = s3fs.S3FileSystem()
        fs.mkdir(BUCKET)
        yield fs
    PatientS3.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="module")
def s3_corpus(s3: Any, tiny_corpus: Path) -> str:
    """Glob over half of the tiny corpus, in the bucket."""
    for file in sorted(tiny_corpus.iterdir())[:UNITS]:
        s3.pipe_file(f"{BUCKET}/corpus/{file.name}", file.read_bytes())
    return f"s3://{BUCKET}/corpus/*.jsonl"


@pytest.fixture(scope="module")
def s3_spec(
    s3_corpus: str,
    write_spec: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    few: list[dict[str, str]],
) -> Path:
    folder = tmp_path_factory.mktemp("s3")
    return write_spec(folder, corpus={"uri": s3_corpus}, index=f"s3://{BUCKET}/index", saes=few)


@pytest.fixture(scope="module")
def local_index(
    tiny_corpus: Path,
    write_spec: Callable[..., Path],
    scan_inline: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
    few: list[dict[str, str]],
) -> Path:
    """The same on local disk."""
    files = [str(file) for file in sorted(tiny_corpus.iterdir())[:UNITS]]
    spec = write_spec(tmp_path_factory.mktemp("local"), corpus={"uri": files}, saes=few)
    assert scan_inline(spec).items == UNITS
    return spec.parent / "index"


@pytest.fixture(scope="module")
def orphans(s3: Any, s3_spec: Path, local_index: Path) -> set[str]:
    """Data files of a scan that ended at the worst moment: a unit's data written, its commit not."""
    scan = [["scan", str(s3_spec), "--executor", "inline"]]
    crashed = fork(s3_spec.parent / "logs", scan, 32, "before-commit")
    assert crashed.wait() == 137, crashed.log.read_text()
    shown = tiny.views(INDEX)
    assert [len(shown[view]) for view in ("documents", "contexts", "activations")] == [0, 0, 0]
    assert Store(INDEX).entries("commits") == []
    return set(objects(s3, "index/data"))


@pytest.fixture(scope="module")
def s3_index(s3_spec: Path, orphans: set[str], scan_inline: Callable[..., Any]) -> str:
    """The crashed scan, resumed."""
    outcome = scan_inline(s3_spec)
    assert (outcome.items, outcome.failed) == (UNITS, ())
    return INDEX


@pytest.fixture(scope="module")
def s3_views(s3_index: str) -> dict[str, list[tuple[Any, ...]]]:
    return tiny.views(s3_index)


def objects(s3: Any, folder: str) -> dict[str, tuple[str, Any]]:
    """ETag and time of every object."""
    s3.invalidate_cache()
    found = s3.find(f"{BUCKET}/{folder}", detail=True)
    return {path: (info["ETag"], info["LastModified"]) for path, info in found.items()}


def test_a_crashed_and_resumed_scan_from_bucket_to_bucket_has_the_rows_of_local_disk(
    s3: Any, s3_views: dict[str, list[tuple[Any, ...]]], local_index: Path, orphans: set[str]
) -> None:
    assert not tiny.differences(tiny.views(local_index), s3_views)
    assert orphans
    assert orphans < set(objects(s3, "index/data")), "workers never delete; gc does"


def test_it_is_read_without_duckdb_extensions_for_http(s3_index: str) -> None:
    import queries

    con = queries.connect(s3_index)
    assert con.sql("SELECT count(*) > 0 FROM activations").fetchall() == [(True,)]
    settings = "SELECT count(*) FROM duckdb_settings() WHERE name LIKE 's3\\_%' ESCAPE '\\'"
    assert con.sql(settings).fetchall() == [(0,)]  # those that httpfs brings


def test_a_feature_reads_only_its_row_groups(
    s3: Any, tiny_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes asked of S3 for one feature's activations: the footers, and the columns of row groups with it."""
    import queries
    import queries.files

    for module in ("pipelines.merge_rows.ROWS_PER_GROUP", "pipelines.merge_rows._DOCUMENT_ROWS"):
        monkeypatch.setattr(module, 256)
    monkeypatch.setattr("queries.files.SMALL", 0)
    local = tmp_path / "index"
    shutil.copytree(tiny_index, local)
    compaction.compact(Store(str(local)))
    s3.put(f"{local}/", f"{BUCKET}/ranges/", recursive=True)
    asked: dict[str, int] = {}
    read = Store.read_range

    def counted(self: Store, name: str, start: int, stop: int) -> bytes:
        kind = name.split("/")[1]
        asked[kind] = asked.get(kind, 0) + stop - start
        return read(self, name, start, stop)

    con = queries.connect(f"s3://{BUCKET}/ranges")
    monkeypatch.setattr(Store, "read_range", counted)
    sae, feature = con.execute(
        "SELECT sae, feature FROM features WHERE n_tokens BETWEEN 50 AND 300 ORDER BY n_tokens LIMIT 1"
    ).fetchall()[0]
    asked.clear()
    found = con.execute(
        "SELECT sum(activation), count(*) FROM activations WHERE sae = $1 AND feature = $2", [sae, feature]
    ).fetchall()
    assert found[0][1] >= 50
    (record,) = contents(Store(str(local))).files("activations")
    file = local / record.path
    metadata = pq.ParquetFile(file).metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    wanted = [
        group
        for group in groups
        if group.column(0).statistics.min == sae
        and group.column(1).statistics.min <= feature <= group.column(1).statistics.max
    ]
    assert 0 < len(wanted) < len(groups) / 20
    columns = sum(group.column(i).total_compressed_size for group in wanted for i in range(4))
    footer = metadata.serialized_size + 8
    assert set(asked) == {"activations"}
    assert asked["activations"] <= columns + 2 * (footer + 2 * 8) + 4096 * 5 * len(wanted)
    assert asked["activations"] < file.stat().st_size / 3


def test_again_is_a_no_op(
    s3: Any, s3_spec: Path, s3_index: str, scan_inline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("pipelines.unit.LanguageModel", refuse)
    before = objects(s3, "index")
    assert scan_inline(s3_spec).items == 0
    assert objects(s3, "index") == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("sql", "INDEX", "SELECT * FROM features ORDER BY ALL"),
        ("feature", "INDEX", tiny.SAES[5].path, "9"),
        ("features", "INDEX", tiny.SAES[5].path, "--limit", "5"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_answer_as_on_local_disk(
    s3_index: str, local_index: Path, arguments: tuple[str, ...]
) -> None:
    assert command(s3_index, *arguments) == command(str(local_index), *arguments) != []


def test_status_is_that_of_local_disk(s3_index: str, local_index: Path) -> None:
    found, wanted = command(s3_index, "status", "INDEX")[0], command(str(local_index), "status", "INDEX")[0]
    assert found.pop("index") == s3_index
    assert found["state"] == "complete"
    for each in (found, wanted):
        each.pop("index", None), each.pop("last_commit"), each.pop("bytes")
        ran = each.pop("last_run")  # by two scans, of two paces
        each["last_run"] = {name: ran[name] for name in ("run", "committed", "documents", "tokens", "rows")}
    assert found == wanted


def command(index: str, *arguments: str) -> list[dict[str, Any]]:
    """What a command prints as JSON, with INDEX filled in."""
    from jobs.cli import cli

    filled = [index if argument == "INDEX" else argument for argument in arguments]
    ran = CliRunner().invoke(cli, [*filled, "--format", "json"], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return list(json.loads(ran.stdout))


def test_an_index_moved_to_local_disk_is_the_same(
    s3: Any, s3_views: dict[str, list[tuple[Any, ...]]], tmp_path: Path
) -> None:
    s3.get(f"{BUCKET}/index/", f"{tmp_path}/moved/", recursive=True)
    assert not tiny.differences(s3_views, tiny.views(tmp_path / "moved"))


def test_compacted_and_collected_it_has_the_same_rows(
    s3: Any, s3_views: dict[str, list[tuple[Any, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import compaction, gc

    monkeypatch.setattr(compaction, "FAN", 4)
    s3.invalidate_cache()
    s3.copy(f"{BUCKET}/index/", f"{BUCKET}/compacted/", recursive=True)
    index = f"s3://{BUCKET}/compacted"
    done = compaction.compact(Store(index))
    assert (done.runs, done.nodes) == (4, 4)
    assert not tiny.differences(s3_views, tiny.views(index))
    before = len(objects(s3, "compacted/data"))
    gone = gc.collect(Store(index), 0, 0)
    assert 0 < len(objects(s3, "compacted/data")) < before
    assert gone.waiting == 0
    assert not tiny.differences(s3_views, tiny.views(index))


def test_keys_and_changes(
    s3: Any, tmp_path: Path, tiny_corpus: Path, write_spec: Callable[..., Path],
    scan_inline: Callable[..., Any],
) -> None:  # fmt: skip
    """Keys that a URL would escape; a folder's marker; an ETag tells a change that size does not."""
    import queries

    names = ["a/b c.jsonl", "a/é[1]#+%41&=.jsonl", "a/z.jsonl"]
    for name, file in zip(names, sorted(tiny_corpus.iterdir()), strict=False):
        s3.pipe_file(f"{BUCKET}/keys/{name}", file.read_bytes())
    s3.pipe_file(f"{BUCKET}/keys/a/", b"")
    index = f"s3://{BUCKET}/keys index"
    spec = write_spec(tmp_path, corpus={"uri": f"s3://{BUCKET}/keys/**/*.jsonl"}, index=index)
    assert scan_inline(spec).items == 3
    documents = "SELECT DISTINCT source FROM documents ORDER BY 1"
    assert queries.connect(index).sql(documents).fetchall() == [(name,) for name in sorted(names)]
    path = f"{BUCKET}/keys/{names[-1]}"
    s3.pipe_file(path, s3.cat_file(path).replace(b"e", b"o", 1))
    assert scan_inline(spec, allow_removal=True).items == 1


# --- the storage door


def test_of_fifty_writers_one_wins(s3: Any) -> None:
    for turn in range(3):
        name, barrier = f"commits/{turn}.json", threading.Barrier(50)

        def race(i: int, name: str = name, barrier: threading.Barrier = barrier) -> tuple[bool, bytes, bytes]:
            store, data = Store(f"s3://{BUCKET}/race"), f"racer {i} ".encode() * 500
            barrier.wait()
            return store.put_if_absent(name, data), data, store.read(name)

        with ThreadPoolExecutor(50) as pool:
            results = list(pool.map(race, range(50)))
        winners = [data for won, data, _ in results if won]
        assert len(winners) == 1
        assert {read for _, _, read in results} == {winners[0]}
    assert Store(f"s3://{BUCKET}/race").entries("commits") == [f"{turn}.json" for turn in range(3)]


def test_an_s3fs_that_would_overwrite_is_refused(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2024.12 it took `mode="create"` among its `kwargs` and dropped it."""

    async def old(self: Any, path: str, data: bytes, chunksize: int = 1, **kwargs: Any) -> None:
        raise AssertionError("written")

    monkeypatch.setattr(s3fs.S3FileSystem, "_pipe_file", old)
    with pytest.raises(InputError, match="s3fs is too old"):
        Store(f"s3://{BUCKET}/old").put_if_absent("a", b"1")


def test_threads_share_a_file(s3: Any) -> None:
    """As DuckDB does; every read is of the place that its own thread sought."""
    from queries.files import SMALL, IndexFiles, url

    data = random.Random(0).randbytes(3 * SMALL)
    store = Store(f"s3://{BUCKET}/shared")
    for name, size in (("large", 3 * SMALL), ("small", SMALL)):
        store.write(name, data[:size])
        with IndexFiles([store], {}).open(url(0, name)) as stream:

            def read(seed: int, stream: Any = stream, size: int = size) -> bool:
                rng = random.Random(seed)
                for _ in range(15):
                    start = stream.seek(rng.randrange(size))
                    if (stream.read(1000), stream.read(7)) != (
                        data[start : min(size, start + 1000)],
                        data[start + 1000 : min(size, start + 1007)],
                    ):
                        return False
                return True

            with ThreadPoolExecutor(8) as pool:
                assert all(pool.map(read, range(8)))


# --- what a user can get wrong


def test_a_missing_bucket_is_named(s3_spec: Path, scan_inline: Callable[..., Any]) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        scan_inline(s3_spec, "s3://no-such-bucket/index")
    assert missing.value.filename.startswith("s3://no-such-bucket/index/")
    assert missing.value.strerror == "The specified bucket does not exist"
    with pytest.raises(CorpuscopeError, match="s3://no-such-bucket/index"):
        command_error("status", "s3://no-such-bucket/index")


@pytest.mark.parametrize(
    ("variables", "kind"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, ConnectionError),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, PermissionError),
    ],
    ids=["no server", "no credentials"],
)
def test_no_way_to_the_index_is_one_line(
    s3: Any, variables: dict[str, str], kind: type[OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(PatientS3, "patience", Patience(unproven=1.0))
    PatientS3.clear_instance_cache()
    try:
        with pytest.raises(kind, match=INDEX) as failed:
            command_error("status", INDEX)
    finally:
        PatientS3.clear_instance_cache()
    assert "\n" not in str(failed.value)


def command_error(*arguments: str) -> None:
    from jobs.cli import cli

    cli.main(list(arguments), standalone_mode=False)


def test_a_suite_in_a_bucket_is_listed_by_range_and_copied_once(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_runtime import suites, weights

    monkeypatch.setenv("CORPUSCOPE_CACHE", str(tmp_path / "cache"))
    path = "layer_2/width_8k/average_l0_5"
    file = tmp_path / "params.npz"
    uri = f"s3://{BUCKET}/suites/my-res"

    def put(value: float) -> None:
        shapes = {"W_enc": (64, 4096), "W_dec": (4096, 64), "b_enc": 4096, "b_dec": 64, "threshold": 4096}
        np.savez(file, **{name: np.full(shape, value, np.float32) for name, shape in shapes.items()})
        s3fs.S3FileSystem(skip_instance_cache=True).put(str(file), f"{uri}/{path}/params.npz")

    put(1.0)
    ranges: list[int] = []
    fetch = s3fs.core.S3File._fetch_range

    def counted(self: Any, start: int, end: int) -> bytes:
        ranges.append(end - start)
        found: bytes = fetch(self, start, end)
        return found

    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", counted)
    (info,) = suites.find(uri)
    assert (info.id, info.d_in, info.width) == (f"my-res/{path}", 64, 4096)
    assert 0 < sum(ranges) < 14_000
    assert weights.read(info.uri, ["b_dec"])["b_dec"].tolist() == [1.0] * 64
    assert sum(ranges) < 28_000
    copies = tmp_path / "cache" / "copies"
    assert not copies.exists()
    for value, count in ((1.0, 1), (1.0, 1), (2.0, 2), (2.0, 2)):
        if value == 2.0 and len(list(copies.rglob("params.npz"))) == 1:
            put(2.0)  # by somebody else: this process remembers what it listed
        assert (suites.load(info).W_enc == value).all()
        assert len(list(copies.rglob("params.npz"))) == count


def test_the_explorer_shows_what_it_shows_of_a_local_index(s3_index: str, local_index: Path) -> None:
    from starlette.testclient import TestClient

    import queries
    from pipelines.status import status
    from queries.explorer.app import application
    from queries.explorer.session import Outside, open_session

    sae, shown = "tiny-att/layer_3/width_50/average_l0_5", []
    con = queries.connect(str(local_index))
    [(document,)] = con.execute("SELECT max(document) FROM documents").fetchall()
    for uri in (s3_index, str(local_index)):
        app = application(open_session([uri], Outside(status)))
        client = TestClient(app, base_url="http://localhost")
        answers = [
            client.get(address)
            for address in (
                "/", f"/sae?sae={sae}", f"/feature?sae={sae}&feature=7",
                f"/feature/samples?sae={sae}&feature=7",
                f"/document?document={document}&sae={sae}&tokens=1", "/documents",
                "/compare?a=even&b=NOT+even&min_documents=3",
            )
        ]  # fmt: skip
        assert [answer.status_code for answer in answers] == [200] * 7, answers
        bodies = [re.search(r"<main.*</main>", answer.text, re.DOTALL) for answer in answers[1:]]
        shown.append([body.group() for body in bodies if body])
    assert len(shown[0]) == 6
    assert shown[0] == shown[1]
