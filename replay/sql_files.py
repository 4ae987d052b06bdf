"""The SQL that ships with this package: `sql/` holds one relation, check or query a file."""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from string import Template

# The JSON of an event without its content, as an expression over a segment's columns.
BARE_JSON = "archive/redacted_json"


@cache
def sql(name: str) -> str:
    """Return the text of `sql/<name>.sql`. `bare_json` in it stands for BARE_JSON."""
    text = (files("replay") / "sql" / f"{name}.sql").read_text(encoding="utf-8")
    return (
        text.replace("bare_json", f"({sql('archive/redacted_json')})")
        if name != "archive/redacted_json"
        else text
    )


def substituted(name: str, values: Mapping[str, str | int | None]) -> str:
    """Return the text of `sql/<name>.sql` with literals in place of its `$parameters`, for a process that
    takes questions as text."""
    return Template(sql(name)).substitute({key: _literal(value) for key, value in values.items()})


def _literal(value: str | int | None) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return "null" if value is None else str(value)


def checks() -> list[str]:
    """Return the names of the queries that must return no rows."""
    names = (file.name for file in (files("replay") / "sql").iterdir())
    return sorted(name.removesuffix(".sql") for name in names if name.endswith(".check.sql"))
