"""`corpuscope schedule`: when the specs of a folder are due; scan, or submit, what is due now, and end.

Invariant: nothing here waits for a time and nothing is remembered but in the indexes (pipelines/due.py), so
whatever starts it, as often as it likes and on as many machines, each due time is served once. One spec's
trouble does not keep the others from their turn.
"""

from __future__ import annotations

import contextlib
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.endings import explain
from jobs.output import ago, count, format_option, message, print_rows, print_table
from jobs.schedule_export import export
from pipelines.words import placed
from sae_runtime.errors import CorpuscopeError, InputError, Interrupted, one_line
from sae_runtime.terminal import plain

if TYPE_CHECKING:
    from pipelines.due import Attempt, Standing
    from pipelines.spec import ScanSpec
    from pipelines.storage import Store

COLUMNS = (
    "spec",
    "state",
    "cron",
    "timezone",
    "last_run",
    "last_exit",
    "last_due",
    "next_due",
    "index",
    "note",
)
# What `list` says of a spec beside the states of pipelines/due.py.
NEVER, ERROR = "never", "error"
_WORSE = (0, 3, 75, 1, 2)  # exit codes; the last is the worst
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class _Cluster:
    """Where due scans are submitted instead of being run here."""

    address: str
    shared: bool
    workers: str | None


def _instant(context: click.Context, option: click.Parameter, value: str | None) -> datetime | None:
    if value is None:
        return None
    try:
        found = datetime.fromisoformat(value.strip().replace("Z", "+00:00"))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no time such as 2026-03-29T01:30:00Z") from error
    if found.tzinfo is None:
        raise click.BadParameter(f"{value!r} says no time zone; add Z for UTC, or an offset such as +02:00")
    return found.astimezone(timezone.utc)


now_option = click.option(
    "--now", metavar="TIME", callback=_instant, help="As if it were this time (ISO 8601, with its offset)."
)


@click.group()
def schedule() -> None:
    """When the specs in a folder are due, and scans of those that are."""


schedule.add_command(export)


@schedule.command("list")
@click.argument("folder", metavar="DIR")
@now_option
@format_option
def list_(folder: str, now: datetime | None, format_: str) -> None:
    """The specs of DIR (*.yaml, or one spec file): when each is due, and whether that was served.

    \b
    due       the latest due time has not been served: `schedule run` would scan
    running   an attempt at a due time is at work
    waiting   served, until the next due time
    failed    attempts at the latest due time failed; `note` says when it is tried again
    never     the spec has no `schedule`, or one that is never due
    error     the spec, or the index's records, cannot be read; `note` says why

    In the table `due` is the next due time of what waits, and the latest one of the others.
    """
    rows = [_row(path, now or datetime.now(timezone.utc)) for path in specs(folder)]
    if format_ == "table":
        _print_table(rows, folder, now or datetime.now(timezone.utc))
    else:
        print_rows(rows, format_, COLUMNS)
    if any(row["state"] == ERROR for row in rows):
        click.get_current_context().exit(InputError.exit_code)


@schedule.command("run")
@click.argument("folder", metavar="DIR")
@click.option(
    "--address",
    metavar="URL",
    help="Submit to the dashboard there (http://HOST:8265), or scan here on the Ray at this address.",
)
@click.option(
    "--shared", is_flag=True, help="As `submit --shared`: every machine there sees the specs' local paths."
)
@click.option("--executor", metavar="ray|inline", help="As `scan --executor`.")
@click.option("--workers", metavar="N", help="As `scan --workers`.")
@click.option(
    "--name", metavar="NAME", help="Of one spec: its schedule's name in the index; default the file's."
)
@click.option("--quiet", is_flag=True, help="Say nothing of specs that are not due, or whose index is busy.")
@now_option
def run(
    folder: str,
    address: str | None,
    shared: bool,
    executor: str | None,
    workers: str | None,
    name: str | None,
    quiet: bool,
    now: datetime | None,
) -> None:
    """Scan every spec of DIR (*.yaml, or one spec file) that is due now, one after another, and end.

    Start it every few minutes (`schedule export` writes the entries). A due time is served once, by whoever
    comes first; what was missed is made up for once, by one scan. A spec that has never been scanned on
    schedule is due at once. Ends with the worst exit code of the scans.
    """
    found = specs(folder)
    if name is not None and not Path(folder).is_file():
        raise InputError(f"--name {name}: is of one spec; give its file instead of the folder {folder}")
    serve = _serving(address, shared, executor, workers)
    quietly: Callable[[str], None] = (lambda text: None) if quiet else message
    codes = [
        # By the clock as it is then: scans take their time.
        _turn(path, name or path.stem, now or datetime.now(timezone.utc), serve, quietly)
        for path in found
    ]
    click.get_current_context().exit(max(codes, key=_WORSE.index))


