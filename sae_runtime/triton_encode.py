"""The encoder on a GPU: a product tile is compared in registers and only what is active leaves the chip.

Invariant: the same rows as `reference.encode`, in the order of `Sparse`, wherever the contract decides
(pre-activation further than 2^-19 |x||w| from its threshold); the rows of a call do not depend on which
tile finished first. triton is optional: without it `supports` is False and torch operators take over.

Arithmetic. Each row of x and of W is scaled by a power of two so that its largest element lies in
[2^14, 2^15), then split into float16 parts, hi = half(a), lo = half(a - hi). float16 has 11 significant
bits, so |a - hi| <= 2^-11 |a| and |a - hi - lo| <= 2^-23 |a| + 2^-25: the last term is where lo is
subnormal, at most 2^-39 of the row's largest element. Products of float16 are exact in float32, where
they are summed. By Cauchy-Schwarz, leaving float32's own rounding of the sum aside (tensor cores cut off
where others round), |pre - exact| is

    x given in bfloat16 or float16: x hi only is x     (W hi + W lo) x            <= 2^-23 |x||w|
    x float32: (W hi + W lo) x hi + W hi x lo          leaves W lo x lo out, too  <= 2^-21 |x||w|

plus 2^-38 sqrt(d) |x||w|: at least four times inside the margin. Weights that were published in 16 bits
have no lo part, and then one product is enough. Scaled float16 rather than bfloat16 parts: two of
those leave 2^-17 |w|, more than the margin, so three products (six for float32 x) would be needed
where two (three) do.

relu, jumprelu, gated   One pass. A tile of 128 features x 128 tokens writes its survivors to a scratch
                        list, sorted within the tile, at a place taken from an atomic counter, and how
                        many it found of each feature. Prefix sums over (feature, block of tokens) give
                        each survivor its row, and a second kernel moves it there. Recomputing the tiles
                        instead of the scratch list would double the products. A list that was too
                        short is made longer and the pass repeated.
topk and its kin        Products of a run of tokens are kept in float32; a program per token finds the
                        k-th highest rank by its bits, highest first, then the last feature that is
                        kept among equals; the tiles are compacted as above against these two numbers.
                        Writing and reading 8 bytes a product is about a fifth of the time that the
                        product itself takes at d 2,304 (by the H200's data sheet, not measured), and
                        recomputing it would be all of it.

Block shapes are constants, never tuned: they fix the order of the sums.
"""

# mypy: disable-error-code="no-untyped-def"
# The kernels' parameters are typed when they are compiled.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sae_runtime import reference
from sae_runtime.sae import SaeWeights

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

FEATURES, TOKENS, DEPTH = 128, 128, 64  # of a tile; DEPTH is how much of d_in is loaded at once
CELLS = 1 << 24  # (feature, block of tokens) pairs of one pass: 8 bytes each, a few times
BLOCKS = 1 << 15  # of tokens in one pass: a launch takes no more than 65,535 in its second dimension
KEPT_VALUES = 1 << 28  # products held at once for the rules that rank: 1 GB
IN_REGISTERS = 1 << 15  # features of a token that are ranked without reading them again
_ROWS_PER_TOKEN = 128  # what the scratch list is made for at first
_MOVED = 1024  # survivors that are moved at a time
_PARTS_EXACT = (torch.bfloat16, torch.float16)  # one float16 part holds these


def supports(sae: SaeWeights) -> bool:
    """Whether `Kernels` can encode with an SAE whose tensors are on a CUDA device.

    Not where triton is missing, nor on devices before Ampere or not NVIDIA's; nor GLU encoders and groupmax.
    """
    if triton is None or torch.version.hip is not None or sae.W_glu is not None or sae.rule == "groupmax":
        return False
    return torch.cuda.get_device_capability(sae.b_enc.device) >= (8, 0)


