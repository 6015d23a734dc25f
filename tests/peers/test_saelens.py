"""Our readers against SAELens: the same files, its own converters and classes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from against import SIZES, different, fixture, inputs, same
from published import saelens as native
from saelens_hub import SaeLens
from safetensors.torch import load_file

from sae_runtime import reference, suites
from sae_runtime.formats.base import options
from sae_runtime.sites import from_hugging_face, from_transformer_lens

pytestmark = pytest.mark.peers
sizes = pytest.mark.parametrize("sizes", SIZES)


@sizes
def test_gemma_scope(tmp_path: Path, sae_lens: SaeLens, sizes: str) -> None:
    for sae in fixture(tmp_path, "gemma_scope", sizes):
        d, m = sae.info.d_in, sae.info.width
        peer = sae_lens.load(sae.suite, sae.path, "gemma_2", "google/gemma-scope-2b-pt-res", d_in=d, d_sae=m)
        if sae.info.site.kind == "embed_unscaled":
            # SAELens rescales an embedding SAE to read the embeddings as the model uses them, times sqrt(d);
            # ours reads the rows, as published. Its b_dec stays in the space of the rows, so that only the
            # activations can be compared.
            same(sae.encode(), peer.encode(sae.x * d**0.5), sae.path)
            different(sae.encode(), peer.encode(sae.x), sae.path)
            continue
        same(sae.encode(), peer.encode(sae.x), sae.path)
        same(sae.decode(), peer(sae.x), sae.path)


@sizes
def test_gemma_scope_attention_is_read_by_heads(tmp_path: Path, sae_lens: SaeLens, sizes: str) -> None:
    """The same files under the name of an attention suite: SAELens flattens the heads, we get them flat."""
    saes = fixture(tmp_path, "gemma_scope", sizes, suite="gemma-scope-2b-pt-att")
    for sae in saes[:2]:
        assert sae.info.site.kind == "attn_z"
        d, m = sae.info.d_in, sae.info.width
        peer = sae_lens.load(sae.suite, sae.path, "gemma_2", "google/gemma-scope-2b-pt-att", d_in=d, d_sae=m)
        same(sae.encode(), peer.encode(sae.x.reshape(len(sae.x), 2, d // 2)), sae.path)


@sizes
def test_gemma_scope_transcoders(tmp_path: Path, sae_lens: SaeLens, sizes: str) -> None:
    for sae in fixture(tmp_path, "gemma_scope_transcoders", sizes):
        peer = sae_lens.load(
            sae.suite, sae.path, "gemma_2_transcoder", "google/gemma-scope-2b-pt-transcoders",
            d_in=sae.info.d_in, d_sae=sae.info.width, d_out=sae.d_out,
        )  # fmt: skip
        assert from_transformer_lens(peer.cfg.metadata.hook_name) == sae.info.site
        same(sae.encode(), peer.encode(sae.x), sae.path)
        same(sae.decode(), peer(sae.x), sae.path)


@sizes
def test_gemma_scope_2(tmp_path: Path, sae_lens: SaeLens, sizes: str) -> None:
    """SAEs and transcoders, with and without an affine part, which SAELens holds transposed."""
    for sae in fixture(tmp_path, "gemma_scope_2", sizes):
        peer = sae_lens.load(sae.suite, sae.path, "gemma_3", "google/gemma-scope-2-4b-it")
        assert from_hugging_face(peer.cfg.metadata.hf_hook_name) == sae.info.site
        same(sae.encode(), peer.encode(sae.x), sae.path)
        same(sae.decode(), peer(sae.x), sae.path)
        assert peer.cfg.metadata.model_name == sae.info.trained_on


@sizes
def test_gemma_scope_2_sets(tmp_path: Path, sae_lens: SaeLens, sizes: str) -> None:
    """A CLT's layers one by one; SAELens has no crosscoders."""
    kinds = set()
    for sae in fixture(tmp_path, "gemma_scope_2_sets", sizes):
        kinds.add(sae.info.architecture)
        if sae.info.architecture == "jumprelu_crosscoder":
            with pytest.raises(ValueError, match="Could not infer hook type"):
                sae_lens.load(sae.suite, sae.path, "gemma_3", "google/gemma-scope-2-270m-pt")
            continue
        peer = sae_lens.load(sae.suite, sae.path, "gemma_3", "google/gemma-scope-2-270m-pt")
        assert from_hugging_face(peer.cfg.metadata.hf_hook_name) == sae.info.site
        same(sae.encode(), peer.encode(sae.x), sae.path)
        # SAELens sums the decoders of all layers into one; ours has none, for no output is this SAE's own.
        assert sae.weights.W_dec is None
        assert sae.info.out is None
    assert kinds == {"jumprelu_clt", "jumprelu_skip_clt", "jumprelu_crosscoder"}


