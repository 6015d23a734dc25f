"""`corpuscope annotate`: decoder-side facts and published explanations, added to an index."""

from __future__ import annotations

from functools import cache

import click
from click.core import ParameterSource

from jobs.output import count, format_option, message, opened, print_rows
from sae_runtime.errors import InputError

ONLY = ("tokens", "neighbours", "explanations")


@click.command()
@click.argument("index")
@click.option(
    "--explanations",
    multiple=True,
    metavar="URI",
    help="Import these: Neuronpedia's export, delphi's results, CSV or JSONL with feature and description.",
)
@click.option("--source", metavar="NAME", help="What `explanations.source` says where the files do not.")
@click.option("--sae", "saes", multiple=True, metavar="SAE", help="Only this SAE; it is the explanations'.")
@click.option(
    "--tokens", default=10, show_default=True, metavar="K", type=click.IntRange(1, 1000),
    help="Output tokens of each feature, the K highest and the K lowest.",
)  # fmt: skip
@click.option(
    "--neighbours", default=10, show_default=True, metavar="K", type=click.IntRange(1, 1000),
    help="Nearest features, K of the same SAE and K of others.",
)  # fmt: skip
@click.option(
    "--compare",
    type=click.Choice(["own", "site", "all"]),
    default="all",
    show_default=True,
    help="Neighbours in the SAE itself; in those of its site too; in all that reach the residual stream.",
)
@click.option("--only", multiple=True, type=click.Choice(ONLY), help="Leave the rest out.")
@click.option("--model", metavar="URI", help="Where the model is, if it is not where it was scanned.")
@click.option(
    "--saes", "suites", multiple=True, metavar="URI", help="Where the SAEs' suites are, if they moved."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@format_option
def annotate(
    index: str, explanations: tuple[str, ...], source: str | None, saes: tuple[str, ...], tokens: int,
    neighbours: int, compare: str, only: tuple[str, ...], model: str | None, suites: tuple[str, ...],
    device: str, format_: str,
) -> None:  # fmt: skip
    """Add output tokens, nearest features, decoder norms and explanations to INDEX.

    What is there already is left as it is, unless --tokens, --neighbours or --compare ask for it otherwise;
    explanations replace those of the same SAE from the same source. Needs the files of the model and of the
    SAEs, except for explanations.
    """
    from jobs.progress import Steps
    from pipelines.annotate import Options, Outcome, import_explanations
    from pipelines.annotate import annotate as add_facts
    from pipelines.storage import Store
    from queries.lookup import resolve_sae

    if "," in index:
        raise InputError(f"annotate: one index at a time, not {index}")
    if "explanations" in only and not explanations:
        raise InputError("--only explanations: --explanations URI is missing")
    if explanations and only and "explanations" not in only:
        raise InputError("--explanations: `--only` leaves them out; add --only explanations")
    with opened(index) as con:
        resolve = cache(lambda name: resolve_sae(con, name))
        chosen = tuple(dict.fromkeys(map(resolve, saes)))
        store, steps, outcome = Store(index), Steps(), Outcome()
        if explanations:
            import_explanations(store, explanations, source, chosen, resolve, outcome, steps)
    parts = set(only) or set(ONLY)
    if parts & {"tokens", "neighbours"}:
        options = Options(
            saes=chosen,
            tokens=tokens if "tokens" in parts else None,
            neighbours=neighbours if "neighbours" in parts else None,
            compare=compare,
            model=model,
            suites=suites,
            device=_device(device),
            anew=_given(),
        )
        try:
            add_facts(store, options, steps, outcome)
        except InputError as error:
            if not explanations:
                raise
            message(f"warning: the explanations are in, output tokens and nearest features are not: {error}")
    for sae, why in outcome.skipped:
        message(f"note: {sae} has {why}")
    rows = [{"sae": sae, **kinds} for sae, kinds in sorted(outcome.rows.items())]
    columns = ("sae", "feature_tokens", "feature_neighbours", "feature_decoders", "explanations")
    if rows or format_ != "table":
        print_rows([{name: row.get(name, 0) for name in columns} for row in rows], format_, columns)
    if not outcome.rows and not outcome.skipped:
        message(f"nothing to add: {index} is annotated so already")
    else:
        added = sum(sum(kinds.values()) for kinds in outcome.rows.values())
        message(f"{count(added, 'row')} added -> {index}")


def _given() -> tuple[str, ...]:
    """Kinds of facts whose options a person gave: a default replaces nothing."""
    source = click.get_current_context().get_parameter_source
    kinds = {
        "feature_tokens": ("tokens",),
        "feature_neighbours": ("neighbours", "compare"),
    }
    return tuple(
        kind
        for kind, names in kinds.items()
        if any(source(name) is not ParameterSource.DEFAULT for name in names)
    )


def _device(wanted: str) -> str:
    import torch

    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise InputError("--device cuda: torch sees no GPU here; use auto or cpu")
    return "cuda" if there and wanted != "cpu" else "cpu"
