"""A stored request by its id: verified, read, attached to, erased. Shared by the routes of all APIs."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from events import ids
from events.ids import RequestId
from events.schema import RequestAccepted
from rift.gateway.admission.auth import Authenticator
from rift.gateway.api.content_erasure import erase_content
from rift.gateway.asgi.errors import HTTPError
from rift.gateway.asgi.request import Request
from rift.gateway.completion import Completion
from rift.gateway.dialects.dialect import Dialect
from rift.gateway.state import GatewayConfig, LogState
from rift.gateway.streams.lane_reader import LaneReader
from rift.gateway.streams.lane_registry import LaneRegistry
from rift.gateway.streams.subscription import Subscription


class StoredRequests:
    """With `only`, requests of other APIs count as unknown, and ids are read as that API writes them."""

    def __init__(
        self,
        state: LogState,
        config: GatewayConfig,
        lanes: LaneRegistry,
        auth: Authenticator,
        readers: Callable[[str], AbstractContextManager[None]],
        *,
        only: Dialect | None = None,
    ) -> None:
        self._state = state
        self._secret = config.secret
        self._lanes = lanes
        self._auth = auth
        self._readers = readers
        self._only = only

    def verify(self, request: Request, id: str) -> RequestId:
        """Authenticate, then return the request's id. Raises HTTPError (404 for a forged id, too)."""
        issued = self._auth.authenticate(request)
        text = self._only.request_id(id) if self._only is not None else id
        parsed = ids.verified(text, secret=self._secret, account=issued.account)
        if parsed is None or parsed.at.shard >= self._state.book.shards:
            raise unknown(id)
        return parsed

    def reading(self, request: Request) -> AbstractContextManager[None]:
        """Count a verified request as a reader while the context is open. Raises HTTPError (429)."""
        return self._readers(self._account(request))

    async def read(self, request: Request, id: str) -> Completion:
        """Return a request with its answer so far. Raises HTTPError, LogError."""
        parsed = self.verify(request, id)

        def make(accepted: RequestAccepted | None) -> Completion:
            return Completion.of(self._checked(request, accepted, id), self._state.book, keep_text=True)

        async def read(bytes_max: float) -> Completion:
            encode = self._only.encode if self._only is not None else None
            return await self._state.histories.completion(parsed, make, encode, bytes_max=bytes_max)

        with self.reading(request):
            return await self._state.histories.in_turn(request, self._account(request), read)

    async def attach(
        self,
        request: Request,
        id: str,
        parsed: RequestId,
        make: Callable[[LaneReader, RequestAccepted], Subscription],
    ) -> tuple[LaneReader, Subscription]:
        """Follow a verified request from its first event. Raises HTTPError, LogError."""
        lane = await self._lanes.of(parsed.at.shard, parsed.at.lane)

        async def attach(bytes_max: float) -> Subscription | None:
            return await lane.attach([parsed], lambda group: make(lane, group[0]), bytes_max=bytes_max)

        subscription = await self._state.histories.in_turn(request, self._account(request), attach)
        if subscription is None:
            raise unknown(id)
        try:
            self._checked(request, subscription.answer.accepted, id)
        except HTTPError:
            lane.close(subscription)
            raise
        return lane, subscription

    async def erase(self, request: Request, id: str) -> None:
        """Erase a request's content. Raises HTTPError, LogError."""
        parsed = self.verify(request, id)

        async def erase(bytes_max: float) -> None:
            past = await self._state.histories.read(parsed, bytes_max=bytes_max)
            await erase_content(self._state, self._checked(request, past.accepted, id))

        with self.reading(request):
            await self._state.histories.in_turn(request, self._account(request), erase)

    def _account(self, request: Request) -> str:
        return self._state.book.keys[request.key].event.account

    def _checked(self, request: Request, accepted: RequestAccepted | None, id: str) -> RequestAccepted:
        if accepted is None or (self._only is not None and accepted.kind != self._only.kind):
            raise unknown(id)
        request.answer_about(accepted)
        return accepted


def unknown(id: str) -> HTTPError:
    return HTTPError(404, f"request {id!r} was not found", code="request_not_found", param="id")
