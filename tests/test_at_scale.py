"""Days on many machines: weights that travel once, a disk that does not overflow, brakes, other code."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import hub as server
import pytest
import torch
from huggingface_hub import constants

from pipelines import gc, staging
from pipelines.audit import audit
from pipelines.retries import Brakes, Patience
from pipelines.schema import STAGED
from pipelines.staged import recorded
from pipelines.storage import Store
from pipelines.version import code_version, sources_digest
from sae_runtime import cache, hub, model, remote, suites
from sae_runtime.errors import InputError

MB = 1_000_000


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a machine that has nothing yet."""
    monkeypatch.setenv("CORPUSCOPE_CACHE", str(tmp_path / "node"))
    monkeypatch.delenv("CORPUSCOPE_CACHE_BYTES", raising=False)
    return tmp_path / "node"


# --- copies of a machine


def filled(size: int, calls: list[int] | None = None, wait: float = 0.0) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        if calls is not None:
            calls.append(threading.get_ident())
        time.sleep(wait)
        (folder / "file").write_bytes(b"x" * size)

    return fill


def copies(node: Path) -> set[str]:
    return {folder.name for folder in (node / "copies").iterdir()}


def use(key: str, size: int, patience: float = 0.0) -> bytes:
    with cache.held(key, size, filled(size), key, patience) as folder:
        return (folder / "file").read_bytes()


def test_many_that_want_a_copy_make_it_once(node: Path) -> None:
    calls: list[int] = []

    def want(_: int) -> bytes:
        with cache.held("one", 1000, filled(1000, calls, 0.05), "one") as folder:
            return (folder / "file").read_bytes()

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(want, range(64))) == {b"x" * 1000}
    assert len(calls) == 1
    assert cache.has("one")


def test_what_could_not_be_fetched_whole_is_not_there(node: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "file").write_bytes(b"half")
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="the network"), cache.held("one", 10, broken, "one"):
        pass
    assert copies(node) == set()
    assert use("one", 10) == b"x" * 10


HOLD = """
import sys, time
from pathlib import Path
from sae_runtime import cache

def fill(folder):
    (folder / "file").write_bytes(b"y" * 700)
    if sys.argv[2] == "filling":
        print("filling", flush=True)
        time.sleep(600)

with cache.held(sys.argv[1], 1000, fill, "it"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def another() -> Iterator[Callable[[str, str], subprocess.Popen[str]]]:
    """Starts another process of this machine, which fetches a copy or holds it until it is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(key: str, doing: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, key, doing], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == doing
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_fetch_that_was_killed_is_made_again(
    node: Path, another: Callable[[str, str], subprocess.Popen[str]]
) -> None:
    process = another("one", "filling")
    assert copies(node) == {".part-one"}
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert use("one", 10) == b"x" * 10
    assert copies(node) == {"one"}


