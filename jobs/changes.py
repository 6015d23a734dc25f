"""`corpuscope changes`: features that the newest run's documents brought, moved and lost; and its record.

Invariant: `runs/<run>/changes.json` holds what the command would print when the run ended, cut to the
strongest; it is told, not proved, and can be made again from the index at any time.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from jobs.output import count, format_option, message, opened, print_rows
from sae_runtime.errors import InputError

if TYPE_CHECKING:
    from pipelines.storage import Store
    from queries.changes import Changes

STRONGEST = 100  # of each kind of change, in the record


@click.command()
@click.argument("index")
@click.option("--run", metavar="N", type=click.IntRange(min=1), help="This run; by default the newest.")
@click.option(
    "--limit",
    default=20,
    show_default=True,
    type=click.IntRange(min=1),
    help="Features of a kind, at most.",
)
@click.option(
    "--min-documents",
    metavar="N",
    default=20,
    show_default=True,
    type=click.IntRange(min=1),
    help="Test features that fire in so many documents of the run and of earlier ones together.",
)
@format_option
def changes(index: str, run: int | None, limit: int, min_documents: int, format_: str) -> None:
    """Features that appeared, drifted or died in the documents of a run of INDEX, against all runs before.

    appeared: active in documents of the run and of no earlier one. drifted: active in both, in another share
    of documents of like lengths. died: active in earlier documents, in none of the run's, and often enough
    for that to be no chance. The last two are tested as `diff` tests, with q at most 0.05 over all tested
    features; effect is the log2 odds ratio of a document's firing, the run against the others.
    """
    from jobs.progress import Steps
    from queries import changes as changed

    con = opened(index)
    run = run or changed.newest(con)
    if run is None:
        raise InputError(f"{index}: the index has no documents yet")
    found = changed.changes(con, run, min_documents, Steps())
    rows = [row for change in changed.CHANGES for row in found.strongest(change, limit)]
    print_rows(rows, format_, changed.COLUMNS)
    for line in words(found):
        message(line)


def words(found: Changes) -> list[str]:
    """A summary for people, a line or two."""
    new = f"run {found.run}: {count(found.documents, 'document')} with tokens"
    if not found.earlier_documents:
        lines = [f"{new} and none before, so nothing has changed yet"]
    else:
        lines = [
            f"{new} against {found.earlier_documents:,} of earlier runs: "
            f"{count(found.total('appeared'), 'feature')} appeared, {found.total('drifted'):,} drifted, "
            f"{found.total('died'):,} died ({count(found.tested, 'feature')} active in at least "
            f"{found.min_documents:,} documents tested)"
        ]
    if found.not_kept:
        lines.append(
            f"note: of {count(len(found.not_kept), 'SAE')} no document rows were kept (`keep: none`), so "
            f"nothing is told of {'it' if len(found.not_kept) == 1 else 'them'}: {', '.join(found.not_kept)}"
        )
    return lines


def leave(store: Store, run: int) -> list[str]:
    """Write what a run changed beside its summary, unless that is there; what is to be told of it."""
    from pipelines.registry import dump
    from pipelines.summary import folder
    from queries import changes as changed
    from queries.connect import connect

    name = f"{folder(run)}/changes.json"
    if store.exists(name):
        return []
    try:
        found = changed.changes(connect(store.uri), run)
    except InputError as error:  # no rows to tell it from, or a run that only took documents away
        return [f"note: {error}"]
    store.write(name, dump(record(found)))
    return words(found)


def record(found: Changes) -> dict[str, Any]:
    """What is written of a run: counts by SAE, and the strongest features of each kind."""
    from queries.changes import CHANGES, Q

    return {
        "run": found.run,
        "documents": found.documents,
        "earlier_documents": found.earlier_documents,
        "q": Q,
        "min_documents": found.min_documents,
        "tested": found.tested,
        "not_kept": found.not_kept,
        "saes": found.counts,
        "strongest": {
            change: [_finite(row) for row in found.strongest(change, STRONGEST)] for change in CHANGES
        },
    }


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity, which the effect of what appeared or died is."""
    return {key: None if value in (math.inf, -math.inf) else value for key, value in row.items()}
