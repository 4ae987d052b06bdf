"""What is given back for unread requests that shared seconds is at most what was charged for them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events.contracts import SECOND_NS
from rift.control.duties.shared_seconds import Run, correction_nanousd
from tests.replay import reckoning

OLD, NEW = ("2025-06", 1), ("2025-06", 2)
PRICES = {OLD: 5, NEW: 7}


def run(request: str, start: int, end: int, line: tuple[str, int] = OLD) -> Run:
    """Times are in tenths of a second."""
    return Run(request, line, PRICES[line], None, start * SECOND_NS // 10, end * SECOND_NS // 10)


def correct(runs: list[Run], *requests: str) -> list[int]:
    """Correct these requests one after the other."""
    corrections = []
    for request in requests:
        corrections.append(correction_nanousd(request, runs))
        for each in runs:
            if each.request == request:
                each.corrected_nanousd = -corrections[-1]
    return corrections


def charged(runs: list[Run]) -> int:
    """Return what invoices charge for these runs, before the limit of a whole line."""
    nanousd = 0
    for line, price in PRICES.items():
        spans = [each.span for each in runs if each.line == line]
        older = [each.span for each in runs if each.line < line]
        nanousd += reckoning.whole_seconds(reckoning.left(spans, older)) * price
    return nanousd


def own(request: str, runs: list[Run]) -> int:
    return sum(reckoning.whole_seconds([r.span]) * r.second_nanousd for r in runs if r.request == request)


@pytest.mark.parametrize(
    ("runs", "requests", "expected"),
    [
        # An older line paid for the second, so that nothing is given back for it.
        ([run("old", 0, 10), run("a", 0, 10, NEW)], "a", [0]),
        # The older line's run is unread: the newer line would have paid for its seconds.
        ([run("a", 0, 10), run("new", 0, 10, NEW)], "a", [0]),
        ([run("a", 0, 20), run("new", 0, 10, NEW)], "a", [10 - 7]),
        # Without the run in the gap two seconds would be charged, not one.
        ([run("x", 0, 1), run("a", 1, 9), run("y", 9, 10)], "a", [0]),
        ([run("x", 0, 1), run("a", 1, 9), run("y", 9, 10)], "axy", [0, 5, 0]),
        # Older runs cut it in three pieces, for which the line charges no more than its own second.
        ([run("x", 2, 3), run("y", 5, 6), run("a", 0, 9, NEW)], "a", [7]),
    ],
)
def test_a_correction_is_what_the_bill_falls_by(runs: list[Run], requests: str, expected: list[int]) -> None:
    assert correct(runs, *requests) == expected


def test_a_second_that_was_given_back_is_not_given_back_again() -> None:
    """The other request that ran in it is charged, and found unread, only after the first correction."""
    first, other, read = run("a", 0, 10), run("b", 0, 10), run("read", 30, 40)
    assert correct([first, read], "a") == [5]
    assert correct([first, other, read], "b") == [0]


runs_of = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.integers(0, 60), st.integers(0, 25), st.sampled_from((OLD, NEW))),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(drawn=runs_of, order=st.permutations("abcdef"), has_two_lines=st.booleans())
def test_corrections_of_all_requests_are_at_most_their_charges(
    drawn: list[tuple[str, int, int, tuple[str, int]]], order: list[str], has_two_lines: bool
) -> None:
    # All attempts of a request are on one line.
    lines = {request: line if has_two_lines else OLD for request, _, _, line in drawn}
    runs = [run(request, start, start + length, lines[request]) for request, start, length, _ in drawn]
    corrections = correct(runs, *order)
    for request, nanousd in zip(order, corrections, strict=True):
        assert 0 <= nanousd <= own(request, runs)
    assert sum(corrections) <= charged(runs)
    if not has_two_lines:
        assert sum(corrections) == charged(runs)
