"""What `corpuscope plan` says: the plan, sizes, time, memory and cost, as one record and as facts for people.

Invariant: every number that is not measured is named among the assumptions, which come last.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

from jobs.output import count
from pipelines.contents import Registered, resolve
from pipelines.costs import (
    DEFAULT_GPU,
    STAGES,
    Cost,
    Device,
    Memory,
    cost,
    device_of,
    kind_of,
    loads,
    local_workers,
    memory,
)
from pipelines.estimate import Estimate, estimate
from pipelines.ledger import Ledger
from pipelines.measured import Measured, measured
from pipelines.planning import (
    Planned,
    Prepared,
    check_identity,
    groups_within,
    identity,
    local_device,
    plan_groups,
    plan_units,
    prepare,
)
from pipelines.spec import ScanSpec
from pipelines.storage import Store
from pipelines.words import human
from sae_runtime.errors import InputError

_STAGES = {
    "reading": "reading and tokenising",
    "model": "the model",
    "encoding": "SAE encoding",
    "summaries": "summaries",
    "writing": "writing",
}


@dataclass(frozen=True)
class Asked:
    """What the command line says beside the spec."""

    workers: int | None = None
    device: str | None = None
    source: str | None = None  # an index whose last run gives the constants
    rate: float | None = None  # counted tokens per second of a worker
    l0: float | None = None
    price: float | None = None  # of one worker for an hour


@dataclass(frozen=True)
class PlanView:
    """A scan before it is run."""

    prepared: Prepared
    planned: Planned
    found: Estimate
    cost: Cost
    gpu: Cost  # on one GPU: `cost` itself where that is on GPUs
    memory: Memory
    constants: Measured | None
    device: Device
    workers: int  # asked for
    price: float | None
    groups: int  # of SAEs that are scanned together, each with a model pass of its own
    flops: tuple[float, float]  # of a token, in the model and in the SAEs
    exists: bool  # the index
    committed: int  # units


def look(spec: ScanSpec, text: str, asked: Asked | None = None) -> PlanView:
    """Plan the scan of `spec`. Writes nothing, runs no model; raises InputError as a scan would."""
    asked = asked or Asked()
    prepared = prepare(spec, _kind(spec, asked))
    device = device_of(asked.device, prepared)
    ledger = Ledger(Store(spec.index))
    have = ledger.identity()
    planned, metadata = plan_units(prepared, ledger, text, allow_removal=True)
    groups = have["groups"] if have else _groups(prepared, device, asked)
    if have is not None:
        check_identity(spec.index, have, identity(prepared, metadata, groups))
    shown = set()
    if have is not None:
        shown = set(resolve(ledger.store, Registered(have, planned.plans, planned.units)).shown.tolist())
    constants = _constants(ledger.store, planned, asked.source)
    found = estimate(prepared, planned, groups, constants, asked.l0)
    todo = [unit.ordinal not in shown for unit in planned.units]
    threads = spec.model.threads
    workers = asked.workers or (
        1 if asked.device and device.is_gpu else local_workers(prepared.device, threads, os.cpu_count() or 1)
    )
    priced = cost(prepared, groups, found, todo, device, workers, constants, asked.rate)
    gpu = priced
    if not device.is_gpu:
        gpu = cost(prepared, groups, found, todo, device_of(DEFAULT_GPU, prepared), 1)
    each = loads(prepared, groups, found)
    return PlanView(
        prepared=prepared,
        planned=planned,
        found=found,
        cost=priced,
        gpu=gpu,
        memory=memory(prepared, groups, found, device),
        constants=constants,
        device=device,
        workers=workers,
        price=asked.price,
        groups=len(groups),
        flops=(sum(load.forward for load in each), sum(load.encode for load in each)),
        exists=have is not None,
        committed=len(shown),
    )


def _kind(spec: ScanSpec, asked: Asked) -> str:
    """`cpu` or `cuda`."""
    own = spec.model.device
    if asked.device is None:
        return local_device() if own == "auto" else own
    kind = kind_of(asked.device)
    if own not in ("auto", kind):
        raise InputError(f"--device {asked.device}: the spec's model.device is {own}; make it auto")
    return kind


def _groups(prepared: Prepared, device: Device, asked: Asked) -> list[list[str]]:
    """As a scan will have them on that device: half of its memory is for SAEs."""
    if device.memory is not None and (asked.device is not None or local_device() == "cpu"):
        return groups_within(prepared, int(device.memory / 2))
    return plan_groups(prepared, asked.workers)


def _constants(store: Store, planned: Planned, source: str | None) -> Measured | None:
    if source is None:
        return measured(store, planned.plans)
    found = measured(Store(source))
    if found is None:
        raise InputError(f"--from {source}: no index here, or none of its units is committed")
    return found


def record(view: PlanView) -> dict[str, Any]:
    """One flat object; sizes in bytes, times in seconds unless named, shares of 1.

    `rows_*` and `bytes_*` are one for each table as units write it, `compacted_bytes_*` after `compact` and
    `gc`. Times are of what is still to be scanned, sizes of the whole index.
    """
    found, priced = view.found, view.cost
    return {
        "index": view.prepared.spec.index,
        "saes": len(view.prepared.saes),
        "sites": len(view.prepared.sites),
        "groups": view.groups,
        "files": len(view.planned.files),
        "documents": found.documents,
        "units": len(view.planned.units),
        "committed": view.committed,
        "text_bytes": found.text_bytes,
        "tokens": found.tokens,
        "tokens_run": found.tokens_run,
        **{f"rows_{table}": number for table, number in found.rows.items()},
        **{f"bytes_{table}": size for table, size in found.tables.items()},
        "index_bytes": found.index_bytes,
        **{f"compacted_bytes_{table}": size for table, size in found.compacted.items()},
        "compacted_bytes": found.compacted_bytes,
        "peak_bytes": found.peak_bytes,
        "max_index_bytes": view.prepared.spec.max_index_bytes,
        "device": priced.device,
        "workers": priced.workers,
        "speed": priced.source,
        "tokens_per_second": priced.tokens_per_second,
        "worker_seconds": priced.busy,
        "startup_seconds": priced.startup,
        "work_seconds": priced.work,
        "tail_seconds": priced.tail,
        "compaction_seconds": priced.compaction,
        "wall_seconds": priced.wall,
        "worker_hours": priced.worker_hours,
        "gpu": view.gpu.device,
        "gpu_hours": view.gpu.worker_hours,
        "cost": None if view.price is None else view.price * priced.worker_hours,
        "bottleneck": _STAGES[priced.bottleneck],
        **{f"share_{stage}": priced.stages[stage] for stage in STAGES},
        "flops_per_token_model": view.flops[0],
        "flops_per_token_saes": view.flops[1],
        "worker_memory": round(sum(view.memory.host.values())),
        "device_memory": round(sum(view.memory.device.values())),
        "measured_index": None if view.constants is None else view.constants.index,
        "measured_run": None if view.constants is None else view.constants.run,
        "assumptions": _assumptions(view),
    }


def facts(view: PlanView) -> list[tuple[str, str]]:
    """The same in words, for `print_facts`."""
    found, spec = view.found, view.prepared.spec
    rows = [
        ("index", f"{spec.index} ({'exists' if view.exists else 'new'})"),
        (
            "SAEs",
            f"{len(view.prepared.saes):,} at {count(len(view.prepared.sites), 'site')}, "
            f"{_passes(view.groups)}",
        ),
        (
            "corpus",
            f"{count(len(view.planned.files), 'file')}, {count(found.documents, 'document')}, "
            f"{human(found.text_bytes)} of text",
        ),
        ("tokens", f"about {found.tokens:,} ({found.bytes_per_token:.2f} bytes each, from a sample)"),
        ("units", f"{len(view.planned.units):,}, {view.committed:,} of them committed"),
        ("", ""),
        ("index size", f"{'rows':>15}{'as written':>13}{'compacted':>13}"),
    ]
    for table, size in found.compacted.items():
        number = f"{found.rows[table]:,}" if found.rows.get(table) else ""
        if size or found.tables.get(table):
            written = human(found.tables[table]) if table in found.tables else ""
            rows.append((f"  {table}", f"{number:>15}{written:>13}{human(size):>13}"))
    rows += [
        ("  together", f"{'':>15}{human(found.index_bytes):>13}{human(found.compacted_bytes):>13}"),
        (
            "  on disk at most",
            f"{human(found.peak_bytes)} while it is compacted; max_index_bytes is "
            f"{human(spec.max_index_bytes)}",
        ),
        ("", ""),
        *_time(view),
        ("", ""),
        *_memory(view.memory),
        ("", ""),
    ]
    said = _assumptions(view)
    rows += [("assumptions" if not i else "", words) for i, words in enumerate(said)]
    return rows


def _time(view: PlanView) -> list[tuple[str, str]]:
    priced, gpu = view.cost, view.gpu
    held = "GPU" if view.device.is_gpu else "worker"
    shares = ", ".join(
        f"{_STAGES[stage]} {share:.0%}"
        for stage, share in sorted(priced.stages.items(), key=lambda each: -each[1])
    )
    speed = f"{priced.tokens_per_second:,.0f} counted tokens per second and worker ({priced.source})"
    if not priced.wall:
        return [("speed", speed), ("time", "nothing is left to scan")]
    rows = [
        ("workers", f"{priced.workers:,} on {priced.device}{_fewer(view)}"),
        ("speed", speed),
        (
            "wall time",
            f"{_clock(priced.wall)}: start {_clock(priced.startup)}, scan {_clock(priced.work)} (its last "
            f"{_clock(priced.tail)} with idle workers), compaction after it {_clock(priced.compaction)}",
        ),
        (f"{held}-hours", f"{_small(priced.worker_hours)} held, {_small(priced.busy / 3600)} busy"),
    ]
    if view.price is not None:
        rows.append(("cost", f"{view.price * priced.worker_hours:,.2f} at {view.price:g} a {held}-hour"))
    if gpu is not priced:
        rows.append(("GPU-hours", f"{_small(gpu.worker_hours)} on one {gpu.device} instead (assumed)"))
    rows.append(
        (
            "bottleneck",
            f"{_STAGES[priced.bottleneck]} ({shares}; a token takes {_flops(view.flops[0])} in the model, "
            f"{_flops(view.flops[1])} in the SAEs)",
        )
    )
    return rows


def _fewer(view: PlanView) -> str:
    return (
        f" ({view.workers:,} asked for: there are no more units)" if view.workers > view.cost.workers else ""
    )


def _memory(found: Memory) -> list[tuple[str, str]]:
    rows = [("memory", f"{human(sum(found.host.values()))} per worker: {_parts(found.host)}")]
    if found.device:
        rows.append(("GPU memory", f"{human(sum(found.device.values()))}: {_parts(found.device)}"))
    return rows


def _parts(sizes: dict[str, float]) -> str:
    return ", ".join(f"{name} {human(size)}" for name, size in sizes.items())


def _assumptions(view: PlanView) -> list[str]:
    constants, found = view.constants, view.found
    said = []
    if constants is None:
        said.append("rows and bytes: assumed, as measured with the demo (pipelines/tables.py)")
    else:
        said.append(
            f"rows and bytes: by run {constants.run} of {constants.index}, {count(constants.units, 'unit')} "
            f"of {constants.tokens:,} tokens; other shapes by the laws of pipelines/tables.py"
        )
    known = Counter(found.l0_known.values())
    l0 = {how: [found.shapes[sae].l0 for sae, its in found.l0_known.items() if its == how] for how in known}
    said.append(
        "active features a token: "
        + ", ".join(f"{how} of {count(len(l0[how]), 'SAE')} (together {sum(l0[how]):,.0f})" for how in l0)
    )
    said += view.cost.assumptions
    said.append("shares of the stages: the model's, also where the speed is not")
    if view.gpu is not view.cost and view.cost.wall:
        said += [f"on {view.gpu.device}, {words}" for words in view.gpu.assumptions]
    if view.memory.device:
        said.append("memory: no GPU has been measured")
    return said


def _passes(groups: int) -> str:
    return (
        "all in one model pass"
        if groups == 1
        else f"in {groups} model passes (they do not fit memory at once)"
    )


def _flops(number: float) -> str:
    return f"{number / 1e9:.3g} GFLOP" if number >= 1e9 else f"{number / 1e6:.3g} MFLOP"


def _clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _small(hours: float) -> str:
    return "under 0.001" if 0 < hours < 0.001 else f"{hours:,.3g}"
