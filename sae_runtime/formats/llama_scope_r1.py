"""Llama Scope R1 (OpenMOSS, 2025; DeepSeek-R1-Distill-Llama-8B): SAEs of the residual stream.

    400M-Slimpajama-400M-OpenR1-Math-220k/L15R/config.json
    400M-Slimpajama-400M-OpenR1-Math-220k/L15R/sae_weights.safetensors
        encoder.weight [m,d]  encoder.bias  decoder.weight [d,m]  decoder.bias
        log_jumprelu_threshold [m]  dataset_average_activation_norm.{in,out} (or by the hook's name)

    pre = (x * sqrt(d) / norm) W_enc + b_enc      f = relu(pre) * (pre > exp(log threshold))

The thresholds are of the normalised space: nothing scales them. Where the config says
sparsity_include_decoder_norm, pre_j * |W_dec_j| is compared, and pre_j is the value.
"""

from __future__ import annotations

from sae_runtime import weights
from sae_runtime.errors import InputError
from sae_runtime.formats import openmoss
from sae_runtime.formats.base import JUMPRELU, Candidate, Description, boolean, matrix, need, options
from sae_runtime.hub import HubError
from sae_runtime.sae import Input, SaeInfo, SaeWeights
from sae_runtime.sites import Site
from sae_runtime.tree import Tree, read_json

_KINDS = {"R": "resid_post", "A": "attn_out", "M": "mlp_out"}
_KEYS = ("encoder.weight", "encoder.bias", "log_jumprelu_threshold", "decoder.weight", "decoder.bias")
GATED_BY_NORM = "; pre * |W_dec_j| is what is compared with it"
SCALED = "; of inputs times sqrt(d) / their average norm"


def candidates(tree: Tree) -> list[Candidate]:
    """One for each folder named L{n}R; of other names, where the tensors are named as in this format."""
    return [
        Candidate(at, (file, openmoss.join(at, "config.json")))
        for at, file in openmoss.weight_files(tree).items()
        if file.endswith(".safetensors") and _ours(openmoss.last(tree, at), tree.path(file))
    ]


def describe(tree: Tree, candidate: Candidate) -> Description:
    """From the config and the header; the folder's name where the config has no hooks."""
    file, config = (tree.path(name) for name in candidate.files)
    cfg, found = read_json(config), weights.headers(file)
    width, d_in = matrix(found, "encoder.weight", file)
    openmoss.check_d_model(cfg, d_in, file)
    need(dict(found), "log_jumprelu_threshold", file)
    for key, value in {"act_fn": "jumprelu", "norm_activation": "dataset-wise"}.items():
        if str(cfg.get(key, value)).lower() != value:
            raise InputError(f"saes: {key} in {config} is {cfg[key]!r}; only {value!r} is known")
    openmoss.check_encoder(cfg, found, config)
    gated = boolean(cfg, "sparsity_include_decoder_norm", config, False)
    hook_in = str(cfg.get("hook_point_in", ""))
    hook_out = str(cfg.get("hook_point_out", hook_in))
    site, out, layer = openmoss.sites(hook_in, hook_out, config)
    match = openmoss.R1.fullmatch(openmoss.last(tree, candidate.path))
    if not hook_in and match:
        site = out = Site(int(match[1]), _KINDS[match[2]])
    return Description(
        "jumprelu" if hook_in == hook_out else "jumprelu_transcoder",
        d_in,
        width,
        JUMPRELU + (GATED_BY_NORM if gated else "") + SCALED,
        site,
        out,
        layer,
        trained_on=_trained_on(tree, candidate),
        options={
            "gated": gated,
            "norm_in": openmoss.norm_key(found, ("in", hook_in, "hook"), file),
            "norm_out": openmoss.norm_key(
                found, ("out", hook_out, *(("in", "hook") if hook_in == hook_out else ())), file
            ),
        },
    )


def load(info: SaeInfo) -> SaeWeights:
    """As published; only a decoder of another norm than the input's is brought to the input's."""
    how = options(info)
    found = weights.read(info.uri, (*_KEYS, how["norm_in"], how["norm_out"]))
    tensors = {key: need(found, key, info.uri) for key in (*_KEYS, how["norm_in"], how["norm_out"])}
    W_dec, b_dec = tensors["decoder.weight"].T.contiguous(), tensors["decoder.bias"]
    s, s_out = (
        openmoss.factor(tensors[how[key]], info.d_in, how[key], info.uri) for key in ("norm_in", "norm_out")
    )
    restore = info.out == info.site
    norms = W_dec.norm(dim=1)
    W_dec, b_dec = openmoss.raw_decoder(W_dec, b_dec, s, s_out, restore)
    return SaeWeights(
        "jumprelu",
        W_enc=tensors["encoder.weight"].T.contiguous(),
        b_enc=tensors["encoder.bias"],
        W_dec=W_dec,
        b_dec=b_dec,
        threshold=tensors["log_jumprelu_threshold"].exp(),
        input=Input(scale=s),
        restore=restore,
        select_scale=norms if how["gated"] else None,
    )


def _ours(name: str, file: str) -> bool:
    if openmoss.R1.fullmatch(name) or openmoss.LLAMASCOPIUM.match(name):
        return openmoss.R1.fullmatch(name) is not None
    try:
        return "encoder.weight" in weights.headers(file)
    except HubError:
        raise
    except InputError:  # unreadable: llamascopium, which goes by the config, says so of this one alone
        return False


def _trained_on(tree: Tree, candidate: Candidate) -> str | None:
    # The configs name the base model that DeepSeek distilled into; the repository says what they read.
    known = "R1-Distill" in tree.uri or "OpenR1" in f"{tree.uri}/{candidate.path}"
    return "deepseek-ai/DeepSeek-R1-Distill-Llama-8B" if known else None
