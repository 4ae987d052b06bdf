"""One hold of this lane: what of it is reserved and spent; and the words where there is none."""

import msgspec

from events import credit
from events.intervals import Span, unite, whole_seconds
from events.money import usd
from events.schema import CreditHeld
from rift.gateway.admission.metering import MeteredCompletion
from rift.gateway.asgi.errors import HTTPError, retry_after


class CreditHold(msgspec.Struct):
    """A hold of this lane. `after` is the sequence it was appended behind, `reserved` the worst case of each
    request that has not ended, `ran` when those of plan per_second ran, by model and price version."""

    event: CreditHeld
    after: int
    used_at: float
    spent: int = 0
    reserved: dict[str, int] = {}
    ran: dict[tuple[str, int], list[Span]] = {}
    is_closing: bool = False
    is_settled: bool = False

    @property
    def free(self) -> int:
        return self.event.nanousd - self.spent - sum(self.reserved.values())

    def spend(self, answer: MeteredCompletion, nanousd: int) -> None:
        """A second in which several of its requests ran is spent once, as it is charged."""
        self.spent += nanousd
        price = answer.price.second_nanousd
        if price and answer.ran:
            line = answer.accepted.model, answer.accepted.price_version
            before = self.ran.get(line, [])
            self.ran[line] = unite([*before, *answer.ran])
            self.spent += (whole_seconds(self.ran[line]) - whole_seconds(before)) * price


def unavailable(message: str) -> HTTPError:
    return HTTPError(503, message, code="log_unavailable", headers=retry_after(2))


def exhausted(account: str, standing: credit.Balance, month: str, free: int, cost: int) -> HTTPError:
    of_credit = standing.credit_room()
    of_budget = standing.budget_room(month)
    is_budget = of_credit is None or (of_budget is not None and of_budget < of_credit)
    left = min(room for room in (of_credit, of_budget) if room is not None) + free
    what = f"budget of {month}" if is_budget else "credit"
    add = "ask for a larger budget" if is_budget else "have credit added"
    held = f" ({usd(standing.held_nanousd - free)} USD more is held for requests under way)"
    message = (
        f"{usd(left)} USD is left of account {account}'s {what}"
        f"{held if standing.held_nanousd > free else ''}, and this request could cost "
        f"{usd(cost)} USD: set a smaller max_tokens, send a shorter prompt, or {add}"
    )
    return HTTPError(402, message, code="budget_exhausted" if is_budget else "credit_exhausted")
