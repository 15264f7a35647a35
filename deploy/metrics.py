"""The controller's Prometheus page: what autoscaled pools are to have, and why they changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from crossdock.deploy.controller import Controller

GAUGES = {
    "target": "Workers that an autoscaled pool is to have.",
    "floor": "Of them, those that the forecast needs.",
    "keep": "Workers below which none is taken away.",
    "least": "Fewest workers, by the YAML.",
    "most": "Most workers, by the YAML.",
}


class ControllerCollector(Collector):
    """Reads the controller when it is scraped."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def collect(self) -> Iterator[Metric]:
        """Gauges of every autoscaled pool, members by state, and counters of changes."""
        controller = self._controller
        pools = controller.scaler.status()
        for name, about in GAUGES.items():
            family = GaugeMetricFamily(f"crossdock_autoscale_{name}", about, labels=["pool"])
            for pool in pools:
                family.add_metric([pool.pool], getattr(pool, name))
            yield family
        changes = CounterMetricFamily(
            "crossdock_autoscale_changes",
            "Changes of an autoscaled pool's size, by cause.",
            labels=["pool", "cause"],
        )
        for labels, count in dict(controller.scaler.changes).items():
            changes.add_metric(labels, count)
        yield changes
        members = GaugeMetricFamily(
            "crossdock_members", "Workers and gateways by state.", labels=["pool", "state"]
        )
        counts = Counter((m.pool, m.state.value) for m in list(controller.members))
        for labels, count in counts.items():
            members.add_metric(labels, count)
        yield members


def serve(controller: Controller, host: str) -> str:
    """Serves /metrics on a free port of `host`; returns host:port."""
    registry = CollectorRegistry()
    registry.register(ControllerCollector(controller))
    server, _ = start_http_server(0, addr=host, registry=registry)
    shown = f"[{host}]" if ":" in host else host
    return f"{shown}:{server.server_port}"
