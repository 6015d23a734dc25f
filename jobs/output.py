"""Printing: tables for people, json, jsonl and csv clean on stdout; messages go to stderr.

Invariant: nothing but the data reaches stdout in the machine formats; json is a list of objects.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import sys
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

FORMATS = ("table", "json", "jsonl", "csv")

format_option = click.option(
    "--format",
    "format_",
    type=click.Choice(FORMATS),
    default="table",
    show_default=True,
    help="Output: table for people, the others for programs.",
)


def console(stderr: bool = False) -> Console:
    """A console that wraps nothing when it is not a terminal."""
    out = Console(stderr=stderr, highlight=False, soft_wrap=False)
    return out if out.is_terminal else Console(stderr=stderr, highlight=False, width=200)


def message(text: str) -> None:
    """One line for people, on stderr."""
    click.echo(text, err=True)


def print_rows(rows: Sequence[dict[str, Any]], format_: str, columns: Sequence[str] | None = None) -> None:
    """Print dicts of the same keys in one of FORMATS."""
    names = list(columns or (rows[0] if rows else ()))
    if format_ == "json":
        click.echo(json.dumps([_plain(row) for row in rows], ensure_ascii=False, indent=1))
    elif format_ == "jsonl":
        for row in rows:
            click.echo(json.dumps(_plain(row), ensure_ascii=False))
    elif format_ == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            writer.writerow([_cell(row[name]) for name in names])
    else:
        print_table(rows, names)


def print_table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """A table for people: numbers right-aligned and grouped, long lists cut."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in names:
        numeric = any(isinstance(row[name], (int, float)) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_shown(row[name]) for name in names))
    console().print(table, markup=False) if not rows else console().print(table)
    if not rows:
        message("(no rows)")


def _plain(value: Any) -> Any:
    """As JSON has it: NaN and infinities are null, times ISO 8601, bytes hexadecimal."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (bytes, bytearray)):
        return value.hex()
    if isinstance(value, decimal.Decimal):
        return float(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value)


def _cell(value: Any) -> Any:
    plain = _plain(value)
    return json.dumps(plain, ensure_ascii=False) if isinstance(plain, (list, dict)) else plain


def _shown(value: Any) -> str:
    from rich.markup import escape

    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    if isinstance(value, (list, tuple)) and len(value) > 8:
        return f"[{', '.join(str(v) for v in value[:8])}, … {len(value)}]"
    text = str(_cell(value)).replace("\n", "↵")
    return escape(text if len(text) <= 400 else text[:399] + "…")
