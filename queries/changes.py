"""What a run's documents changed: features that appeared, drifted or died since the runs before it.

    appeared   active in a document of the run, and in none of earlier runs'
    drifted    active in both, in another share of documents of like lengths (q <= Q)
    died       active in earlier runs' documents and in none of this one's, where so few are none by chance
               no more often than q <= Q says

Invariant: drifted and died come from one test, `queries.diff` of the run's documents against those of all
earlier runs, with q over all features that it tests; appeared is a fact and is not tested (q is given where
it was). Documents of later runs, and such as the corpus has dropped, are in neither set. An SAE whose
document rows were not kept is named, never answered for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from queries import diff as differences
from queries import lookup
from sae_runtime.errors import DataError, InputError, one_line

Q = 0.05
CHANGES = ("appeared", "drifted", "died")
COLUMNS = ("change", "sae", "feature", "documents", "earlier_documents", "max", "earlier_max", "rate",
           "earlier_rate", "effect", "low", "high", "p", "q")  # fmt: skip


@dataclass(frozen=True)
class Changes:
    """What a run brought, against all runs before it."""

    run: int
    documents: int  # of the run, with counted tokens
    earlier_documents: int
    tested: int  # features
    min_documents: int  # in which a feature fires, of both sets together, to be tested
    counts: dict[str, dict[str, int]]  # SAE -> change -> features; of SAEs whose document rows were kept
    not_kept: tuple[str, ...]  # SAEs of which nothing can be told
    table: pa.Table  # COLUMNS, a row a change; each kind strongest first, a NULL is what was not tested

    def total(self, change: str) -> int:
        """Features of all SAEs that changed so."""
        return sum(counts[change] for counts in self.counts.values())

    def strongest(self, change: str, limit: int) -> list[dict[str, Any]]:
        """The first rows of one kind of change."""
        return list(self.table.filter(pc.field("change") == change).slice(0, limit).to_pylist())


def newest(con: duckdb.DuckDBPyConnection) -> int | None:
    """The newest run that has documents; None where there are none."""
    row = con.execute("SELECT max(run) FROM documents WHERE n_tokens > 0").fetchone()
    return None if row is None else row[0]


def changes(
    con: duckdb.DuckDBPyConnection,
    run: int,
    min_documents: int = differences.MIN_DOCUMENTS,
    told: Callable[[str], None] = lambda words: None,
) -> Changes:
    """What the documents of `run` changed against those of the runs before it.

    Of the first run with documents everything is new, and nothing is listed. Reads `document_features` twice.
    InputError where the run has no documents, or no SAE has document rows.
    """
    n, earlier = con.execute(
        "SELECT count(*) FILTER (run = $1), count(*) FILTER (run < $1) FROM documents WHERE n_tokens > 0",
        [run],
    ).fetchall()[0]
    if not n:
        raise InputError(f"run {run}: the index has no documents of it; `runs` lists what each run scanned")
    saes = con.execute("SELECT sae, keep FROM _declared_saes ORDER BY sae").fetchall()
    kept = [sae for sae, keep in saes if keep != "none"]
    not_kept = tuple(sae for sae, keep in saes if keep == "none")
    if not kept:
        raise InputError(f"run {run}: no SAE has document rows (`keep: none`), so no change can be told")
    nothing = pa.table({name: pa.nulls(0, _type(name)) for name in COLUMNS})
    if not earlier:
        counts = {sae: dict.fromkeys(CHANGES, 0) for sae in kept}
        return Changes(run, n, 0, 0, min_documents, counts, not_kept, nothing)
    found = differences.diff(con, f"run = {run}", f"run < {run}", kept, min_documents, told=told)
    con.register("_changes_tested", found.table)
    parts = [nothing]
    try:
        con.execute(_SETS, [run])
        for sae in kept:  # one at a time: a row of an SAE without rows is an error, whatever is asked of it
            told(f"{sae}, features that are active")
            parts.append(lookup.arrow_table(con.execute(_CHANGED, {"sae": sae, "q": Q})).cast(nothing.schema))
    except duckdb.Error as error:
        raise DataError(f"index: damaged: {one_line(error)}") from error
    finally:
        con.unregister("_changes_tested")
        con.execute("DROP TABLE IF EXISTS _changes_sets")
    table = _strongest_first(pa.concat_tables(parts))
    counted = table.group_by(["sae", "change"]).aggregate([([], "count_all")]).to_pylist()
    counts = {sae: dict.fromkeys(CHANGES, 0) for sae in kept}
    for row in counted:
        counts[row["sae"]][row["change"]] = row["count_all"]
    return Changes(run, n, earlier, found.tested, min_documents, counts, not_kept, table)


def _type(column: str) -> pa.DataType:
    if column in ("change", "sae"):
        return pa.string()
    return pa.int64() if column in ("feature", "documents", "earlier_documents") else pa.float64()


def _strongest_first(table: pa.Table) -> pa.Table:
    """By kind; what appeared by its documents, the rest by the bound of the effect that is nearest to 0."""
    appeared = pc.equal(table["change"], "appeared")
    bound = pc.max_element_wise(table["low"], pc.negate(table["high"]), pa.scalar(0.0))
    keys = {
        "change": table["change"],
        "strength": pc.if_else(appeared, pc.cast(table["documents"], pa.float64()), bound),
        "p": table["p"],
        "reach": pc.abs(pc.coalesce(table["max"], table["earlier_max"])),
        "sae": table["sae"],
        "feature": table["feature"],
    }
    descending = ("strength", "reach")
    order = [(key, "descending" if key in descending else "ascending") for key in keys]
    return table.take(pc.sort_indices(pa.table(keys), order))


_SETS = """
CREATE OR REPLACE TEMP TABLE _changes_sets AS
SELECT document, run = $1 AS new FROM documents WHERE n_tokens > 0 AND run <= $1
"""
_CHANGED = f"""
WITH active AS (
    SELECT
        f.sae, f.feature,
        count(*) FILTER (s.new) AS documents, count(*) FILTER (NOT s.new) AS earlier_documents,
        _furthest(max(f.max) FILTER (s.new), min(f.max) FILTER (s.new)) AS max,
        _furthest(max(f.max) FILTER (NOT s.new), min(f.max) FILTER (NOT s.new)) AS earlier_max
    FROM document_features AS f
    JOIN _changes_sets AS s ON s.document = f.document
    WHERE f.sae = $sae
    GROUP BY f.sae, f.feature
), changed AS (
    SELECT
        CASE WHEN a.earlier_documents = 0 THEN 'appeared' WHEN a.documents = 0 THEN 'died' ELSE 'drifted' END
            AS change,
        a.*, t.a_rate AS rate, t.b_rate AS earlier_rate, t.effect, t.low, t.high, t.p, t.q
    FROM active AS a
    LEFT JOIN _changes_tested AS t ON t.sae = a.sae AND t.feature = a.feature
    WHERE a.earlier_documents = 0 OR t.q <= $q
)
SELECT {", ".join(COLUMNS)} FROM changed
"""
