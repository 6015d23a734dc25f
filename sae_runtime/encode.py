"""The fast encoder: dense float32 products in blocks, survivors compacted feature-major.

Invariant: a (feature, token) is in the result exactly where `reference.encode` is positive after
rounding to bfloat16, up to float32 rounding of the pre-activation itself; rows come out sorted by
feature, then token, whatever the block sizes.
Trade-off, measured (2 cores, 4,096 tokens x 4,096 features x d 576, 82 active per token): finding the
survivors costs 12 to 13 ms with the loop below against 65 ms for torch compare + nonzero; the
transposed product makes sorted output free. Devices other than the CPU take the torch path.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sae_runtime.bfloat import round_code
from sae_runtime.jit import jit
from sae_runtime.sae import SaeWeights

TOKENS_PER_BLOCK = 2048
FEATURES_PER_BLOCK = 4096


@dataclass(frozen=True)
class Sparse:
    """Active (feature, token) pairs of one SAE over a run of tokens, sorted by feature, then token."""

    indptr: np.ndarray  # int64 [width + 1]: rows of feature f are indptr[f]:indptr[f + 1]
    token: np.ndarray  # int32 [rows]; int64 where it holds the index's own token keys
    code: np.ndarray  # uint16 [rows], bfloat16 codes, positive

    @property
    def rows(self) -> int:
        return len(self.token)


class Encoder:
    """One SAE ready to encode on a device; the weights are held transposed, float32."""

    def __init__(self, weights: SaeWeights, device: torch.device) -> None:
        if device.type == "cuda":  # TF32 would not be float32
            torch.backends.cuda.matmul.allow_tf32 = False
        self.device = device
        self.weight = weights.W_enc.T.contiguous().to(device)  # [width, d_in]
        self.bias = weights.b_enc[:, None].to(device)  # [width, 1]
        assert weights.rule == "jumprelu" and weights.threshold is not None
        assert weights.W_dec is not None and weights.b_dec is not None
        self.threshold = weights.threshold.to(device)
        self.W_dec = weights.W_dec.to(device)
        self.b_dec = weights.b_dec.to(device)
        self.width = len(weights.b_enc)

    @torch.inference_mode()
    def encode(self, x: torch.Tensor) -> Sparse:
        """Active pairs for `x` [tokens, d_in], any float dtype, on the encoder's device."""
        if not len(x):
            return Sparse(np.zeros(self.width + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.uint16))
        blocks = []
        for start in range(0, len(x), TOKENS_PER_BLOCK):
            columns = x[start : start + TOKENS_PER_BLOCK].float().T
            parts = [
                self._compact(columns, first, start) for first in range(0, self.width, FEATURES_PER_BLOCK)
            ]
            blocks.append(_stack(parts))
        return merge(blocks, self.width)

    @torch.inference_mode()
    def squared_error(self, x: torch.Tensor) -> float:
        """Sum over tokens of |x - decode(encode(x))|^2, for a sample `x` [tokens, d_in]."""
        x = x.float()
        pre = x @ self.weight.T + self.bias[:, 0]
        f = torch.relu(pre) * (pre > self.threshold)
        return float((x - (f @ self.W_dec + self.b_dec)).double().square().sum())

    def _compact(self, columns: torch.Tensor, first: int, offset: int) -> Sparse:
        rows = slice(first, first + FEATURES_PER_BLOCK)
        pre = torch.addmm(self.bias[rows], self.weight[rows], columns)  # [features, tokens]
        threshold = self.threshold[rows]
        if self.device.type == "cpu":
            return Sparse(*_compact_numba(pre.numpy(), threshold.numpy(), offset))
        return compact_torch(pre, threshold, offset)


def compact_torch(pre: torch.Tensor, threshold: torch.Tensor, offset: int) -> Sparse:
    """Survivors of pre-activations [features, tokens] by generic operators, on any device."""
    rounded = torch.relu(pre).to(torch.bfloat16)
    feature, token = torch.nonzero((pre > threshold[:, None]) & (rounded > 0), as_tuple=True)
    code = rounded[feature, token].view(torch.int16).cpu().numpy().view(np.uint16)
    indptr = torch.zeros(len(pre) + 1, dtype=torch.int64)
    indptr[1:] = torch.bincount(feature, minlength=len(pre)).cumsum(0).cpu()
    return Sparse(indptr.numpy(), (token + offset).to(torch.int32).cpu().numpy(), code)


@jit
def _compact_numba(
    pre: np.ndarray, threshold: np.ndarray, offset: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    features, tokens = pre.shape
    bits = pre.view(np.uint32)
    indptr = np.zeros(features + 1, np.int64)
    for f in range(features):
        count = 0
        floor = max(threshold[f], np.float32(0.0))
        for t in range(tokens):
            # At the bottom of the range a positive number can round to a bfloat16 of zero.
            count += (pre[f, t] > floor) & (bits[f, t] > 0x8000)
        indptr[f + 1] = indptr[f] + count
    token = np.empty(indptr[features], np.int32)
    code = np.empty(indptr[features], np.uint16)
    for f in range(features):
        row = indptr[f]
        floor = max(threshold[f], np.float32(0.0))
        if indptr[f + 1] == row:
            continue
        for t in range(tokens):
            if pre[f, t] > floor and bits[f, t] > 0x8000:
                token[row] = offset + t
                code[row] = round_code(bits[f, t])
                row += 1
    return indptr, token, code


def _stack(parts: list[Sparse]) -> Sparse:
    """Consecutive features of the same tokens as one block."""
    if len(parts) == 1:
        return parts[0]
    counts = np.concatenate([np.diff(part.indptr) for part in parts])
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return Sparse(indptr, np.concatenate([p.token for p in parts]), np.concatenate([p.code for p in parts]))


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
        for row in range(indptr[f], indptr[f + 1]):
            token_out[at[f]] = token[row]
            code_out[at[f]] = code[row]
            at[f] += 1
