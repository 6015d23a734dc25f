"""SAELens's list of published SAEs (13,000 files by name) against what our readers find under those names.

Only names are compared, and what follows from them: that each file belongs to the format that SAELens reads
it with, Gemma Scope's `canonical` and Neuronpedia's ids. No weights exist here; what a reader asks of a file
is answered by `headers`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import pytest
from saelens_hub import SaeLens

from sae_runtime import suites, weights
from sae_runtime.formats import circuit_tracer, format_name, gemma_scope, gemma_scope_2, hook_z, llama_scope
from sae_runtime.tree import Tree
from sae_runtime.weights import Header

pytestmark = pytest.mark.peers

# Wrong in SAELens's list: the ids are another SAE's.
WRONG = {
    ("gemma-scope-9b-pt-res", "layer_2/width_16k/average_l0_8"),
    ("gemma-scope-9b-pt-res", "layer_20/width_131k/average_l0_114"),
}


# SAELens's converter -> our format, and the files of an SAE at a path of its list, the weights first.
FORMATS: dict[str | None, tuple[str, tuple[str, ...]]] = {
    None: ("saelens", ("{}/sae_weights.safetensors", "{}/cfg.json", "{}/sparsity.safetensors")),
    "gemma_2": ("gemma_scope", ("{}/params.npz",)),
    "gemma_2_transcoder": ("gemma_scope", ("{}/params.npz",)),
    "gemma_3": ("gemma_scope_2", ("{}/params.safetensors", "{}/config.json", "{}/examples.safetensors")),
    "dictionary_learning_1": ("dictionary_learning", ("{}/ae.pt", "{}/config.json", "{}/eval_results.json")),
    "qwen_scope": ("qwen_scope", ("{}", "config.json")),
    "mwhanna_transcoder": ("circuit_tracer", ("{}", "config.yaml", "wandb-config.yaml")),
    "mntss_clt_layer_transcoder": (
        "circuit_tracer", ("W_enc_{}.safetensors", "W_dec_{}.safetensors", "config.yaml"),
    ),
    "llama_scope": ("llama_scope", ("{}/checkpoints/final.safetensors", "{}/hyperparams.json")),
    "llama_scope_r1_distill": ("llama_scope_r1", ("{}/sae_weights.safetensors", "{}/config.json")),
    "goodfire": ("goodfire", ("{}",)),
    "deepseek_r1": ("qresearch", ("{}",)),
    "connor_rob_hook_z": ("hook_z", ("{}", "{stem}_cfg.json")),
    "temporal": ("temporal", ("{}/latest_ckpt.safetensors", "{}/conf.yaml")),
}  # fmt: skip
LONE = {
    "Goodfire": (
        "encoder_linear.weight",
        "encoder_linear.bias",
        "decoder_linear.weight",
        "decoder_linear.bias",
    ),
    "qresearch": ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"),
}


def test_each_file_belongs_to_its_format(sae_lens: SaeLens, monkeypatch: pytest.MonkeyPatch) -> None:
    def lone(uri: str) -> dict[str, Header]:
        return dict.fromkeys(LONE[uri.split("/")[2]], Header("float32", (16, 6)))

    monkeypatch.setattr(weights, "headers", lone)  # of files that stand alone; no other is opened for this
    total = 0
    for repository, releases in repositories(sae_lens, *FORMATS).items():
        wanted: dict[str, str] = {}
        files: set[str] = set()
        for release in releases:
            name, templates = FORMATS[release.conversion_func]
            for path in release.saes_map.values():
                names = [t.format(path, stem=path.removesuffix(".pt")) for t in templates]
                wanted[names[0]] = name
                files.update(names)
        tree = Tree(f"hf://{repository}", repository.split("/")[-1], tuple(sorted(files)))
        known = suites._candidates(tree)
        found = {candidate.files[0]: format_name(module) for module, candidate in known.values()}
        assert found == wanted, repository
        total += len(wanted)
    assert total > 13_000


def repositories(sae_lens: SaeLens, *converters: str | None) -> dict[str, list[Any]]:
    """Releases by repository."""
    found = defaultdict(list)
    for release in sae_lens.releases().values():
        if release.conversion_func in converters:
            found[release.repo_id].append(release)
    return found


def test_gemma_scope_canonical_and_neuronpedia(sae_lens: SaeLens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "headers", headers)
    aliases = checked = 0
    for repository, releases in repositories(sae_lens, "gemma_2").items():
        files = {f"{path}/params.npz" for release in releases for path in release.saes_map.values()}
        tree = Tree(f"hf://{repository}", repository.split("/")[-1], tuple(sorted(files)))
        found = {candidate.path: candidate for candidate in gemma_scope.candidates(tree)}
        assert len(found) == len(files)
        named = {p for release in releases for i, p in release.saes_map.items() if i.endswith("/canonical")}
        canonical = {path for path, candidate in found.items() if candidate.canonical}
        assert named <= canonical
        # SAELens has no alias for any SAE of these two layers and widths.
        assert canonical - named <= {
            "layer_12/width_131k/average_l0_129",
            "layer_20/width_262k/average_l0_50",
        }
        aliases += len(named)
        for release in releases:
            for sae_id, path in release.saes_map.items():
                theirs = release.neuronpedia_id[sae_id]
                if theirs is None or (release.release, sae_id) in WRONG:
                    continue
                ours = gemma_scope.describe(tree, found[path]).neuronpedia
                if path in canonical and not sae_id.endswith("/canonical"):
                    assert ours is not None
                    assert theirs in (ours, f"{ours}__l0-{path.split('_')[-1]}"), (release.release, sae_id)
                else:
                    assert theirs == ours, (release.release, sae_id)
                checked += 1
    assert aliases == 429
    assert checked > 400


def test_gemma_scope_2_neuronpedia(sae_lens: SaeLens, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a folder's name, as without a config."""
    pairs = [pair for pair in pages(sae_lens, monkeypatch, "gemma_3") if pair[1] is not None]
    assert len(pairs) == 222
    assert all(ours == theirs for ours, theirs in pairs)


