"""Invoices of handwritten histories, exact to the nano-USD."""

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events import schema, subjects
from events.schema import RequestFinished
from replay.billing import focus_csv
from replay.billing import invoice as billing
from replay.billing.invoice import BillingRefused, closing, invoice, invoice_list, usage
from replay.sql_files import checks, sql
from replay.warehouse.warehouse import Warehouse
from tests.replay import reckoning
from tests.replay.conftest import Scribe
from tests.replay.seconds import DECEMBER_NS, SECONDS, runs_of

SECOND = 1_000_000_000
DAY = 86_400 * SECOND
# The scribe begins at 2023-11-14 22:13:20 UTC.
PERIOD, NEXT, LATER = "2023-11", "2023-12", "2024-01"
PRICES = {"prompt": 100, "output": 350}


def opened(scribe: Any, *accounts: str) -> None:
    for account in accounts or ("dev",):
        scribe.book(schema.AccountOpened(id=f"account.{account}", account=account))


def applied(warehouse: Warehouse, scribe: Any) -> Warehouse:
    for stream in sorted(scribe.streams, key=lambda name: name != subjects.BOOK):
        warehouse.apply(stream, scribe.streams[stream])
    for check in checks():
        assert warehouse.query(sql(check)).rows == [], check
    return warehouse


def lines(warehouse: Warehouse, account: str = "dev", period: str = PERIOD) -> list[Any]:
    bill = invoice(warehouse.read, account, period)
    assert bill.total_nanousd == sum(line.nanousd for line in bill.lines)
    return bill.lines


def test_a_line_sums_up_its_requests_and_names_where_they_stand(scribe: Any, warehouse: Warehouse) -> None:
    opened(scribe)
    scribe.prices(**PRICES)
    scribe.finished_request(tokens=3)
    scribe.finished_request(tokens=5)
    [line] = lines(applied(warehouse, scribe))
    assert (line.model, line.plan, line.price_version, line.requests) == ("tiny:1", "per_token", 1, 2)
    assert (line.prompt_tokens, line.output_tokens) == (14, 8)
    assert line.nanousd == 14 * 100 + 8 * 350
    assert line.positions == {"first": "RIFT_0:6.0", "last": "RIFT_0:14.0"}
    text = f"RIFT_0:6.0 7 0 3 {7 * 100 + 3 * 350}\nRIFT_0:14.0 7 0 5 {7 * 100 + 5 * 350}\n"
    assert line.digest == hashlib.sha256(text.encode()).hexdigest()


def test_the_readme_s_way_by_hand(scribe: Any, warehouse: Warehouse) -> None:
    """Compute an invoice line with `rift sql` alone, including the cached price."""
    opened(scribe)
    scribe.prices(**PRICES, cached_prompt_nanousd=10)
    request, attempt = scribe.accept(), "a"
    scribe.tell(scribe.started(request, attempt))
    scribe.tell(scribe.tokens_of(attempt, 0, 2, cached_tokens=4))
    scribe.tell(RequestFinished(request=request, attempt=attempt, reason="stop", output_tokens=2))
    applied(warehouse, scribe)
    [[by_hand, nanousd]] = warehouse.query(
        "select lines.prompt_tokens * prompt_nanousd + lines.cached_tokens * cached_prompt_nanousd"
        " + lines.output_tokens * output_nanousd, nanousd from invoice_lines as lines"
        " join prices on prices.version = lines.price_version and prices.model = lines.model"
    ).rows
    assert by_hand == nanousd == 3 * 100 + 4 * 10 + 2 * 350
    assert warehouse.query("select sum(charge_nanousd) from charges").rows == [[nanousd]]


