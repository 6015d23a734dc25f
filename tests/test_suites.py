"""Suites by URI: what a listing costs in bytes, what travels once, what is refused, what is the same."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import hub as server
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from published import saelens
from safetensors.torch import save_file

from jobs.cli import cli
from sae_runtime import hub, remote, suites, weights
from sae_runtime.errors import InputError
from sae_runtime.tree import open_tree

D, M = 64, 8192  # an SAE of 4 MB
MEGABYTE = 1_000_000


@pytest.fixture
def net() -> Iterator[server.Hub]:
    with server.running() as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CORPUSCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def scope(folder: Path, paths: dict[str, int], d: int = D, m: int = M) -> Path:
    """A suite of Gemma Scope archives, each of the tensors of its seed."""
    for path, seed in paths.items():
        rng = np.random.default_rng(seed)
        shapes = {"W_enc": (d, m), "W_dec": (m, d), "b_enc": m, "b_dec": d, "threshold": m}
        (folder / path).mkdir(parents=True)
        tensors = {name: rng.random(shape).astype(np.float32) for name, shape in shapes.items()}
        np.savez(folder / path / "params.npz", **tensors)
    return folder


def layers(*l0s: int) -> dict[str, int]:
    return {f"layer_2/width_8k/average_l0_{l0}": l0 for l0 in l0s}


def run(net: server.Hub, folder: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A process whose hub is the local one; HF_ENDPOINT is read when huggingface_hub is imported."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    own = {
        "HF_ENDPOINT": net.endpoint,
        "HF_HOME": str(folder / "hf"),
        "HOME": str(folder),
        "CORPUSCOPE_CACHE": str(folder / "own"),
    }
    return subprocess.run(
        [sys.executable, *command], env={**keep, **own, **env}, capture_output=True, text=True, timeout=200
    )


def saes(net: server.Hub, folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run(net, folder, "-m", "jobs.cli", "saes", *words, "--format", "json", **env)


# --- URIs


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("hf://google/gemma-scope-2b-pt-res", ("google/gemma-scope-2b-pt-res", None, "")),
        ("hf://google/gemma-scope-2-1b-pt/resid_post/", ("google/gemma-scope-2-1b-pt", None, "resid_post")),
        ("hf://a/b@v1/c/d@e", ("a/b", "v1", "c/d@e")),
        ("hf://a/b@feature%2Fx/c", ("a/b", "feature/x", "c")),
        ("hf://a/b@refs/pr/3/c", ("a/b", "refs/pr/3", "c")),
        ("hf://a/b/c.safetensors?revision=f%2Fx", ("a/b", "f/x", "c.safetensors")),
    ],
)
def test_a_hub_uri_says_repository_revision_and_path(uri: str, place: tuple[Any, ...]) -> None:
    found = hub.parse(uri)
    assert (found.repo, found.revision, found.path) == place
    assert hub.parse(found.uri) == found


@pytest.mark.parametrize(
    "uri",
    [
        "hf://datasets/a/b",
        "hf://spaces/a/b",
        "hf://models/a/b",
        "hf://gpt2",
        "hf://a/b@",
        "hf://a/b@x/c?revision=y",
    ],
)
def test_what_is_no_model_repository_is_refused_in_one_line(uri: str) -> None:
    with pytest.raises(InputError, match=r"saes\.uri: .*hf://org/repo") as error:
        open_tree(uri)
    assert "\n" not in str(error.value)


def test_the_name_of_a_suite_is_the_last_part_of_its_uri(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope(tmp_path / "my-res", layers(3), 2, 4)
    monkeypatch.chdir(tmp_path / "my-res")
    for uri in (f"{tmp_path}/my-res/", f"file://{tmp_path}/my-res", "."):
        assert open_tree(uri).name == "my-res"
    assert open_tree(".", "other").name == "other"


# --- the hub


def test_listing_a_hub_suite_reads_names_and_headers_only(tmp_path: Path, net: server.Hub) -> None:
    folder = scope(tmp_path / "repo", {**layers(22, 71, 300), "layer_2/width_8k/average_l0_72": 71})
    sha = net.push("google/gemma-scope-2b-pt-res", folder)
    done = saes(net, tmp_path, "hf://google/gemma-scope-2b-pt-res")
    assert done.returncode == 0, done.stderr
    ids = [f"gemma-scope-2b-pt-res/layer_2/width_8k/average_l0_{l0}" for l0 in (22, 300, 71, 72)]
    rows = json.loads(done.stdout)
    assert [row["id"] for row in rows] == ids
    assert all((row["d_in"], row["width"], row["site"]) == (D, M, "resid_post") for row in rows)
    # Said by the digests of the listing: nothing was read for it.
    assert done.stderr.strip() == f"note: {ids[3]} has the same tensors as {ids[2]}"
    for l0 in (22, 71, 72, 300):
        assert 0 < net.sent(f"average_l0_{l0}/params.npz") < 14_000
    assert all(request.range for request in net.asked("/cdn/"))
    pages = net.asked("/tree/")
    assert len(pages) == 2  # 4 files and 6 folders, 5 entries a page
    assert all(sha in request.path for request in net.asked("resolve"))


def test_examples_of_gemma_scope_2_are_never_asked_for(tmp_path: Path, net: server.Hub) -> None:
    folder = tmp_path / "repo"
    config = {
        "hf_hook_point_in": "model.layers.5.output", "hf_hook_point_out": "model.layers.5.output",
        "width": M, "model_name": "google/gemma-3-1b-pt", "architecture": "jump_relu", "l0": 55,
        "affine_connection": False, "type": "sae",
    }  # fmt: skip
    for size in ("small", "medium"):
        at = folder / f"resid_post/layer_5_width_8k_l0_{size}"
        at.mkdir(parents=True)
        (at / "config.json").write_text(json.dumps(config))
        shapes = {"w_enc": (D, M), "w_dec": (M, D), "b_enc": (M,), "b_dec": (D,), "threshold": (M,)}
        save_file({name: torch.rand(shape) for name, shape in shapes.items()}, at / "params.safetensors")
        save_file({"examples": torch.zeros(2, MEGABYTE)}, at / "examples.safetensors")
    net.push("google/gemma-scope-2-1b-pt", folder)
    done = saes(net, tmp_path, "hf://google/gemma-scope-2-1b-pt/resid_post")
    assert done.returncode == 0, done.stderr
    assert [row["id"] for row in json.loads(done.stdout)] == [
        "resid_post/layer_5_width_8k_l0_medium", "resid_post/layer_5_width_8k_l0_small",
    ]  # fmt: skip
    assert not net.asked("examples.safetensors")
    assert net.sent() < 20_000


LOAD = """
import json, sys
from sae_runtime import suites
infos = suites.find(sys.argv[1])
print(json.dumps([[info.uri, float(suites.load(info).W_enc.sum())] for info in infos]))
"""
AGAIN = """
import sys
from pathlib import Path
from sae_runtime import weights
print(float(weights.read(sys.argv[1])["W_enc"].sum()), len(weights.headers(sys.argv[1])))
"""


def test_a_suite_is_of_the_commit_that_was_listed_and_travels_once(tmp_path: Path, net: server.Hub) -> None:
    old, new = (
        scope(tmp_path / name, {"layer_2/width_8k/average_l0_9": seed}) for name, seed in (("a", 1), ("b", 2))
    )
    first = net.push("org/my-res", old)
    done = run(net, tmp_path, "-c", LOAD, "hf://org/my-res")
    assert done.returncode == 0, done.stderr
    ((uri, total),) = json.loads(done.stdout)
    assert uri == f"hf://org/my-res@{first}/layer_2/width_8k/average_l0_9/params.npz"
    archive = old / "layer_2/width_8k/average_l0_9/params.npz"
    assert total == pytest.approx(float(np.load(archive)["W_enc"].sum()), rel=1e-4)
    second = net.push("org/my-res", new)
    net.requests.clear()
    again = run(net, tmp_path, "-c", AGAIN, uri)  # another process, after a push
    assert again.stdout.split() == [str(total), "5"], again.stderr
    assert net.asked() == []
    net.push("org/my-res", old, "feature/x")
    for at, sha in (("", second), ("@feature%2Fx", None), (f"@{first}", first)):
        listed = run(net, tmp_path, "-c", LOAD, f"hf://org/my-res{at}")
        ((uri, value),) = json.loads(listed.stdout)
        assert (value == total) == (sha != second)
        assert sha is None or f"@{sha}/" in uri
        assert "/my-res@" in uri
    offline = run(net, tmp_path, "-c", LOAD, f"hf://org/my-res@{first}", HF_HUB_OFFLINE="1")
    assert json.loads(offline.stdout)[0][1] == total, offline.stderr


ERRORS = """
import sys
from sae_runtime import suites
from sae_runtime.errors import InputError
for uri in sys.argv[1:]:
    try:
        suites.find(uri, refused=lambda error: print("refused", error))
    except InputError as error:
        print(error)
