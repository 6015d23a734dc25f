"""The audit of an index's own files, without a database: every object that is named, and what it says.

Invariant: nothing is written, and what a healthy index may be (a scan or a compaction under way, units
dropped, merged or given up) is no fault: a file that is missing counts only if a second look still needs it.
Memory is bounded by a folder of commits, a batch of rows and some counts a unit.
Measured (2026-11-22, one core of a Xeon, local disk, 39 MB that are 17.4 M rows): 0.12 s for files and
checksums, 0.8 s with what the rows say.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import annotation_records, due, parquet, summary
from pipelines.annotation_records import Annotated
from pipelines.audit_registry import audited_plans, may_be_partial
from pipelines.audit_rows import CHECKS, Piece, RowChecks, Rule
from pipelines.contents import contents, facts_of
from pipelines.findings import Findings
from pipelines.ledger import Commit, DataFileRecord, Ledger, commit_name
from pipelines.ordinals import unpack
from pipelines.registry import Plan, Unit, live_units, objects
from pipelines.schema import (
    COMMITS,
    DATA,
    FACTS,
    INDEX,
    KEYED,
    PLANS,
    REPLACED,
    ROWS,
    RUNS,
    SCHEDULES,
    SCHEMAS,
    SUMMARIES,
    UNIT_FACTS,
    UNITS,
    VOCABULARY,
    VOCABULARY_SCHEMA,
    documents_schema,
    metadata_columns,
    metadata_type,
)
from pipelines.snapshots import Node, Run, Snapshot, newest, read_nodes, read_runs
from pipelines.staged import recorded, sizes
from pipelines.storage import Store, names
from sae_runtime.errors import DataError, InputError, one_line

Told = Callable[[str], None]

_BLOCK = 8 << 20  # bytes read at a time
_ROWS = 1 << 16  # of a batch
_OWN = ("activations", "document_features", *KEYED, "features", "top_contexts", "sampled_contexts", "saes")
_UNITS = 256  # whose commits are read at once
_HELD = 64 << 20  # bytes of a file that is read once, and not again for its rows
_COUNTED = {"documents": "documents", "quarantine": "quarantined", "contexts": "contexts"}  # in commits
_PLACE = "commits lie where they belong"
_DAMAGE = (DataError, InputError, KeyError, TypeError, ValueError, AttributeError)  # of JSON that we read


@dataclass(frozen=True)
class _Index:
    """What has been read of an index before its data."""

    rule: Rule
    groups: tuple[tuple[str, ...], ...]
    schemas: dict[str, pa.Schema]
    units: dict[int, Unit]
    runs_of: dict[int, tuple[int, ...]]  # runs that registered each unit
    partial: frozenset[int]
    retired: np.ndarray  # ordinals, ascending
    covered: np.ndarray


@dataclass(frozen=True)
class _Owner:
    """Who names a file: a commit, or a manifest."""

    name: str
    ordinal: int = -1  # of a commit


@dataclass
class _State:
    store: Store
    findings: Findings
    told: Told
    quick: bool
    missing: list[tuple[_Owner, str, str]] = field(default_factory=list)  # with kind and path
    unknown: list[tuple[int, int]] = field(default_factory=list)  # commits of units that were not registered


def audit(store: Store, told: Told = lambda words: None, quick: bool = False) -> Findings:
    """Read and check every file that the index names; `quick` leaves out what rows say.

    `told` is called with what is about to be read. Raises InputError where there is no index that this
    version reads.
    """
    state = _State(store, Findings(), told, quick)
    findings = state.findings
    identity = _identity(state)
    told("reading the registry")
    plans = audited_plans(store, findings)
    if identity is None or not findings.whole:
        return findings
    tokens = _vocabulary(state, bool(plans))
    index = _declared(state, identity, plans, tokens)
    snapshot = _snapshot(state)
    if index is None or snapshot is None:
        return findings
    runs = _manifests(state, read_runs, snapshot.runs)
    nodes = _nodes(state, snapshot.nodes)
    covered = np.sort(_ordinals(pair for run in runs for pair in run.units))
    index = _Index(**{**index.__dict__, "covered": covered})
    facts = _commits(state, index)
    _runs(state, index, runs, facts)
    _check_nodes(state, index, snapshot, nodes)
    _annotations(state, index)
    _summaries(state, plans)
    _records(state)
    _staged(state)
    _look_again(state)
    live = {unit.ordinal for unit in live_units(plans)}
    findings.units = len(live)
    whole = set(facts["ordinal"].to_pylist()) | set(covered.tolist())
    findings.committed = len(live & whole)
    return findings


# --- index.json, the vocabulary


def _identity(state: _State) -> dict[str, Any] | None:
    store, findings = state.store, state.findings
    try:
        found = json.loads(store.read(INDEX))
    except FileNotFoundError:
        if not store.entries(PLANS):
            raise InputError(f"{store.uri}: no index here (no {INDEX})") from None
        findings.broken(INDEX, "identity", "is missing")
        return None
    except ValueError:
        findings.broken(INDEX, "identity", "is not JSON")
        return None
    findings.files += 1
    if not isinstance(found, dict) or "fixed" not in found:
        findings.broken(INDEX, "identity", "does not say what the index is of")
        return None
    return Ledger(store).identity()


def _declared(state: _State, identity: dict[str, Any], plans: Sequence[Plan], tokens: int) -> _Index | None:
    """What index.json and the plans say that data must be."""
    findings = state.findings
    try:
        fixed, saes = identity["fixed"], identity["saes"]
        groups = tuple(tuple(group) for group in identity["groups"])
        types = {name: metadata_type(kind) for name, kind in fixed["metadata"].items()}
        rule = Rule(
            length=int(fixed["context.length"]),
            top_k=int(fixed["top_k"]),
            sample_k=int(fixed["sample_k"]),
            widths={sae["id"]: int(sae["width"]) for sae in saes},
            keeps={sae["id"]: str(sae["keep"]) for sae in saes},
            tokens=tokens,
            metadata=frozenset(metadata_columns(fixed["metadata"]).values()),
        )
        listed = [sae for group in groups for sae in group]
        same = sorted(listed) == sorted(fixed["saes"]) == sorted(sae["id"] for sae in saes)
        if len(rule.widths) != len(saes) or not same:
            findings.broken(INDEX, "identity", "its lists of SAEs differ")
            return None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        findings.broken(INDEX, "identity", f"does not say what the index is of ({one_line(error)})")
        return None
    try:
        partial = may_be_partial(plans)
    except DataError as error:
        findings.broken(PLANS, "plans are readable", str(error))
        return None
    runs_of: dict[int, tuple[int, ...]] = {}
    for plan in plans:
        only = (plan.run,)
        for unit in plan.units:
            before = runs_of.get(unit.ordinal)
            runs_of[unit.ordinal] = only if before is None else before + only
    return _Index(
        rule=rule,
        groups=groups,
        schemas={**SCHEMAS, **FACTS, "documents": documents_schema(types), UNITS: UNIT_FACTS},
        units={unit.ordinal: unit for plan in plans for unit in plan.units},
        runs_of=runs_of,
        partial=partial,
        retired=np.unique(_ordinals(pair for plan in plans for pair in plan.retired)),
        covered=np.empty(0, np.int64),
    )


def _vocabulary(state: _State, wanted: bool) -> int:
    """How many tokens there are."""
    store, findings = state.store, state.findings
    try:
        with store.open(VOCABULARY) as stream:
            table = parquet.opened(stream).read(use_threads=False)
    except FileNotFoundError:
        if wanted:
            findings.broken(VOCABULARY, "vocabulary", "is missing")
        return 0
    except (pa.ArrowException, OSError) as error:
        findings.broken(VOCABULARY, "vocabulary", f"cannot be read: {one_line(error)}")
        return 0
    findings.files += 1
    if not _same_columns(table.schema, VOCABULARY_SCHEMA):
        findings.broken(VOCABULARY, "vocabulary", "has other columns")
        return 0
    in_order = table["token"].to_pylist() == list(range(table.num_rows))
    findings.expect(in_order, VOCABULARY, "vocabulary", "its tokens are not 0, 1, 2, …")
    return int(table.num_rows)


# --- commits


def _commits(state: _State, index: _Index) -> pa.Table:
    """Check every commit and its files. UNIT_FACTS of the units that are committed whole."""
    facts = [UNIT_FACTS.empty_table()]
    for count, (ordinal, commits) in enumerate(_read_commits(state, index), 1):
        state.told(f"unit {count:,} of {len(index.units):,}")
        known = index.units[ordinal]
        for commit in commits:
            _commit(state, index, commit, known)
        first = commits[0]
        for commit in commits[1:]:
            same = all(
                getattr(commit, name) == getattr(first, name)
                for name in ("documents", "quarantined", "poison", "contexts", "tokens", "tokens_run", "run")
            )
            state.findings.expect(
                same, commit.name, "groups agree", f"its counts are not those of {first.name}"
            )
        if len(commits) == len(index.groups):
            facts.append(facts_of(commits))
    return pa.concat_tables(facts)


def _read_commits(state: _State, index: _Index) -> Iterator[tuple[int, list[Commit]]]:
    """Units with their commits, those that can be read and are where they belong."""
    ledger = Ledger(state.store)
    for folder in state.store.folders(COMMITS):
        found = []
        for stem in names(state.store, f"{COMMITS}/{folder}", ".json"):
            name = f"{COMMITS}/{folder}/{stem}.json"
            number, _, group = stem.partition(".")
            pair = (int(number), int(group)) if number.isdecimal() and group.isdecimal() else None
            if pair is None or commit_name(*pair) != name:
                state.findings.broken(name, _PLACE, "is no commit's name")
            elif pair[1] >= len(index.groups):
                state.findings.broken(name, _PLACE, "is of an SAE group that there is not")
            elif pair[0] not in index.units:
                state.unknown.append(pair)
            else:
                found.append(pair)
        units = [list(pairs) for _, pairs in groupby(sorted(found), key=lambda pair: pair[0])]
        for first in range(0, len(units), _UNITS):
            some = units[first : first + _UNITS]
            read = _readable(state, ledger, [pair for pairs in some for pair in pairs])
            for pairs in some:
                commits = [read[pair] for pair in pairs if pair in read]
                if commits:
                    yield pairs[0][0], commits


def _readable(state: _State, ledger: Ledger, pairs: list[tuple[int, int]]) -> dict[tuple[int, int], Commit]:
    """Commits by (ordinal, group), but for those that are damaged: a fault each."""
    try:
        found = dict(zip(pairs, ledger.read_commits(pairs), strict=True))
    except _DAMAGE as error:
        if len(pairs) > 1:  # which of them?
            return {pair: each for one in pairs for pair, each in _readable(state, ledger, [one]).items()}
        state.findings.broken(commit_name(*pairs[0]), "commits are readable", _why(error))
        return {}
    return {pair: commit for pair, commit in found.items() if _is_sound(state, commit)}


def _is_sound(state: _State, commit: Commit) -> bool:
    """Whether what a commit says can be what it is to be."""
    state.findings.files += 1
    state.findings.names |= {"commits are readable", _PLACE}
    try:
        counts = ("documents", "quarantined", "contexts", "tokens", "tokens_run", "run")
        for count in counts:
            if not isinstance(getattr(commit, count), int) or getattr(commit, count) < 0:
                raise TypeError(f"`{count}` is no count")
        for record in commit.files.values():
            _check_record(record)
    except TypeError as error:
        state.findings.broken(commit.name, "commits are readable", f"not a commit: {error}")
        return False
    return True


def _commit(state: _State, index: _Index, commit: Commit, unit: Unit) -> None:
    expect, name = state.findings.expect, commit.name
    expect(commit.unit == unit.unit, name, "commits are of their unit", f"unit id {commit.unit} is another's")
    expect(
        commit.run in index.runs_of[commit.ordinal],
        name,
        "commits are of their unit",
        f"run {commit.run} did not register unit {commit.ordinal}",
    )
    read = commit.documents + commit.quarantined
    expect(
        read == unit.documents or (read < unit.documents and commit.ordinal in index.partial),
        name,
        "documents read = indexed + quarantined",
        f"{read:,} documents of {unit.documents:,} rows of {unit.path}",
    )
    expect(commit.tokens <= commit.tokens_run, name, "counts", "more tokens are counted than were run")
    allowed = _OWN if commit.group == 0 else tuple(kind for kind in _OWN if kind not in KEYED)
    stray = sorted(set(commit.files) - set(allowed))
    expect(not stray, name, "commits are readable", f"names files of {', '.join(stray)}")
    if np.isin(commit.ordinal, index.retired):
        return
    counts = {"saes": len(index.groups[commit.group])}
    if commit.group == 0:
        counts |= {kind: getattr(commit, name) for kind, name in _COUNTED.items()}
    for kind, rows in counts.items():
        record = commit.files.get(kind)
        have = record.rows if record else 0
        expect(have == rows, name, "counts", f"{kind}: {have:,} rows where {rows:,} are to be")
    piece = Piece(np.array([commit.ordinal]), frozenset(index.groups[commit.group]), False)
    covered = bool(np.isin(commit.ordinal, index.covered))
    for kind, record in commit.files.items():
        if kind not in allowed or (covered and kind in REPLACED):
            continue
        own = f"{DATA}/{kind}/{commit.unit}.{commit.group}-{commit.attempt}.parquet"
        expect(record.path == own, name, "names of files", f"{record.path} is not {own}")
        _files(state, index, _Owner(name, commit.ordinal), piece, kind, [record])


# --- snapshots, runs and nodes


def _snapshot(state: _State) -> Snapshot | None:
    try:
        found = newest(state.store)
    except (DataError, ValueError) as error:
        state.findings.broken("snapshots", "snapshots are readable", one_line(error))
        return None
    state.findings.files += found.number >= 0
    state.findings.names.add("snapshots are readable")
    return found


def _manifests(
    state: _State, read: Callable[[Store, Sequence[str]], list[Any]], names: Iterable[str]
) -> list[Any]:
    """Runs or nodes by name; one that cannot be read is a fault."""
    found = []
    for name in names:
        try:
            [manifest] = read(state.store, [name])
            for records in manifest.files.values():
                for record in records:
                    _check_record(record)
        except FileNotFoundError:
            state.missing.append((_Owner(name), "", name))
        except _DAMAGE as error:
            state.findings.broken(name, "manifests are readable", _why(error))
        else:
            state.findings.files += 1
            state.findings.names.add("manifests are readable")
            found.append(manifest)
    return found


def _nodes(state: _State, names: Sequence[str]) -> list[Node]:
    """Nodes and all that are below them."""
    found: list[Node] = []
    seen: set[str] = set()
    level = list(names)
    while level:
        seen |= set(level)
        nodes = _manifests(state, read_nodes, level)
        found += nodes
        level = list(dict.fromkeys(child for node in nodes for child in node.children if child not in seen))
    return found


def _runs(state: _State, index: _Index, runs: Sequence[Run], facts: pa.Table) -> None:
    """Check runs against each other, the registry and the commits; and their files."""
    expect = state.findings.expect
    facts = facts.sort_by("ordinal")
    committed = facts["ordinal"].to_numpy()
    taken = np.empty(0, np.int64)
    for run in runs:
        state.told(f"run {run.name}")
        units, gone = unpack(run.units), unpack(run.gone)
        inside = np.union1d(units, gone)
        apart = len(inside) == len(units) + len(gone) and not np.isin(inside, taken).any()
        expect(apart, run.name, "runs are apart", "has units twice, or of another run")
        taken = np.union1d(taken, inside)
        given_up = np.isin(gone, index.retired).all()
        expect(bool(given_up), run.name, "runs are apart", "leaves out units that are not given up")
        unknown = inside[~np.isin(inside, committed)]
        detail = f"{len(unknown):,} of its units have no commit that can be read: unit {unknown[:1].tolist()}"
        expect(not len(unknown), run.name, "runs hold committed units", detail)
        stray = sorted(set(run.files) - {*ROWS, *KEYED, UNITS})
        expect(not stray, run.name, "manifests are readable", f"names files of {', '.join(stray)}")
        piece = Piece(np.sort(units), frozenset(index.rule.widths), True)
        for kind, records in run.files.items():
            if kind in (*ROWS, *KEYED):
                _files(state, index, _Owner(run.name), piece, kind, records)
        known = _facts(state, index, run)
        if known is None:
            continue
        same = np.array_equal(known["ordinal"].to_numpy(), inside)
        expect(same, run.name, "what runs know of units", "its table of units is not of its units")
        both = known.filter(pc.is_in(known["ordinal"], pa.array(committed)))
        told = facts.take(pa.array(np.searchsorted(committed, both["ordinal"].to_numpy())))
        unequal = [name for name in UNIT_FACTS.names if not both[name].equals(told[name])]
        detail = f"{', '.join(unequal)} of units are not what their commits say"
        expect(not unequal, run.name, "what runs know of units", detail)


def _facts(state: _State, index: _Index, run: Run) -> pa.Table | None:
    """A run's table of units by ordinal; None where it cannot be read."""
    found = [UNIT_FACTS.empty_table()]
    for record in run.files.get(UNITS, ()):
        if not _files(state, index, _Owner(run.name), Piece(np.empty(0), frozenset(), True), UNITS, [record]):
            return None
        with state.store.open(record.path) as stream:
            found.append(parquet.opened(stream).read(use_threads=False).select(UNIT_FACTS.names))
    return pa.concat_tables(found).sort_by("ordinal")


