"""The published weight formats, one module each; docs/FORMATS.md lists them with their sources.

The order is that of recognition: the first format that knows a file by its name has it.
"""

from __future__ import annotations

from types import ModuleType

from sae_runtime.formats import gemma_scope

FORMATS: tuple[ModuleType, ...] = (gemma_scope,)


def by_name(name: str) -> ModuleType:
    """The module of a format by `SaeInfo.format`."""
    return next(module for module in FORMATS if format_name(module) == name)


def format_name(module: ModuleType) -> str:
    """A format's name: its module's, e.g. "gemma_scope"."""
    return module.__name__.rsplit(".", 1)[-1]
