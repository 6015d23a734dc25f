"""The scheduler alone, on a virtual clock: every item ends once, caps hold, copies are declared."""

from __future__ import annotations

import heapq
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.scheduler import Attempt, Item, Kind, Policy, Scheduler, Tried


def items(n: int, size: int = 1000, groups: int = 1) -> Iterator[Item[int]]:
    for i in range(n):
        yield Item(i, size, i * groups // n, i)


def started(scheduler: Scheduler[int, Any], now: float) -> list[Attempt[int, Any]]:
    found = []
    while (attempt := scheduler.assign(now)) is not None:
        found.append(attempt)
    return found


def crew(n: int, policy: Policy | None = None, workers: int = 2, **more: Any) -> Scheduler[int, int]:
    scheduler: Scheduler[int, int] = Scheduler(items(n), policy, **more)
    for worker in range(workers):
        scheduler.join(worker, 0.0)
    return scheduler


class World:
    """A crowd of workers on a virtual clock that checks each thing the scheduler says."""

    def __init__(self, seed: int, n: int, workers: int, policy: Policy, bad: float, slow: float) -> None:
        self.random = random.Random(seed)
        self.n, self.policy, self.bad, self.slow = n, policy, bad, slow
        self.scheduler: Scheduler[int, int] = Scheduler(items(n, groups=3), policy)
        self.now = 0.0
        self.events: list[tuple[float, int, str, Any]] = []
        self.number = 0
        self.ended: Counter[int] = Counter()
        self.failures: dict[int, Counter[str]] = {}
        self.flying: dict[int, Attempt[int, int]] = {}
        self.committed: set[int] = set()
        self.given_up: set[int] = set()
        self.begun: list[int] = []
        self.hopeless = {i for i in range(n) if self.random.random() < 0.02}  # always raise
        self.here = set(range(workers))
        for worker in self.here:
            self.at(self.random.random() * 5, "join", worker)

    def at(self, delay: float, what: str, about: Any) -> None:
        self.number += 1
        heapq.heappush(self.events, (self.now + delay, self.number, what, about))

    def run(self) -> None:
        joined: set[int] = set()
        steps = 0
        while not self.scheduler.done:
            steps += 1
            assert steps < 400 * self.n + 10_000, "no end in sight"
            for attempt in started(self.scheduler, self.now):
                self._start(attempt, joined)
            if self.scheduler.done:
                break
            wake = self.scheduler.wake(self.now)
            due = self.events[0][0] if self.events else None
            times = [t for t in (wake, due) if t is not None]
            assert times, "nothing will ever happen"
            self.now = max(self.now, min(times))
            for attempt in self.scheduler.overdue(self.now):
                least = self.policy.deadline_least
                assert self.now - attempt.started >= least - 1e-6
                self._fail(attempt, "timeout", joined, gone=True)
            while self.events and self.events[0][0] <= self.now:
                _, _, what, about = heapq.heappop(self.events)
                if what == "join":
                    assert about not in joined
                    joined.add(about)
                    self.scheduler.join(about, self.now)
                elif about.number in self.flying:
                    self._happen(about, what, joined)

    def _start(self, attempt: Attempt[int, int], joined: set[int]) -> None:
        key = attempt.item.payload
        assert attempt.worker in joined
        assert all(other.worker != attempt.worker for other in self.flying.values()), "two in one hand"
        same = [other for other in self.flying.values() if other.item.key == key]
        assert len(same) <= 1
        assert bool(same) == attempt.copy
        assert key not in self.committed | self.given_up
        if attempt.copy:  # the queue is empty
            assert len(set(self.begun)) == self.n
        if key not in self.begun:
            self.begun.append(key)
        self.flying[attempt.number] = attempt
        seconds = self.random.expovariate(1 / 20)
        if self.random.random() < self.slow:
            seconds *= 100
        draw = self.random.random()
        what = "commit"
        if key in self.hopeless:
            what = "task"
        elif draw < self.bad:
            what = self.random.choice(["task", "infra", "infra", "dead", "dead", "never"])
        if what != "never":
            self.at(seconds, what, attempt)

    def _happen(self, attempt: Attempt[int, int], what: str, joined: set[int]) -> None:
        if what != "commit":
            self._fail(attempt, "task" if what == "task" else "infra", joined, gone=what == "dead")
            return
        del self.flying[attempt.number]
        key = attempt.item.payload
        others = self.scheduler.committed(attempt.number, self.now)
        if key in self.committed | self.given_up:
            assert others is None
            return
        assert others is not None
        assert {o.number for o in others} == {o.number for o in self.flying.values() if o.item.key == key}
        self.committed.add(key)
        self.ended[key] += 1

    def _fail(self, attempt: Attempt[int, int], kind: Kind, joined: set[int], gone: bool) -> None:
        del self.flying[attempt.number]
        key = attempt.item.payload
        verdict = self.scheduler.failed(attempt.number, kind, self.now)
        over = key in self.committed | self.given_up
        assert (verdict.action == "ignored") == over
        if not over:
            counts = self.failures.setdefault(key, Counter())
            counts[kind] += 1
            spent = (
                counts["task"] + counts["timeout"] >= self.policy.task_tries
                or counts["infra"] >= self.policy.infrastructure_tries
            )
            copy = any(other.item.key == key for other in self.flying.values())
            assert verdict.action == ("wait" if copy else "given_up" if spent else "retry")
            if verdict.action == "given_up":
                self.given_up.add(key)
                self.ended[key] += 1
        if gone or verdict.restart:
            self.scheduler.leave(attempt.worker)
            joined.discard(attempt.worker)
            self.at(self.random.random() * 30, "join", attempt.worker)

    def check(self) -> None:
        assert self.ended == Counter(range(self.n)), "every item ends exactly once"
        assert self.begun == list(range(self.n)), "begun in the plan's order"
        assert self.scheduler.committed_items == len(self.committed)
        assert self.scheduler.given_up_items == len(self.given_up)
        assert self.committed.isdisjoint(self.hopeless)
        for counts in self.failures.values():
            assert counts["infra"] <= self.policy.infrastructure_tries + 1  # a copy may fail as well
            assert counts["task"] + counts["timeout"] <= self.policy.task_tries + 1


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    n=st.integers(1, 120),
    workers=st.integers(1, 12),
    bad=st.sampled_from([0.0, 0.05, 0.3, 0.8]),
    slow=st.sampled_from([0.0, 0.1]),
)
def test_every_item_ends_exactly_once(seed: int, n: int, workers: int, bad: float, slow: float) -> None:
    policy = Policy(infrastructure_tries=6, deadline_least=60.0, loading=30.0)
    world = World(seed, n, workers, policy, bad, slow)
    world.run()
    world.check()