def _check_nodes(state: _State, index: _Index, snapshot: Snapshot, nodes: Sequence[Node]) -> None:
    expect = state.findings.expect
    tops = sorted((node for node in nodes if node.name in snapshot.nodes), key=lambda node: node.first)
    for before, node in pairwise(tops):
        expect(before.stop <= node.first, node.name, "nodes are apart", f"overlaps {before.name}")
    by_name = {node.name: node for node in nodes}
    for node in nodes:
        state.told(f"node {node.name}")
        for child in (by_name[name] for name in node.children if name in by_name):
            inside = node.first <= child.first and child.stop <= node.stop
            expect(inside, node.name, "nodes are apart", f"was merged from {child.name}, which is outside")
        stray = sorted(set(node.files) - (set(SUMMARIES) - {"sampled_contexts"}))
        expect(not stray, node.name, "manifests are readable", f"names files of {', '.join(stray)}")
        ordinals = np.array(sorted(o for o in index.units if node.first <= o < node.stop), np.int64)
        piece = Piece(ordinals, frozenset(index.rule.widths), True)
        for kind, records in node.files.items():
            if kind in SUMMARIES:
                _files(state, index, _Owner(node.name), piece, kind, records)


# --- what is told of schedules and runs


def _records(state: _State) -> None:
    """Check that records of due times and of what runs changed can be read; data do not depend on them."""
    state.told("schedules and runs")
    store, findings = state.store, state.findings
    for attempt in due.attempts(store):
        findings.files += 1
        try:
            due.read(store, *attempt)
            why = ""
        except DataError as error:
            why = _why(error) if attempt in due.attempts(store) else ""  # else a gc has removed it
        findings.expect(not why, f"{SCHEDULES}/{attempt[0]}", "schedules are readable", why)
    for item in (f"{RUNS}/{name}.json" for name in names(store, RUNS, ".json") if name.endswith("/changes")):
        findings.files += 1
        try:
            [record] = objects(store, [item])
            why = "" if f"{RUNS}/{record.get('run'):06d}/changes.json" == item else "is of another run"
        except _DAMAGE as error:
            why = _why(error)
        findings.expect(not why, item, "changes are readable", why)