"""


def test_errors_of_the_hub_are_one_line_with_a_remedy(tmp_path: Path, net: server.Hub) -> None:
    folder = scope(tmp_path / "repo", layers(1, 2, 3), 4, 512)
    net.push("org/shut-res", folder)
    net.repos["org/shut-res"].gated = True
    net.push("org/open-res", folder)
    uris = ["hf://org/none", "hf://org/open-res@nope", "hf://org/open-res/nowhere", "hf://org/shut-res"]
    done = run(net, tmp_path, "-c", ERRORS, *uris)
    none, revision, nowhere, shut = done.stdout.splitlines()
    assert "no such model repository" in none
    assert "hf auth login" in none
    assert "no revision nope" in revision
    assert "no such directory" in nowhere
    assert f"{net.endpoint}/org/shut-res" in shut
    assert "hf auth login" in shut
    away = run(net, tmp_path, "-c", ERRORS, "hf://org/open-res", HF_ENDPOINT="http://127.0.0.1:9")
    assert len(away.stdout.splitlines()) == 1
    assert "check the network and HF_ENDPOINT" in away.stdout
    offline = run(net, tmp_path, "-c", ERRORS, "hf://org/open-res", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in offline.stdout


# --- other filesystems


def test_a_plain_server_is_read_by_range_and_copied_once(
    tmp_path: Path, net: server.Hub, cache: Path
) -> None:
    net.files = tmp_path / "www"
    folder = scope(net.files / "my-res", layers(5, 6))
    infos = suites.find(f"{net.endpoint}/files/my-res")
    assert [info.id for info in infos] == [f"my-res/layer_2/width_8k/average_l0_{l0}" for l0 in (5, 6)]
    assert net.sent() < 30_000
    before = suites.load(infos[0]).W_enc
    net.requests.clear()
    assert torch.equal(suites.load(infos[0]).W_enc, before)
    assert net.sent() == 0
    shutil.rmtree(folder)
    scope(folder, {"layer_2/width_8k/average_l0_5": 99})
    assert not torch.equal(suites.load(infos[0]).W_enc, before)
    assert not list(cache.rglob(".part-*"))


def test_a_server_without_ranges_gives_the_file_once(tmp_path: Path, net: server.Hub, cache: Path) -> None:
    net.files, net.ranges = tmp_path / "www", False
    scope(net.files / "my-res", layers(5))
    (info,) = suites.find(f"{net.endpoint}/files/my-res")
    assert (info.d_in, info.width) == (D, M)
    suites.load(info)
    size = (net.files / "my-res/layer_2/width_8k/average_l0_5/params.npz").stat().st_size
    whole = [r for r in net.asked("params.npz") if r.method == "GET" and r.sent == size]
    assert len(whole) <= 2  # one may be a range that the server took for the whole


def test_processes_that_want_the_same_file_share_one_download(tmp_path: Path, net: server.Hub) -> None:
    net.files = tmp_path / "www"
    scope(net.files / "my-res", layers(5))
    uri = f"{net.endpoint}/files/my-res/layer_2/width_8k/average_l0_5/params.npz"
    env = {**os.environ, "CORPUSCOPE_CACHE": str(tmp_path / "own")}
    both = [
        subprocess.Popen([sys.executable, "-c", AGAIN, uri], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    one, other = (process.communicate(timeout=200)[0] for process in both)
    assert one == other != ""
    whole = [r for r in net.requests if r.method == "GET" and r.sent > MEGABYTE]
    assert len(whole) == 1


def test_a_suite_in_memory_is_found_anew_when_it_changes(tmp_path: Path, cache: Path) -> None:
    folder = scope(tmp_path / "my-res", layers(5), 4, 8)
    fs = fsspec.filesystem("memory")
    fs.put(str(folder), "/saes/my-res", recursive=True)
    (info,) = suites.find("memory://saes/my-res")
    assert info.id == "my-res/layer_2/width_8k/average_l0_5"
    assert torch.equal(suites.load(info).W_enc, weights.read(f"{folder}/{info.path}/params.npz")["W_enc"])
    for l0 in (6, 7):
        more = scope(tmp_path / str(l0) / "my-res", layers(l0), 4, 8)
        fs.put(str(more / "layer_2/width_8k"), "/saes/my-res/layer_2/", recursive=True)
    assert len(suites.find("memory://saes/my-res")) == 3
    fs.rm("/saes", recursive=True)
    with pytest.raises(InputError, match="no such directory"):
        suites.find("memory://saes/my-res")


# --- files


class Evil:
    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> Any:
        return self.call, self.args


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("call", [os.system, eval, getattr, torch.load, np.zeros])
def test_a_pickle_that_runs_something_is_refused(tmp_path: Path, call: Any, old: bool) -> None:
    mark = tmp_path / "mark"
    args = {os.system: f"touch {mark}", eval: f"open({str(mark)!r}, 'w')"}
    file = tmp_path / "ae.pt"
    saved = {"W_enc": torch.zeros(2, 3), "x": Evil(call, args.get(call, "x"))}
    torch.save(saved, file, _use_new_zipfile_serialization=not old)
    for reader in (weights.headers, weights.outline, weights.read, weights.read_pickle):
        with pytest.raises(InputError, match=r"cannot read .*ae\.pt: it") as error:
            reader(str(file))
        assert "\n" not in str(error.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x02ctorch\nFloatStorage\n}X\x04\x00\x00\x00callcos\nsystem\nsb.",  # BUILD
        b"\x80\x02ccollections\nOrderedDict\n(N}X\x04\x00\x00\x00callK\x01stb.",  # a stand-in is changed
        b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n\x81.",
    ],
)
def test_a_pickle_written_by_hand_cannot_reach_out(tmp_path: Path, code: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "ae.pt", "w") as archive:
        archive.writestr("ae/data.pkl", code)
        archive.writestr("ae/version", "3")
    for reader in (weights.headers, weights.read):
        with pytest.raises(InputError, match="cannot read"):
            reader(str(tmp_path / "ae.pt"))


@pytest.mark.parametrize("old", [False, True])
def test_what_a_file_of_torch_holds_is_known_without_its_tensors(tmp_path: Path, old: bool) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = torch.nn.Linear(3, 2).state_dict()  # an OrderedDict with an attribute
    saved = {
        "W": torch.nn.Parameter(base), "T": base.T, "part": base[1:3, 2:],
        "k": torch.tensor(7, dtype=torch.int32), "half": torch.ones(5, dtype=torch.bfloat16),
        "none": torch.empty(0, 3), "activation": "TopK",
        "state": {"k": 32, "postact": [True, None, 1.5]}, "size": torch.Size([2, 3]), "linear": state,
    }  # fmt: skip
    file = tmp_path / "autoencoder.pt"
    torch.save(saved, file, _use_new_zipfile_serialization=not old)
    found, whole = weights.outline(str(file)), weights.read_pickle(str(file))
    assert list(found) == list(whole) == list(saved)
    for name, value in saved.items():
        if isinstance(value, torch.Tensor):
            want = weights.Header(str(value.dtype).removeprefix("torch."), tuple(value.shape))
            assert found[name] == weights.headers(str(file))[name] == want
            assert torch.equal(weights.read(str(file))[name].double(), value.double())
    assert found["linear"]["weight"] == weights.Header("float32", (2, 3))
    assert (found["activation"], found["state"]) == ("TopK", saved["state"])
    assert tuple(found["size"]) == (2, 3)


@pytest.mark.parametrize("ending", ["npz", "compressed.npz", "safetensors", "pt"])
def test_small_tensors_of_a_remote_file_are_read_by_range(
    tmp_path: Path, net: server.Hub, cache: Path, ending: str
) -> None:
    net.files = tmp_path / "www"
    net.files.mkdir()
    file = net.files / f"ae.{ending}"
    rng = np.random.default_rng(1)
    tensors = {
        "W_enc": rng.random((D, M)).astype(np.float32), "bias": rng.random(3000), "k": np.array(64, np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }  # fmt: skip
    if ending == "pt":
        joint = torch.from_numpy(tensors["bias"])
        torch.save({**{name: torch.from_numpy(t) for name, t in tensors.items()}, "bias": joint}, file)
    elif ending == "safetensors":
        save_file({name: torch.from_numpy(t) for name, t in tensors.items()}, file)
    else:
        (np.savez_compressed if "comp" in ending else np.savez)(file, **tensors)
    uri = f"{net.endpoint}/files/{file.name}"
    shapes = {name: header.shape for name, header in weights.headers(uri).items()}
    assert shapes == {name: value.shape for name, value in tensors.items()}
    assert net.sent() < 12_000
    net.requests.clear()
    found = weights.read(uri, ["bias", "k", "empty", "absent"])
    assert sorted(found) == ["bias", "empty", "k"]
    assert np.array_equal(found["bias"].numpy(), tensors["bias"].astype(np.float32))
    assert found["k"].item() == 64
    assert found["k"].dtype == torch.int64
    assert found["empty"].shape == (0, 3)
    assert net.sent() < 45_000
    assert np.array_equal(weights.read(uri, ["W_enc"])["W_enc"].numpy(), tensors["W_enc"])
    net.requests.clear()
    assert list(weights.read(uri, ["bias"])) == ["bias"]
    assert net.sent() == 0


def test_tensors_outlive_their_file(tmp_path: Path) -> None:
    for name, save in (("a.safetensors", save_file), ("a.pt", torch.save)):
        file = tmp_path / name
        save({"W": torch.ones(5000)}, file)
        found = weights.read(str(file), ["W"])["W"]
        with open(file, "r+b") as stream:  # in place, as a mapped file must not be
            stream.write(b"\0" * file.stat().st_size)
        assert torch.equal(found, torch.ones(5000))


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    for name in ("a.npz", "a.safetensors", "a.pt"):
        for content in (b"", b"PK\x03\x04 and no more", b"\xff" * 64, pickle.dumps({"a": 1})):
            (tmp_path / name).write_bytes(content)
            for reader in (weights.headers, weights.read):
                with pytest.raises(InputError, match=f"cannot read .*{name}") as error:
                    reader(str(tmp_path / name))
                assert "\n" not in str(error.value)


def test_a_short_answer_is_an_error_and_not_a_tensor() -> None:
    stream = remote.Ranged(10_000, lambda start, stop: b"x" * (stop - start - 1))
    with pytest.raises(OSError, match="bytes came for"):
        stream.read(8)


# --- duplicates and refusals


def test_duplicates_have_the_same_tensors_and_not_only_the_same_bias(tmp_path: Path) -> None:
    folder = scope(tmp_path / "my-res", {**layers(10, 20), "layer_2/width_8k/average_l0_11": 10}, 4, 8)
    scope(folder, {"layer_3/width_8k/average_l0_12": 10}, 4, 8)  # at another site
    tensors = dict(np.load(folder / "layer_2/width_8k/average_l0_10/params.npz"))
    for l0, key in ((13, "W_enc"), (14, "W_dec"), (15, "threshold")):
        at = folder / f"layer_2/width_8k/average_l0_{l0}"
        at.mkdir()
        np.savez(at / "params.npz", **{**tensors, key: tensors[key] + 1})
    found = suites.duplicates(suites.find(str(folder)))
    assert found == {"my-res/layer_2/width_8k/average_l0_11": "my-res/layer_2/width_8k/average_l0_10"}


def test_duplicates_on_a_server_cost_a_bias_each(tmp_path: Path, net: server.Hub, cache: Path) -> None:
    net.files = tmp_path / "www"
    scope(net.files / "my-res", layers(1, 2, 3))
    infos = suites.find(f"{net.endpoint}/files/my-res")
    net.requests.clear()
    assert suites.duplicates(infos) == {}
    assert net.sent() < 3 * (4 * M + 25_000)


def test_saes_lists_the_others_and_says_why_one_is_refused(tmp_path: Path, net: server.Hub) -> None:
    folder = scope(tmp_path / "my-res", layers(1, 2), 4, 8)
    (folder / "layer_2/width_8k/average_l0_1/params.npz").write_bytes(b"PK nothing")
    done = saes(net, tmp_path, str(folder))
    assert done.returncode == 0, done.stderr
    assert [row["id"] for row in json.loads(done.stdout)] == ["my-res/layer_2/width_8k/average_l0_2"]
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: ")
    assert "average_l0_1/params.npz" in line
    (folder / "layer_2/width_8k/average_l0_2/params.npz").write_bytes(b"")
    done = saes(net, tmp_path, str(folder))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 3
    assert done.stdout == ""


def test_saes_shows_the_head_of_an_sae_that_reads_one(tmp_path: Path) -> None:
    folder = tmp_path / "my-suite"
    written = saelens.write(folder, np.random.default_rng(3), 6, 16, 5, 2)
    done = CliRunner().invoke(cli, ["saes", str(folder), "--format", "json"])
    sites = {row["id"].removeprefix("my-suite/"): row["site"] for row in json.loads(done.stdout)}
    heads = {sae.path: sae.head for sae in written if sae.head is not None}
    assert heads
    assert {path: site for path, site in sites.items() if "[" in site} == {
        path: f"attn_z[{head}]" for path, head in heads.items()
    }
