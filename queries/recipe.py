"""Recipes: documented questions with parameters, one .sql file each in queries/recipes.

A file is a head of comments (a title, what is answered, `needs:` the tables, a line for each `param`) and one
SELECT with `$names`. Invariant: what runs is what `--show` prints, the file with its parameters filled in as
literals, so that DuckDB plans with them; and nothing runs where rows that are needed were not all kept.

    -- needs: activations of sae; features
    -- param sae SAE = all: words
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import duckdb

from queries.connect import fill
from queries.lookup import resolve_sae, rows, select
from queries.relations import literal
from sae_runtime.errors import InputError

FOLDER = Path(__file__).parent / "recipes"
EVERY_TOKEN = "every counted token"
# Tables that a `keep` can leave rows out of, and those whose denominator an `exclude` can make unknown.
_KEPT: dict[str, tuple[str, Callable[[str], bool]]] = {
    "activations": ("`keep: tokens`", lambda keep: keep == "tokens"),
    "document_features": ("a `keep` other than none", lambda keep: keep != "none"),
}
_NEEDS = "needs:"
_PARAM = re.compile(r"param (\w+) (\S+)(?: = (.+?))?: (.+)")


@dataclass(frozen=True)
class Param:
    """One parameter of a recipe."""

    name: str
    type: str  # SAE, FEATURE, WIDER, DOCUMENT, COLUMN, TEXT, INTEGER, COUNT, DOUBLE, LIMIT, or words a|b|c
    # As a user would give it; `$name` is another parameter's value. None: it must be given.
    default: str | None
    words: str


@dataclass(frozen=True)
class Need:
    """A table that a recipe reads, and the parameters that name the SAEs whose rows must all be there."""

    table: str
    of: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """One file of the folder."""

    name: str
    title: str
    words: str  # what it answers, how its numbers are defined
    needs: tuple[Need, ...]
    params: tuple[Param, ...]
    sql: str  # one SELECT with $names


@lru_cache(maxsize=1)
def recipes() -> tuple[Recipe, ...]:
    """All recipes by name."""
    return tuple(_read(file) for file in sorted(FOLDER.glob("*.sql")))


def find(name: str) -> Recipe:
    """The recipe of a name. Raises InputError."""
    for recipe in recipes():
        if recipe.name == name:
            return recipe
    known = ", ".join(recipe.name for recipe in recipes())
    raise InputError(f"recipe: there is no {name!r}; there are {known}")


def run(con: duckdb.DuckDBPyConnection, name: str, params: dict[str, str]) -> duckdb.DuckDBPyConnection:
    """The result of a recipe; `params` as a user types them. Raises InputError as `statement` does."""
    return select(con, statement(con, name, params))


def statement(con: duckdb.DuckDBPyConnection, name: str, params: dict[str, str]) -> str:
    """A recipe's SELECT with its parameters filled in.

    Raises InputError for a parameter that is missing, unknown or of the wrong type, for an SAE, feature,
    document or column that the index has not, and where rows that are needed were not all kept.
    """
    recipe = find(name)
    values = _values(con, recipe, params)
    _check(con, recipe, values)
    return fill(recipe.sql, {key: _literal(value) for key, value in values.items()})


def missing(con: duckdb.DuckDBPyConnection, recipe: Recipe) -> list[str]:
    """Ids of the SAEs for which this index cannot answer, by what was kept and counted."""
    return sorted({sae for need in recipe.needs if need.of for sae in _lacking(con, need.table, None)})


def _read(file: Path) -> Recipe:
    """Parse a file. Raises ValueError for a head of another form."""
    lines = file.read_text(encoding="utf-8").splitlines()
    length = next(i for i, line in enumerate(lines) if not line.startswith("--"))
    head = [line.removeprefix("--").strip() for line in lines[:length]]
    title, words = head[0], []
    needs: list[Need] = []
    params: list[Param] = []
    for line in head[1:]:
        if line.startswith(_NEEDS):
            for item in line.removeprefix(_NEEDS).split(";"):
                table, _, of = item.strip().partition(" of ")
                needs.append(Need(table, tuple(of.split(", ")) if of else ()))
        elif line.startswith("param "):
            found = _PARAM.fullmatch(line)
            if not found:
                raise ValueError(f"{file}: {line!r} is not `param NAME TYPE [= DEFAULT]: words`")
            params.append(Param(*found.groups()))
        elif line:
            words.append(line)
    return Recipe(
        file.stem, title, " ".join(words), tuple(needs), tuple(params), "\n".join(lines[length:]).strip()
    )


def _values(con: duckdb.DuckDBPyConnection, recipe: Recipe, params: dict[str, str]) -> dict[str, Any]:
    """Each parameter's value: str, int, float, or None for `all`."""
    unknown = [name for name in params if name not in {param.name for param in recipe.params}]
    if unknown:
        known = ", ".join(param.name for param in recipe.params)
        raise InputError(f"recipe {recipe.name}: no parameter {unknown[0]!r}; there are {known}")
    absent = [param.name for param in recipe.params if param.default is None and param.name not in params]
    if absent:
        words = next(param.words for param in recipe.params if param.name == absent[0])
        raise InputError(
            f"recipe {recipe.name}: parameter {absent[0]!r} is missing ({words}): --param {absent[0]}=…"
        )
    values: dict[str, Any] = {}
    for param in recipe.params:
        given = params.get(param.name, param.default)
        assert given is not None
        if given == param.default and given.startswith("$"):
            values[param.name] = values[given[1:]]
        elif given == "all" and (param.type in ("LIMIT", "SAE") or param.default == "all"):  # NULL says it
            if param.default is None:
                raise InputError(f"recipe {recipe.name}: {param.name}=all: one SAE is wanted")
            values[param.name] = None
        else:
            values[param.name] = _value(con, recipe, param, given, values)
    return values


