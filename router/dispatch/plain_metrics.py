"""Counters and histograms of one thread alone: without locks, and without a child for each label,
which prometheus-client's have and which cost more than what they count."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import INF, floatToGoString


class PlainCounter(Collector):
    """A sum for each combination of labels."""

    def __init__(
        self, name: str, about: str, registry: CollectorRegistry, labels: Sequence[str] = ()
    ) -> None:
        self._name, self._about, self._labels = name, about, labels
        self._sums = defaultdict[tuple[str, ...], float](float)
        if not labels:
            self._sums[()] = 0.0
        registry.register(self)

    def inc(self, amount: float = 1.0, *labels: str) -> None:
        """Adds to the sum of these values of the labels."""
        self._sums[labels] += amount

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        family = CounterMetricFamily(self._name, self._about, labels=self._labels)
        for labels, value in self._sums.items():
            family.add_metric(labels, value)
        yield family


class Series:
    """Counts by the size of what is observed, for one combination of labels."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * len(bounds)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts a value that was seen so many times."""
        self.counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times


class PlainHistogram(Collector):
    """A series for each combination of labels, which is asked for once and kept."""

    def __init__(
        self,
        name: str,
        about: str,
        buckets: Sequence[float],
        registry: CollectorRegistry,
        labels: Sequence[str],
    ) -> None:
        self._name, self._about, self._labels = name, about, labels
        self._bounds = (*buckets, INF)
        self._series: dict[tuple[str, ...], Series] = {}
        registry.register(self)

    def of(self, *labels: str) -> Series:
        """That of these values of the labels; it is shown from now on."""
        return self._series.setdefault(labels, Series(self._bounds))

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        family = HistogramMetricFamily(self._name, self._about, labels=self._labels)
        for labels, series in self._series.items():
            counts = accumulate(series.counts)
            buckets = zip(map(floatToGoString, self._bounds), counts, strict=True)
            family.add_metric(labels, list(buckets), series.sum)
        yield family