# --- annotations


def _annotations(state: _State, index: _Index) -> None:
    """Check the files of annotations that hold, and that they are of features that there are."""
    state.told("annotations")
    try:
        record = annotation_records.newest(state.store)
        for each in record.files:
            _check_record(each.file)
    except _DAMAGE as error:
        state.findings.broken("annotations", "annotations are readable", _why(error))
        return
    if record.number < 0:
        return
    name = annotation_records.record_name(record.number)
    state.findings.files += 1
    strange = sorted({sae for each in record.files for sae, _ in each.keys} - set(index.rule.widths))
    state.findings.expect(
        not strange, name, "annotations are readable", f"is of {', '.join(strange[:3])}, which there is not"
    )
    piece = Piece(np.empty(0), frozenset(), True)
    for each in record.files:
        readable = _files(state, index, _Owner(name), piece, each.kind, [each.file])
        if readable and not state.quick:
            _annotated_rows(state, index, each)


def _staged(state: _State) -> None:
    """Check that what workers would fetch is as long as it was; what is missing they have from the hub."""
    try:
        there = sizes(state.store)
        for file in recorded(state.store).values():
            ok = there.get(file.name, file.bytes) == file.bytes
            told = f"{there.get(file.name)} bytes, not {file.bytes}; remove it"
            state.findings.expect(ok, file.name, "staged files are whole", told)
            state.findings.files += 1
    except DataError as error:
        state.findings.expect(False, "staged", "staged files are whole", one_line(error))


