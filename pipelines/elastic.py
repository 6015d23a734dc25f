"""How many workers to ask a cluster for, and when to try again those that cannot be made: arithmetic alone.

Invariant: there is always something asked for that the cluster has no room for, while there is work for it
(to Ray's autoscaler what waits *is* the demand), and never more than AHEAD of it, so a cluster that cannot
grow is asked for a bounded number that waits in vain. A machine that was refused takes one off that number,
or an autoscaler that has only such machines would start them for ever.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

AHEAD = 64  # workers that wait for machines that are not there yet
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 300.0  # seconds after a worker could not be made; doubles
_ROUNDS = 3  # of all workers that were asked for, in none of which one could be made


@dataclass(frozen=True)
class Need:
    """What one worker takes of a machine."""

    cpus: int
    gpus: int

    @property
    def words(self) -> str:
        return f"{self.cpus} CPU{'s' * (self.cpus != 1)}" + (f" and {self.gpus} GPU" if self.gpus else "")


@dataclass(frozen=True)
class Machine:
    """A machine of the cluster that is alive, with all that it has, whoever uses it now."""

    node: str  # Ray's id
    cpus: float
    gpus: float
    memory: float = 0.0  # bytes that Ray has for its workers

    def room(self, need: Need) -> int:
        """How many workers it can hold."""
        fits = [int(have // want) for have, want in ((self.cpus, need.cpus), (self.gpus, need.gpus)) if want]
        return min(fits, default=0)


def room(machines: Iterable[Machine], need: Need, refused: Collection[str] = ()) -> int:
    """How many workers machines can hold, without the refused ones."""
    return sum(machine.room(need) for machine in machines if machine.node not in refused)


def share(machines: Iterable[Machine], need: Need) -> int | None:
    """Bytes of memory of a worker on the machine where it has least; None where there is room nowhere."""
    shares = [machine.memory / held for machine in machines if (held := machine.room(need))]
    return int(min(shares)) if shares else None


def wanted(useful: int, most: int | None, room: int, refused: int, failing: bool) -> int:
    """How many workers there should be, those that wait for a machine included: one at least.

    `useful` is how many the rest of the work can use, `most` what the user wants at most. While none can be
    made (`failing`) nothing is asked for beyond what there is room for.
    """
    ahead = 0 if failing else max(0, AHEAD - refused)
    return max(1, min(useful, room + ahead, useful if most is None else most))


class Starts:
    """Workers that end while they are made. Times are seconds on a clock that does not go back."""

    def __init__(self) -> None:
        self._failed = 0  # since one was made
        self._rounds = 0
        self._until = 0.0

    @property
    def failing(self) -> bool:
        return self._failed > 0

    @property
    def hopeless(self) -> bool:
        """Whether all that were asked for failed, time and again."""
        return self._rounds >= _ROUNDS

    def made(self) -> None:
        """A worker answered."""
        self._failed = self._rounds = 0
        self._until = 0.0

    def failed(self, left: int, now: float) -> None:
        """A worker could not be made; `left` are there or still waited for."""
        self._failed += 1
        self._rounds += not left
        times = self._failed - 1 if left else self._rounds - 1
        self._until = now + min(_LONGEST_WAIT, _FIRST_WAIT * 2.0 ** min(times, 30))

    def held(self, now: float) -> bool:
        """Whether none is to be made yet."""
        return now < self._until