@sizes
def test_dictionary_learning(tmp_path: Path, sae_lens: SaeLens, sizes: str) -> None:
    seen = set()
    for sae in fixture(tmp_path, "dictionary_learning", sizes):
        if sae.file.name != "ae.pt":
            continue  # checkpoints in a trainer's own folder are not in SAELens's list
        name = options(sae.info)["dict_class"]
        if "buffer" not in json.loads((sae.file.parent / "config.json").read_text()):
            with pytest.raises(KeyError, match="buffer"):  # SAELens wants the context's length, we do not
                sae_lens.load(sae.suite, sae.path, "dictionary_learning_1")
            continue
        seen.add(name)
        if name == "AutoEncoderNew":
            # Its bias is the decoder's, and is not subtracted: SAELens does not look for one there.
            with pytest.raises(RuntimeError, match="b_dec"):
                sae_lens.load(sae.suite, sae.path, "dictionary_learning_1")
            continue
        peer = sae_lens.load(sae.suite, sae.path, "dictionary_learning_1")
        same(sae.encode(), peer.encode(sae.x), sae.path)
        same(sae.decode(), peer(sae.x), sae.path)
        # SAELens takes every one for an SAE of the layer's output; the config says where it was trained.
        site = from_transformer_lens(peer.cfg.metadata.hook_name)
        assert (site == sae.info.site) == (sae.published.kind == "resid_post")
    assert len(seen) == 7


@sizes
def test_qwen_scope(tmp_path: Path, sae_lens: SaeLens, sizes: str) -> None:
    for sae in fixture(tmp_path, "qwen_scope", sizes):
        peer = sae_lens.load(
            sae.suite, f"{sae.path}.sae.pt", "qwen_scope", "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50",
            d_in=sae.info.d_in, d_sae=sae.info.width, activation_fn_kwargs={"k": 4},
        )  # fmt: skip
        assert from_transformer_lens(peer.cfg.metadata.hook_name) == sae.info.site
        # The publisher's code keeps the k highest pre-activations as they are, SAELens the positive ones.
        f = sae.encode()
        assert (f < 0).any(), "nothing is negative: this proves nothing"
        same(f.relu(), peer.encode(sae.x), sae.path)
        different(f, peer.encode(sae.x), sae.path)


# What SAELens refuses to load, and why; each is read by us.
NATIVE_REFUSED = {
    "saelens": {
        "log": (RuntimeError, "log_threshold"),  # only its training class takes exp of it
        "centred": (ValueError, "normalize_activations must be none"),  # version 6 writes "none", never null
    },
    "saelens_before_6": {
        "log": (RuntimeError, "log_threshold"),
        "unnamed": (KeyError, "None"),  # "architecture": null
        "finetuned": (RuntimeError, "finetuning_scaling_factor"),  # gone with version 6; version 5 had it
    },
}


@sizes
@pytest.mark.parametrize("name", NATIVE_REFUSED)
def test_native(tmp_path: Path, sae_lens: SaeLens, name: str, sizes: str) -> None:
    refused, seen = NATIVE_REFUSED[name], set()
    for sae in fixture(tmp_path, name, sizes):
        if sae.path in refused:
            error, text = refused[sae.path]
            with pytest.raises(error, match=text):
                sae_lens.load(sae.suite, sae.path, "sae_lens")
            continue
        transcoder = sae.info.architecture.endswith("transcoder")
        peer = sae_lens.load(sae.suite, sae.path, "sae_lens", **({"d_out": sae.d_out} if transcoder else {}))
        x, mean = sae.x, torch.zeros(len(sae.x), 1)
        if sae.weights.input.norm == "center":
            # SAELens leaves this to TransformerLens, whose weights are then processed; our model's are not.
            mean = x.mean(dim=1, keepdim=True)
        x = x - mean
        if peer.hook_z_reshaping_mode:
            x = x.reshape(len(x), 2, -1)
        same(sae.encode(), peer.encode(x), sae.path)
        same(sae.decode(), peer(x).reshape(len(x), -1) + mean, sae.path)
        assert peer.cfg.architecture() == sae.info.architecture
        if (site := from_transformer_lens(peer.cfg.metadata.hook_name, sae.info.site.head)) is not None:
            assert site == sae.info.site or peer.cfg.metadata.hf_hook_name
        seen.add(sae.info.architecture)
    assert len(seen) == {"saelens": 9, "saelens_before_6": 4}[name]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2-small-mlp-tm", 12),
        ("gemma-2b-res-jb", 1),
    ],
)
def test_native_normalisation_factors(tmp_path: Path, sae_lens: SaeLens, name: str, count: int) -> None:
    """The factors that SAELens keeps in its list of releases, for SAEs that cannot be read without one."""
    release = sae_lens.releases()[name]
    assert len(release.norm_scaling_factor) == count
    kwargs = (release.config_overrides or {}).get("model_from_pretrained_kwargs", {})
    for sae_id, factor in release.norm_scaling_factor.items():
        suite, path = tmp_path / release.repo_id.split("/")[-1], release.saes_map[sae_id]
        cfg = {
            "hook_point": sae_id, "model_name": release.model, "d_in": 6, "d_sae": 16, "dtype": "float32",
            "normalize_activations": "expected_average_only_in",
        }  # fmt: skip
        native.put(suite / path, cfg, native.tensors(np.random.default_rng(4), "standard", 6, 16, 6))
        weights = suites.load(suites.find(str(suite), select=[path])[0])
        x = inputs(6)
        centred = x - x.mean(dim=1, keepdim=True) if kwargs.get("center_writing_weights") else x
        peer = sae_lens.load(suite, path, "sae_lens", scale=factor)
        same(reference.encode(x, weights), peer.encode(centred), sae_id)
        # The list's path of another layer or version would have another factor: the scale does matter.
        different(
            reference.encode(x, weights), sae_lens.load(suite, path, "sae_lens").encode(centred), sae_id
        )


