"""The command line: parse, call, print. Every command is a few lines over the rooms below.

Invariant: an error that a user can cause is one line on stderr and an exit code of `errors.py`
(0 done, 1 failed, 2 wrong input, 75 not finished here); heavy imports happen inside the commands, so
that `--help` and reading commands start fast.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from jobs.output import console, format_option, message, print_rows
from sae_runtime.errors import CorpuscopeError, InputError, Interrupted


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="corpuscope")
def cli() -> None:
    """Point every sparse autoencoder of a suite at a corpus, then ask SQL what fired."""


@cli.command()
@click.argument("spec")
@click.option("--index", metavar="URI", help="Scan into this index instead of the spec's.")
@click.option(
    "--executor",
    type=click.Choice(["ray", "inline"]),
    default="ray",
    show_default=True,
    help="Ray actors, or this process alone (needs no Ray).",
)
@click.option("--address", metavar="ADDR", help="A running Ray cluster; without it a local one is started.")
@click.option("--workers", type=click.IntRange(min=1), help="Actors; default one per GPU or per `threads` cores.")
@click.option("--allow-removal", is_flag=True, help="Go on when more than a tenth of the documents are gone.")
def scan(
    spec: str, index: str | None, executor: str, address: str | None, workers: int | None, allow_removal: bool
) -> None:
    """Run, or resume, the scan of SPEC. A finished scan again is a no-op."""
    from jobs.progress import ScanProgress
    from jobs.specfile import load_spec
    from pipelines.scan import ScanOptions, run_scan

    if executor == "inline" and (address or (workers or 1) > 1):
        raise InputError("--executor inline: runs in this process alone; drop --address and --workers")
    _stop_on_sigterm()
    loaded, text = load_spec(spec, index)
    options = ScanOptions(executor, address, workers, allow_removal)
    with ScanProgress() as progress:
        outcome = run_scan(loaded, text, options, progress, message)
    if not outcome.items:
        message(f"nothing to do: run {outcome.run} is complete and the corpus has not changed ({loaded.index})")
        return
    rate = outcome.tokens / outcome.seconds if outcome.seconds else 0.0
    message(
        f"run {outcome.run}: {outcome.documents:,} documents, {outcome.tokens:,} counted tokens in "
        f"{outcome.seconds:.1f} s ({rate:,.0f} tokens/s) -> {loaded.index}"
    )
    if outcome.failed:
        first = outcome.failed[0]
        raise CorpuscopeError(
            f"{len(outcome.failed)} of {outcome.items} units failed, first {first.work.unit.path}: {first.error}; "
            "mend it and run again, committed units stay"
        )


@cli.command()
@click.argument("spec")
@click.option("--index", metavar="URI", help="Plan for this index instead of the spec's.")
@format_option
def plan(spec: str, index: str | None, format_: str) -> None:
    """What a scan of SPEC would do and cost, without running the model."""
    from jobs.planview import plan_rows
    from jobs.specfile import load_spec

    loaded, text = load_spec(spec, index)
    rows = plan_rows(loaded, text)
    if format_ == "table":
        print_rows([{"": row["item"], "value": row["shown"], "note": row["note"]} for row in rows], format_)
    else:
        print_rows([{row["item"]: row["value"] for row in rows}], format_)


@cli.command()
@click.argument("index")
@format_option
def status(index: str, format_: str) -> None:
    """What is committed, failed, quarantined and running in INDEX."""
    from pipelines.estimate import human
    from pipelines.status import status as read_status

    found = read_status(index)
    if format_ != "table":
        print_rows([asdict(found)], format_)
        return
    ago = "never" if found.last_commit is None else f"{found.last_commit:,.0f} s ago"
    facts = {
        "state": found.state,
        "runs": found.runs,
        "SAEs": found.saes,
        "units": f"{found.committed:,} of {found.units:,} committed, {found.running:,} running, "
        f"{found.pending - found.running:,} waiting, {found.failed:,} failed",
        "documents": f"{found.documents:,} indexed, {found.quarantined:,} quarantined",
        "counted tokens": f"{found.tokens:,}",
        "size": human(found.bytes),
        "last commit": ago,
    }
    print_rows([{"index": name, found.index: value} for name, value in facts.items()], "table")
    for error in found.errors:
        message(f"failed: {error}")


@cli.command()
@click.argument("suite")
@click.option("--select", multiple=True, metavar="GLOB", help="Only ids or paths that match; or `canonical`.")
@click.option("--site", type=click.Choice(["resid_post", "mlp_out", "attn_z"]), help="Where the name does not say.")
@format_option
def saes(suite: str, select: tuple[str, ...], site: str | None, format_: str) -> None:
    """The SAEs found under a SUITE URI."""
    from sae_runtime import suites

    names = ("id", "layer", "site", "architecture", "d_in", "width", "nominal_l0")
    rows = [
        {
            "id": sae.id,
            "layer": sae.site.layer,
            "site": sae.site.kind,
            "architecture": sae.architecture,
            "d_in": sae.d_in,
            "width": sae.width,
            "nominal_l0": sae.nominal_l0,
        }
        for sae in suites.find(suite, None, select or None, site)
    ]
    print_rows(rows, format_, names)


@cli.command()
@click.argument("index")
@click.argument("statement", required=False)
@click.option("--script", is_flag=True, help="Print the views and macros as SQL for any DuckDB.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "json", "jsonl", "csv", "parquet"]),
    default="table",
    show_default=True,
    help="Output: table for people, the others for programs; parquet needs -o.",
)
@click.option("-o", "--output", metavar="FILE", help="Write here instead of stdout (parquet).")
def sql(index: str, statement: str | None, script: bool, format_: str, output: str | None) -> None:
    """One read-only SQL STATEMENT over the views of INDEX."""
    from pipelines.storage import Store
    from queries.connect import connect
    from queries.connect import script as statements
    from queries.lookup import rows, select

    if script:
        click.echo(";\n\n".join(statements(Store(index))) + ";")
        return
    if statement is None:
        raise InputError('sql: a statement is missing, e.g. "SELECT * FROM saes"')
    if (format_ == "parquet") != (output is not None):
        raise InputError("sql: --format parquet and -o FILE go together")
    result = select(connect(index), statement)
    if output is not None:
        _write_parquet(result, output)
        return
    names = [column[0] for column in result.description or ()]
    print_rows(rows(result), format_, names)


@cli.command()
@click.argument("index")
@click.argument("sae")
@click.argument("number", metavar="FEATURE", type=int)
@click.option("-k", "k", default=10, show_default=True, type=click.IntRange(min=1), help="Contexts to show.")
@format_option
def feature(index: str, sae: str, number: int, k: int, format_: str) -> None:
    """One FEATURE of an SAE: its statistics and max-activating contexts, active tokens marked."""
    from queries.connect import connect
    from queries.lookup import feature as look_up
    from queries.lookup import resolve_sae
    from queries.show import feature_view

    con = connect(index)
    name = resolve_sae(con, sae)
    found = look_up(con, name, number, k)
    if format_ == "table":
        out = console()
        out.print(feature_view(found, color=out.is_terminal))
    elif format_ == "csv":
        print_rows([{"sae": name, "feature": number, **context} for context in found["contexts"]], format_)
    else:
        print_rows([found], format_)


@cli.command()
@click.argument("index")
@click.argument("sae")
@click.option("--sort", default="n_tokens", show_default=True, metavar="COLUMN", help="Highest first; -COLUMN: lowest.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(min=1), help="Rows to show.")
@format_option
def features(index: str, sae: str, sort: str, limit: int, format_: str) -> None:
    """A table of an SAE's features with their statistics."""
    from queries.connect import connect
    from queries.lookup import FEATURE_COLUMNS, feature_table, resolve_sae

    con = connect(index)
    print_rows(feature_table(con, resolve_sae(con, sae), sort, limit), format_, FEATURE_COLUMNS)


def _write_parquet(result: Any, output: str) -> None:
    import pyarrow.parquet as pq

    table = result.to_arrow_table()
    try:
        pq.write_table(table, output, compression="zstd")
    except OSError as error:
        raise InputError(f"-o {output}: {error}") from error
    message(f"{table.num_rows:,} rows -> {Path(output)}")


def _stop_on_sigterm() -> None:
    """SIGTERM stops a scan as Ctrl-C does; committed units stay."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def main() -> None:
    """Entry point of the `corpuscope` command."""
    try:
        code = cli.main(standalone_mode=False)
    except CorpuscopeError as error:
        message(f"error: {error}")
        code = error.exit_code
    except click.UsageError as error:
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        message(f"error: {error.format_message()}{hint}")
        code = InputError.exit_code
    except click.ClickException as error:
        message(f"error: {error.format_message()}")
        code = InputError.exit_code
    except (KeyboardInterrupt, click.Abort):
        message("stopped; run the same command again to go on")
        code = Interrupted.exit_code
    except BrokenPipeError:
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
