"""`corpuscope diff`: features that fire in one set of documents more than in another, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from jobs.output import count, format_option, message, opened, print_rows

if TYPE_CHECKING:
    from queries.diff import Difference


@click.command()
@click.argument("index")
@click.option("--a", "a", metavar="SQL", required=True, help="One set: a predicate over `documents`.")
@click.option("--b", "b", metavar="SQL", required=True, help="The other set.")
@click.option("--sae", metavar="SAE", help="This SAE's features only.")
@click.option(
    "--limit", default=20, show_default=True, type=click.IntRange(min=1), help="Features to show, at most."
)
@click.option(
    "--min-documents",
    metavar="N",
    default=20,
    show_default=True,
    type=click.IntRange(min=1),
    help="Test features that fire in so many documents (or groups) of both sets together.",
)
@click.option(
    "--cluster",
    metavar="COLUMN",
    help="Documents alike in this column of `documents` are one observation, not independent ones.",
)
@format_option
def diff(
    index: str,
    a: str,
    b: str,
    sae: str | None,
    limit: int,
    min_documents: int,
    cluster: str | None,
    format_: str,
) -> None:
    """Features of INDEX that fire in documents of set A more often than in those of set B, or less often.

    Sets are SQL predicates over any columns of the view `documents`, metadata included:

    \b
      --a "lang = 'de'" --b "lang <> 'de'"     features of a metadata value
      --a "run = 1" --b "run = 2"              drift between two scans
      --a "date < '2025-01-01'" --b "date >= '2025-01-01'"

    Documents of like lengths are compared with one another, so that longer documents do not pass for
    different ones. effect is the log2 odds ratio of a document's firing (1: the odds are double in A), low
    and high its 95 % interval; strongest first, by the bound nearest 0. p is exact, q is Benjamini and
    Hochberg's over all tested features. density is the share of counted tokens where the feature is active,
    mean_max the mean of its highest activations in the documents where it fires.
    """
    from jobs.progress import Steps
    from queries import diff as differences

    con = opened(index)
    names = None if sae is None else [sae]
    found = differences.diff(con, a, b, names, min_documents, cluster, Steps())
    print_rows(found.table.slice(0, limit).to_pylist(), format_, differences.COLUMNS)
    for line in _summary(found, min_documents, cluster):
        message(line)


def _summary(found: Difference, min_documents: int, cluster: str | None) -> list[str]:
    groups = cluster is not None
    what = "group" if groups else "document"
    sets = f"a: {count(found.a, 'document')}, b: {count(found.b, 'document')}"
    if groups:
        sets = f"a: {_grouped(found.a, found.a_units)}, b: {_grouped(found.b, found.b_units)}"
    left_out: list[str] = []
    if found.neither:
        left_out.append(f"{found.neither:,} in neither set")
    if found.empty:
        left_out.append(f"{found.empty:,} without counted tokens")
    lines = [sets + (f"; left out: {', '.join(left_out)}" if left_out else "")]
    if found.alone:
        lines.append(
            f"{count(found.alone, 'document')} without a value of {cluster}, each a group of its own"
        )
    tested = f"{count(found.tested, 'feature')} of {count(len(found.saes), 'SAE')} fire in at least"
    tested += f" {count(min_documents, what)} and were tested"
    if found.strata:
        octave = f"{found.strata:,} of length, {found.per_octave} an octave"
        lines.append(f"{tested}; {'stratum' if found.strata == 1 else 'strata'}: {octave}")
    else:
        lines.append(f"{tested}; no {what} of a is as long as one of b, so only lengths can be told apart")
    return lines


def _grouped(documents: int, groups: int) -> str:
    return f"{count(documents, 'document')} in {count(groups, 'group')}"
