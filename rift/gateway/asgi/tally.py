"""Counts for the log of what clients can cause at any rate."""

from collections import Counter

import anyio

# At most one line in the log in this time reports a tally.
REPORT_S = 60


class Tally:
    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._due_at_s = 0.0

    def add(self, *names: str) -> Counter[str]:
        """Count one of each name. If a report is due, return all counts since the last one, else none."""
        self._counts.update(names)
        if (now_s := anyio.current_time()) < self._due_at_s:
            return Counter()
        self._due_at_s = now_s + REPORT_S
        counts, self._counts = self._counts, Counter()
        return counts