def test_a_crowd_of_a_thousand() -> None:
    """Memory and time stay those of what is in flight: items come from a generator, one by one."""
    taken = 0

    def lazily() -> Iterator[Item[int]]:
        nonlocal taken
        for item in items(50_000):
            taken += 1
            yield item

    scheduler: Scheduler[int, int] = Scheduler(lazily())
    for worker in range(1000):
        scheduler.join(worker, 0.0)
    first = started(scheduler, 0.0)
    assert len(first) == 1000
    assert taken == 1001
    flying = [(random.Random(7 * a.number).random() * 60, a.number) for a in first]
    heapq.heapify(flying)
    began = time.monotonic()
    while not scheduler.done:
        now, number = heapq.heappop(flying)
        scheduler.committed(number, now)
        for attempt in started(scheduler, now):
            heapq.heappush(flying, (now + random.Random(attempt.number).random() * 60, attempt.number))
        assert scheduler.in_flight <= 1000
    assert scheduler.committed_items == 50_000
    assert time.monotonic() - began < 20  # some 1.5 s on 2 busy cores


def test_task_failures_go_to_another_worker_at_once_and_end_at_three() -> None:
    scheduler = crew(1, workers=4)
    seen = []
    for n in range(3):
        (attempt,) = started(scheduler, 1.0)  # time does not pass
        seen.append(attempt.worker)
        verdict = scheduler.failed(attempt.number, "task", 1.0)
        assert verdict.action == ("retry" if n < 2 else "given_up")
    assert len(set(seen)) == 3
    assert scheduler.done


def test_a_retry_waits_for_a_busy_worker_rather_than_go_back_to_the_one_it_failed_on() -> None:
    scheduler = crew(2)
    a, b = started(scheduler, 0.0)
    scheduler.failed(a.number, "task", 1.0)
    assert started(scheduler, 1.0) == []
    scheduler.committed(b.number, 2.0)
    (again,) = started(scheduler, 2.0)
    assert (again.item.key, again.worker) == (a.item.key, b.worker)
    scheduler.failed(again.number, "task", 3.0)
    assert [x.item.key for x in started(scheduler, 3.0)] == [a.item.key]  # it failed on both: anywhere


