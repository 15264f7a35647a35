"""A worker's Prometheus page, read from its counters when it is scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from crossdock.worker.role import WorkerRole


class WorkerCollector(Collector):
    """Reads another thread's integers without a lock: each is right at some recent moment."""

    def __init__(self, role: Callable[[], WorkerRole], kept_bytes: Callable[[], int]) -> None:
        self._role, self._kept_bytes = role, kept_bytes

    def collect(self) -> Iterator[Metric]:
        """The role's counters and gauges at this moment, read without a lock."""
        role = self._role()
        state = role.state
        labels = {"worker": state.config.name, "pool": state.config.pool}
        labels["role"] = str(state.config.role)
        names, values = list(labels), list(labels.values())
        counters = state.counters
        for about in fields(counters):
            if text := about.metadata.get("doc"):
                family = CounterMetricFamily(f"crossdock_worker_{about.name}", text, labels=names)
                family.add_metric(values, getattr(counters, about.name))
                yield family
        errors = CounterMetricFamily(
            "crossdock_worker_errors", "Sequences ended by an error.", labels=[*names, "code"]
        )
        for code, count in dict(counters.errors).items():
            errors.add_metric([*values, code], count)
        yield errors
        blocks = GaugeMetricFamily(
            "crossdock_worker_kv_blocks", "KV blocks by state.", labels=[*names, "state"]
        )
        pool = state.pool
        counts = {"free": pool.num_free, "cached": pool.num_evictable, "used": pool.num_used}
        for kind, count in counts.items():
            blocks.add_metric([*values, kind], count)
        yield blocks
        jobs = GaugeMetricFamily("crossdock_worker_sequences", "Sequences held.", labels=names)
        jobs.add_metric(values, len(role.jobs))
        yield jobs
        kept = GaugeMetricFamily(
            "crossdock_worker_kept_bytes", "Held of /v1/responses, for gateways.", labels=names
        )
        kept.add_metric(values, self._kept_bytes())
        yield kept


def serve(
    role: Callable[[], WorkerRole], host: str, kept_bytes: Callable[[], int] = lambda: 0
) -> str:
    """Serves /metrics on a free port of `host`; returns host:port. `role`: the one that it has
    now; `kept_bytes`: what the worker keeps for gateways."""
    registry = CollectorRegistry()
    registry.register(WorkerCollector(role, kept_bytes))
    server, _ = start_http_server(0, addr=host, registry=registry)
    return f"{host}:{server.server_port}"
