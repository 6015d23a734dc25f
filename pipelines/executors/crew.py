"""The workers of a Ray executor: who is asked for, who has answered, who is sent away.

Invariant: a worker is given work only after it has answered and been admitted, so one that waits for a
machine holds nothing up; what waits is what Ray's autoscaler sees as demand, and it is taken back when the
rest of the work does not need it. A worker's process may end and be made anew by Ray any number of times; it
is judged each time that it answers. Ray itself comes as an argument: tests have one of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from pipelines.elastic import Machine, Need, Starts, room, wanted
from sae_runtime.errors import CorpuscopeError, InputError, one_line

_ASK_SECONDS = 1.0  # between looks at an actor that did not answer
_LOOK_SECONDS = 5.0  # between looks at the cluster's machines
_STEADY_SECONDS = 5.0  # that a number of workers lasts before it is told
_LONELY_SECONDS = 60.0  # without any worker before that is told

Notice = Callable[[str], None]


class Gate(Protocol):
    """Says why a worker may not scan, from what it tells of itself (`pipelines.admission`)."""

    def refusal(self, told: Mapping[str, str]) -> str | None: ...


@dataclass
class _Slot:
    """A worker as the driver knows it: the same slot goes through several processes."""

    actor: Any
    away: frozenset[str]  # nodes that it is not put on
    host: str = ""
    process: tuple[str, str] = ("", "")  # with its host
    killed: tuple[str, str] = ("", "")  # the process that must not join again
    asked: Any = None  # the answer that is awaited before it joins
    ask_at: float = 0.0  # when to ask next; no use where it has joined
    joined: bool = False


class Crew:
    """Workers by number. `now` is seconds on the clock of `Starts`."""

    def __init__(
        self,
        ray: Any,
        hire: Callable[[frozenset[str]], Any],
        gate: Gate,
        notice: Notice,
        need: Need,
        most: int | None,
        machines: Callable[[], Sequence[Machine]] | None = None,
    ) -> None:
        """`hire(nodes)` makes an actor that stays away from some nodes; `most` workers there are at most.

        `machines` looks at the cluster; without it this machine is all there is, and has room for `most`.
        """
        self._ray, self._hire, self._gate, self._notice, self._need = ray, hire, gate, notice, need
        self.most, self._machines = most, machines
        self.refused: frozenset[str] = frozenset()  # nodes
        self.joined = 0
        self._slots: dict[int, _Slot] = {}
        self._numbers = count()
        self._seen: Sequence[Machine] = ()
        self._look_at = 0.0
        self._starts = Starts()
        self._ever = False  # one has joined
        self._why = ""  # the last refusal
        self._told: set[str] = set()
        self._steady: tuple[int, float] | None = None  # how many have joined, since when
        self._shown = 0  # how many people know of

    @property
    def room(self) -> int:
        """How many workers the machines that were seen last can hold."""
        return (self.most or 0) if self._machines is None else room(self._seen, self._need, self.refused)

    def actor(self, worker: int) -> Any:
        return self._slots[worker].actor

    def host(self, worker: int) -> str:
        return self._slots[worker].host

    @property
    def waiting(self) -> dict[Any, int]:
        """Workers by the answer that is awaited of them."""
        return {slot.asked: number for number, slot in self._slots.items() if slot.asked is not None}

    def keep(self, useful: int, now: float) -> None:
        """Ask for as many workers as can be used and may be had; take back what waits and is not needed."""
        if self._machines is not None and now >= self._look_at:
            self._seen, self._look_at = self._machines(), now + _LOOK_SECONDS
            self._check_hope()
        for number in [n for n, slot in self._slots.items() if not slot.joined and slot.away != self.refused]:
            self.end(number)  # it might be put on a machine that was refused since
        want = wanted(useful, self.most, self.room, len(self.refused), self._starts.failing)
        if not self._starts.held(now):
            for _ in range(want - len(self._slots)):
                self._slots[next(self._numbers)] = _Slot(self._hire(self.refused), self.refused)
        absent = [number for number, slot in reversed(self._slots.items()) if not slot.joined]
        for number in absent[: max(0, len(self._slots) - want)]:
            self.end(number)
        for slot in self._slots.values():
            if not slot.joined and slot.asked is None and now >= slot.ask_at:
                slot.asked = slot.actor.ready.remote()
        self._tell(min(want, self.room), now)

    def answered(self, worker: int, now: float) -> bool:
        """Take in an answer that is there; whether the worker has joined by it.

        Raises CorpuscopeError where no worker can be made, InputError where none may scan.
        """
        slot = self._slots[worker]
        reference, slot.asked = slot.asked, None
        try:
            told = self._ray.get(reference)
        except (self._ray.exceptions.ActorDiedError, self._ray.exceptions.RayTaskError) as error:
            self._not_made(worker, error, now)
            return False
        except self._ray.exceptions.RayError:  # it is being restarted
            slot.ask_at = now + _ASK_SECONDS
            return False
        slot.host, slot.process = told["host"], (told["host"], told["process"])
        if slot.process == slot.killed:  # it answered before the kill came
            slot.ask_at = now + _ASK_SECONDS
            return False
        self._starts.made()
        why = self._gate.refusal(told)
        if why is not None:
            self._refuse(worker, told["node"], why)
            return False
        slot.joined = self._ever = True
        self.joined += 1
        return True

    def gone(self, worker: int, kill: bool, now: float) -> None:
        """A worker's process has ended, or is to end: it joins again when the next one answers."""
        slot = self._slots[worker]
        slot.joined, slot.ask_at = False, now + (_ASK_SECONDS if kill else 0.0)
        self.joined -= 1
        if kill:
            slot.killed = slot.process
            self._ray.kill(slot.actor, no_restart=False)

    def end(self, worker: int) -> None:
        """End a worker, so that its machine can be given back."""
        slot = self._slots.pop(worker)
        self.joined -= slot.joined
        self._ray.kill(slot.actor, no_restart=True)

    def close(self) -> None:
        """End them all. Raises what Ray raises where the cluster is gone."""
        for worker in list(self._slots):
            self.end(worker)

    def _not_made(self, worker: int, error: Exception, now: float) -> None:
        self.end(worker)
        self._look_at = now
        self._starts.failed(len(self._slots), now)
        advice = "has every machine of the cluster the same corpuscope and Python?"
        if self._starts.hopeless:
            raise CorpuscopeError(f"no worker can be started: {one_line(error)}; {advice}") from error
        self._say(f"note: a worker could not be started: {one_line(error)}; {advice}")

    def _refuse(self, worker: int, node: str, why: str) -> None:
        """Send a worker away, and ask for none on its machine again."""
        self._why = f"the worker on {self._slots[worker].host} is not used: {why}"
        self.end(worker)
        self._say(f"note: {self._why}")
        self.refused |= {node}
        self._look_at = 0.0
        if self._machines is None:  # one of several GPUs
            self.most = (self.most or 1) - 1
            self._check_hope()

    def _check_hope(self) -> None:
        """InputError if workers were refused, none ever joined and no other machine is there."""
        if self.refused and not self._ever and not self.room:
            raise InputError(f"no worker may scan: {self._why}")

    def _tell(self, planned: int, now: float) -> None:
        """Say how many workers there are when that has changed for good, and when there are none for long."""
        if self._steady is None:
            self._shown = planned  # the first line of a scan says so
        if self._steady is None or self.joined != self._steady[0]:
            self._steady = self.joined, now
        if self._machines is None:
            return
        lasts = now - self._steady[1]
        if not self.joined and lasts > _LONELY_SECONDS:
            self._say(
                f"note: no worker for {_LONELY_SECONDS:.0f} s: each takes {self._need.words}, and the "
                f"cluster's {len(self._seen):,} machines have room for {self.room:,}; the scan waits"
            )
        if self.joined and self.joined != self._shown and lasts > _STEADY_SECONDS:
            self._shown = self.joined
            self._notice(f"workers: {self.joined:,} at work, {len(self._slots) - self.joined:,} asked for")

    def _say(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._notice(line)
