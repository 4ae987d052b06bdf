"""One credit hold of this lane, and the errors of a request that gets none."""

import msgspec

from events.credit import Balance
from events.intervals import Span, unite, whole_seconds
from events.money import usd
from events.schema import CreditHeld
from rift.gateway.admission.metering import MeteredCompletion
from rift.gateway.asgi.errors import HTTPError, retry_after


class CreditHold(msgspec.Struct):
    """A hold, its spent nano-USD, and the highest cost of each request that has not ended.

    `after` is the last sequence of the account's subject when the hold was appended. `ran` has the times in
    which requests of plan `per_second` ran, by model and price version.
    """

    event: CreditHeld
    after: int
    used_at_s: float
    spent: int = 0
    reserved: dict[str, int] = {}
    ran: dict[tuple[str, int], list[Span]] = {}
    is_closing: bool = False
    is_settled: bool = False

    @property
    def free(self) -> int:
        return self.event.nanousd - self.spent - sum(self.reserved.values())

    def spend(self, answer: MeteredCompletion, nanousd: int) -> None:
        """Spend a request's cost. A second in which several requests ran is spent once, as it is charged."""
        self.spent += nanousd
        price = answer.price.second_nanousd
        if price and answer.ran:
            line = answer.accepted.model, answer.accepted.price_version
            before = self.ran.get(line, [])
            self.ran[line] = unite([*before, *answer.ran])
            self.spent += (whole_seconds(self.ran[line]) - whole_seconds(before)) * price


def unavailable(message: str) -> HTTPError:
    return HTTPError(503, message, code="log_unavailable", headers=retry_after(2))


def exhausted(account: str, balance: Balance, month: str, free: int, cost: int) -> HTTPError:
    """Return the error for a request whose highest cost is more than the account has left.

    `free` is what this lane holds and no request has reserved.
    """
    of_credit = balance.credit_room()
    of_budget = balance.budget_room(month)
    is_budget = of_credit is None or (of_budget is not None and of_budget < of_credit)
    left = min(room for room in (of_credit, of_budget) if room is not None) + free
    name = f"budget of {month}" if is_budget else "credit"
    remedy = "ask for a larger budget" if is_budget else "add credit"
    reserved = balance.held_nanousd - free
    held = f" ({usd(reserved)} USD more is held for running requests)" if reserved > 0 else ""
    message = (
        f"account {account} has {usd(left)} USD left of its {name}{held}, and this request could cost "
        f"{usd(cost)} USD: set a smaller max_tokens, send a shorter prompt, or {remedy}"
    )
    return HTTPError(402, message, code="budget_exhausted" if is_budget else "credit_exhausted")
