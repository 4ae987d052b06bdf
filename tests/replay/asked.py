"""Questions in SQL to the control process, over whatever log."""

from typing import Any

from replay.warehouse.result import QueryResult
from rift.rpc import Sql, ask


async def ask_sql(log: Any, sql: str) -> QueryResult:
    return QueryResult(**await ask(log, Sql(sql), timeout_s=10))
