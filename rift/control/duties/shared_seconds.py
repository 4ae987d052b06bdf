"""Correct a request under plan per_second, whose seconds other requests may share: a pure function."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import groupby

import msgspec

from events.intervals import Span, subtract, unite, whole_seconds


class Run(msgspec.Struct):
    """An attempt of a charged request: a row of `unread_spans.sql`. `line` orders the lines of the invoices;
    `corrected_nanousd` is None before the request's correction."""

    request: str
    line: tuple[str, int]
    second_nanousd: int
    corrected_nanousd: int | None
    from_ns: int
    to_ns: int

    @property
    def span(self) -> Span:
        return self.from_ns, self.to_ns


def correction_nanousd(request: str, runs: Sequence[Run]) -> int:
    """Return what the bill falls by without this request, besides those that are corrected already.

    It is at most the price of the request's own seconds, and what corrections have left of the charge for the
    time around it. It is never negative, although two requests cost more without one that fills the gap
    between them.
    """
    around = _around(request, runs)
    others = [run for run in around if run.corrected_nanousd is None and run.request != request]
    own = [run for run in around if run.request == request]
    added = _nanousd([*others, *own]) - _nanousd(others)
    corrected = {run.request: run.corrected_nanousd or 0 for run in around}
    left = _nanousd(around) + sum(corrected.values())
    own_nanousd = sum(whole_seconds([run.span]) * run.second_nanousd for run in own)
    return max(0, min(added, left, own_nanousd))


def _around(request: str, runs: Iterable[Run]) -> list[Run]:
    """Return the runs that share time with the request, or with another one that shares some, and so on."""
    busy = unite(run.span for run in runs)
    by_busy: dict[int, list[Run]] = {}
    by_request: dict[str, list[int]] = {}
    for run in runs:
        if run.from_ns < run.to_ns:
            at = bisect_right(busy, run.from_ns, key=lambda span: span[0]) - 1
            by_busy.setdefault(at, []).append(run)
            by_request.setdefault(run.request, []).append(at)
    open_requests, found = [request], {request}
    reached: set[int] = set()
    while open_requests:
        for at in by_request.get(open_requests.pop(), ()):
            if at not in reached:
                reached.add(at)
                near = {run.request for run in by_busy[at]} - found
                found |= near
                open_requests += near
    return [run for at in sorted(reached) for run in by_busy[at]]


def _nanousd(runs: Iterable[Run]) -> int:
    """Return the charge for these runs, as `invoice_lines.sql` computes it."""
    nanousd = 0
    paid: list[Span] = []
    for _, line in groupby(sorted(runs, key=lambda run: run.line), lambda run: run.line):
        first, *more = line
        spans = unite([first.span, *(run.span for run in more)])
        seconds = min(whole_seconds(subtract(spans, paid)), whole_seconds(spans))
        nanousd += seconds * first.second_nanousd
        paid = unite([*paid, *spans])
    return nanousd
