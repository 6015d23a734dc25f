"""Files .pt and .pth that stand alone, without a config: which format one is of, its tensors' names say.

Only files are opened whose names are like those published (a layer's number, or "sae" in it), and of them
a few kB: a repository may hold any other .pt file, and many of other formats.
"""

from __future__ import annotations

import re
from typing import Any

from sae_runtime import weights
from sae_runtime.errors import InputError
from sae_runtime.formats.base import Candidate
from sae_runtime.hub import HubError
from sae_runtime.tree import Tree, stem
from sae_runtime.weights import Header

ENDINGS = (".pth", ".pt")
_OTHERS = re.compile(
    r"(?:^|/)(?:ae(?:_\d+)?|[^/]*\.sae|sae_weights|trainer_state|[a-z_]+_v\d+(?:_\d+k)?/autoencoders/\d+)\.pt$"
)
_NAMES = re.compile(r"sae|autoencoder|(?:^|/)\d+\.pth?$", re.IGNORECASE)
_LAYER = re.compile(r"(?:^|[^A-Za-z0-9])l(?:ayer)?[-_]?(\d+)(?![0-9A-Za-z])", re.IGNORECASE)


def candidates(tree: Tree, has: frozenset[str], has_not: frozenset[str] = frozenset()) -> list[Candidate]:
    """One for each lone file with the tensors `has` and none of `has_not`, and for each unreadable one."""
    found = []
    for file in tree.files:
        name = stem(file, ENDINGS)
        if not file.endswith(ENDINGS) or _OTHERS.search(file) or tree.has(f"{name}_cfg.json"):
            continue
        if not (_NAMES.search(file.rsplit("/", 1)[-1]) or _LAYER.search(name.rsplit("/", 1)[-1])):
            continue
        try:
            names = weights.headers(tree.path(file)).keys()
        except HubError:
            raise
        except InputError as error:  # its own fault alone: the SAEs beside it are read without it
            found.append(Candidate(name, (file,), error=error))
            continue
        if has <= names and not has_not & names:
            found.append(Candidate(name, (file,)))
    return found


def tensors(said: dict[str, Any]) -> dict[str, Header]:
    """The tensors' headers of what `weights.outline` gave."""
    return {name: value for name, value in said.items() if isinstance(value, Header)}


def layer(file: str) -> int:
    """The layer in a file's name, e.g. 19 of Llama-3.1-8B-Instruct-SAE-l19.pth. InputError without one."""
    match = _LAYER.search(stem(file.rsplit("/", 1)[-1], ENDINGS))
    if match is None:
        raise InputError(
            f"saes: nothing says the layer of {file}; name it as published, e.g. {_example(file)}"
        )
    return int(match[1])


def _example(file: str) -> str:
    name = file.rsplit("/", 1)[-1]
    return f"{stem(name, ENDINGS)}-l19{name[len(stem(name, ENDINGS)) :]}"
