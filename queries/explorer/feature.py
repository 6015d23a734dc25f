"""The page of a feature: what it is active on, how often, and what is like it.

Invariant: statistics and highest contexts are what `lookup.feature` gives the command of that name; samples
are those of the view `sampled_contexts`, whole strata at a time.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from queries import lookup
from queries.explorer import charts
from queries.explorer.sae import all_saes
from queries.explorer.web import Answer, Ask, page
from queries.relations import name as identifier
from queries.relations import text
from sae_runtime.errors import InputError

TOP = 20  # highest contexts that are shown
_VALUES = 30  # of a metadata column
_NO_GROUPS = ("document", "id", "row", "n_tokens")  # columns of documents that make no groups


def feature(ask: Ask) -> Answer:
    """Values of `feature.html`."""
    sae, number = ask.sae(), ask.integer("feature")
    found = lookup.feature(ask.con, sae, number, ask.integer("k", TOP, 1, 1000))
    [facts] = [row for row in all_saes(ask) if row["sae"] == sae]
    shades = ask.choice("shades", ("feature", "context"), "feature")
    contexts = found["contexts"]
    bins = charts.activation_bins(found["histogram"] or [])
    columns = [r["column_name"] for r in ask.rows("DESCRIBE documents") if r["column_name"] not in _NO_GROUPS]
    by = ask.choice("by", columns, columns[0])
    return {
        "title": f"{sae} {number}",
        "found": found,
        "facts": facts,
        "highest": max((abs(each["activation"]) for each in contexts), default=0.0),
        "shades": shades,
        "chart": charts.bars(bins, "from", "to", "tokens", "activation (absolute)", "tokens")
        if bins
        else None,
        "columns": columns,
        "by": by,
        "groups": _groups(ask, sae, number, by) if facts["keep"] != "none" else None,
        "saes": [each["id"] for each in ask.snapshot.saes],
        "statement": f"FROM top({text(sae)}, {number}, {TOP})",
        "before": number - 1 if number else None,
        "after": number + 1 if number + 1 < facts["width"] else None,
    }


def samples(ask: Ask) -> Answer:
    """The sampled contexts of each stratum: a part of its own, since it costs as much as the rest."""
    sae, number = ask.sae(), ask.integer("feature")
    [facts] = [row for row in all_saes(ask) if row["sae"] == sae]
    if number >= facts["width"]:
        raise InputError(f"feature: {sae} has features 0 to {facts['width'] - 1}, not {number}")
    found = lookup.samples(ask.con, sae, number)
    strata = [
        {"stratum": stratum, "of": rows[0]["stratum_contexts"], "contexts": rows}
        for stratum, rows in ((key, list(group)) for key, group in groupby(found, lambda r: r["stratum"]))
    ]
    return {
        "title": f"{sae} {number}",
        "sae": sae,
        "number": number,
        "shades": ask.choice("shades", ("feature", "context"), "feature"),
        "highest": ask.number("highest") or max((abs(each["activation"]) for each in found), default=0.0),
        "strata": strata,
    }


def _groups(ask: Ask, sae: str, number: int, column: str) -> list[dict[str, Any]]:
    """Documents by a column's values, and how many of each the feature is active in."""
    return ask.rows(
        f"""
        SELECT d.{identifier(column)}::VARCHAR AS value, count(*) AS documents, count(f.document) AS active,
            count(f.document) / count(*) AS rate, coalesce(sum(f.n_tokens), 0)::BIGINT AS tokens
        FROM documents AS d
        LEFT JOIN (
            SELECT document, n_tokens FROM document_features WHERE sae = $1 AND feature = $2
        ) AS f ON f.document = d.document
        GROUP BY ALL ORDER BY documents DESC, value LIMIT {_VALUES}
        """,
        [sae, number],
    )


def cofiring(ask: Ask) -> Answer:
    """Features of an SAE, or of all, that fire in the same documents; on demand, since it takes a while."""
    from queries.recipe import statement

    sae, number = ask.sae(), ask.integer("feature")
    other = ask.sae("other") if ask.text("other") not in ("", "all") else ask.text("other") or sae
    asked = {"sae": sae, "feature": str(number), "other": other, "limit": "20"}
    sql = statement(ask.con, "cofiring_documents", asked)
    result = lookup.select(ask.con, sql)
    return {
        "title": f"{sae} {number}",
        "names": lookup.column_names(result),
        "rows": list(lookup.rows(result)),
        "sae": sae,
        "number": number,
        "other": other,
        "saes": [each["id"] for each in ask.snapshot.saes],
        "statement": sql,
    }


ROUTES = [
    page("/feature", feature, "feature.html"),
    page("/feature/samples", samples, "samples.html"),
    page("/feature/cofiring", cofiring, "cofiring.html"),
]