def test_accounts_plans_and_versions_have_lines_of_their_own(scribe: Any, warehouse: Warehouse) -> None:
    opened(scribe, "dev", "acme")
    scribe.prices(**PRICES)
    scribe.finished_request()
    scribe.finished_request(account="acme")
    scribe.prices(2, prompt=1, output=1, second_nanousd=7)
    scribe.finished_request(price_version=2)
    scribe.finished_request(price_version=2, plan="per_second")
    applied(warehouse, scribe)
    assert [(line.plan, line.price_version) for line in lines(warehouse)] == [
        ("per_second", 2),
        ("per_token", 1),
        ("per_token", 2),
    ]
    assert [line.nanousd for line in lines(warehouse)] == [7, 7 * 100 + 3 * 350, 10]
    assert len(lines(warehouse, "acme")) == 1
    assert lines(warehouse, period=NEXT) == []


def test_what_is_not_charged_is_on_no_invoice(scribe: Any, warehouse: Warehouse) -> None:
    opened(scribe)
    scribe.prices(**PRICES)
    request = scribe.accept()
    scribe.tell(scribe.started(request, "a"), scribe.tokens_of("a", 0))
    scribe.tell(RequestFinished(request=request, attempt="a", reason="failed", output_tokens=1))
    scribe.accept()
    assert lines(applied(warehouse, scribe)) == []


def test_a_group_pays_its_prompt_once(scribe: Any, warehouse: Warehouse) -> None:
    """Three choices: the first fails, the second pays the prompt, the third only its output."""
    opened(scribe)
    scribe.prices(**PRICES)
    choices = [scribe.accept(group="g", choice=number) for number in range(3)]
    for request in choices:
        scribe.tell(scribe.started(request, request), scribe.tokens_of(request, 0, 2))
    for request, reason in zip(choices, ("failed", "stop", "length"), strict=True):
        scribe.tell(RequestFinished(request=request, attempt=request, reason=reason, output_tokens=2))
    # A later member of the same group, after the others have been applied.
    applied(warehouse, scribe)
    late = scribe.accept(group="g", choice=3)
    scribe.tell(scribe.started(late, "late"), scribe.tokens_of("late", 0, 2))
    scribe.tell(RequestFinished(request=late, attempt="late", reason="stop", output_tokens=2))
    applied(warehouse, scribe)
    [line] = lines(warehouse)
    assert (line.requests, line.prompt_tokens, line.output_tokens) == (3, 7, 6)
    assert line.nanousd == 7 * 100 + 6 * 350


# Start and end of each request in seconds, and the charged seconds.
RUNS: dict[str, tuple[list[tuple[float, float]], int]] = {
    "one, rounded up": ([(0, 1.5)], 2),
    "a whole second": ([(0, 1)], 1),
    "overlapping": ([(0, 2.5), (1, 3.5)], 4),
    "one within the other": ([(0, 10), (2, 3)], 10),
    "touching": ([(0, 1.5), (1.5, 2.5)], 3),
    "apart, each rounded up": ([(0, 0.1), (5, 5.1)], 2),
    "a chain": ([(0, 2), (1, 4), (3, 5.2), (9, 9.3)], 7),
}


@pytest.mark.parametrize("name", RUNS)
def test_seconds_are_those_in_which_anything_ran(name: str, scribe: Any, warehouse: Warehouse) -> None:
    opened(scribe)
    scribe.prices(**PRICES, second_nanousd=1_000)
    runs, paid = RUNS[name]
    events = []
    for number, (start, end) in enumerate(runs):
        request = scribe.accept(plan="per_second")
        attempt = f"a{number}"
        events.append((start, scribe.started(request, attempt), scribe.tokens_of(attempt, 0)))
        events.append(
            (end, RequestFinished(request=request, attempt=attempt, reason="stop", output_tokens=1))
        )
    began_ns = scribe.now_ns
    for at, *batch in sorted(events, key=lambda event: event[0]):
        scribe.now_ns = began_ns + int(at * SECOND)
        scribe.tell(*batch, step_ns=0)
    [line] = lines(applied(warehouse, scribe))
    assert (line.seconds, line.nanousd) == (paid, paid * 1_000)


