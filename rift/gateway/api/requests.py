"""A request that is there: its answer so far, its stream again, its end. Of the native route and of
`/v1/responses`, which are two ways to show the same."""

import re

import anyio

from events import encryption, ids, subjects
from events.book import Book
from events.ids import RequestId
from events.log import Log
from events.request_history import HistoryReader
from events.schema import RequestAccepted
from rift.gateway.admission.auth import Authenticator
from rift.gateway.asgi.cors import server_timing
from rift.gateway.asgi.errors import FINAL, HTTPError
from rift.gateway.asgi.request import Request
from rift.gateway.completion import Completion
from rift.gateway.dialects import native, responses_response
from rift.gateway.streams.delivery import Delivery
from rift.gateway.streams.lane_registry import LaneRegistry
from rift.gateway.streams.subscription import Subscription

# Who cancels a response is shown its end, if that comes soon: a worker needs a fraction of a second.
CANCELLED_S = 3.0


class RequestRoutes:
    def __init__(
        self,
        log: Log,
        relays: LaneRegistry,
        histories: HistoryReader,
        auth: Authenticator,
        delivery: Delivery,
        *,
        book: Book,
        secret: bytes,
    ) -> None:
        self._log = log
        self._relays = relays
        self._histories = histories
        self._auth = auth
        self._delivery = delivery
        self._book = book
        self._secret = secret

    # --- the native route ------------------------------------------------------------------------------

    async def inference(self, request: Request, match: re.Match[str]) -> None:
        answer = await self._read(request, match[1])
        await request.answer(200, native.stored_inference(answer), server_timing(answer.timing()))

    async def cancel(self, request: Request, match: re.Match[str]) -> None:
        """202: the log knows of the wish; 200: the request had ended."""
        answer = await self._read(request, match[1])
        if answer.life.phase == "ended":
            return await request.answer(200, native.stored_inference(answer))
        await self._delivery.cancellation.cancel(answer.id, "client")
        await request.answer(202, native.status(answer, "cancelling"))

    async def remove(self, request: Request, match: re.Match[str]) -> None:
        await self._remove(request, match[1])
        await request.answer(200, {"id": match[1], "object": "inference.content", "deleted": True})

    async def resume(self, request: Request, match: re.Match[str]) -> None:
        """Stream the frames behind `Last-Event-ID` or `?after=`, the same as live; 204 behind the last."""
        parsed = self._verified(request, match[1])
        after = event_id(request)
        # Before there is a stream, which has to be let go of whatever comes of its client.
        await request.body()
        relay = await self._relays.of(parsed.at.shard, parsed.at.lane)

        def make(there: list[RequestAccepted]) -> Subscription:
            answer = Completion.of(there[0], self._book, keep_text=False)
            format = native.NativeStream(answer)
            return Subscription([answer], relay.client(format, after=after))

        stream = await relay.attach([parsed], make)
        if stream is None:
            raise _unknown(match[1])
        counted = stream.answer.life.counted
        if after > counted:
            relay.close(stream)
            message = f"event {after} of this request does not exist yet; the last one is {counted}"
            raise HTTPError(400, message, code="invalid_event_id", param="after")
        if stream.is_over and after == counted:
            relay.close(stream)
            await request.start(204, b"text/event-stream")
            await request.write(b"", more=False)
            return
        await self._delivery.deliver(request, relay, stream, resumed=True)

    # --- responses -------------------------------------------------------------------------------------

    async def response(self, request: Request, match: re.Match[str]) -> None:
        """The object, or with `?stream=true` its events behind number `starting_after`."""
        query = request.query()
        if query.get("stream") != "true":
            answer = await self._read(request, responses_response.request_id(match[1]), shown=match[1])
            return await request.answer(200, responses_response.response(_of_kind(answer, match[1])))
        after = query.get("starting_after", "-1")
        if not re.fullmatch(r"-1|\d{1,9}", after):
            message = f"starting_after: {after!r} is no number of an event"
            raise HTTPError(400, message, code="invalid_value", param="starting_after")
        await request.body()
        stream = await self._attach(request, match[1], after=int(after))
        at = ids.parsed(stream.answer.id).at
        relay = await self._relays.of(at.shard, at.lane)
        await self._delivery.deliver(request, relay, stream, resumed=True)

    async def cancel_response(self, request: Request, match: re.Match[str]) -> None:
        stream = await self._attach(request, match[1])
        if not stream.is_over:
            await self._delivery.cancellation.cancel(stream.answer.id, "client")
        with anyio.move_on_after(CANCELLED_S):
            await stream.wait_for_end()
        at = ids.parsed(stream.answer.id).at
        (await self._relays.of(at.shard, at.lane)).close(stream)
        await request.answer(200, responses_response.response(stream.answer))

    async def remove_response(self, request: Request, match: re.Match[str]) -> None:
        await self._remove(request, responses_response.request_id(match[1]), shown=match[1])
        await request.answer(200, {"id": match[1], "object": "response", "deleted": True})

    async def _attach(self, request: Request, shown: str, *, after: int | None = None) -> Subscription:
        """Attach to a response: to its events after number `after`, or to its end (None)."""
        parsed = self._verified(request, responses_response.request_id(shown), shown=shown)
        relay = await self._relays.of(parsed.at.shard, parsed.at.lane)

        def make(there: list[RequestAccepted]) -> Subscription:
            answer = Completion.of(there[0], self._book, keep_text=True)
            format = None if after is None else responses_response.ResponsesStream(answer, after=after)
            return Subscription([answer], relay.client(format))

        stream = await relay.attach([parsed], make)
        if stream is None:
            raise _unknown(shown)
        if stream.answer.accepted.kind != "response":
            relay.close(stream)
            raise _unknown(shown)
        return stream

    # --- both -------------------------------------------------------------------------------------------

    async def _read(self, request: Request, text: str, *, shown: str = "") -> Completion:
        past = await self._histories.read(self._verified(request, text, shown=shown))
        if past.accepted is None:
            raise _unknown(shown or text)
        answer = Completion.of(past.accepted, self._book, keep_text=True)
        for counted in past.counted:
            answer.add(counted.event, counted.life, counted.stored_at_ns)
        return answer

    async def _remove(self, request: Request, text: str, *, shown: str = "") -> None:
        """Erase the key of a request's content: of a group, the content of all. The facts stay."""
        accepted = (await self._histories.read(self._verified(request, text, shown=shown))).accepted
        if accepted is None or (shown and accepted.kind != "response"):
            raise _unknown(shown or text)
        if accepted.sealed is None:
            message = (
                "this request is not sealed, so its content goes with the log's retention; sealed are those "
                "with `store` false, and all where the installation has set `seal_content`"
            )
            raise HTTPError(409, message, code="content_not_sealed", headers=FINAL)
        if (secret := await encryption.secret(self._log, accepted.sealed)) is None:
            return
        pasts = await self._histories.read_all([ids.parsed(each) for each in secret.requests])
        if any(past.life.phase == "open" for past in pasts):
            message = "the request has not ended; cancel it, or wait for its end, then remove its content"
            raise HTTPError(409, message, code="request_not_ended")
        await self._log.erase(subjects.SECRETS, accepted.sealed)

    def _verified(self, request: Request, text: str, *, shown: str = "") -> RequestId:
        issued = self._auth.authenticate(request)
        parsed = ids.verified(text, secret=self._secret, account=issued.account)
        if parsed is None:
            raise _unknown(shown or text)
        return parsed


def _of_kind(answer: Completion, shown: str) -> Completion:
    if answer.accepted.kind != "response":
        raise _unknown(shown)
    return answer


def _unknown(text: str) -> HTTPError:
    return HTTPError(404, f"there is no request {text!r} here", code="request_not_found", param="id")


def event_id(request: Request) -> int:
    """Return the id of the last event that the client has, or 0. Raises HTTPError."""
    text = request.header(b"last-event-id") or request.query().get("after") or "0"
    if not re.fullmatch(r"\d{1,9}", text):
        message = f"after: an event id has 1 to 9 digits, got {text!r}"
        raise HTTPError(400, message, code="invalid_event_id", param="after")
    return int(text)
