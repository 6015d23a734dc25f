"""Tiny random models of every family that the product knows, and where their sites are.

Sizes that could be mistaken for each other differ, and every norm's weight and bias is random: zeros and
ones would let a wrong norm pass. `PATHS` is written out from the publishers' names of sites and from the
modules' forward functions; nothing here uses the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tiny
import torch

HIDDEN, INTERMEDIATE, LAYERS, HEADS, MAX_LENGTH = 32, 60, 4, 4, 512
EXPERTS, EXPERT_INTERMEDIATE = 4, 20
_HEAD_DIM = 12  # HEADS times it is not HIDDEN; GPT-2 and GPT-NeoX have no choice: HIDDEN / HEADS

_LLAMA = {
    "embed": "model.embed_tokens.output",
    "embed_unscaled": "model.embed_tokens.weight",
    "resid_pre": "model.layers.N.input",
    "resid_mid": "model.layers.N.post_attention_layernorm.input",
    "resid_post": "model.layers.N.output",
    "attn_z": "model.layers.N.self_attn.o_proj.input",
    "attn_out": "model.layers.N.self_attn.output",
    "mlp_in": "model.layers.N.mlp.input",
    "mlp_in_unit": "model.layers.N.post_attention_layernorm.input, normalised",
    "mlp_hidden": "model.layers.N.mlp.down_proj.input",
    "mlp_out": "model.layers.N.mlp.output",
}
_MIXTURE = {kind: path for kind, path in _LLAMA.items() if kind != "mlp_hidden"}
_GEMMA = _LLAMA | {
    "resid_mid": "model.layers.N.pre_feedforward_layernorm.input",
    "attn_out": "model.layers.N.post_attention_layernorm.output",
    "mlp_in": "model.layers.N.pre_feedforward_layernorm.output",
    "mlp_in_unit": "model.layers.N.pre_feedforward_layernorm.input, normalised",
    "mlp_out": "model.layers.N.post_feedforward_layernorm.output",
}
_NESTED = {kind: path.replace("model.", "model.language_model.", 1) for kind, path in _GEMMA.items()}
_NEOX = {
    "embed": "gpt_neox.embed_in.output",
    "embed_unscaled": "gpt_neox.embed_in.weight",
    "resid_pre": "gpt_neox.layers.N.input",
    "resid_mid": "gpt_neox.layers.N.post_attention_layernorm.input",
    "resid_post": "gpt_neox.layers.N.output",
    "attn_z": "gpt_neox.layers.N.attention.dense.input",
    "attn_out": "gpt_neox.layers.N.attention.output",
    "mlp_in": "gpt_neox.layers.N.mlp.input",
    "mlp_in_unit": "gpt_neox.layers.N.post_attention_layernorm.input, normalised",
    "mlp_hidden": "gpt_neox.layers.N.mlp.dense_4h_to_h.input",
    "mlp_out": "gpt_neox.layers.N.mlp.output",
}
_PARALLEL = {kind: path for kind, path in _NEOX.items() if kind != "resid_mid"}
_GPT_2 = {
    "embed": "transformer.wte.output",
    "embed_unscaled": "transformer.wte.weight",
    "resid_pre": "transformer.h.N.input",
    "resid_mid": "transformer.h.N.ln_2.input",
    "resid_post": "transformer.h.N.output",
    "attn_z": "transformer.h.N.attn.c_proj.input",
    "attn_out": "transformer.h.N.attn.output",
    "mlp_in": "transformer.h.N.mlp.input",
    "mlp_in_unit": "transformer.h.N.ln_2.input, normalised",
    "mlp_hidden": "transformer.h.N.mlp.c_proj.input",
    "mlp_out": "transformer.h.N.mlp.output",
}
PATHS: dict[str, dict[str, str]] = {  # family -> kind -> public path; kinds that are missing it does not have
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MIXTURE,
    "qwen2": _LLAMA,
    "qwen2_moe": _MIXTURE,
    "qwen3": _LLAMA,
    "qwen3_moe": _MIXTURE,
    "qwen3_5": _LLAMA,  # layers 0 to 2 have linear attention: no attn_z, and attn_out is of another module
    "gpt_oss": _MIXTURE,
    "gemma": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma3": _NESTED,
    "gpt_neox": _PARALLEL,
    "gpt_neox_sequential": _NEOX,
    "gpt2": _GPT_2,
}
FAMILIES = tuple(PATHS)


def head_dim(family: str) -> int:
    """Length of one head's slice of `attn_z`."""
    return HIDDEN // HEADS if family.startswith("gpt_neox") or family in _NO_HEAD_DIM else _HEAD_DIM


def width(family: str, kind: str) -> int:
    """Length of a site's activation vector."""
    return {"attn_z": HEADS * head_dim(family), "mlp_hidden": INTERMEDIATE}.get(kind, HIDDEN)


def path(family: str, layer: int, kind: str) -> str | None:
    """The site's public path; None where the layer has no such site."""
    if family == "qwen3_5" and layer < 3:
        if kind == "attn_z":
            return None
        if kind == "attn_out":
            return f"model.layers.{layer}.linear_attn.output"
    found = PATHS[family].get(kind)
    return found and found.replace(".N.", f".{layer}.")


