"""Attention by loops: right on every processor, in the place of torch's only where every bit is the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from sae_runtime import attention
from sae_runtime.attention import attended, causal, fits, same_as_torch, torch_causal
from sae_runtime.fused import fuse


def drawn(length: int, d: int, heads: int = 4, groups: int = 2, spread: float = 1.0, seed: int = 0) -> Any:
    """query, key, value [2, heads or groups, length, d]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, length, n, d) for n in (heads, groups, groups))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    v = v * torch.exp2(torch.randint(0, 10, v.shape, generator=generator))
    return tuple(x.bfloat16().transpose(1, 2) for x in (q * spread, k, v))


@pytest.mark.parametrize("d", [32, 64, 128, 224])
@pytest.mark.parametrize("length", [12, 24, 31, 48, 100, 192, 208, 256, 383, 401, 512, 517, 800, 1028])
def test_it_is_attention(length: int, d: int) -> None:
    """Against float64, to within what weights and result lose in bfloat16."""
    q, k, v = drawn(length, d)
    scale = 1 / math.sqrt(d)
    found = causal(q, k, v, scale)
    assert found is not None
    assert found.shape == (2, length, 4, d)
    k, v = (x.repeat_interleave(2, dim=1).double() for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * scale
    ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(ahead, -math.inf).softmax(-1)
    wanted = weights @ v
    off = (found.transpose(1, 2).double() - wanted).abs()
    assert (off <= 2.0**-8 * (weights @ v.abs() + wanted.abs())).all()


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("d", [32, 64, 96, 128, 256])
def test_every_bit_is_torchs_where_it_takes_torchs_place(d: int, heads: int, groups: int) -> None:
    scale = 1 / math.sqrt(d)
    if not same_as_torch(d, scale):
        pytest.skip("this processor's torch sums in another order, and keeps its own code")
    for seed, length in enumerate((12, 31, 45, 100, 191, 197, 256, 300, 383, 384, 500, 516, 700, 772, 1050)):
        q, k, v = drawn(length, d, heads, groups, (0.0, 0.3, 1.0, 4.0)[seed % 4], seed)
        assert fits(q, k, v)
        found = causal(q, k, v, scale)
        assert found is not None
        assert torch.equal(found.view(torch.int16), torch_causal(q, k, v, scale).view(torch.int16)), length


def test_what_does_not_fit_goes_to_torch() -> None:
    q, k, v = drawn(64, 64)
    assert fits(q, k, v)
    assert not fits(q.contiguous(), k, v)  # lies otherwise
    assert not fits(q.float(), k.float(), v.float())
    assert not fits(*drawn(64, 48))  # no whole tiles
    assert not fits(*drawn(11, 64))  # too short
    assert fits(*drawn(12, 64))
    for together in (64, 256, 768):  # fewer than four queries at the end: of 32, of 64, of 256
        assert not any(fits(*drawn(together + more, 64)) for more in (1, 2, 3))
        assert fits(*drawn(together + 4, 64))
    assert fits(*drawn(192 + 33, 64))
    assert fits(*drawn(768 + 65, 64))
    assert not fits(q[:, :, :32], k, v)


@pytest.mark.parametrize("loud", [math.inf, math.nan, 2.0**41])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_numbers_that_could_overflow_go_to_torch(which: int, loud: float) -> None:
    three = drawn(64, 32)
    three[which].transpose(1, 2)[1, 40, 1, 7] = loud
    assert causal(*three, 0.125) is None


class Module(torch.nn.Module):
    """What transformers gives an attention function."""

    is_causal = True


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths that were taken in torch's place, on whatever processor."""
    found: list[int] = []

    def counted(q: torch.Tensor, *rest: Any) -> torch.Tensor | None:
        found.append(q.shape[2])
        return causal(q, *rest)

    monkeypatch.setattr(attention, "same_as_torch", lambda d, scale: True)
    monkeypatch.setattr(attention, "causal", counted)
    return found


def test_only_plain_causal_attention_is_taken(calls: list[int]) -> None:
    mine = (torch.zeros(0), None)
    q, k, v = drawn(64, 32)

    def theirs(*args: Any, **named: Any) -> Any:
        return mine

    assert attended(theirs, Module(), q, k, v, None, scaling=0.2)[0].shape == (2, 64, 4, 32)
    assert calls == [64]
    usual = {"position_ids": torch.arange(64), "sliding_window": None}
    assert attended(theirs, Module(), q, k, v, None, scaling=None, **usual)[0].shape == (2, 64, 4, 32)
    mask = torch.zeros(1, 1, 64, 64)
    assert attended(theirs, Module(), q, k, v, mask) is mine
    assert attended(theirs, Module(), q, k, v, None, dropout=0.1) is mine
    assert attended(theirs, Module(), q, k, v, None, is_causal=False) is mine
    assert attended(theirs, Module(), q, k, v, None, softcap=30.0) is mine
    sideways = Module()
    sideways.is_causal = False
    assert attended(theirs, sideways, q, k, v, None) is mine
    assert calls == [64, 64]
    q.transpose(1, 2)[0, 0, 0, 0] = math.inf
    assert attended(theirs, Module(), q, k, v, None) is mine


@pytest.mark.parametrize(("implementation", "taken"), [("sdpa", [48, 48]), ("eager", [])])
def test_a_fused_model_comes_here(calls: list[int], implementation: str, taken: list[int]) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attn_implementation=implementation,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaModel(config).to(torch.bfloat16).eval()
    ids = torch.arange(2 * 48).reshape(2, 48) % 64
    with torch.inference_mode():
        wanted = model(ids, use_cache=False).last_hidden_state.float()
        assert fuse(model)
        found = model(ids, use_cache=False).last_hidden_state.float()
    assert calls == taken
    assert (found - wanted).abs().max() <= 2.0**-5 * wanted.abs().max()