def _value(
    con: duckdb.DuckDBPyConnection, recipe: Recipe, param: Param, given: str, values: dict[str, Any]
) -> Any:
    where = f"recipe {recipe.name}: {param.name}={given}"
    if "|" in param.type:
        if given not in param.type.split("|"):
            raise InputError(f"{where}: one of {', '.join(param.type.split('|'))} is wanted")
        return given
    if param.type == "SAE":
        return resolve_sae(con, given)
    if param.type == "WIDER":
        return _wider(con, where, values["sae"], resolve_sae(con, given))
    if param.type == "COLUMN":
        return _column(con, where, given)
    if param.type == "DOCUMENT":
        return _document(con, where, given)
    if param.type == "TEXT":
        if not given or "\0" in given:
            raise InputError(f"{where}: a text is wanted that is not empty and has no NUL")
        return given
    if param.type == "DOUBLE":
        return _double(where, given)
    number = _integer(where, given, least=1 if param.type in ("COUNT", "LIMIT") else None)
    if param.type == "FEATURE":
        width = _ask(con, "SELECT width FROM _declared_saes WHERE sae = ?", values["sae"])[0]["width"]
        if not 0 <= number < width:
            raise InputError(f"{where}: {values['sae']} has features 0 to {width - 1}")
    return number


def _integer(where: str, given: str, least: int | None) -> int:
    words = "a whole number" + (f" from {least}" if least is not None else "") + " is wanted"
    try:
        number = int(given)
    except ValueError as error:
        raise InputError(f"{where}: {words}") from error
    if (least is not None and number < least) or not -(2**63) <= number < 2**63:
        raise InputError(f"{where}: {words}")
    return number


def _double(where: str, given: str) -> float:
    try:
        number = float(given)
    except ValueError as error:
        raise InputError(f"{where}: a number is wanted") from error
    if not math.isfinite(number):
        raise InputError(f"{where}: a finite number is wanted")
    return number


