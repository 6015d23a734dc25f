"""Hub ids of the short model names that TransformerLens, and so SAE configs, use.

Invariant: a name that no rule knows, and one that has an organisation already, stays as it is.
"""

from __future__ import annotations

import re
from typing import Any

_EXACT = {
    "gpt2": "openai-community/gpt2",
    "gpt2-small": "openai-community/gpt2",
    "distillgpt2": "distilbert/distilgpt2",  # so spelled by TransformerLens
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.1",
    "gpt-j-6b": "EleutherAI/gpt-j-6b",
}
_LLAMA = re.compile(r"llama-?(3(?:\.\d)?)-(\d+)b(-(?:it|instruct))?$")
_QWEN = re.compile(r"qwen([\d.]+)-([\d.]+)b(-(?:instruct|base))?$")


def hub_id(name: Any) -> str | None:
    """`name` as the hub has it, "pythia-70m" as "EleutherAI/pythia-70m"; None for no name."""
    if not isinstance(name, str) or not name:
        return None
    short = name.lower()
    if "/" in name:
        return name
    if short in _EXACT:
        return _EXACT[short]
    if short.startswith("gpt2-"):
        return f"openai-community/{short}"
    if short.startswith(("pythia-", "gpt-neo-")):
        return f"EleutherAI/{short}"
    if short.startswith("gemma-"):
        return f"google/{short}"
    if match := _LLAMA.match(short):
        prefix = "Meta-Llama" if match[1] == "3" else "Llama"
        return f"meta-llama/{prefix}-{match[1]}-{match[2]}B{'-Instruct' if match[3] else ''}"
    if match := _QWEN.match(short):
        return f"Qwen/Qwen{match[1]}-{match[2]}B{(match[3] or '').title()}"
    return name
