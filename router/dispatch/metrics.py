"""What a gateway counts and times, as Prometheus metrics in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from crossdock.proto.errors import CrossdockError
from crossdock.proto.types import Role
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.router.dispatch.lifecycle import STALL_STAGES, TTFT_STAGES, Slo, Timeline
from crossdock.router.dispatch.plain_metrics import PlainCounter, PlainHistogram
from crossdock.router.dispatch.traffic import TrafficCount

_LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10)
_SHORT = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 30)
_DECISION = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 1e-2, 1e-1)


class StepGain:
    """Tokens that one frame brought `now`. Those of a step came together in the one before as well,
    so that most of them have one and the same gap."""

    __slots__ = ("gaps", "now", "tokens")

    def __init__(self, now: float) -> None:
        self.now = now
        self.tokens = 0
        self.gaps: dict[float, int] = {}  # seconds since the token before -> how many sequences

    def add(self, tokens: int, gap_s: float | None) -> None:
        """A sequence gained so many tokens, so long after those before."""
        self.tokens += tokens
        if gap_s is not None:
            self.gaps[gap_s] = self.gaps.get(gap_s, 0) + 1


class GatewayMetrics:
    """All metrics of one gateway. Names start with `crossdock_`; times are seconds, by model."""

    def __init__(self, slo: Slo) -> None:
        self.slo = slo
        self.registry = CollectorRegistry()
        self.ttft = self._histogram("ttft", "Received to first token delivered", _LONG)
        self.itl = self._histogram("itl", "Between two tokens of a sequence", _STEP)
        self.tpot = self._histogram(
            "tpot", "(last token - first token) / (tokens - 1), per sequence", _STEP
        )
        self.e2e = self._histogram("e2e", "Received to finished", _LONG)
        self.decision = self._histogram("router_decision", "Choosing the workers", _DECISION)
        self.stage = PlainHistogram(
            "crossdock_stage_seconds",
            "Parts of TTFT and of the hand-off stall; each sums up to its whole",
            _SHORT,
            self.registry,
            ["stage", "model"],
        )
        self.requests = self._counter("requests", "Requests by how they ended", ["outcome"])
        self.routed = self._counter(
            "routed_requests", "Requests by a route's name, by the model chosen", ["route", "model"]
        )
        self.model_requests = self._counter(
            "model_requests", "Requests of a model by how they ended", ["model", "outcome"]
        )
        self._model_workers = Gauge(
            "crossdock_model_workers",
            "Connected workers of a model",
            ["model", "role"],
            registry=self.registry,
        )
        self.within_slo = self._counter(
            "sequences_by_slo",
            "Finished sequences within both TTFT and TPOT aims",
            ["met", "model"],
        )
        self.restarts = self._counter(
            "restarted_sequences", "Sequences prefilled again elsewhere, by cause", ["cause"]
        )
        self.lost = self._counter("worker_streams_lost", "Streams to workers that broke", [])
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of sequences", [])
        self.cached_tokens = self._counter(
            "cached_tokens", "Prompt tokens whose KV was found in a prefix cache", []
        )
        self.generated_tokens = self._counter("generated_tokens", "Tokens delivered", [])
        self.transferred_bytes = self._counter("transferred_bytes", "KV bytes pulled", [])
        self.transferred_blocks = self._counter("transferred_blocks", "KV blocks pulled", [])
        self.late_bytes = self._counter(
            "late_bytes", "Of transferred_bytes, what was pulled after token 0", []
        )
        self.recomputed_tokens = self._counter(
            "recomputed_tokens", "Prompt tokens that decode workers computed again", []
        )

    def watch(
        self,
        active: Callable[[], int],
        waiting: Callable[[], int],
        queued: Callable[[], int],
        workers: Callable[[Role], int],
        resyncs: Callable[[], int],
    ) -> None:
        """Gauges that are read when the metrics are."""
        self.gauge("active_sequences", "Sequences admitted and not finished", active)
        self.gauge("waiting_sequences", "Of those, waiting for a worker to appear", waiting)
        self.gauge("queued_sequences", "Of those, waiting for their tenant's turn", queued)
        self.gauge("block_resyncs", "Gaps found in workers' block events since start", resyncs)
        connected = Gauge(
            "crossdock_workers", "Connected workers", ["role"], registry=self.registry
        )
        for role in Role:
            connected.labels(role.value).set_function(lambda role=role: workers(role))  # type: ignore[misc]

    def watch_model(self, model: str, workers: Callable[[Role], int]) -> None:
        """A gauge of the workers of one model, until that is forgotten."""
        for role in Role:
            gauge = self._model_workers.labels(model, role.value)
            gauge.set_function(lambda role=role: workers(role))  # type: ignore[misc]

    def forget_model(self, model: str) -> None:
        """It is served no more."""
        for role in Role:
            self._model_workers.remove(model, role.value)

    def outcome(self, error: CrossdockError | None) -> None:
        """A request ended, by an error or well. An error counts once, however often it is told."""
        if error is not None:
            if error.counted:
                return
            error.counted = True
        self.requests.inc(1, error.outcome if error else "ok")

    def transferred(self, transfer: pb.TransferStats) -> None:
        """How the KV of one hand-off came to its decode worker."""
        self.transferred_bytes.inc(transfer.bytes)
        self.transferred_blocks.inc(transfer.blocks)
        self.late_bytes.inc(transfer.late_bytes)
        self.recomputed_tokens.inc(transfer.recomputed_tokens)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> PlainHistogram:
        return PlainHistogram(f"crossdock_{name}_seconds", about, buckets, self.registry, ["model"])

    def _counter(self, name: str, about: str, labels: list[str]) -> PlainCounter:
        return PlainCounter(f"crossdock_{name}", about, self.registry, labels)

    def gauge(self, name: str, about: str, read: Callable[[], int]) -> None:
        """One that is read when the metrics are."""
        gauge = Gauge(f"crossdock_{name}", about, registry=self.registry)
        gauge.set_function(read)


class ModelMetrics:
    """What the dispatcher of one model counts and times: the gateway's metrics, bound once to the
    model's name where they are labelled by it."""

    def __init__(self, gateway: GatewayMetrics, model: str) -> None:
        self._gateway, self._model = gateway, model
        self.traffic = TrafficCount()
        self.ttft, self.itl = gateway.ttft.of(model), gateway.itl.of(model)
        self.tpot, self.e2e = gateway.tpot.of(model), gateway.e2e.of(model)
        self.decision = gateway.decision.of(model)
        names = (*TTFT_STAGES, *STALL_STAGES)
        self._stages = {name: gateway.stage.of(name, model) for name in names}
        self.outcome, self.transferred = gateway.outcome, gateway.transferred
        self.restarts, self.lost = gateway.restarts, gateway.lost
        self.prompt_tokens, self.cached_tokens = gateway.prompt_tokens, gateway.cached_tokens
        self.generated_tokens = gateway.generated_tokens

    def gained(self, tokens: int, first: bool, gap_s: float | None) -> None:
        """Tokens delivered together, so long after the request, where they are its first, or after
        those before."""
        self.generated_tokens.inc(tokens)
        if gap_s is not None:
            (self.ttft if first else self.itl).observe(gap_s)

    def started(self, ttft_s: float, prompt_tokens: int, cached_tokens: int) -> None:
        """Token 0 of a sequence was delivered."""
        traffic, uncached = self.traffic, prompt_tokens - cached_tokens
        traffic.started += 1
        traffic.ttft_met += 1000 * ttft_s <= self._gateway.slo.ttft_ms
        traffic.prompt_tokens += prompt_tokens
        traffic.cached_tokens += cached_tokens
        traffic.uncached_squares += uncached * uncached

    def carried_on(self, gain: StepGain) -> None:
        """What one frame brought of sequences that had tokens before."""
        if gain.tokens:
            self.generated_tokens.inc(gain.tokens)
            for gap_s, times in gain.gaps.items():
                self.itl.observe(gap_s, times)

    def sequence_done(self, timeline: Timeline, generated: int) -> None:
        """Times of one sequence that ran to its end."""
        first, last = timeline.first_token, timeline.last_token
        if first is None or last is None:
            return
        tpot, slo = 0.0, self._gateway.slo
        if generated > 1:
            tpot = (last - first) / (generated - 1)
            self.tpot.observe(tpot)
        fluent = tpot * 1000 <= slo.tpot_ms
        self.traffic.finished += 1
        self.traffic.tpot_met += fluent
        self.traffic.generated_tokens += generated
        met = first * 1000 <= slo.ttft_ms and fluent
        self._gateway.within_slo.inc(1, "true" if met else "false", self._model)
        for name, seconds in timeline.stages().items():
            self._stages[name].observe(seconds)
