"""SAELens' own format (`save_model`, and what its trainers leave): every architecture that is token-local.

    <folder>/cfg.json  <folder>/sae_weights.safetensors
    W_enc [d,m]  b_enc [m]  W_dec [m,n]  b_dec [n]  threshold | log_threshold [m]  W_skip [n,d]
    gated: b_gate, b_mag, r_mag [m] and no b_enc

Since version 6 the encoding's keys are at the top of cfg.json and the model's under `metadata`; before,
all are at the top, some under other names, with `apply_b_dec_to_input` true unless it is there, and
`activation_fn: topk` overriding an architecture that says "standard". sparsity.safetensors and the
trainers' other files do not matter here.

    z = normalise(x) - b_dec [apply_b_dec_to_input, never in a transcoder]       pre = z W_enc + b_enc

With `rescale_acts_by_decoder_norm` (topk, abstopk) pre is times |W_dec_j| and the decoder divides it back:
this is folded here, as SAELens does when it saves. Everything else stays as published.

What SAELens' registry says of a release and its files do not (_REGISTRY) is known by the suite's name.
Source: SAELens 6.54.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sae_runtime import weights
from sae_runtime.errors import InputError
from sae_runtime.formats.base import (
    JUMPRELU,
    RELU,
    TOPK,
    Candidate,
    Description,
    boolean,
    matrix,
    need,
    options,
    whole,
)
from sae_runtime.formats.hub_names import hub_id
from sae_runtime.sae import Input, Norm, Rule, SaeInfo, SaeWeights
from sae_runtime.sites import KINDS, Site, from_hugging_face, from_transformer_lens
from sae_runtime.tree import Tree, folder, read_json

WEIGHTS = "sae_weights.safetensors"

_RULES: dict[str, Rule] = {
    "standard": "relu",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "abstopk": "abstopk",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_CHECKPOINT = "a training checkpoint that chooses over a batch; save it for inference, as jumprelu"
_REFUSED = {
    "matching_pursuit": "its encoder subtracts one decoder row after another, which none of the rules is",
    "temporal": "its features depend on the tokens before, so that a token alone has no activation",
    "batchtopk": _CHECKPOINT,
    "matryoshka_batchtopk": _CHECKPOINT,
}
_CONVENTIONS: dict[Rule, str] = {
    "relu": RELU,
    "jumprelu": JUMPRELU,
    "gated": "published encoder output: relu(magnitude) where the gate is above 0",
    "topk": TOPK,
    "abstopk": "published encoder output: pre at the k highest |pre| of a token, with its sign",
}
_RESCALED = "; pre is times the norm of the feature's decoder row"
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "hook_point_layer": "hook_layer",
    "activation_fn_str": "activation_fn",
}
_CENTRED = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
# Weight processing of TransformerLens that changes what a site holds, and where.
_PROCESSING = {
    "fold_value_biases": "attn_z",
    "refactor_factored_attn_matrices": "attn_z",
    "fold_ln": "mlp_in",
}


@dataclass(frozen=True)
class _Release:
    """What SAELens' registry adds to a release's files."""

    center: bool = False
    normalize: str | None = None
    factors: Mapping[int, float] = field(default_factory=dict)  # of layers, for expected_average_only_in


_REGISTRY = {
    "GPT2-Small-SAEs-Reformatted": _Release(center=True),
    "GPT2-Small-Feature-Splitting-Experiment-Layer-8": _Release(center=True),
    "gpt2-small-mlp-out-saes": _Release(
        center=True,
        factors={
            0: 1.049317316132615, 1: 2.3693984005104283, 2: 1.6411934982190302, 3: 1.8958522157897557,
            4: 1.81673478700627, 5: 1.550234472245924, 6: 1.3237742807210804, 7: 1.1042905114723296,
            8: 0.9123762783479742, 9: 0.6955335635232373, 10: 0.3619728926727644, 11: 0.2851548652550073,
        },
    ),
    "Gemma-2b-Residual-Stream-SAEs": _Release(factors={12: 0.21381938399317255}),
    "Mistral-7B-Residual-Stream-SAEs": _Release(normalize="constant_norm_rescale"),
}  # fmt: skip


@dataclass(frozen=True)
class _Config:
    """cfg.json, whichever its version: what changes the encoding, and what is about the model."""

    file: str
    encoding: dict[str, Any]
    model: dict[str, Any]

    def refuse(self, what: str) -> InputError:
        """The error that this config's SAE cannot be read, and why."""
        return InputError(f"saes: {self.file}: {what}")


