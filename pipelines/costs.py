"""What a scan takes: seconds of every stage, wall time and hours for so many workers, memory of one.

Invariant: seconds of a token are a stated model's, from counts of operations and rows, times one factor for
all of it, which a measured run of the same model on the same device gives; without one the factor is 1 and
the result says that it is assumed. `--tokens-per-second` replaces the model. Nothing here reads an index.

Stages of a worker on a CPU follow each other. Beside a GPU the host sums up rows while the GPU encodes the
next SAE, and writes all along: reading + model + the longer of encoding and summaries, or writing if longer.
Measured (2 cores of a Xeon with AMX, SmolLM2's demo, 2026-11-23): 50,402 tokens took 9.4 s in the model, 2.2
thread seconds in encoders, 0.5 in summaries and 1.3 in writing 12.6 M rows; the constants below are from it.
No GPU has been measured: theirs are shares of the peaks in NVIDIA's data sheets.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from pipelines.compaction import FAN
from pipelines.estimate import Estimate
from pipelines.measured import Measured
from pipelines.planning import Prepared, sae_bytes
from pipelines.tables import SaeShape
from pipelines.unit import BATCH_TOKENS, CHUNK_TOKENS, HOST_THREADS, SEGMENT_ROWS, device_name
from pipelines.words import count
from sae_runtime.device import device_model
from sae_runtime.errors import InputError
from sae_runtime.model import ModelSource, model_size, text_config
from sae_runtime.sites import Site

STAGES = ("reading", "model", "encoding", "summaries", "writing")
# Peak FLOP/s of dense bfloat16 products and bytes of memory, by NVIDIA's data sheets.
GPUS = {
    "B200": (2250e12, 180e9),
    "H200": (989e12, 141e9),
    "H100": (989e12, 80e9),
    "A100": (312e12, 80e9),
    "L40S": (362e12, 48e9),
    "L4": (121e12, 24e9),
}
DEFAULT_GPU = "H200"
GPU_SHARE = 0.4  # of the peak is sustained
GPU_PRODUCTS = 2  # float16 products in place of one float32 one (sae_runtime/triton_encode.py)
SLOWER_FLOAT32 = 16  # times, on a GPU's ordinary cores
# FLOP/s of a thread: 10 % of the 5 TFLOP/s of a core's AMX, 40 % of 160 GFLOP/s of two AVX-512 units.
AMX, AVX = 500e9, 64e9
TEXT = 3.5e6  # bytes of text that a thread tokenises in a second
ENCODED, SUMMED, WRITTEN = 60e-9, 35e-9, 100e-9  # thread seconds of a row
WRITERS = 2  # threads beside a GPU
UNIT = 0.05  # seconds of a unit beside its tokens: files, commit
STARTUP = 20.0  # Ray, model, SAEs, loops
LOAD = 1e9  # bytes of SAEs that a worker loads in a second
MERGED = 83e-9  # seconds of a row merged, on one core
BASE = {"cpu": 900e6, "cuda": 3e9}  # bytes of a process with its libraries
HELD_ROW = 21  # bytes of a row until it is written, copies included
CONTEXT = 1e9  # bytes of a GPU that its libraries take
_LEAST_FIT = 6  # attempts from which seconds are split into those of a unit and those of its tokens


@dataclass(frozen=True)
class Device:
    """What a worker computes on."""

    name: str
    kind: str  # cpu | cuda
    products: float  # FLOP/s sustained in products of bfloat16
    plain: float  # in products of float32
    threads: int  # of the host
    memory: float | None  # bytes of the GPU's, where it has one
    words: str  # what is assumed

    @property
    def is_gpu(self) -> bool:
        return self.kind == "cuda"


@dataclass(frozen=True)
class Load:
    """What a worker does with a token for one SAE group."""

    forward: float  # FLOP in the model
    saes: tuple[SaeShape, ...]
    text: float  # bytes of text

    @property
    def encode(self) -> float:
        """FLOP in the encoders."""
        return sum(2.0 * sae.d_in * sae.width for sae in self.saes)


@dataclass(frozen=True)
class Cost:
    """Time of what is still to be scanned. Seconds, unless a name says otherwise."""

    device: str
    workers: int
    source: str  # measured | given | assumed: where the speed is from
    stages: dict[str, float]  # shares of a worker's time, by the model; they overlap beside a GPU
    tokens_per_second: float  # counted tokens of one worker, all SAE groups done; 0 of no tokens
    busy: float  # of all workers together
    startup: float
    work: float  # from the first unit's start to the last one's end
    tail: float  # of it while workers run out of units
    compaction: float  # after the last unit
    assumptions: tuple[str, ...]

    @property
    def wall(self) -> float:
        return self.startup + self.work + self.compaction

    @property
    def worker_hours(self) -> float:
        """Hours for which workers are held."""
        return self.workers * self.wall / 3600

    @property
    def bottleneck(self) -> str:
        return max(self.stages, key=lambda stage: self.stages[stage])


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one worker."""

    host: dict[str, float]  # by what it is for
    device: dict[str, float]  # the same; empty without a GPU