def make(family: str, folder: Path) -> Path:
    """A random model of `family` in `folder`, with its tokenizer, as `save_pretrained` writes them."""
    tokenizer = tiny.make_tokenizer(bos=True)
    torch.manual_seed(FAMILIES.index(family))
    model = _MAKERS[family](len(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def activations(
    causal: Any, family: str, ids: torch.Tensor, sites: Iterable[tuple[int, str]]
) -> dict[tuple[int, str], torch.Tensor]:
    """What the modules named by `PATHS` see or give in the whole model: [contexts, length, width] per site.

    `mlp_in_unit` is left as the norm's input; `embed_unscaled` are the matrix's rows of `ids`.
    """
    found: dict[tuple[int, str], torch.Tensor] = {}
    handles = []

    def keep(site: tuple[int, str], value: Any) -> None:
        found[site] = (value[0] if isinstance(value, tuple) else value).clone()

    for site in sites:
        at = path(family, *site)
        assert at is not None
        name, _, side = at.removesuffix(", normalised").rpartition(".")
        module = causal.get_submodule(name)
        if side == "weight":
            found[site] = module.weight[ids]
        elif side == "input":
            before = lambda m, a, k, s=site: keep(s, a or k["hidden_states"])  # noqa: E731
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(lambda m, a, out, s=site: keep(s, out)))
    with torch.inference_mode():
        causal(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def _common(vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": MAX_LENGTH,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    } | more


def _grouped(vocabulary: int, **more: Any) -> dict[str, Any]:
    return _common(vocabulary, num_key_value_heads=2, **more)


def _gemma_2(vocabulary: int, **more: Any) -> dict[str, Any]:
    return _grouped(
        vocabulary,
        head_dim=_HEAD_DIM,
        query_pre_attn_scalar=_HEAD_DIM,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
        **more,
    )


def _llama(vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_grouped(vocabulary, head_dim=_HEAD_DIM)))


def _mistral(vocabulary: int) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**_grouped(vocabulary, head_dim=_HEAD_DIM, sliding_window=6)))


def _mixtral(vocabulary: int) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    more = {"head_dim": _HEAD_DIM, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**_grouped(vocabulary, **more)))


def _qwen2(vocabulary: int) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    windows = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
    return Qwen2ForCausalLM(Qwen2Config(**_grouped(vocabulary, **windows)))


def _experts() -> dict[str, Any]:
    return {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": EXPERT_INTERMEDIATE,
        "decoder_sparse_step": 1,
    }


def _qwen2_moe(vocabulary: int) -> Any:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    more = {**_experts(), "shared_expert_intermediate_size": 28}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**_grouped(vocabulary, **more)))


def _qwen3(vocabulary: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_grouped(vocabulary, head_dim=_HEAD_DIM)))


def _qwen3_moe(vocabulary: int) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_grouped(vocabulary, head_dim=_HEAD_DIM, **_experts())))


def _qwen3_5(vocabulary: int) -> Any:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = _grouped(
        vocabulary,
        head_dim=_HEAD_DIM,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=6,
        linear_value_head_dim=10,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 1],
        },
    )
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": HIDDEN,
        "num_position_embeddings": 16,
    }  # fmt: skip
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision))


def _gpt_oss(vocabulary: int) -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    more = {
        "head_dim": _HEAD_DIM,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
    }
    return GptOssForCausalLM(GptOssConfig(**_grouped(vocabulary, **more)))


def _gemma(vocabulary: int) -> Any:
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(**_grouped(vocabulary, head_dim=_HEAD_DIM)))


def _gemma2(vocabulary: int) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**_gemma_2(vocabulary, attn_logit_softcapping=3.0)))


def _gemma3_text(vocabulary: int) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(**_gemma_2(vocabulary)))


def _gemma3(vocabulary: int) -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {
        "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=_gemma_2(vocabulary),
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=vocabulary - 1,
        boi_token_index=vocabulary - 2,
        eoi_token_index=vocabulary - 3,
    )
    return Gemma3ForConditionalGeneration(config)


def _neox(parallel: bool) -> Callable[[int], Any]:
    def maker(vocabulary: int) -> Any:
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        more = {"use_parallel_residual": parallel, "rotary_pct": 0.5, "layer_norm_eps": 1e-3}
        return GPTNeoXForCausalLM(GPTNeoXConfig(**_common(vocabulary, **more)))

    return maker


def _gpt2(vocabulary: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=MAX_LENGTH,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=INTERMEDIATE,
        initializer_range=0.2,
        layer_norm_epsilon=1e-3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return GPT2LMHeadModel(config)


_NO_HEAD_DIM = ("gpt2", "qwen2", "qwen2_moe")
_MAKERS: dict[str, Callable[[int], Any]] = {
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "qwen3_5": _qwen3_5,
    "gpt_oss": _gpt_oss,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3_text,
    "gemma3": _gemma3,
    "gpt_neox": _neox(parallel=True),
    "gpt_neox_sequential": _neox(parallel=False),
    "gpt2": _gpt2,
}
