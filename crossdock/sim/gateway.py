"""One gateway on the virtual clock: the product's dispatcher, links and view, and wires that take a
while."""

from __future__ import annotations

import random
from collections.abc import Sequence

from crossdock.model.detokenizer import IncrementalDetokenizer, TextDelta
from crossdock.proto.hashing import BlockHasher
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.router.config import GatewayConfig
from crossdock.router.dispatch.dispatcher import Dispatcher
from crossdock.router.dispatch.links import Links, WorkerLink
from crossdock.router.dispatch.metrics import GatewayMetrics, ModelMetrics
from crossdock.router.dispatch.traffic import Traffic
from crossdock.router.placement.view import ClusterView
from crossdock.sim.engine import END_ID
from crossdock.sim.worker import CALL_S, SimWorker, Site
from crossdock.worker.streams import GatewayStream

INCARNATION = bytes(16)


class SimGateway:
    """A dispatcher with all that it needs, but no front door."""

    def __init__(self, site: Site, config: GatewayConfig) -> None:
        self.view = ClusterView()
        model_metrics = ModelMetrics(GatewayMetrics(config.slo), "simulated")
        self._counted = model_metrics.traffic
        self.links = Links(
            self.view,
            config.name,
            INCARNATION,
            config.block_size,
            dial=lambda link: _Wire(site, link),
            timers=site.clock,
            clock=site.clock,
            settings=config.links,
        )
        self.dispatcher = self.links.listener = Dispatcher(
            view=self.view,
            links=self.links,
            timers=site.clock,
            policy=config.policies.named(config.policy),
            limits=config,
            metrics=model_metrics,
            hasher=BlockHasher(config.hash_key, config.block_size),
            eos_token_ids=frozenset({END_ID}),
            detokenizer_of=lambda prompt, stop: _NO_TEXT,
            prefix=config.name,
            ttft_aim_s=config.ttft_aim_s,
            tpot_aim_s=config.tpot_aim_s,
            clock=site.clock,
            rng=random.Random(site.rng.getrandbits(64)),
        )

    @property
    def traffic(self) -> Traffic:
        """What it has counted so far."""
        return self._counted.now


class _Wire:
    """See router.dispatch.links.Wire. Frames take CALL_S each way, and those that come up within
    that time are merged, as a network would have it."""

    def __init__(self, site: Site, link: WorkerLink) -> None:
        self._site, self._link = site, link
        self._stream: GatewayStream | None = None
        self._worker: SimWorker | None = None
        self._pumping = False
        site.post(self._dial)

    def send(self, frame: pb.GatewayFrame) -> None:
        stream, worker = self._stream, self._worker
        if stream is not None and worker is not None:
            self._site.post(worker.gateways.receive, stream, frame)

    def cut(self, reason: str) -> None:
        self._lost(reason)

    def close(self) -> None:
        self._hang_up()

    def _dial(self) -> None:
        worker = self._site.workers.get(self._link.endpoint.address)
        if worker is None:
            self._lost("nobody answers")
            return
        self._worker = worker
        self._stream = worker.gateways.open(self._link.hello.hello.gateway, self._frames_wait)

    def _frames_wait(self) -> None:
        if not self._pumping:
            self._pumping = True
            self._site.clock.call_later(CALL_S, self._pump)

    def _pump(self) -> None:
        self._pumping = False
        while self._stream is not None and (frame := self._stream.take()):
            if why := self._link.receive(frame):
                self._lost(why)

    def _lost(self, reason: str) -> None:
        self._hang_up()
        again_s = self._link.ended(reason)
        if again_s is not None:
            self._site.clock.call_later(again_s, self._dial)

    def _hang_up(self) -> None:
        if self._stream is not None and self._worker is not None:
            self._worker.gateways.ended(self._stream)
        self._stream = self._worker = None


class _NoText(IncrementalDetokenizer):
    """Made-up tokens have none."""

    def __init__(self) -> None:
        pass

    def text_of(self, token_ids: Sequence[int]) -> str:
        return ""

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        return TextDelta("", None, len(token_ids))

    def finish(self) -> str:
        return ""


_NO_TEXT = _NoText()
