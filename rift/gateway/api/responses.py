"""The routes of stored responses (OpenAI's API): read, replay, cancel, erase."""

import re

import anyio

from events.schema import RequestAccepted
from rift.gateway.api.stored_requests import StoredRequests
from rift.gateway.asgi.errors import HTTPError
from rift.gateway.asgi.request import Request
from rift.gateway.completion import Completion
from rift.gateway.dialects.responses_response import ResponsesStream, encode_logprobs, response
from rift.gateway.state import LogState
from rift.gateway.streams.delivery import Delivery
from rift.gateway.streams.lane_reader import LaneReader
from rift.gateway.streams.subscription import Subscription

# The answer to a cancellation waits this long for the response to end. A worker needs a fraction of a second.
CANCELLED_S = 3.0


class ResponseRoutes:
    """`stored` has only responses."""

    def __init__(self, state: LogState, stored: StoredRequests, delivery: Delivery) -> None:
        self._book = state.book
        self._stored = stored
        self._delivery = delivery

    async def response(self, request: Request, id: str) -> None:
        """Answer with the object or, with `?stream=true`, its events after number `starting_after`."""
        if not request.asks("stream"):
            return await request.answer(200, response(await self._stored.read(request, id)))
        after = request.query().get("starting_after", "-1")
        if not re.fullmatch(r"-1|\d{1,9}", after):
            message = f"starting_after: an event's number has 1 to 9 digits, got {after!r}"
            raise HTTPError(400, message, code="invalid_value", param="starting_after")
        # Read the body before subscribing: a client that disconnects here leaves no subscription open.
        await request.drain()
        self._stored.verify(request, id)
        with self._stored.reading(request):
            lane, stream = await self._attach(request, id, after=int(after))
            await self._delivery.deliver(request, lane, stream, resumed=True)

    async def cancel(self, request: Request, id: str) -> None:
        self._stored.verify(request, id)
        with self._stored.reading(request):
            lane, stream = await self._attach(request, id)
            try:
                if not stream.is_over and stream.answer.life.wanted is None:
                    await self._delivery.cancellation.cancel_for_client(stream.answer.id)
                with anyio.move_on_after(CANCELLED_S):
                    await stream.wait_for_end()
            finally:
                lane.close(stream)
            await encode_logprobs(stream.answer)
        await request.answer(200, response(stream.answer))

    async def remove(self, request: Request, id: str) -> None:
        await self._stored.erase(request, id)
        await request.answer(200, {"id": id, "object": "response", "deleted": True})

    async def _attach(
        self, request: Request, id: str, *, after: int | None = None
    ) -> tuple[LaneReader, Subscription]:
        """Attach to the events after number `after` or, without it, to the end only."""

        def make(lane: LaneReader, accepted: RequestAccepted) -> Subscription:
            answer = Completion.of(accepted, self._book, keep_text=True)
            format = None if after is None else ResponsesStream(answer, after=after)
            return Subscription([answer], lane.client(format))

        return await self._stored.attach(request, id, self._stored.verify(request, id), make)
