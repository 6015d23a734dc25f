"""Printing: tables for people, json, jsonl and csv clean on stdout; messages go to stderr.

Invariant: nothing but the data reaches stdout in the machine formats; json is a list of objects, csv
has its header even without rows. Rows are taken one by one there, so that memory does not grow with
them; a table shows TABLE_ROWS at most and says so.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from typing import Any, Literal

import click
from rich.cells import cell_len, set_cell_size
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from pipelines.words import count as count
from pipelines.words import placed as placed
from sae_runtime.errors import InputError
from sae_runtime.terminal import escaped, plain

FORMATS = ("table", "json", "jsonl", "csv")
TABLE_ROWS = 1000
_WIDE = 10_000  # columns of a console that is no terminal: lines are left whole
_CELL = 400  # characters of a table's cell
_LIST = 8  # items of a list in a table's cell
_FILLER = ("example",)  # columns that have the width which the others leave, cut rather than wrapped

format_option = click.option(
    "--format",
    "format_",
    type=click.Choice(FORMATS),
    default="table",
    show_default=True,
    help="Output: table for people, the others for programs.",
)


def uris(index: str) -> list[str]:
    """INDEX as it is given: one URI, or several with commas between them. Raises InputError for none."""
    found = [uri.strip() for uri in index.split(",") if uri.strip()]
    if not found:
        raise InputError(
            f"INDEX {index!r}: the URI of an index is wanted, or several with commas between them"
        )
    return found


def opened(index: str, views: Collection[str] | None = None) -> Any:
    """A connection to INDEX, with some views or all. Raises InputError, DataError."""
    from queries.connect import connect

    return connect(*uris(index), views=views)


def console(stderr: bool = False) -> Console:
    """A console that wraps nothing when it is not a terminal."""
    out = Console(stderr=stderr, highlight=False)
    return out if out.is_terminal else Console(stderr=stderr, highlight=False, width=_WIDE)


def in_color(out: Console) -> bool:
    """Whether shades will show: a terminal that has colours and a person who wants them."""
    return out.is_terminal and out.color_system is not None and not out.no_color


def show(view: RenderableType) -> None:
    """Print to stdout; elsewhere than on a terminal without the blanks that fill a line."""
    out = console()
    if out.is_terminal:
        out.print(view)
        return
    with out.capture() as captured:
        out.print(view)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def message(text: str) -> None:
    """One line for people, on stderr; what is in it from files and names cannot steer the terminal."""
    click.echo(plain(text), err=True)


def ago(seconds: float) -> str:
    """`5 s`, `12 min`, `3.5 h`, `2 days`."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def clock(seconds: float | None) -> str:
    """`3:07`, `1:02:45`; `?` where nobody knows."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def print_rows(rows: Iterable[dict[str, Any]], format_: str, columns: Sequence[str]) -> None:
    """Print dicts with the keys `columns` in one of FORMATS; a reader who leaves (`| head`) ends it."""
    try:
        _print_rows(rows, format_, columns)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in its buffer


def _print_rows(rows: Iterable[dict[str, Any]], format_: str, columns: Sequence[str]) -> None:
    if format_ == "json":
        _print_json(rows)
    elif format_ == "jsonl":
        for row in rows:
            click.echo(_json(row))
    elif format_ == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            writer.writerow([_cell(row[name]) for name in columns])
    else:
        shown = list(islice(rows, TABLE_ROWS + 1))
        print_table(shown[:TABLE_ROWS], columns)
        if len(shown) > TABLE_ROWS:
            message(f"(the first {TABLE_ROWS:,} rows; --format csv or jsonl gives all)")


def print_table(rows: Sequence[dict[str, Any]], names: Sequence[str], ends: str | None = None) -> None:
    """A table for people: numbers right-aligned and grouped, long lists cut.

    Of the column `ends`, of paths say, the end is shown where the others leave no room for all.
    """
    out = console()
    table = Table(box=None, header_style="bold", pad_edge=False)
    cells = {name: [_shown(row[name]) for row in rows] for name in names}
    for name in names:
        if name == ends or name in _FILLER:
            others = (max(map(cell_len, [n, *cells[n]])) + 2 for n in names if n != name)
            room = max(len(name), out.width - sum(others))
            cells[name] = [(_end if name == ends else _cut)(text, room) for text in cells[name]]
        numeric = any(isinstance(row[name], (int, float, decimal.Decimal)) for row in rows)
        justify: Literal["left", "right"] = "right" if numeric else "left"
        table.add_column(escape(plain(name)), justify=justify, overflow="fold", no_wrap=numeric)
    for values in zip(*cells.values(), strict=True):
        table.add_row(*map(escape, values))
    show(table)
    if not rows:
        message("(no rows)")


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Two columns for people, a name and what there is to say."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(escape(name), escape(plain(value)))
    show(table)


def _print_json(rows: Iterable[dict[str, Any]]) -> None:
    before = "["
    for row in rows:
        click.echo(f"{before}\n{_json(row, indent=1)}", nl=False)
        before = ","
    click.echo("[]" if before == "[" else "\n]")


def _json(row: dict[str, Any], indent: int | None = None) -> str:
    """JSON with letters as they are; what would steer a terminal is escaped, as JSON may have it."""
    return escaped(json.dumps(_plain(row), ensure_ascii=False, indent=indent))


def _plain(value: Any) -> Any:
    """As JSON has it: NaN and infinities are null, times ISO 8601, bytes hexadecimal."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
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
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if not abs(value) >= 10_000 else f"{value:,.0f}"
    if isinstance(value, (list, tuple)) and len(value) > _LIST:
        return f"[{', '.join(_shown(v) for v in value[:_LIST])}, … {len(value)}]"
    text = str(_cell(value))
    if _drawn(text):
        return plain(text, keep="\n")
    text = plain(text)
    return text if len(text) <= _CELL else text[: _CELL - 1] + "…"


def _cut(text: str, room: int) -> str:
    return text if cell_len(text) <= room else set_cell_size(text, room - 1).rstrip() + "…"


def _end(text: str, room: int) -> str:
    while cell_len(text) > room:
        text = "…" + text[2:]
    return text


def _drawn(text: str) -> bool:
    """Whether a text is a picture of boxes, such as a query plan, whose lines must stay lines."""
    return "│" in text and "╭" in text
