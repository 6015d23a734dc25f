"""The whole check of an index: its files (pipelines/audit.py), then what its tables say of each other.

Tables are compared by the statements of verify_tables.sql and, SAE by SAE, of verify_saes.sql: everything
that `keep` lets be recomputed from the rows is. Invariant: what is compared is the index as it was resolved
once, by a connection that may write to a temporary folder only; memory is bounded, DuckDB spills the rest.
Measured (2026-11-22, 2 cores of a Xeon): 7.2 s for 14.9 M activations of 3 SAEs, the scan took 21 s.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from duckdb.func import ARROW

from pipelines.audit import audit
from pipelines.contents import Contents, contents
from pipelines.findings import Fault, Findings
from pipelines.schema import NEAR, sample_seed
from pipelines.storage import Store
from queries.connect import fill, opened, resolved, values
from queries.relations import literal, texts
from sae_runtime.errors import CorpuscopeError, DataError, one_line

_HERE = Path(__file__).parent
_MEMORY = "2GB"
_EXAMPLES = 3  # of a fault, that are told
_MOST = 1000  # rows of a fault that are counted
_TRIES = 3
# What DuckDB raises for files that it cannot read and numbers that no file of ours has.
_DAMAGE = (duckdb.IOException, duckdb.DataError, duckdb.InvalidInputException)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class _Statement:
    """One of a .sql file."""

    sql: str
    table: str  # "" where it prepares
    check: str
    wants: str  # what an SAE has to keep: "" | documents | rows | all rows; or "pages", where there are


def verify(
    uri: str, quick: bool = False, told: Callable[[str], None] = lambda words: None, memory: str = _MEMORY
) -> Findings:
    """Check an index. `quick` leaves out what rows say and what follows from them.

    `told` is called with what is about to be done; `memory` is DuckDB's. Raises InputError where there is no
    index that this version reads.
    """
    store = Store(uri)
    findings = audit(store, told, quick)
    if quick or not findings.whole:
        return findings
    for attempt in range(_TRIES):
        found = resolved(store)
        try:
            compared = _compared(found, told, memory)
        except (DataError, *_DAMAGE) as error:
            moved = contents(store).snapshot.number != found.snapshot.number
            if moved and attempt + 1 < _TRIES:  # a file that was merged and collected meanwhile
                continue
            findings.broken("tables", "can be read", one_line(error))
            return findings
        except duckdb.OutOfMemoryException as error:
            raise CorpuscopeError(f"verify: the tables do not fit {memory}; give --memory more") from error
        findings.faults += compared.faults
        findings.names |= compared.names
        break
    return findings


def _compared(found: Contents, told: Callable[[str], None], memory: str) -> Findings:
    findings = Findings()
    filled = values(found) | _settings(found)
    with tempfile.TemporaryDirectory(prefix="corpuscope-") as folder:
        con = opened([found], memory_limit=memory, temp_directory=folder, preserve_insertion_order=False)
        try:
            _add_functions(con)
            con.register(
                "_facts", found.facts.filter(pc.is_in(found.facts["ordinal"], pa.array(found.shown)))
            )
            con.register("_registered", _registered(found))
            for statement in _read("verify_tables.sql"):
                told(f"{statement.table} {statement.check}".strip() or "places of contexts")
                _ask(con, statement, filled, statement.table, findings)
            for sae in found.identity["saes"]:
                told(sae["id"])
                own = filled | _of(sae)
                wanted = (*_kept(sae["keep"]), *(["pages"] if found.files("pages") else []))
                for statement in _read("verify_saes.sql"):
                    if statement.wants in wanted:
                        _ask(con, statement, own, f"{statement.table} of {sae['id']}", findings)
        finally:
            con.close()
    return findings


def _ask(
    con: duckdb.DuckDBPyConnection,
    statement: _Statement,
    filled: dict[str, str],
    where: str,
    findings: Findings,
) -> None:
    if not statement.table:
        con.execute(fill(statement.sql, filled))
        return
    rows = con.execute(f"SELECT * FROM ({fill(statement.sql, filled)}) LIMIT {_MOST}").fetchall()
    shown = "; ".join(str(row[0]) for row in sorted(rows, key=str)[:_EXAMPLES])
    many = f"{len(rows):,}{' or more' if len(rows) == _MOST else ''}"
    detail = shown if len(rows) <= _EXAMPLES else f"{shown}; … ({many})"
    findings.names.add(f"{statement.table}: {statement.check}")
    if rows:
        findings.faults.append(Fault(where, statement.check, detail))


def _read(file: str) -> Iterator[_Statement]:
    """The statements of a file with the titles above them."""
    for part in (_HERE / file).read_text().split(";\n"):
        lines = part.strip().splitlines()
        notes = [line[2:].strip() for line in lines if line.startswith("--")]
        sql = "\n".join(line for line in lines if not line.startswith("--")).strip()
        title = next((note[1:].strip() for note in notes if note.startswith("#")), "")
        last = title or (notes[-1] if notes else "")
        wants = last[last.rindex("(") + 1 : -1] if last.endswith(")") else ""
        table, _, check = title.removesuffix(f"({wants})").strip().partition(": ")
        if sql:
            yield _Statement(sql, table, check, wants)


def _kept(keep: str) -> tuple[str, ...]:
    """The kinds of statements that an SAE's `keep` allows."""
    if keep == "none":
        return ("",)
    if keep == "documents":
        return ("", "documents")
    return ("", "documents", "rows", "all rows") if keep == "tokens" else ("", "documents", "rows")