def candidates(tree: Tree) -> list[Candidate]:
    """One for each sae_weights.safetensors with a cfg.json beside it."""
    there = set(tree.files)
    pairs = [(file, f"{file[: -len(WEIGHTS)]}cfg.json") for file in tree.named(WEIGHTS)]
    return [Candidate(folder(file), (file, config)) for file, config in pairs if config in there]


def describe(tree: Tree, candidate: Candidate) -> Description:
    """From cfg.json and the header. Raises InputError for what SAELens cannot say or this cannot encode."""
    file, config = (tree.path(part) for part in candidate.files)
    cfg, release = _config(config), _release(tree)
    architecture = cfg.encoding.get("architecture") or "standard"
    if architecture in _REFUSED:
        raise cfg.refuse(f"architecture {architecture}: {_REFUSED[architecture]}")
    if architecture not in _RULES:
        raise cfg.refuse(f"architecture {architecture!r} is unknown; known are {', '.join(_RULES)}")
    _check(cfg, architecture)
    d_in, width = _sizes(cfg, file)
    rule, transcoder = _RULES[architecture], architecture.endswith("transcoder")
    subtract = not transcoder and cfg.encoding.get("apply_b_dec_to_input", True)
    # Left in the configs of batch top-k SAEs that were saved as jumprelu, whose weights have it already.
    rescale = rule in ("topk", "abstopk") and boolean(
        cfg.encoding, "rescale_acts_by_decoder_norm", config, False
    )
    _check_tensors(cfg, architecture, file)
    k = _k(cfg) if rule in ("topk", "abstopk") else None
    site = _site(cfg)
    if site is None and transcoder:
        raise cfg.refuse("no hook_name, so that what this transcoder reads is not known")
    how = _input(cfg, release, site, architecture)
    neuronpedia = cfg.model.get("neuronpedia_id")
    layer = cfg.model.get("hook_layer")
    return Description(
        architecture,
        d_in,
        width,
        _CONVENTIONS[rule] + (_RESCALED if rescale else ""),
        site,
        out=_site(cfg, "_out") if transcoder else site,
        layer=layer if isinstance(layer, int) else None,
        nominal_l0=None if k is None else float(k),
        trained_on=hub_id(cfg.model.get("model_name")),
        neuronpedia=neuronpedia if isinstance(neuronpedia, str) and neuronpedia else None,
        options={
            "norm": how.norm,
            "scale": how.scale,
            "subtract": subtract,
            "rescale": rescale,
            "k": k,
            "finetuned": boolean(cfg.encoding, "finetuning_scaling_factor", config, False),
        },
    )


def load(info: SaeInfo) -> SaeWeights:
    """The tensors as they are, but for the folds that the module's text names."""
    how, file = options(info), info.uri
    found = weights.read(file)
    rule, transcoder = _RULES[info.architecture], info.architecture.endswith("transcoder")
    W_enc, W_dec, b_dec = (need(found, key, file) for key in ("W_enc", "W_dec", "b_dec"))
    b_enc = need(found, "b_mag" if rule == "gated" else "b_enc", file)
    W_dec = _finetuned(W_dec, found, how["finetuned"], file)
    if how["rescale"]:
        norms = W_dec.norm(dim=1)
        W_enc, b_enc = W_enc * norms, b_enc * norms
        W_dec = W_dec / torch.where(norms > 0, norms, torch.ones_like(norms))[:, None]
    sae = SaeWeights(
        rule,
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        k=how["k"],
        input=Input(how["norm"], how["scale"]),
        restore=not transcoder,
        b_pre=b_dec if how["subtract"] else None,
    )
    if rule == "jumprelu":
        log = found.get("log_threshold")
        sae = replace(sae, threshold=need(found, "threshold", file) if log is None else torch.exp(log))
    if rule == "gated":
        sae = replace(sae, b_gate=need(found, "b_gate", file), r_mag=need(found, "r_mag", file))
    if "skip" in info.architecture:
        sae = replace(sae, W_skip=need(found, "W_skip", file).T.contiguous())
    return sae


