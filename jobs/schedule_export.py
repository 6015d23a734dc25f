"""`corpuscope schedule export`: entries for the scheduler that people have, which start `schedule run`.

crontab and systemd get one entry for the folder that starts `schedule run` every few minutes; whether a spec
is due is decided there. So their own ideas of time zones, of changes of the clocks and of missed times do not
matter: Debian's cron has no CRON_TZ, systemd's OnCalendar has no equal for `0 3 1 * MON`, and neither knows
whether another machine has been first. Kubernetes pays for a machine at every start, so it gets a RayCronJob
for each spec, at the spec's own times; a cron line that means something else to it is refused by name.

Invariant: what is written runs by absolute paths and needs no environment but the user's own.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import click
import yaml

from jobs.output import message
from sae_runtime.errors import InputError

_EVERY = (1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30)  # minutes: what an hour is divided by
_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")


@click.command("export")
@click.argument("folder", metavar="DIR")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["crontab", "systemd", "k8s"]),
    required=True,
    help="Whose entries.",
)
@click.option("-o", "--output", metavar="DIR", help="Write files into this folder instead of to stdout.")
@click.option(
    "--every",
    metavar="MINUTES",
    type=click.Choice([str(n) for n in _EVERY]),
    default="5",
    show_default=True,
    help="crontab, systemd: how often to look, and how late a scan begins at most.",
)
@click.option("--address", metavar="URL", help="crontab, systemd: as `schedule run --address`.")
@click.option("--shared", is_flag=True, help="crontab, systemd: as `schedule run --shared`.")
@click.option("--executor", metavar="ray|inline", help="crontab, systemd: as `schedule run --executor`.")
@click.option("--workers", metavar="N", help="As `schedule run --workers`; k8s: default auto.")
@click.option("--image", metavar="IMAGE", help="k8s: with corpuscope and Ray in it.")
@click.option("--namespace", metavar="NAME", help="k8s: where the jobs are.")
@click.option("--service-account", metavar="NAME", help="k8s: who may read the corpus and write the index.")
def export(
    folder: str,
    format_: str,
    output: str | None,
    every: str,
    address: str | None,
    shared: bool,
    executor: str | None,
    workers: str | None,
    image: str | None,
    namespace: str | None,
    service_account: str | None,
) -> None:
    """Write the schedules of DIR as entries for cron, systemd or Kubernetes (KubeRay).

    crontab and systemd look every few minutes whether a spec is due, by `schedule run`; a spec that is added
    to DIR later needs no new entry. Kubernetes gets a RayCronJob for each spec, with the spec inside.
    """
    from jobs.schedule import specs

    found = specs(folder)
    for_k8s = {"--image": image, "--namespace": namespace, "--service-account": service_account}
    for_ticks = {"--address": address, "--executor": executor, "--shared": shared or None}
    wrong = for_ticks if format_ == "k8s" else for_k8s
    for option, value in wrong.items():
        if value is not None:
            raise InputError(f"{option}: is not for --format {format_}")
    if format_ == "k8s":
        files = _k8s(found, workers or "auto", image, namespace, service_account)
    else:
        place = str(Path(folder).absolute())
        if "\n" in place:
            raise InputError(f"{folder!r}: a name with a line break cannot stand in an entry; rename it")
        command = [*program(), "schedule", "run", place, "--quiet"]
        for option, value in {**for_ticks, "--workers": workers}.items():
            command += [] if value is None else [option] if value is True else [option, str(value)]
        make = crontab if format_ == "crontab" else systemd
        files = make(command, int(every), place)
        _check(found)
    if output is None:
        click.echo(
            "\n".join(text if len(files) == 1 else f"# {name}\n{text}" for name, text in files.items()),
            nl=False,
        )
        return
    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (target / name).write_text(text, encoding="utf-8")
        message(f"written: {target / name}")


def program() -> list[str]:
    """How an entry starts corpuscope, whose PATH may be bare: by absolute paths."""
    script = Path(sys.executable).parent / "corpuscope"
    return [str(script)] if script.exists() else [sys.executable, "-m", "jobs.cli"]


def crontab(command: list[str], every: int, folder: str) -> dict[str, str]:
    """A crontab line; cron takes `%` for a line break unless there is a backslash before it."""
    line = shlex.join(command).replace("%", r"\%")
    text = (
        f"# Scans the specs in {folder} that are due.\n"
        "# By their own cron lines and time zones, so no CRON_TZ is needed; nor flock, as a due time is\n"
        "# served once. Exit codes 3 (documents quarantined) and 75 (another scan of the index is\n"
        "# running) are no failures.\n"
        f"{_minutes(every)} * * * * {line}\n"
    )
    return {"crontab": text}


def systemd(command: list[str], every: int, folder: str) -> dict[str, str]:
    """A service and the timer that starts it, unless it is still at work."""
    name = f"corpuscope-{_slug(folder)}"
    described = folder.replace("%", "%%")
    service = (
        "[Unit]\n"
        f"Description=Corpuscope scans that are due in {described}\n"
        "After=network-online.target\nWants=network-online.target\n\n"
        "[Service]\nType=oneshot\n"
        f"ExecStart={' '.join(map(_systemd_word, command))}\n"
        "# 3: done, with documents quarantined. 75: another scan is running, or this was stopped.\n"
        "SuccessExitStatus=3 75\n"
        "# A scan that is stopped gives its lease back; the workers end with it.\n"
        "KillMode=mixed\nTimeoutStopSec=60\n"
    )
    timer = (
        f"[Unit]\nDescription=Corpuscope looks whether scans are due in {described}\n\n"
        f"[Timer]\nOnCalendar=*:{'0' if every == 60 else f'0/{every}'}\nAccuracySec=1s\n\n"
        "[Install]\nWantedBy=timers.target\n"
    )
    return {f"{name}.service": service, f"{name}.timer": timer}


def _k8s(
    found: list[Path], workers: str, image: str | None, namespace: str | None, account: str | None
) -> dict[str, str]:
    from jobs.manifests import SPEC, Settings, dump, raycronjob
    from jobs.specfile import load_spec

    settings = Settings(image=image, namespace=namespace, service_account=account)
    files = {}
    for path in found:
        spec, text = load_spec(str(path))
        if spec.schedule is None:
            message(f"{path.name}: no `schedule` in the spec, left out")
            continue
        check_portable(path, spec.schedule.cron)
        _check_places(path, text)
        name = path.stem
        entry = shlex.join(
            ["corpuscope", "schedule", "run", SPEC, "--name", name, "--address", "auto", "--workers", workers]
        )
        cron, zone = spec.schedule.cron, spec.schedule.timezone
        files[f"{name}.yaml"] = dump(raycronjob(name, cron, zone, entry, text, settings))
    if not files:
        raise InputError('none of the specs has a `schedule`, a cron line such as "0 3 * * *"')
    return files


def check_portable(path: Path, cron: str) -> None:
    """InputError for what Kubernetes' cron does not know, or takes for something else."""
    _, _, day, _, weekday = cron.split()
    where = f"{path}: schedule: {cron}"
    if re.search(r"[LW#]", f"{day} {re.sub('[A-Z]{3}', '', weekday.upper())}".upper()):
        raise InputError(f"{where}: Kubernetes knows no L, W and #; name the days, or use --format crontab")
    if "7" in re.sub(r"/\d+", "", weekday):
        raise InputError(f"{where}: Kubernetes knows no day 7; write 0 or SUN for Sunday")
    starred = [field for field in (day, weekday) if field.startswith("*") and field != "*"]
    if starred and "*" not in (day, weekday):
        raise InputError(
            f"{where}: with {starred[0]} cron wants day of month and day of week to be right, "
            "Kubernetes either; write the days out"
        )