def _annotated_rows(state: _State, index: _Index, each: Annotated) -> None:
    """Check that rows of one file are of features that there are, and that all that hold are there."""
    path, check = each.file.path, f"{each.kind}: rows"
    names = ["sae", "source"] if each.kind == "explanations" else ["sae"]
    number = {"feature_tokens": "logit", "feature_neighbours": "cosine", "feature_decoders": "norm"}
    found: set[tuple[str, str]] = set()
    with state.store.open(path) as stream:
        for batch in parquet.opened(stream).iter_batches(_ROWS, use_threads=False):
            table = pa.Table.from_batches([batch])
            for row in table.group_by(names).aggregate([("feature", "min"), ("feature", "max")]).to_pylist():
                sae = row["sae"]
                found.add((sae, row.get("source", "")))
                inside = row["feature_min"] >= 0 and row["feature_max"] < index.rule.widths.get(sae, 0)
                state.findings.expect(inside, path, check, f"a feature that {sae} does not have")
            if each.kind in number:
                finite = pc.all(pc.is_finite(table[number[each.kind]])).as_py()
                state.findings.expect(bool(finite), path, check, f"{number[each.kind]} is not finite")
    lost = sorted(set(each.keys) - found)
    state.findings.expect(not lost, path, check, f"no rows of {lost[:1]}, whose rows it is to have")


