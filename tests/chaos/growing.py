"""An installation that begins with one shard and goes on with more, and what must not change by that."""

import json
from pathlib import Path
from typing import Any

import anyio

from events import subjects
from tests.chaos.rig import Rig

BILLS = (
    "select request_id, finish_reason, prompt_tokens, output_tokens, attempts, charge_nanousd "
    "from requests where finish_reason is not null order by request_id"
)


class Growing(Rig):
    """It begins with one shard. `grow` opens the others, once a cycle on the first one has been checked."""

    def __init__(self, folder: Path, *, engine: str, workers: int, shards: int = 1) -> None:
        super().__init__(folder, engine=engine, workers=workers)
        self._shards_max = max(3, shards)
        self._before: list[dict[str, Any]] | None = None
        self._position = ""

    @property
    def may_grow(self) -> bool:
        return self._before is not None and self.shards < self._shards_max

    async def grow(self) -> None:
        """Open the other shards, and start a gateway for each. Raises RigBroken."""
        first, self.shards = self.shards, self._shards_max
        for _ in range(first, self.shards):
            await self.rift("shards", "add")
        async with anyio.create_task_group() as tasks:
            for shard in range(first, self.shards):
                tasks.start_soon(self.add_gateway, "--shard", str(shard))

    async def problems(self) -> list[str]:
        """Compare every bill with a replay, and those from before the growth with what they were then."""
        if self._before is None:
            stream = subjects.shard_stream(0)
            self._position = f"{stream}:{await self.log.last_sequence(stream)}"
            self._before = await self.sql(BILLS)
            return []
        await self.rift("replay", "--verify")
        known = {row["request_id"] for row in self._before}
        now = [row for row in await self.sql(BILLS) if row["request_id"] in known]
        past = json.loads(await self.rift("replay", "--json", "--until", self._position, BILLS))
        return [
            f"{name} are not those of before: {rows}"
            for name, rows in (("the bills", now), ("the bills by replay of the past", past))
            if rows != self._before
        ]
