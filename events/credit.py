"""An account's credit, budget, holds and spending, folded from the book.

Two gateways cannot spend the same dollar: a hold is appended with the last sequence of the account's subject
that its writer has folded, so it is stored only if the credit is still free.

`rift/gateway/admission/` takes holds and settles them.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec

from events.contracts import SECOND_NS
from events.schema import CreditGranted, CreditHeld, CreditSettled, LimitsSet, Plan, UsageCorrected
from events.subjects import book as book_subject

PREFIX = book_subject("credit", "")


class OpenHold(msgspec.Struct, frozen=True):
    """An open hold, and the month whose budget it counts against."""

    event: CreditHeld
    month: str


class Balance(msgspec.Struct):
    """One account's balance. `granted_nanousd` is None if it was never granted credit; `spent_nanousd` is the
    sum of its settled holds, and `corrected_nanousd` of its corrections; `sequence` is the last one of its
    subject."""

    plan: Plan = "per_token"
    budget_nanousd: int | None = None
    granted_nanousd: int | None = None
    holds: dict[str, OpenHold] = {}
    spent_nanousd: int = 0
    corrected_nanousd: int = 0
    spent_in: dict[str, int] = {}
    sequence: int = 0

    @property
    def is_limited(self) -> bool:
        return self.granted_nanousd is not None or self.budget_nanousd is not None

    @property
    def held_nanousd(self) -> int:
        return sum(held.event.nanousd for held in self.holds.values())

    def credit_room(self) -> int | None:
        """Return the credit that is neither spent nor held; None if none was ever granted."""
        if self.granted_nanousd is None:
            return None
        used = self.spent_nanousd + self.corrected_nanousd + self.held_nanousd
        return max(0, self.granted_nanousd - used)

    def budget_room(self, month: str) -> int | None:
        """Return the part of the month's budget that is neither spent nor held; None without a budget."""
        if self.budget_nanousd is None:
            return None
        held = sum(held.event.nanousd for held in self.holds.values() if held.month == month)
        return max(0, self.budget_nanousd - self.spent_in.get(month, 0) - held)

    def room(self, month: str) -> int | None:
        """Return how much more can be held in `month`; None if there is no limit."""
        rooms = [room for room in (self.credit_room(), self.budget_room(month)) if room is not None]
        return min(rooms, default=None)


class Credits:
    """All balances. The book folds them; it drops repeated ids, and its times never decrease."""

    def __init__(self) -> None:
        self._balances: dict[str, Balance] = {}

    def of(self, account: str) -> Balance:
        """Return an account's balance; an account without entries is unlimited."""
        return self._balances.get(account) or Balance()

    def room(self, account: str, month: str) -> int | None:
        return self.of(account).room(month)

    def open_holds(self) -> Iterator[CreditHeld]:
        for balance in self._balances.values():
            yield from (held.event for held in balance.holds.values())

    def see(self, subject: str, sequence: int) -> None:
        """Note the sequence of a record on an account's subject: the next hold is appended after it."""
        account = subject.removeprefix(PREFIX)
        if account != subject:
            self._balance(account).sequence = sequence

    def fold(self, event: Any, *, at_ns: int) -> None:
        """Apply one event. A settlement of a hold that is not open is ignored."""
        match event:
            case LimitsSet():
                balance = self._balance(event.account)
                balance.plan = event.plan
                balance.budget_nanousd = event.budget_nanousd
            case CreditGranted():
                balance = self._balance(event.account)
                balance.granted_nanousd = (balance.granted_nanousd or 0) + event.nanousd
            case UsageCorrected():
                # A correction returns credit. It does not change the budget, which limits what a month's
                # requests cost.
                self._balance(event.account).corrected_nanousd += event.nanousd
            case CreditHeld():
                self._balance(event.account).holds[event.id] = OpenHold(event, month_of(at_ns))
            case CreditSettled():
                balance = self._balance(event.account)
                if (held := balance.holds.pop(event.hold, None)) is not None:
                    balance.spent_nanousd += event.nanousd
                    spent = balance.spent_in.get(held.month, 0)
                    balance.spent_in[held.month] = spent + event.nanousd

    def _balance(self, account: str) -> Balance:
        return self._balances.setdefault(account, Balance())


def subject(account: str) -> str:
    """Return the subject of all of an account's credit, so that the compare-and-set covers grants too."""
    return book_subject("credit", account)


def settlement(held: CreditHeld, nanousd: int) -> CreditSettled:
    """Return a hold's settlement. Its id depends only on the hold, so that it counts once."""
    return CreditSettled(id=f"settled.{held.id}", account=held.account, hold=held.id, nanousd=nanousd)


def month_of(at_ns: int) -> str:
    """Return the UTC calendar month of a stored time, `YYYY-MM`."""
    return f"{datetime.fromtimestamp(at_ns // SECOND_NS, UTC):%Y-%m}"
