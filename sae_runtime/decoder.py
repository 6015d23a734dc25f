"""Decoder-side facts of features: where a decoder row points in the residual stream, what it says to the
output tokens, which rows point alike.

The direction of a feature is its decoder row as it reaches the residual stream: divided by the constant that
scaled the SAE's input (`Input.scale`, where the reconstruction is brought back), through the output
projection where the site is before one (of one head its rows), and times the gain of the norm that a block
has between its output and the residual stream (Gemma from 2 on). Factors that differ from token to token are
left out: the denominators of norms, and the input norms of SAEs that normalise each token. Its logit for a
token is the product of the direction (less its mean, where the final norm subtracts one), the final norm's
gain and the token's row of the unembedding: no softcap, no denominator, and of layers before the last the
direct path alone, past whatever later layers make of it.

Invariant: what ranks is the product in float64 of float32 rows, added in one order wherever the rows lie, so
equal rows have equal values and ties go to the lower column, whatever the size of a block. The products of
blocks in float32 only choose the candidates; a row whose candidates may not be all is looked at again.
Memory is one block of products, the candidates and the rows themselves, which may be mapped files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sae_runtime.errors import InputError
from sae_runtime.families import DROPOUTS, Family, decoder_layers, family
from sae_runtime.model import ModelSource, load_with_head
from sae_runtime.sae import SaeWeights
from sae_runtime.sites import Site

SLACK = 16  # candidates beyond those that are wanted
TOLERANCE = 1e-5  # of a float32 product, in terms of both rows' lengths; some 30 times what is seen
_BLOCKS = {"cpu": (2048, 16_384), "cuda": (8192, 131_072)}  # rows and columns of a block of products
_GATHER = 1 << 26  # bytes of candidates' rows in float64 at once
_AT_ONCE = 4096  # directions that are mapped at once


class Unmapped(Exception):
    """Why a decoder has no way to the residual stream; the text says it."""


@dataclass(frozen=True)
class Way:
    """How a vector at a site reaches the residual stream: v W * gain * scale, float64."""

    matrix: torch.Tensor | None = None  # [width, d]
    gain: torch.Tensor | None = None  # [d]
    scale: float = 1.0

    @property
    def straight(self) -> bool:
        """Whether directions stay as they are, but for their length."""
        return self.matrix is None and self.gain is None

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """float64 [rows, d] of `rows` [rows, width]."""
        rows = rows.double()
        if self.matrix is not None:
            rows = rows @ self.matrix
        if self.gain is not None:
            rows = rows * self.gain
        return rows * self.scale


class Readout:
    """What of a model is between sites and logits: ways to the residual stream, final norm, unembedding.

    `unembedding` is float32 [tokens, d].
    """

    def __init__(self, source: ModelSource, sites: Sequence[Site]) -> None:
        """Load it. A site without a way is no error here. Raises InputError for a model that is unknown."""
        # Only where weights lie between a site and the residual stream are its layers read.
        passing = [site for site in sites if site.kind not in _STRAIGHT]
        model = load_with_head(source, passing or [Site(0, "resid_post")])
        bare, head = model.base_model, model.get_output_embeddings()
        assert isinstance(bare, nn.Module)
        self._family = family(bare.config)
        norm = getattr(bare, _FINAL_NORMS[self._family.prefix])
        self.gain, self.centred = _gain(norm), isinstance(norm, nn.LayerNorm)
        self.unembedding = head.weight.detach().float()
        self._ways: dict[Site, Way | str] = {}
        for site in sites:
            try:
                self._ways[site] = _way(bare, self._family, site)
            except Unmapped as why:
                self._ways[site] = str(why)

    def way(self, site: Site) -> Way:
        """The way from one of the sites. Raises Unmapped."""
        found = self._ways[site]
        if isinstance(found, str):
            raise Unmapped(found)
        return found

    def readers(self, directions: torch.Tensor) -> torch.Tensor:
        """float64 [rows, d]: what is multiplied with rows of the unembedding, of `directions` [rows, d]."""
        v = directions.double()
        if self.centred:
            v = v - v.mean(dim=1, keepdim=True)
        return v * self.gain


_STRAIGHT = ("embed", "embed_unscaled", "resid_pre", "resid_mid", "resid_post")
_FINAL_NORMS = {"model": "norm", "gpt_neox": "final_layer_norm", "transformer": "ln_f"}  # by Family.prefix


def decoder(sae: SaeWeights) -> torch.Tensor:
    """Decoder rows float32 [width, d_out] in the units of the site that they write to.

    Raises Unmapped where there are none.
    """
    if sae.W_dec is None:
        raise Unmapped("it has no decoder of its own")
    by = sae.input.scale if sae.restore else 1.0
    return sae.W_dec if by == 1.0 else sae.W_dec / by


def norms(sae: SaeWeights) -> np.ndarray:
    """Lengths of the decoder's rows as published, float32 [width]. Raises Unmapped where there are none."""
    if sae.W_dec is None:
        raise Unmapped("it has no decoder of its own")
    found = [part.double().norm(dim=1).float() for part in sae.W_dec.split(_AT_ONCE)]
    return torch.cat(found).numpy()


