"""The credit in the book, compared with a count by hand."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from events import codec, credit
from events.book import Book
from events.log import Stored
from events.schema import CreditGranted, CreditHeld, CreditSettled, LimitsSet, UsageCorrected

NOVEMBER, DECEMBER = 1_793_500_000_000_000_000, 1_796_500_000_000_000_000
ACCOUNTS = ("acme", "shop")


class Writer:
    """Writes a book, one event a record."""

    def __init__(self) -> None:
        self.book = Book()
        self.sequence = 0

    def say(self, event: Any, at_ns: int = NOVEMBER) -> int:
        self.sequence += 1
        subject = credit.subject(event.account)
        if isinstance(event, LimitsSet | UsageCorrected):
            subject = f"rift.book.any.{event.account}"
        self.book.fold(Stored(subject, self.sequence, at_ns, codec.encode("test", [event])))
        return self.sequence


def held(id: str, nanousd: int, account: str = "acme") -> CreditHeld:
    return CreditHeld(id=id, account=account, shard=0, lane="laneaaaa", nanousd=nanousd)


def granted(id: str, nanousd: int) -> CreditGranted:
    return CreditGranted(id=id, account="acme", nanousd=nanousd)


def test_an_account_without_credit_or_budget_is_unlimited() -> None:
    writer = Writer()
    writer.say(LimitsSet(id="l", account="acme", plan="per_second"))
    standing = writer.book.credits.of("acme")
    assert not standing.is_limited
    assert standing.plan == "per_second"
    assert writer.book.credits.room("acme", "2026-11") is None
    assert writer.book.credits.room("shop", "2026-11") is None


def test_a_hold_takes_room_and_its_settlement_gives_the_rest_back() -> None:
    writer = Writer()
    writer.say(granted("g", 100))
    writer.say(held("h", 30))
    assert writer.book.credits.room("acme", "2026-11") == 70
    writer.say(CreditSettled(id="settled.h", account="acme", hold="h", nanousd=10))
    assert writer.book.credits.room("acme", "2026-11") == 90
    assert writer.book.credits.of("acme").spent_nanousd == 10


def test_a_hold_is_settled_once_and_as_told() -> None:
    writer = Writer()
    writer.say(granted("g", 100))
    writer.say(held("h", 30))
    writer.say(CreditSettled(id="settled.h", account="acme", hold="h", nanousd=50))
    writer.say(CreditSettled(id="another", account="acme", hold="h", nanousd=20))
    writer.say(CreditSettled(id="of nothing", account="acme", hold="none", nanousd=20))
    writer.say(held("h", 30))
    assert writer.book.credits.of("acme").spent_nanousd == 50
    assert writer.book.credits.room("acme", "2026-11") == 50


def test_a_budget_is_spent_in_the_month_of_the_hold() -> None:
    writer = Writer()
    writer.say(LimitsSet(id="l", account="acme", budget_nanousd=100))
    writer.say(held("h", 30))
    writer.say(CreditSettled(id="settled.h", account="acme", hold="h", nanousd=20), DECEMBER)
    writer.say(held("i", 40), DECEMBER)
    assert writer.book.credits.room("acme", "2026-11") == 80
    assert writer.book.credits.room("acme", "2026-12") == 60
    assert writer.book.credits.room("acme", "2027-01") == 100


def test_the_smaller_room_wins_and_none_is_negative() -> None:
    writer = Writer()
    writer.say(granted("g", 50))
    writer.say(LimitsSet(id="l", account="acme", budget_nanousd=100))
    assert writer.book.credits.room("acme", "2026-11") == 50
    writer.say(LimitsSet(id="m", account="acme", budget_nanousd=20))
    assert writer.book.credits.room("acme", "2026-11") == 20
    writer.say(held("h", 30))
    assert writer.book.credits.room("acme", "2026-11") == 0
    writer.say(LimitsSet(id="n", account="acme"))
    assert writer.book.credits.room("acme", "2026-11") == 20


def test_a_correction_is_credit_again_and_no_budget() -> None:
    writer = Writer()
    writer.say(granted("g", 50))
    writer.say(LimitsSet(id="l", account="acme", budget_nanousd=0))
    writer.say(UsageCorrected(id="c", account="acme", nanousd=-20, reason="sorry"))
    assert writer.book.credits.of("acme").credit_room() == 70
    assert writer.book.credits.room("acme", "2026-11") == 0, "a budget of 0 stops an account"
    balance = writer.book.credits.of("acme")
    assert (balance.spent_nanousd, balance.corrected_nanousd) == (0, -20)


def test_the_sequence_is_the_subjects_whatever_stands_there() -> None:
    writer = Writer()
    first = writer.say(granted("g", 50))
    assert writer.book.credits.of("acme").sequence == first
    again = writer.say(granted("g", 50))
    writer.say(LimitsSet(id="l", account="acme"))
    writer.say(held("h", 1, "shop"))
    assert writer.book.credits.of("acme").sequence == again
    assert writer.book.credits.of("acme").granted_nanousd == 50


def test_a_month_is_one_of_utc() -> None:
    assert credit.month_of(NOVEMBER) == "2026-11"


IDS = st.sampled_from("abcdef")
AMOUNTS = st.integers(0, 100)
EVENTS = st.one_of(
    st.builds(granted, IDS.map("g{}".format), AMOUNTS),
    st.builds(held, IDS.map("h{}".format), AMOUNTS),
    st.builds(
        lambda id, hold, nanousd: CreditSettled(id=id, account="acme", hold=hold, nanousd=nanousd),
        IDS.map("s{}".format), IDS.map("h{}".format), AMOUNTS,
    ),
    st.builds(
        lambda id, nanousd: LimitsSet(id=id, account="acme", budget_nanousd=nanousd),
        IDS.map("l{}".format), st.none() | AMOUNTS,
    ),
)  # fmt: skip


@given(st.lists(st.tuples(EVENTS, st.sampled_from([NOVEMBER, DECEMBER])), max_size=30))
def test_the_room_is_what_a_count_by_hand_leaves(told: list[tuple[Any, int]]) -> None:
    writer = Writer()
    first: dict[str, tuple[Any, str]] = {}
    newest = 0
    for event, at_ns in told:
        writer.say(event, at_ns)
        newest = max(newest, at_ns)
        first.setdefault(event.id, (event, credit.month_of(newest)))
    events = list(first.values())
    order = {event.id: at for at, (event, _) in enumerate(events)}
    grants = [event.nanousd for event, _ in events if isinstance(event, CreditGranted)]
    budgets = [event.budget_nanousd for event, _ in events if isinstance(event, LimitsSet)]
    taken = Counts()
    for hold, month in [(event, month) for event, month in events if isinstance(event, CreditHeld)]:
        after = [
            event
            for event, _ in events
            if isinstance(event, CreditSettled) and event.hold == hold.id and order[event.id] > order[hold.id]
        ]
        taken.add(after[0].nanousd if after else hold.nanousd, month)
    for month in ("2026-11", "2026-12"):
        rooms = [sum(grants) - taken.total] if grants else []
        if budgets and budgets[-1] is not None:
            rooms.append(budgets[-1] - taken.of.get(month, 0))
        expected = max(0, min(rooms)) if rooms else None
        assert writer.book.credits.room("acme", month) == expected


class Counts:
    def __init__(self) -> None:
        self.total = 0
        self.of: dict[str, int] = {}

    def add(self, nanousd: int, month: str) -> None:
        self.total += nanousd
        self.of[month] = self.of.get(month, 0) + nanousd
