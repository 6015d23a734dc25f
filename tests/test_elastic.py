"""Workers that come and go, without Ray: how many are asked for, who may scan, who is sent away.

The cluster is an imitation of Ray's few calls that the executor makes: nodes of one slot each, actors that
wait for one, answers that are there once somebody waits for them.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume import commits

from pipelines import devices, elastic
from pipelines.admission import Admission, introduce, versions
from pipelines.elastic import AHEAD, Machine, Need, Starts, room, wanted
from pipelines.executors.base import Attempted, Committed
from pipelines.executors.crew import Crew
from pipelines.executors.drive import Drive
from pipelines.scheduler import Item, Policy, Scheduler
from pipelines.storage import Store
from pipelines.version import code_version
from sae_runtime.device import device_model
from sae_runtime.errors import CorpuscopeError, InputError

ONE = Need(1, 0)

# --- arithmetic


def test_room_is_counted_machine_by_machine() -> None:
    machines = [Machine("a", 3, 0), Machine("b", 3, 2), Machine("c", 64, 1)]
    assert room(machines, Need(2, 0)) == 1 + 1 + 32  # six cores of two machines are not three workers
    assert room(machines, Need(2, 1)) == 1 + 1
    assert room(machines, Need(2, 0), {"c"}) == 2
    assert room([], ONE) == 0


@given(
    st.integers(1, 10**6),
    st.none() | st.integers(1, 200),
    st.integers(0, 5000),
    st.integers(0, 200),
    st.booleans(),
)
def test_what_is_asked_for_has_bounds(
    useful: int, most: int | None, room: int, refused: int, failing: bool
) -> None:
    want = wanted(useful, most, room, refused, failing)
    assert 1 <= want <= useful
    assert most is None or want <= most
    assert want <= max(1, room + AHEAD)
    if not failing and not refused:  # what waits is the autoscaler's demand
        assert want > room or want in (useful, most)
    if failing or refused >= AHEAD:
        assert want <= max(1, room)


@settings(max_examples=50)
@given(limit=st.integers(1, 300), boot=st.integers(1, 8), units=st.integers(1, 2000), lost=st.integers(0, 5))
def test_an_autoscaler_gives_all_that_it_may_and_gets_it_back(
    limit: int, boot: int, units: int, lost: int
) -> None:
    """Machines come `boot` steps after they are demanded, `lost` go at once later, idle ones go back."""
    machines, coming, asked, largest = 0, [0] * boot, 0, 0
    left = units
    for step in range(10_000):
        machines += coming.pop(0)
        if step == 20:
            machines = max(0, machines - lost)
        asked = wanted(left, None, machines, 0, False)
        demand = max(0, asked - machines - sum(coming))
        coming.append(min(demand, limit - machines - sum(coming)))
        working = min(asked, machines)
        largest = max(largest, working)
        machines = working  # what nobody asks for goes back
        left -= working
        if left <= 0:
            break
    assert left <= 0
    assert asked - machines <= AHEAD
    if units > 10 * limit * boot:
        assert largest == limit


def test_starts_wait_longer_each_time_and_end_after_three_rounds() -> None:
    starts = Starts()
    waits, now = [], 0.0
    for _ in range(12):
        starts.failed(1, now)
        wait = next(s / 2 for s in range(2000) if not starts.held(now + s / 2))
        waits.append(wait)
        now += wait
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]
    assert starts.failing
    assert not starts.hopeless  # somebody may still come
    starts.made()
    assert not starts.failing
    assert not starts.held(now)
    for n in range(3):
        assert not starts.hopeless
        starts.failed(0, now)
        assert starts.held(now + 2.0**n - 0.1)
        assert not starts.held(now + 2.0**n)
    assert starts.hopeless


# --- a cluster that is none


class RayError(Exception):
    pass


class ActorDiedError(RayError):
    pass


class Answer:
    """An ObjectRef: `value` is known once the call could be made."""

    def __init__(self, actor: Actor, call: Callable[[], Any]) -> None:
        self.actor, self.call, self.life = actor, call, actor.life
        self.value: Any = None
        self.there = False

    def look(self) -> bool:
        if not self.there and (self.actor.node or self.actor.dead or self.actor.life != self.life):
            self.there = True
            try:
                if self.actor.life != self.life:
                    raise RayError("restarted")
                self.value = ActorDiedError("killed") if self.actor.dead else self.call()
            except RayError as error:
                self.value = error
        return self.there


class Actor:
    def __init__(self, world: World, away: frozenset[str]) -> None:
        self.world, self.away, self.node, self.dead = world, away, "", False
        self.life, self.judged = 0, -1  # its process, and the last that answered

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.world, f"do_{name}")
        return SimpleNamespace(remote=lambda *args: Answer(self, lambda: method(self, *args)))


class World:
    """Stands for `ray`. `nodes` has what the worker of each node tells; None: none can be made there."""

    exceptions = SimpleNamespace(
        RayError=RayError,
        ActorDiedError=ActorDiedError,
        RayTaskError=type("RayTaskError", (RayError,), {}),
        OutOfMemoryError=type("OutOfMemoryError", (RayError,), {}),
    )

    def __init__(self, *devices: str | None) -> None:
        self.nodes: dict[str, dict[str, str] | None] = {}
        self.actors: list[Actor] = []
        self.made = 0
        self.used: Counter[str] = Counter()  # units by node
        self.looked: Counter[str] = Counter()  # workers that answered, by node
        self.names = (f"n{i}" for i in count())
        for device in devices:
            self.add(device)

    def add(self, device: str | None, **more: str) -> str:
        node = next(self.names)
        told = {**introduce("cpu"), "host": f"host-{node}", "process": "7", "node": node, **more}
        self.nodes[node] = None if device is None else told | {"device": device}
        return node

    def remove(self, node: str) -> None:
        del self.nodes[node]
        for actor in self.actors:
            if actor.node == node:
                actor.node = ""  # it waits for another one
                actor.life += 1

    def machines(self) -> list[Machine]:
        return [Machine(node, 1, 0) for node in self.nodes]

    def hire(self, away: frozenset[str]) -> Actor:
        self.made += 1
        self.actors.append(Actor(self, away))
        return self.actors[-1]

    def kill(self, actor: Actor, no_restart: bool) -> None:
        actor.node, actor.dead = "", no_restart
        if no_restart:
            self.actors.remove(actor)

    def wait(
        self, answers: list[Answer], num_returns: int, timeout: float
    ) -> tuple[list[Answer], list[Answer]]:
        free = [node for node in self.nodes if all(actor.node != node for actor in self.actors)]
        for actor in list(self.actors):
            node = next((node for node in free if node not in actor.away), "")
            if not actor.node and node:
                free.remove(node)
                actor.node = node
                actor.dead = self.nodes[node] is None
        ready = [answer for answer in answers if answer.look()][:num_returns]
        return ready, [answer for answer in answers if answer not in ready]

    def get(self, answer: Answer) -> Any:
        if isinstance(answer.value, Exception):
            raise answer.value
        return answer.value

    def do_ready(self, actor: Actor) -> dict[str, str]:
        self.looked[actor.node] += 1
        actor.judged = actor.life
        told = self.nodes[actor.node]
        assert told is not None
        return told

    def do_run(self, actor: Actor, work: Any, number: int) -> Any:
        if actor.judged != actor.life:
            raise RayError("it was started anew while it was idle")
        self.used[actor.node] += 1
        return SimpleNamespace(commit=actor.node, own=True, measured=(), stages={})

    def do_progress(self, actor: Actor) -> tuple[int, int]:
        return 0, 0

    def do_cancel(self, actor: Actor, number: int) -> None:
        pass


class Scan:
    """Units through Drive and Crew on a World. `watch(done)` is called after each commit."""

    def __init__(self, world: World, store: Store, mixed: bool = False, most: int | None = None) -> None:
        self.world, self.said = world, list[str]()
        gate = Admission(store, 1, mixed, self.said.append)
        self.crew = Crew(world, world.hire, gate, self.said.append, ONE, most, world.machines)
        self.done = 0

    def run(self, units: int, watch: Callable[[int], None] = lambda done: None) -> None:
        def items() -> Iterator[Item[Any]]:
            for i in range(units):
                yield Item(i, 1000, 0, SimpleNamespace(unit=SimpleNamespace(path="p", start=i, stop=i + 1)))

        def observe(event: Any) -> None:
            assert isinstance(event, Committed | Attempted)
            if isinstance(event, Committed):
                self.done += 1
                watch(self.done)

        self.scheduler: Scheduler[Any, int] = Scheduler(items(), Policy(backoff=0.01))
        Drive(self.world, self.crew, self.scheduler, units, observe).run()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Of an index, for a crew that is in a hurry."""
    monkeypatch.setattr(elastic, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr("pipelines.executors.crew._LOOK_SECONDS", 0.0)
    monkeypatch.setattr("pipelines.executors.crew._ASK_SECONDS", 0.0)
    return Store(str(tmp_path / "index"))


def test_machines_that_come_are_used_and_those_that_go_are_survived(store: Store) -> None:
    world = World("X")
    scan = Scan(world, store)

    def watch(done: int) -> None:
        if done == 20:
            world.add("X")
            world.add("X")
        if done == 60:
            assert set(world.used) == {"n0", "n1", "n2"}
            world.remove("n0")
            world.used.clear()

    scan.run(200, watch)
    assert set(world.used) == {"n1", "n2"}
    assert scan.done == 200
    assert scan.said == []
    assert devices.recorded(store) == ("X",)


def test_what_waits_is_bounded_and_taken_back_in_the_tail(store: Store) -> None:
    """Two machines, 500 units: 66 actors at first; when the last units are out nothing waits any more."""
    world = World("X", "X")
    scan = Scan(world, store)
    most, tail = 0, []

    def watch(done: int) -> None:
        nonlocal most
        most = max(most, len(world.actors))
        if done >= 498:
            tail.append((len(world.actors), world.made))

    scan.run(500, watch)
    assert most == 2 + AHEAD
    assert world.made == 2 + AHEAD  # nobody who was let go was asked for again
    assert tail[-1][0] <= 2


def test_no_more_workers_than_units_or_than_were_asked_for(store: Store) -> None:
    world = World("X", "X", "X", "X")
    Scan(world, store).run(3)
    assert world.made == 3
    world = World("X", "X", "X", "X")
    Scan(world, store, most=2).run(50)
    assert world.made == 2
    assert len(world.used) == 2


def test_another_device_is_not_used_and_its_machine_is_left_alone(store: Store) -> None:
    world = World("X", "Y", "X")
    devices.record(store, "X", 1, alone=True)
    scan = Scan(world, store)
    scan.run(300)
    assert set(world.used) == {"n0", "n2"}
    [line] = scan.said
    assert line.startswith("note: the worker on host-n1 is not used: its device is Y, the index's X; ")
    assert "model.mixed_devices" in line
    assert world.looked["n1"] == 1
    assert devices.recorded(store) == ("X",)


def test_the_first_worker_s_device_is_the_scan_s(store: Store) -> None:
    world = World("X")
    scan = Scan(world, store)
    scan.run(100, lambda done: world.add("Y") and None if done == 30 else None)
    assert set(world.used) == {"n0"}
    assert len(scan.said) == 1


def test_a_machine_that_is_replaced_by_one_of_another_device(store: Store) -> None:
    """The same actor is made anew there by Ray: it is judged again."""
    world = World("X", "X")
    scan = Scan(world, store, most=2)

    def watch(done: int) -> None:
        if done == 20:
            world.remove("n1")
            world.add("Y")

    scan.run(100, watch)
    assert "n2" not in world.used
    assert len(scan.said) == 1


def test_a_scan_ends_where_no_machine_may_scan(store: Store) -> None:
    devices.record(store, "X", 1, alone=True)
    world = World("Y", "Y")
    with pytest.raises(InputError, match=r"no worker may scan: the worker on host-n\d is not used: its de"):
        Scan(world, store).run(10)
    assert not world.used


def test_an_autoscaler_that_has_other_devices_only_is_not_asked_for_ever(store: Store) -> None:
    """A good machine is at work; each demand brings one that is refused."""
    world = World("X")
    scan = Scan(world, store)

    def watch(done: int) -> None:
        if len(world.actors) > len(world.nodes) - len(scan.crew.refused):
            world.add("Y")

    scan.run(1000, watch)
    assert AHEAD <= len(scan.crew.refused) <= AHEAD + 2  # what came while the last were judged
    assert set(world.used) == {"n0"}


def test_mixed_devices_are_used_where_the_spec_allows_and_a_warning_says_so(store: Store) -> None:
    world = World("X", "Y", "Y")
    scan = Scan(world, store, mixed=True)
    scan.run(100)
    assert set(world.used) == {"n0", "n1", "n2"}
    assert devices.recorded(store) == ("X", "Y")
    [line] = scan.said
    assert line.startswith("warning: devices are mixed (X, Y): values are not bit-equal")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"torch": "1.0"}, f"it has torch 1.0, this driver {versions()['torch']}"),
        ({"corpuscope": "0.1.0 (0)"}, f"it has corpuscope 0.1.0 (0), this driver {code_version()};"),
        ({"torch": versions()["torch"].split("+")[0] + "+other"}, "+other, the first worker"),
        ({"transformers": "1.0"}, "it has transformers 1.0"),
    ],
)
def test_other_versions_are_refused(store: Store, more: dict[str, str], words: str) -> None:
    world = World("X")
    world.add("X", **more)
    scan = Scan(world, store)
    scan.run(100)
    assert set(world.used) == {"n0"}
    [line] = scan.said
    assert line.startswith("note: the worker on host-n1 is not used: ")
    assert words in line


