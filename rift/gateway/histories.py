"""Read the histories of stored requests for clients, long ones in turns of their accounts."""

import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

from events.ids import RequestId
from events.log import Log
from events.request_history import HistoryReader, HistoryTooLong, sliced
from events.schema import RequestAccepted
from rift.gateway.asgi.parse_turns import HistoryTurns
from rift.gateway.asgi.request import Request
from rift.gateway.bounds import Bound
from rift.gateway.completion import Completion

# An answer of 8,000 tokens without logprobs has about this many bytes in the log.
SHORT_BYTES = 1024 * 1024

Result = TypeVar("Result")


class Histories(HistoryReader):
    def __init__(self, log: Log) -> None:
        super().__init__(log)
        self._turns = HistoryTurns()

    def bounds(self) -> list[Bound]:
        return self._turns.bounds()

    async def in_turn(
        self, request: Request, account: str, read: Callable[[float], Awaitable[Result]]
    ) -> Result:
        """Call `read` with the most bytes that a history may have. If one has more, call it again in a turn
        of the account, without this limit: a client that waits holds nothing of its history.

        Raises ClientGone, HTTPError (429), and what `read` raises.
        """
        try:
            return await read(SHORT_BYTES)
        except HistoryTooLong:
            await request.drain()
        async with self._turns.take(account, request.disconnected):
            return await read(math.inf)

    async def completion(
        self,
        id: RequestId,
        make: Callable[[RequestAccepted | None], Completion],
        encode: Callable[[Completion], Awaitable[None]] | None,
        *,
        bytes_max: float,
    ) -> Completion:
        """Return a request with its answer so far, encoded. Raises as `read`, and what `make` raises."""
        past = await self.read(id, bytes_max=bytes_max)
        answer = make(past.accepted)
        async for counted in sliced(past.counted):
            answer.add(counted.event, counted.life, counted.stored_at_ns)
        if encode is not None:
            await encode(answer)
        return answer