def test_infrastructure_failures_back_off_and_end_at_twenty() -> None:
    scheduler = crew(1, Policy(rest_most=0.0), workers=1)
    now, waits = 0.0, []
    while True:
        (attempt,) = started(scheduler, now)
        verdict = scheduler.failed(attempt.number, "infra", now)
        if verdict.action == "given_up":
            break
        assert started(scheduler, verdict.at - 1e-6) == []
        assert scheduler.wake(now) == verdict.at
        waits.append(verdict.at - now)
        now = verdict.at
    assert len(waits) == 19
    assert waits[:9] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert set(waits[9:]) == {300}


def test_counts_on_record_go_on_and_a_full_one_gets_one_more_try() -> None:
    tried = {0: Tried(task=2, infra=5), 1: Tried(task=3), 2: Tried(infra=19), 3: Tried(memory=3)}
    scheduler = crew(4, workers=4, tried=tried)
    actions = {}
    for attempt in started(scheduler, 0.0):
        kind: Kind = "infra" if attempt.item.key == 2 else "task"
        actions[attempt.item.key] = scheduler.failed(attempt.number, kind, 1.0).action
    assert actions == {0: "given_up", 1: "given_up", 2: "given_up", 3: "retry"}


def test_hopeless_items_are_not_tried_again_and_memory_stops_the_scan() -> None:
    scheduler = crew(2)
    a, b = started(scheduler, 0.0)
    assert scheduler.failed(a.number, "task", 1.0, hopeless=True).action == "given_up"
    now = 1.0
    for n in range(3):
        verdict = scheduler.failed(b.number, "memory", now)
        assert verdict.action == ("retry" if n < 2 else "stop")
        if n < 2:
            now = verdict.at
            (b,) = started(scheduler, now)


def test_deadlines_follow_durations_and_bytes() -> None:
    policy = Policy(loading=100.0)
    sizes = [1000] * 40 + [3000, 1000]
    scheduler: Scheduler[int, int] = Scheduler((Item(i, size, 0, i) for i, size in enumerate(sizes)), policy)
    scheduler.join(0, 0.0)
    now = 0.0
    for i in range(40):
        (attempt,) = started(scheduler, now)
        assert attempt.first == (i == 0)
        now += 200.0
        scheduler.committed(attempt.number, now)
    (large,) = started(scheduler, now)
    p95 = (large.deadline - now) / 5 / 3
    assert 200 <= p95 < 200 * 2 ** (1 / 8)  # the bin's upper edge
    assert scheduler.overdue(large.deadline - 1) == []
    assert scheduler.overdue(large.deadline) == [large]
    assert scheduler.overdue(large.deadline + 1) == []  # told once
    verdict = scheduler.failed(large.number, "timeout", large.deadline)
    assert verdict.action == "retry"
    scheduler.leave(0)
    scheduler.join(1, large.deadline)
    (again,) = started(scheduler, large.deadline)
    assert again.item.key == large.item.key
    assert again.deadline - again.started == pytest.approx(large.deadline - large.started + 100)

    fresh = crew(1)
    (attempt,) = started(fresh, 0.0)
    assert attempt.deadline == 600 + 1800  # nothing is known yet, and it has to load


def test_a_deadline_is_put_off_when_durations_turn_out_long() -> None:
    scheduler = crew(3, Policy(loading=0.0))
    a, b = started(scheduler, 0.0)
    scheduler.committed(a.number, 599.0)
    (c,) = started(scheduler, 599.0)
    assert scheduler.overdue(600.0) == []
    assert scheduler.overdue(5 * 599) == []
    assert [late.number for late in scheduler.overdue(5 * 599 * 2 ** (1 / 8))] == [b.number]
    assert c.deadline > 600