def _settings(found: Contents) -> dict[str, str]:
    fixed = found.identity["fixed"]
    exclude = list(fixed["context.exclude"])
    return {
        "near": literal(NEAR),
        "bos": literal(fixed["context.bos"]),
        "overlap": literal(int(fixed["context.overlap"])),
        "skip_first": str("first" in exclude and fixed["context.bos"] is None).lower(),
        "excluded_roles": texts(word.removeprefix("role ") for word in exclude if word.startswith("role ")),
        "loud_left_out": str(any(word.startswith("norm_above ") for word in exclude)).lower(),
    }


def _of(sae: dict[str, Any]) -> dict[str, str]:
    """What the `$names` of one SAE stand for."""
    keep = str(sae["keep"])
    share = keep.removeprefix("sample ")
    return {
        "sae": literal(sae["id"]),
        "seed": literal(sample_seed(sae["id"])),
        "kept": "true" if share == keep else f"_draw(corpus, source, row) < {float(share)!r}",
    }


def _registered(found: Contents) -> pa.Table:
    """The shown units as the registry has them, and the run that scanned each."""
    runs = dict(zip(*(found.facts[name].to_pylist() for name in ("ordinal", "run")), strict=True))
    shown = set(found.shown.tolist())
    units = [unit for unit in found.units if unit.ordinal in shown]
    return pa.table(
        {
            "ordinal": pa.array([unit.ordinal for unit in units], pa.int64()),
            "corpus": pa.array([unit.corpus for unit in units], pa.string()),
            "path": pa.array([unit.path for unit in units], pa.string()),
            "start": pa.array([unit.start for unit in units], pa.int64()),
            "stop": pa.array([unit.stop for unit in units], pa.int64()),
            "run": pa.array([runs[unit.ordinal] for unit in units], pa.int32()),
        }
    )


# --- hashes, as pipelines/partials.py and sae_runtime/summaries.py have them


def _add_functions(con: duckdb.DuckDBPyConnection) -> None:
    text, whole, hash_ = "VARCHAR", "BIGINT", "UBIGINT"
    con.create_function("_place_hash", _place_hash, [text, text, whole, "INTEGER"], hash_, type=ARROW)
    con.create_function("_draw", _draw, [text, text, whole], "DOUBLE", type=ARROW)
    con.create_function("_ending", _ending, ["INTEGER[]"], whole, type=ARROW)
    con.create_function("_lot", _lot, [hash_, "INTEGER", hash_], hash_, type=ARROW)


def _digests(*columns: Any, before: str = "") -> np.ndarray:
    """uint64 blake2b-64 of each row's texts, joined by NUL."""
    rows = zip(*(column.to_pylist() for column in columns), strict=True)
    joined = (before + "\0".join(map(str, row)) for row in rows)
    return np.fromiter(
        (int.from_bytes(hashlib.blake2b(t.encode(), digest_size=8).digest(), "little") for t in joined),
        np.uint64,
        len(columns[0]),
    )


def _place_hash(corpus: Any, source: Any, row: Any, start: Any) -> pa.Array:
    return pa.array(_digests(corpus, source, row, start))


def draws(corpus: Any, source: Any, row: Any) -> np.ndarray:
    """float64: each document's number in [0, 1); `keep: {sample: r}` keeps the token rows of those below r.

    As a Python division of integers rounds it: once.
    """
    return np.array([int(n) / 2**64 for n in _digests(corpus, source, row, before="keep\0")], np.float64)


def _draw(corpus: Any, source: Any, row: Any) -> pa.Array:
    return pa.array(draws(corpus, source, row))


def _lot(seed: Any, feature: Any, place: Any) -> pa.Array:
    salt = _mixed(seed.to_numpy() + feature.to_numpy().astype(np.uint64) * _GOLDEN)
    return pa.array(_mixed(place.to_numpy() ^ salt))


def _ending(tokens: Any) -> pa.Array:
    """The lower 48 bits of the hash of each list of tokens."""
    lists = tokens.combine_chunks() if isinstance(tokens, pa.ChunkedArray) else tokens
    lengths = lists.value_lengths().to_numpy()
    flat = lists.flatten().to_numpy().astype(np.uint64) + np.uint64(1)
    starts = np.cumsum(lengths) - lengths
    value = (lengths - 1).astype(np.uint64)
    for i in range(int(lengths.max(initial=0))):
        has = i < lengths
        value[has] = _mixed(value[has] + flat[starts[has] + i] * _GOLDEN)
    return pa.array((value & np.uint64((1 << 48) - 1)).astype(np.int64))


def _mixed(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
