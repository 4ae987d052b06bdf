"""Unions of time spans and their whole seconds, for the spending of a hold under plan per_second.

Invoice lines are united and rounded in the same way (`replay/sql/invoice_lines.sql`).
"""

from collections.abc import Iterable, Sequence
from itertools import islice

from events.contracts import SECOND_NS

# Start and end, in nanoseconds.
Span = tuple[int, int]


def unite(spans: Iterable[Span]) -> list[Span]:
    """Return the union of the spans, in order; spans that touch become one, and empty ones are dropped."""
    united: list[Span] = []
    for start, end in sorted(spans):
        if united and start <= united[-1][1]:
            united[-1] = united[-1][0], max(united[-1][1], end)
        elif start < end:
            united.append((start, end))
    return united


def subtract(united: Iterable[Span], taken: Sequence[Span]) -> list[Span]:
    """Return the parts of spans that none of `taken` covers. Both come from `unite`."""
    left: list[Span] = []
    at = 0
    for start, end in united:
        while at < len(taken) and taken[at][1] <= start:
            at += 1
        for low, high in islice(taken, at, None):
            if low >= end:
                break
            if start < low:
                left.append((start, low))
            start = high
        if start < end:
            left.append((start, end))
    return left


def whole_seconds(united: Iterable[Span]) -> int:
    """Return the seconds of spans that do not overlap, each rounded up."""
    return sum(-((start - end) // SECOND_NS) for start, end in united)
