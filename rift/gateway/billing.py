"""`/v1/invoices` and `/v1/usage`: an account's own bills, asked of the control process."""

import re
from typing import Any

from events.log import Log, LogError
from rift.gateway.admission import Admission, retry_after
from rift.gateway.http import Refusal, Request
from rift.questions import AnswerFailed, AskInvoice, AskUsage, QuestionRefused, ask

# A client waits so long for an answer that says why there is none.
ANSWER_S = 5.0

FIRST_DAY, LAST_DAY = "1970-01-01", "9999-12-31"


class Billing:
    def __init__(self, log: Log, admission: Admission) -> None:
        self._log, self._admission = log, admission

    async def invoice(self, request: Request, match: re.Match[str]) -> None:
        issued = self._admission.authenticate(request, "usage")
        await request.answer(200, await self._ask(AskInvoice(issued.account, match[1]), "invalid_period"))

    async def usage(self, request: Request, match: re.Match[str]) -> None:
        """`from` and `to` are days (UTC), both counted; `group_by` is a list with commas."""
        issued, query = self._admission.authenticate(request, "usage"), request.query()
        groups = tuple(group for group in query.get("group_by", "day,model").split(",") if group)
        days = query.get("from", FIRST_DAY), query.get("to", LAST_DAY)
        await request.answer(200, await self._ask(AskUsage(issued.account, *days, groups), "invalid_query"))

    async def _ask(self, question: AskInvoice | AskUsage, code: str) -> Any:
        try:
            return await ask(self._log, question, timeout_s=ANSWER_S)
        except AnswerFailed as error:
            message = "the answer could not be made; try again, or ask for less"
            raise Refusal(503, message, code="answer_failed", headers=retry_after(5)) from error
        except QuestionRefused as refused:
            raise Refusal(400, str(refused), code=code) from refused
        except LogError as error:
            message = "the control process does not answer; try again"
            raise Refusal(503, message, code="control_unavailable", headers=retry_after(5)) from error