def kind_of(name: str) -> str:
    """`cpu` or `cuda`, of a device's name. InputError for one that is not known."""
    if name.lower() == "cpu":
        return "cpu"
    _known(name)
    return "cuda"


def device_of(name: str | None, prepared: Prepared) -> Device:
    """The device of this name (one of GPUS, or `cpu`); of None what the plan is for.

    InputError for one that is not known.
    """
    if prepared.device == "cpu" and (name is None or name.lower() == "cpu"):
        return _cpu(prepared.spec.model.threads)
    here = device_name(prepared.device)
    known = _known(name or (DEFAULT_GPU if here == "cuda" else here))  # a spec may ask for a GPU elsewhere
    peak, memory = GPUS[known]
    rate = GPU_SHARE * peak
    words = f"{GPU_SHARE:.0%} of an {known}'s {peak / 1e12:,.0f} TFLOP/s in bfloat16"
    return Device(known, "cuda", rate, rate / SLOWER_FLOAT32, HOST_THREADS, memory, words)


def _known(name: str) -> str:
    """Which of GPUS a name is of, such as torch's own."""
    words = name.lower().replace("-", " ").split()
    found = next((gpu for gpu in GPUS if gpu.lower() in words), None)
    if found is None:
        raise InputError(
            f"--device {name}: not known; give the nearest of cpu, {', '.join(GPUS)}, and "
            "--tokens-per-second where it is known"
        )
    return found


def _cpu(threads: int) -> Device:
    info = Path("/proc/cpuinfo")
    amx = info.exists() and "amx_bf16" in info.read_text()
    rate = AMX if amx else AVX
    kind = "with AMX" if amx else "without AMX"
    words = f"{rate / 1e9:,.0f} GFLOP/s in bfloat16 a thread, {count(threads, 'thread')} {kind}"
    return Device("cpu", "cpu", rate * threads, AVX * threads, threads, None, words)


def loads(prepared: Prepared, groups: Sequence[Sequence[str]], found: Estimate) -> list[Load]:
    """What each SAE group asks of a worker for a token that is run."""
    by_id = {sae.id: sae for sae in prepared.saes}
    return [
        Load(
            _forward(prepared, max(by_id[sae].site.layer for sae in group)),
            tuple(found.shapes[sae] for sae in group),
            found.bytes_per_token,
        )
        for group in groups
    ]


def stages(load: Load, device: Device, dtype: str) -> dict[str, float]:
    """Seconds of each stage for a token that is run, by the model."""
    rows = sum(sae.l0 for sae in load.saes)
    kept = sum(sae.l0 * sae.tokens for sae in load.saes)
    products = GPU_PRODUCTS if device.is_gpu else 1
    return {
        "reading": load.text / TEXT,
        "model": load.forward / (device.plain if dtype == "float32" else device.products),
        "encoding": products * load.encode / device.products
        + (0.0 if device.is_gpu else rows * ENCODED / device.threads),
        "summaries": rows * SUMMED / device.threads,
        "writing": kept * WRITTEN / (WRITERS if device.is_gpu else device.threads),
    }


def together(each: dict[str, float], device: Device) -> float:
    """Seconds of a worker for stages that take so long each."""
    if not device.is_gpu:
        return sum(each.values())
    ahead = each["reading"] + each["model"] + max(each["encoding"], each["summaries"])
    return max(ahead, each["writing"])