def _check_tensors(cfg: _Config, architecture: str, file: str) -> None:
    """Refuse tensors that the architecture does not have: they, or the architecture, would be wrong."""
    known = {"W_enc", "W_dec", "b_dec", "scaling_factor", "finetuning_scaling_factor"}
    known |= {"b_mag", "b_gate", "r_mag"} if architecture == "gated" else {"b_enc"}
    known |= {"threshold", "log_threshold"} if _RULES[architecture] == "jumprelu" else set()
    known |= {"W_skip"} if "skip" in architecture else set()
    more = sorted(weights.headers(file).keys() - known)
    if architecture == "gated" and "b_enc" in more:  # there in some files, and zero
        more.remove("b_enc")
        if weights.read(file, ["b_enc"])["b_enc"].any():
            raise cfg.refuse(f"b_enc in {file} is not zero, and a gated SAE has none")
    if more:
        raise cfg.refuse(f"architecture {architecture!r} has no {', '.join(more)}, which {file} has")


def _finetuned(W_dec: torch.Tensor, found: dict[str, torch.Tensor], wanted: bool, file: str) -> torch.Tensor:
    """W_dec with a fine-tuning scale, which SAELens before 6 put between activations and decoder."""
    for key in ("scaling_factor", "finetuning_scaling_factor"):
        scale = found.get(key)
        if scale is None or torch.allclose(scale, torch.ones_like(scale)):
            continue
        if not wanted:
            raise InputError(
                f"saes: {key} in {file} is not all ones, and its cfg.json does not set "
                "finetuning_scaling_factor, so that what it scales is not known"
            )
        if tuple(scale.shape) != (len(W_dec),):
            raise InputError(f"saes: {key} in {file} is {tuple(scale.shape)}, not {(len(W_dec),)}")
        W_dec = W_dec * scale[:, None]
    return W_dec


def _release(tree: Tree) -> _Release:
    """By the suite's name; or, where the suite is a folder of one or named otherwise, by its URI."""
    places = [tree.name, *(part.partition("@")[0] for part in tree.uri.split("/"))]
    return next((_REGISTRY[place] for place in places if place in _REGISTRY), _Release())


def _config(file: str) -> _Config:
    """cfg.json with the keys of version 6. Raises InputError for an activation function of its own."""
    raw = read_json(file)
    metadata = raw.get("metadata") if isinstance(raw.get("metadata"), dict) else {}
    assert isinstance(metadata, dict)
    version = re.match(
        r"v?(\d+)", str(raw.get("sae_lens_version") or metadata.get("sae_lens_version") or "0")
    )
    if version is not None and int(version[1]) >= 6:
        return _Config(file, raw, {**raw, **metadata})
    old = {_RENAMED.get(key, key): value for key, value in raw.items()}
    cfg = _Config(file, old, {**old, **metadata})
    function, kwargs = old.get("activation_fn") or "relu", old.get("activation_fn_kwargs") or {}
    architecture = old.get("architecture") or "standard"
    if function == "topk":
        if architecture not in ("standard", "topk"):
            raise cfg.refuse(f"activation_fn topk with architecture {architecture!r} has no known meaning")
        if str(kwargs.get("postact_fn", "relu")).lower() != "relu":
            raise cfg.refuse(
                f"activation_fn_kwargs.postact_fn {kwargs['postact_fn']!r} is unknown; relu is known"
            )
        old["architecture"] = architecture = "topk"
    elif function != "relu" and not (function == "jumprelu" and architecture.startswith("jumprelu")):
        raise cfg.refuse(f"activation_fn {function!r} is unknown; relu and topk are known")
    if architecture == "topk":
        old["k"] = kwargs.get("k", old.get("k"))
    if isinstance(old.get("normalize_activations"), bool):
        old["normalize_activations"] = "expected_average_only_in" if old["normalize_activations"] else "none"
    return cfg


def _check(cfg: _Config, architecture: str) -> None:
    """Refuse keys that change the encoding in ways that are not known."""
    apply = cfg.encoding.get("apply_b_dec_to_input", True)
    if not isinstance(apply, bool):  # null and 0 are false to SAELens, and missing is true
        raise cfg.refuse(f"apply_b_dec_to_input is {apply!r}; write true or false")
    if architecture.endswith("transcoder") and cfg.encoding.get("apply_b_dec_to_input"):
        raise cfg.refuse(
            "apply_b_dec_to_input in a transcoder: its b_dec belongs to the output, not the input"
        )
    if (cfg.encoding.get("reshape_activations") or "none") not in ("none", "hook_z"):
        raise cfg.refuse(f"reshape_activations {cfg.encoding['reshape_activations']!r} is unknown")
    for key in ("is_transcoder", "activation_normalization_factor"):
        if cfg.encoding.get(key):
            raise cfg.refuse(f"{key} is not part of SAELens' {architecture} and its meaning is not known")


