"""Times in which something ran, and the seconds that they are: what of a hold is spent under plan per_second.

Invoice lines unite and round the same way (`replay/sql/invoice_lines.sql`).
"""

from collections.abc import Iterable

from events.contracts import SECOND_NS

# From when to when, in nanoseconds.
Span = tuple[int, int]


def unite(spans: Iterable[Span]) -> list[Span]:
    """Return in order what the spans cover: what overlaps or touches is one, and an empty one is none."""
    united: list[Span] = []
    for start, end in sorted(spans):
        if united and start <= united[-1][1]:
            united[-1] = united[-1][0], max(united[-1][1], end)
        elif start < end:
            united.append((start, end))
    return united


def whole_seconds(united: Iterable[Span]) -> int:
    """Return the seconds of spans that do not overlap, each rounded up."""
    return sum(-((start - end) // SECOND_NS) for start, end in united)