def cost(
    prepared: Prepared,
    groups: Sequence[Sequence[str]],
    found: Estimate,
    todo: Sequence[bool],
    device: Device,
    workers: int,
    constants: Measured | None = None,
    rate: float | None = None,
) -> Cost:
    """Time of scanning the plan's units that are in `todo`, in the plan's order.

    `constants` count where they are of the same model on the same device; `rate` (counted tokens per second
    of one worker) before them.
    """
    dtype = prepared.spec.model.dtype
    each = [stages(load, device, dtype) for load in loads(prepared, groups, found)]
    modelled = np.array([together(stage, device) for stage in each])
    fixed, factor, source, said = UNIT, 1.0, "assumed", []
    if rate is not None:
        run = found.tokens_run / found.tokens if found.tokens else 1.0
        factor, fixed, source = 1 / (rate * run * float(modelled.sum())), 0.0, "given"
        said.append(f"speed: {rate:,.0f} counted tokens per second and worker, as given")
    elif constants is not None and _comparable(prepared, device, constants):
        fixed, factor = _fitted(prepared, device, constants, found.bytes_per_token)
        source = "measured"
        said.append(
            f"speed: run {constants.run} of {constants.index}, {constants.units:,} units of "
            f"{constants.tokens:,} tokens on {constants.device}; {factor:.2f} times what the model says"
        )
    else:
        said.append(f"speed: assumed, {device.words}; {_rows_words(device)}")
        if constants is not None:
            said.append(f"speed of {constants.index}: not used, it is another model or device")
    tokens = found.unit_tokens[np.array(todo, bool)]
    whole = sum(float((fixed + found.unit_tokens * factor * of_token).sum()) for of_token in modelled)
    seconds = [fixed + tokens * factor * of_token for of_token in modelled]
    busy = float(sum(part.sum() for part in seconds))
    workers = max(1, min(workers, len(tokens) * len(groups)))
    size = {sae.id: sae_bytes(sae, device.kind) for sae in prepared.saes}
    reload = [sum(size[sae] for sae in group) / LOAD for group in groups]
    work = makespan(seconds, workers, reload)
    if len(groups) > 1:
        said.append(f"SAE groups: loaded one after the other at {LOAD / 1e9:g} GB/s")
    if constants is not None and source == "measured":
        startup = constants.startup
    else:
        startup = STARTUP
        said.append(f"start: {STARTUP:g} s assumed for Ray, model and SAEs")
    merging = _merging(found, len(found.unit_tokens), work) if len(tokens) else 0.0
    if merging:
        said.append(f"compaction: {1 / MERGED / 1e6:.0f} M rows a second on one core, beside the scan")
    total = {stage: sum(part[stage] for part in each) for stage in STAGES}
    return Cost(
        device=device.name,
        workers=workers,
        source=source,
        stages={stage: value / sum(total.values()) for stage, value in total.items()},
        tokens_per_second=found.tokens / whole if whole else 0.0,
        busy=busy,
        startup=startup if len(tokens) else 0.0,
        work=work,
        tail=max(0.0, work - busy / workers),
        compaction=merging,
        assumptions=tuple(said),
    )


def makespan(seconds: Sequence[np.ndarray], workers: int, reload: Sequence[float]) -> float:
    """When the last worker is done with items taken in order, a group after the other.

    `seconds` of each group's items; `reload[g]` more when a worker that has done another group begins g.
    """
    free = [(0.0, number) for number in range(workers)]  # when each is, ascending: a heap
    group_of = [0] * workers
    for group, items in enumerate(seconds):
        for item in items.tolist():
            at, number = free[0]
            at += item + (reload[group] if group_of[number] != group else 0.0)
            group_of[number] = group
            heapq.heapreplace(free, (at, number))
    return max(at for at, _ in free)


def memory(prepared: Prepared, groups: Sequence[Sequence[str]], found: Estimate, device: Device) -> Memory:
    """Peak memory of one worker, by what it is for."""
    by_id = {sae.id: sae for sae in prepared.saes}
    sites = {sae.site: sae.d_in for sae in prepared.saes}
    size = 4 if prepared.spec.model.dtype == "float32" else 2
    parameters, _ = model_size(prepared.source, list(sites))
    sizes = {sae.id: sae_bytes(sae, device.kind) for sae in prepared.saes}
    largest = max(groups, key=lambda group: sum(sizes[sae] for sae in group))
    encoders = sum(sizes[sae] for sae in largest)
    summaries = sum(2400 * by_id[sae].width for sae in largest)
    tokens = min(CHUNK_TOKENS[device.kind], max(found.unit_tokens.tolist(), default=0))
    rows = sum(found.unit_rows.get(table, 0.0) for table in ("activations", "document_features"))
    config = text_config(prepared.source)
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    batch = min(BATCH_TOKENS[device.kind], tokens) * (8 * hidden + 3 * inner) * size
    activations = {
        "model": float(parameters * size),
        "activations": float(tokens * sum(sites.values()) * size)
        + batch * (1 if device.is_gpu else device.threads),
    }
    host = {"process": BASE[device.kind], "rows": min(SEGMENT_ROWS, rows) * HELD_ROW}
    if not device.is_gpu:
        return Memory(host | activations | {"SAEs": float(encoders)}, {})
    return Memory(
        host | {"summaries": float(summaries)},
        {"libraries": CONTEXT, **activations, "SAEs": float(encoders - summaries)},
    )


