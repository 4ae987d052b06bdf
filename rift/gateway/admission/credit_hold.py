"""A credit hold of this lane, the charge of a request to it, and the errors of a request without one."""

from collections.abc import Iterable, Iterator

import msgspec

from events.credit import Balance
from events.intervals import Span, unite, whole_seconds
from events.money import usd
from events.pricing import charge_nanousd, is_chargeable
from events.schema import CreditHeld, Price, RequestAccepted
from rift.gateway.asgi.errors import HTTPError, retry_after
from rift.gateway.choices import prompt_id
from rift.gateway.completion import Completion


class MeteredCompletion(Completion):
    """A completion without text that knows its cost once it has ended.

    Under the plan `per_second` the cost is the times in which attempts ran, else nano-USD.
    """

    def __init__(self, accepted: RequestAccepted, price: Price) -> None:
        super().__init__(accepted, price, keep_text=False)

    @property
    def is_by_second(self) -> bool:
        return self.accepted.plan == "per_second"

    @property
    def ran(self) -> list[Span]:
        return self.attempts if self.is_by_second and is_chargeable(self.life) else []

    def nanousd(self, *, with_prompt: bool) -> int:
        """Return the charge for tokens. `with_prompt` is False if another choice was charged the prompt."""
        if self.is_by_second:
            return 0
        return charge_nanousd(
            self.life, self.price, cached_tokens=self.cached_tokens, with_prompt=with_prompt
        )


def charges(answers: Iterable[MeteredCompletion]) -> Iterator[tuple[MeteredCompletion, int]]:
    """Yield the ended answers of one body with their nano-USD.

    They come in the order of their ends, and the first chargeable one of each prompt pays for the prompt.
    """
    paid: set[str] = set()
    for answer in answers:
        prompt = prompt_id(answer.accepted)
        yield answer, answer.nanousd(with_prompt=prompt not in paid)
        if is_chargeable(answer.life):
            paid.add(prompt)


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
