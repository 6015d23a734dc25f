"""The fast encoder: products in blocks, active features compacted feature-major.

Invariant: a (feature, token) is in the result exactly where `reference.encode` is not zero after
rounding to bfloat16, up to float32 rounding of the pre-activation itself; rows come out sorted by
feature, then token, whatever the block sizes.

relu, jumprelu, gated   products [features, tokens] against one number a feature, at which `Cut` gathers
                        every condition of the rule exactly: comparing decides as the formula would. On a
                        CPU in a cheap type first (screen.py), in float32 where there is a GLU
the rules that rank     products [tokens, features], selected token by token (topk.py), then sorted

Trade-off, measured (2 cores, 4,096 tokens x 4,096 features x d 576, 82 active per token): finding the
survivors costs 12 to 13 ms with the loop below against 65 ms for torch compare + nonzero; the
transposed product makes sorted output free. Same shape, k 64: selecting and sorting cost 40 to 50 ms, a
product 62 to 70. A GPU takes the kernels of triton_encode.py where they can, other devices the torch path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from sae_runtime import reference
from sae_runtime.bfloat import rounded, to_float, value_of
from sae_runtime.jit import jit
from sae_runtime.sae import Input, SaeWeights
from sae_runtime.screen import Screen
from sae_runtime.topk import by_feature, chosen, pick
from sae_runtime.triton_encode import Kernels, supports

TOKENS_PER_BLOCK = 2048
FEATURES_PER_BLOCK = 4096
VALUES_PER_BLOCK = 1 << 24  # pre-activations held at once where whole tokens are needed: 64 MB
_FEWEST = 64  # tokens of such a block: a product of less is all reading of weights
_ONE_AT_A_TIME = Lock()  # SAEs whose kernels have a GPU and its memory, while others' rows are summed up
_NOTHING = np.array([0x8000], np.uint32).view(np.float32)[0]  # the highest that rounds to a bfloat16 of 0


@dataclass(frozen=True)
class Sparse:
    """Active (feature, token) pairs of one SAE over a run of tokens, sorted by feature, then token."""

    indptr: np.ndarray  # int64 [width + 1]: rows of feature f are indptr[f]:indptr[f + 1]
    token: np.ndarray  # int32 [rows]
    code: np.ndarray  # uint16 [rows], bfloat16 codes, not zero; negative ones under a signed rule only

    @property
    def rows(self) -> int:
        return len(self.token)


@dataclass(frozen=True)
class Cut:
    """A rule as one comparison: feature f is active where its product u is over floor[f].

    The activation there is u, or u * gain[f] + shift[f].
    """

    floor: torch.Tensor  # float32 [width]
    gain: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    @classmethod
    def of(cls, sae: SaeWeights) -> Cut | None:
        """The cut of a relu, jumprelu or gated SAE; None for rules that rank a token's features."""
        if sae.rule == "relu":
            return cls(torch.full_like(sae.b_enc, float(_NOTHING)))
        if sae.rule == "jumprelu":
            assert sae.threshold is not None
            floor = sae.threshold.numpy()
            if sae.select_scale is not None:
                # Rounding is monotone, so `u * scale > threshold` is `u > floor` for one float.
                scale, threshold = sae.select_scale.numpy(), floor
                floor = _highest_failing(lambda u: u * scale > threshold, len(floor))
            return cls(torch.from_numpy(np.maximum(floor, _NOTHING)))
        if sae.rule == "gated":
            assert sae.b_gate is not None
            assert sae.r_mag is not None
            gain, shift = torch.exp(sae.r_mag), sae.b_enc
            g, s = gain.numpy(), shift.numpy()
            floor = _highest_failing(lambda u: u * g + s > _NOTHING, len(g))
            # u + b > 0 exactly where u > -b: a float sum is 0 only where the true sum is.
            return cls(torch.from_numpy(np.maximum(floor, -sae.b_gate.numpy())), gain, shift)
        return None

    def on(self, device: torch.device) -> Cut:
        """The cut on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def block(self, rows: slice) -> Cut:
        """The cut of some features."""
        return self._each(lambda tensor: tensor[rows])

    def values(self, u: torch.Tensor) -> torch.Tensor:
        """Activations from the products [..., width], where they are active."""
        return u if self.gain is None or self.shift is None else u * self.gain + self.shift

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Cut:
        gain, shift = (None if t is None else change(t) for t in (self.gain, self.shift))
        return Cut(change(self.floor), gain, shift)


class Encoder:
    """One SAE ready to encode on a device; the weights are held transposed, float32."""

    def __init__(self, weights: SaeWeights, device: torch.device) -> None:
        if device.type == "cuda":  # TF32 would not be float32
            torch.backends.cuda.matmul.allow_tf32 = False
        self.device = device
        self.loops = device.type == "cpu"  # compiled loops, or generic operators
        self.width = len(weights.b_enc)
        self.weight = weights.W_enc.T.contiguous().to(device)  # [width, d_in]
        self.glu = None if weights.W_glu is None else weights.W_glu.T.contiguous().to(device)
        cut = Cut.of(weights)
        self.cut = None if cut is None else cut.on(device)
        here: dict[str, Any] = {"W_enc": self.weight.T, "W_glu": None if self.glu is None else self.glu.T}
        here |= {name: t.to(device) for name, t in weights.tensors().items() if name not in here}
        self.sae = replace(weights, **here)
        self.screen: Screen | None = None
        bias = self.sae.b_enc if weights.rule != "gated" else torch.zeros_like(self.sae.b_enc)
        self.bias = bias[:, None]  # [width, 1]
        if self.cut is not None and self.glu is None and self.loops:
            self.screen = Screen(self.weight, bias, self.cut.floor)
        self.kernels: Kernels | None = None
        if device.type == "cuda" and supports(self.sae):
            self.kernels = kernels_of(self.sae, self.cut)

    @property
    def has_decoder(self) -> bool:
        """Whether there is a decoder of its own, which `squared_error` needs."""
        return self.sae.W_dec is not None

    @torch.inference_mode()
    def encode(self, x: torch.Tensor) -> Sparse:
        """Active pairs for `x` [tokens, d_in], any float dtype, on the encoder's device."""
        if not len(x):
            return Sparse(np.zeros(self.width + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.uint16))
        if self.kernels is not None:
            step = self.kernels.most_tokens
            starts = range(0, len(x), step)
            with _ONE_AT_A_TIME:
                blocks = [Sparse(*self.kernels.encode(x[s : s + step], s)) for s in starts]
            return merge(blocks, self.width)
        if self.screen is not None and self.cut is not None:
            return self._screened(x, self.screen, self.cut)
        if self.cut is not None:
            return self._over(x, self.cut)
        return self._ranked_loops(x) if self.loops else self._ranked_torch(x)

    @torch.inference_mode()
    def squared_error(self, x: torch.Tensor, active: Sparse, target: torch.Tensor | None = None) -> float:
        """Sum over tokens of |target - decode(active, x)|^2, for a sample `x` [tokens, d_in].

        `active` is what `encode(x)` gives, its activations rounded to bfloat16 like those in an index.
        `target` [tokens, d_out] is what the decoder was trained to give: `x` unless it is a transcoder.
        Needs `has_decoder`.
        """
        assert self.sae.W_dec is not None
        target = x if target is None else target
        order = np.argsort(active.token, kind="stable")
        feature = np.repeat(np.arange(self.width), np.diff(active.indptr))[order]
        ends = np.searchsorted(active.token[order], np.arange(len(x)))
        value = to_float(active.code[order])
        feature_, starts, value_ = (torch.from_numpy(a).to(self.device) for a in (feature, ends, value))
        product = functional.embedding_bag(
            feature_, self.sae.W_dec, starts, mode="sum", per_sample_weights=value_
        )
        y = reference.restored(product, x, self.sae)
        return float((target.float() - y).double().square().sum())

    def _screened(self, x: torch.Tensor, screen: Screen, cut: Cut) -> Sparse:
        # What the model produced in bfloat16 and nothing has changed since loses nothing on the way there.
        exact = x.dtype == torch.bfloat16 and self.sae.b_pre is None and self.sae.input == Input()
        none = np.zeros(0, np.float32)
        gain = none if cut.gain is None else cut.gain.numpy()
        shift = none if cut.shift is None else cut.shift.numpy()
        blocks = []
        for count, token, code in screen.over(x, exact, partial(reference.inputs, sae=self.sae), gain, shift):
            indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(count)])
            blocks.append(Sparse(indptr, token, code))
        return merge(blocks, self.width)

    def _over(self, x: torch.Tensor, cut: Cut) -> Sparse:
        blocks = []
        for start in range(0, len(x), TOKENS_PER_BLOCK):
            columns = reference.inputs(x[start : start + TOKENS_PER_BLOCK], self.sae).T
            parts = []
            for first in range(0, self.width, FEATURES_PER_BLOCK):
                rows = slice(first, first + FEATURES_PER_BLOCK)
                pre = self._products(columns, rows)
                compact = compact_loops if self.loops else compact_torch
                parts.append(compact(pre, cut.block(rows), start))
            blocks.append(_stack(parts))
        return merge(blocks, self.width)

    def _products(self, columns: torch.Tensor, rows: slice) -> torch.Tensor:
        """What the rule works on, of some features: [features, tokens] from inputs [d_in, tokens]."""
        pre = torch.addmm(self.bias[rows], self.weight[rows], columns)
        if self.glu is not None:
            assert self.sae.b_glu is not None
            gate = torch.addmm(self.sae.b_glu[rows, None], self.glu[rows], columns)
            pre *= gate.sigmoid_()
        return pre

    def _whole_tokens(self, x: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Blocks of tokens, each with the products of all features: [tokens, width]."""
        step = max(_FEWEST, VALUES_PER_BLOCK // self.width)
        for start in range(0, len(x), step):
            tokens = slice(start, start + step)
            z = reference.inputs(x[tokens], self.sae)
            pre = torch.addmm(self.bias[:, 0], z, self.sae.W_enc)
            if self.sae.W_glu is not None:
                assert self.sae.b_glu is not None
                pre *= torch.addmm(self.sae.b_glu, z, self.sae.W_glu).sigmoid_()
            yield tokens, pre

    def _ranked_loops(self, x: torch.Tensor) -> Sparse:
        picks = [self._picks(pre) for _, pre in self._whole_tokens(x)]
        count, feature, code = (np.concatenate(column) for column in zip(*picks, strict=True))
        return Sparse(*by_feature(count, feature, code, self.width))

    def _picks(self, pre: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        assert self.sae.k is not None
        scale = self.sae.select_scale
        return pick(pre.numpy(), None if scale is None else scale.numpy(), self.sae.k, self.sae.rule)

    def _ranked_torch(self, x: torch.Tensor) -> Sparse:
        blocks = []
        for tokens, pre in self._whole_tokens(x):
            blocks.append(_gathered(self._chosen(pre).T, pre.to(torch.bfloat16).T, tokens.start))
        return merge(blocks, self.width)

    def _chosen(self, pre: torch.Tensor) -> torch.Tensor:
        assert self.sae.k is not None
        return chosen(pre, self.sae.select_scale, self.sae.k, self.sae.rule)


def kernels_of(sae: SaeWeights, cut: Cut | None) -> Kernels:
    """The kernels of an SAE and its cut, all on one device."""
    return Kernels(sae) if cut is None else Kernels(sae, cut.floor, cut.gain, cut.shift)


def compact_loops(pre: torch.Tensor, cut: Cut, offset: int) -> Sparse:
    """What is active of products [features, tokens], on the CPU; `pre` may be changed."""
    none = np.zeros(0, np.float32)
    gain = none if cut.gain is None else cut.gain.numpy()
    shift = none if cut.shift is None else cut.shift.numpy()
    return Sparse(*_compact(pre.numpy(), cut.floor.numpy(), gain, shift, offset))


def compact_torch(pre: torch.Tensor, cut: Cut, offset: int) -> Sparse:
    """The same by generic operators, on any device."""
    return _gathered(pre > cut.floor[:, None], cut.values(pre.T).T.to(torch.bfloat16), offset)


def _gathered(active: torch.Tensor, rounded: torch.Tensor, offset: int) -> Sparse:
    """The bfloat16 activations [features, tokens] where `active`, on any device."""
    feature, token = torch.nonzero(active, as_tuple=True)
    code = rounded[feature, token].view(torch.int16).cpu().numpy().view(np.uint16)
    indptr = torch.zeros(len(active) + 1, dtype=torch.int64)
    indptr[1:] = torch.bincount(feature, minlength=len(active)).cumsum(0).cpu()
    return Sparse(indptr.numpy(), (token + offset).to(torch.int32).cpu().numpy(), code)


def _highest_failing(holds: Callable[[np.ndarray], np.ndarray], width: int) -> np.ndarray:
    """Per feature the highest float32 at which a condition fails that holds from some number on.

    -inf where it holds everywhere. Bisects the integers that order as the floats do.
    """
    fails, stands = np.full(width, -0x7F800000, np.int64), np.full(width, 0x7F800000, np.int64)
    with np.errstate(all="ignore"):  # an infinite end may be asked again; its answer changes nothing
        while (stands - fails > 1).any():
            middle = (fails + stands) // 2
            met = holds(_float(middle))
            stands, fails = np.where(met, middle, stands), np.where(met, fails, middle)
    return _float(fails)


def _float(order: np.ndarray) -> np.ndarray:
    """The float32 at each place of their order; 0 has place 0."""
    return np.where(order < 0, 0x80000000 - order, order).astype(np.uint32).view(np.float32)


@jit
def _compact(
    pre: np.ndarray, floor: np.ndarray, gain: np.ndarray, shift: np.ndarray, offset: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    features, tokens = pre.shape
    indptr = np.zeros(features + 1, np.int64)
    for f in range(features):
        count = 0
        least = floor[f]
        for t in range(tokens):
            count += pre[f, t] > least
        indptr[f + 1] = indptr[f] + count
    token = np.empty(indptr[features], np.int32)
    code = np.empty(indptr[features], np.uint16)
    for f in range(features):
        row = indptr[f]
        least = floor[f]
        if indptr[f + 1] == row:
            continue
        for t in range(tokens):
            if pre[f, t] > least:
                if len(gain):
                    pre[f, t] = pre[f, t] * gain[f] + shift[f]
                token[row] = offset + t
                code[row] = rounded(pre[f, t])
                row += 1
    return indptr, token, code


def _stack(parts: list[Sparse]) -> Sparse:
    """Consecutive features of the same tokens as one block."""
    if len(parts) == 1:
        return parts[0]
    counts = np.concatenate([np.diff(part.indptr) for part in parts])
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return Sparse(indptr, np.concatenate([p.token for p in parts]), np.concatenate([p.code for p in parts]))


def of_tokens(sparse: Sparse, slot: np.ndarray) -> Sparse:
    """The rows of tokens with a `slot` (int32 [tokens], -1 for none), which is their token then.

    Slots ascend with the tokens.
    """
    return Sparse(*_of_tokens(sparse.indptr, sparse.token, sparse.code, slot))


@jit
def _of_tokens(
    indptr: np.ndarray, token: np.ndarray, code: np.ndarray, slot: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    bounds = np.zeros(len(indptr), np.int64)
    tokens, codes = np.empty(len(token), np.int32), np.empty(len(token), np.uint16)
    n = 0
    for f in range(len(indptr) - 1):
        for row in range(indptr[f], indptr[f + 1]):
            if slot[token[row]] >= 0:  # seldom, so that a branch costs less than writing what is not wanted
                tokens[n], codes[n] = slot[token[row]], code[row]
                n += 1
        bounds[f + 1] = n
    return bounds, tokens[:n].copy(), codes[:n].copy()


def merge(blocks: list[Sparse], width: int) -> Sparse:
    """Blocks of consecutive tokens of one SAE as one, still sorted by feature, then token."""
    if len(blocks) == 1:
        return blocks[0]
    indptr = np.zeros(width + 1, np.int64)
    for block in blocks:
        indptr += block.indptr
    token, code = np.empty(indptr[-1], blocks[0].token.dtype), np.empty(indptr[-1], np.uint16)
    at = indptr[:-1].copy()
    for block in blocks:
        _scatter(block.indptr, block.token, block.code, at, token, code)
    return Sparse(indptr, token, code)


@jit
def _scatter(
    indptr: np.ndarray,
    token: np.ndarray,
    code: np.ndarray,
    at: np.ndarray,
    token_out: np.ndarray,
    code_out: np.ndarray,
) -> None:
    for f in range(len(indptr) - 1):
        to = at[f]
        for row in range(indptr[f], indptr[f + 1]):
            token_out[to] = token[row]
            code_out[to] = code[row]
            to += 1
        at[f] = to


def columns(
    blocks: Sequence[tuple[Sparse, np.ndarray]], width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """feature int32, token key int64 and activation float32 of blocks of consecutive tokens, by feature.

    With each block the keys of its tokens, int64, ascending.
    """
    ends = np.sum([block.indptr for block, _ in blocks], axis=0)
    feature, key, value = (np.empty(ends[-1], kind) for kind in (np.int32, np.int64, np.float32))
    at = ends[:-1].copy()
    for block, keys in blocks:
        _expand(block.indptr, block.token, block.code, keys, at, feature, key, value)
    return feature, key, value


@jit
def _expand(
    indptr: np.ndarray,
    token: np.ndarray,
    code: np.ndarray,
    keys: np.ndarray,
    at: np.ndarray,
    feature: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
) -> None:
    for f in range(len(indptr) - 1):
        to = at[f]
        for row in range(indptr[f], indptr[f + 1]):
            feature[to] = f
            key[to] = keys[token[row]]
            value[to] = value_of(code[row])
            to += 1
        at[f] = to