def _check_places(path: Path, text: str) -> None:
    """InputError for a place that is relative to the spec's folder, which no pod has."""
    from sae_runtime import yamls

    data: dict[str, Any] = yaml.load(text.removeprefix("\ufeff"), yamls.Loader)
    places = [("index", data["index"])]
    for key in ("corpus", "saes"):
        entries = data[key] if isinstance(data[key], list) else [data[key]]
        for number, entry in enumerate(entries):
            uris = entry["uri"] if isinstance(entry["uri"], list) else [entry["uri"]]
            places += [(f"{key}[{number}].uri", uri) for uri in uris]
            if entry.get("template", "auto") != "auto":
                places.append((f"{key}[{number}].template", entry["template"]))
    if str(data["model"]["uri"]).startswith("."):
        places.append(("model.uri", data["model"]["uri"]))
    for key, place in places:
        if "://" not in place and not place.startswith("/"):
            raise InputError(
                f"{path}: {key}: {place}: no pod has the spec's folder; give a URI such as s3://…, or an "
                "absolute path that is mounted in the pods"
            )


def _check(found: list[Path]) -> None:
    """Say now what `schedule run` would say later of the specs that are there."""
    from jobs.specfile import load_spec

    scheduled = 0
    for path in found:
        try:
            scheduled += load_spec(str(path))[0].schedule is not None
        except InputError as error:
            message(f"warning: {error}")
    if not scheduled:
        message("warning: none of the specs has a `schedule` yet, so nothing will be due")


def _minutes(every: int) -> str:
    return "*" if every == 1 else f"*/{every}"


def _slug(folder: str) -> str:
    return "-".join(_PLAIN.findall(Path(folder).stem)) or "schedules"


def _systemd_word(word: str) -> str:
    """A word of ExecStart: quoted, with systemd's specifiers and variables made plain text."""
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return word if re.fullmatch(r"[A-Za-z0-9_./:%$=@+-]+", word) else f'"{word}"'