def _sizes(cfg: _Config, file: str) -> tuple[int, int]:
    """d_in and width from the header. Raises InputError where cfg.json has others."""
    shape = matrix(weights.headers(file), "W_enc", file)
    for key, have in zip(("d_in", "d_sae"), shape, strict=True):
        wanted = cfg.encoding.get(key)
        if isinstance(wanted, int) and wanted != have:
            raise cfg.refuse(f"{key} is {wanted}, but W_enc in {file} is {shape}")
    return shape


def _k(cfg: _Config) -> int:
    k = cfg.encoding.get("k")
    if isinstance(k, bool) or not isinstance(k, int | float) or k != int(k):
        raise cfg.refuse(f"k is {k!r}; a top-k SAE needs a whole number")
    return int(k)


def _site(cfg: _Config, end: str = "") -> Site | None:
    """What `hf_hook_name` says, else `hook_name`; None for neither (`end` "_out": or for an unknown one)."""
    name, module = cfg.model.get(f"hook_name{end}"), cfg.model.get(f"hf_hook_name{end}")
    head = cfg.model.get(f"hook_head_index{end}")
    site = from_hugging_face(module) if module else None
    if site is None and name:
        site = from_transformer_lens(name) or from_hugging_face(name)
    if site is None and name and cfg.model.get("model_class_name") == "AutoModelForCausalLM":
        site = from_hugging_face(f"{name}.output")  # SAELens hooks the module's output
    if end:
        return site
    if site is None and (name or module):
        raise cfg.refuse(f"it reads {module or name!r}, which is no known site; known are {', '.join(KINDS)}")
    if head is None:
        return site
    if site is None or site.kind != "attn_z":
        raise cfg.refuse(f"hook_head_index {head} at {name!r}: only attn.hook_z is read by head")
    return replace(site, head=whole({"hook_head_index": head}, "hook_head_index", cfg.file))


def _input(cfg: _Config, release: _Release, site: Site | None, architecture: str) -> Input:
    """The normalisation, with TransformerLens' centring where the model was loaded so."""
    how = release.normalize or cfg.encoding.get("normalize_activations") or "none"
    kwargs = cfg.model.get("model_from_pretrained_kwargs") or {}
    for key, kind in _PROCESSING.items():
        if kwargs.get(key) and site is not None and site.kind == kind:
            raise cfg.refuse(f"model_from_pretrained_kwargs.{key} changes what {kind} holds; not supported")
    center = release.center or boolean(kwargs, "center_writing_weights", cfg.file, False)
    if center and site is None:
        raise cfg.refuse(
            "center_writing_weights without a hook_name: whether the site is centred is not known"
        )
    center = center and site is not None and site.kind in _CENTRED
    plain: Norm = "center" if center else "none"
    if how == "none":
        return Input(plain)
    if how == "expected_average_only_in":
        if site is None or site.layer not in release.factors:
            raise cfg.refuse(
                "normalize_activations expected_average_only_in, but its scalar (norm_scaling_factor) is not "
                "in the files; fold it into the weights (SAELens' fold_activation_norm_scaling_factor)"
            )
        return Input(plain, scale=release.factors[site.layer])
    if how == "covariance_whitening":
        raise cfg.refuse(
            "normalize_activations covariance_whitening, but the whitening is not in the files; "
            "fold it into the weights (SAELens: fold_activation_whitening) and save again"
        )
    if how not in ("layer_norm", "constant_norm_rescale"):
        raise cfg.refuse(f"normalize_activations {how!r} is unknown")
    if "skip" in architecture:
        raise cfg.refuse(
            f"normalize_activations {how} with a skip connection, which reads the raw activation"
        )
    if how == "layer_norm":
        return Input("layer_norm", eps=1e-5)  # centres by itself
    if center:
        raise cfg.refuse("constant_norm_rescale of a centred site (center_writing_weights) is not supported")
    return Input("constant_norm")
