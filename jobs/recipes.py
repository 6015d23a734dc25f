"""`corpuscope recipes` and `corpuscope recipe`: the documented queries that come with the product.

Invariant: what a recipe answers is in its .sql file alone; here names are read and rows printed.
"""

from __future__ import annotations

from typing import Any

import click

from jobs.arguments import POSITIVE
from jobs.output import count, format_option, opened, print_rows
from sae_runtime.errors import InputError

COLUMNS = ("recipe", "answers", "parameters", "needs", "here")


@click.command()
@click.argument("index")
@format_option
def recipes(index: str, format_: str) -> None:
    """The recipes: what each answers, its parameters, and whether INDEX can answer it."""
    from queries.recipe import missing
    from queries.recipe import recipes as known

    con = opened(index)
    n_saes = con.execute("SELECT count(*) FROM _declared_saes").fetchall()[0][0]
    print_rows((_row(recipe, missing(con, recipe), n_saes) for recipe in known()), format_, COLUMNS)


@click.command()
@click.argument("index")
@click.argument("name")
@click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="A parameter; may be repeated.")
@click.option("--limit", metavar="N", help="The parameter `limit`: a number of rows, or all.")
@click.option("--show", is_flag=True, help="Print the SQL instead, as it goes after `sql --script`.")
@click.option("--timeout", metavar="SECONDS", type=POSITIVE, help="Stop the query then.")
@format_option
def recipe(
    index: str,
    name: str,
    params: tuple[str, ...],
    limit: str | None,
    show: bool,
    timeout: float | None,
    format_: str,
) -> None:
    """The recipe NAME of INDEX with its parameters; `recipes` lists them."""
    from queries.lookup import column_names, rows, select, time_limit
    from queries.recipe import statement

    given: dict[str, str] = {}
    for param in (*params, *([f"limit={limit}"] if limit is not None else [])):
        key, equals, value = param.partition("=")
        if not equals:
            raise InputError(f"--param {param}: NAME=VALUE is wanted")
        if key in given:
            raise InputError(f"--param {key}: given twice")
        given[key] = value
    con = opened(index)
    sql = statement(con, name, given)
    if show:
        click.echo(sql + ";", color=True)
        return
    with time_limit(con, timeout):
        result = select(con, sql)
        print_rows(rows(result), format_, column_names(result))


def _row(recipe: Any, lacking: list[str], n_saes: int) -> dict[str, str]:
    here = "yes"
    if lacking:
        able = n_saes - len(lacking)
        here = f"for {able:,} of {count(n_saes, 'SAE')}" if able else "no"
    return {
        "recipe": recipe.name,
        "answers": recipe.title,
        "parameters": ", ".join(
            p.name if p.default is None else f"{p.name}={p.default}" for p in recipe.params
        ),
        "needs": ", ".join(need.table for need in recipe.needs),
        "here": here,
    }
