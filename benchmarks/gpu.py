"""What a scan costs on this device with Gemma 2 2B's shapes, in one command and without a network.

Everything is random and made on the spot: a Gemma 2 of the 2B's configuration (in bfloat16), 78 JumpReLU
SAEs of 16,384 features (26 layers x resid_post, mlp_out, attn_z) whose thresholds are quantiles of their
own pre-activations, so that between 60 and 140 features are active a token, and a corpus of random words.
Needs neither Ray nor DuckDB; some 6 GB of disk for the model and 3 bytes a row for the index, and on the
device some 70 GB (the SAEs alone 36).

Prints one JSON object. Rates are in tokens that the model runs, but for the scan's, which are counted
ones. `encode_share` is the encoders' useful products (2 x d x width a token) over what the device does in
one large bfloat16 product; the split of float32 weights into parts makes encoders do `products` times as
many. Encoding is measured with its rows on the host, as the scan wants them.

    python benchmarks/gpu.py [--tokens 131072] [--repeat 3] [--device cuda] [--attention sdpa] [--small]
"""

from __future__ import annotations

import json
import math
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import torch

from pipelines.admission import Admission
from pipelines.contexts import context_rule
from pipelines.executors.base import Committed, Event, Failed
from pipelines.executors.inline import InlineExecutor
from pipelines.ledger import Commit, Ledger
from pipelines.planning import Prepared, local_device, plan_units
from pipelines.spec import ScanSpec
from pipelines.storage import Store
from pipelines.unit import BATCH_TOKENS, Setup, Work
from sae_runtime import suites
from sae_runtime.encode import Encoder
from sae_runtime.model import LanguageModel, load_tokenizer, locate, site_paths, text_config
from sae_runtime.packing import PACKED, check_attention, positions
from sae_runtime.sae import SaeInfo, SaeWeights
from sae_runtime.sites import Site

SITES = ("resid_post", "mlp_out", "attn_z")
CALIBRATION = 4096  # tokens that thresholds are quantiles of
_WORDS = 4096
_SPREAD = 1.0  # of the logarithm of a feature's density


@dataclass(frozen=True)
class Shape:
    """What is built."""

    model: dict[str, Any]
    width: int
    l0: tuple[float, float]
    context: int
    product: int  # size of the square product that the device's rate is taken from