def test_what_is_harmless_is_named_and_what_tells_nothing_is_refused(store: Store) -> None:
    said: list[str] = []
    admission = Admission(store, 1, False, said.append)
    told = introduce("cpu") | {"host": "h"}
    assert admission.refusal(told | {"numpy": "1.0"}) is None
    assert admission.refusal(told | {"numpy": "1.0"}) is None
    assert said == [f"note: h has numpy 1.0, this driver {versions()['numpy']}"]
    del told["device"]
    assert admission.refusal(told | {"error": "torch sees no GPU there"}) == (
        "it cannot work: torch sees no GPU there"
    )
    assert "does not say" in str(admission.refusal({}))


def test_workers_that_cannot_be_made_end_a_scan_and_one_that_can_keeps_it(store: Store) -> None:
    world = World(None, None)
    with pytest.raises(CorpuscopeError, match=r"no worker can be started: .* the same corpuscope") as e:
        Scan(world, store).run(100)
    assert e.value.exit_code == 1
    world = World(None, "X")
    scan = Scan(world, store)
    scan.run(100)
    assert set(world.used) == {"n1"}
    assert len(scan.said) == 1


def test_no_machine_at_all_is_told_and_waited_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.executors.crew._LONELY_SECONDS", 0.0)
    world = World()
    scan = Scan(world, store)
    scan.said.append("")
    note = "note: no worker for 0 s: each takes 1 CPU, and the cluster's 0 machines have room for 0"
    wait = world.wait

    def until_told(*args: Any, **more: Any) -> Any:
        if any(line.startswith(note) for line in scan.said) and not world.nodes:
            world.add("X")
        return wait(*args, **more)

    monkeypatch.setattr(world, "wait", until_told)
    scan.run(5)
    assert scan.done == 5


