"""The published weight formats, one module each; docs/FORMATS.md lists them with their sources.

The order is that of recognition: the first format that knows a file by its name has it.
"""

from __future__ import annotations

from types import ModuleType

from sae_runtime.formats import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    hook_z,
    llama_scope,
    llama_scope_r1,
    llamascopium,
    openai_gpt2,
    qresearch,
    qwen_scope,
    saelens,
    sparsify,
    temporal,
)

FORMATS: tuple[ModuleType, ...] = (
    gemma_scope,
    gemma_scope_2,
    sparsify,
    llama_scope,
    saelens,
    llama_scope_r1,
    llamascopium,
    dictionary_learning,
    qwen_scope,
    circuit_tracer,
    goodfire,
    openai_gpt2,
    qresearch,
    hook_z,
    temporal,
)


def by_name(name: str) -> ModuleType:
    """The module of a format by `SaeInfo.format`."""
    return next(module for module in FORMATS if format_name(module) == name)


def format_name(module: ModuleType) -> str:
    """A format's name: its module's, e.g. "gemma_scope"."""
    return module.__name__.rsplit(".", 1)[-1]
