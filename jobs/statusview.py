"""What `corpuscope status` shows people: the facts of pipelines/status.py, those that there are, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jobs.output import ago, clock, count
from pipelines.status import Status
from pipelines.words import human


def status_facts(found: Status) -> Iterator[tuple[str, str]]:
    """(name, words) pairs, in the order in which they are shown."""
    yield "index", found.index
    yield "state", f"{found.state} ({found.scan})" if found.scan else found.state
    if found.scan and found.heartbeat is not None:
        yield "heartbeat", f"{ago(found.heartbeat)} ago"
    yield "runs", f"{found.runs:,}"
    yield "SAEs", f"{found.saes:,}"
    yield (
        "units",
        f"{found.committed:,} of {found.units:,} committed, {found.running:,} running, "
        f"{found.pending - found.running:,} waiting, {found.failed:,} failed",
    )
    if found.scan:
        yield "workers", f"{found.workers:,}"
    if found.progress is not None:
        yield (
            "progress",
            f"{found.progress:.0%}: {found.progress_documents:,} documents, {found.progress_tokens:,} "
            f"tokens, {found.tokens_per_second or 0:,.0f} tokens/s, {clock(found.seconds_left)} left",
        )
    yield "documents", f"{found.documents:,} indexed, {found.quarantined:,} quarantined"
    yield "tokens", f"{found.tokens:,} counted"
    yield "size", human(found.bytes)
    if found.devices:
        yield "devices" if len(found.devices) > 1 else "device", ", ".join(found.devices)
    yield "last commit", "none yet" if found.last_commit is None else f"{ago(found.last_commit)} ago"
    if found.last_run is not None:
        yield f"run {found.last_run['run']}", _run(found.last_run)
    if found.failures:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(found.failures.items()))
        yield "attempts failed", f"{kinds}; the newest: {found.error}"
    for error in found.errors:
        yield "failed", error
    yield "next", found.next


def _run(run: dict[str, Any]) -> str:
    """A run's summary in a line."""
    parts = [
        f"{count(run['documents'], 'document')}, {count(run['tokens'], 'token')} in {ago(run['seconds'])}",
        f"{run['worker_hours']:.3g} worker-hours",
    ]
    if run["attempts"] > 1 or run["unaccounted"]:
        silent = f" and {run['unaccounted']} without a summary" if run["unaccounted"] else ""
        parts[0] += f" (of {count(run['attempts'], 'attempt')}{silent})"
    if run["idle_share"] is not None:
        parts.append(f"devices idle {run['idle_share']:.0%}")
    if run["cost"] is not None:
        parts.append(f"cost {run['cost']:,.2f}")
    return f"{', '.join(parts)}; ended with {run['exit_code']} ({run['reason']})"