@dataclass(frozen=True)
class Parts:
    """Rows as float16 parts: row r is sum(parts[:, r]) * unit[r], zero-padded to whole tiles."""

    parts: torch.Tensor  # float16 [1 or 2, rows, depth]
    unit: torch.Tensor  # float32 [rows], powers of two

    @classmethod
    def of(cls, rows: torch.Tensor, multiple: int, most: int = 2) -> Parts:
        """Split float rows [n, d]; `most` 1 says that one part is exact."""
        n, d = rows.shape
        shape = (most, _whole(n, multiple), _whole(d, DEPTH))
        parts = torch.zeros(shape, dtype=torch.float16, device=rows.device)
        unit = torch.ones(shape[1], dtype=torch.float32, device=rows.device)
        step = max(1, (1 << 26) // d)  # float32 copies of this many rows only
        for first in range(0, n, step):
            block = rows[first : first + step].float()
            exponent = 15 - torch.frexp(block.abs().amax(dim=1)).exponent
            exponent = exponent.clamp(-126, 126)
            block = block * _power(exponent)[:, None]
            here = slice(first, first + len(block))
            parts[0, here, :d] = block
            if most == 2:
                parts[1, here, :d] = block - parts[0, here, :d].float()
            unit[here] = _power(-exponent)
        return cls(parts, unit)

    def trimmed(self) -> Parts:
        """Without a second part that is all zero."""
        if len(self.parts) == 1 or bool(self.parts[1].any()):
            return self
        return Parts(self.parts[:1].clone(), self.unit)


class Kernels:
    """The encoder of one SAE whose tensors, and whose cut, are on the device; see `supports`."""

    def __init__(
        self,
        sae: SaeWeights,
        floor: torch.Tensor | None = None,
        gain: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> None:
        """`floor`, `gain`, `shift` [width] as in `encode.Cut`; None for a rule that ranks."""
        self.sae, self.width, self.device = sae, len(sae.b_enc), sae.b_enc.device
        self.weight = Parts.of(sae.W_enc.T, FEATURES).trimmed()
        padded = self.weight.unit.shape[0]
        bias = torch.zeros_like(sae.b_enc) if sae.rule == "gated" else sae.b_enc
        self.bias = _padded(bias, padded, 0.0)
        self.floor = None if floor is None else _padded(floor, padded, float("inf"))
        self.gain = None if gain is None else _padded(gain, padded, 0.0)
        self.shift = None if shift is None else _padded(shift, padded, 0.0)
        self.scale = None if sae.select_scale is None else _padded(sae.select_scale, padded, 1.0)
        self.rows_per_token = float(_ROWS_PER_TOKEN)
        how = sae.input
        self.as_given = how.norm == "none" and how.scale == 1.0 and sae.b_pre is None

    @property
    def most_tokens(self) -> int:
        """Tokens that `encode` takes at once."""
        return max(1, min(CELLS // len(self.bias), BLOCKS)) * TOKENS

    @torch.inference_mode()
    def encode(self, x: torch.Tensor, first: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The columns of a `Sparse` for `x` [tokens, d_in], any float dtype; numbers of tokens from `first`.

        1 to `most_tokens` tokens.
        """
        exact = self.as_given and x.dtype in _PARTS_EXACT
        split = Parts.of(x if exact else reference.inputs(x, self.sae), TOKENS, 1 if exact else 2)
        with torch.cuda.device_of(x):  # where triton launches
            return self._encode(split, len(x), first)

    def _encode(self, x: Parts, tokens: int, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        capacity = int(self.rows_per_token * tokens) + 1
        while True:
            found = _Survivors.empty(len(self.bias), tokens, capacity, self.device)
            if self.floor is not None:
                self._over(x, tokens, found)
            else:
                self._ranked(x, tokens, found)
            rows = int(found.total)
            self.rows_per_token = max(self.rows_per_token, 1.25 * rows / tokens)
            if rows <= capacity:
                return found.moved(rows, self.width, first)
            capacity = rows

    def _over(self, x: Parts, tokens: int, found: _Survivors) -> None:
        none = self.bias
        _threshold_kernel[self._grid(tokens)](
            *self._operands(x, slice(0, None)), self.floor,
            none if self.gain is None else self.gain, none if self.shift is None else self.shift,
            *found.arguments(), tokens, found.blocks, AFFINE=self.gain is not None,
            **self._shape(x),
        )  # fmt: skip

    def _ranked(self, x: Parts, tokens: int, found: _Survivors) -> None:
        padded = len(self.bias)
        step = _whole(max(1, min(KEPT_VALUES // padded, tokens)), TOKENS)
        step = max(TOKENS, min(step, KEPT_VALUES // padded // TOKENS * TOKENS))
        pre = torch.empty(step, padded, dtype=torch.float32, device=self.device)
        for first in range(0, tokens, step):
            n = min(step, tokens - first)
            _product_kernel[self._grid(n)](
                *self._operands(x, slice(first, None)), pre, n, -(-n // TOKENS), **self._shape(x)
            )
            least, last = self._bounds(pre, n)
            _ranked_kernel[(padded // FEATURES, -(-n // TOKENS))](
                pre, self._ranks(), least, last, *found.arguments(), n, first // TOKENS, found.blocks,
                self.width, padded, **self._rule(), BF=FEATURES, BT=TOKENS,
                num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip

    def _bounds(self, pre: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each token: the k-th highest rank as an ordered integer, the last feature kept among equals."""
        least, last = (torch.empty(tokens, dtype=torch.int32, device=self.device) for _ in range(2))
        padded = len(self.bias)
        single = padded <= IN_REGISTERS
        block = _power_of_two(padded) if single else 1024
        _select_kernel[(tokens,)](
            pre, self._ranks(), least, last, self.width, padded, self.sae.k,
            SCALED=self.scale is not None, ABSOLUTE=self.sae.rule == "abstopk",
            SINGLE=single, BLOCK=block, num_warps=16 if block > 8192 else 8, enable_fp_fusion=False,
        )  # fmt: skip
        return least, last

    def _ranks(self) -> torch.Tensor:
        return self.bias if self.scale is None else self.scale  # not read where there is none

    def _rule(self) -> dict[str, bool]:
        rule = self.sae.rule
        return {
            "SCALED": self.scale is not None,
            "ABSOLUTE": rule == "abstopk",
            "SIGNED": rule in ("topk_signed", "abstopk"),
        }

    def _grid(self, tokens: int) -> tuple[int]:
        return (len(self.bias) // FEATURES * -(-tokens // TOKENS),)

    def _operands(self, x: Parts, tokens: slice) -> tuple[Any, ...]:
        """What `_tile` takes: the parts, the distance between two of them, units, depth, bias."""
        w = self.weight
        stride, depth = x.parts.stride(0), x.parts.shape[2]
        rows = x.parts[:, tokens]
        return w.parts, rows, w.parts.stride(0), stride, w.unit, x.unit[tokens], depth, self.bias

    def _shape(self, x: Parts) -> dict[str, int]:
        """Constants of the kernels with products, and how they are launched."""
        w_parts, x_parts = len(self.weight.parts), len(x.parts)
        return {"W_PARTS": w_parts, "X_PARTS": x_parts, "BANDS": len(self.bias) // FEATURES} | launch(
            w_parts + x_parts
        )


@dataclass(frozen=True)
class _Survivors:
    """What the tiles found, not yet in order: the scratch list and where each tile's part of it begins."""

    words: torch.Tensor  # int32 [capacity]: feature in tile << 24 | token in tile << 16 | code
    total: torch.Tensor  # int64 []: how many were found, even if there was no room
    counts: torch.Tensor  # int32 [width, blocks]: of a feature in a block of tokens
    begins: torch.Tensor  # int64 [width / FEATURES, blocks]

    @classmethod
    def empty(cls, width: int, tokens: int, capacity: int, device: torch.device) -> _Survivors:
        blocks = -(-tokens // TOKENS)
        return cls(
            torch.empty(capacity, dtype=torch.int32, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
            torch.empty(width, blocks, dtype=torch.int32, device=device),
            torch.empty(width // FEATURES, blocks, dtype=torch.int64, device=device),
        )

    @property
    def blocks(self) -> int:
        return self.counts.shape[1]

    def arguments(self) -> tuple[Any, ...]:
        return self.words, self.total, self.counts, self.begins, len(self.words)

    def moved(self, rows: int, width: int, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """In order, on the host."""
        counts = self.counts.long()
        ends = counts.flatten().cumsum(0).view_as(counts)
        tiles = counts.view(-1, FEATURES, self.blocks)
        within = tiles.cumsum(1)
        sizes = within[:, -1].contiguous()
        # A survivor's row is its place in the list and what this adds.
        ahead = (ends.view_as(tiles) - within - self.begins[:, None]).contiguous()
        device = counts.device
        token = torch.empty(rows, dtype=torch.int32, device=device)
        code = torch.empty(rows, dtype=torch.int16, device=device)
        _move_kernel[tuple(self.begins.shape)](
            self.words, self.begins, sizes, ahead, token, code, self.blocks, first,
            BF=FEATURES, BT=TOKENS, ROWS=_MOVED,
        )  # fmt: skip
        indptr = torch.zeros(width + 1, dtype=torch.int64, device=device)
        indptr[1:] = ends[:width, -1]
        on_host = [_host(column) for column in (indptr, token, code)]
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return on_host[0].numpy(), on_host[1].numpy(), on_host[2].numpy().view(np.uint16)


def _host(column: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, which is under way; itself if it is there."""
    if column.device.type != "cuda":
        return column
    found = torch.empty(column.shape, dtype=column.dtype, pin_memory=True)
    return found.copy_(column, non_blocking=True)


def launch(parts: int) -> dict[str, Any]:
    """Shape of the tiles for so many parts of both operands, and how they are run.

    Two tiles share a multiprocessor (128 registers a thread, 96 KB of shared memory at most), so that
    one compacts while the other multiplies.
    """
    depth = DEPTH if parts < 4 else DEPTH // 2
    return {
        "BF": FEATURES,
        "BT": TOKENS,
        "BK": depth,
        "num_warps": 8,
        "num_stages": 2 if parts == 3 else 3,
        "maxnreg": 128,
        "enable_fp_fusion": False,  # gated activations are a product and a sum, rounded twice
    }


def _whole(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _power(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent, exactly, for -126 to 127."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def _padded(row: torch.Tensor, size: int, value: float) -> torch.Tensor:
    return torch.nn.functional.pad(row.float(), (0, size - len(row)), value=value).contiguous()


if triton is not None:

    @triton.jit
    def _tile(
        W, X, w_part, x_part, w_unit, x_unit, depth, bias, tile, blocks,
        W_PARTS: tl.constexpr, X_PARTS: tl.constexpr,
        BF: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BANDS: tl.constexpr,
    ):  # fmt: skip
        """Products with their bias, float32 [BF, BT], and the tile's place: (u, band, block)."""
        # Tiles of 8 bands of features share what they read of x while it is in the cache.
        group = 8 * blocks
        first = tile // group * 8
        high = tl.minimum(BANDS - first, 8)
        band = first + tile % group % high
        block = tile % group // high
        feature = (band * BF + tl.arange(0, BF)).to(tl.int64)
        token = (block * BT + tl.arange(0, BT)).to(tl.int64)
        k = tl.arange(0, BK)
        w = W + feature[:, None] * depth + k[None, :]
        x = X + token[None, :] * depth + k[:, None]
        sums = tl.zeros((BF, BT), tl.float32)
        for _ in range(0, depth, BK):
            w_high = tl.load(w)
            x_high = tl.load(x)
            if W_PARTS == 2:
                sums = tl.dot(tl.load(w + w_part), x_high, sums)
            if X_PARTS == 2:
                sums = tl.dot(w_high, tl.load(x + x_part), sums)
            sums = tl.dot(w_high, x_high, sums)
            w += BK
            x += BK
        sums = sums * tl.load(w_unit + feature)[:, None] * tl.load(x_unit + token)[None, :]
        return sums + tl.load(bias + feature)[:, None], band, block

    @triton.jit
    def _code(value):
        """The bfloat16 code, int32, of the float32 value, to the nearest, ties to even."""
        bits = value.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int32)

    @triton.jit
    def _compact(
        active, code, words, total, counts, begins, capacity, band, block, blocks,
        BF: tl.constexpr, BT: tl.constexpr,
    ):  # fmt: skip
        """Write a tile's survivors to the scratch list, sorted by feature, then token."""
        rank = tl.cumsum(active.to(tl.int32), 1)
        count = tl.max(rank, 1)  # a second sum here does not compile for Blackwell (triton 3.7)
        before = tl.cumsum(count, 0) - count
        begin = tl.atomic_add(total, tl.sum(count, 0).to(tl.int64))
        f = tl.arange(0, BF)
        tl.store(counts + (band * BF + f).to(tl.int64) * blocks + block, count)
        tl.store(begins + band * blocks + block, begin)
        at = before[:, None] + rank - 1  # 64-bit places would cost twice the registers
        room = tl.maximum(tl.minimum(capacity - begin, BF * BT), 0).to(tl.int32)
        word = code | (tl.arange(0, BT)[None, :] << 16) | (f[:, None] << 24)
        tl.store(words + begin + at, word, mask=active & (at < room))

    @triton.jit
    def _threshold_kernel(
        W, X, w_part, x_part, w_unit, x_unit, depth, bias, floor, gain, shift,
        words, total, counts, begins, capacity, tokens, blocks, AFFINE: tl.constexpr,
        W_PARTS: tl.constexpr, X_PARTS: tl.constexpr,
        BF: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BANDS: tl.constexpr,
    ):  # fmt: skip
        u, band, block = _tile(
            W, X, w_part, x_part, w_unit, x_unit, depth, bias, tl.program_id(0), blocks,
            W_PARTS, X_PARTS, BF, BT, BK, BANDS,
        )  # fmt: skip
        feature = band * BF + tl.arange(0, BF)
        token = block * BT + tl.arange(0, BT)
        active = (u > tl.load(floor + feature)[:, None]) & (token < tokens)[None, :]
        if AFFINE:
            u = u * tl.load(gain + feature)[:, None] + tl.load(shift + feature)[:, None]
        _compact(active, _code(u), words, total, counts, begins, capacity, band, block, blocks, BF, BT)

    @triton.jit
    def _product_kernel(
        W, X, w_part, x_part, w_unit, x_unit, depth, bias, pre, tokens, blocks,
        W_PARTS: tl.constexpr, X_PARTS: tl.constexpr,
        BF: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BANDS: tl.constexpr,
    ):  # fmt: skip
        """Products as [tokens, features]."""
        u, band, block = _tile(
            W, X, w_part, x_part, w_unit, x_unit, depth, bias, tl.program_id(0), blocks,
            W_PARTS, X_PARTS, BF, BT, BK, BANDS,
        )  # fmt: skip
        feature = band * BF + tl.arange(0, BF)
        token = (block * BT + tl.arange(0, BT)).to(tl.int64)
        at = token[None, :] * (BANDS * BF) + feature[:, None]
        tl.store(pre + at, u, mask=(token < tokens)[None, :])

    @triton.jit
    def _order(value, scale, SCALED: tl.constexpr, ABSOLUTE: tl.constexpr):
        """int32 that order as the ranks do; equal floats (0 and -0) are equal."""
        rank = value
        if SCALED:
            rank = value * scale
        bits = tl.where(rank == 0.0, 0.0, rank).to(tl.int32, bitcast=True)
        if ABSOLUTE:
            return bits & 0x7FFFFFFF
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    @triton.jit
    def _keys(pre, ranks, first, width, SCALED: tl.constexpr, ABSOLUTE: tl.constexpr, BLOCK: tl.constexpr):
        """The ranks of some features of one token, moved to uint32; past the width 0, below all others."""
        feature = first + tl.arange(0, BLOCK)
        inside = feature < width
        value = tl.load(pre + feature, mask=inside, other=0.0)
        scale = value
        if SCALED:
            scale = tl.load(ranks + feature, mask=inside, other=1.0)
        keys = _order(value, scale, SCALED, ABSOLUTE).to(tl.uint32, bitcast=True) ^ 0x80000000
        return tl.where(inside, keys, 0)

    @triton.jit
    def _select_kernel(
        pre, ranks, least_out, last_out, width, padded, k,
        SCALED: tl.constexpr, ABSOLUTE: tl.constexpr, SINGLE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One token: `least`, the k-th highest key, and the last feature that is kept of those equal to it.

        The highest number that k keys reach, found bit by bit, is the k-th highest key.
        """
        row = tl.program_id(0).to(tl.int64)
        pre += row * padded
        least = tl.zeros((), tl.uint32)
        if SINGLE:
            keys = _keys(pre, ranks, 0, width, SCALED, ABSOLUTE, BLOCK)
            for step in range(32):
                tried = least | (tl.full((), 0x80000000, tl.uint32) >> step)
                reach = tl.sum((keys >= tried).to(tl.int32), 0)
                least = tl.where(reach >= k, tried, least)
            over = tl.sum((keys > least).to(tl.int32), 0)
            equal = (keys == least).to(tl.int32)
            order = tl.cumsum(equal, 0)
            kept = (equal == 1) & (order <= k - over)
            last = tl.max(tl.where(kept, tl.arange(0, BLOCK), -1), 0)
        else:
            # Four bits at a time: fifteen numbers are tried for each reading of the token's ranks.
            digit = tl.arange(0, 16).to(tl.uint32)
            for step in range(8):
                tried = least | (digit << (28 - 4 * step))
                reach = tl.zeros((16,), tl.int32)
                for first in range(0, width, BLOCK):
                    keys = _keys(pre, ranks, first, width, SCALED, ABSOLUTE, BLOCK)
                    inside = (first + tl.arange(0, BLOCK)) < width
                    hits = (keys[:, None] >= tried[None, :]) & inside[:, None]
                    reach += tl.sum(hits.to(tl.int32), 0)
                best = tl.max(tl.where(reach >= k, tl.arange(0, 16), 0), 0)
                least = least | (best.to(tl.uint32) << (28 - 4 * step))
            over = tl.zeros((), tl.int32)
            for first in range(0, width, BLOCK):
                keys = _keys(pre, ranks, first, width, SCALED, ABSOLUTE, BLOCK)
                over += tl.sum((keys > least).to(tl.int32), 0)
            last = tl.full((), -1, tl.int32)
            seen = tl.zeros((), tl.int32)
            for first in range(0, width, BLOCK):
                keys = _keys(pre, ranks, first, width, SCALED, ABSOLUTE, BLOCK)
                equal = (keys == least).to(tl.int32)
                order = seen + tl.cumsum(equal, 0)
                kept = (equal == 1) & (order <= k - over)
                last = tl.maximum(last, tl.max(tl.where(kept, first + tl.arange(0, BLOCK), -1), 0))
                seen += tl.sum(equal, 0)
        tl.store(least_out + row, (least ^ 0x80000000).to(tl.int32, bitcast=True))
        tl.store(last_out + row, last)

    @triton.jit
    def _ranked_kernel(
        pre, ranks, least_in, last_in, words, total, counts, begins, capacity, tokens, offset, blocks, width,
        padded, SCALED: tl.constexpr, ABSOLUTE: tl.constexpr, SIGNED: tl.constexpr,
        BF: tl.constexpr, BT: tl.constexpr,
    ):  # fmt: skip
        """Compact a tile of stored products against each token's bounds; `offset` blocks came before."""
        band = tl.program_id(0)
        block = tl.program_id(1)
        feature = band * BF + tl.arange(0, BF)
        token = block * BT + tl.arange(0, BT)
        inside = (feature < width)[:, None] & (token < tokens)[None, :]
        at = token.to(tl.int64)[None, :] * padded + feature[:, None]
        value = tl.load(pre + at, mask=inside, other=0.0)
        scale = value
        if SCALED:
            scale = tl.load(ranks + feature)[:, None]
        key = _order(value, scale, SCALED, ABSOLUTE)
        least = tl.load(least_in + token, mask=token < tokens, other=0)[None, :]
        last = tl.load(last_in + token, mask=token < tokens, other=-1)[None, :]
        active = inside & ((key > least) | ((key == least) & (feature[:, None] <= last)))
        code = _code(value)
        active = active & ((code & 0x7FFF) != 0)
        if not SIGNED:
            active = active & (value > 0.0)
        _compact(active, code, words, total, counts, begins, capacity, band, offset + block, blocks, BF, BT)

    @triton.jit
    def _move_kernel(
        words, begins, sizes, ahead, token_out, code_out, blocks, offset,
        BF: tl.constexpr, BT: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Bring a tile's survivors to their rows."""
        band = tl.program_id(0)
        block = tl.program_id(1)
        begin = tl.load(begins + band * blocks + block)
        size = tl.load(sizes + band * blocks + block).to(tl.int32)
        for start in range(0, size, ROWS):
            j = start + tl.arange(0, ROWS)
            inside = j < size
            word = tl.load(words + begin + j, mask=inside, other=0)
            feature = (band * BF + (word >> 24)).to(tl.int64)
            row = begin + j + tl.load(ahead + feature * blocks + block, mask=inside, other=0)
            tl.store(token_out + row, offset + block * BT + ((word >> 16) & 0xFF), mask=inside)
            tl.store(code_out + row, (word & 0xFFFF).to(tl.int16), mask=inside)
