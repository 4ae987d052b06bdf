"""Histories of plan per_second around the end of a month, and the charged seconds of each invoice line."""

from typing import Any

from events.schema import AccountOpened, LimitsSet, PeriodClosed, RequestFinished
from tests.replay.conftest import Scribe, started, tokens_of

SECOND = 1_000_000_000
DECEMBER_NS = 1_701_388_800 * SECOND
PERIOD, NEXT = "2023-11", "2023-12"

# Runs of one request each: price version, start and end in seconds relative to 1 December. Then the lines:
# period, price version, seconds. In histories named "late", the last record is stored after November closed.
SECONDS: dict[str, tuple[list[tuple[int, float, float]], list[tuple[str, int, int]]]] = {
    "across midnight": ([(1, -590, 1)], [(NEXT, 1, 591)]),
    "across midnight, with one that paid": ([(1, -10, -6), (1, -8, 3)], [(PERIOD, 1, 4), (NEXT, 1, 9)]),
    "with a newer version, paid before": ([(2, -10, -4), (1, -10, 3)], [(PERIOD, 2, 6), (NEXT, 1, 7)]),
    "late": ([(1, -10, -5)], [(NEXT, 1, 5)]),
    "late, some of it paid": ([(1, -20, -12), (1, -15, -5)], [(PERIOD, 1, 8), (NEXT, 1, 7)]),
    "an older version": ([(1, -10, -6), (2, -10, -4)], [(PERIOD, 1, 4), (PERIOD, 2, 2)]),
    "an older version that ran last": (
        [(2, -50, -40), (2, -38, -28), (1, -20, -19.5)],
        [(PERIOD, 1, 1), (PERIOD, 2, 20)],
    ),
    "an older version in the middle": (
        [(1, -15.5, -14.75), (2, -20, -10)],
        [(PERIOD, 1, 1), (PERIOD, 2, 5 + 5)],
    ),
    "an older version all along": ([(1, -20, -5), (2, -15, -10)], [(PERIOD, 1, 15), (PERIOD, 2, 0)]),
    "an older version for no time": ([(1, -15, -15), (2, -20.5, -10)], [(PERIOD, 1, 0), (PERIOD, 2, 11)]),
}


def runs_of(scribe: Scribe, name: str) -> list[tuple[str, int, int]]:
    """Write one of these histories with two price lists, and return its expected lines."""
    scribe.book(
        AccountOpened(id="account.dev", account="dev"),
        LimitsSet(id="limits.dev", account="dev", plan="per_second"),
    )
    scribe.now_ns = DECEMBER_NS - 1000 * SECOND
    runs, expected = SECONDS[name]
    events: list[Any] = []
    for version in (1, 2):
        scribe.prices(version, second_nanousd=version)
        for number, (of_version, start, end) in enumerate(runs):
            if of_version == version:
                request, attempt = scribe.accept(plan="per_second", price_version=version), f"a{number}"
                events.append((start, started(request, attempt), tokens_of(attempt, 0)))
                finished = RequestFinished(request=request, attempt=attempt, reason="stop", output_tokens=1)
                events.append((end, finished))
    for at, *batch in sorted(events, key=lambda event: event[0]):
        scribe.now_ns = DECEMBER_NS + int(at * SECOND)
        scribe.tell(*batch, step_ns=0)
    if name.startswith("late"):
        reached = {"RIFT_0": len(scribe.streams["RIFT_0"]) - 1}
        scribe.book(PeriodClosed(id="close", period=PERIOD, positions=reached, roots={}, digest="0" * 64))
    return expected
