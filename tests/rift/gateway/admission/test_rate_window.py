"""What fits into a minute and at once, and what is said of it: whoever waits as told gets in."""

from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from events.schema import LimitsSet
from rift.gateway.admission import rate_window
from rift.gateway.admission.rate_window import MINUTE_NS, MS_NS, Part, RateWindow, Refused, Taken

SECOND_NS = 1_000_000_000
NONE = None


class Asked(NamedTuple):
    after_ms: int
    requests: int
    tokens: int
    counted: int
    lasts: int


ASKED = st.builds(
    Asked,
    after_ms=st.integers(0, 20_000),
    requests=st.integers(1, 3),
    tokens=st.integers(0, 60),
    counted=st.integers(0, 60),
    lasts=st.integers(0, 5),
)
PARTS = st.builds(
    Part,
    requests=st.none() | st.integers(1, 8),
    tokens=st.none() | st.integers(1, 200),
    concurrent=st.none() | st.integers(1, 6),
)


@given(st.lists(ASKED, max_size=60), PARTS, PARTS)
def test_no_minute_holds_more_and_who_waits_as_told_gets_in(asked: list[Asked], a: Part, b: Part) -> None:
    limiter, now_ns, parts = RateWindow(), 7, {"account": a, "key": b}
    accepted: list[tuple[int, Asked, Taken, int]] = []
    for number, one in enumerate(asked):
        now_ns += one.after_ms * MS_NS
        for _at, earlier, taken, ends in accepted:
            if ends == number:
                rate_window.end(taken, tokens=min(earlier.tokens, earlier.counted))
        found = limiter.take(parts, now_ns, requests=one.requests, tokens=one.tokens)
        if isinstance(found, Refused):
            _check_refusal(limiter, parts, found, now_ns, one)
            if not found.wait_ns or found.wait_ns < 0:
                continue
            early_ns = now_ns + found.wait_ns - 1
            assert isinstance(
                limiter.take(parts, early_ns, requests=one.requests, tokens=one.tokens), Refused
            )
            now_ns += found.wait_ns
            found = limiter.take(parts, now_ns, requests=one.requests, tokens=one.tokens)
            if isinstance(found, Refused):
                # Nothing but what is still under way is in the way.
                assert (found.what, found.wait_ns) == ("concurrent", None)
                continue
        accepted.append((now_ns, one, found, number + 1 + one.lasts))
        recent = [(earlier, ends) for at, earlier, _, ends in accepted if at > now_ns - MINUTE_NS]
        for of in (a, b):
            assert of.requests is None or sum(one.requests for one, _ in recent) <= of.requests
            said = [min(one.tokens, one.counted) if ends <= number else one.tokens for one, ends in recent]
            assert of.tokens is None or sum(said) <= of.tokens
            open_now = sum(one.requests for _, one, _, ends in accepted if ends > number)
            assert of.concurrent is None or open_now <= of.concurrent


def _check_refusal(
    limiter: RateWindow, parts: dict[str, Part], found: Refused, now_ns: int, one: Asked
) -> None:
    of = parts[found.whose]
    asked = one.tokens if found.what == "tokens_per_minute" else one.requests
    assert found.limit == getattr(of, found.what.removesuffix("_per_minute"))
    assert (found.wait_ns == -1) == (asked > found.limit)
    assert found.wait_ns is None or found.wait_ns == -1 or 0 < found.wait_ns <= MINUTE_NS


def test_what_was_refused_by_one_limit_is_taken_of_none() -> None:
    limiter = RateWindow()
    parts = {"account": Part(requests=5), "key": Part(requests=1)}
    assert isinstance(limiter.take(parts, 0, requests=1, tokens=0), Taken)
    assert isinstance(limiter.take(parts, 1, requests=1, tokens=0), Refused)
    assert limiter.usage("account", 1).requests == 1


def test_what_was_not_accepted_after_all_leaves_no_trace() -> None:
    limiter, parts = RateWindow(), {"account": Part(requests=1, tokens=10, concurrent=1)}
    taken = limiter.take(parts, 0, requests=1, tokens=10)
    assert isinstance(taken, Taken)
    rate_window.undo(taken)
    assert isinstance(limiter.take(parts, 0, requests=1, tokens=10), Taken)


def test_what_ends_after_its_minute_frees_its_place_and_changes_no_count() -> None:
    limiter, parts = RateWindow(), {"account": Part(requests=9, tokens=100, concurrent=1)}
    taken = limiter.take(parts, 0, requests=1, tokens=50)
    assert isinstance(taken, Taken)
    late_ns = MINUTE_NS + 1
    assert isinstance(limiter.take(parts, late_ns, requests=1, tokens=0), Refused)
    rate_window.end(taken, tokens=5)
    usage = limiter.usage("account", late_ns)
    assert (usage.requests, usage.tokens, usage.under_way) == (0, 0, 0)


def test_the_headers_say_what_is_left_of_the_tightest() -> None:
    limiter, parts = (
        RateWindow(),
        {"account": Part(requests=10, tokens=1000), "key": Part(requests=3, concurrent=4)},
    )
    limiter.take(parts, 0, requests=1, tokens=400)
    limiter.take(parts, SECOND_NS, requests=1, tokens=100)
    now_ns = 2 * SECOND_NS
    usages = {whose: (of, limiter.usage(whose, now_ns)) for whose, of in parts.items()}
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


def test_what_was_given_back_puts_off_no_reset() -> None:
    limiter, of = RateWindow(), Part(requests=9, tokens=900)
    limiter.take({"key": of}, 0, requests=1, tokens=100)
    without_tokens = limiter.take({"key": of}, 10 * SECOND_NS, requests=1, tokens=100)
    refused_later = limiter.take({"key": of}, 30 * SECOND_NS, requests=1, tokens=100)
    assert isinstance(without_tokens, Taken)
    assert isinstance(refused_later, Taken)
    rate_window.end(without_tokens, tokens=0)
    rate_window.undo(refused_later)
    now_ns = 31 * SECOND_NS
    told = dict(rate_window.headers({"key": (of, limiter.usage("key", now_ns))}, now_ns))
    assert told[b"x-ratelimit-reset-requests"] == b"39.000s"
    assert told[b"x-ratelimit-reset-tokens"] == b"29.000s"


def test_several_gateways_give_out_a_part_each_and_one_at_least() -> None:
    held = LimitsSet(id="l", account="a", requests_per_minute=7, tokens_per_minute=100, concurrent=2)
    assert rate_window.part(held, 1) == Part(7, 100, 2)
    assert rate_window.part(held, 3) == Part(2, 33, 1)
    assert rate_window.part(LimitsSet(id="l", account="a"), 3) == Part()