def _wider(con: duckdb.DuckDBPyConnection, where: str, narrow: str, other: str) -> str:
    site = {
        row["sae"]: (row["model"], row["site"], row["width"])
        for row in _ask(con, "SELECT sae, model, site, width FROM _declared_saes")
    }
    model, at, width = site[narrow]
    wider = [sae for sae, (m, s, w) in site.items() if (m, s) == (model, at) and w > width]
    if other not in wider:
        found = f"there are {', '.join(sorted(wider))}" if wider else "there is none"
        raise InputError(f"{where}: an SAE at the site of {narrow} is wanted that is wider; {found}")
    return other


def _column(con: duckdb.DuckDBPyConnection, where: str, given: str) -> str:
    columns = [row["column_name"] for row in _ask(con, "DESCRIBE documents")]
    for column in columns:
        if column.lower() == given.lower():
            return str(column)
    raise InputError(f"{where}: documents have no such column; there are {', '.join(columns)}")


def _document(con: duckdb.DuckDBPyConnection, where: str, given: str) -> int:
    """The key of the document that has this id or key. InputError if several have."""
    found = [
        row["document"] for row in _ask(con, "SELECT document FROM documents WHERE id = ? LIMIT 2", given)
    ]
    if re.fullmatch(r"\d{1,18}", given):
        key = int(given)
        found += [
            row["document"] for row in _ask(con, "SELECT document FROM documents WHERE document = ?", key)
        ]
    if len(set(found)) == 1:
        return int(found[0])
    if found:
        raise InputError(f"{where}: several documents have this id or key; give the key of one (`documents`)")
    raise InputError(f"{where}: no document has this id or key; `documents` lists them")


def _check(con: duckdb.DuckDBPyConnection, recipe: Recipe, values: dict[str, Any]) -> None:
    """InputError where rows, or denominators, of the SAEs in question are not all known."""
    for need in recipe.needs:
        for name in need.of:
            lacking = _lacking(con, need.table, values[name])
            if lacking:
                remedy = "" if values[name] else _remedy(con, need.table, name)
                raise InputError(f"recipe {recipe.name}: {_why(need.table, lacking)}{remedy}")


def _lacking(con: duckdb.DuckDBPyConnection, table: str, sae: str | None) -> dict[str, str]:
    """SAEs (all of them for None) that cannot answer from a table, with their `keep` or tokens left out."""
    if table == EVERY_TOKEN:
        left_out = _ask(
            con,
            "SELECT sae, (SELECT coalesce(sum(n_tokens), 0) FROM documents) - n_tokens AS n FROM saes "
            "WHERE $1 IS NULL OR sae = $1",
            sae,
        )
        return {row["sae"]: f"{row['n']:,} tokens" for row in left_out if row["n"]}
    _, answers = _KEPT[table]
    kept = _ask(con, "SELECT sae, keep FROM _declared_saes WHERE $1 IS NULL OR sae = $1", sae)
    return {row["sae"]: f"keep {row['keep']}" for row in kept if not answers(row["keep"])}


def _why(table: str, lacking: dict[str, str]) -> str:
    named = [f"{sae} ({fact})" for sae, fact in sorted(lacking.items())]
    some = ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
    if table == EVERY_TOKEN:
        return f"`exclude: norm_above` left tokens out, it is not known which: {some}"
    return f"needs every row of {table} ({_KEPT[table][0]}), not so for {some}"


def _remedy(con: duckdb.DuckDBPyConnection, table: str, param: str) -> str:
    """What to do where all SAEs were asked for."""
    lacking = _lacking(con, table, None)
    known = [row["sae"] for row in _ask(con, "SELECT sae FROM _declared_saes ORDER BY sae")]
    able = [sae for sae in known if sae not in lacking]
    return f"; give --param {param}={able[0]} or another that has them" if able else ""


def _literal(value: Any) -> str:
    return f"{value!r}::DOUBLE" if isinstance(value, float) else literal(value)


def _ask(con: duckdb.DuckDBPyConnection, sql: str, *values: Any) -> Sequence[dict[str, Any]]:
    return list(rows(con.execute(sql, list(values) or None)))
