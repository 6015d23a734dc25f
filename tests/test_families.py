"""Sites in every model family: the truncated text model against hooks and formulas on the whole model."""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import tiny
import torch

from sae_runtime.errors import InputError
from sae_runtime.families import resolve
from sae_runtime.model import (
    LanguageModel,
    ModelSource,
    locate,
    model_size,
    site_paths,
    text_config,
)
from sae_runtime.sites import KINDS, Site, from_hugging_face, from_transformer_lens

GEMMA = ("gemma", "gemma2", "gemma3", "gemma3_text")
FOUR_NORMS = ("gemma2", "gemma3", "gemma3_text")
# What a model computes in float32 against a formula in float64; all else is compared exactly.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def some_ids(length: int = 24, contexts: int = 2) -> torch.Tensor:
    """Token ids [contexts, length], the last context padded on the right."""
    ids = torch.from_numpy(np.random.default_rng(4).integers(3, 300, (contexts, length)))
    ids[-1, length // 2 :] = 0
    return ids


def sites_of(family: str, layers: Any) -> list[tuple[int, str]]:
    return [(n, kind) for n in layers for kind in KINDS if families.path(family, n, kind)]


def rms(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


def standard(x: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + eps)


def core(family: str, x: torch.Tensor, eps: float) -> np.ndarray:
    norm = standard if family.startswith(("gpt2", "gpt_neox")) else rms
    return norm(x.double().numpy(), eps)


def epsilon(config: Any) -> float:
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
    return float(next(getattr(config, name) for name in names if hasattr(config, name)))


@pytest.mark.parametrize("last", [0, 2, 3])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_truncated_equals_whole(models: Any, family: str, last: int) -> None:
    folder, ids = models(family), some_ids()
    causal = tiny.load_causal(folder)
    sites = sites_of(family, sorted({0, last}))
    whole = families.activations(causal, family, ids, sites)
    model = LanguageModel(locate(str(folder)), [Site(*site) for site in sites], dtype="float32")
    found = model.run(ids)
    assert set(found) == {Site(*site) for site in sites}
    for site in sites:
        tap, x = model.taps[Site(*site)], found[Site(*site)]
        assert x.shape == (2, 24, families.width(family, site[1])) == (2, 24, tap.width), site
        assert torch.equal(x, whole[site]), site
        if site[1] == "mlp_in_unit":
            unit = tap.finish(x.flatten(0, 1)).unflatten(0, (2, 24))
            assert unit.dtype == torch.float32
            expected = core(family, whole[site], epsilon(causal.config.get_text_config()))
            np.testing.assert_allclose(unit.numpy(), expected, **CLOSE)
        else:
            assert tap.finish(x) is x


@pytest.mark.parametrize("family", families.FAMILIES)
def test_sites_mean_what_they_say(models: Any, family: str) -> None:
    """Identities of a residual stream, from what the product captures and the whole model's weights alone."""
    folder, ids = models(family), some_ids()
    causal = tiny.load_causal(folder)
    model = LanguageModel(locate(str(folder)), [Site(*s) for s in sites_of(family, range(4))], "float32")
    x = {(site.layer, site.kind): value for site, value in model.run(ids).items()}
    with torch.inference_mode():
        states = causal(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    parts = dict(causal.named_modules())

    def part(path: str | None) -> Any:
        assert path is not None
        return parts[path.removesuffix(", normalised").rpartition(".")[0]]

    rows = causal.get_input_embeddings().weight[ids]
    assert torch.equal(x[0, "embed_unscaled"], rows)
    scale = torch.tensor(families.HIDDEN**0.5) if family in GEMMA else torch.tensor(1.0)
    assert torch.equal(x[0, "embed"], rows * scale)
    if family != "gpt2":  # which adds positions
        assert torch.equal(x[0, "resid_pre"], x[0, "embed"])
    for n in range(families.LAYERS):
        assert torch.equal(x[n, "resid_pre"], states[n]), n
        if n < families.LAYERS - 1:  # the last of them is after the final norm
            assert torch.equal(x[n, "resid_post"], states[n + 1]), n
            assert torch.equal(x[n, "resid_post"], x[n + 1, "resid_pre"]), n
        attention = x[n, "attn_out"]
        if family == "gpt_neox":
            total = x[n, "mlp_out"] + attention + x[n, "resid_pre"]
            before_mlp = x[n, "resid_pre"]
        else:
            before_mlp = x[n, "resid_mid"]
            assert torch.equal(before_mlp, x[n, "resid_pre"] + attention), n
            total = before_mlp + x[n, "mlp_out"]
        assert torch.equal(x[n, "resid_post"], total), n
        assert torch.equal(x[n, "mlp_in_unit"], before_mlp), n
        norm = part(families.path(family, n, "mlp_in_unit"))
        gain = norm.weight.detach().double().numpy() + (family in GEMMA or family == "qwen3_5")  # 1 + weight
        expected = core(family, before_mlp, epsilon(causal.config.get_text_config())) * gain
        if getattr(norm, "bias", None) is not None:
            expected = expected + norm.bias.detach().double().numpy()
        np.testing.assert_allclose(x[n, "mlp_in"].numpy(), expected, **CLOSE)
        with torch.inference_mode():
            if "mlp_hidden" in families.PATHS[family] and family not in FOUR_NORMS:
                down = part(families.path(family, n, "mlp_hidden"))
                assert torch.equal(down(x[n, "mlp_hidden"]), x[n, "mlp_out"]), n
            if families.path(family, n, "attn_z") and family not in FOUR_NORMS:
                assert torch.equal(part(families.path(family, n, "attn_z"))(x[n, "attn_z"]), attention), n
            if family in FOUR_NORMS:  # what is added has passed one more norm
                layer = part(families.path(family, n, "resid_post"))
                z = layer.post_attention_layernorm(layer.self_attn.o_proj(x[n, "attn_z"]))
                assert torch.equal(z, attention), n
                out = layer.post_feedforward_layernorm(layer.mlp.down_proj(x[n, "mlp_hidden"]))
                assert torch.equal(out, x[n, "mlp_out"]), n


@pytest.mark.parametrize("family", families.FAMILIES)
def test_public_paths_and_widths_from_the_config_alone(models: Any, family: str, tmp_path: Path) -> None:
    folder = models(family)
    shutil.copy(folder / "config.json", tmp_path)
    sites = {(n, kind): families.path(family, n, kind) for n, kind in sites_of(family, (1, 3))}
    found = site_paths(ModelSource("it", str(tmp_path), None, ""), [Site(*site) for site in sites])
    expected = {Site(*s): (path, families.width(family, s[1])) for s, path in sites.items()}
    assert found == expected
    loaded = LanguageModel(locate(str(folder)), list(found), "float32")
    assert {site: (tap.path, tap.width) for site, tap in loaded.taps.items()} == expected


@pytest.mark.parametrize("family", families.FAMILIES)
def test_padding_on_the_right_changes_nothing(models: Any, family: str, monkeypatch: Any) -> None:
    warned: list[str] = []
    monkeypatch.setattr("transformers.modeling_utils.logger.warning_once", lambda text: warned.append(text))
    model = LanguageModel(locate(str(models(family))), [Site(*s) for s in sites_of(family, (3,))], "float32")
    ids = some_ids()[:1]
    alone = model.run(ids)
    padded = model.run(torch.cat([ids, torch.zeros(1, 9, dtype=torch.int64)], dim=1))
    for site, x in alone.items():
        torch.testing.assert_close(padded[site][:, :24], x, rtol=1e-4, atol=2e-5)
    assert not warned, "of padding without a mask"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt_neox", "gpt2"])
def test_one_head(models: Any, family: str) -> None:
    folder, ids, d = models(family), some_ids(), families.head_dim(family)
    heads = [Site(1, "attn_z", head) for head in range(families.HEADS)]
    model = LanguageModel(locate(str(folder)), [*heads, Site(1, "attn_z")], "float32")
    z = families.activations(tiny.load_causal(folder), family, ids, [(1, "attn_z")])[1, "attn_z"]
    found = model.run(ids)
    for i, head in enumerate(heads):
        assert torch.equal(found[head], z[..., i * d : (i + 1) * d])
        assert model.taps[head].width == d
        assert model.taps[head].path == f"{families.path(family, 1, 'attn_z')}[head {i}]"
    assert len({x.untyped_storage().data_ptr() for x in found.values()}) == 1, "one tensor, no copies"
    with pytest.raises(InputError, match="head 4 does not exist in the model, which has 4 heads"):
        resolve(model.module, Site(1, "attn_z", 4))
    with pytest.raises(InputError, match="only attn_z has heads"):
        resolve(model.module, Site(1, "resid_post", 0))


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text", "gemma3"])
def test_embeddings_of_gemma_in_bfloat16(models: Any, family: str) -> None:
    """The scale is rounded to bfloat16 first: sqrt(32) is 5.65625 then, not 5.656854."""
    folder, ids = models(family), some_ids()
    model = LanguageModel(locate(str(folder)), [Site(0, "embed"), Site(0, "embed_unscaled")], "bfloat16")
    rows = tiny.load_causal(folder, torch.bfloat16).get_input_embeddings().weight.detach()[ids]
    found = model.run(ids)
    assert torch.equal(found[Site(0, "embed_unscaled")], rows)
    scaled = found[Site(0, "embed")]
    assert scaled.dtype == torch.bfloat16
    assert torch.equal(scaled, (rows.double() * 5.65625).to(torch.bfloat16))
    assert not torch.equal(scaled, (rows.double() * 32**0.5).to(torch.bfloat16))


def test_an_embedding_that_does_not_scale_itself(models: Any) -> None:
    """Where the model's body scales, what the model uses is what enters its first layer."""
    model = LanguageModel(locate(str(models("gemma2"))), [Site(0, "embed")], "float32")
    del model.module.embed_tokens.embed_scale
    tap = resolve(model.module, Site(0, "embed"))
    assert tap.path == "model.layers.0.input"
    assert tap.module is model.module.layers[0]


def test_the_unit_norm_in_bfloat16_is_computed_in_float32(models: Any) -> None:
    for family in ("llama", "gemma2", "gpt2"):
        site = Site(2, "mlp_in_unit")
        model = LanguageModel(locate(str(models(family))), [site], "bfloat16")
        x = model.run(some_ids())[site].flatten(0, 1)
        assert x.dtype == torch.bfloat16
        eps = epsilon(text_config(locate(str(models(family)))))
        unit = model.taps[site].finish(x)
        np.testing.assert_allclose(unit.numpy(), core(family, x, eps), **CLOSE)
        spread = 1e-4 * x  # small enough for eps to matter
        np.testing.assert_allclose(
            model.taps[site].finish(spread).numpy(), core(family, spread, eps), **CLOSE
        )


@pytest.mark.parametrize(
    ("family", "path", "width"),
    [
        ("llama", "self_attn.input", 32),
        ("llama", "self_attn.q_proj.output", 48),
        ("llama", "input_layernorm.output", 32),
        ("llama", "mlp.gate_proj.output", 60),
        ("llama", "mlp.act_fn.output", 60),
        ("llama", "mlp.up_proj.input", 32),
        ("gemma2", "mlp.output", 32),
        ("gemma3", "self_attn.k_proj.output", 24),
        ("qwen3_moe", "mlp.output", 32),
        ("gpt_oss", "mlp.output", 32),
        ("gpt_neox", "attention.query_key_value.output", 96),
        ("gpt_neox", "post_attention_dropout.output", 32),
        ("gpt_neox", "mlp.act.input", 60),
        ("gpt2", "attn.c_attn.output", 96),
        ("gpt2", "mlp.c_fc.output", 60),
        ("gpt2", "ln_1.output", 32),
    ],
)
def test_any_module_by_its_path(models: Any, family: str, path: str, width: int) -> None:
    folder, ids, site = models(family), some_ids(), Site(2, path)
    model = LanguageModel(locate(str(folder)), [site], "float32")
    x = model.run(ids)[site]
    layer = families.path(family, 2, "resid_post")
    assert layer is not None
    name = f"{layer.removesuffix('.output')}.{path}"
    assert (model.taps[site].path, model.taps[site].width) == (name, width)
    causal, seen = tiny.load_causal(folder), []
    module = causal.get_submodule(name.rpartition(".")[0])
    if path.endswith(".output"):
        module.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    else:
        module.register_forward_pre_hook(
            lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
    with torch.inference_mode():
        causal(input_ids=ids, use_cache=False)
    assert x.shape == (2, 24, width)
    assert torch.equal(x, seen[0])


@pytest.mark.parametrize(
    ("family", "site", "words"),
    [
        ("gpt_neox", Site(1, "resid_mid"), "type gpt_neox has no site resid_mid at layer 1: .*parallel"),
        ("qwen3_moe", Site(1, "mlp_hidden"), "type qwen3_moe has no site mlp_hidden .*mixture of experts"),
        ("qwen3_5", Site(1, "attn_z"), "type qwen3_5_text has no site attn_z at layer 1.*no self_attn"),
        ("llama", Site(1, "resid_middle"), "'resid_middle' is unknown; known are embed, "),
        ("llama", Site(1, "mlp.c_proj.input"), "type llama .*no module 'mlp.c_proj', only self_attn, mlp"),
        ("llama", Site(1, "mlp.down_proj"), "must end in .input or .output"),
        ("qwen3", Site(1, "self_attn.q_norm.output"), "does not give one vector"),
        ("qwen3_moe", Site(1, "mlp.gate.output"), "does not give one vector"),
        ("qwen2_moe", Site(1, "mlp.shared_expert.down_proj.input"), "does not give one vector"),
        ("gpt2", Site(4, "resid_post"), "layer 4 does not exist in the model, which has 4 layers"),
        ("gemma3", Site(9, "embed"), "layer 9 does not exist in the model, which has 4 layers"),
    ],
)
def test_refused_before_anything_runs(models: Any, family: str, site: Site, words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        site_paths(locate(str(models(family))), [site])
    assert "\n" not in str(refused.value)


def test_a_module_that_the_model_does_not_run(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(1, "attn.resid_dropout.output")
    model = LanguageModel(locate(str(models("gpt2"))), [site], "float32")
    with pytest.raises(
        InputError, match=r"h.1.attn.resid_dropout.output is \(2, 5, 7\) in the model, not 32"
    ):
        model.taps[site].take(torch.zeros(2, 5, 7))
    unused = replace(model.taps[site], module=torch.nn.Linear(32, 32), path="transformer.unused.output")
    monkeypatch.setattr("sae_runtime.model.resolve", lambda *_: unused)
    model = LanguageModel(locate(str(models("gpt2"))), [site], "float32")
    with pytest.raises(InputError, match=r"does not run transformer.unused.output"):
        model.run(some_ids())


@pytest.mark.parametrize("kind", ["bert", "bloom"])
def test_an_unknown_family_is_named_with_those_that_are_known(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    source = ModelSource("it", str(tmp_path), None, "")
    words = rf"model type '{kind}' has no known sites; supported are Llama, .*Gemma 1 to 3.*GPT-2"
    for attempt in (site_paths, LanguageModel):
        with pytest.raises(InputError, match=words):
            attempt(source, [Site(0, "resid_post")])  # type: ignore[operator]


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key,
        lambda key: re.sub(r"^(model\.)?language_model\.model\.", "model.language_model.", key),
        lambda key: re.sub(r"^model\.language_model\.", "language_model.model.", key),
    ],
    ids=["as saved", "new", "old"],
)
def test_a_multimodal_checkpoint_runs_its_text_stack_only(models: Any, tmp_path: Path, rename: Any) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(models("gemma3"), tmp_path / "model")
    tensors = {rename(key): value for key, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = LanguageModel(locate(str(folder)), [Site(1, "resid_post")], "float32")
    assert not [name for name, _ in model.module.named_parameters() if "vision" in name or "project" in name]
    assert len(model.module.layers) == 2
    ids = some_ids()
    whole = families.activations(tiny.load_causal(models("gemma3")), "gemma3", ids, [(1, "resid_post")])
    assert torch.equal(model.run(ids)[Site(1, "resid_post")], whole[1, "resid_post"])
    assert text_config(locate(str(folder))).max_position_embeddings == families.MAX_LENGTH


def test_tensors_that_a_checkpoint_lacks_are_not_made_up(models: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(models("gpt2"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.ln_2.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 of the model's tensors, e.g. h\.1\.ln_2\.weight"):
        LanguageModel(locate(str(folder)), [Site(1, "resid_post")], "float32")
    LanguageModel(locate(str(folder)), [Site(0, "resid_post")], "float32")  # that layer is not needed


def test_sites_of_one_place_share_a_tensor(models: Any) -> None:
    sites = [Site(1, "resid_pre"), Site(0, "resid_post"), Site(1, "resid_mid"), Site(1, "mlp_in_unit")]
    model = LanguageModel(locate(str(models("llama"))), sites, "float32")
    found = model.run(some_ids())
    assert found[sites[0]].data_ptr() == found[sites[1]].data_ptr()
    assert found[sites[2]].data_ptr() == found[sites[3]].data_ptr()


def test_threads_that_run_a_model_at_once_keep_their_own(models: Any) -> None:
    """Each gets what it gets alone, also after a run that failed, and nothing is kept outside of runs."""
    site = Site(1, "resid_post")
    model = LanguageModel(locate(str(models("llama"))), [site], "float32")
    ids = [some_ids(length) for length in range(20, 28)]
    alone = [model.run(i)[site] for i in ids]
    with pytest.raises(IndexError):
        model.run(torch.full((1, 4), 10**6))
    meet = threading.Barrier(4)

    def run(i: torch.Tensor) -> torch.Tensor:
        meet.wait()
        return model.run(i)[site]

    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(run, ids), alone))
    model.module(input_ids=ids[0], use_cache=False)


def test_names_of_other_libraries(models: Any) -> None:
    """A publisher's own name of a place leads to that place."""
    model = LanguageModel(locate(str(models("gemma3"))), [Site(3, "resid_post")], "float32")
    for name in (
        "model.layers.2.output",
        "model.layers.2.self_attn.o_proj.input",
        "model.layers.2.pre_feedforward_layernorm.output",
        "model.layers.2.post_feedforward_layernorm.output",
        "model.layers.2.post_attention_layernorm.output",
    ):
        site = from_hugging_face(name)
        assert site is not None
        assert resolve(model.module, site).path == name
    for family in ("gpt2", "gpt_neox_sequential", "llama", "gemma2"):
        source = locate(str(models(family)))
        for hook, kind in {
            "blocks.2.hook_resid_mid": "resid_mid",
            "blocks.2.hook_mlp_in": "resid_mid",
            "blocks.2.mlp.hook_post": "mlp_hidden",
            "blocks.2.attn.hook_z": "attn_z",
            "blocks.2.ln2.hook_normalized": "mlp_in_unit",
            "blocks.2.hook_mlp_out": "mlp_out",
            "blocks.2.hook_attn_out": "attn_out",
        }.items():
            site = from_transformer_lens(hook)
            assert site is not None
            assert site_paths(source, [site])[site][0] == families.path(family, 2, kind)


def test_loading_says_nothing(models: Any, capfd: Any) -> None:
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        for family in ("gemma3", "gpt2"):  # layers and a vision tower are left out
            LanguageModel(locate(str(models(family))), [Site(0, "resid_post")], "float32")
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not said
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("family", families.FAMILIES)
def test_size_from_the_config_alone(models: Any, family: str) -> None:
    """Of two layers: what is held, and what a token uses (two experts of four)."""
    causal = tiny.load_causal(models(family))
    layer = families.path(family, 1, "resid_post")
    assert layer is not None
    stack = causal.get_submodule(layer.removesuffix(".1.output"))[:2]
    experts = sum(p.numel() for name, p in stack.named_parameters() if ".experts." in name)
    in_layers = sum(p.numel() for p in stack.parameters())
    outside = causal.get_input_embeddings().weight.numel() + families.HIDDEN  # and the final norm's weight
    if family.startswith(("gpt2", "gpt_neox")):
        outside += families.HIDDEN + (families.MAX_LENGTH * families.HIDDEN if family == "gpt2" else 0)
    held, used = model_size(locate(str(models(family))), [Site(1, "resid_post"), Site(0, "embed")])
    assert held == in_layers + outside
    assert used == in_layers - experts / 2
    assert (experts > 0) == (family in ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"))