def test_stragglers_are_copied_once_slowest_first_and_the_first_commit_wins() -> None:
    scheduler = crew(6, workers=4)
    flying = started(scheduler, 0.0)
    now = 20.0
    scheduler.committed(flying[3].number, now)
    (fifth,) = started(scheduler, now)
    now = 40.0
    scheduler.committed(fifth.number, now)
    (sixth,) = started(scheduler, now)  # the queue is empty from here on
    scheduler.committed(flying[2].number, 40.0)
    (copy,) = started(scheduler, 45.0)
    assert copy.copy
    assert copy.item.key == 0
    scheduler.committed(sixth.number, 60.0)
    (other,) = started(scheduler, 60.0)
    assert other.item.key == 1
    scheduler.join(9, 61.0)
    assert started(scheduler, 10_000.0) == []  # one copy each, no more
    losers = scheduler.committed(copy.number, 10_000.0)
    assert losers is not None
    assert [x.number for x in losers] == [flying[0].number]
    assert scheduler.committed(flying[0].number, 10_001.0) is None
    assert scheduler.failed(other.number, "infra", 10_001.0).action == "wait"
    assert started(scheduler, 20_000.0) == []  # not copied again while the first goes on
    assert scheduler.failed(flying[1].number, "infra", 20_000.0).action == "retry"
    (again,) = started(scheduler, 30_000.0)
    assert not again.copy
    assert scheduler.committed(again.number, 30_001.0) == ()
    assert scheduler.done


def test_a_loser_that_is_cancelled_takes_no_blame() -> None:
    scheduler = crew(2, Policy(sick_after=1))
    a, b = started(scheduler, 0.0)
    with pytest.raises(ValueError, match="not to be dropped"):
        scheduler.dropped(a.number, 0.0)
    scheduler = crew(2)
    a, b = started(scheduler, 0.0)
    scheduler.committed(b.number, 20.0)
    (copy,) = started(scheduler, 100.0)
    assert scheduler.committed(copy.number, 110.0) == (a,)
    scheduler.dropped(a.number, 111.0)
    assert scheduler.done
    assert scheduler.in_flight == 0


def test_a_worker_that_fails_while_others_succeed_is_restarted() -> None:
    scheduler = crew(40, workers=3)
    restarts = []
    now = 0.0
    for _ in range(8):
        now += 1000.0
        for attempt in started(scheduler, now):
            if attempt.worker == 1:
                restarts.append(scheduler.failed(attempt.number, "infra", now).restart)
            else:
                scheduler.committed(attempt.number, now + 1)
    assert restarts[:3] == [False, False, True]
    assert restarts[3:6] == [False, False, True]

    alone = crew(40, workers=3)  # when all fail it is not the worker
    for n in range(4):
        assert not any(
            alone.failed(a.number, "infra", n * 1000.0).restart for a in started(alone, n * 1000.0)
        )


def test_an_outage_does_not_burn_through_the_plan() -> None:
    """Storage is gone for an hour: workers rest, so that few items are touched and none is given up."""
    scheduler = crew(10_000, workers=4)
    now, touched = 0.0, set()
    while now < 3600:
        for attempt in started(scheduler, now):
            touched.add(attempt.item.key)
            assert scheduler.failed(attempt.number, "infra", now + 0.01).action == "retry"
        wake = scheduler.wake(now)
        assert wake is not None
        now = max(now + 0.01, wake)
    assert len(touched) < 4 * 70
    assert scheduler.given_up_items == 0


def test_idle_workers_are_let_go_in_the_tail_and_enough_stay_for_what_may_come() -> None:
    scheduler = crew(5, workers=10)
    flying = started(scheduler, 0.0)
    assert scheduler.useful(5) == 7  # five in flight, and a spare for each four
    assert len(scheduler.surplus()) == 3
    for attempt in flying[:3]:
        scheduler.committed(attempt.number, 1.0)
    assert scheduler.useful(2) == 3
    let_go = scheduler.surplus()
    assert len(let_go) == 7
    for worker in let_go:
        scheduler.leave(worker)
    assert scheduler.surplus() == []
    scheduler.failed(flying[3].number, "infra", 2.0)
    assert scheduler.useful(2) == 3  # one in flight, one for its copy, one for what is tried again
    scheduler.committed(flying[4].number, 2.0)
    assert scheduler.useful(1) == 1
    (last,) = started(scheduler, 10.0)
    scheduler.committed(last.number, 11.0)
    assert scheduler.done


def test_what_a_worker_has_in_hand_must_be_settled_before_it_leaves() -> None:
    scheduler = crew(1, workers=1)
    (attempt,) = started(scheduler, 0.0)
    with pytest.raises(ValueError, match="in hand"):
        scheduler.leave(0)
    with pytest.raises(ValueError, match="joined already"):
        scheduler.join(0, 0.0)
    scheduler.failed(attempt.number, "infra", 0.0)
    scheduler.leave(0)
    with pytest.raises(ValueError, match="not joined"):
        scheduler.leave(0)
    assert started(scheduler, 100.0) == []
    scheduler.join(5, 100.0)
    assert len(started(scheduler, 100.0)) == 1
