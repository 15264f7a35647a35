"""One gateway: front doors, and the models that it serves, started and stopped together."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack

from crossdock.proto.identity import Credentials
from crossdock.proto.types import WorkerEndpoint
from crossdock.proto.v1 import admin_pb2
from crossdock.router.config import GatewayConfig as GatewayConfig
from crossdock.router.dispatch.admission import Admission
from crossdock.router.dispatch.explained import explained
from crossdock.router.dispatch.metrics import GatewayMetrics
from crossdock.router.dispatch.recent import Recent
from crossdock.router.dispatch.streams import Dialer
from crossdock.router.dispatch.traffic import Traffic
from crossdock.router.frontdoor.audit import AuditLog
from crossdock.router.frontdoor.auth import Authenticator
from crossdock.router.frontdoor.gate import Gate
from crossdock.router.frontdoor.grpc_server import GrpcServer
from crossdock.router.frontdoor.http_server import HttpServer
from crossdock.router.frontdoor.limits import Limiter
from crossdock.router.frontdoor.models import Models
from crossdock.router.frontdoor.responses_store import ResponseStore
from crossdock.router.frontdoor.tls import DoorCertificates
from crossdock.router.frontdoor.usage import Usage, usage_file
from crossdock.router.placement.view import ClusterView
from crossdock.router.served import LoadedText, Served, Shared
from crossdock.router.serving import Serving

log = logging.getLogger(__name__)


class GatewayServer:
    """Serves models' requests over the workers of the membership that it is told. `grpc_address`
    and `http_address` are host:port, once started with the ports that were bound. Without
    credentials it reaches no worker but those that ask for none."""

    def __init__(self, config: GatewayConfig, credentials: Credentials | None = None) -> None:
        self.config = config
        self._credentials = credentials
        self.grpc_address, self.http_address = config.grpc, config.http
        self.metrics = GatewayMetrics(config.slo)
        self._incarnation = (
            bytes.fromhex(credentials.peer.incarnation) if credentials else os.urandom(16)
        )
        self._admission = Admission(config)
        self._recent = Recent()
        self._health_changed = asyncio.Event()
        self._served: dict[str, Served] = {}  # by key
        self._serving = Serving()
        self._draining = False
        self._leaving: dict[Served, asyncio.Task[None]] = {}  # their last requests run
        self._endpoints: Sequence[WorkerEndpoint] = ()
        self._made = 0  # models, of all times
        self._changing = asyncio.Lock()
        self._closing = AsyncExitStack()  # undoes what `start` did, last things first

    async def start(self) -> None:
        """Loads the tokenizers and opens both ports. Raises ModelError for a model that cannot be
        read, ConfigError for a port that is in use."""
        config = self.config
        dial = Dialer(self._credentials)
        self._closing.push_async_callback(dial.closed)
        gate = self._gate = await self._make_gate()
        self._models = models = Models(gate, self.metrics)
        changed = self._health_changed.set
        common = self._admission, self._recent, self.metrics, gate
        self._shared = Shared(config, self._incarnation, dial, *common, changed)
        self._closing.callback(self._close_models)
        try:
            await self.update_serving(config.first_serving)
            certificates = self._door_certificates()
            self._grpc = grpc = GrpcServer(
                models,
                config.grpc,
                config.max_body_bytes,
                config.max_connection_age_s,
                certificates,
            )
            self._responses = responses = ResponseStore(
                self._reached, config.responses, config.hash_key, self._credentials
            )
            self._closing.push_async_callback(responses.close)
            self._http = http = HttpServer(
                models,
                config.http,
                config.max_body_bytes,
                config.http_options,
                certificates,
                responses,
            )
            self._closing.push_async_callback(grpc.stop, grace_s=0.5)
            self._closing.push_async_callback(http.stop)
            self._closing.callback(self._end_requests)
            await grpc.start()
            await http.start()
        except BaseException:
            await self.stop()
            raise
        self.grpc_address, self.http_address = grpc.address, http.address
        self._watch_metrics()
        publishing = asyncio.get_running_loop().create_task(self._publish_health())
        self._closing.callback(publishing.cancel)
        names = ", ".join(served.name for served in self._served.values())
        log.info("gateway %s serves %s at grpc %s and http %s",
                 config.name, names, grpc.address, http.address)  # fmt: skip

    async def update_serving(self, serving: Serving) -> None:
        """Serves these models by these names from now on. What was begun for one that is not among
        them is finished. Raises ModelError for one that cannot be read, and then nothing is
        changed."""
        async with self._changing:
            if serving == self._serving:
                return
            loaded: dict[str, LoadedText] = {}
            while missing := self._not_loaded(serving, loaded):  # one may leave meanwhile
                source = serving.models[missing[0]].source
                loaded[missing[0]] = await asyncio.to_thread(
                    LoadedText.of, source, self.config.home
                )
            known = self._known()
            gone = [each for key, each in self._served.items() if key not in serving.models]
            changed = [known[key] for key in loaded if key in known]
            now: dict[str, Served] = {}
            for key, model in serving.models.items():
                if key in loaded:
                    now[key] = Served(key, model, loaded[key], self._shared, self._made)
                    self._made += 1
                else:
                    now[key] = known[key]
                    now[key].become(model)
                    self._forget(now[key])
                now[key].dispatcher.draining = self._draining
            for name in {each.name for each in self._served.values()}:
                self.metrics.forget_model(name)
            for each in now.values():
                self.metrics.watch_model(each.name, each.view.count)
            self._served, self._serving = now, serving
            self._models.become([each.frontend for each in now.values()], serving.routes)
            for served in changed:  # other weights by the same name: its workers go as well
                self._forget(served)
                served.close()
            for served in gone:
                self._leaving[served] = asyncio.create_task(self._release(served))
            self._tell()
            self._health_changed.set()

    async def update_members(self, endpoints: Iterable[WorkerEndpoint]) -> None:
        """Follows the controller's membership: links to who is new, and to nobody who left."""
        assert self._served, "start() comes first"
        self._endpoints = list(endpoints)
        self._responses.update(self._endpoints)
        self._tell()

    async def drain(self, timeout_s: float) -> bool:
        """Takes nothing new and waits for what runs. True when all of it ended."""
        self._draining = True
        for served in self._all():
            served.dispatcher.draining = True
        self._health_changed.set()
        deadline = time.monotonic() + timeout_s
        while self.active_requests and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return not self.active_requests

    async def stop(self) -> None:
        """Ends what still runs with a retriable error, and closes ports and streams."""
        await self._closing.aclose()

    @property
    def view(self) -> ClusterView:
        """Of the workers of the first model."""
        return next(iter(self._served.values())).view

    @property
    def active_requests(self) -> int:
        """Requests under way."""
        return sum(served.dispatcher.active_requests for served in self._all())

    @property
    def traffic(self) -> dict[str, Traffic]:
        """What was counted of each model's sequences, by its key in the YAML."""
        return {key: served.metrics.traffic.now for key, served in self._served.items()}

    def explain(self, request_id: str) -> admin_pb2.ExplainedRequest | None:
        """Where a request went, why, and what it took; None where it is not, or no more, known."""
        trail = self._recent.find(request_id)
        if trail is None:
            return None
        found = explained(trail, time.monotonic())
        found.gateway, found.policy = self.config.name, self.config.policy
        return found

    @property
    def ready(self) -> bool:
        """Of some model, a prefill and a decode worker, or a colocated one, are connected."""
        return bool(self._served) and self._models.ready

    def _all(self) -> list[Served]:
        return [*self._served.values(), *self._leaving]

    def _reached(self) -> list[WorkerEndpoint]:
        """The workers whose streams are open, of all models."""
        return [endpoint for served in self._all() for endpoint in served.links.reached()]

    def _tell(self) -> None:
        for served in self._all():
            served.update(self._endpoints)

    async def _release(self, served: Served) -> None:
        log.info("gateway %s: %s is served no more", self.config.name, served.name)
        await served.ended()
        del self._leaving[served]
        served.close()

    def _known(self) -> dict[str, Served]:
        """Models by key, those that are leaving included."""
        return {each.key: each for each in self._leaving} | self._served

    def _not_loaded(self, serving: Serving, loaded: Mapping[str, LoadedText]) -> list[str]:
        """Keys of the models whose text side is to be loaded yet."""
        known = self._known()
        return [
            key
            for key, model in serving.models.items()
            if key not in loaded and (key not in known or known[key].source != model.source)
        ]

    def _forget(self, served: Served) -> None:
        if leaving := self._leaving.pop(served, None):
            leaving.cancel()

    def _end_requests(self) -> None:
        for served in self._all():
            served.dispatcher.close()

    def _close_models(self) -> None:
        for served in self._all():
            self._forget(served)
            served.close()

    def _watch_metrics(self) -> None:
        def total(count: Callable[[Served], int]) -> Callable[[], int]:
            return lambda: sum(map(count, self._all()))

        self.metrics.watch(
            active=lambda: self._admission.active,
            waiting=total(lambda served: served.dispatcher.waiting_sequences),
            queued=total(lambda served: served.dispatcher.queued_sequences),
            workers=lambda role: sum(each.view.count(role) for each in self._all()),
            resyncs=total(lambda served: served.links.resyncs),
        )

    def _door_certificates(self) -> DoorCertificates | None:
        if not self.config.tls:
            return None
        proof = self._credentials
        return DoorCertificates(self.config.tls, proof.identity.authority if proof else b"")

    async def _make_gate(self) -> Gate:
        config, registry = self.config, self.metrics.registry
        authenticator = await asyncio.to_thread(
            Authenticator, config.auth, registry, config.probe_key
        )
        watching = asyncio.get_running_loop().create_task(authenticator.watch())
        self._closing.callback(watching.cancel)
        file = usage_file(config.home, config.cluster) if config.cluster else None
        usage = Usage(file, registry)
        keeping = asyncio.get_running_loop().create_task(usage.keep())
        self._closing.push_async_callback(usage.flush)
        self._closing.callback(keeping.cancel)
        limiter = Limiter(time.monotonic, time.time, config.gateways, usage.spent)
        audit = None
        if config.audit.file:
            seed = config.audit_seed
            audit = await asyncio.to_thread(AuditLog, config.audit, config.name, seed, registry)
            audit.start()
            self._closing.push_async_callback(audit.close)

        def weights(model: str) -> str:
            return next((e.view.weights_digest for e in self._all() if e.name == model), "")

        return Gate(authenticator, limiter, self.metrics, config.prices, usage, audit, weights)

    async def _publish_health(self) -> None:
        """Keeps grpc.health.v1 in step with `ready`."""
        told = False
        while True:
            await self._health_changed.wait()
            self._health_changed.clear()
            if self.ready != told:
                told = self.ready
                log.info("gateway %s is %s", self.config.name, "ready" if told else "not ready")
                self._grpc.set_ready(told)