def test_the_copy_that_was_longest_not_used_makes_room(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORPUSCOPE_CACHE_BYTES", "3kB")
    for key in ("a", "b", "c"):
        use(key, 1000)
        time.sleep(0.02)
    use("a", 1000)
    use("d", 1000)
    assert copies(node) == {"a", "c", "d"}
    use("e", 2000)
    assert copies(node) == {"d", "e"}


def test_what_a_live_process_uses_stays_and_what_a_dead_one_left_goes(
    node: Path, monkeypatch: pytest.MonkeyPatch, another: Callable[[str, str], subprocess.Popen[str]]
) -> None:
    monkeypatch.setenv("CORPUSCOPE_CACHE_BYTES", "2kB")
    holder, half = another("used", "held"), another("half", "filling")
    with pytest.raises(InputError, match=r"no room for x .*budget of 2e-06 GB.*CORPUSCOPE_CACHE_BYTES"):
        use("x", 1500)
    assert copies(node) == {"used", ".part-half"}
    half.kill()
    half.wait()
    use("x", 1000)
    assert copies(node) == {"used", "x"}
    holder.kill()
    holder.wait()
    use("x", 1000)
    use("y", 1000)
    assert copies(node) == {"x", "y"}


def test_room_is_waited_for(
    node: Path, monkeypatch: pytest.MonkeyPatch, another: Callable[[str, str], subprocess.Popen[str]]
) -> None:
    monkeypatch.setenv("CORPUSCOPE_CACHE_BYTES", "1.5kB")
    holder = another("used", "held")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(use, "x", 1000, 30.0)
        time.sleep(0.5)
        assert not waiting.done()
        holder.kill()
        assert waiting.result(30) == b"x" * 1000


def test_two_that_come_at_once_share_what_is_free(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone would fit; what is on its way counts."""
    monkeypatch.setenv("CORPUSCOPE_CACHE_BYTES", "1.5kB")
    barrier, most = threading.Barrier(2), []

    def want(key: str) -> None:
        def fill(folder: Path) -> None:
            filled(1000, wait=0.1)(folder)
            most.append(sum(f.stat().st_size for f in (node / "copies").rglob("file")))

        barrier.wait()
        with cache.held(key, 1000, fill, key):
            pass

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(want, "ab"))
    assert max(most) == 1000


def test_a_copy_larger_than_the_budget_is_one_line_at_once(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORPUSCOPE_CACHE_BYTES", "1GB")
    use("small", 10)
    with pytest.raises(InputError, match=r"suite/params\.npz") as failed:
        with cache.held("large", 2_000_000_000, filled(1), "hf://org/suite/params.npz"):
            pass
    assert str(failed.value).endswith(
        "no room for hf://org/suite/params.npz (2 GB) in the budget of 1 GB for copies; raise "
        "CORPUSCOPE_CACHE_BYTES where workers are started"
    )
    assert copies(node) == {"small"}  # nothing went in vain
    monkeypatch.delenv("CORPUSCOPE_CACHE_BYTES")
    with pytest.raises(InputError, match=r"on the disk of .*CORPUSCOPE_CACHE to a folder"):
        with cache.held("large", 1 << 60, filled(1), "all"):
            pass
    monkeypatch.setenv("CORPUSCOPE_CACHE_BYTES", "many")
    with pytest.raises(InputError, match="CORPUSCOPE_CACHE_BYTES: 'many' is no size"):
        use("x", 1)


# --- from the hub to the store to the machines


class Net:
    """A hub with a tiny model and suite, of which this process is a driver or, without it, a worker."""

    def __init__(self, running: server.Hub, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.hub, self._folder, self._patch = running, folder, patch
        self.org = f"org-{uuid.uuid4().hex[:8]}"  # transformers remembers which commit a branch was
        old = constants.ENDPOINT
        patch.setattr(constants, "ENDPOINT", running.endpoint)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(old, running.endpoint)
        for name, module in list(sys.modules.items()):
            if name.startswith("huggingface_hub") and hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
                patch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        self.driver()

    def driver(self) -> None:
        self._be("driver", offline=False)

    def worker(self, name: str) -> None:
        """A machine that has nothing, and cannot reach the hub."""
        self._be(name, offline=True)
        remote._elsewhere.clear()

    def _be(self, name: str, offline: bool) -> None:
        home = self._folder / name
        self._patch.setattr(constants, "HF_HUB_OFFLINE", offline)
        self._patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        self._patch.setenv("CORPUSCOPE_CACHE", str(home / "own"))


@pytest.fixture
def net(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tiny_suites: Path
) -> Iterator[Net]:
    with server.running() as running:
        found = Net(running, tmp_path, monkeypatch)
        running.push(f"{found.org}/tiny", tiny_model)
        running.push(f"{found.org}/tiny-att", tiny_suites / "tiny-att")
        yield found
    remote._elsewhere.clear()


def prepared(net: Net) -> tuple[model.ModelSource, list[Any]]:
    return model.locate(f"{net.org}/tiny"), suites.find(f"hf://{net.org}/tiny-att")


def test_a_model_of_the_hub_is_of_the_commit_that_was_resolved(
    net: Net, tiny_model: Path, tmp_path: Path
) -> None:
    """A push in the middle of a scan reaches no worker."""
    source = model.locate(f"{net.org}/tiny")
    assert source.revision == source.fingerprint == net.hub.repos[f"{net.org}/tiny"].refs["main"]
    changed = shutil.copytree(tiny_model, tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 7}))
    net.hub.push(f"{net.org}/tiny", changed)
    assert model.load_config(source).max_position_embeddings == 512
    assert model.locate(f"{net.org}/tiny").fingerprint != source.fingerprint


def test_machines_have_from_the_store_what_the_driver_had_from_the_hub(
    net: Net, tmp_path: Path, tiny_model: Path
) -> None:
    store, told = Store(str(tmp_path / "index")), list[str]()
    source, saes = prepared(net)
    wanted = [suites.load(sae).fingerprint() for sae in saes]
    staged = staging.stage(store, source, saes, told.append)
    assert len(told) == 1
    assert f"go to {store.uri}/{STAGED}" in told[0]
    assert staging.stage(store, source, saes, told.append) == staged  # again: it is there
    assert len(told) == 1
    net.hub.requests.clear()
    for name in ("first", "second"):
        net.worker(name)
        here = staging.here(staged, source, store)
        assert here.fingerprint == source.fingerprint
        assert here.path.startswith(str(tmp_path / name))
        assert (
            model.load_tokenizer(here)("the cat").input_ids
            == model.load_tokenizer(replace(source, path=str(tiny_model), revision=None))("the cat").input_ids
        )
        loaded = model.LanguageModel(here, [saes[0].site], "float32").module.state_dict()
        original = model.LanguageModel(model.locate(str(tiny_model)), [saes[0].site], "float32").module
        assert all(torch.equal(loaded[key], value) for key, value in original.state_dict().items())
        assert [suites.load(sae).fingerprint() for sae in saes] == wanted
    assert net.hub.requests == []


def test_workers_of_a_machine_fetch_each_file_once(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path / "index"))
    source, saes = prepared(net)
    staged = staging.stage(store, source, saes, lambda line: None)
    net.worker("node")
    fetched: list[str] = []
    ranged = Store.read_range

    def counted(self: Store, name: str, start: int, stop: int) -> bytes:
        fetched.append(name)
        return ranged(self, name, start, stop)

    monkeypatch.setattr(Store, "read_range", counted)

    def work(_: int) -> list[str]:
        staging.here(staged, source, store)
        return [suites.load(sae).fingerprint() for sae in saes]

    with ThreadPoolExecutor(8) as pool:
        assert len({tuple(prints) for prints in pool.map(work, range(8))}) == 1
    assert sorted(fetched) == sorted(file.name for file in (*staged.model, *staged.saes))


def test_a_damaged_object_stops_the_scan_and_a_missing_one_comes_from_the_hub(
    net: Net, tmp_path: Path
) -> None:
    store = Store(str(tmp_path / "index"))
    source, saes = prepared(net)
    wanted = suites.load(saes[0]).fingerprint()
    staged = staging.stage(store, source, saes, lambda line: None)
    file = next(file for file in staged.saes if file.uri == saes[0].uri)
    at = tmp_path / "index" / file.name
    data = at.read_bytes()
    at.write_bytes(bytes([data[0] ^ 1]) + data[1:])  # of the same length
    net.worker("one")
    staging.here(staged, source, store)
    with pytest.raises(InputError, match=rf"{file.name}: damaged.*remove staged/"):
        suites.load(saes[0])
    assert suites.load(saes[1])
    at.unlink()
    net.driver()
    net.worker("two")
    constants.HF_HUB_OFFLINE = False
    staging.here(staged, source, store)
    assert suites.load(saes[0]).fingerprint() == wanted
    assert net.hub.asked("/cdn/") or net.hub.asked("resolve")


def test_the_driver_does_not_spread_a_damaged_file(net: Net, tmp_path: Path) -> None:
    source, saes = prepared(net)
    path = Path(hub.download(hub.parse(saes[0].uri))).resolve()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    store = Store(str(tmp_path / "index"))
    with pytest.raises(InputError, match=r"params\.npz: damaged, not what the hub has"):
        staging.stage(store, source, saes, lambda line: None)
    assert all(saes[0].uri != file.uri for file in recorded(store).values())


def test_gc_and_verify_know_what_is_staged(net: Net, tmp_path: Path, few_index: Path) -> None:
    shutil.copytree(few_index, tmp_path / "index")
    store = Store(str(tmp_path / "index"))
    source, saes = prepared(net)
    staged = staging.stage(store, source, saes, lambda line: None)
    store.write(f"{STAGED}/{'0' * 32}-00000000", b"of a driver that was killed")
    assert audit(store, quick=True).faults == []
    held = len((*staged.model, *staged.saes))
    assert gc.collect(store).removed == 0  # too young
    lease = Holding(store)
    with lease:
        assert gc.collect(store, 0, 0).removed >= 1
        assert len(store.entries(STAGED)) == 2 * held  # a scan uses them
    file = staged.saes[0]
    store.write(file.name, b"cut")
    assert [(f.file, f.detail) for f in audit(store, quick=True).faults] == [
        (file.name, f"3 bytes, not {file.bytes}; remove it")
    ]
    gc.collect(store, 0, 0)
    assert store.entries(STAGED) == []
    assert audit(store, quick=True).faults == []


class Holding:
    """A scan at work."""

    def __init__(self, store: Store) -> None:
        from pipelines.lease import Lease

        self._lease = Lease(store, lambda line: None)

    def __enter__(self) -> None:
        self._lease.look()
        self._lease.take(9)

    def __exit__(self, *error: Any) -> None:
        self._lease.__exit__(None, None, None)


def test_weights_are_those_that_transformers_would_choose(net: Net, tmp_path: Path, tiny_model: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "many")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "original/params.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x" * 5000)
    net.hub.push(f"{net.org}/many", folder)
    names = {place.path for place in model.hub_files(model.locate(f"{net.org}/many"))}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= names
    assert not names & {"pytorch_model.bin", "consolidated.safetensors", "original/params.json"}
    (folder / "model.safetensors").rename(folder / "model-1-of-1.safetensors")
    index = {"weight_map": {"embed": "model-1-of-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    net.hub.push(f"{net.org}/many", folder)
    names = {place.path for place in model.hub_files(model.locate(f"{net.org}/many"))}
    assert {"model.safetensors.index.json", "model-1-of-1.safetensors"} <= names
    assert model.hub_files(model.locate(str(tiny_model))) == []


# --- brakes


def test_what_one_prefix_is_told_no_other_waits_for() -> None:
    store, patience = Brakes(), Patience(first=5.0, longest=20.0)
    store.of("bucket/corpus").throttled(time.monotonic(), patience)
    assert store.of("bucket/corpus")._released > time.monotonic() + 1
    assert store.of("bucket/index")._released <= time.monotonic()
    assert store.of("bucket/corpus") is store.of("bucket/corpus")


# --- which code it is


def test_the_code_version_changes_with_any_source_and_with_nothing_else(tmp_path: Path) -> None:
    room = tmp_path / "room"
    (room / "inner").mkdir(parents=True)
    (room / "a.py").write_text("one = 1\n")
    (room / "inner" / "b.py").write_text("two = 2\n")
    first = sources_digest([room])
    (room / "__pycache__").mkdir()
    (room / "__pycache__" / "a.pyc").write_bytes(b"compiled")
    (room / "notes.txt").write_text("read me")
    os.utime(room / "a.py", (0, 0))
    assert sources_digest([room]) == first
    moved = shutil.copytree(room, tmp_path / "elsewhere" / "room")
    assert sources_digest([moved]) == first
    (room / "inner" / "b.py").write_text("two = 3\n")
    assert sources_digest([room]) != first
    (room / "inner" / "b.py").rename(room / "b.py")
    assert len({first, sources_digest([room]), sources_digest([])}) == 3
    assert re.fullmatch(r"\S+ \([0-9a-f]{12}\)", code_version())


def test_another_code_is_named_when_a_scan_goes_on_and_when_files_are_added(
    tmp_path: Path,
    write_spec: Callable[..., Path],
    scan_inline: Callable[..., Any],
    few: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pipelines import planning, scan

    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in (1, 2):
        (corpus / f"{number}.jsonl").write_text(json.dumps({"text": "the cat sat on a mat " * 9}) + "\n")
    spec = write_spec(tmp_path, corpus={"uri": f"{corpus}/*.jsonl", "id": None, "metadata": []}, saes=few)

    def scanned(code: str, stop: bool = False) -> list[str]:
        told: list[str] = []
        monkeypatch.setattr(planning, "code_version", lambda: code)
        monkeypatch.setattr(scan, "code_version", lambda: code)

        def observe(event: Any) -> None:
            if stop and isinstance(event, scan.Committed):
                raise KeyboardInterrupt

        if stop:
            with pytest.raises(KeyboardInterrupt):
                scan_inline(spec, observe=observe, notice=told.append)
        else:
            scan_inline(spec, observe=observe, notice=told.append)
        return [line for line in told if "versions" in line]

    assert scanned("1 (aaa)", stop=True) == []
    assert scanned("1 (bbb)") == ["note: run 1 began with other versions: corpuscope 1 (aaa) -> 1 (bbb)"]
    (corpus / "3.jsonl").write_text(json.dumps({"text": "rain in Paris"}) + "\n")
    assert scanned("1 (ccc)") == ["note: run 1 began with other versions: corpuscope 1 (aaa) -> 1 (ccc)"]
    (corpus / "4.jsonl").write_text(json.dumps({"text": "rain in London"}) + "\n")
    assert scanned("1 (ccc)") == []


# --- what other stores raise


def named(module: str, name: str, *bases: type, **fields: Any) -> Exception:
    """An error as a library that is not installed here raises it."""
    kind = type(name, bases or (Exception,), {"__module__": module, **fields})
    error: Exception = kind("Too Many Requests\nand a body")
    return error


GOOGLE, AZURE = "google.auth.exceptions", "azure.core.exceptions"
AUTH = type("GoogleAuthError", (Exception,), {"__module__": GOOGLE})


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (named("gcsfs.retry", "HttpError", code=429), ConnectionError),
        (named("gcsfs.retry", "HttpError", code="503"), ConnectionError),
        (named("gcsfs.retry", "HttpError", code=401), PermissionError),
        (named(GOOGLE, "RefreshError", AUTH), PermissionError),
        (named(GOOGLE, "TransportError", AUTH), ConnectionError),
        (named(AZURE, "HttpResponseError", status_code=503), ConnectionError),
        (named(AZURE, "ServiceRequestError"), ConnectionError),
        (named(AZURE, "ClientAuthenticationError", status_code=401), PermissionError),
        (named("aiohttp.client_exceptions", "ClientPayloadError"), ConnectionError),
    ],
)
def test_what_gcsfs_and_adlfs_give_up_with_is_one_line_of_the_store(
    error: Exception, kind: type[OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.failures import kind_of

    store = Store(f"memory://{uuid.uuid4().hex}")

    def fails(*given: Any, **more: Any) -> None:
        raise error

    for name in ("cat_file", "pipe_file", "info"):
        monkeypatch.setattr(store.fs, name, fails)
    for attempt in (lambda: store.read("a"), lambda: store.write("a", b""), lambda: store.size("a")):
        with pytest.raises(kind) as failed:
            attempt()
        assert str(failed.value) == f"index {store.uri}: Too Many Requests"
        assert failed.value.__cause__ is error
    assert kind_of(error) == "infra"  # where no door was between


def test_an_error_of_ours_is_not_taken_for_the_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"memory://{uuid.uuid4().hex}")

    def fails(*given: Any, **more: Any) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(store.fs, "cat_file", fails)
    with pytest.raises(TypeError, match="a bug"):
        store.read("a")
