"""The answers to operators' questions: SQL, `rift status`, digests."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anyio

from replay.sql_files import sql
from replay.warehouse.result import QueryResult
from rift.control.projection.warehouse_host import Projection
from rift.control.sql.frames import SqlSetup
from rift.control.sql.host import SqlHost
from rift.rpc import AskStatus, Digests, Sql

# With more invoice lines than this, an answer holds only their digest and cannot name the ones that differ.
# A line takes a quarter of a kilobyte.
LINES_MAX = 10_000


class Operators:
    """A process of its own answers SQL, so that no question can slow or end control. An installation in
    memory has no broker that another process could reach: there, `setup` is None and control answers.

    `limits` returns what holds the scaling of each model back.
    """

    def __init__(
        self,
        projection: Projection,
        setup: SqlSetup | None,
        limits: Callable[[], Awaitable[Mapping[str, str]]],
    ) -> None:
        self._projection = projection
        self._limits = limits
        self.host = None if setup is None else SqlHost(setup)

    async def run(self) -> None:
        """End the SQL process while nobody asks, and kill it when cancelled."""
        if self.host is None:
            await anyio.sleep_forever()
        else:
            await self.host.run()

    async def sql(self, question: Sql) -> object:
        if self.host is not None:
            return await self.host.ask(question.sql)
        return await self._projection.read(lambda warehouse: warehouse.query(question.sql))

    async def status(self, question: AskStatus) -> dict[str, list[dict[str, Any]]]:
        names = ("queues", "speed", "replicas", "lag")
        # The figures of a projection that stopped are old. `lag` shows how old, which is better than none.
        await self._projection.catch_up()
        results = await self._projection.read(
            lambda warehouse: warehouse.read(*((sql(f"control/status_{name}"), []) for name in names)),
            catch_up=False,
        )
        tables = {
            name: [dict(zip(result.columns, row, strict=True)) for row in result.rows]
            for name, result in zip(names, results, strict=True)
        }
        # The inputs of the policy would lack the same records.
        limits = await self._limits() if self._projection.problem is None else {}
        return {**tables, "limits": [{"model": model, "limit": limit} for model, limit in limits.items()]}

    async def digests(self, question: Digests) -> dict[str, Any]:
        digests, (positions, lines) = await self._projection.read(
            lambda warehouse: warehouse.digests(
                ("select stream, sequence from lag", []), ("from invoice_lines", [])
            )
        )
        if len(lines.rows) > LINES_MAX:
            lines = QueryResult(lines.columns, [])
        return {"positions": dict(positions.rows), "digests": digests, "invoice_lines": lines}
