"""What `corpuscope plan` says: the plan and the estimate as rows of item, value, words and note."""

from __future__ import annotations

from typing import Any

import torch

from pipelines.estimate import RATES, Estimate, estimate, human
from pipelines.ledger import Ledger
from pipelines.planning import check_identity, identity, memory_budget, plan_groups, plan_units, prepare
from pipelines.spec import ScanSpec
from pipelines.storage import Store


def plan_rows(spec: ScanSpec, text: str) -> list[dict[str, Any]]:
    """Rows with keys item, value (plain), shown (for people) and note. Writes nothing, runs no model."""
    device = spec.model.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    prepared = prepare(spec, device)
    ledger = Ledger(Store(spec.index))
    have = ledger.identity()
    planned, metadata = plan_units(prepared, ledger, text, allow_removal=True)
    groups = have["groups"] if have else plan_groups(prepared.saes, memory_budget(1))
    if have is not None:
        check_identity(spec.index, have, identity(prepared, metadata, groups))
    commits = ledger.commits() if have else {}
    done = sum(all((u.unit, g) in commits for g in range(len(groups))) for u in planned.units)
    found = estimate(prepared, planned)
    rows = [
        _row("index", spec.index, spec.index, "exists" if have else "new"),
        _row("saes", len(prepared.saes), f"{len(prepared.saes):,}", f"{len(prepared.sites)} sites, {len(groups)} group(s)"),
        _row("files", len(planned.files), f"{len(planned.files):,}"),
        _row("documents", found.documents, f"{found.documents:,}"),
        _row("units", len(planned.units), f"{len(planned.units):,}", f"{done:,} committed"),
        _row("text_bytes", found.text_bytes, human(found.text_bytes), "bytes in"),
        _row("tokens", found.tokens, f"{found.tokens:,}", f"estimated, {found.bytes_per_token:.2f} bytes a token"),
        _row("worker_memory", found.worker_memory, human(found.worker_memory), "per worker, estimated"),
    ]
    for table, size in found.tables.items():
        rows.append(_row(f"bytes_{table}", size, human(size), "index, estimated from nominal L0"))
    rows.append(
        _row("index_bytes", found.index_bytes, human(found.index_bytes), f"limit {human(spec.max_index_bytes)}")
    )
    rows.append(_row("bottleneck", *_bottleneck(found, len(groups))))
    for name, rate in RATES.items():
        hours = _flops(found, len(groups)) / rate / 3600
        rows.append(_row(f"hours_{name.split()[0].lower()}", hours, f"{hours:.3g}", f"{name}, {rate / 1e12:.3g} TFLOP/s"))
    return rows


def _row(item: str, value: Any, shown: str, note: str = "") -> dict[str, Any]:
    return {"item": item, "value": value, "shown": shown, "note": note}


def _flops(found: Estimate, groups: int) -> float:
    return found.tokens * (found.forward_flops * groups + found.encode_flops)


def _bottleneck(found: Estimate, groups: int) -> tuple[str, str, str]:
    model, saes = found.forward_flops * groups, found.encode_flops
    name = "SAE encoding" if saes > model else "the model"
    return name, name, f"GFLOP a token: model {model / 1e9:.2f}, SAEs {saes / 1e9:.2f}"
