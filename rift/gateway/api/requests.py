"""The native routes of stored requests: read, cancel, erase, resume."""

import re

from events.schema import RequestAccepted
from rift.gateway.api.stored_requests import StoredRequests
from rift.gateway.asgi.cors import server_timing
from rift.gateway.asgi.errors import HTTPError
from rift.gateway.asgi.request import Request
from rift.gateway.completion import Completion
from rift.gateway.dialects import native
from rift.gateway.state import LogState
from rift.gateway.streams.delivery import Delivery
from rift.gateway.streams.lane_reader import LaneReader
from rift.gateway.streams.subscription import Subscription


class RequestRoutes:
    def __init__(self, state: LogState, stored: StoredRequests, delivery: Delivery) -> None:
        self._book = state.book
        self._stored = stored
        self._delivery = delivery

    async def inference(self, request: Request, id: str) -> None:
        answer = await self._stored.read(request, id)
        await request.answer(200, native.stored_inference(answer), server_timing(answer.timing()))

    async def cancel(self, request: Request, id: str) -> None:
        """Answer 202 once the cancellation is stored, or 200 if the request had ended."""
        answer = await self._stored.read(request, id)
        if answer.life.phase == "ended":
            return await request.answer(200, native.stored_inference(answer))
        # Repeating it would append the same record again.
        if answer.life.wanted is None:
            await self._delivery.cancellation.cancel_for_client(answer.id)
        await request.answer(202, native.status(answer, "cancelling"))

    async def remove(self, request: Request, id: str) -> None:
        await self._stored.erase(request, id)
        await request.answer(200, {"id": id, "object": "inference.content", "deleted": True})

    async def resume(self, request: Request, id: str) -> None:
        """Stream the same frames as live, after `Last-Event-ID` or `?after=`; 204 after the last one."""
        parsed = self._stored.verify(request, id)
        after = event_id(request)
        # Read the body before subscribing: a client that disconnects here leaves no subscription open.
        await request.drain()

        def make(lane: LaneReader, accepted: RequestAccepted) -> Subscription:
            answer = Completion.of(accepted, self._book, keep_text=False)
            return Subscription([answer], lane.client(native.NativeStream(answer), after=after))

        with self._stored.reading(request):
            lane, stream = await self._stored.attach(request, id, parsed, make)
            counted = stream.answer.life.counted
            if after > counted:
                lane.close(stream)
                message = f"after: this request has no event {after} yet; the last one is {counted}"
                raise HTTPError(400, message, code="invalid_event_id", param="after")
            if stream.is_over and after == counted:
                lane.close(stream)
                await request.start(204, b"text/event-stream")
                return await request.write(b"", more=False)
            await self._delivery.deliver(request, lane, stream, resumed=True)


def event_id(request: Request) -> int:
    """Return the id of the last event that the client has, or 0. Raises HTTPError."""
    text = request.header(b"last-event-id") or request.query().get("after") or "0"
    if not re.fullmatch(r"\d{1,9}", text):
        message = f"after: an event id has 1 to 9 digits, got {text!r}"
        raise HTTPError(400, message, code="invalid_event_id", param="after")
    return int(text)
