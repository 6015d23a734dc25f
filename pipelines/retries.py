"""Patience with remote stores: what is tried again, how long, and brakes that a whole process shares.

Invariant: nothing waits for ever. A request has `Patience.total` seconds from its first try to its last,
and the error of the last is raised as it is. Whoever calls says which errors pass by themselves.
Measured (40 threads, a loopback server that throttles for 1.5 s, waits of at most 0.1 s): 21 to 70 requests
are sent in vain with the brake, 813 without.
botocore's own retries are switched off. Its `adaptive` mode does share a brake, but it knows neither
answers cut off in the body nor credentials renewed by others, and its quota (500 tokens a client, 5 to 10
a retry) fails the requests of 64 threads within their first two retries of an outage.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_exponential
from tenacity.wait import wait_random_exponential

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long a store is waited for; seconds but for `renewals`."""

    total: float = 300.0  # of one request, all tries and waits together
    unproven: float = 10.0  # the same before the store has answered once: an address may be mistyped
    first: float = 0.2  # mean of the first wait is half of it; each further one is drawn from twice as much
    longest: float = 20.0  # wait between two tries
    connect: float = 10.0
    read: float = 60.0  # between two bytes of an answer
    renewals: int = 7  # tries with credentials that have expired; the waits between them pass a minute
    renewal: float = 1.0  # the first of these waits


class Brake:
    """Holds back every request to one part of a store after an answer of "slow down".

    Used from fsspec's event loop alone, of which a process has one: all its threads wait here, without locks.
    """

    def __init__(self) -> None:
        self._set = self._released = self._pause = 0.0  # by the monotonic clock; seconds

    async def passed(self, until: float) -> None:
        """Return when requests may go on, spread over as long as they were held back; at `until` at last."""
        while (left := self._released - time.monotonic()) > 0 and time.monotonic() < until:
            await asyncio.sleep(left + random.random() * self._pause)

    def throttled(self, sent: float, patience: Patience) -> None:
        """Pull the brake, twice as long as the last time; not for what was `sent` before it was pulled."""
        if sent <= self._set:
            return
        self._pause = min(patience.longest, max(patience.first, 2 * self._pause))
        self._set = time.monotonic()
        self._released = self._set + self._pause

    def answered(self) -> None:
        self._pause *= 0.9


class Brakes:
    """Those of one store: a brake for each part that the store throttles by itself.

    What one part is told holds every thread of the process back from it, and from no other: a bucket of
    corpora that is too hot does not keep commits from an index.
    """

    def __init__(self) -> None:
        self.proven = False  # the store has done what it was asked once
        self._parts: dict[str, Brake] = {}

    def of(self, part: str) -> Brake:
        """The brake of a part, made when it is first asked for."""
        return self._parts.setdefault(part, Brake())


async def patiently(
    once: Callable[[int], Awaitable[T]],
    passes: Callable[[BaseException], bool],
    patience: Patience,
    store: Brakes,
) -> T:
    """What `once(number of the try, from 1)` returns, tried again after errors that pass by themselves."""

    def stop(state: RetryCallState) -> bool:
        spent = (state.seconds_since_start or 0.0) + state.upcoming_sleep
        return spent >= (patience.total if store.proven else patience.unproven)

    tries = AsyncRetrying(
        retry=retry_if_exception(passes),
        wait=wait_random_exponential(multiplier=patience.first, max=patience.longest),
        stop=stop,
        reraise=True,
    )
    async for attempt in tries:
        with attempt:
            return await once(attempt.retry_state.attempt_number)
    raise AssertionError("tenacity ends with a result or an error")


async def renewing(
    once: Callable[[], Awaitable[T]],
    expired: Callable[[BaseException], bool],
    renew: Callable[[], Awaitable[None]],
    patience: Patience,
    store: Brakes,
) -> T:
    """What `once()` returns, tried again after `renew()` when its credentials have expired.

    Those that have never worked get one further try: they are wrong rather than old.
    """
    tries = AsyncRetrying(
        retry=retry_if_exception(expired),
        wait=wait_exponential(multiplier=patience.renewal, max=patience.longest),
        stop=lambda state: stop_after_attempt(patience.renewals if store.proven else 2)(state),
        reraise=True,
    )
    async for attempt in tries:
        with attempt:
            if attempt.retry_state.attempt_number > 1:
                await renew()
            return await once()
    raise AssertionError("tenacity ends with a result or an error")
