"""The elementwise part of a bfloat16 model on a CPU, with the same bits and less memory traffic.

Norms, the gate of an MLP and rotary embeddings are chains of operators, each of which reads and writes a
whole tensor; here each chain is one loop over the rows.

Invariant: never another bit than the module's own code would give. A loop takes a module's place only after
giving the same bits for random inputs at the module's own width (`fuse`); what no loop matches keeps its own
code. So a new release of transformers, or another order of torch's sums, costs speed and nothing else.

Trade-off, measured (SmolLM2, 2 cores with AMX, 16 contexts of 256): the forward pass takes 0.76 to 0.79 of
the time (`benchmarks/forward.py`); what is left is products and attention, which attention.py takes where it
has torch's bits. The loops use one thread each, which is why batches go side by side in threads.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from sae_runtime.attention import attended
from sae_runtime.bfloat import rounded, value_of
from sae_runtime.jit import jit

_ROWS = 67  # of the random inputs
_LANES = 8  # of torch's vectors in sums of float32, on any x86 machine
_WIDE = 4 * _LANES
_INTERFACES = "ALL_ATTENTION_FUNCTIONS"
_Forward = Callable[[torch.Tensor], torch.Tensor]


@torch.inference_mode()
def fuse(model: nn.Module, needed: Collection[nn.Module] = ()) -> int:
    """Put loops in the place of `model`'s chains of operators; gives the number of modules changed.

    `needed` are modules that must go on being called, because hooks are on them. Only for bfloat16 on a CPU;
    other models are left as they are.
    """
    first = next(model.parameters())
    if first.dtype != torch.bfloat16 or first.device.type != "cpu":
        return 0
    changed = 0
    for module in model.modules():
        for make in (_norm, _gated):
            forward = make(module, needed)
            if forward is not None:
                module.forward = forward
                changed += 1
        rotated = _rotating(module)
        if rotated is not None:
            module.forward = rotated
            changed += 1
    return changed


def _norm(module: nn.Module, needed: Collection[nn.Module]) -> _Forward | None:
    """RMSNorm: x * r times weight (rounded before: Llama; not: gpt-oss) or times 1 + weight (Gemma)."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if type(eps) is not float or weight is None or weight.dim() != 1 or not _is_bfloat(weight):
        return None
    if len(inspect.signature(module.forward).parameters) != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, len(weight), generator=generator)
    if _mean_squares(x.numpy()).tolist() != x.pow(2).mean(-1).tolist():  # too rarely seen after rounding
        return None
    # Rows from faint to loud: only in faint ones it shows where `eps` comes in.
    x = (x * torch.logspace(-6, 3, _ROWS)[:, None]).bfloat16()
    plain = weight.float().numpy()
    wanted = module(x)
    for gain, whole in ((plain, False), (plain, True), (np.float32(1) + plain, True)):

        def forward(x: torch.Tensor, gain: np.ndarray = gain, whole: bool = whole) -> torch.Tensor:
            if not _is_bfloat(x):
                return type(module).forward(module, x)
            out = torch.empty(x.shape, dtype=x.dtype)
            _norm_rows(_codes(x), gain, np.float32(eps), whole, _codes(out))
            return out

        if _same(forward(x), wanted):
            return forward
    return None


def _gated(module: nn.Module, needed: Collection[nn.Module]) -> _Forward | None:
    """down(act(gate(x)) * up(x)), with the 65,536 values of `act` looked up."""
    gate, up, down = (getattr(module, f"{name}_proj", None) for name in ("gate", "up", "down"))
    act = getattr(module, "act_fn", None)
    if not isinstance(gate, nn.Linear) or not isinstance(up, nn.Linear) or not isinstance(down, nn.Linear):
        return None
    if not callable(act) or act in needed or not _is_bfloat(gate.weight):
        return None
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    table = act(every).view(torch.int16).numpy().view(np.uint16)

    held = gate in needed  # its output must stay as it is

    def forward(x: torch.Tensor) -> torch.Tensor:
        inner, factor = gate(x), up(x)
        product = torch.empty_like(inner) if held else inner
        _look_up_and_multiply(_codes(inner), _codes(factor), table, _codes(product))
        return down(product)

    x = torch.randn(_ROWS, gate.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    return forward if _same(forward(x), module(x)) else None


def _rotating(module: nn.Module) -> Callable[..., Any] | None:
    """An attention's forward that calls our rotary embedding and attention where it would call others."""
    forward = type(module).forward
    name = "apply_rotary_pos_emb"
    theirs = getattr(forward, "__globals__", {}).get(name)
    if theirs is None or name not in forward.__code__.co_names or hasattr(forward, "__wrapped__"):
        return None

    def rotary(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        plain = not more and not named and all(map(_can_rotate, (q, k), (cos, cos), (sin, sin)))
        return (
            (_rotate(q, cos, sin), _rotate(k, cos, sin)) if plain else theirs(q, k, cos, sin, *more, **named)
        )

    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, heads, 16, generator=generator).bfloat16().transpose(1, 2) for heads in (4, 2))
    cos, sin = (torch.randn(2, 3, 16, generator=generator).bfloat16() for _ in range(2))
    try:
        wanted = theirs(q, k, cos, sin)
    except (RuntimeError, TypeError):  # of another shape, as gpt-oss has them, or other arguments
        return None
    if not all(map(_same, rotary(q, k, cos, sin), wanted)):
        return None
    globals_ = {**forward.__globals__, name: rotary}
    if "get_interface" in forward.__code__.co_names and _INTERFACES in globals_:
        globals_[_INTERFACES] = _Interfaces(globals_[_INTERFACES])
    ours = types.FunctionType(
        forward.__code__, globals_, forward.__name__, forward.__defaults__, forward.__closure__
    )
    ours.__kwdefaults__ = forward.__kwdefaults__
    return types.MethodType(ours, module)