def _forward(prepared: Prepared, layer: int) -> float:
    """FLOP of a token in the model cut after `layer`: two a weight, and attention over half a context."""
    used = _used(prepared.source, layer)
    config = text_config(prepared.source)
    heads = getattr(config, "num_attention_heads", 1)
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 2.0 * used + 4.0 * width * (prepared.rule.length / 2) * (layer + 1)


@lru_cache
def _used(source: ModelSource, layer: int) -> float:
    """Parameters of the model's layers up to `layer` that a token uses."""
    return model_size(source, [Site(layer, "resid_post")])[1]


def _comparable(prepared: Prepared, device: Device, constants: Measured) -> bool:
    """Whether the seconds of a measured run say something of this scan's."""
    model = prepared.spec.model
    same = constants.model == (prepared.source.fingerprint, model.dtype, model.attention)
    if not device.is_gpu:
        return same and constants.device == device_model("cpu")
    return same and device.name.lower() in constants.device.lower().replace("-", " ").split()


def _fitted(prepared: Prepared, device: Device, constants: Measured, text: float) -> tuple[float, float]:
    """(seconds of a unit beside its tokens, factor on the model's seconds) of a measured run.

    Medians, since the first unit of a process may have compiled loops, and machines are shared.
    """
    there = device if constants.threads is None or device.is_gpu else _cpu(constants.threads)
    groups = [
        Load(_forward(prepared, max(sae.layer for sae in group)), tuple(sae.shape for sae in group), text)
        for group in constants.groups
    ]
    of_token = [together(stages(load, there, prepared.spec.model.dtype), there) for load in groups]
    x = np.array([attempt.tokens * of_token[attempt.group] for attempt in constants.attempts])
    y = np.array([attempt.seconds for attempt in constants.attempts])
    x, y = x[x > 0], y[x > 0]
    if len(x) >= _LEAST_FIT and x.max() >= 2 * x.min():
        i, j = np.triu_indices(len(x), 1)
        apart = np.abs(x[i] - x[j]) > 0.1 * x.max()
        slope = float(np.median((y[i] - y[j])[apart] / (x[i] - x[j])[apart])) if apart.any() else 0.0
        fixed = float(np.median(y - slope * x))
        if slope > 0 and fixed >= 0:
            return fixed, slope
    fixed = min(UNIT, float(np.median(y)) / 2)
    if len(x) < _LEAST_FIT:
        return fixed, float((y - fixed).sum() / x.sum())
    return fixed, _median((y - fixed) / x, x)


def _median(values: np.ndarray, weights: np.ndarray) -> float:
    """The weighted median."""
    order = np.argsort(values)
    sums = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(sums, sums[-1] / 2)])


def _merging(found: Estimate, units: int, work: float) -> float:
    """Seconds of compaction after the last unit: what closes with it, and what it was behind."""
    rows = found.rows["activations"] + found.rows["document_features"]
    level, last, total = 1, 0.0, 0.0
    while FAN**level <= units:
        total += rows * MERGED
        if units % FAN**level == 0:
            last += rows * FAN**level / units * MERGED
        level += 1
    return max(last, total - work)


def _rows_words(device: Device) -> str:
    rows = f"{SUMMED * 1e9:.0f} ns a row over {count(device.threads, 'thread')}"
    writers = WRITERS if device.is_gpu else device.threads
    return f"{rows} to sum it up, {WRITTEN * 1e9:.0f} ns over {writers} to write it"


def local_workers(device: str, threads: int, cores: int) -> int:
    """How many workers a scan starts on this machine by itself."""
    return max(1, torch.cuda.device_count()) if device == "cuda" else max(1, cores // threads)
