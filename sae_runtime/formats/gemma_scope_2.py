"""Gemma Scope 2 (Google DeepMind, Gemma 3): one repository per model, one folder per SAE or set.

    resid_post/layer_17_width_16k_l0_medium/{config.json,params.safetensors}    attn_out, mlp_out, transcoder
    transcoder_all/layer_3_width_16k_l0_small_affine/…                          any of them, of every layer
    clt/width_262k_l0_medium/{config.json,params_layer_3.safetensors}
    crosscoder/layer_7_13_17_22_width_65k_l0_big/{config.json,params_layer_0.safetensors}

    w_enc [d,m] b_enc threshold w_dec [m,n] b_dec [n], affine_skip_connection [d,n] used as x @ A

The site is the config's `hf_hook_point_in`; a folder without a config is read by its name. Each file of
a CLT or crosscoder encodes one layer alone and is an SAE here; its decoder writes to many layers, so no
single reconstruction is its own: `out` is None and the decoder, many times the encoder, stays unread.
`examples.safetensors` (hundreds of MB) is never opened. Source: the configs and Google DeepMind's cards.
"""

from __future__ import annotations

import re
from typing import Any

from sae_runtime import weights
from sae_runtime.errors import InputError
from sae_runtime.formats.base import JUMPRELU, Candidate, Description, matrix, need
from sae_runtime.sae import SaeInfo, SaeWeights
from sae_runtime.sites import Site, from_hugging_face
from sae_runtime.tree import Tree, folder, read_json, stem

