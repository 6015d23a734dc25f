"""`corpuscope jobs`: the submitted scans of a cluster: which there are, what they print, an end to one.

Invariant: only scans that `submit` started are listed, followed or stopped; other jobs of the cluster are
left alone.
"""

from __future__ import annotations

import datetime
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

import click

from jobs.output import ago, format_option, message, print_rows, print_table
from jobs.submit import STOP_SECONDS, address_option, follow
from sae_runtime.errors import CorpuscopeError
from sae_runtime.terminal import plain

if TYPE_CHECKING:
    from jobs.rayjobs import Jobs, ScanJob

_PATIENCE = 30.0  # seconds beyond what a job that is stopped has for tidying up


@click.group(invoke_without_command=True)
@address_option(required=False)
@format_option
@click.pass_context
def jobs(context: click.Context, address: str | None, format_: str) -> None:
    """Submitted scans of a cluster: a table of them, or `logs` and `stop` of one."""
    context.obj = address
    if context.invoked_subcommand is not None:
        return
    from jobs.rayjobs import ScanJob

    every = _cluster(context, None).every()
    if format_ == "table":
        _print_table(every)
    else:
        print_rows(map(asdict, every), format_, [field.name for field in fields(ScanJob)])


@jobs.command()
@click.argument("id")
@click.option(
    "-f", "--follow", "followed", is_flag=True, help="Until it ends; then with the scan's exit code."
)
@address_option(required=False, environment=False)  # the group has asked it
@click.pass_context
def logs(context: click.Context, id: str, followed: bool, address: str | None) -> None:
    """What the job ID has printed."""

    def show(line: str) -> None:
        click.echo(plain(line))

    cluster = _cluster(context, address)
    cluster.job(id)
    if followed:
        follow(cluster, id, show)
    for line in cluster.logs(id).splitlines():
        show(line.expandtabs(4))


@jobs.command()
@click.argument("id")
@address_option(required=False, environment=False)  # the group has asked it
@click.pass_context
def stop(context: click.Context, id: str, address: str | None) -> None:
    """Stop the job ID, and wait until it has stopped; committed units stay."""
    cluster = _cluster(context, address)
    if cluster.job(id).over:
        message(f"{id} is over already: {cluster.exit_code(id)[1]}")
        return
    cluster.stop(id)
    job = cluster.wait(id, STOP_SECONDS + _PATIENCE)
    if not job.over:
        raise CorpuscopeError(f"{id} is {job.state} still, though it was asked to stop; look at its log")
    message(f"{id}: {cluster.exit_code(id)[1]}")


def _print_table(every: list[ScanJob]) -> None:
    """What 80 columns hold; below it, what those said that failed."""
    now = datetime.datetime.now(datetime.timezone.utc)
    rows = [
        {
            "id": job.id,
            "state": job.state,
            "exit": job.exit_code,
            "began": job.started and f"{ago((now - job.started).total_seconds())} ago",
            "took": job.started and ago(((job.ended or now) - job.started).total_seconds()),
            "index": job.index,
        }
        for job in every
    ]
    print_table(rows, ("id", "state", "exit", "began", "took", "index"), ends="index")
    for job in every:
        if job.state in ("failed", "lost"):
            click.echo(plain(f"{job.id}: {job.message}"))


def _cluster(context: click.Context, address: str | None) -> Jobs:
    """The cluster of --address, which may stand before or after the word `logs` or `stop`."""
    from jobs.rayjobs import Jobs

    found = address or context.obj
    if found is None:
        raise click.UsageError("Missing option '--address'.", context)
    return Jobs(found)
