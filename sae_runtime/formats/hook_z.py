"""Kissane and Krzyzanowski's attention SAEs (ckkissane/attn-saes-gpt2-small-all-layers).

    NAME.pt  NAME_cfg.json
    W_enc [d,m]  b_enc [m]  W_dec [m,d]  b_dec [d]         f = relu((x - b_dec) W_enc + b_enc)

`act_name` of the config is the TransformerLens hook, attn.hook_z with its heads side by side in what was
published. Their own code runs the model with TransformerLens' default processing, which moves the value
biases out of hook_z; the site here is the model's own, with them, as SAELens reads these SAEs.
"""

from __future__ import annotations

from sae_runtime import weights
from sae_runtime.errors import InputError
from sae_runtime.formats.base import RELU, Candidate, Description, matrix, need
from sae_runtime.formats.hub_names import hub_id
from sae_runtime.sae import SaeInfo, SaeWeights
from sae_runtime.sites import KINDS, from_transformer_lens
from sae_runtime.tree import Tree, read_json, stem

_KEYS = ("W_enc", "b_enc", "W_dec", "b_dec")
_SUITE = "attn-saes-gpt2-small-all-layers"


def candidates(tree: Tree) -> list[Candidate]:
    """One for each .pt file that has a _cfg.json of its name beside it."""
    there = set(tree.files)
    pairs = [(file, f"{file[:-3]}_cfg.json") for file in tree.files if file.endswith(".pt")]
    return [Candidate(stem(file, (".pt",)), (file, config)) for file, config in pairs if config in there]


def describe(tree: Tree, candidate: Candidate) -> Description:
    """From the config and the tensors' shapes."""
    file, config = (tree.path(part) for part in candidate.files)
    cfg = read_json(config)
    name = need(cfg, "act_name", config)
    site = from_transformer_lens(str(name))
    if site is None:
        raise InputError(f"saes: {config}: act_name {name!r} is no known site; known are {', '.join(KINDS)}")
    d_in, width = shape = matrix(weights.headers(file), "W_enc", file)
    for key, have in (("act_size", d_in), ("dict_size", width)):
        if cfg.get(key, have) != have:
            raise InputError(f"saes: {config}: {key} is {cfg[key]}, but W_enc in {file} is {shape}")
    known = tree.name == _SUITE
    return Description(
        "standard",
        d_in,
        width,
        RELU,
        site,
        out=site,
        trained_on=hub_id(cfg.get("model_name", "gpt2-small" if known else None)),
        neuronpedia=f"gpt2-small/{site.layer}-att-kk" if known else None,
    )


def load(info: SaeInfo) -> SaeWeights:
    """The four tensors; b_dec is subtracted from the input."""
    found = weights.read(info.uri, _KEYS)
    tensors = {key: need(found, key, info.uri) for key in _KEYS}
    return SaeWeights("relu", b_pre=tensors["b_dec"], **tensors)
