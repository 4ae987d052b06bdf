"""The in-memory `Demands` against a direct count, exact to the nanosecond."""

import random

import msgspec

from events.contracts import SECOND_NS
from replay.scaling.demand import (
    ENDED_NS,
    MINUTE_NS,
    PAST_NS,
    PASTS,
    SPEED_NS,
    Demand,
    Demands,
    Reports,
)
from replay.scaling.hardware import profile

R1 = profile("mi300x-deepseek-r1")


class One(msgspec.Struct):
    accepted_at_ns: int
    started_at_ns: int | None
    ended_at_ns: int | None
    prompt_tokens: int
    output_tokens: int
    decode_ns: int


def counted(ones: list[One], now_ns: int) -> Demand:
    """Return the Demand by counting directly, following the comments of the fields."""
    known = [one for one in ones if one.accepted_at_ns <= now_ns]
    ended = [one for one in known if one.ended_at_ns is not None and one.ended_at_ns <= now_ns]
    going = [one for one in known if one not in ended]
    running = [one for one in going if one.started_at_ns is not None and one.started_at_ns <= now_ns]

    def within(one: One, width_ns: int) -> bool:
        return one.ended_at_ns is not None and now_ns - width_ns < one.ended_at_ns <= now_ns

    def under_way(at_ns: int) -> int:
        return sum(
            one.accepted_at_ns <= at_ns and (one.ended_at_ns is None or one.ended_at_ns > at_ns)
            for one in known
        )

    recent = [one for one in ended if within(one, ENDED_NS) and one.output_tokens]
    decoded = [one for one in ended if within(one, SPEED_NS) and one.output_tokens > 1]
    return Demand(
        now_ns=now_ns,
        waiting=len(going) - len(running),
        running=len(running),
        past=tuple(under_way(now_ns - PAST_NS * back) for back in range(1, PASTS + 1)),
        arrived_minute=sum(one.accepted_at_ns > now_ns - MINUTE_NS for one in known),
        ended=len(recent),
        prompt_tokens=sum(one.prompt_tokens for one in recent),
        output_tokens=sum(one.output_tokens for one in recent),
        decode_ns=sum(one.decode_ns for one in decoded),
        decode_tokens=sum(one.output_tokens - 1 for one in decoded),
        active_at_ns=max(
            [one.accepted_at_ns for one in known] + [one.ended_at_ns or 0 for one in ended], default=0
        ),
    )


def test_the_accumulator_counts_what_is_defined() -> None:
    chance = random.Random(3)
    ones = []
    for _ in range(400):
        accepted = chance.randrange(0, 7200) * SECOND_NS // 2
        started = accepted + chance.choice([0, 40 * SECOND_NS])
        ended = started + chance.randrange(0, 900) * SECOND_NS // 2
        output = chance.choice([0, 1, 2, 500])
        never = chance.random() < 0.05
        ones.append(
            One(accepted, None if never else started, ended, chance.randrange(2000), output, ended - started)
        )
    happened = sorted(
        [(one.accepted_at_ns, 0, number) for number, one in enumerate(ones)]
        + [(one.started_at_ns, 1, n) for n, one in enumerate(ones) if one.started_at_ns is not None]
        + [(one.ended_at_ns or 0, 2, number) for number, one in enumerate(ones)]
    )
    demands = Demands()
    for place, (at_ns, what, number) in enumerate(happened):
        one = ones[number]
        if what == 0:
            demands.accepted(number, at_ns)
        elif what == 1:
            demands.started(number, at_ns)
        else:
            demands.ended(
                number,
                at_ns,
                prompt_tokens=one.prompt_tokens,
                output_tokens=one.output_tokens,
                decode_ns=one.decode_ns,
            )
        if place + 1 == len(happened) or happened[place + 1][0] > at_ns:
            assert demands.at(at_ns) == counted(ones, at_ns)


def test_a_window_holds_its_end_and_not_its_beginning() -> None:
    demands = Demands()
    demands.accepted("a", 0)
    assert demands.at(MINUTE_NS - 1).arrived_minute == 1
    assert demands.at(MINUTE_NS).arrived_minute == 0
    assert demands.at(PAST_NS).past[0] == 1
    assert demands.at(PAST_NS - 1).past[0] == 0
    demands.ended("a", MINUTE_NS, prompt_tokens=1, output_tokens=1, decode_ns=0)
    assert demands.at(MINUTE_NS + PAST_NS).past[:3] == (0, 1, 1)


def test_reports_are_kept_for_as_long_as_speeds() -> None:
    reports = Reports(R1)
    reports.reported(0, 3)
    reports.reported(10, 4)
    assert reports.at(10) == (7, R1.tokens_per_ks_at(3) + R1.tokens_per_ks_at(4))
    assert reports.at(SPEED_NS) == (4, R1.tokens_per_ks_at(4))