def test_dead_minutes_are_ours(scribe: Any, warehouse: Warehouse) -> None:
    opened(scribe)
    scribe.prices(**PRICES, second_nanousd=1)
    request = scribe.accept(plan="per_second")
    scribe.tell(scribe.started(request, "a"), step_ns=0)
    scribe.tell(scribe.tokens_of("a", 0), step_ns=2 * SECOND)
    scribe.tell(scribe.started(request, "b", after="a", resume_index=1), step_ns=600 * SECOND)
    scribe.tell(
        RequestFinished(request=request, attempt="b", reason="stop", output_tokens=1), step_ns=3 * SECOND
    )
    [line] = lines(applied(warehouse, scribe))
    assert line.seconds == 5
    assert warehouse.query("select seconds, nanousd from shares").rows == [[5, 5]]


@pytest.mark.parametrize("name", SECONDS)
def test_a_second_is_paid_once_and_none_is_lost(name: str, scribe: Any, warehouse: Warehouse) -> None:
    expected = runs_of(scribe, name)
    applied(warehouse, scribe)
    actual = [
        (period, line.price_version, line.seconds)
        for period in (PERIOD, NEXT)
        for line in lines(warehouse, period=period)
    ]
    assert actual == expected
    for period in (PERIOD, NEXT):
        bill = msgspec.to_builtins(invoice(warehouse.read, "dev", period))
        assert bill == reckoning.invoice(scribe.streams, "dev", period)


# Account, model, price version, and start and length in tenths of a second around the end of November.
RUN = st.tuples(
    *(st.sampled_from(("acme", "beta", "dev")), st.sampled_from(("tiny:1", "wide:2")), st.integers(1, 2)),
    *(st.integers(-60, 20), st.integers(0, 35)),
)


@settings(max_examples=6, deadline=None)
@given(
    runs=st.lists(RUN, min_size=9, max_size=30),
    prices=st.permutations((0, 1, 7, 999_999_937, 10**15)),
    is_closed=st.booleans(),
)
def test_shares_add_up_to_their_line_and_none_is_more_than_it_would_be_alone(
    runs: list[tuple[str, str, int, int, int]], prices: list[int], is_closed: bool
) -> None:
    scribe = Scribe()
    opened(scribe, "acme", "beta", "dev")
    for version in (1, 2):
        listed = tuple(
            schema.Price(model=model, prompt_nanousd=1, output_nanousd=1, second_nanousd=second)
            for model, second in (("tiny:1", prices[version]), ("wide:2", prices[-version]))
        )
        scribe.book(schema.PricePublished(id=f"price.{version}", version=version, prices=listed))
    own = write_runs(scribe, runs)
    if is_closed:
        close(scribe, PERIOD, RIFT_0=len(scribe.streams["RIFT_0"]) - 1)
    warehouse = Warehouse.open(Path(":memory:"))
    try:
        for stream in (subjects.BOOK, "RIFT_0"):
            warehouse.apply(stream, scribe.streams[stream])
        for check in ("shares.check", "usage.check", "invoice_lines.check"):
            assert warehouse.query(sql(check)).rows == [], check
        shares: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
        for request, *line, seconds, nanousd in warehouse.query(
            "select request_id, account, period, model, price_version, seconds, shares.nanousd"
            " from shares join charges using (request_id, account, period, model, price_version)"
            " order by stream, sequence, event_index"
        ).rows:
            assert seconds == own[request]
            shares.setdefault(tuple(line), []).append((seconds, nanousd))
        for account in ("acme", "beta", "dev"):
            bills = [invoice(warehouse.read, account, period) for period in (PERIOD, NEXT)]
            for bill in bills:
                assert msgspec.to_builtins(bill) == reckoning.invoice(scribe.streams, account, bill.period)
                for line in bill.lines:
                    divided_line = shares.pop((account, bill.period, line.model, line.price_version))
                    seconds = [seconds for seconds, _ in divided_line]
                    assert [nanousd for _, nanousd in divided_line] == divided(line.nanousd, seconds)
            for groups in ([], ["hour"]):
                rows = usage(warehouse.read, account, "1970-01-01", "9999-12-31", groups)["data"]
                assert sum(row["charge_nanousd"] for row in rows) == sum(bill.total_nanousd for bill in bills)
        assert not shares
    finally:
        warehouse.close()