def specs(folder: str) -> list[Path]:
    """The spec files of a folder, hidden ones left out, or the one file. InputError if there are none."""
    place = Path(folder)
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise InputError(f"{folder}: there is no such folder or spec")
    found = sorted(path for path in place.glob("*.yaml") if not path.name.startswith("."))
    if not found:
        raise InputError(f"{folder}: there are no specs (*.yaml) in this folder")
    return found


def _row(path: Path, now: datetime) -> dict[str, Any]:
    from jobs.specfile import load_spec
    from pipelines.due import standing
    from pipelines.schedules import last_due, local, next_due
    from pipelines.storage import Store

    row: dict[str, Any] = dict.fromkeys(COLUMNS) | {"spec": path.name, "state": ERROR}
    try:
        spec, _ = load_spec(str(path))
        row |= {"index": spec.index}
        when = spec.schedule
        if when is None:
            return row | {"state": NEVER}
        row |= {"cron": when.cron, "timezone": when.timezone}
        due, coming = last_due(when.cron, when.timezone, now), next_due(when.cron, when.timezone, now)
        stands = standing(Store(spec.index), path.stem, due, now)
    except (CorpuscopeError, OSError) as error:
        return row | {"note": one_line(error)}
    last = stands.last

    def shown(instant: datetime | None) -> datetime | None:
        return None if instant is None else local(instant, when.timezone)

    row |= {"state": stands.state, "last_due": shown(due), "next_due": shown(coming)}
    if coming is None and stands.state == "waiting":
        row |= {"state": NEVER}
    if last is not None:
        row["last_run"] = shown(datetime.fromtimestamp(int(last.time), timezone.utc))
        row["last_exit"] = last.ended.exit_code if last.ended else None
        if last.ended and last.ended.job:
            row["note"] = f"submitted as {last.ended.job}"
        elif stands.again is not None:
            row["note"] = f"tried again {_when(stands.again, when.timezone)}"
        elif last.ended is None and stands.state != "running":
            row["note"] = f"attempt {last.number}, {_who(last)}, did not end"
    return row


def _print_table(rows: list[dict[str, Any]], folder: str, now: datetime) -> None:
    """What 80 columns hold; below it the notes, in which the folder need not be repeated."""
    short = [
        {
            "spec": row["spec"],
            "state": row["state"],
            "cron": row["cron"],
            "due": due and f"{due:%Y-%m-%d %H:%M}{_offset(due)}",
            "last_run": row["last_run"] and f"{ago(max(0.0, (now - row['last_run']).total_seconds()))} ago",
            "exit": row["last_exit"],
        }
        for row in rows
        for due in [row["next_due" if row["state"] in ("waiting", NEVER) else "last_due"]]
    ]
    print_table(short, [name for name in short[0] if any(row[name] is not None for row in short)])
    here = Path(folder).parent if Path(folder).is_file() else Path(folder)
    for row in rows:
        if row["note"]:
            click.echo(plain(placed(row["spec"], row["note"].removeprefix(f"{here}/"))))


def _offset(time: datetime) -> str:
    """`+02:00`, which Python before 3.12 has no sign for."""
    return time.isoformat()[-6:]


def _turn(
    path: Path,
    name: str,
    now: datetime,
    serve: Callable[[Path], tuple[int, str | None]],
    quietly: Callable[[str], None],
) -> int:
    """Scan a spec if it is due; the exit code, 0 if there was nothing to do."""
    from jobs.specfile import load_spec
    from pipelines import due
    from pipelines.lease import running
    from pipelines.schedules import last_due
    from pipelines.storage import Store

    try:
        spec, _ = load_spec(str(path))
        if spec.schedule is None:
            quietly(f"{name}: never due, the spec has no `schedule`")
            return 0
        store = Store(spec.index)
        latest = last_due(spec.schedule.cron, spec.schedule.timezone, now)
        stands = due.standing(store, name, latest, now)
        if stands.unsure:
            assert stands.last is not None
            quietly(
                f"{name}: {_who(stands.last)} has begun it; seeing in {stands.unsure:.0f} s whether it lives"
            )
            time.sleep(stands.unsure)
            stands = due.standing(store, name, latest, now)
        if stands.state != "due":
            quietly(f"{name}: {_why_not(spec, stands, now)}")
            return 0
        assert latest is not None
        busy = running(store)
        if busy is not None:
            quietly(f"{name}: due; another scan of {spec.index} is running ({busy[0].words})")
            return Interrupted.exit_code
        attempt = due.begin(store, name, latest, stands.next_number)
        if attempt is None:
            quietly(f"{name}: another process has just begun it")
            return 0
    except (CorpuscopeError, OSError) as error:
        return explain(error)
    return _attempt(path, name, store, attempt, serve)


