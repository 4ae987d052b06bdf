"""The result of a query: columns and rows of values that JSON can carry."""

import datetime
import math
from collections.abc import Mapping
from typing import Any

import msgspec

from replay.errors import ReplayError


class QueryRefused(ReplayError):
    """The query is rejected; the message gives the reason and the limit."""


class QueryResult(msgspec.Struct, frozen=True):
    columns: list[str]
    rows: list[list[Any]]


def plain(value: Any) -> Any:
    """Return a value for JSON: integers exactly, values that JSON cannot represent as text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    return str(value)
