"""dictionary_learning (saprmarks, adamkarvonen, canrager, andyrdt; SAEBench): ae.pt and config.json.

    resid_post_layer_12/trainer_0/{ae.pt,config.json}
    resid_post_layer_12/trainer_0/checkpoints/ae_5000.pt            with the trainer's config.json
    resid_post_layer_12_checkpoints/trainer_0_step_5000/ae.pt

The config's `dict_class` decides keys, orientation and encoder (_CLASSES); its `submodule_name` and the
buffer's `io` the site. What was normalised in training is folded into the file, so raw activations go in,
and raw weights are used: the library's own loader multiplies an AutoEncoder by its decoder's norms unless
told not to. A batch top-k SAE is encoded with its stored threshold, never by a batch: results must not
depend on batching. Source: the library's dictionary.py and trainers, version 0.1.0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
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
    matrix,
    need,
    options,
    whole,
)
from sae_runtime.sae import Rule, SaeInfo, SaeWeights
from sae_runtime.sites import Site
from sae_runtime.tree import Tree, folder, read_json, stem

_CHECKPOINT = re.compile(r"(?:^|/)checkpoints/ae_\d+\.pt$")
_BATCH = "published encoder output: relu(pre) * (relu(pre) > threshold), the stored scalar"
_NORMED = f"{RELU}, raw weights; from_pretrained(normalize_decoder=True) would multiply by decoder norms"


@dataclass(frozen=True)
class _Class:
    """A dict_class: what it is called here, how it encodes and where its tensors are."""

    architecture: str
    rule: Rule
    convention: str
    keys: dict[str, str]  # field of SaeWeights -> key
    linear: bool  # matrices as torch.nn.Linear has them: encoder [m,d], decoder [d,m]
    subtract: bool  # whether b_dec is subtracted from the input

    @property
    def batch(self) -> bool:
        """Whether it was trained on the top-k of a batch, and has one threshold instead."""
        return self.convention == _BATCH


_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
_PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_GATED = {
    "W_enc": "encoder.weight", "b_enc": "mag_bias", "b_gate": "gate_bias", "r_mag": "r_mag",
    "W_dec": "decoder.weight", "b_dec": "decoder_bias",
}  # fmt: skip
_GATED_SAYS = "published encoder output: [gate > 0] * relu(exp(r_mag) * u + mag_bias)"
_CLASSES = {
    "AutoEncoder": _Class("standard", "relu", _NORMED, {**_LINEAR, "b_dec": "bias"}, True, True),
    "AutoEncoderNew": _Class("standard", "relu", RELU, {**_LINEAR, "b_dec": "decoder.bias"}, True, False),
    "GatedAutoEncoder": _Class("gated", "gated", _GATED_SAYS, _GATED, True, True),
    "JumpReluAutoEncoder": _Class(
        "jumprelu", "jumprelu", JUMPRELU, {**_PLAIN, "threshold": "threshold"}, False, False
    ),
    "AutoEncoderTopK": _Class("topk", "topk", TOPK, {**_LINEAR, "b_dec": "b_dec"}, True, True),
    "BatchTopKSAE": _Class("batchtopk", "jumprelu", _BATCH, {**_LINEAR, "b_dec": "b_dec"}, True, True),
    "MatryoshkaBatchTopKSAE": _Class("matryoshka_batchtopk", "jumprelu", _BATCH, _PLAIN, False, True),
}

_SITES = {  # (submodule_name without its layer, io): the kind of site
    ("resid_post", "out"): "resid_post",
    ("resid_out", "out"): "resid_post",
    ("resid", "out"): "resid_post",
    ("resid", "in"): "resid_pre",
    ("resid_pre", "in"): "resid_pre",
    ("resid_pre", "out"): "resid_pre",
    ("mlp", "in"): "mlp_in",
    ("mlp", "out"): "mlp_out",
    ("mlp_out", "out"): "mlp_out",
    ("attn", "out"): "attn_out",
    ("attn_out", "out"): "attn_out",
    ("embed", "out"): "embed",
}  # fmt: skip
# Blocks that norm what the MLP and attention give before adding it: the module's output is another place.
_POST_NORM = re.compile(r"gemma-[23]-|olmo-?[23]-", re.IGNORECASE)


def candidates(tree: Tree) -> list[Candidate]:
    """One for each ae.pt and each checkpoints/ae_{step}.pt, with the config of its trainer."""
    found = []
    for file in tree.files:
        place = folder(file)
        if file.rsplit("/", 1)[-1] == "ae.pt":
            path, trainer = place, place
        elif _CHECKPOINT.search(file) is not None:
            path, trainer = stem(file, (".pt",)), folder(place)
        else:
            continue
        config = f"{trainer}/config.json".lstrip("/")
        found.append(Candidate(path, (file, config) if tree.has(config) else (file,)))
    return found


def describe(tree: Tree, candidate: Candidate) -> Description:
    """From the trainer's config and the file's header."""
    file = tree.path(candidate.files[0])
    if len(candidate.files) == 1:
        raise InputError(
            f"saes: no config.json with {file}; its dict_class says how to encode, copy it there"
        )
    place = tree.path(candidate.files[1])
    config = read_json(place)
    trainer, buffer = need(config, "trainer", place), config.get("buffer") or {}
    if not isinstance(trainer, dict) or not isinstance(buffer, dict):
        raise InputError(f"saes: trainer and buffer in {place} are to be mappings")
    name = need(trainer, "dict_class", place)
    known = _CLASSES.get(name)
    if known is None:
        raise InputError(f"saes: dict_class {name!r} in {place} is unknown; known are {', '.join(_CLASSES)}")
    headers = weights.headers(file)
    shape = matrix(headers, known.keys["W_enc"], file)
    d_in, width = reversed(shape) if known.linear else shape
    said = trainer.get("activation_dim", d_in), trainer.get("dict_size", width)
    if said != (d_in, width):
        raise InputError(
            f"saes: {known.keys['W_enc']} in {file} is {shape}, but {place} says activation_dim {said[0]} "
            f"and dict_size {said[1]}"
        )
    if known.batch:
        _threshold(weights.read(file, ("threshold",)), file)
    k = trainer.get("k")
    if known.rule == "topk":
        k = _k(weights.read(file, ("k",)) if "k" in headers else {}, k, file)
    model = str(trainer.get("lm_name") or "")
    path = f"{tree.uri}/{candidate.path}"  # of a suite that is one SAE's folder, the names are above it
    kind = _kind(trainer, buffer, path, model, place)
    layer = 0 if kind == "embed" else _layer(trainer, path, place)
    site = None if kind is None else Site(layer, kind)
    return Description(
        architecture=known.architecture,
        d_in=d_in,
        width=width,
        convention=known.convention,
        site=site,
        out=site,
        layer=layer,
        nominal_l0=_number(k, trainer.get("target_l0")),
        trained_on=model if re.fullmatch(r"[\w.-]+/[\w.-]+", model) else None,
        options={"dict_class": name, "k": k},
    )


def load(info: SaeInfo) -> SaeWeights:
    """Matrices as `x @ W`, raw. Raises InputError for a batch top-k SAE whose threshold was never set."""
    said = options(info)
    known = _CLASSES[said["dict_class"]]
    found = weights.read(info.uri)
    tensors = {field: need(found, key, info.uri) for field, key in known.keys.items()}
    if known.linear:
        tensors |= {field: tensors[field].T.contiguous() for field in ("W_enc", "W_dec")}
    if known.batch:
        tensors["threshold"] = _threshold(found, info.uri).expand(info.width).contiguous()
    b_pre = tensors["b_dec"] if known.subtract else None
    return SaeWeights(known.rule, b_pre=b_pre, k=said["k"] if known.rule == "topk" else None, **tensors)


def _threshold(found: dict[str, torch.Tensor], file: str) -> torch.Tensor:
    """The stored scalar of a batch top-k SAE, float32."""
    why = "its top-k over a batch was never calibrated to one, and a batch's top-k depends on the batch"
    if "threshold" not in found:
        raise InputError(f"saes: no threshold in {file}: {why}; leave this SAE out")
    threshold = found["threshold"].reshape(-1)
    if len(threshold) != 1:
        raise InputError(f"saes: threshold in {file} has {len(threshold)} values, not one")
    if not threshold.item() >= 0:
        raise InputError(
            f"saes: threshold in {file} is {threshold.item():g}, the mark of an unset one: {why}; "
            "leave this SAE out"
        )
    return threshold


def _k(found: dict[str, torch.Tensor], said: Any, file: str) -> int:
    """The stored k; older files have it in the config only."""
    if "k" in found:
        return int(found["k"].item())
    if said is None:
        raise InputError(f"saes: no k in {file} nor in its config.json")
    return whole({"k": said}, "k", f"the config.json of {file}")


def _layer(trainer: dict[str, Any], path: str, place: str) -> int:
    """`layer`, or the number in submodule_name or in a folder's name. Raises InputError without any."""
    layer = trainer.get("layer")
    if type(layer) is int or (isinstance(layer, str) and layer.isdigit()):
        return int(layer)
    for text in (str(trainer.get("submodule_name") or ""), path):
        layers = re.findall(r"(?:^|[._/])(?:blocks|layers|h|layer)[._]?(\d+)", text)
        if layers:
            return int(layers[-1])  # the innermost folder's
    raise InputError(f"saes: layer is {layer!r} in {place}, and no name says it")


def _kind(trainer: dict[str, Any], buffer: dict[str, Any], path: str, model: str, place: str) -> str | None:
    """The kind of site; None where submodule_name does not name one that is known, or more than one."""
    io = buffer.get("io") or "out"
    if io not in ("in", "out"):
        raise InputError(
            f"saes: io {io!r} in {place}: only SAEs of a module's in or out are known, not transcoders"
        )
    label = str(trainer.get("submodule_name") or "")
    if not label:  # without one: the folder's, else the library's usual place
        folders = re.findall(r"(?:^|/)((?:resid|mlp|attn|embed)[a-z_]*?)_?(?:layer_?\d+)", path)
        label = folders[-1] if folders else "resid" if io == "in" else "resid_post"
    label = re.sub(r"(?:^|[._])(?:blocks|layers|h|layer)[._]?\d+|hook_", "", label).strip("._").lower()
    kind = _SITES.get((label, io))
    if kind in ("mlp_out", "attn_out") and _POST_NORM.search(model):
        return None
    return kind


def _number(*values: Any) -> float | None:
    """The first that is a number."""
    return next((float(value) for value in values if isinstance(value, int | float)), None)