GEMMA_2_2B = Shape(
    model={
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "layer_types": ["sliding_attention", "full_attention"] * 13,
    },
    width=16384,
    l0=(60, 140),
    context=1024,
    product=8192,
)
SMALL = Shape(
    model=GEMMA_2_2B.model
    | {
        "vocab_size": 5000,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "max_position_embeddings": 512,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    width=512,
    l0=(4, 12),
    context=64,
    product=512,
)


def make_model(folder: Path, shape: Shape, device: torch.device) -> None:
    """A random Gemma 2 and a tokenizer of random words, where transformers finds them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2} | {f"w{i}": 3 + i for i in range(_WORDS)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    config = Gemma2Config(
        **shape.model, pad_token_id=0, eos_token_id=1, bos_token_id=2, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = Gemma2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<pad>"
    ).save_pretrained(folder)


def write_corpus(file: Path, tokens: int, context: int) -> None:
    """Documents of random words, each of a length that fills one or two contexts."""
    rng = np.random.default_rng(0)
    left = tokens
    with file.open("w", encoding="utf-8") as out:
        while left > 0:
            n = min(left, int(rng.integers(context // 2, 2 * context)))
            words = " ".join(f"w{i}" for i in rng.zipf(1.3, n) % _WORDS)
            out.write(json.dumps({"text": words}) + "\n")
            left -= n


class Saes:
    """The SAEs: thresholds are kept, matrices are made from their seeds whenever they are wanted."""

    def __init__(self, shape: Shape, model: LanguageModel, infos: tuple[SaeInfo, ...]) -> None:
        self.device = model.device
        self.seeds = {info.id: i for i, info in enumerate(infos)}
        self.biases: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        rng = np.random.default_rng(1)
        ids = random_ids(rng, CALIBRATION, shape.context)
        found = model.run(ids)
        for info, l0 in zip(infos, np.linspace(*shape.l0, len(infos)), strict=True):
            x = model.taps[info.site].finish(found[info.site].flatten(0, 1)).float()
            density = np.exp(_SPREAD * rng.normal(size=info.width))
            self.biases[info.id] = self._calibrated(x, self._matrix(info), density * l0 / density.sum())

    @staticmethod
    def _calibrated(
        x: torch.Tensor, W: torch.Tensor, density: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """b_enc that centres the pre-activations, and thresholds that let `density` of them through."""
        pre = W @ x.T
        b = -pre.mean(dim=1)
        ordered = (pre + b[:, None]).sort(dim=1, descending=True).values
        rank = torch.from_numpy(np.clip(np.round(density * len(x)), 1, len(x) - 1)).long().to(x.device)
        return b.cpu(), ordered.gather(1, rank[:, None])[:, 0].cpu()

    def _matrix(self, info: SaeInfo) -> torch.Tensor:
        """Decoder and, transposed, encoder: [width, d_in]."""
        generator = torch.Generator(self.device).manual_seed(self.seeds[info.id])
        size = info.width, info.d_in
        return torch.randn(size, generator=generator, device=self.device) / math.sqrt(info.d_in)

    def load(self, info: SaeInfo) -> SaeWeights:
        """What `suites.load` would have read from files."""
        W = self._matrix(info).cpu()
        b, threshold = self.biases[info.id]
        return SaeWeights("jumprelu", W.T, b, W, torch.zeros(info.d_in), threshold=threshold)


def sae_infos(shape: Shape) -> tuple[SaeInfo, ...]:
    """One SAE at each site of each layer."""
    model = shape.model
    widths = dict.fromkeys(SITES, model["hidden_size"])
    widths["attn_z"] = model["num_attention_heads"] * model["head_dim"]
    return tuple(
        SaeInfo(
            id=f"random-{kind}/layer_{layer}",
            suite=f"random-{kind}",
            path=f"layer_{layer}",
            format="gemma_scope",
            files=(f"random-{kind}/layer_{layer}",),
            site=Site(layer, kind),
            out=Site(layer, kind),
            architecture="jumprelu",
            d_in=widths[kind],
            width=shape.width,
            nominal_l0=sum(shape.l0) / 2,
            trained_on=None,
            convention="random",
        )
        for layer in range(model["num_hidden_layers"])
        for kind in SITES
    )


def random_ids(rng: np.random.Generator, tokens: int, context: int) -> torch.Tensor:
    """Token ids [contexts, context], BOS first."""
    ids = 3 + rng.zipf(1.3, (-(-tokens // context), context)) % _WORDS
    ids[:, 0] = 2
    return torch.from_numpy(ids.astype(np.int64))


def median(run: Callable[[], object], repeat: int, device: torch.device) -> float:
    """Seconds, after one round that compiles and warms up."""
    found = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def product_rate(size: int, repeat: int, device: torch.device) -> float:
    """FLOP per second of one square bfloat16 product with float32 sums."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / median(lambda: a @ b, repeat, device)


@torch.inference_mode()
def encoding(
    model: LanguageModel, encoders: list[tuple[SaeInfo, Encoder]], ids: torch.Tensor, repeat: int
) -> dict[str, float]:
    """Seconds of the model alone, of it with every SAE, and of the SAEs alone; rows.

    Of a model that packs, `ids` are the contexts of one row.
    """
    rows = 0
    inputs = [ids]
    if model.packs:
        at = positions([ids.shape[1]] * len(ids), ids.numel())
        inputs = [ids.reshape(1, -1), torch.from_numpy(at)[None]]

    def encode(found: dict[Site, torch.Tensor]) -> None:
        nonlocal rows
        rows = 0
        for info, encoder in encoders:
            x = model.taps[info.site].finish(found[info.site].flatten(0, 1))
            rows += encoder.encode(x).rows

    held = model.run(*inputs)
    return {
        "model": median(lambda: model.run(*inputs), repeat, model.device),
        "model_and_encode": median(lambda: encode(model.run(*inputs)), repeat, model.device),
        "encode": median(lambda: encode(held), repeat, model.device),
        "rows": rows,
    }


def prepare(
    folder: Path,
    corpus: str,
    device: str,
    attention: str,
    shape: Shape,
    infos: tuple[SaeInfo, ...],
    paths: dict[Site, str],
) -> Prepared:
    """What `planning.prepare` makes of a spec, for SAEs that are in no file."""
    spec = ScanSpec.model_validate(
        {
            "corpus": {"uri": str(folder / f"{corpus}.jsonl")},
            "model": {"uri": str(folder / "model"), "device": device, "attention": attention},
            "saes": {"uri": "made in memory"},
            "context": {"length": shape.context},
            "index": str(folder / f"index of {corpus}"),
        }
    )
    source = locate(spec.model.uri)
    return Prepared(
        spec=spec,
        source=source,
        device=device,
        rule=context_rule(spec.context, load_tokenizer(source)),
        saes=infos,
        fingerprints={info.id: "random" for info in infos},
        sites=paths,
        duplicates={},
        warnings=(),
        templates=(None,),
    )


def scan(prepared: Prepared, saes: Saes) -> tuple[float, list[Commit]]:
    """Seconds of the inline executor over the whole corpus, and its commits; loading is not in it."""
    spec = prepared.spec
    planned, metadata = plan_units(prepared, Ledger(Store(spec.index)), "", allow_removal=False)
    groups = (prepared.saes,)
    setup = Setup(spec, prepared.source, prepared.device, groups, metadata, spec.index, prepared.templates)
    commits: list[Commit] = []

    def watch(event: Event) -> None:
        if isinstance(event, Failed):
            raise click.ClickException(event.detail or event.error)
        if isinstance(event, Committed):
            commits.append(event.commit)

    executor = InlineExecutor(
        setup, Admission(Store(spec.index), 1, mixed=False, notice=lambda line: click.echo(line, err=True))
    )
    work = [Work(unit, 0, planned.files[unit.corpus, unit.path], 1) for unit in planned.units]
    try:
        with mock.patch.object(suites, "load", saes.load):
            executor.scanner.load(0)
        began = time.perf_counter()
        executor.run(work, watch)
    finally:
        executor.close()
    return time.perf_counter() - began, commits


def measure(
    shape: Shape, folder: Path, device: str, tokens: int, repeat: int, attention: str = "sdpa"
) -> dict[str, Any]:
    """Build everything in `folder` and measure."""
    at = torch.device(device)
    rate = product_rate(shape.product, 9, at)
    make_model(folder / "model", shape, at)
    write_corpus(folder / "corpus.jsonl", tokens, shape.context)
    infos = sae_infos(shape)
    sites = [info.site for info in infos]
    source = locate(str(folder / "model"))
    check_attention(text_config(source), attention, "bfloat16", device, shape.context)
    model = LanguageModel(source, sites, "bfloat16", device, attention=attention)
    saes = Saes(shape, model, infos)
    batch = min(tokens, BATCH_TOKENS[at.type])
    ids = random_ids(np.random.default_rng(2), batch, shape.context)
    encoders = [(info, Encoder(saes.load(info), at)) for info in infos]
    seconds = encoding(model, encoders, ids, repeat)
    kernels = encoders[0][1].kernels
    del model, encoders
    write_corpus(folder / "first.jsonl", min(tokens, 4 * shape.context), shape.context)
    paths = {site: path for site, (path, _) in site_paths(source, sites).items()}
    for corpus in ("first", "corpus"):  # the first compiles and warms up
        prepared = prepare(folder, corpus, device, attention, shape, infos, paths)
        scan_seconds, commits = scan(prepared, saes)
    files = {kind: [c.files[kind] for c in commits if kind in c.files] for kind in commits[0].files}
    rows = sum(file.rows for file in files["activations"])
    counted = sum(commit.tokens for commit in commits)
    flop = sum(2 * info.d_in * info.width for info in infos) * ids.numel()
    return {
        "device": torch.cuda.get_device_name()
        if at.type == "cuda"
        else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "attention": attention,
        "encoder": "torch" if kernels is None else "triton",
        "products": None if kernels is None else len(kernels.weight.parts),
        "layers": shape.model["num_hidden_layers"],
        "saes": len(infos),
        "features": sum(info.width for info in infos),
        "l0": rows / counted / len(infos),
        "device_product_tflops": rate / 1e12,
        "model_tokens_per_second": ids.numel() / seconds["model"],
        "model_and_encode_tokens_per_second": ids.numel() / seconds["model_and_encode"],
        "encode_tflops": flop / seconds["encode"] / 1e12,
        "encode_share": flop / seconds["encode"] / rate,
        "encode_rows_per_second": seconds["rows"] / seconds["encode"],
        "scan_tokens": counted,
        "scan_tokens_per_second": counted / scan_seconds,
        "scan_rows": rows,
        "scan_rows_per_second": rows / scan_seconds,
        "scan_bytes_per_row": sum(file.bytes for kind in files.values() for file in kind) / rows,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if at.type == "cuda" else None,
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


@click.command()
@click.option("--tokens", type=int, help="Of the corpus that is scanned.  [default: 131,072; small: 2,048]")
@click.option("--repeat", default=3, show_default=True)
@click.option("--device", default=local_device, help="cuda or cpu.  [default: cuda where there is one]")
@click.option(
    "--attention",
    type=click.Choice(["sdpa", *PACKED]),
    default="sdpa",
    show_default=True,
    help="sdpa pads contexts; the others pack them.",
)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to build; a temporary one by default.")
@click.option("--small", is_flag=True, help="A tiny model and tiny SAEs: a minute on a CPU.")
def main(
    tokens: int | None, repeat: int, device: str, attention: str, folder: Path | None, small: bool
) -> None:
    """Print the measurements as JSON."""
    shape = SMALL if small else GEMMA_2_2B
    tokens = tokens or (2048 if small else 131072)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        found = measure(shape, Path(temporary), device, tokens, repeat, attention)
        click.echo(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
