"""A bound of this gateway and its present use, for metrics. The README lists all bounds."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol


class Bound(NamedTuple):
    """`used` of at most `limit`, in total for all accounts. `name` is a label: a noun and its unit."""

    name: str
    limit: float
    used: float


class Bounded(Protocol):
    def bounds(self) -> Iterable[Bound]:
        """Return the bounds as they are used now. Called at each scrape."""
