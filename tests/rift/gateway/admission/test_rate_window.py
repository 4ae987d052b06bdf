"""The sliding window: no minute exceeds a limit, and a client that waits as the error says gets in."""

from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from events.contracts import MESSAGE_BYTES_MAX
from events.schema import LimitsSet
from rift.gateway.admission import rate_window
from rift.gateway.admission.rate_window import (
    MINUTE_NS,
    MS_NS,
    Exceeded,
    LimitShare,
    RateReservation,
    RateWindow,
    WindowEntry,
)

SECOND_NS = 1_000_000_000


class Call(NamedTuple):
    """A request. `counted` are its actual tokens, and it ends after `lasts` more calls."""

    after_ms: int
    requests: int
    tokens: int
    counted: int
    lasts: int


def asked(at_ns: int, call: Call) -> WindowEntry:
    return WindowEntry(at_ns, call.requests, call.tokens)


class Admitted(NamedTuple):
    at_ns: int
    call: Call
    reservation: RateReservation
    ends: int


CALLS = st.builds(
    Call,
    after_ms=st.integers(0, 20_000),
    requests=st.integers(1, 3),
    tokens=st.integers(0, 60),
    counted=st.integers(0, 60),
    lasts=st.integers(0, 5),
)
SHARES = st.builds(
    LimitShare,
    requests=st.none() | st.integers(1, 8),
    tokens=st.none() | st.integers(1, 200),
    concurrent=st.none() | st.integers(1, 6),
)


@given(st.lists(CALLS, max_size=60), SHARES, SHARES)
def test_no_minute_exceeds_a_limit_and_the_wait_is_exact(
    calls: list[Call], a: LimitShare, b: LimitShare
) -> None:
    window = RateWindow()
    now_ns = 7
    shares = {"account": a, "key": b}
    admitted: list[Admitted] = []
    for number, call in enumerate(calls):
        now_ns += call.after_ms * MS_NS
        for earlier in admitted:
            if earlier.ends == number:
                tokens = min(earlier.call.tokens, earlier.call.counted)
                earlier.reservation.end(WindowEntry(now_ns, tokens=tokens))
        outcome = window.reserve(shares, asked(now_ns, call))
        if isinstance(outcome, Exceeded):
            _check_exceeded(shares, outcome, call)
            if not outcome.wait_ns or outcome.wait_ns < 0:
                continue
            early_ns = now_ns + outcome.wait_ns - 1
            early = window.reserve(shares, asked(early_ns, call))
            assert isinstance(early, Exceeded)
            now_ns += outcome.wait_ns
            outcome = window.reserve(shares, asked(now_ns, call))
            if isinstance(outcome, Exceeded):
                assert (outcome.name, outcome.wait_ns) == ("concurrent", None), (
                    "only running requests are left"
                )
                continue
        admitted.append(Admitted(now_ns, call, outcome, number + 1 + call.lasts))
        recent = [one for one in admitted if one.at_ns > now_ns - MINUTE_NS]
        for limit in (a, b):
            assert limit.requests is None or sum(one.call.requests for one in recent) <= limit.requests
            tokens = [
                min(one.call.tokens, one.call.counted) if one.ends <= number else one.call.tokens
                for one in recent
            ]
            assert limit.tokens is None or sum(tokens) <= limit.tokens
            running = sum(one.call.requests for one in admitted if one.ends > number)
            assert limit.concurrent is None or running <= limit.concurrent


def _check_exceeded(shares: dict[str, LimitShare], exceeded: Exceeded, call: Call) -> None:
    size = call.tokens if exceeded.name == "tokens_per_minute" else call.requests
    assert exceeded.limit == getattr(shares[exceeded.owner], exceeded.name.removesuffix("_per_minute"))
    assert (exceeded.wait_ns == -1) == (size > exceeded.limit)
    assert exceeded.wait_ns is None or exceeded.wait_ns == -1 or 0 < exceeded.wait_ns <= MINUTE_NS


def test_a_request_that_exceeds_one_limit_counts_against_none() -> None:
    window = RateWindow()
    shares = {"account": LimitShare(requests=5), "key": LimitShare(requests=1)}
    assert isinstance(window.reserve(shares, WindowEntry(0, 1, 0)), RateReservation)
    assert isinstance(window.reserve(shares, WindowEntry(1, 1, 0)), Exceeded)
    assert window.usage("account", 1).requests == 1


def test_an_undone_reservation_leaves_no_trace() -> None:
    window = RateWindow()
    shares = {"account": LimitShare(requests=1, tokens=10, concurrent=1)}
    reservation = window.reserve(shares, WindowEntry(0, 1, 10))
    assert isinstance(reservation, RateReservation)
    reservation.undo()
    assert isinstance(window.reserve(shares, WindowEntry(0, 1, 10)), RateReservation)