# --- data files


def _files(
    state: _State, index: _Index, owner: _Owner, piece: Piece, kind: str, records: Iterable[DataFileRecord]
) -> bool:
    """Check the files of a kind of one piece; whether they can be read."""
    checks = RowChecks(index.rule, piece, kind) if kind in SCHEMAS or kind == "documents" else None
    group = 0
    good = True
    for record in records:
        try:
            with state.store.open(record.path) as stream:
                content = _held(stream)
                whole = _bytes(state, record, content)
                file = _footer(state, record, content, index.schemas[kind]) if whole else None
                good &= file is not None
                if file is None or checks is None or state.quick:
                    continue
                checks.next_file()
                _rows(state, record, file, checks, kind, group)
                group += file.metadata.num_row_groups
        except FileNotFoundError:
            state.missing.append((owner, kind, record.path))
            good = False
        except InputError as error:
            state.findings.broken(owner.name, "names of files", str(error))
            good = False
    return good


def _held(stream: IO[bytes]) -> IO[bytes]:
    """A file from its start, in memory unless it is large: remote ones are then fetched once."""
    data = stream.read(_HELD)
    if len(data) < _HELD:
        return io.BytesIO(data)
    stream.seek(0)
    return stream


def _bytes(state: _State, record: DataFileRecord, stream: IO[bytes]) -> bool:
    """Whether a file is, byte for byte, what its record says."""
    findings = state.findings
    digest, size = hashlib.blake2b(digest_size=16), 0
    while block := stream.read(_BLOCK):
        digest.update(block)
        size += len(block)
    findings.files += 1
    findings.bytes += size
    findings.names |= {"size", "checksum"}
    if size != record.bytes:
        findings.broken(record.path, "size", f"{size:,} bytes where {record.bytes:,} were written")
        return False
    if digest.hexdigest() != record.digest:
        findings.broken(record.path, "checksum", f"{digest.hexdigest()}, not {record.digest}")
        return False
    return True


