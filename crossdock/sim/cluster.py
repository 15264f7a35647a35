"""A whole cluster on the virtual clock, and the requests of a trace that go through it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from crossdock.bench.traces import Trace, TraceRequest
from crossdock.deploy.runtime import gateway_launch, worker_launch
from crossdock.deploy.spec import ClusterSpec
from crossdock.deploy.spec_yaml import parse_settings
from crossdock.engine.profiles import Profile
from crossdock.proto.errors import ConfigError, CrossdockError
from crossdock.proto.types import Role, SamplingParams
from crossdock.router.dispatch.request import Delta, Ended, Request
from crossdock.router.dispatch.traffic import Traffic
from crossdock.sim.clock import VirtualClock
from crossdock.sim.control import Decide, SimControl
from crossdock.sim.engine import VOCAB_SIZE
from crossdock.sim.gateway import SimGateway
from crossdock.sim.worker import SimWorker, Site
from crossdock.worker.config import EngineSettings

CLUSTER_KEY = b"of a simulated cluster"
WARM_UP_S = 1.0  # before the first request: streams open, peers meet
ANSWER_LIMIT = 4096  # max_tokens of a request: nobody knows how long an answer will be


@dataclass
class Served:
    """What came of one request. Times in seconds."""

    at_s: float  # since the first request of the trace
    input_tokens: int
    output_tokens: int  # that were delivered
    ttft_s: float | None = None
    last_s: float = 0.0  # the newest token, since the first request of the trace
    longest_gap_s: float = 0.0  # between two tokens
    cached_tokens: int = 0
    prefill_worker: str = ""
    decode_worker: str = ""
    ended_s: float = 0.0  # since the first request of the trace
    error: str = ""

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first; None: there was none."""
        if self.ttft_s is None or self.output_tokens < 2:
            return None
        return (self.last_s - self.at_s - self.ttft_s) / (self.output_tokens - 1)


def load_profile(name: str) -> Profile:
    """A known one, or that of a YAML file with its fields. Raises ConfigError."""
    if name in Profile.NAMED:
        return Profile.NAMED[name]
    try:
        text = Path(name).read_text(encoding="utf-8")
    except OSError as error:
        known = ", ".join(Profile.NAMED)
        raise ConfigError(
            "profile", f"{name!r} is none of {known}, and no file: {error.strerror}"
        ) from None
    return parse_settings(text, name, Profile)


def profile_in(pool: str, engine: EngineSettings) -> Profile:
    """That of a pool's simulated engine. Raises ConfigError for any other."""
    found = getattr(engine, "profile", None)
    if not isinstance(found, Profile):
        message = f"{engine.kind!r} has no profile: --profile"
        raise ConfigError(f"pools.{pool}.engine.kind", message)
    return found


