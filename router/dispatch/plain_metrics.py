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


class PlainHistogram(Collector):
    """Counts by the size of what is observed, for each value of one label or without any."""

    def __init__(
        self,
        name: str,
        about: str,
        buckets: Sequence[float],
        registry: CollectorRegistry,
        label: str = "",
        values: Sequence[str] = ("",),
    ) -> None:
        self._name, self._about, self._label = name, about, label
        self._bounds = (*buckets, INF)
        self._counts = {value: [0] * len(self._bounds) for value in values}
        self._sums = dict.fromkeys(values, 0.0)
        registry.register(self)

    def observe(self, value: float, label: str = "", times: int = 1) -> None:
        """Counts a value that was seen so many times."""
        self._counts[label][bisect_left(self._bounds, value)] += times
        self._sums[label] += value * times

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        names = [self._label] if self._label else []
        family = HistogramMetricFamily(self._name, self._about, labels=names)
        for label, counts in self._counts.items():
            buckets = zip(map(floatToGoString, self._bounds), accumulate(counts), strict=True)
            family.add_metric([label] if names else [], list(buckets), self._sums[label])
        yield family