# --- records


def test_of_two_scans_that_begin_at_once_one_fixes_the_device(store: Store) -> None:
    put = store.put_if_absent

    def late(name: str, data: bytes) -> bool:
        store.put_if_absent = put  # type: ignore[method-assign]
        assert devices.record(store, "Y", 1, alone=True) == ("Y",)
        return put(name, data)

    store.put_if_absent = late  # type: ignore[method-assign]
    assert devices.record(store, "X", 1, alone=True) == ("Y",)
    assert devices.record(store, "X", 1, alone=False) == ("Y", "X")
    assert devices.record(store, "Z", 1, alone=True) == ("Y", "X")


def test_another_device_is_refused_before_anything_is_written(
    tmp_path: Path, write_spec: Callable[..., Path], scan_inline: Callable[..., Any], few_index: Path,
    few: list[dict[str, str]], tiny_corpus: Path,
) -> None:  # fmt: skip
    """An index of this machine, grown on another one."""
    corpus, index, here = tmp_path / "corpus", tmp_path / "index", device_model("cpu")
    shutil.copytree(tiny_corpus, corpus)
    shutil.copytree(few_index, index)
    spec = write_spec(tmp_path, saes=few)
    assert devices.recorded(Store(str(index))) == (here,)
    assert {commit["device"] for commit in commits(index).values()} == {here}
    (index / "devices" / "000000.json").write_text('{"device": "Other", "run": 1}')
    assert scan_inline(spec).items == 0  # nothing to scan, nothing to refuse
    (corpus / "late.jsonl").write_text('{"id": "late", "text": "a late fox", "lang": "en"}\n')
    spec = write_spec(tmp_path, saes=few, corpus={"uri": "corpus/*.jsonl"})
    before = sorted(index.rglob("*"))
    with pytest.raises(InputError, match=r"scanned on Other, and this is .* may .*mixed_devices: true"):
        scan_inline(spec)
    assert sorted(index.rglob("*")) == before

    spec = write_spec(tmp_path, saes=few, corpus={"uri": "corpus/*.jsonl"}, model={"mixed_devices": True})
    said: list[str] = []
    assert scan_inline(spec, notice=said.append).items == 1
    assert any(line.startswith(f"warning: devices are mixed (Other, {here})") for line in said)
    assert devices.recorded(Store(str(index))) == ("Other", here)
    assert len(tiny.views(index)["documents"]) == len(tiny.views(few_index)["documents"]) + 1
