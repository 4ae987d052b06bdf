"""A new request's body: counted while it arrives, then parsed and forgotten."""

from msgspec.structs import replace

from events.schema import KeyIssued
from rift.gateway.admission.admission import Admission
from rift.gateway.asgi import trace_context
from rift.gateway.asgi.body_budget import BodyBudget
from rift.gateway.asgi.connections import connections_max
from rift.gateway.asgi.errors import HTTPError
from rift.gateway.asgi.parse_turns import ParseTurns
from rift.gateway.asgi.request import Request
from rift.gateway.bounds import Bound
from rift.gateway.dialects.dialect import Dialect
from rift.gateway.dialects.sampling import ParsedRequest
from rift.gateway.submission.idempotency import IdempotencyKeys


class BodyReader:
    def __init__(self, admission: Admission, keys: IdempotencyKeys) -> None:
        self._admission = admission
        self._keys = keys
        self._budget = BodyBudget()
        self._turns = ParseTurns(connections_max())

    def bounds(self) -> list[Bound]:
        return [*self._budget.bounds(), *self._turns.bounds()]

    async def read(self, dialect: Dialect, request: Request, issued: KeyIssued) -> tuple[ParsedRequest, str]:
        """Return the parsed body of an authenticated request and, for an idempotency key, its digest.

        An answer may take minutes, so nothing keeps the body itself. Raises HTTPError, ClientGone.
        """
        content_type = (request.header(b"content-type") or "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            message = "send the body with `Content-Type: application/json`"
            raise HTTPError(415, message, code="unsupported_media_type")
        if (encoding := request.header(b"content-encoding") or "identity").lower() != "identity":
            message = f"send the body without `Content-Encoding: {encoding}`: it must not be compressed"
            raise HTTPError(415, message, code="unsupported_media_type")
        with self._budget.hold(issued.account, dialect.body_bytes_max) as hold:
            body = await request.body(hold)
            async with self._turns.turn(issued.account, len(body), request.disconnected):
                parsed = dialect.parse(body)
            # An id contains the model's name, so none is made for an unknown model.
            self._admission.check_model(parsed.model, issued.key)
            request.exchange.model = parsed.model
            trace = trace_context.read(request.headers(b"traceparent"), request.headers(b"tracestate"))
            if trace is not None:
                parsed = replace(parsed, trace=trace)
            has_key = request.header(b"idempotency-key") is not None
            return parsed, self._keys.body_digest(request.path, body) if has_key else ""