def test_native_releases_with_overrides(tmp_path: Path, sae_lens: SaeLens) -> None:
    """Whose files do not say how they are read: SAELens's list overrides their configs, and so does ours."""
    checked = []
    for release in sae_lens.releases().values():
        overrides = dict(release.config_overrides or {})
        overrides.pop("dataset_path", None)
        if release.conversion_func is not None or not overrides or release.norm_scaling_factor:
            continue
        assert set(overrides) <= {"model_from_pretrained_kwargs", "normalize_activations"}
        kwargs = overrides.get("model_from_pretrained_kwargs", {})
        assert set(kwargs) <= {"center_writing_weights"}
        sae_id, path = next(iter(release.saes_map.items()))
        suite = tmp_path / release.repo_id.split("/")[-1]
        hook = re.sub(r"_\d+$", "", sae_id)  # one release has the width behind it
        cfg = {"hook_point": hook, "model_name": release.model, "d_in": 6, "d_sae": 16, "dtype": "float32"}
        native.put(suite / path, cfg, native.tensors(np.random.default_rng(4), "standard", 6, 16, 6))
        weights = suites.load(suites.find(str(suite), select=[path])[0])
        x = inputs(6)
        centred = x - x.mean(dim=1, keepdim=True) if kwargs.get("center_writing_weights") else x
        same(
            reference.encode(x, weights),
            sae_lens.load(suite, path, "sae_lens", **overrides).encode(centred),
            release.release,
        )
        different(
            reference.encode(x, weights), sae_lens.load(suite, path, "sae_lens").encode(x), release.release
        )
        checked.append(release.release)
    assert checked == ["gpt2-small-res-jb", "gpt2-small-res-jb-feature-splitting", "mistral-7b-res-wg"]


@sizes
def test_circuit_tracer(tmp_path: Path, sae_lens: SaeLens, sizes: str) -> None:
    """Sets of plain transcoders, the only ones that SAELens reads: its list has mwhanna's and one CLT."""
    sets = [sae for sae in fixture(tmp_path, "circuit_tracer", sizes) if sae.path.startswith("relu/")]
    sets += fixture(tmp_path, "circuit_tracer_wandb", sizes)
    assert len(sets) == 4
    for sae in sets:
        folder = sae.file.parent
        config = next(iter(folder.glob("wan*b-config.yaml")), folder / "wandb-config.yaml")
        entries = {"d_model": sae.info.d_in, "d_feature": sae.info.width, "batch_size": 4}
        config.write_text(yaml.safe_dump({key: {"value": value} for key, value in entries.items()}))
        peer = sae_lens.load(
            folder,
            sae.file.name,
            "mwhanna_transcoder",
            "mwhanna/qwen3-14b-transcoders-lowl0",
            d_out=sae.d_out,
        )
        metadata = peer.cfg.metadata
        assert from_transformer_lens(metadata.hook_name) == sae.info.site
        assert from_transformer_lens(metadata.hook_name_out) == sae.info.out
        assert metadata.model_name == sae.info.trained_on
        same(sae.encode(), peer.encode(sae.x), sae.path)
        same(sae.decode(), peer(sae.x), sae.path)