class SimCluster:
    """The workers and gateways of a spec. `profile` is for pools whose engine has none. Autoscaled
    pools change their sizes as `decide` has it; by themselves where it is not given."""

    def __init__(
        self,
        spec: ClusterSpec,
        profile: Profile | None = None,
        seed: int = 0,
        decide: Decide | None = None,
    ) -> None:
        self.spec, self.clock = spec, VirtualClock()
        self.site = Site(self.clock, random.Random(seed))
        self.served: list[Served] = []
        self.left = 0  # requests that have not ended
        self.on_ended: Callable[[Served], None] = lambda served: None
        self._profile = profile
        self.gateways = [self._gateway(index) for index in range(spec.gateway.replicas)]
        self.control = SimControl(spec, self.clock, self._worker, self._tell, self._counts, decide)
        self.control.start()

    def _gateway(self, index: int) -> SimGateway:
        launch = gateway_launch(self.spec, f"gateway-{index}", index, CLUSTER_KEY, CLUSTER_KEY)
        assert launch.gateway is not None
        return SimGateway(self.site, launch.gateway)

    def _worker(self, pool: str, name: str) -> SimWorker:
        config = worker_launch(self.spec, pool, name, CLUSTER_KEY).worker
        assert config is not None
        profile = self._profile or profile_in(pool, config.engine)
        return SimWorker(self.site, config, profile)

    @property
    def workers(self) -> list[SimWorker]:
        """All that serve."""
        return self.control.workers

    def run(self, trace: Trace, until: Callable[[], bool] = lambda: False) -> list[Served]:
        """Serves a trace to its end, or `until` there is nothing more to learn; what came of each
        request, in the trace's order."""
        self.served = [Served(each.at_s, each.input_tokens, 0) for each in trace.requests]
        self.left = len(trace.requests)
        for index, request in enumerate(trace.requests):
            self.clock.call_at(
                WARM_UP_S + request.at_s, self._arrive, index, request, trace.block_size
            )
        self.clock.run(lambda: self.left == 0 or until())
        return self.served

    def _counts(self) -> Traffic:
        """What all gateways have counted."""
        return sum((gateway.traffic for gateway in self.gateways), Traffic())

    def _tell(self) -> None:
        """Everybody hears who is there."""
        endpoints = [worker.endpoint for worker in self.workers]
        for worker in self.workers:
            if worker.config.role is not Role.PREFILL:
                worker.peers.update(endpoints)
        for gateway in self.gateways:
            gateway.links.update(endpoints)

    def _arrive(self, index: int, asked: TraceRequest, size: int) -> None:
        now, served = self.clock.now, self.served[index]
        recorder = _Recorder(self, served)
        request = Request(
            request_id=str(index),
            prompts=[_prompt(asked, size)],
            sampling=SamplingParams(
                temperature=1.0,
                max_tokens=max(ANSWER_LIMIT, asked.output_tokens),
                seed=asked.output_tokens,
            ),
            received=now,
            received_unix=now,
            tenant=asked.tenant,
            priority=asked.priority,
            deadline=None if asked.deadline_s is None else now + asked.deadline_s,
            on_end=recorder.ended,
        )
        gateway = self.gateways[index % len(self.gateways)]
        try:
            gateway.dispatcher.submit(request).pipe(recorder)
        except CrossdockError as error:
            served.error = type(error).__name__
            served.ended_s = asked.at_s
            if not recorder.over:
                self.over(served)

    def over(self, served: Served) -> None:
        """A request has ended, well or not."""
        self.left -= 1
        self.on_ended(served)


class _Recorder:
    """See router.dispatch.request.Sink."""

    def __init__(self, cluster: SimCluster, served: Served) -> None:
        self._cluster, self._served, self._clock = cluster, served, cluster.clock
        self.over = False

    def tokens(self, index: int, text: str, token_ids: list[int]) -> bool:
        served, now = self._served, self._clock.now - WARM_UP_S
        if served.ttft_s is None:
            served.ttft_s = now - served.at_s
        else:
            # Tokens that come together here were drawn one a step.
            gap_s = (now - served.last_s) / len(token_ids)
            served.longest_gap_s = max(served.longest_gap_s, gap_s)
        served.last_s = now
        served.output_tokens += len(token_ids)
        return True

    def delta(self, delta: Delta) -> bool:
        return self.tokens(delta.index, delta.text, delta.token_ids) if delta.token_ids else True

    def ended(self, ended: Ended) -> None:
        served, self.over = self._served, True
        served.ended_s = self._clock.now - WARM_UP_S
        if ended.error is not None:
            served.error = type(ended.error).__name__
        for sequence in ended.sequences:
            served.cached_tokens = sequence.cached_tokens
            served.prefill_worker = sequence.prefill_worker
            served.decode_worker = sequence.decode_worker
        self._cluster.over(served)


def _prompt(asked: TraceRequest, size: int) -> list[int]:
    """Token ids of a request whose blocks of `size` tokens are those of its names: a block begins
    with its name, in two digits."""
    base, rest = VOCAB_SIZE - 1, [1] * (size - 2)
    ids: list[int] = []
    for name in asked.block_ids:
        ids += (1 + name % base, 1 + name // base % base)
        ids += rest
    return ids[: asked.input_tokens]
