"""Checks of the registry: plans by themselves and one after the other.

Invariant: what passes gives every unit one ordinal for good, and the live units of a file share no row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import yaml

from pipelines.findings import Findings
from pipelines.ordinals import Ranges, unpack
from pipelines.registry import Plan, Unit, live_units, read_plan, unit_id
from pipelines.schema import PLANS
from pipelines.storage import Store, names
from sae_runtime.errors import DataError
from sae_runtime.yamls import Loader


def audited_plans(store: Store, findings: Findings) -> list[Plan]:
    """The plans that can be read, each checked by itself and against those before it."""
    plans: list[Plan] = []
    for number, stem in enumerate(names(store, PLANS, ".json")):
        name = plan_name(number)
        if stem != f"{number:06d}":
            findings.broken(PLANS, "plans are numbered", f"{stem}.json where {number:06d}.json is to be")
            return plans
        try:
            plan = read_plan(store, name)
        except DataError as error:
            findings.broken(name, "plans are readable", str(error).split(": ", 1)[-1])
            return plans
        findings.files += 1
        findings.expect(plan.run == number + 1, name, "plans are numbered", f"says it is run {plan.run}")
        plans.append(plan)
    for detail in _history(plans):
        findings.broken(*detail)
    for name in ("plans are readable", "units are what they say", "ordinals", "dropped units"):
        findings.names.add(name)
    for detail in _live(plans):
        findings.expect(False, *detail)
    findings.names.add("live units")
    return plans


def plan_name(number: int) -> str:
    """Where the plan of a number, from 0, lies."""
    return f"{PLANS}/{number:06d}.json"


def may_be_partial(plans: Sequence[Plan]) -> frozenset[int]:
    """Ordinals of units of which not every row is read: their source is sampled. Raises DataError."""
    found = set()
    for plan in plans:
        sampled = _sampled(plan)
        sources = {(f.corpus, f.path, f.digest, f.settings): f.source for f in plan.files}
        found |= {u.ordinal for u in plan.units if sources[u.corpus, u.path, u.digest, u.settings] in sampled}
    return frozenset(found)


def _sampled(plan: Plan) -> set[int]:
    """Numbers of the sources that a plan's spec samples."""
    if plan.kind != "scan":
        return set()
    try:
        corpus = yaml.load(plan.spec, Loader)["corpus"]
        sources = corpus if isinstance(corpus, list) else [corpus]
        return {i for i, source in enumerate(sources) if source.get("sample") is not None}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{plan_name(plan.run - 1)}: damaged, its spec cannot be read") from error


def _history(plans: Sequence[Plan]) -> Iterator[tuple[str, str, str]]:
    """What is wrong with a plan, given those before it."""
    known: dict[int, Unit] = {}
    live: set[int] = set()
    retired: set[int] = set()
    ids: dict[str, int] = {}
    for number, plan in enumerate(plans):
        name = plan_name(number)
        if plan.kind not in ("scan", "gc"):
            yield name, "plans are readable", f"is of kind {plan.kind!r}"
        if plan.kind == "gc" and (plan.units or plan.files or plan.dropped):
            yield name, "plans are readable", "is of gc, and names units or files"
        rows = {(f.corpus, f.path, f.digest, f.settings): f.rows for f in plan.files}
        for unit in plan.units:
            place = unit.corpus, unit.path, unit.digest, unit.settings
            where = f"unit {unit.ordinal} ({unit.path} rows {unit.start} to {unit.stop})"
            if unit.unit != unit_id(*place, unit.start, unit.stop):
                yield name, "units are what they say", f"{where}: its id is of other rows or another file"
            if not 0 <= unit.start < unit.stop <= rows[place]:
                yield name, "units are what they say", f"{where}: the file has {rows[place]} rows"
            if unit.ordinal == len(known):
                if ids.get(unit.unit, -1) in live:
                    yield name, "ordinals", f"{where}: is there already, as unit {ids[unit.unit]}"
            elif known.get(unit.ordinal) != unit:
                yield name, "ordinals", f"{where}: the next free ordinal is {len(known)}"
            elif unit.ordinal in live or unit.ordinal in retired:
                yield name, "ordinals", f"{where}: comes back, and was not dropped, or was given up"
            known[unit.ordinal] = unit
            ids[unit.unit] = unit.ordinal
            live.add(unit.ordinal)
        dropped, given_up = _set(plan.dropped), _set(plan.retired)
        if not dropped <= live:
            yield name, "dropped units", f"drops {_some(dropped - live)}, which the corpus did not have"
        live -= dropped
        if given_up & live or given_up & retired or not given_up <= known.keys():
            yield name, "dropped units", "gives up units that were not dropped, or were given up already"
        retired |= given_up


def _live(plans: Sequence[Plan]) -> Iterator[tuple[str, str, str]]:
    """What is wrong with the units that the newest plan leaves."""
    newest = next((plan for plan in reversed(plans) if plan.kind == "scan"), None)
    if newest is None:
        return
    name = plan_name(newest.run - 1)
    places = {(f.corpus, f.path, f.digest, f.settings) for f in newest.files}
    before: Unit | None = None
    for unit in sorted(live_units(plans), key=lambda u: (u.corpus, u.path, u.start)):
        if (unit.corpus, unit.path, unit.digest, unit.settings) not in places:
            yield (
                name,
                "live units",
                f"unit {unit.ordinal} is of {unit.path} as the corpus has it no more",
            )
        same = before is not None and (before.corpus, before.path) == (unit.corpus, unit.path)
        if before is not None and same and unit.start < before.stop:
            yield name, "live units", f"units {before.ordinal} and {unit.ordinal} share rows of {unit.path}"
        before = unit


def _set(ranges: Ranges) -> set[int]:
    return set(unpack(ranges).tolist())


def _some(ordinals: set[int]) -> str:
    listed = sorted(ordinals)
    return f"units {', '.join(map(str, listed[:3]))}{', …' if len(listed) > 3 else ''}"