@pytest.mark.parametrize(
    ("converter", "count"),
    [
        ("llama_scope", 192),
        ("connor_rob_hook_z", 12),
        ("mwhanna_transcoder", 208),
        ("mntss_clt_layer_transcoder", 26),
    ],
)
def test_neuronpedia(sae_lens: SaeLens, monkeypatch: pytest.MonkeyPatch, converter: str, count: int) -> None:
    pairs = pages(sae_lens, monkeypatch, converter)
    assert len(pairs) == count
    assert all(ours == theirs for ours, theirs in pairs), [pair for pair in pairs if pair[0] != pair[1]][:5]


def pages(
    sae_lens: SaeLens, monkeypatch: pytest.MonkeyPatch, *converters: str
) -> list[tuple[str | None, str | None]]:
    """Neuronpedia's id as we have it and as SAELens lists it, of each file of these converters' releases."""
    monkeypatch.setattr(weights, "headers", headers)
    for module in (llama_scope, hook_z):
        monkeypatch.setattr(module, "read_json", config)
    monkeypatch.setattr(circuit_tracer, "read_yaml", config)
    monkeypatch.setattr(gemma_scope_2, "read_json", lambda uri: {})  # the folder's name says it all
    pairs = []
    for repository, releases in repositories(sae_lens, *converters).items():
        _, templates = FORMATS[releases[0].conversion_func]
        listed: dict[str, set[str]] = defaultdict(set)  # by weight file
        files = set()
        for release in releases:
            for sae_id, path in release.saes_map.items():
                names = [t.format(path, stem=path.removesuffix(".pt")) for t in templates]
                files.update(names)
                listed[names[0]] |= {release.neuronpedia_id[sae_id]} - {None}
        tree = Tree(f"hf://{repository}", repository.split("/")[-1], tuple(sorted(files)))
        for module, candidate in suites._candidates(tree).values():
            ours, theirs = module.describe(tree, candidate).neuronpedia, listed[candidate.files[0]]
            pairs.append((ours, ours if ours in theirs else min(theirs, default=None)))
    return pairs


def headers(uri: str) -> dict[str, Header]:
    """Tensors as each format names them: what is asked is whether they are there, and one matrix's shape."""
    names = ["w_enc", "W_enc", "W_dec", "b_enc", "b_dec", "encoder.weight"]
    if "_affine/" in uri:
        names.append("affine_skip_connection")
    if match := re.search(r"/W_enc_(\d+)\.", uri):
        names = [f"{name}_{match[1]}" for name in ("W_enc", "b_enc", "b_dec")]
    if match is None and re.search(r"/layer_\d+\.safetensors", uri):
        names.remove("w_enc")
    sizes = {name: (16, 16) if name.lower().startswith(("w_", "encoder")) else (16,) for name in names}
    return {name: Header("float32", size) for name, size in sizes.items()}


def config(uri: str) -> dict[str, Any]:
    """A config of any of these formats."""
    match = re.search(r"L(\d+)", uri)
    hook = f"blocks.{match[1] if match else 0}.hook_resid_post"
    return {
        "hook_point_in": hook, "hook_point_out": hook, "d_model": 16, "jump_relu_threshold": 0.5,
        "dataset_average_activation_norm": {"in": 10.0, "out": 10.0}, "act_name": hook,
        "feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out", "model_name": "some",
    }  # fmt: skip