def _attempt(
    path: Path,
    name: str,
    store: Store,
    attempt: Attempt,
    serve: Callable[[Path], tuple[int, str | None]],
) -> int:
    """Serve a due time that is ours; the exit code."""
    from pipelines import due
    from pipelines.registry import last_scan, read_plans

    late = f", attempt {attempt.number}" if attempt.number > 1 else ""
    message(f"{name}: due since {attempt.due:%Y-%m-%d %H:%M} UTC{late}")
    job, run = None, None
    try:
        code, job = serve(path)
        if job is None and (plan := last_scan(read_plans(store))):
            run = plan.run
    except (CorpuscopeError, click.ClickException, OSError) as error:
        code = explain(error)
    except (KeyboardInterrupt, click.Abort):  # the second is what click makes of the first
        due.end(store, name, attempt, Interrupted.exit_code, None, None)
        raise
    except Exception:  # a defect: in its whole length for whoever mends it, and the others have their turn
        click.echo(traceback.format_exc(), err=True)
        code = CorpuscopeError.exit_code
    due.end(store, name, attempt, code, run, job)
    if run is None or code not in due.SERVED:
        return code
    from jobs.changes import leave

    try:
        for line in leave(store, run):
            message(f"{name}: {line}")
    except (CorpuscopeError, OSError) as error:
        return max(code, explain(error), key=_WORSE.index)
    return code


def _why_not(spec: ScanSpec, stands: Standing, now: datetime) -> str:
    from pipelines.schedules import next_due

    when = spec.schedule
    assert when is not None
    coming = next_due(when.cron, when.timezone, now)
    then = "never again" if coming is None else f"next {_when(coming, when.timezone)}"
    if stands.state == "running":
        assert stands.last is not None
        return f"{_who(stands.last)} is at it"
    if stands.again is not None:
        failed = count(stands.next_number - 1, "attempt")
        return f"{failed} failed; tried again {_when(stands.again, when.timezone)}"
    return f"not due; {then}"


def _when(instant: datetime, zone: str) -> str:
    from pipelines.schedules import local

    return f"{local(instant, zone):%Y-%m-%d %H:%M %Z}"


def _who(attempt: Attempt) -> str:
    return f"process {attempt.by.process} on {attempt.by.host}"


def _serving(
    address: str | None, shared: bool, executor: str | None, workers: str | None
) -> Callable[[Path], tuple[int, str | None]]:
    """What is done with a spec that is due; gives the exit code, and the job's id where one was submitted."""
    if address is not None and address.startswith(("http://", "https://")):
        if executor is not None:
            raise InputError(f"--executor {executor}: is for scans here; a cluster's dashboard was given")
        submit = _command("submit")  # wrong options are told now, not when something is due
        submit.make_context(
            "corpuscope submit", ["SPEC", "--address", address, *_given("--workers", workers)]
        )
        cluster = _Cluster(address, shared, workers)
        return lambda path: _submitted(path, cluster)
    if shared:
        raise InputError(
            "--shared: is for submitted scans; give a cluster's dashboard, --address http://HOST:8265"
        )
    if executor == "inline" and (address or workers):
        raise InputError("--executor inline: runs in this process alone; drop --address and --workers")
    line = [*_given("--executor", executor), *_given("--address", address), *_given("--workers", workers)]
    scan = _command("scan")
    scan.make_context("corpuscope scan", ["SPEC", *line]).close()  # the same
    return lambda path: (_scanned(scan, [str(path), *line]), None)


def _given(option: str, value: str | None) -> list[str]:
    return [] if value is None else [option, value]


def _command(name: str) -> click.Command:
    root = click.get_current_context().find_root().command
    assert isinstance(root, click.Group)
    return root.commands[name]


def _scanned(scan: click.Command, line: Sequence[str]) -> int:
    with _signals_kept():
        code = scan.main(list(line), prog_name="corpuscope scan", standalone_mode=False)
    return code if isinstance(code, int) else 0


def _submitted(path: Path, cluster: _Cluster) -> tuple[int, str]:
    from jobs.submit import submit_scan

    job = submit_scan(
        str(path), cluster.address, shared=cluster.shared, workers=cluster.workers, notice=message
    )
    click.echo(job)
    return 0, job


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """A scan answers signals its own way; afterwards they are as they were."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
