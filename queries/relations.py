"""SQL text of relations: lists of files, literal rows, and empty ones of the right columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from sae_runtime.terminal import in_bytes, plain

_SQL_TYPES = {
    "bool": "BOOLEAN",
    "int8": "TINYINT",
    "int32": "INTEGER",
    "int64": "BIGINT",
    "uint8": "UTINYINT",
    "uint64": "UBIGINT",
    "float": "FLOAT",
    "double": "DOUBLE",
    "string": "VARCHAR",
    "binary": "BLOB",
    "date32[day]": "DATE",
    "timestamp[us]": "TIMESTAMP",
}


def text(value: str) -> str:
    """A string literal. Raises ValueError for a character that no SQL text can hold."""
    if "\0" in value:
        raise ValueError(f"SQL text cannot hold the character NUL of {value[:60]!r}")
    quoted = value.replace("'", "''")
    if plain(value) == value:
        return f"'{quoted}'"
    # Printed as a script it must neither steer a terminal nor lose what a terminal would act on.
    return "E'" + in_bytes(quoted.replace("\\", "\\\\")) + "'"


def name(value: str) -> str:
    """A quoted identifier. Raises ValueError for a character that no SQL text can hold."""
    if "\0" in value:
        raise ValueError(f"SQL text cannot hold the character NUL of {value[:60]!r}")
    return '"' + value.replace('"', '""') + '"'


def texts(values: Iterable[str]) -> str:
    """A list of strings."""
    return f"[{', '.join(text(value) for value in values)}]::VARCHAR[]"


def literal(value: Any) -> str:
    """A literal of None, str, bool, int, float or a list of str. Raises TypeError for anything else."""
    if value is None:
        return "NULL"
    if isinstance(value, list):
        return texts(value)
    if isinstance(value, float):  # as text where SQL has no word for it: nan, inf
        return repr(value) if math.isfinite(value) else f"{text(repr(value))}::DOUBLE"
    if isinstance(value, int):
        return repr(value)
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no value of a column")
    return text(value)


def table(rows: Sequence[Sequence[Any]], columns: dict[str, str]) -> str:
    """A relation of literal rows; `columns` maps names to SQL types."""
    letters = [f"c{i}" for i in range(len(columns))]
    casts = ", ".join(
        f"{c}::{kind} AS {column}" for c, (column, kind) in zip(letters, columns.items(), strict=True)
    )
    lines = [", ".join(map(literal, row)) for row in rows] or [", ".join("NULL" for _ in columns)]
    values = ", ".join(f"({line})" for line in lines)
    condition = "" if rows else " WHERE false"
    return f"(SELECT {casts} FROM (VALUES {values}) AS rows({', '.join(letters)}){condition})"


def parquet(files: Sequence[str], schema: pa.Schema) -> str:
    """The rows of Parquet files, or nothing with the columns of `schema`."""
    if files:
        return f"read_parquet([{', '.join(map(text, files))}])"
    columns = ", ".join(f"NULL::{sql_type(field.type)} AS {name(field.name)}" for field in schema)
    return f"(SELECT {columns} WHERE false)"


def without(relation: str, ordinal: str, hidden: Sequence[int]) -> str:
    """A relation less the rows of some units; `ordinal` is the unit's number in terms of its columns."""
    if not hidden:
        return relation
    return f"(SELECT * FROM {relation} WHERE {ordinal} NOT IN ({', '.join(map(str, hidden))}))"


def sql_type(kind: pa.DataType) -> str:
    """DuckDB's name of an Arrow type."""
    if pa.types.is_list(kind):
        return sql_type(kind.value_type) + "[]"
    if pa.types.is_dictionary(kind):
        return sql_type(kind.value_type)
    return _SQL_TYPES[str(kind)]
