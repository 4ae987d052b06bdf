"""`/v1/invoices`, `/v1/usage` and the list at `/v1/inference`: the control process answers them."""

import re
from collections.abc import Mapping
from typing import Any

from events import ids
from events.log import Log, LogError
from rift.gateway.admission.auth import Authenticator
from rift.gateway.api.account_turns import questions
from rift.gateway.asgi.errors import HTTPError, retry_after
from rift.gateway.asgi.request import Request
from rift.rpc import (
    AnswerFailed,
    AskInvoice,
    AskInvoices,
    AskRequests,
    AskUsage,
    ProjectionBlocked,
    QuestionRefused,
    ask,
)

# How long a client waits for the control process.
ANSWER_S = 5.0

# Requests or invoices in a page; a row has about 330 bytes.
PAGE = 20
PAGE_MAX = 100

# Keys with any of these scopes can read single requests, so they may list them.
LISTING = ("inference", "usage", "admin")

FIRST_DAY = "1970-01-01"
LAST_DAY = "9999-12-31"


class BillingRoutes:
    def __init__(self, log: Log, auth: Authenticator, *, secret: bytes) -> None:
        self._log = log
        self._auth = auth
        self._secret = secret
        self._turns = questions()

    async def invoice(self, request: Request, period: str) -> None:
        issued = self._auth.authenticate(request, "usage")
        await request.answer(200, await self._ask(AskInvoice(issued.account, period), "invalid_period"))

    async def invoices(self, request: Request) -> None:
        """Answer with `limit` invoices of the account, newest first, that precede the month `after`."""
        issued = self._auth.authenticate(request, "usage")
        query = _query(request, "limit", "after")
        question = AskInvoices(issued.account, _limit(query), query.get("after"))
        await request.answer(200, await self._ask(question, "invalid_period"))

    async def usage(self, request: Request) -> None:
        """`from` and `to` are days (UTC), both inclusive; `group_by` is a comma-separated list."""
        issued = self._auth.authenticate(request, "usage")
        query = _query(request, "from", "to", "group_by")
        groups = tuple(group for group in query.get("group_by", "day,model").split(",") if group)
        days = query.get("from", FIRST_DAY), query.get("to", LAST_DAY)
        await request.answer(200, await self._ask(AskUsage(issued.account, *days, groups), "invalid_query"))

    async def requests(self, request: Request) -> None:
        """Answer with `limit` requests of the account, newest first, that precede the request `after`."""
        issued = self._auth.authenticate(request, None)
        if not set(LISTING) & set(issued.scopes):
            message = f"this API key may not list requests; its scopes are {', '.join(issued.scopes)}"
            raise HTTPError(403, message, code="insufficient_scope")
        query = _query(request, "limit", "after")
        limit, after = _limit(query), query.get("after")
        if after is not None and ids.verified(after, secret=self._secret, account=issued.account) is None:
            message = f"after: request {after!r} was not found"
            raise HTTPError(400, message, code="invalid_query", param="after")
        question = AskRequests(issued.account, limit, after)
        await request.answer(200, await self._ask(question, "invalid_query"))

    async def _ask(self, question: AskInvoice | AskInvoices | AskUsage | AskRequests, code: str) -> Any:
        try:
            with self._turns.take(question.account):
                return await ask(self._log, question, timeout_s=ANSWER_S)
        except ProjectionBlocked as error:
            message = (
                "the answer would lack stored records: the control process has not applied them yet, or "
                "cannot, because its disk is full or read-only or a record is unreadable or lost; try again "
                "later"
            )
            raise HTTPError(503, message, code="projection_blocked", headers=retry_after(5)) from error
        except AnswerFailed as error:
            message = "the query failed; try again, or ask for less"
            raise HTTPError(503, message, code="answer_failed", headers=retry_after(5)) from error
        except QuestionRefused as refused:
            raise HTTPError(400, str(refused), code=code) from refused
        except LogError as error:
            message = "the control process does not answer; try again"
            raise HTTPError(503, message, code="control_unavailable", headers=retry_after(5)) from error


def _query(request: Request, *known: str) -> dict[str, str]:
    """Return the parameters of the query. Raises HTTPError (400) for an unknown or repeated one: an answer
    without it would not be what the client asked for."""
    query: dict[str, str] = {}
    for name, value in request.query_pairs():
        if name not in known:
            message = f"{name}: this route has no such parameter; it has {', '.join(known)}"
            raise HTTPError(400, message, code="invalid_query", param=name)
        if name in query:
            message = f"{name}: given more than once; separate several values of group_by by commas"
            raise HTTPError(400, message, code="invalid_query", param=name)
        query[name] = value
    return query


def _limit(query: Mapping[str, str]) -> int:
    """Return the page size that the client asks for. Raises HTTPError (400)."""
    limit = query.get("limit", str(PAGE))
    if not re.fullmatch(r"[0-9]{1,3}", limit) or not 1 <= int(limit) <= PAGE_MAX:
        message = f"limit: must be a number from 1 to {PAGE_MAX}, got {limit!r}"
        raise HTTPError(400, message, code="invalid_query", param="limit")
    return int(limit)
