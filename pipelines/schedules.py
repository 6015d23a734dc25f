"""When a schedule is due: cron lines in time zones, as instants.

Invariant: a due time is an instant, so that it has one name all over the world and on both sides of a change
of the clocks. The arithmetic and its rule for such changes are cronsim's, which are Debian cron's: a line
whose minute and hour are given (`30 2 * * *`) is due once on a night that has no 2:30, when the clocks have
gone forward, and once on a night that has two, the first time; a line with `*` in minute or hour follows the
time that passes, so `0 * * * *` is due after every hour whatever the clocks say.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

_FIELDS = "minute, hour, day of month, month, day of week"
# Zones change their clocks by an hour, once one left out a day. cronsim is asked from the far side of such a
# change: begun inside the hour that is there twice it takes the second for the first.
_MARGIN = timedelta(days=1)
_ANY = datetime(2000, 1, 1, tzinfo=timezone.utc)


def check_cron(line: str) -> str:
    """The line, its blanks made one each. Raises ValueError for one that is none or never due."""
    fields = line.split()
    if len(fields) != 5:
        raise ValueError(f"{line!r}: a cron line has five fields ({_FIELDS}), this has {len(fields)}")
    try:
        next(CronSim(" ".join(fields), _ANY))
    except CronSimError as error:
        field = str(error).removeprefix("Bad ").replace("-", " ")
        wrong = "there is no such date" if _alone(fields) else f"wrong {field}; the fields are {_FIELDS}"
        raise ValueError(f"{line!r}: {wrong}") from error
    except StopIteration as error:
        raise ValueError(f"{line!r}: there is no such date") from error
    return " ".join(fields)


def check_zone(name: str) -> str:
    """The name. Raises ValueError unless it is of a time zone."""
    try:
        _zone(name)
    except (ValueError, OSError, KeyError) as error:  # OSError for a folder of zones
        raise ValueError(
            f"{name!r}: no such time zone; UTC or a name such as Europe/Berlin is wanted"
        ) from error
    return name


def last_due(cron: str, zone: str, now: datetime) -> datetime | None:
    """The latest due time that is not after `now`, in UTC; None if there was none in 50 years."""
    return next((due for due in _times(cron, zone, now + _MARGIN, reverse=True) if due <= now), None)


def next_due(cron: str, zone: str, now: datetime) -> datetime | None:
    """The first due time after `now`, in UTC; None if there is none in 50 years."""
    return next((due for due in _times(cron, zone, now - _MARGIN) if due > now), None)


def local(due: datetime, zone: str) -> datetime:
    """The instant as the clocks of a zone show it."""
    return due.astimezone(_zone(zone))


def _times(cron: str, zone: str, start: datetime, reverse: bool = False) -> Iterator[datetime]:
    # In UTC before anything is compared: of two times in one zone Python compares what the clocks show.
    found = CronSim(cron, start.astimezone(_zone(zone)), reverse)
    return (time.astimezone(timezone.utc) for time in found)


def _alone(fields: list[str]) -> bool:
    """Whether the day of month and the other fields are all right, each by themselves."""
    try:
        CronSim(f"* * {fields[2]} * *", _ANY)
        CronSim(f"{fields[0]} {fields[1]} * {fields[3]} {fields[4]}", _ANY)
    except CronSimError:
        return False
    return True


@functools.lru_cache(maxsize=64)
def _zone(name: str) -> ZoneInfo:
    return ZoneInfo(name)