def write_runs(scribe: Scribe, runs: list[tuple[str, str, int, int, int]]) -> dict[str, int]:
    """Write requests that run at these times; return the own seconds of each."""
    scribe.now_ns = DECEMBER_NS - 1000 * SECOND
    events: list[Any] = []
    own: dict[str, int] = {}
    for number, (account, model, version, start, tenths) in enumerate(runs):
        request = scribe.accept(account=account, plan="per_second", model=model, price_version=version)
        own[request] = -(-tenths // 10)
        attempt = f"a{number}"
        events.append((start, scribe.started(request, attempt), scribe.tokens_of(attempt, 0)))
        end = RequestFinished(request=request, attempt=attempt, reason="stop", output_tokens=1)
        events.append((start + tenths, end))
    for at, *batch in sorted(events, key=lambda event: event[0]):
        scribe.now_ns = DECEMBER_NS + at * SECOND // 10
        scribe.tell(*batch, step_ns=0)
    return own


def divided(amount: int, weights: list[int]) -> list[int]:
    """Divide an amount in proportion to weights, by the method of the largest remainder."""
    whole = sum(weights) or 1
    parts = [amount * weight // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda at: -(amount * weights[at] % whole))
    for at in by_remainder[: amount - sum(parts)]:
        parts[at] += 1
    return parts


@pytest.mark.parametrize("rules", [None, 1, 2])
def test_a_line_charges_no_more_than_it_would_alone(
    rules: int | None, scribe: Any, warehouse: Warehouse
) -> None:
    """Time that an earlier line paid for cuts a run in pieces, which are rounded up but not charged more.

    They are in a month that was closed by the first version of the rules, which stays as it was.
    """
    opened(scribe)
    scribe.prices(1, second_nanousd=5)
    scribe.prices(2, second_nanousd=7)
    ends = []
    for version, spans in ((2, [(0, 30), (0, 30)]), (1, [(5, 6), (15, 16)])):
        for start, end in spans:
            request = scribe.accept(plan="per_second", price_version=version)
            ends.append((start, scribe.started(request, request), scribe.tokens_of(request, 0)))
            finished = RequestFinished(request=request, attempt=request, reason="stop", output_tokens=1)
            ends.append((end, finished))
    began_ns = scribe.now_ns
    for at, *batch in sorted(ends, key=lambda event: event[0]):
        scribe.now_ns = began_ns + at * SECOND // 10
        scribe.tell(*batch, step_ns=0)
    if rules is not None:
        close(scribe, PERIOD, rules)
    first, second = lines(applied(warehouse, scribe))
    # Pieces of 0.5, 0.9 and 1.4 s: 1 + 1 + 2 seconds, but alone the two requests would have paid 3.
    charged = 4 if rules == 1 else 3
    assert (first.seconds, second.seconds, second.nanousd) == (2, charged, charged * 7)
    assert list(warehouse.failed_checks()) == []


def close(scribe: Any, period: str, rules: int = 2, **positions: int) -> None:
    reached = {stream: len(messages) for stream, messages in scribe.streams.items()} | positions
    scribe.book(
        schema.PeriodClosed(
            id=f"period.{period}.{len(scribe.streams[subjects.BOOK])}",
            period=period,
            positions=reached,
            roots={},
            digest="0" * 64,
            rules=rules,
        )
    )


def test_a_closed_period_stays_as_it_was(scribe: Any, warehouse: Warehouse) -> None:
    """A late record, by stored time or by position, is charged in the first month that is still open."""
    opened(scribe)
    scribe.prices(**PRICES)
    scribe.finished_request()
    close(scribe, PERIOD)
    before = lines(applied(warehouse, scribe))
    late = scribe.finished_request()
    # A second, different close is ignored.
    close(scribe, PERIOD, RIFT_0=99)
    scribe.book(schema.UsageCorrected(id="c1", account="dev", nanousd=-5, reason="sorry", model="tiny:1"))
    applied(warehouse, scribe)
    assert lines(warehouse) == before
    assert invoice(warehouse.read, "dev", PERIOD).status == "closed"
    assert invoice(warehouse.read, "dev", PERIOD).positions["RIFT_0"] == 6
    corrected, charged = lines(warehouse, period=NEXT)
    assert (corrected.plan, corrected.nanousd, corrected.requests) == ("correction", -5, 1)
    assert warehouse.query("select request_id from charges where period = '2023-12'").rows == [[late], [None]]
    assert charged.nanousd == before[0].nanousd
    assert len(warehouse.query("from periods").rows) == 1


def test_what_two_closed_months_miss_goes_to_the_third(scribe: Any, warehouse: Warehouse) -> None:
    opened(scribe)
    scribe.prices(**PRICES)
    scribe.finished_request()
    close(scribe, PERIOD)
    scribe.now_ns += 20 * DAY
    scribe.finished_request()
    close(scribe, NEXT)
    scribe.now_ns -= 20 * DAY
    # Stored times never decrease, so this request belongs to December, which is closed.
    scribe.finished_request()
    applied(warehouse, scribe)
    assert [len(lines(warehouse, period=period)) for period in (PERIOD, NEXT, LATER)] == [1, 1, 1]


def test_the_digest_of_a_period_is_over_every_line_of_every_invoice(
    scribe: Any, warehouse: Warehouse
) -> None:
    opened(scribe, "acme", "dev")
    scribe.prices(**PRICES)
    scribe.finished_request()
    scribe.finished_request(account="acme")
    applied(warehouse, scribe)
    text = ""
    for account in ("acme", "dev"):
        [line] = lines(warehouse, account)
        row = f"tiny:1 per_token 1 7 0 3 0 {line.nanousd} 1 {line.digest}\n"
        text += f"{account} {line.nanousd} {hashlib.sha256(row.encode()).hexdigest()}\n"
    closed = closing(warehouse.read, PERIOD)
    assert closed.digest == hashlib.sha256(text.encode()).hexdigest()
    assert (closed.accounts, closed.total_nanousd) == (2, 2 * (7 * 100 + 3 * 350))


def test_usage_is_grouped_as_asked(scribe: Any, warehouse: Warehouse) -> None:
    opened(scribe)
    scribe.prices(**PRICES)
    for _ in range(2):
        scribe.finished_request()
        scribe.now_ns += DAY
    applied(warehouse, scribe)
    day = {"day": "2023-11-14", "requests": 1, "charged_requests": 1, "prompt_tokens": 7}
    by_day = usage(warehouse.read, "dev", "2023-11-14", "2023-11-14", ["day"])["data"]
    assert [row | day for row in by_day] == by_day
    [whole] = usage(warehouse.read, "dev", "1970-01-01", "9999-12-31", [])["data"]
    assert (whole["requests"], whole["charge_nanousd"]) == (2, 2 * (7 * 100 + 3 * 350))
    assert usage(warehouse.read, "dev", "2030-01-01", "2030-01-02", [])["data"] == []


def test_usage_by_hour_and_its_bound(
    scribe: Any, warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(scribe)
    scribe.prices(**PRICES)
    for _ in range(3):
        scribe.finished_request()
        scribe.now_ns += 3600 * SECOND
    applied(warehouse, scribe)
    days = "2023-11-14", "2023-11-15"
    monkeypatch.setattr(billing, "USAGE_ROWS_MAX", 3)
    hours = usage(warehouse.read, "dev", *days, ["hour", "model"])["data"]
    assert [(row["hour"], row["model"], row["requests"]) for row in hours] == [
        (f"2023-11-{hour}:00:00Z", "tiny:1", 1) for hour in ("14T22", "14T23", "15T00")
    ]
    [first] = usage(warehouse.read, "dev", days[0], days[0], ["day"])["data"]
    assert (first["day"], first["requests"]) == (days[0], 2)
    monkeypatch.setattr(billing, "USAGE_ROWS_MAX", 2)
    with pytest.raises(
        BillingRefused, match="group_by: hour from 2023-11-14 to 2023-11-15 has more than 2 rows"
    ):
        usage(warehouse.read, "dev", *days, ["hour"])


def test_invoices_are_listed_newest_first_in_pages(scribe: Any, warehouse: Warehouse) -> None:
    opened(scribe, "dev", "acme")
    scribe.prices(**PRICES)
    scribe.finished_request()
    close(scribe, PERIOD)
    for _ in range(2):
        scribe.now_ns += 31 * DAY
        scribe.finished_request()
    scribe.book(schema.UsageCorrected(id="c1", account="dev", nanousd=-5_000, reason="sorry"))
    applied(warehouse, scribe)
    listed = invoice_list(warehouse.read, "dev", 10, None)
    assert [(each["period"], each["status"]) for each in listed["data"]] == [
        (LATER, "open"), (NEXT, "open"), (PERIOD, "closed")
    ]  # fmt: skip
    for each in listed["data"]:
        assert each["total_nanousd"] == invoice(warehouse.read, "dev", each["period"]).total_nanousd
    assert listed["data"][0]["total_usd"] == "-0.000003250"
    assert not listed["has_more"]
    page = invoice_list(warehouse.read, "dev", 1, LATER)
    assert ([each["period"] for each in page["data"]], page["has_more"]) == ([NEXT], True)
    assert invoice_list(warehouse.read, "acme", 10, None)["data"] == []


WRONG = {
    "'2023-1' is not a period": lambda read: invoice_list(read, "dev", 1, "2023-1"),
    "there is no account 'none'": lambda read: invoice_list(read, "none", 1, None),
    "no account 'nobody'": lambda read: invoice(read, "nobody", PERIOD),
    "'2023-13' is not a period": lambda read: invoice(read, "dev", "2023-13"),
    "'2023-02-31' is not a day": lambda read: usage(read, "dev", "2023-02-31", "2023-03-01", []),
    "from: '2023-03-02' is after to: '2023-03-01'": lambda read: usage(
        read, "dev", "2023-03-02", "2023-03-01", []
    ),
    "group_by: 'day' is named more than once": lambda read: usage(
        read, "dev", "2023-02-01", "2023-03-01", ["day", "model", "day"]
    ),
    "'colour' is not a group": lambda read: usage(read, "dev", "2023-02-01", "2023-03-01", ["colour"]),
    "there is no account 'nobody'": lambda read: usage(read, "nobody", "2023-02-01", "2023-03-01", []),
}


@pytest.mark.parametrize("message", WRONG)
def test_questions_that_name_what_is_not_there(message: str, scribe: Any, warehouse: Warehouse) -> None:
    opened(scribe)
    applied(warehouse, scribe)
    with pytest.raises(BillingRefused, match=message):
        WRONG[message](warehouse.read)


def test_focus_rows_add_up_to_the_invoice(scribe: Any, warehouse: Warehouse) -> None:
    opened(scribe)
    scribe.prices(**PRICES, cached_prompt_nanousd=10, second_nanousd=1_000)
    scribe.finished_request()
    scribe.finished_request(plan="per_second")
    scribe.book(schema.UsageCorrected(id="c1", account="dev", nanousd=-5, reason="sorry"))
    applied(warehouse, scribe)
    answer = warehouse.query("from prices")
    rows = [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
    bill = invoice(warehouse.read, "dev", PERIOD)
    text = focus_csv.csv_of(bill, {(row["version"], row["model"]): row for row in rows})
    head, *csv_rows = [line.split(",") for line in text.splitlines()]
    costs = [line[head.index("BilledCost")].replace(".", "") for line in csv_rows]
    assert sum(map(int, costs)) == bill.total_nanousd
    assert [line[head.index("ChargeCategory")] for line in csv_rows] == [
        "Adjustment",
        "Usage",
        "Usage",
        "Usage",
    ]
    assert {line[head.index("BillingPeriodEnd")] for line in csv_rows} == {"2023-12-01T00:00:00Z"}