class _Interfaces:
    """transformers' attention functions by name, with ours before its `sdpa`."""

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        """The function of a name."""
        found: Callable[..., Any] = self._theirs.get_interface(name, default)
        return partial(attended, found) if name == "sdpa" else found


def _can_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether `x` [batch, heads, length, d] lies in memory as [batch, length, heads, d] and angles fit."""
    there = x.dim() == 4 and cos.dim() == 3 and x.transpose(1, 2).is_contiguous()
    fits = there and cos.shape == sin.shape and cos.shape[1:] == (x.shape[2], x.shape[3])
    return fits and len(cos) in (1, len(x)) and all(map(_is_bfloat, (x, cos, sin))) and x.shape[3] % 2 == 0


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    batch, heads, length, d = x.shape
    out = torch.empty(batch, length, heads, d, dtype=x.dtype)
    cosines, sines = (_codes(angle.expand(batch, -1, -1).contiguous()) for angle in (cos, sin))
    _rotate_rows(_codes(x.transpose(1, 2)), cosines, sines, heads, _codes(out))
    return out.transpose(1, 2)


def _is_bfloat(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


def _codes(x: torch.Tensor) -> np.ndarray:
    """uint16 [rows, last dimension]: a view if `x` is contiguous."""
    return x.reshape(-1, x.shape[-1]).view(torch.int16).numpy().view(np.uint16)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(
        one.view(torch.int16), other.contiguous().view(torch.int16)
    )


@jit
def _norm_rows(x: np.ndarray, gain: np.ndarray, eps: np.float32, whole: bool, out: np.ndarray) -> None:
    d = x.shape[1]
    value = np.empty(d, np.float32)
    sums = np.empty((2, 4 * _LANES), np.float32)
    for row in range(len(x)):
        for i in range(d):
            value[i] = value_of(x[row, i])
        r = np.float32(1) / np.sqrt(_squares(value, sums[0], sums[1]) / np.float32(d) + eps)
        if whole:
            for i in range(d):
                out[row, i] = rounded(value[i] * r * gain[i])
        else:
            for i in range(d):
                out[row, i] = rounded(value_of(rounded(value[i] * r)) * gain[i])


@jit
def _squares(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.float32:
    """The sum of squares in the order of torch's sum over a contiguous row (ATen's SumKernel.cpp).

    Four vectors side by side, added up in groups of 16 and those groups, at widths under 8,192, one after
    the other; then the vectors that are left over, the four into one, and its lanes after the numbers that
    fill no vector. `low` and `high` are room for the four vectors' sums.
    """
    steps = len(value) // _WIDE
    low[:] = 0
    high[:] = 0
    step = 0
    while step + 16 <= steps:
        for at in range(step * _WIDE, (step + 16) * _WIDE, 4 * _WIDE):
            for i in range(_WIDE):  # four at once, for a sum waits for the one before it
                a, b = value[at + i], value[at + _WIDE + i]
                c, d = value[at + 2 * _WIDE + i], value[at + 3 * _WIDE + i]
                low[i] = (((low[i] + a * a) + b * b) + c * c) + d * d
        for i in range(_WIDE):
            high[i] += low[i]
            low[i] = 0
        step += 16
    for at in range(step * _WIDE, steps * _WIDE, _WIDE):
        for i in range(_WIDE):
            low[i] += value[at + i] * value[at + i]
    for i in range(_WIDE):
        low[i] += high[i]
    rest = steps * _WIDE
    while rest + _LANES <= len(value):
        for i in range(_LANES):
            low[i] += value[rest + i] * value[rest + i]
        rest += _LANES
    for vector in range(1, 4):
        for i in range(_LANES):
            low[i] += low[vector * _LANES + i]
    total = np.float32(0)
    for i in range(rest, len(value)):
        total += value[i] * value[i]
    for i in range(_LANES):
        total += low[i]
    return total


@jit
def _mean_squares(x: np.ndarray) -> np.ndarray:
    sums = np.empty((2, 4 * _LANES), np.float32)
    mean = np.empty(len(x), np.float32)
    for row in range(len(x)):
        mean[row] = _squares(x[row], sums[0], sums[1]) / np.float32(x.shape[1])
    return mean


@jit
def _look_up_and_multiply(inner: np.ndarray, factor: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """table[inner] * factor."""
    d = inner.shape[1]
    found = np.empty(d, np.uint16)
    for row in range(len(inner)):
        for i in range(d):  # a loop of its own, so that the other one is vectors
            found[i] = table[inner[row, i]]
        for i in range(d):
            out[row, i] = rounded(value_of(found[i]) * value_of(factor[row, i]))


@jit
def _rotate_rows(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, heads: int, out: np.ndarray) -> None:
    """x * cos + (-second half, first half) * sin, each product and the sum rounded; `heads` rows an angle."""
    half = x.shape[1] // 2
    for token in range(len(cos)):
        for row in range(token * heads, (token + 1) * heads):
            for i in range(half):
                j = i + half
                a, b = value_of(x[row, i]), value_of(x[row, j])
                p, q = rounded(a * value_of(cos[token, i])), rounded(-b * value_of(sin[token, i]))
                out[row, i] = rounded(value_of(p) + value_of(q))
                p, q = rounded(b * value_of(cos[token, j])), rounded(a * value_of(sin[token, j]))
                out[row, j] = rounded(value_of(p) + value_of(q))