@sizes
def test_circuit_tracer_cross_layer(tmp_path: Path, sae_lens: SaeLens, sizes: str) -> None:
    seen = []
    for sae in fixture(tmp_path, "circuit_tracer", sizes):
        if not sae.path.startswith(("clt/", "jump_clt/")):
            continue
        seen.append(sae.path)
        layer = str(sae.info.site.layer)
        peer = sae_lens.load(
            sae.file.parent, layer, "mntss_clt_layer_transcoder", "mntss/clt-gemma-2-2b-2.5M"
        )
        assert from_transformer_lens(peer.cfg.metadata.hook_name) == sae.info.site
        if sae.info.architecture == "jumprelu_clt":
            # SAELens reads its one CLT, which has none, and would not look for thresholds.
            different(sae.encode(), peer.encode(sae.x), sae.path)
            threshold, f = load_file(sae.file)[f"threshold_{layer}"], peer.encode(sae.x)
            same(sae.encode(), f * (f > threshold), sae.path)
        else:
            same(sae.encode(), peer.encode(sae.x), sae.path)
        # SAELens sums the decoders of all layers into one; ours has none, for no output is this SAE's own.
        assert sae.weights.W_dec is None
    assert len(seen) == 6


@sizes
def test_hook_z(tmp_path: Path, sae_lens: SaeLens, sizes: str) -> None:
    for sae in fixture(tmp_path, "hook_z", sizes):
        peer = sae_lens.load(sae.suite, sae.file.name, "connor_rob_hook_z")
        assert from_transformer_lens(peer.cfg.metadata.hook_name) == sae.info.site
        x = sae.x.reshape(len(sae.x), 2, -1)
        same(sae.encode(), peer.encode(x), sae.path)
        same(sae.decode(), peer(x).flatten(1), sae.path)


@sizes
def test_llama_scope(tmp_path: Path, sae_lens: SaeLens, sizes: str) -> None:
    """SAELens leaves out the publisher's fold of decoder norms: other values, and another gate.

    Its p_j is ours times s / n_j (s = sqrt(d) / average input norm, n_j the decoder's norms with inputs and
    outputs as they are), active where p_j > s * threshold, ours where n_j p_j > s * threshold.
    """
    for sae in fixture(tmp_path, "llama_scope", sizes):
        hyperparams = json.loads((sae.suite / sae.path / "hyperparams.json").read_text())
        norms, d = hyperparams["dataset_average_activation_norm"], sae.info.d_in
        s, s_out = d**0.5 / norms["in"], d**0.5 / norms["out"]
        peer = sae_lens.load(sae.suite, sae.path, "llama_scope", scale=s)
        assert from_transformer_lens(peer.cfg.metadata.hook_name) == sae.info.site
        assert peer.cfg.metadata.model_name == sae.info.trained_on
        p, threshold = sae.x @ peer.W_enc + peer.b_enc, hyperparams["jump_relu_threshold"] * s
        n = peer.W_dec.norm(dim=1) * s * s / s_out
        same(p.relu() * (p > threshold), peer.encode(sae.x), sae.path)
        same(sae.encode(), p.relu() * (n * p > threshold) * n / s, sae.path)
        different(sae.encode(), peer.encode(sae.x), sae.path)
        assert ((sae.encode() > 0) != (peer.encode(sae.x) > 0)).any(), sae.path
        unit = peer.W_dec / peer.W_dec.norm(dim=1, keepdim=True)
        same(sae.decode(), sae.encode() @ unit + peer.b_dec * s / s_out, sae.path)


@sizes
def test_llama_scope_r1(tmp_path: Path, sae_lens: SaeLens, sizes: str) -> None:
    gated = []
    for sae in fixture(tmp_path, "llama_scope_r1", sizes):
        config = json.loads((sae.suite / sae.path / "config.json").read_text())
        norm = next(t for key, t in load_file(sae.file).items() if key.startswith("dataset_average"))
        s = sae.info.d_in**0.5 / norm.item()  # that SAELens has in its list
        peer = sae_lens.load(sae.suite, sae.path, "llama_scope_r1_distill", scale=s, d_sae=sae.info.width)
        assert from_transformer_lens(peer.cfg.metadata.hook_name) == sae.info.site
        gated.append(config["sparsity_include_decoder_norm"])
        if gated[-1]:
            # The config asks for a gate on pre * |W_dec_j|, which SAELens does not read.
            different(sae.encode(), peer.encode(sae.x), sae.path)
            pre = sae.x @ peer.W_enc + peer.b_enc
            norms = peer.W_dec.norm(dim=1) * s
            same(sae.encode(), pre.relu() * (pre * norms > peer.threshold), sae.path)
        else:
            same(sae.encode(), peer.encode(sae.x), sae.path)
            same(sae.decode(), peer(sae.x), sae.path)
    assert sorted(gated) == [False, True]


