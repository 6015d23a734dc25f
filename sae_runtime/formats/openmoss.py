"""What the formats of OpenMOSS (Llama Scope, its R1 suite, llamascopium 2) share: sites and norms.

Their configs name hooks as TransformerLens does. With `norm_activation: dataset-wise` an activation is
brought to an average norm of sqrt(d), by one constant per hook that is in the files; a transcoder's
output is in such units too, of its own hook.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from sae_runtime.errors import InputError
from sae_runtime.formats.base import boolean, need
from sae_runtime.sites import Site, from_transformer_lens
from sae_runtime.tree import Tree, folder
from sae_runtime.weights import Header

NORM = "dataset_average_activation_norm."
LLAMASCOPIUM = re.compile(r"layer\d+_")  # its folders, e.g. layer15_transcoder_8x_k64
R1 = re.compile(r"L(\d+)(R|A|M)")  # the folders of Llama Scope R1, which name their files the same
_ENDINGS = ("safetensors", "pt", "dcp")  # in OpenMOSS's order of preference
_WEIGHTS = re.compile(r"(?:(.*)/)?sae_weights\.(safetensors|pt|dcp)(?:/|$)")


def weight_files(tree: Tree) -> dict[str, str]:
    """Folders with a config.json (and no cfg.json, which is SAELens's) -> the weights that OpenMOSS prefers.

    A distributed checkpoint is a folder: its name is then given, which is no file of the tree.
    """
    found: dict[str, str] = {}
    for match in filter(None, map(_WEIGHTS.match, tree.files)):
        at, ending = match[1] or "", match[2]
        if at not in found or _ENDINGS.index(ending) < _ENDINGS.index(found[at].rsplit(".", 1)[-1]):
            found[at] = join(at, f"sae_weights.{ending}")
    return {
        at: file
        for at, file in sorted(found.items())
        if tree.has(join(at, "config.json")) and not tree.has(join(at, "cfg.json"))
    }


def join(at: str, name: str) -> str:
    """A file of a folder, "" being the top."""
    return f"{at}/{name}" if at else name


def last(tree: Tree, path: str) -> str:
    """The name of an SAE's folder, also where it is the suite itself."""
    return path.rstrip("/").rsplit("/", 1)[-1] or tree.last


def sites(inside: str, out: str, file: str) -> tuple[Site | None, Site | None, int | None]:
    """Where an SAE reads, what its decoder gives, by two hooks' names, and the layer of the first.

    An unknown hook of an SAE is left to the spec's `site:`; that of a transcoder is refused, since the
    spec has no second site.
    """
    layer = re.match(r"blocks\.(\d+)\.", inside)
    site = from_transformer_lens(inside)
    if site is None and inside != out:
        raise InputError(f"saes: the transcoder in {file} reads hook {inside!r}, which is no known site")
    return site, site if inside == out else from_transformer_lens(out), int(layer[1]) if layer else None


def check_d_model(cfg: dict[str, Any], d_in: int, file: str) -> None:
    """Refuse weights of another orientation or model than the config's."""
    if cfg.get("d_model") not in (None, d_in):
        raise InputError(f"saes: {file} has {d_in} inputs, but its config says d_model {cfg['d_model']}")


def check_encoder(cfg: dict[str, Any], found: dict[str, Header], config: str) -> None:
    """Refuse what other SAEs of OpenMOSS add to the encoder and the tensors that are read do not hold."""
    if boolean(cfg, "apply_decoder_bias_to_pre_encoder", config, False):
        raise InputError(f"saes: apply_decoder_bias_to_pre_encoder in {config} is true; only false is known")
    glu = "W_E_glu" in found
    if boolean(cfg, "use_glu_encoder", config, glu) != glu:
        raise InputError(
            f"saes: use_glu_encoder in {config} is {not glu}, but there is {'a' if glu else 'no'} W_E_glu"
        )
    others = [name for name in found if name.startswith("encoder_glu")]
    if others:
        raise InputError(
            f"saes: {others[0]} in the weights of {config}: a GLU encoder is known as W_E_glu only"
        )


def norm_key(found: dict[str, Header], names: tuple[str, ...], file: str) -> str:
    """The tensor that holds a hook's average norm, of the first of `names` that is there."""
    keys = [NORM + name for name in names]
    key = next((key for key in keys if key in found), None)
    if key is None:
        raise InputError(
            f"saes: no {' or '.join(keys)} in {file}, which its norm_activation dataset-wise needs"
        )
    return key


def factor(norm: Any, d: int, key: str, file: str) -> float:
    """sqrt(d) / norm: what an activation is multiplied with. Refuses a norm that is none."""
    value = float(norm)
    if not 0 < value < float("inf"):
        raise InputError(f"saes: {key} in {file} is {value:g}, not an average norm")
    return d**0.5 / value


def flag(cfg: dict[str, Any], key: str, file: str) -> bool:
    """A config's boolean. Refuses where it is missing or something else: it changes what fires."""
    value = need(cfg, key, file)
    if not isinstance(value, bool):
        raise InputError(f"saes: {key} in {file} is {value!r}, not true or false")
    return value


def config_file(file: str) -> str:
    """The config.json beside a weight file."""
    return join(folder(file), "config.json")


def raw_decoder(
    W_dec: torch.Tensor, b_dec: torch.Tensor, s: float, s_out: float, restore: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A decoder [m,n] and its bias [n] for raw outputs: a transcoder's divided by s_out.

    An SAE's is left as published, as `reference.decode` divides by s itself; but for s / s_out, which
    is 1 unless a file has two norms of one hook.
    """
    by = s / s_out if restore else 1 / s_out
    return (W_dec, b_dec) if by == 1 else (W_dec * by, b_dec * by)