def mapped(rows: torch.Tensor, way: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[np.ndarray]:
    """float32 [some, d] of `rows` [n, width] some at a time, in order."""
    for part in rows.split(_AT_ONCE):
        yield way(part).float().numpy()


def units(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; a row that is zero stays so."""
    exact = rows.astype(np.float64)
    length = np.sqrt((exact * exact).sum(axis=1, keepdims=True))
    return (exact / np.where(length > 0, length, 1.0)).astype(np.float32)


# --- ways


def _way(bare: nn.Module, found: Family, site: Site) -> Way:
    """The way from a site to the residual stream. Raises Unmapped."""
    config: Any = bare.config
    if site.kind == "embed_unscaled":
        return Way(scale=float(config.hidden_size) ** 0.5 if found.scaled else 1.0)
    if site.kind in _STRAIGHT:
        return Way()
    at = found.sites.get(site.kind, site.kind)  # a module's path in the layer, with its side
    if site.kind == "attn_out":  # where a layer's attention is linear it is another module's output
        at = found.sites["attn_out"]
    layer = decoder_layers(bare)[site.layer]
    heads, hidden = (found.sites[kind].removesuffix(".input") for kind in ("attn_z", "mlp_hidden"))
    four = found.sites["attn_out"] == "post_attention_layernorm.output"
    after = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"} if four else {}
    straight = {
        "input", "output", "input_layernorm.input", "ln_1.input", "linear_attn.output",
        found.sites["resid_mid"], found.sites["attn_out"], found.sites["mlp_out"],
        *(f"{dropout}.{side}" for dropout in DROPOUTS for side in ("input", "output")),
    }  # fmt: skip
    if at in straight:
        return Way()
    blocks = {"attention": (found.attention, heads), "mlp": ("mlp", hidden)}
    for block, (module, projection) in blocks.items():
        norm = after.get(block)
        gain = None if norm is None else _gain(layer.get_submodule(norm))
        if at in (f"{module}.output", f"{projection}.output", norm and f"{norm}.input"):
            return Way(gain=gain)
        if at == f"{projection}.input":
            matrix = _matrix(layer.get_submodule(projection))
            if site.head is not None:
                width = matrix.shape[0] // int(config.num_attention_heads)
                matrix = matrix[site.head * width : (site.head + 1) * width]
            return Way(matrix, gain)
    raise Unmapped(f"it writes to {at}, from where no linear map leads to the residual stream")


def _matrix(module: Any) -> torch.Tensor:
    """float64 [in, out] of a linear layer; GPT-2's have it so, others transposed."""
    weight = module.weight.detach().double()
    return weight.T.contiguous() if isinstance(module, nn.Linear) else weight


def _gain(norm: Any) -> torch.Tensor:
    """What a norm multiplies with once it has normalised, float64 [d].

    A norm is asked for it, because some are 1 + weight (Gemma, Qwen 3.5) and no name of theirs says so.
    """
    if isinstance(norm, nn.LayerNorm):
        return norm.weight.detach().double()
    weight = norm.weight.detach().double()
    with torch.inference_mode():
        # So long a vector that the norm's epsilon is nothing beside it.
        seen = copy.deepcopy(norm).float()(torch.full((1, len(weight)), 1000.0))[0].double()
    for gain in (weight, 1 + weight):
        if torch.allclose(seen, gain, rtol=1e-4, atol=1e-4):
            return gain
    raise InputError(f"model.uri: {type(norm).__name__} is no norm of a known kind; its gain cannot be read")


# --- the highest products


class Columns:
    """Rows [n, d] float32 of several arrays, one after the other; what a block of products has as columns."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        """`parts` may be mapped files."""
        self.parts = parts
        self.starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first, rows), `size` rows at most at a time."""
        for start, part in zip(self.starts[:-1], self.parts, strict=True):
            for first in range(0, len(part), size):
                yield int(start) + first, np.asarray(part[first : first + size])

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """float64 rows [*numbers.shape, d]."""
        flat = numbers.reshape(-1)
        found = np.empty((len(flat), self.parts[0].shape[1]), np.float64)
        which = np.searchsorted(self.starts, flat, "right") - 1
        for part in np.unique(which):
            here = which == part
            found[here] = self.parts[part][flat[here] - self.starts[part]]
        return found.reshape(*numbers.shape, -1)


@dataclass(frozen=True)
class Highest:
    """The highest products of each row, descending; of equals the lower column first."""

    columns: np.ndarray  # int64 [rows, k]; -1 beyond those that there are
    values: np.ndarray  # float64 [rows, k]; -inf there


def highest(
    rows: np.ndarray,
    columns: Columns,
    k: int,
    device: str = "cpu",
    signs: Sequence[int] = (1,),
    own: int | None = None,
) -> list[Highest]:
    """The k columns with the highest product with each row of `rows` [n, d] float32, for each sign.

    Of sign -1 they are the columns of the lowest products, lowest first, and `values` are the products times
    -1. With `own` row i is column own + i, which does not count.
    """
    if not len(columns) or not len(rows):
        shape = (len(rows), k)
        return [Highest(np.full(shape, -1, np.int64), np.full(shape, -np.inf)) for _ in signs]
    high, wide = _BLOCKS[torch.device(device).type]
    found: list[list[Highest]] = [[] for _ in signs]
    for first in range(0, len(rows), high):
        part = np.asarray(rows[first : first + high])
        at = None if own is None else own + first
        for done, each in zip(found, _highest(part, columns, k, device, wide, signs, at), strict=True):
            done.append(each)
    return [
        Highest(np.concatenate([h.columns for h in done]), np.concatenate([h.values for h in done]))
        for done in found
    ]


def _highest(
    rows: np.ndarray, columns: Columns, k: int, device: str, wide: int, signs: Sequence[int], own: int | None
) -> list[Highest]:
    """The same for one block of rows: each block of products is made once for all signs."""
    many = min(k + SLACK, len(columns))
    a = torch.from_numpy(np.array(rows)).to(device)
    best = [torch.full((len(rows), many), -torch.inf, device=device) for _ in signs]
    at = [torch.full((len(rows), many), -1, dtype=torch.int64, device=device) for _ in signs]
    longest = 0.0
    for start, b in _products(columns, wide, device):
        longest = max(longest, float(b.square().sum(dim=1).max()) ** 0.5)
        products = a @ b.T
        for i, sign in enumerate(signs):
            signed = products if sign > 0 else -products
            _leave_out_own(signed, start, own)
            values, numbers = signed.topk(min(many, len(b)), dim=1)
            best[i], order = torch.cat([best[i], values], dim=1).topk(many, dim=1)
            at[i] = torch.cat([at[i], numbers + start], dim=1).gather(1, order)
    close = 2 * TOLERANCE * longest * a.norm(dim=1)
    return [
        _settled(a * sign, columns, k, device, wide, own, values, numbers, close)
        for sign, values, numbers in zip(signs, best, at, strict=True)
    ]


def _settled(
    a: torch.Tensor, columns: Columns, k: int, device: str, wide: int, own: int | None,
    best: torch.Tensor, at: torch.Tensor, close: torch.Tensor,
) -> Highest:  # fmt: skip
    """The k best of the candidates of rows `a`, whose float32 products are `best`, in columns `at`."""
    many = best.shape[1]
    at[best == -torch.inf] = -1
    exact = a.cpu().numpy().astype(np.float64)
    found = _ranked(exact, columns, at.cpu().numpy(), k)
    if many == len(columns):
        return found
    # Where the last candidate cannot be told from the k-th, others may have been left out.
    crowded = (best[:, -1] >= best[:, min(k, many) - 1] - close) & (best[:, -1] > -torch.inf)
    if crowded.any():
        which = np.flatnonzero(crowded.cpu().numpy())
        least = best[:, k - 1] - close
        again = _exhaustive(a, exact, columns, k, device, wide, which, least, own)
        found.columns[which], found.values[which] = again.columns, again.values
    return found


def _products(columns: Columns, wide: int, device: str) -> Iterator[tuple[int, torch.Tensor]]:
    for start, block in columns.blocks(wide):
        yield start, torch.from_numpy(np.array(block, np.float32)).to(device)


def _leave_out_own(products: torch.Tensor, start: int, own: int | None) -> None:
    """-inf where row i meets column own + i; the products' columns begin with `start`."""
    if own is None:
        return
    rows = torch.arange(len(products), device=products.device)
    there = rows + own - start
    inside = (there >= 0) & (there < products.shape[1])
    products[rows[inside], there[inside]] = -torch.inf


def _exhaustive(
    a: torch.Tensor, exact: np.ndarray, columns: Columns, k: int, device: str, wide: int,
    which: np.ndarray, least: torch.Tensor, own: int | None,
) -> Highest:  # fmt: skip
    """The same for a few rows, whatever number of columns are as good as equal for them."""
    held = [np.empty(0, np.int64) for _ in which]
    some = a[torch.from_numpy(which).to(device)]
    bound = least[torch.from_numpy(which).to(device)][:, None]
    for start, b in _products(columns, wide, device):
        near = ((some @ b.T) >= bound).cpu().numpy()
        for i, row in enumerate(which):
            new = start + np.flatnonzero(near[i])
            if own is not None:
                new = new[new != own + row]
            for first in range(0, len(new), _AT_ONCE):
                numbers = np.concatenate([held[i], new[first : first + _AT_ONCE]])
                kept = _ranked(exact[row : row + 1], columns, numbers[None], k).columns[0]
                held[i] = kept[kept >= 0]
    numbers = np.full((len(which), k), -1, np.int64)
    for i, kept in enumerate(held):
        numbers[i, : len(kept)] = kept
    return _ranked(exact[which], columns, numbers, k)


def _ranked(exact: np.ndarray, columns: Columns, numbers: np.ndarray, k: int) -> Highest:
    """The k best of candidates int64 [rows, some] (-1: none) by their exact product."""
    rows, some = numbers.shape
    values = np.full((rows, some), -np.inf)
    step = max(1, _GATHER // (8 * max(1, some) * exact.shape[1]))
    for first in range(0, rows, step):
        part = numbers[first : first + step]
        products = columns.take(np.maximum(part, 0))
        products *= exact[first : first + step, None, :]
        # Not a matrix product: added in the same order for each pair, so that equal rows give equal sums.
        values[first : first + step] = np.where(part >= 0, products.sum(axis=2), -np.inf)
    order = np.lexsort((numbers, -values), axis=1)[:, :k]
    out = Highest(np.full((rows, k), -1, np.int64), np.full((rows, k), -np.inf))
    out.columns[:, : order.shape[1]] = np.take_along_axis(numbers, order, axis=1)
    out.values[:, : order.shape[1]] = np.take_along_axis(values, order, axis=1)
    return out


def merged(one: Highest, other: Highest, k: int) -> Highest:
    """The k best of both, whose columns are numbered alike."""
    columns = np.concatenate([one.columns, other.columns], axis=1)
    values = np.concatenate([one.values, other.values], axis=1)
    order = np.lexsort((columns, -values), axis=1)[:, :k]
    return Highest(np.take_along_axis(columns, order, axis=1), np.take_along_axis(values, order, axis=1))