def _footer(
    state: _State, record: DataFileRecord, stream: IO[bytes], schema: pa.Schema
) -> pq.ParquetFile | None:
    """The Parquet file, if it can be read and has the rows and columns that it should."""
    findings = state.findings
    stream.seek(0)
    findings.names |= {"rows", "columns"}
    try:
        dictionary = ["sae"] if pa.types.is_dictionary(schema.field("sae").type) else []
    except KeyError:
        dictionary = []
    try:
        file = parquet.opened(stream, dictionary)
    except (pa.ArrowException, OSError) as error:
        findings.broken(record.path, "columns", f"is no Parquet file: {one_line(error)}")
        return None
    rows = file.metadata.num_rows
    findings.rows += rows
    if not _same_columns(file.schema_arrow, schema):
        findings.broken(record.path, "columns", f"has {', '.join(file.schema_arrow.names)}")
        return None
    findings.expect(rows == record.rows, record.path, "rows", f"{rows:,} where {record.rows:,} were written")
    if record.spans is not None:
        findings.names.add("spans")
        findings.expect(_spans(file) == record.spans, record.path, "spans", "are not those of its row groups")
    return file


def _spans(file: pq.ParquetFile) -> dict[str, tuple[int, int]]:
    """SAE -> its lowest and highest feature, as the footer has them."""
    names = file.schema_arrow.names
    found: dict[str, tuple[int, int]] = {}
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        sae, feature = (group.column(names.index(name)).statistics for name in ("sae", "feature"))
        if sae is not None and feature is not None and sae.has_min_max and feature.has_min_max:
            lowest, highest = found.get(sae.min, (feature.min, feature.max))
            found[sae.min] = min(lowest, feature.min), max(highest, feature.max)
    return found


