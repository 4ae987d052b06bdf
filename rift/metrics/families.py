"""What a process counts in plain numbers. Each family becomes Prometheus metrics only at a scrape."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector as Collector

from events.contracts import SECOND_NS

# The most label sets of one family. Further ones count together, with OTHER as each label: a scrape stays
# small, and so does the memory of the process that scrapes.
SERIES_MAX = 1_000
OTHER = "other"

Values = tuple[str, ...]


def process() -> Collector:
    """Return the `process_` metrics of this process: CPU, memory, open files, start time."""
    return ProcessCollector(registry=None)


class Counts:
    """A number for each set of label values, which only grows. `name` ends in `_total`."""

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()) -> None:
        self._name = name
        self._help = help
        self._labels = labels
        self._counts: dict[Values, float] = {} if labels else {(): 0}

    def add(self, *values: str, n: float = 1) -> None:
        """Add `n` for one value of each label, in their order."""
        try:
            self._counts[values] += n
        except KeyError:
            if len(self._counts) >= SERIES_MAX:
                values = (OTHER,) * len(values)
            self._counts[values] = self._counts.get(values, 0) + n

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._help, labels=self._labels)
        for values, count in self._counts.items():
            family.add_metric(values, count)
        return [family]


class Buckets:
    """One series of a histogram. `observe` takes nanoseconds."""

    def __init__(self, bounds_ns: tuple[int, ...]) -> None:
        self._bounds_ns = bounds_ns
        self.counts = [0] * (len(bounds_ns) + 1)
        self.sum_ns = 0

    def observe(self, took_ns: int) -> None:
        self.counts[bisect_left(self._bounds_ns, took_ns)] += 1
        self.sum_ns += took_ns


class Histogram:
    """Durations by bucket, for each set of label values. `name` ends in `_seconds`; so do the bounds.

    A caller on a hot path keeps what `series` returns.
    """

    def __init__(self, name: str, help: str, bounds_s: Sequence[float], labels: Sequence[str] = ()) -> None:
        self._name = name
        self._help = help
        self._labels = labels
        self._bounds_s = (*bounds_s, math.inf)
        self._bounds_ns = tuple(round(bound * SECOND_NS) for bound in bounds_s)
        self._series: dict[Values, Buckets] = {} if labels else {(): Buckets(self._bounds_ns)}

    def series(self, *values: str) -> Buckets:
        """Return the series of one value of each label, in their order."""
        series = self._series
        if values not in series:
            if len(series) >= SERIES_MAX:
                values = (OTHER,) * len(values)
            series.setdefault(values, Buckets(self._bounds_ns))
        return series[values]

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._help, labels=self._labels)
        for values, each in self._series.items():
            upper = ["+Inf" if bound == math.inf else repr(float(bound)) for bound in self._bounds_s]
            buckets = list(zip(upper, accumulate(each.counts), strict=True))
            family.add_metric(values, buckets, sum_value=each.sum_ns / SECOND_NS)
        return [family]


class Figure:
    """A figure that others keep. `read` is called at each scrape, and returns a number for each set of label
    values, or one number if there are no labels."""

    def __init__(
        self,
        name: str,
        help: str,
        read: Callable[[], float | Mapping[Values, float]],
        labels: Sequence[str] = (),
        *,
        kind: Literal["gauge", "counter"] = "gauge",
    ) -> None:
        self._name = name
        self._help = help
        self._read = read
        self._labels = labels
        self._kind = kind

    def collect(self) -> Iterable[Metric]:
        read = self._read()
        figures: Mapping[Values, float] = read if isinstance(read, Mapping) else {(): read}
        make = GaugeMetricFamily if self._kind == "gauge" else CounterMetricFamily
        family = make(self._name, self._help, labels=self._labels)
        for values, figure in figures.items():
            family.add_metric(values, figure)
        return [family]
