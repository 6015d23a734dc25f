"""What `corpuscope plan` says: the plan and the estimate, as one record and as facts for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jobs.output import count
from pipelines.contents import Registered, resolve
from pipelines.estimate import RATES, Estimate, estimate
from pipelines.ledger import Ledger
from pipelines.planning import (
    Planned,
    Prepared,
    check_identity,
    identity,
    local_device,
    plan_groups,
    plan_units,
    prepare,
)
from pipelines.spec import ScanSpec
from pipelines.storage import Store
from pipelines.words import human


@dataclass(frozen=True)
class PlanView:
    """A scan before it is run."""

    prepared: Prepared
    planned: Planned
    found: Estimate
    groups: int  # of SAEs that are scanned together, each with a model pass of its own
    exists: bool  # the index
    committed: int  # units


def look(spec: ScanSpec, text: str) -> PlanView:
    """Plan the scan of `spec`. Writes nothing, runs no model; raises InputError as a scan would."""
    prepared = prepare(spec, local_device() if spec.model.device == "auto" else spec.model.device)
    ledger = Ledger(Store(spec.index))
    have = ledger.identity()
    planned, metadata = plan_units(prepared, ledger, text, allow_removal=True)
    groups = have["groups"] if have else plan_groups(prepared)
    if have is not None:
        check_identity(spec.index, have, identity(prepared, metadata, groups))
    done = (
        0
        if have is None
        else len(resolve(ledger.store, Registered(have, planned.plans, planned.units)).shown)
    )
    found = estimate(prepared, planned, groups)
    return PlanView(prepared, planned, found, len(groups), have is not None, done)


def record(view: PlanView) -> dict[str, Any]:
    """One flat object; sizes in bytes, `bytes_*` one for each table of the index."""
    found = view.found
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
        "worker_memory": found.worker_memory,
        **{f"bytes_{table}": size for table, size in found.tables.items()},
        "index_bytes": found.index_bytes,
        "max_index_bytes": view.prepared.spec.max_index_bytes,
        "bottleneck": _bottleneck(view),
        "flops_per_token_model": _model_flops(view),
        "flops_per_token_saes": found.encode_flops,
        **{f"hours_{name.split()[0].lower()}": _hours(view, rate) for name, rate in RATES.items()},
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
        ("memory", f"{human(found.worker_memory)} per worker, estimated"),
        (
            "index size",
            f"{human(found.index_bytes)}, estimated; max_index_bytes is {human(spec.max_index_bytes)}",
        ),
    ]
    rows += [(f"  {table}", human(size)) for table, size in found.tables.items()]
    rows.append(
        (
            "bottleneck",
            f"{_bottleneck(view)} (a token takes {_flops(_model_flops(view))} in the model, "
            f"{_flops(found.encode_flops)} in the SAEs)",
        )
    )
    for name, rate in RATES.items():
        unit = "hours" if name == "cpu" else "GPU-hours"
        words = "one CPU" if name == "cpu" else f"one {name}"
        rows.append((unit, f"{_small(_hours(view, rate))} on {words} (assumes {rate / 1e12:.3g} TFLOP/s)"))
    return rows


def _passes(groups: int) -> str:
    return (
        "all in one model pass"
        if groups == 1
        else f"in {groups} model passes (they do not fit memory at once)"
    )


def _model_flops(view: PlanView) -> float:
    return view.found.forward_flops * view.groups


def _hours(view: PlanView, rate: float) -> float:
    return view.found.tokens * (_model_flops(view) + view.found.encode_flops) / rate / 3600


def _bottleneck(view: PlanView) -> str:
    return "SAE encoding" if view.found.encode_flops > _model_flops(view) else "the model"


def _flops(number: float) -> str:
    return f"{number / 1e9:.3g} GFLOP" if number >= 1e9 else f"{number / 1e6:.3g} MFLOP"


def _small(hours: float) -> str:
    return "under 0.001" if hours < 0.001 else f"{hours:,.3g}"
