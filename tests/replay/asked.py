"""Questions in SQL to the control process, over whatever log."""

from typing import Any

from replay.answer import Answer
from rift.questions import Sql, ask


async def ask_sql(log: Any, sql: str) -> Answer:
    return Answer(**await ask(log, Sql(sql), timeout_s=10))