def test_a_request_that_ends_after_its_minute_only_frees_its_concurrent_place() -> None:
    window = RateWindow()
    shares = {"account": LimitShare(requests=9, tokens=100, concurrent=1)}
    reservation = window.reserve(shares, WindowEntry(0, 1, 50))
    assert isinstance(reservation, RateReservation)
    late_ns = MINUTE_NS + 1
    assert isinstance(window.reserve(shares, WindowEntry(late_ns, 1, 0)), Exceeded)
    reservation.end(WindowEntry(late_ns, tokens=5))
    usage = window.usage("account", late_ns)
    assert (usage.requests, usage.tokens, usage.running) == (0, 0, 0)


def test_the_headers_show_the_limit_with_the_least_left() -> None:
    window = RateWindow()
    shares = {"account": LimitShare(requests=10, tokens=1000), "key": LimitShare(requests=3, concurrent=4)}
    window.reserve(shares, WindowEntry(0, 1, 400))
    window.reserve(shares, WindowEntry(SECOND_NS, 1, 100))
    now_ns = 2 * SECOND_NS
    usages = {owner: (share, window.usage(owner, now_ns)) for owner, share in shares.items()}
    assert dict(rate_window.headers(usages, now_ns)) == {
        b"x-ratelimit-limit-requests": b"3",
        b"x-ratelimit-remaining-requests": b"1",
        b"x-ratelimit-reset-requests": b"59.000s",
        b"x-ratelimit-limit-tokens": b"1000",
        b"x-ratelimit-remaining-tokens": b"500",
        b"x-ratelimit-reset-tokens": b"59.000s",
        b"x-ratelimit-limit-concurrent": b"4",
        b"x-ratelimit-remaining-concurrent": b"2",
    }
    assert rate_window.headers({}, now_ns) == []


def test_undone_requests_and_tokens_do_not_delay_a_reset() -> None:
    window = RateWindow()
    share = LimitShare(requests=9, tokens=900)
    window.reserve({"key": share}, WindowEntry(0, 1, 100))
    without_tokens = window.reserve({"key": share}, WindowEntry(10 * SECOND_NS, 1, 100))
    undone = window.reserve({"key": share}, WindowEntry(30 * SECOND_NS, 1, 100))
    assert isinstance(without_tokens, RateReservation)
    assert isinstance(undone, RateReservation)
    without_tokens.end(WindowEntry(30 * SECOND_NS))
    undone.undo()
    now_ns = 31 * SECOND_NS
    headers = dict(rate_window.headers({"key": (share, window.usage("key", now_ns))}, now_ns))
    assert headers[b"x-ratelimit-reset-requests"] == b"39.000s"
    assert headers[b"x-ratelimit-reset-tokens"] == b"29.000s"


def test_each_gateway_has_an_equal_share_of_at_least_one() -> None:
    limits = LimitsSet(
        id="l",
        account="a",
        requests_per_minute=7,
        tokens_per_minute=100,
        concurrent=2,
        log_bytes_per_minute=1000,
    )
    assert rate_window.share(limits, 1) == LimitShare(7, 100, 2, 1000)
    assert rate_window.share(limits, 3) == LimitShare(2, 33, 1, 333)
    assert rate_window.share(LimitsSet(id="l", account="a"), 3) == LimitShare()


def test_bytes_wait_for_one_another_and_a_single_request_never_waits() -> None:
    window = RateWindow()
    share = {"account": LimitShare(log_bytes=100)}

    def reserve(at_s: int, log_bytes: int) -> RateReservation | Exceeded:
        return window.reserve(share, WindowEntry(at_s * SECOND_NS, 1, log_bytes=log_bytes))

    first = reserve(0, 700)
    assert isinstance(first, RateReservation), "no smaller request would be admitted earlier"
    refused = reserve(1, 1)
    assert refused == Exceeded("account", "log_bytes_per_minute", 100, 59 * SECOND_NS)
    first.undo()
    assert isinstance(reserve(2, 60), RateReservation)
    last = reserve(3, 40)
    assert isinstance(last, RateReservation)
    last.end(WindowEntry(10 * SECOND_NS, log_bytes=500))
    # Choices that each store the same large prompt never fit together.
    assert reserve(11, MESSAGE_BYTES_MAX + 1) == Exceeded("account", "log_bytes_per_minute", 100, -1)
    # A large one waits for all of them, and an answer counts from its end on.
    assert reserve(11, 300) == Exceeded("account", "log_bytes_per_minute", 100, 59 * SECOND_NS)
    assert isinstance(reserve(70, 300), RateReservation)


def test_nothing_is_kept_of_owners_that_send_nothing_more() -> None:
    window = RateWindow()
    running = window.reserve({"running": LimitShare(requests=9)}, WindowEntry(0, 1, 1))
    assert isinstance(running, RateReservation)
    for number in range(20):
        reserved = window.reserve({f"account {number}": LimitShare(requests=9)}, WindowEntry(0, 1, 1))
        assert isinstance(reserved, RateReservation)
        reserved.end(None)
    for second in range(30):
        window.reserve({"active": LimitShare(requests=99)}, WindowEntry(MINUTE_NS + second, 1, 1))
    assert len(window) == 2, "the active one, and the one with a running request"
