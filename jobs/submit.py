"""`corpuscope submit`: the scan of a spec as a Ray job, once, whoever asks how often.

Invariant: of one run (an index and what goes into it) at most one job is alive. A job's id is the run and the
number of the attempt; a cluster takes an id once, so of two that submit at the same moment one starts a job
and the other is told that there is one. A run that ended is submitted anew as the next attempt: a scan
of a finished index does nothing, and the corpus may have grown.

Ray gives a job that is stopped 3 s before it kills it; ours has 30. A tiny scan had given its lease back
after 0.15 s and ended after 2.1 and 2.4 s (2 cores, 2026-11-23); a machine with more to do may be slower.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from jobs.output import message
from sae_runtime.errors import InputError, Interrupted

if TYPE_CHECKING:
    from jobs.rayjobs import Jobs

_Command = TypeVar("_Command", bound=Callable[..., Any])
STOP_SECONDS = 30  # between asking a job to end and killing it


def address_option(required: bool, environment: bool = True) -> Callable[[_Command], _Command]:
    """--address of a cluster's dashboard, else what the environment says (where it is asked)."""
    return click.option(
        "--address",
        metavar="URL",
        required=required,
        envvar="RAY_API_SERVER_ADDRESS" if environment else None,
        help="The cluster's dashboard, http://HOST:8265; or RAY_API_SERVER_ADDRESS in the environment.",
    )


def _workers(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    if value is None or value == "auto" or (value.isdecimal() and int(value) > 0):
        return value
    raise click.BadParameter(f"{value!r} is neither a number of 1 or more nor auto")


@click.command()
@click.argument("spec")
@address_option(required=True)
@click.option("--wait", is_flag=True, help="Follow the job; end with the scan's own exit code.")
@click.option("--shared", is_flag=True, help="Every machine of the cluster sees the spec's local paths.")
@click.option("--index", metavar="URI", help="Scan into this index instead of the spec's.")
@click.option("--workers", metavar="N|auto", callback=_workers, help="As `scan --workers` on the cluster.")
@click.option("--allow-removal", is_flag=True, help="As `scan --allow-removal`.")
@click.option(
    "--env",
    multiple=True,
    metavar="NAME",
    help="Give the job this environment variable; whoever may look at the cluster's jobs can read it.",
)
def submit(
    spec: str,
    address: str,
    wait: bool,
    shared: bool,
    index: str | None,
    workers: str | None,
    allow_removal: bool,
    env: tuple[str, ...],
) -> None:
    """Scan SPEC as a job of a Ray cluster; print the job's id.

    While a job of the same scan is waiting or running there, that one is meant, and no second is started.
    """
    id = submit_scan(
        spec,
        address,
        index=index,
        shared=shared,
        workers=workers,
        allow_removal=allow_removal,
        env=env,
        notice=message,
    )
    click.echo(id)
    if wait:
        from jobs.rayjobs import Jobs

        follow(Jobs(address), id, message)
    else:
        from jobs.rayjobs import shown

        message(f"follow it by: corpuscope jobs --address {shown(address)} logs -f {id}")


def submit_scan(
    spec: str,
    address: str,
    *,
    index: str | None = None,
    shared: bool = False,
    workers: str | None = None,
    allow_removal: bool = False,
    env: Sequence[str] = (),
    notice: Callable[[str], None],
) -> str:
    """Submit the scan of the spec file to the cluster whose dashboard is at `address`; the job's id.

    The job of the same scan that is alive there, if one is. Raises InputError for a wrong spec, for places
    that only this machine sees (unless `shared`), for variables of `env` that are not set and for a wrong
    address; CorpuscopeError where the cluster refuses, Interrupted where it does not answer any more.
    """
    from jobs.rayjobs import MARK, Jobs
    from jobs.shipping import SPEC, pack

    missing = [name for name in env if name not in os.environ]
    if missing:
        raise InputError(f"--env {missing[0]}: there is no such variable in the environment; export it")
    shipment = pack(spec, index, shared)
    jobs = Jobs(address)
    # One listing for both questions: a job that starts after it takes the number that is chosen here.
    same = [job for job in jobs.every() if job.run == shipment.run]
    for job in same:
        if not job.over:
            notice(f"note: {job.id} is {job.state} and does this scan; no second job is started")
            return job.id
    attempt = 1 + max((job.attempt for job in same), default=0)
    id = f"{shipment.run}-a{attempt}"
    command = ["python", "-m", "jobs.cli", "scan", SPEC, "--address", "auto"]
    command += ["--workers", workers] if workers else []
    command += ["--allow-removal"] if allow_removal else []
    metadata = {
        MARK: shipment.run,
        "corpuscope_attempt": str(attempt),
        "corpuscope_index": shipment.index,
        "corpuscope_spec": spec,
        "corpuscope_code": shipment.version,
    }
    variables = {name: os.environ[name] for name in env} | {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
    with tempfile.TemporaryDirectory(prefix="corpuscope-job-") as folder:
        environment = shipment.write(Path(folder)) | {"env_vars": variables}
        # exec: the job's process is the scan, not a shell in front of it.
        entrypoint = f"exec {shlex.join(command)}"
        started = jobs.submit(id, entrypoint, environment, metadata)
    if not started:
        notice(f"note: {id} has just been submitted by another; no second job is started")
    elif attempt > 1:
        notice(f"note: attempt {attempt} of this scan; committed units are not scanned again")
    return id


def follow(jobs: Jobs, id: str, show: Callable[[str], None]) -> None:
    """Show what the job prints until it is over, then end this process with the scan's exit code.

    Ctrl-C ends the following, not the job.
    """
    context = click.get_current_context()
    try:
        jobs.follow(id, show)
        code, why = jobs.exit_code(id)
    except KeyboardInterrupt:
        message(
            f"not followed any longer, {id} goes on; corpuscope jobs --address {jobs.address} stop {id} "
            "stops it"
        )
        context.exit(Interrupted.exit_code)
    message(f"{id}: {why}")
    context.exit(code)