def _rows(
    state: _State, record: DataFileRecord, file: pq.ParquetFile, checks: RowChecks, kind: str, group: int
) -> None:
    findings = state.findings
    findings.names |= {f"{kind}: {check}" for check in CHECKS.get(kind, ())}
    said: dict[tuple[str, str], int] = {}
    try:
        for number in range(file.metadata.num_row_groups):
            for batch in file.iter_batches(_ROWS, [number], use_threads=False):
                for check, detail in checks.take(batch, group + number):
                    said[check, detail] = said.get((check, detail), 0) + 1
    except (pa.ArrowException, OSError) as error:
        findings.broken(record.path, "columns", f"cannot be read: {one_line(error)}")
    told: set[str] = set()
    for check, detail in said:
        if check not in told:  # the first of each: one damage often shows in every batch after it
            told.add(check)
            findings.expect(False, record.path, f"{kind}: {check}", detail)


def _look_again(state: _State) -> None:
    """What was missing is a fault where the index, resolved again, needs it still."""
    if not state.missing and not state.unknown:
        return
    try:
        now = contents(state.store)
    except (FileNotFoundError, *_DAMAGE):  # a fault already
        for owner, _, path in state.missing:
            state.findings.broken(path, "files are there", f"is missing; {owner.name} names it")
        return
    known = set(now.registered.known.tolist())
    for pair in state.unknown:
        if pair[0] not in known:  # else a scan has registered it meanwhile
            state.findings.broken(commit_name(*pair), _PLACE, "is of a unit that there is not")
    nodes, level = set(now.snapshot.nodes), list(now.snapshot.nodes)
    while level:
        present = [name for name in level if state.store.exists(name)]
        level = [c for node in read_nodes(state.store, present) for c in node.children if c not in nodes]
        nodes |= set(level)
    named = nodes | set(now.snapshot.runs)
    covered, retired = set(now.covered.tolist()), set(now.registered.retired.tolist())
    for owner, kind, path in state.missing:
        if kind in FACTS:
            needed = path in now.annotations.paths
        elif owner.ordinal < 0:
            needed = owner.name in named
        else:
            needed = owner.ordinal not in retired and not (owner.ordinal in covered and kind in REPLACED)
        if needed:
            state.findings.broken(path, "files are there", f"is missing; {owner.name} names it")


def _summaries(state: _State, plans: Sequence[Plan]) -> None:
    """Check what attempts at runs say of themselves: no row depends on it."""
    runs = {plan.run for plan in plans if plan.kind == "scan"}
    for name in summary.paths(state.store):
        try:
            found = summary.read_one(state.store, name)
        except (DataError, FileNotFoundError) as error:
            state.findings.broken(name, "summaries of runs", _why(error))
            continue
        state.findings.files += 1
        known = found.run in runs or found.run > max((plan.run for plan in plans), default=0)
        state.findings.expect(known, name, "summaries of runs", f"there is no run {found.run}")


# --- small things


def _why(error: Exception) -> str:
    """What is wrong with JSON that cannot be used, less what the fault says already: where."""
    text = one_line(error)
    return text.split("damaged", 1)[-1].lstrip(":, ") if isinstance(error, DataError) else f"not ours: {text}"


def _check_record(record: DataFileRecord) -> None:
    """TypeError unless a file's record is one."""
    texts, numbers = (record.path, record.digest), (record.rows, record.bytes)
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(n, int) for n in numbers):
        raise TypeError("a file's record")
    for sae, span in (record.spans or {}).items():
        if not (isinstance(sae, str) and all(isinstance(number, int) for number in span)):
            raise TypeError("a file's record")


def _same_columns(found: pa.Schema, wanted: pa.Schema) -> bool:
    return [(f.name, _plain(f.type)) for f in found] == [(f.name, _plain(f.type)) for f in wanted]


def _plain(kind: pa.DataType) -> str:
    """A type without what Parquet does not keep: names of list entries, dictionaries."""
    if pa.types.is_list(kind):
        return f"[{_plain(kind.value_type)}]"
    return str(kind.value_type if pa.types.is_dictionary(kind) else kind)


def _ordinals(pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    return unpack(list(pairs))
