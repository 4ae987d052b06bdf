"""The answer to a request that the log holds: its subscription, and how the answer starts."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from msgspec.structs import replace

from events import ids
from events.schema import Parameters, RequestAccepted
from rift.gateway.asgi.errors import Headers
from rift.gateway.asgi.request import Request
from rift.gateway.completion import Completion
from rift.gateway.dialects import dialect as dialects
from rift.gateway.dialects.sampling import ParsedRequest
from rift.gateway.state import LogState
from rift.gateway.streams.delivery import Delivery
from rift.gateway.streams.lane_reader import LaneReader
from rift.gateway.streams.lane_registry import LaneRegistry
from rift.gateway.streams.subscription import Subscription

Answer = Callable[[], Awaitable[None]]


class Responder:
    def __init__(self, state: LogState, lanes: LaneRegistry, delivery: Delivery) -> None:
        self._book = state.book
        self._histories = state.histories
        self._lanes = lanes
        self._delivery = delivery

    def subscribe(self, parsed: ParsedRequest, choices: Sequence[RequestAccepted]) -> Subscription:
        """Return a subscription for the client of a new request. The own lane's reader must open it."""
        return self._subscribe(self._lanes.own, parsed, choices)

    def _subscribe(
        self, lane: LaneReader, parsed: ParsedRequest, choices: Sequence[RequestAccepted]
    ) -> Subscription:
        dialect = dialects.of(parsed.kind)
        keep = not parsed.stream or dialect.streams_text
        answers = [Completion.of(accepted, self._book, keep_text=keep) for accepted in choices]
        format = dialect.stream(answers, parsed) if parsed.stream else None
        return Subscription(answers, lane.client(format))

    async def attach(
        self, request: Request, parsed: ParsedRequest, choices: Sequence[RequestAccepted]
    ) -> Subscription | None:
        """Follow a request, or group, from its first event; None unless the log holds every choice.

        Raises ClientGone, HTTPError (429), LogError.
        """
        requests = [ids.parsed(accepted.request) for accepted in choices]
        lane = await self._lanes.of(requests[0].at.shard, requests[0].at.lane)

        async def attach(bytes_max: float) -> Subscription | None:
            return await lane.attach(requests, partial(self._subscribe, lane, parsed), bytes_max=bytes_max)

        subscription = await self._histories.in_turn(request, choices[0].account, attach)
        if subscription is not None and len(subscription.answers) < len(choices):
            lane.close(subscription)
            return None
        return subscription

    def answer(
        self, request: Request, parsed: ParsedRequest, subscription: Subscription, headers: Headers = ()
    ) -> Answer:
        """Return a function that sends the answer, or at once the status of a background request.

        It keeps nothing large of the body. It raises HTTPError, LogError.
        """
        light = replace(parsed, input="", more=(), parameters=Parameters())
        return partial(self._respond, request, light, subscription, headers)

    async def _respond(
        self, request: Request, parsed: ParsedRequest, subscription: Subscription, headers: Headers
    ) -> None:
        answer = subscription.answer
        request.answer_about(answer.accepted)
        at = ids.parsed(answer.id).at
        lane = await self._lanes.of(at.shard, at.lane)
        if parsed.background and not parsed.stream:
            lane.release_client(subscription)
            background = dialects.of(parsed.kind).background
            assert background is not None, "only these APIs parse `background`"
            await request.answer(*background(answer), headers)
            return
        await self._delivery.deliver(request, lane, subscription, resumed=False, headers=headers)