@sizes
def test_sparsify(tmp_path: Path, sae_lens: SaeLens, sizes: str) -> None:
    """SAELens's converter is not what the publisher's library does, and no release of its list uses it.

    It turns W_dec, which is [m,d] already: refused, or taken where d and m are equal. It subtracts b_dec only
    without `normalize_decoder`, which is about training. It calls every folder of a layer resid_post.
    """
    seen = []
    for sae in fixture(tmp_path, "sparsify", sizes):
        if not re.fullmatch(r"layers\.\d+(\.attention)?", sae.path):
            continue
        seen.append(sae.path)
        if sae.info.d_in != sae.info.width:
            with pytest.raises(RuntimeError, match="size mismatch for W_dec"):
                sae_lens.load(sae.suite, sae.path, "sparsify", d_sae=sae.info.width)
            continue
        peer = sae_lens.load(sae.suite, sae.path, "sparsify", d_sae=sae.info.width)
        site = from_transformer_lens(peer.cfg.metadata.hook_name)
        assert (site == sae.info.site) == ("." not in sae.path.removeprefix("layers."))
        assert torch.equal(peer.W_dec.T, sae.weights.W_dec)
        different(sae.encode(), peer.encode(sae.x), sae.path)
        same(sae.encode(sae.x + sae.weights.b_pre), peer.encode(sae.x), sae.path)
    assert len(seen) == 2


@sizes
def test_goodfire(tmp_path: Path, sae_lens: SaeLens, sizes: str) -> None:
    seen = []
    for sae in fixture(tmp_path, "goodfire", sizes):
        if not sae.path.startswith("Llama-"):
            continue  # SAELens knows the two by their names
        seen.append(sae.path)
        peer = sae_lens.load(
            sae.suite,
            sae.file.name,
            "goodfire",
            f"Goodfire/{sae.path}",
            d_in=sae.info.d_in,
            d_sae=sae.info.width,
        )
        assert from_transformer_lens(peer.cfg.metadata.hook_name) == sae.info.site
        assert peer.cfg.metadata.model_name == sae.info.trained_on
        same(sae.encode(), peer.encode(sae.x), sae.path)
        same(sae.decode(), peer(sae.x), sae.path)
    assert len(seen) == 2


@sizes
def test_qresearch(tmp_path: Path, sae_lens: SaeLens, sizes: str) -> None:
    for sae in fixture(tmp_path, "qresearch", sizes):
        peer = sae_lens.load(
            sae.suite, sae.file.name, "deepseek_r1", d_in=sae.info.d_in, d_sae=sae.info.width
        )
        assert from_transformer_lens(peer.cfg.metadata.hook_name) == sae.info.site
        assert peer.cfg.metadata.model_name == sae.info.trained_on
        same(sae.encode(), peer.encode(sae.x), sae.path)
        same(sae.decode(), peer(sae.x), sae.path)


@sizes
def test_openai(tmp_path: Path, sae_lens: SaeLens, sizes: str) -> None:
    """SAELens does not read OpenAI's files: its list has copies in its own format, as made here."""
    for sae in fixture(tmp_path, "openai_gpt2", sizes):
        topk = sae.info.architecture == "topk"
        state = torch.load(sae.file, weights_only=True)
        copy = {
            "W_enc": state["encoder.weight"].T, "b_enc": state["latent_bias"],
            "W_dec": state["decoder.weight"].T, "b_dec": state["pre_bias"],
        }  # fmt: skip
        cfg = {
            "hook_point": f"blocks.{sae.info.site.layer}.hook_resid_post", "model_name": "gpt2-small",
            "d_in": sae.info.d_in, "d_sae": sae.info.width, "dtype": "torch.float32",
            "normalize_activations": "layer_norm" if topk else "none",
        }  # fmt: skip
        if topk:
            cfg |= {"activation_fn_str": "topk", "activation_fn_kwargs": state["activation_state_dict"]}
        native.put(
            tmp_path / "copy" / sae.path, cfg, {key: np.ascontiguousarray(t) for key, t in copy.items()}
        )
        peer = sae_lens.load(tmp_path / "copy", sae.path, "sae_lens")
        same(sae.encode(), peer.encode(sae.x), sae.path)
        same(sae.decode(), peer(sae.x), sae.path)