_FILE = re.compile(r"(?:^|/)params(?:_layer_(\d+))?\.safetensors$")
_FOLDER = re.compile(
    r"(?:^|/)(resid_post|attn_out|mlp_out|transcoder|clt|crosscoder)(_all)?/"
    r"(?:layer_(\d+(?:_\d+)*)_)?width_([^_/]+)_l0_([^_/]+?)(_affine)?(_seed_\d+)?$"
)
_HOOKS = {  # of a folder, inside the decoder layer: in, out
    "resid_post": ("output", "output"),
    "attn_out": ("self_attn.o_proj.input", "self_attn.o_proj.input"),
    "mlp_out": ("post_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
    "clt": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
    "crosscoder": ("output", "output"),
}
_SUITE = re.compile(r"gemma-scope-2-(270m|1b|4b|12b|27b)-(pt|it)\b")
_MODEL = re.compile(r"gemma[-_](?:v3|3)[-_](270m|1b|4b|12b|27b)(?:[-_](pt|it))?$")
_NEURONPEDIA = {"resid_post medium": "res", "transcoder_all small_affine": "transcoder"}
_SUFFIX = {"sae": "", "transcoder": "_transcoder", "clt": "_clt", "crosscoder": "_crosscoder"}
_SKIP = "affine_skip_connection"
_ENCODER = {"w_enc": "W_enc", "b_enc": "b_enc", "threshold": "threshold"}
_DECODER = {"w_dec": "W_dec", "b_dec": "b_dec"}


def candidates(tree: Tree) -> list[Candidate]:
    """One for each params.safetensors and each params_layer_{i}.safetensors, with its folder's config."""
    found = []
    for file in tree.files:
        match = _FILE.search(file)
        if match is None:
            continue
        place = folder(file)
        config = f"{place}/config.json".lstrip("/")
        part = None if match[1] is None else int(match[1])
        path = place if part is None else stem(file, (".safetensors",))
        found.append(Candidate(path, (file, config) if tree.has(config) else (file,), part))
    return found


def describe(tree: Tree, candidate: Candidate) -> Description:
    """From the config, what it does not say from the folder's name, and the file's header."""
    file = tree.path(candidate.files[0])
    config = read_json(tree.path(candidate.files[1])) if len(candidate.files) > 1 else {}
    named = _FOLDER.search(f"{tree.name}/{folder(candidate.files[0])}".rstrip("/"))
    known = {**_from_name(named), **{key: value for key, value in config.items() if value is not None}}
    kind = _kind(known, candidate, file)
    headers = weights.headers(file)
    d_in, width = matrix(headers, "w_enc", file)
    skip = _SKIP in headers
    if known.get("affine_connection") and not skip:
        raise InputError(f"saes: {file} is of an affine SAE by its config or folder, but has no {_SKIP}")
    if skip and kind == "sae":
        raise InputError(f"saes: {_SKIP} in {file}, which is an SAE: only transcoders are known to have one")
    single = kind in ("sae", "transcoder")
    site = _site(known, "hf_hook_point_in", candidate.part, file)
    return Description(
        architecture=f"jumprelu{'_skip' if skip else ''}{_SUFFIX[kind]}",
        d_in=d_in,
        width=width,
        convention=JUMPRELU,
        site=site,
        out=_site(known, "hf_hook_point_out", None, file) if single else None,
        nominal_l0=float(known["l0"]) if isinstance(known.get("l0"), int | float) else None,
        trained_on=_trained_on(str(known.get("model_name", "")), tree),
        neuronpedia=_neuronpedia(tree, named),
    )


def load(info: SaeInfo) -> SaeWeights:
    """The tensors as they are: no bias is subtracted, nothing normalised. A part of a set has no decoder."""
    wanted = _ENCODER if info.out is None else {**_ENCODER, **_DECODER}
    found = weights.read(info.uri, [*wanted, _SKIP] if info.out is not None else wanted)
    tensors = {name: need(found, key, info.uri) for key, name in wanted.items()}
    return SaeWeights("jumprelu", W_skip=found.get(_SKIP), restore=info.out == info.site, **tensors)


def _from_name(named: re.Match[str] | None) -> dict[str, Any]:
    """What a folder's name says, as the config would. Its L0 is a label, not a number."""
    if named is None:
        return {}
    layers = "all" if named[3] is None else named[3].replace("_", ",")
    layers = f"{{{layers}}}" if named[1] in ("clt", "crosscoder") else layers
    hook_in, hook_out = (f"model.layers.{layers}.{hook}" for hook in _HOOKS[named[1]])
    return {
        "type": named[1] if named[1] in _SUFFIX else "sae",
        "hf_hook_point_in": hook_in,
        "hf_hook_point_out": hook_out,
        "affine_connection": named[6] is not None,
    }


def _kind(known: dict[str, Any], candidate: Candidate, file: str) -> str:
    """sae, transcoder, clt or crosscoder. Raises InputError for another, and for another architecture."""
    kind, architecture = known.get("type"), known.get("architecture", "jump_relu")
    if kind is None:
        raise InputError(
            f"saes: {file} has no config.json with a type beside it, and its folder is not named as Gemma "
            "Scope 2 names them (e.g. resid_post/layer_17_width_16k_l0_medium), so its site is unknown; "
            "put the config there or name the folder so"
        )
    if kind not in _SUFFIX:
        raise InputError(f"saes: type {kind!r} in the config of {file}; known are {', '.join(_SUFFIX)}")
    if architecture != "jump_relu":
        raise InputError(
            f"saes: architecture {architecture!r} in the config of {file}; Gemma Scope 2 is jump_relu"
        )
    if (candidate.part is None) != (kind in ("sae", "transcoder")):
        raise InputError(f"saes: type {kind!r} in the config of {file} does not go with that file's name")
    return str(kind)


def _site(known: dict[str, Any], key: str, part: int | None, file: str) -> Site:
    """The site of a hook; `part` counts in one of many layers, e.g. model.layers.{7,13,17,22}.output."""
    hook = str(known.get(key))
    many = re.search(r"\.\{([^}]*)\}\.", hook)
    if part is not None and many is None:  # one place for all the files of a set would be wrong for most
        raise InputError(f"saes: {key} of {file} is {hook!r}, which does not say the layers of its set")
    if many is not None and part is not None:
        layers = many[1].split(",")
        layer = str(part) if layers == ["all"] else layers[part].strip() if part < len(layers) else "?"
        hook = hook.replace(many[0], f".{layer}.")
    site = from_hugging_face(hook)
    if site is None:
        raise InputError(
            f"saes: {key} of {file} is {known.get(key)!r}, which names no place in a decoder layer for it"
        )
    return site


def _trained_on(model: str, tree: Tree) -> str | None:
    """The model's id on the hub; names like gemma-v3-4b-pt are old ones, and the 270M model has no -pt."""
    suite, found = _suite(tree), _MODEL.search(model.lower())
    if model and found is None:
        return model if "/" in model else None
    if found is not None:
        size, tuning = (
            found[1],
            found[2] or (suite[1] if suite is not None and suite[0] == found[1] else None),
        )
    elif suite is not None:
        size, tuning = suite
    else:
        return None
    if size == "270m" and tuning != "it":
        return "google/gemma-3-270m"
    return None if tuning is None else f"google/gemma-3-{size}-{tuning}"


def _neuronpedia(tree: Tree, named: re.Match[str] | None) -> str | None:
    """Neuronpedia has the medium residual SAEs and, of every layer, the small affine transcoders."""
    suite = _suite(tree)
    if suite is None or named is None:
        return None
    kind = _NEURONPEDIA.get(f"{named[1]}{named[2] or ''} {named[5]}{named[6] or ''}{named[7] or ''}")
    model = f"gemma-3-{suite[0]}{'-it' if suite[1] == 'it' else ''}"
    return None if kind is None else f"{model}/{named[3]}-gemmascope-2-{kind}-{named[4]}"


def _suite(tree: Tree) -> tuple[str, str] | None:
    """Size and tuning of the model in the repository's name, also where the suite is a folder of it."""
    match = _SUITE.search(tree.name) or _SUITE.search(tree.uri)
    return None if match is None else (match[1], match[2])
