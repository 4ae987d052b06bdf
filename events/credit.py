"""Credit as the book's readers hold it: what an account was granted and may spend in a month, what it has
spent by settlements and corrections, and what gateways hold of it.

Two gateways cannot spend the same dollar: a hold is appended with the last sequence that its writer has
folded of the account's subject, so it is stored only if the room it was taken from is still there.

What must not live here: who takes a hold, and when it is settled (`rift/gateway/admission/credit.py`).
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
    """An open hold, and the month that it counts in."""

    event: CreditHeld
    month: str


class Balance(msgspec.Struct):
    """One account. `granted_nanousd` is None if it was never granted credit; `sequence` is the last one of
    its subject."""

    plan: Plan = "per_token"
    budget_nanousd: int | None = None
    granted_nanousd: int | None = None
    holds: dict[str, OpenHold] = {}
    spent_nanousd: int = 0
    spent_in: dict[str, int] = {}
    sequence: int = 0

    @property
    def is_limited(self) -> bool:
        return self.granted_nanousd is not None or self.budget_nanousd is not None

    @property
    def held_nanousd(self) -> int:
        return sum(held.event.nanousd for held in self.holds.values())

    def credit_room(self) -> int | None:
        """Return what of the credit is neither spent nor held; None: no credit was ever granted."""
        if self.granted_nanousd is None:
            return None
        return max(0, self.granted_nanousd - self.spent_nanousd - self.held_nanousd)

    def budget_room(self, month: str) -> int | None:
        """Return what of the month's budget is neither spent nor held; None: there is none."""
        if self.budget_nanousd is None:
            return None
        held = sum(held.event.nanousd for held in self.holds.values() if held.month == month)
        return max(0, self.budget_nanousd - self.spent_in.get(month, 0) - held)

    def room(self, month: str) -> int | None:
        """Return what may be held more in `month`; None: without limit."""
        rooms = [room for room in (self.credit_room(), self.budget_room(month)) if room is not None]
        return min(rooms, default=None)


class Credits:
    """Folded by the book, which drops repeated ids and hands in stored times that never run backwards."""

    def __init__(self) -> None:
        self._standings: dict[str, Balance] = {}

    def of(self, account: str) -> Balance:
        """Return how an account stands; one that the book says nothing of is unlimited."""
        return self._standings.get(account) or Balance()

    def room(self, account: str, month: str) -> int | None:
        return self.of(account).room(month)

    def open_holds(self) -> Iterator[CreditHeld]:
        for standing in self._standings.values():
            yield from (held.event for held in standing.holds.values())

    def see(self, subject: str, sequence: int) -> None:
        """Note a record on an account's subject, whatever is in it: the next hold is appended behind it."""
        account = subject.removeprefix(PREFIX)
        if account != subject:
            self._standing(account).sequence = sequence

    def fold(self, event: Any, *, at_ns: int) -> None:
        """What settles a hold that is not open counts for nothing."""
        match event:
            case LimitsSet():
                standing = self._standing(event.account)
                standing.plan = event.plan
                standing.budget_nanousd = event.budget_nanousd
            case CreditGranted():
                standing = self._standing(event.account)
                standing.granted_nanousd = (standing.granted_nanousd or 0) + event.nanousd
            case UsageCorrected():
                # Wrongly charged credit is there again. A budget bounds what a month's requests cost.
                self._standing(event.account).spent_nanousd += event.nanousd
            case CreditHeld():
                self._standing(event.account).holds[event.id] = OpenHold(event, month_of(at_ns))
            case CreditSettled():
                standing = self._standing(event.account)
                if (held := standing.holds.pop(event.hold, None)) is not None:
                    standing.spent_nanousd += event.nanousd
                    spent = standing.spent_in.get(held.month, 0)
                    standing.spent_in[held.month] = spent + event.nanousd

    def _standing(self, account: str) -> Balance:
        return self._standings.setdefault(account, Balance())


def subject(account: str) -> str:
    """All of an account's credit is on one subject: the compare-and-set is over grants too."""
    return book_subject("credit", account)


def settlement(held: CreditHeld, nanousd: int) -> CreditSettled:
    """Return what settles a hold: the same id whoever says it, so that it counts once."""
    return CreditSettled(id=f"settled.{held.id}", account=held.account, hold=held.id, nanousd=nanousd)


def month_of(at_ns: int) -> str:
    """The UTC calendar month of a stored time, `YYYY-MM`."""
    return f"{datetime.fromtimestamp(at_ns // SECOND_NS, UTC):%Y-%m}"
