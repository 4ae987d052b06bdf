"""The SQL that ships with this package: `sql/` holds one relation, check or query a file."""

from functools import cache
from importlib.resources import files


@cache
def sql(name: str) -> str:
    """Return the text of `sql/<name>.sql`. In it `bare_json` is replaced by `sql/archive/bare.sql`."""
    text = (files("replay") / "sql" / f"{name}.sql").read_text(encoding="utf-8")
    return text.replace("bare_json", f"({sql('archive/bare')})") if name != "archive/bare" else text


def checks() -> list[str]:
    """Return the names of the queries that must return no rows."""
    names = (file.name for file in (files("replay") / "sql").iterdir())
    return sorted(name.removesuffix(".sql") for name in names if name.endswith(".check.sql"))
