"""Types of metadata columns: read off values and schemas, merged over files, and values made to fit.

Invariant: nothing is converted with a loss; a value that does not fit its frozen type is an error.
"""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa

_INT64 = range(-(1 << 63), 1 << 63)


def merge_types(types: Iterable[dict[str, str]]) -> dict[str, str]:
    """Column types over files: int64 and double give double, null gives way, other mixtures are json.

    A column that is null in every file becomes string.
    """
    merged: dict[str, str] = {}
    for each in types:
        for column, name in each.items():
            merged[column] = widen(merged.get(column, "null"), name)
    return {column: "string" if name == "null" else name for column, name in merged.items()}


def widen(one: str, other: str) -> str:
    """The type that holds values of both: double for int64 and double, json for other mixtures."""
    if one == other or other == "null":
        return one
    if one == "null":
        return other
    return "double" if {one, other} == {"int64", "double"} else "json"


def value_type(value: Any) -> str:
    """The type of a JSON value. An integer that needs more than 64 bits keeps its digits as json."""
    if isinstance(value, int) and not isinstance(value, bool):
        return "int64" if value in _INT64 else "json"
    return {bool: "bool", float: "double", str: "string", type(None): "null"}.get(type(value), "json")


def schema_type(type: pa.DataType) -> str | None:
    """The metadata type of an Arrow type; None if such values cannot be kept."""
    if isinstance(type, pa.BaseExtensionType):
        return schema_type(type.storage_type)
    if pa.types.is_dictionary(type):
        return schema_type(type.value_type)
    tests: dict[str, Callable[[Any], bool]] = {
        "null": pa.types.is_null,
        "bool": pa.types.is_boolean,
        "int64": pa.types.is_integer,
        "double": lambda t: pa.types.is_floating(t) or pa.types.is_decimal(t),
        "string": lambda t: str(t) in ("string", "large_string", "string_view"),
        "timestamp": pa.types.is_timestamp,
        "date": pa.types.is_date,
        "json": pa.types.is_nested,
    }
    return next((name for name, test in tests.items() if test(type)), None)


def convert(value: Any, name: str) -> Any:
    """A value as its frozen type. Raises ValueError or TypeError if it does not fit without loss."""
    if value is None:
        return None
    if name == "json":
        return _unicode(json.dumps(value, ensure_ascii=False, allow_nan=False, default=_json_value))
    if name == "bool" and isinstance(value, bool):
        return value
    if name == "int64" and isinstance(value, int) and not isinstance(value, bool) and value in _INT64:
        return value
    if name == "double" and isinstance(value, (int, float, decimal.Decimal)) and not isinstance(value, bool):
        number = float(value)
        if isinstance(value, int) and int(number) != value:
            raise ValueError("rounding")
        return number
    if name == "string" and isinstance(value, str):
        return _unicode(value)
    if name == "timestamp" and isinstance(value, datetime.datetime):
        return value.astimezone(datetime.timezone.utc).replace(tzinfo=None) if value.tzinfo else value
    if name == "date" and isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        return value
    raise ValueError("type")


def _json_value(value: Any) -> Any:
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return float(value)
    raise TypeError("no JSON form")


def _unicode(text: str) -> str:
    text.encode()  # JSON can escape half a surrogate pair, which no UTF-8 column holds
    return text
