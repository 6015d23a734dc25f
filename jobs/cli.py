"""The command line: parse, call, print. Every command is a few lines over the rooms below.

Invariant: an error that a user can cause is one line on stderr and an exit code of `errors.py`
(0 done, 1 failed, 2 wrong input, 3 done but for documents in quarantine, 75 not finished here); heavy
imports happen inside the commands, so that `--help` and reading commands start fast.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from dataclasses import asdict
from typing import Any

import click
from click.core import ParameterSource

from jobs.annotate import annotate
from jobs.arguments import NOT_NEGATIVE, POSITIVE
from jobs.changes import changes
from jobs.diff import diff
from jobs.endings import explain
from jobs.explore import explore
from jobs.export import export
from jobs.jobs import jobs
from jobs.output import (
    console,
    count,
    format_option,
    in_color,
    message,
    opened,
    placed,
    print_facts,
    print_rows,
    show,
    uris,
)
from jobs.recipes import recipe, recipes
from jobs.report import report
from jobs.schedule import schedule
from jobs.submit import submit
from sae_runtime.errors import QUARANTINED, CorpuscopeError, InputError, one_line

SHORT_COLUMNS = ("feature", "n_tokens", "n_documents", "density", "mean_active", "max", "example")
_TIDY_SECONDS = 10.0
_UPKEEP = "upkeep"  # the thread of pipelines/upkeep.py, which is slow to import


def _workers(_: click.Context, __: click.Parameter, value: str) -> int | None:
    """None for `auto`."""
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value} is not a number of 1 or more, nor auto")
    return int(value)


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
@click.option(
    "--workers",
    metavar="N|auto",
    default="auto",
    show_default=True,
    callback=_workers,
    help="Actors at most. auto: one per GPU, or as many as the cores have room for `threads`; on a cluster "
    "they come and go with its machines.",
)
@click.option("--allow-removal", is_flag=True, help="Go on when more than a tenth of the documents are gone.")
@click.option(
    "--log",
    metavar="FILE",
    envvar="CORPUSCOPE_LOG",
    show_envvar=True,
    help="Append what happens as JSON lines; `-` is stdout.",
)
@click.option(
    "--price-per-hour",
    "price",
    metavar="PRICE",
    type=NOT_NEGATIVE,
    envvar="CORPUSCOPE_PRICE_PER_HOUR",
    show_envvar=True,
    help="Of a worker and its share of a machine: the run's summary then has a cost.",
)
def scan(
    spec: str,
    index: str | None,
    executor: str,
    address: str | None,
    workers: int | None,
    allow_removal: bool,
    log: str | None,
    price: float | None,
) -> None:
    """Run, or resume, the scan of SPEC. A finished scan again is a no-op."""
    from jobs.progress import ScanProgress
    from jobs.specfile import load_spec
    from pipelines import logs
    from pipelines.executors.base import Event
    from pipelines.scan import ScanOptions, Started, run_scan

    if executor == "inline" and (address or (workers or 1) > 1):
        raise InputError("--executor inline: runs in this process alone; drop --address and --workers")
    stopped = _stop_on_signals()
    loaded, text = load_spec(spec, index)
    options = ScanOptions(executor, address, workers, allow_removal, price)
    with logs.to(log), ScanProgress() as progress:

        def observe(event: Started | Event) -> None:
            # An interrupt that a library's callback swallowed is raised again at the next event.
            if stopped.is_set():
                raise KeyboardInterrupt
            progress(event)

        def notice(text: str) -> None:
            message(text)
            logs.tell("notice", logs.WARNING, text=text)

        outcome = run_scan(loaded, text, options, observe, notice)
    if not outcome.items:
        message(f"nothing to scan: every unit of the corpus is committed (run {outcome.run}, {loaded.index})")
        _end(outcome.quarantined, loaded.index)
        return
    rate = outcome.tokens / outcome.seconds if outcome.seconds else 0.0
    message(
        f"run {outcome.run}: {count(outcome.documents, 'document')}, "
        f"{count(outcome.tokens, 'counted token')} in {outcome.seconds:.1f} s ({rate:,.0f} tokens/s) "
        f"-> {loaded.index}"
    )
    if outcome.failed:
        first = outcome.failed[0]
        raise CorpuscopeError(
            f"{len(outcome.failed)} of {count(outcome.items, 'unit')} failed, the first at "
            f"{placed(first.work.unit.path, first.error)}; mend that and run again, committed units stay"
        )
    _end(outcome.quarantined, loaded.index)


def _end(quarantined: int, index: str) -> None:
    """Say how many documents could not be scanned, if any; that has an exit code of its own."""
    if quarantined:
        message(
            f"{count(quarantined, 'document')} could not be scanned, everything else is indexed: "
            f'corpuscope sql {index} "SELECT * FROM quarantine" says which and why'
        )
        click.get_current_context().exit(QUARANTINED)


@cli.command()
@click.argument("spec")
@click.option("--index", metavar="URI", help="Plan for this index instead of the spec's.")
@click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(min=1),
    help="Plan for so many workers; default as many as `scan` starts here.",
)
@click.option(
    "--device",
    metavar="NAME",
    help="What a worker has: cpu, B200, H200, H100, A100, L40S or L4; default by the spec and this machine.",
)
@click.option(
    "--from",
    "source",
    metavar="INDEX",
    help="Take constants from the last run of this index instead of the spec's.",
)
@click.option(
    "--tokens-per-second",
    "rate",
    metavar="R",
    type=POSITIVE,
    help="Counted tokens that one worker does in a second, with all SAEs, instead of a measured speed.",
)
@click.option(
    "--l0",
    metavar="L",
    type=POSITIVE,
    help="Active features a token of every SAE, instead of measured or published ones.",
)
@click.option(
    "--price-per-hour",
    "price",
    metavar="P",
    type=NOT_NEGATIVE,
    help="Of one worker, for the cost.",
)
@format_option
def plan(
    spec: str,
    index: str | None,
    workers: int | None,
    device: str | None,
    source: str | None,
    rate: float | None,
    l0: float | None,
    price: float | None,
    format_: str,
) -> None:
    """What a scan of SPEC would do and cost, without running the model.

    Rows, bytes and time follow from a stated model whose constants are those of the last measured run of the
    index (or of --from); what is assumed instead is said.
    """
    from jobs.planview import Asked, facts, look, record
    from jobs.specfile import load_spec

    view = look(*load_spec(spec, index), Asked(workers, device, source, rate, l0, price))
    for line in view.prepared.warnings:
        message(line)
    if format_ == "table":
        print_facts(facts(view))
    else:
        row = record(view)
        print_rows([row], format_, list(row))


@cli.command()
@click.argument("index")
@format_option
def status(index: str, format_: str) -> None:
    """What is committed, failed, quarantined and running in INDEX."""
    from jobs.statusview import status_facts
    from pipelines.status import status as read_status

    every = [read_status(uri) for uri in uris(index)]
    if format_ != "table":
        print_rows(map(asdict, every), format_, list(asdict(every[0])))
        return
    for found in every:
        print_facts(status_facts(found))


@cli.command()
@click.argument("suite")
@click.option("--select", multiple=True, metavar="GLOB", help="Only ids or paths that match; or `canonical`.")
@click.option(
    "--site",
    metavar="KIND",
    help="Where the suite's name does not say it.",
)
@format_option
def saes(suite: str, select: tuple[str, ...], site: str | None, format_: str) -> None:
    """The SAEs found under a SUITE URI."""
    from jobs.progress import Listing
    from sae_runtime import suites

    def refused(error: InputError) -> None:
        message(f"warning: {error}")

    found = suites.find(suite, None, select or None, site, refused=refused, progress=Listing())
    if not found:
        raise InputError(f"saes.uri: {suite}: none of its SAEs can be read; the warnings say why")
    try:
        for one, other in suites.duplicates(found).items():
            message(f"note: {one} has the same tensors as {other}")
    except InputError as error:  # the listing is right without
        message(f"warning: duplicates are not shown: {error}")
    names = ("id", "site", "layer", "architecture", "d_in", "width", "nominal_l0")
    rows = [
        {
            "id": sae.id,
            "layer": sae.site.layer,
            "site": sae.site.kind if sae.site.head is None else f"{sae.site.kind}[{sae.site.head}]",
            "architecture": sae.architecture,
            "d_in": sae.d_in,
            "width": sae.width,
            "nominal_l0": sae.nominal_l0,
        }
        for sae in found
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
@click.option("--timeout", metavar="SECONDS", type=POSITIVE, help="Stop the query then.")
def sql(
    index: str, statement: str | None, script: bool, format_: str, output: str | None, timeout: float | None
) -> None:
    """One read-only SQL STATEMENT over the views of INDEX (of several: commas between them)."""
    from pipelines.storage import Store
    from queries.connect import script as statements
    from queries.lookup import column_names, rows, select, time_limit

    if script:
        made = statements([Store(uri) for uri in uris(index)])
        click.echo(";\n\n".join(made) + ";", color=True)  # nothing is left out
        return
    if statement is None:
        raise InputError('sql: a statement is missing; for example "SELECT * FROM saes"')
    if (format_ == "parquet") != (output is not None):
        raise InputError("sql: --format parquet and -o FILE go together")
    con = opened(index)
    with time_limit(con, timeout):
        result = select(con, statement)
        if output is not None:
            _write_parquet(result, output)
        else:
            print_rows(rows(result), format_, column_names(result))


@cli.command()
@click.argument("index")
@click.argument("sae")
@click.argument("number", metavar="FEATURE", type=int)
@click.option("-k", "k", default=10, show_default=True, type=click.IntRange(min=1), help="Contexts to show.")
@format_option
def feature(index: str, sae: str, number: int, k: int, format_: str) -> None:
    """One FEATURE of an SAE: its statistics and max-activating contexts, active tokens marked."""
    from queries.lookup import CONTEXT_COLUMNS, FEATURE_VIEWS, resolve_sae
    from queries.lookup import feature as look_up
    from queries.show import feature_view

    con = opened(index, FEATURE_VIEWS)
    name = resolve_sae(con, sae)
    found = look_up(con, name, number, k)
    asked = click.get_current_context().get_parameter_source("k") is not ParameterSource.DEFAULT
    if asked and len(found["contexts"]) < min(k, found["n_documents"]):
        message(f"note: {len(found['contexts'])} contexts are kept of this feature (`top_k` of the spec)")
    if format_ == "table":
        show(feature_view(found, color=in_color(console())))
    elif format_ == "csv":
        contexts = ({"sae": name, "feature": number, **context} for context in found["contexts"])
        print_rows(contexts, format_, ("sae", "feature", *CONTEXT_COLUMNS))
    else:
        print_rows([found], format_, list(found))


@cli.command()
@click.argument("index")
@click.argument("sae")
@click.option(
    "--sort",
    default="n_tokens",
    show_default=True,
    metavar="COLUMN",
    help="Highest first; with a minus before it, lowest first.",
)
@click.option(
    "--limit", default=20, show_default=True, metavar="N", type=click.IntRange(min=1), help="Rows to show."
)
@format_option
def features(index: str, sae: str, sort: str, limit: int, format_: str) -> None:
    """A table of an SAE's features with their statistics.

    For people it is short, and ends with the text at the highest activation; the other formats have
    every column.
    """
    from queries.lookup import FEATURE_COLUMNS, feature_table, resolve_sae

    con = opened(index)
    rows = feature_table(con, resolve_sae(con, sae), sort, limit)
    columns = [*FEATURE_COLUMNS, "example"]
    if format_ == "table":
        short = {*SHORT_COLUMNS, sort.removeprefix("-")}
        columns = [name for name in columns if name in short]
    print_rows(rows, format_, columns)


@cli.command()
@click.argument("index")
@click.option("--quick", is_flag=True, help="Files, checksums, registry and commits only, not what rows say.")
@click.option(
    "--memory", default="2GB", show_default=True, metavar="SIZE", help="What comparing the tables may take."
)
@format_option
def verify(index: str, quick: bool, memory: str, format_: str) -> None:
    """Read every committed file of INDEX: checksums, counts, and whatever can be recomputed from the rows.

    Scans, compactions and queries may go on meanwhile. Ends with 1 if anything is damaged.
    """
    from jobs.progress import Steps
    from pipelines.words import human
    from queries.show import visible
    from queries.verify import verify as check

    if not re.fullmatch(r"\d+(\.\d+)? *[KMGT]i?B", memory):
        raise InputError(f"--memory {memory}: a size such as 500MB or 8GB is wanted")
    found = check(index, quick, Steps(), memory)
    if format_ == "table":
        for fault in found.faults:
            click.echo(visible(f"{fault.file}: {fault.check}: {fault.detail}"))
    else:
        print_rows(map(asdict, found.faults), format_, ("file", "check", "detail"))
    message(
        f"{count(found.files, 'file')} ({human(found.bytes)}, {count(found.rows, 'row')}) of "
        f"{found.committed:,} of {count(found.units, 'unit')} read, {count(found.checks, 'kind')} of checks"
    )
    if not found.whole and not quick:
        message("tables were not compared: they cannot be relied on to be readable")
    if found.faults:
        message(f"error: {index} is damaged: {count(len(found.faults), 'fault')}")
        click.get_current_context().exit(CorpuscopeError.exit_code)
    message(f"{index} is sound" + (" as far as --quick looks" if quick else ""))


@cli.command()
@click.argument("index")
@format_option
def compact(index: str, format_: str) -> None:
    """Rewrite the committed files of INDEX into few large ones, for fast reads.

    Scans and queries may go on meanwhile; killed, it leaves the index as it was. `gc` removes what it
    replaced.
    """
    from jobs.progress import Steps
    from pipelines import compaction
    from pipelines.storage import Store
    from pipelines.words import human

    steps = Steps()
    done = compaction.compact(Store(index), told=lambda job: steps(job.words))
    if format_ != "table":
        row = asdict(done) | {"replaced": len(done.replaced)}
        print_rows([row], format_, list(row))
    elif not done.runs and not done.nodes:
        message(f"nothing to compact: {index} is compact")
    else:
        message(
            f"{count(done.rows, 'activation row')} rewritten, {human(done.bytes)} written -> {index}; "
            "`corpuscope gc` removes the files that they replace"
        )


@cli.command()
@click.argument("index")
@click.option(
    "--grace",
    metavar="SECONDS",
    type=NOT_NEGATIVE,
    default=600.0,
    show_default=True,
    help="How long replaced and dropped data stay for queries that have begun.",
)
@click.option(
    "--unfinished",
    metavar="SECONDS",
    type=NOT_NEGATIVE,
    default=86400.0,
    show_default=True,
    help="How long files that nothing names stay. Give less only while nothing is at work on the index.",
)
@format_option
def gc(index: str, grace: float, unfinished: float, format_: str) -> None:
    """Remove what no commit names from INDEX: files of lost attempts, replaced files, dropped documents."""
    from pipelines import gc as garbage
    from pipelines.storage import Store
    from pipelines.words import human

    found = garbage.collect(Store(index), grace, unfinished)
    if format_ != "table":
        print_rows([asdict(found)], format_, list(asdict(found)))
        return
    if found.retired:
        message(f"{count(found.retired, 'unit')} of changed or removed files given up")
    message(f"{count(found.removed, 'file')} ({human(found.bytes)}) removed from {index}")
    if found.waiting:
        message(
            f"{count(found.waiting, 'file')} ({human(found.waiting_bytes)}) stay until they are older, as "
            "queries, scans or compactions that run may need them (--grace, --unfinished)"
        )


cli.add_command(annotate)
cli.add_command(recipes)
cli.add_command(recipe)
cli.add_command(diff)
cli.add_command(export)
cli.add_command(changes)
cli.add_command(schedule)
cli.add_command(submit)
cli.add_command(jobs)
cli.add_command(explore)
cli.add_command(report)


def _write_parquet(result: Any, output: str) -> None:
    import fsspec
    import pyarrow.parquet as pq

    from queries.lookup import arrow_table

    table = arrow_table(result)
    try:
        fs, path = fsspec.core.url_to_fs(output)
        with fs.open(path, "wb") as stream:
            pq.write_table(table, stream, compression="zstd")
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"-o {output}: cannot be written: {one_line(error)}") from error
    message(f"{count(table.num_rows, 'row')} -> {output}")


def _stop_on_signals() -> threading.Event:
    """SIGTERM, and a terminal that closes, stop a scan as Ctrl-C does; committed units stay.

    The event is set from then on. Whoever stops a scan often sends several signals; for a few seconds
    after the first one they do not disturb the tidying up.
    """
    stopped = threading.Event()
    first = 0.0

    def stop(number: int, frame: object) -> None:
        nonlocal first
        if not stopped.is_set():
            first = time.monotonic()
        elif time.monotonic() - first < _TIDY_SECONDS:
            return
        stopped.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
        signal.signal(signal.SIGHUP, stop)
    return stopped


def main() -> None:
    """Entry point of the `corpuscope` command."""
    try:
        code = cli.main(prog_name="corpuscope", standalone_mode=False)
    except (CorpuscopeError, click.ClickException, click.Abort, KeyboardInterrupt, OSError) as error:
        code = explain(error)
    code = code if isinstance(code, int) else 0
    if any(thread.name == _UPKEEP for thread in threading.enumerate()):
        # Compaction of a scan that was stopped goes on until the very end; Python's own end would cut it off
        # inside C++, which aborts the process with another code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
