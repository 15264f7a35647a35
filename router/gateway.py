"""One gateway: front doors, dispatcher and links, started and stopped together."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path

from crossdock.model.detokenizer import IncrementalDetokenizer
from crossdock.model.store import ModelFiles, resolve
from crossdock.model.text import TextModel, load_text
from crossdock.proto.hashing import BlockHasher
from crossdock.proto.identity import Credentials
from crossdock.proto.types import WorkerEndpoint
from crossdock.router.config import GatewayConfig as GatewayConfig
from crossdock.router.config import Price
from crossdock.router.dispatch.dispatcher import Dispatcher
from crossdock.router.dispatch.links import Links
from crossdock.router.dispatch.metrics import GatewayMetrics
from crossdock.router.dispatch.streams import Dialer
from crossdock.router.frontdoor.audit import AuditLog
from crossdock.router.frontdoor.auth import Authenticator
from crossdock.router.frontdoor.frontend import Frontend
from crossdock.router.frontdoor.gate import Gate
from crossdock.router.frontdoor.grammar_check import GrammarChecker
from crossdock.router.frontdoor.grpc_server import GrpcServer
from crossdock.router.frontdoor.http_server import HttpServer
from crossdock.router.frontdoor.limits import Limiter
from crossdock.router.frontdoor.responses_store import ResponseStore
from crossdock.router.frontdoor.text_process import TextProcess
from crossdock.router.frontdoor.tls import DoorCertificates
from crossdock.router.frontdoor.tools.formats import format_of
from crossdock.router.frontdoor.usage import Usage, usage_file
from crossdock.router.frontdoor.validate import Validator
from crossdock.router.placement.policy import POLICIES
from crossdock.router.placement.view import ClusterView

log = logging.getLogger(__name__)


class GatewayServer:
    """Serves a model's requests over the workers of the membership that it is told. `grpc_address`
    and `http_address` are host:port, once started with the ports that were bound. Without
    credentials it reaches no worker but those that ask for none."""

    def __init__(self, config: GatewayConfig, credentials: Credentials | None = None) -> None:
        self.config = config
        self._credentials = credentials
        self.grpc_address, self.http_address = config.grpc, config.http
        self.view = ClusterView()
        self.metrics = GatewayMetrics(config.slo)
        self._incarnation = (
            bytes.fromhex(credentials.peer.incarnation) if credentials else os.urandom(16)
        )
        self._health_changed = asyncio.Event()
        self._dispatcher: Dispatcher | None = None
        self._links: Links | None = None
        self._closing = AsyncExitStack()  # undoes what `start` did, last things first

    async def start(self) -> None:
        """Loads the tokenizer and opens both ports. Raises ModelError for a model that cannot be
        read, ConfigError for a port that is in use."""
        config = self.config
        files, text, longest = await asyncio.to_thread(_load, config.model, config.home)
        model_id = files.model_id
        self._aside = aside = TextProcess(files)
        self._closing.callback(aside.close)
        self._links = links = self._make_links()
        self._dispatcher = links.listener = dispatcher = self._make_dispatcher(text, links)
        self._validator = validator = Validator(
            model_id, text, longest, lambda: self.view.pool_tokens(time.monotonic())
        )
        self._grammars = grammars = GrammarChecker(config.model, config.home)
        self._closing.callback(grammars.close)
        gate = self._gate = await self._make_gate(model_id)
        self._frontend = frontend = Frontend(
            text,
            validator,
            dispatcher,
            aside,
            config.request_timeout_s,
            gate,
            grammars,
            format_of(config.tool_parser, text),
        )
        certificates = self._door_certificates()
        self._grpc = grpc = GrpcServer(
            frontend,
            config.grpc,
            config.max_body_bytes,
            config.max_connection_age_s,
            certificates,
        )
        responses = ResponseStore(links.reached, config.responses, self._credentials)
        self._closing.push_async_callback(responses.close)
        self._http = http = HttpServer(
            frontend,
            config.http,
            config.max_body_bytes,
            config.http_options,
            certificates,
            responses,
        )
        self._closing.push_async_callback(grpc.stop, grace_s=0.5)
        self._closing.push_async_callback(http.stop)
        self._closing.callback(dispatcher.close)
        try:
            await grpc.start()
            await http.start()
        except BaseException:
            await self.stop()
            raise
        self.grpc_address, self.http_address = grpc.address, http.address
        self.metrics.watch(
            active=lambda: dispatcher.active_sequences,
            waiting=lambda: dispatcher.waiting_sequences,
            queued=lambda: dispatcher.queued_sequences,
            workers=lambda role: sum(w.role is role for w in self.view.workers.values()),
            resyncs=lambda: links.resyncs,
        )
        publishing = asyncio.get_running_loop().create_task(self._publish_health())
        self._closing.callback(publishing.cancel)
        log.info("gateway %s serves %s at grpc %s and http %s",
                 config.name, model_id, grpc.address, http.address)  # fmt: skip

    async def update_members(self, endpoints: Iterable[WorkerEndpoint]) -> None:
        """Follows the controller's membership: links to who is new, and to nobody who left."""
        assert self._links is not None, "start() comes first"
        self._links.update(endpoints)

    async def drain(self, timeout_s: float) -> bool:
        """Takes nothing new and waits for what runs. True when all of it ended."""
        if self._dispatcher is not None:
            self._dispatcher.draining = True
        self._health_changed.set()
        deadline = time.monotonic() + timeout_s
        while self.active_requests and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return not self.active_requests

    async def stop(self) -> None:
        """Ends what still runs with a retriable error, and closes ports and streams."""
        await self._closing.aclose()

    @property
    def active_requests(self) -> int:
        """Requests under way."""
        return self._dispatcher.active_requests if self._dispatcher else 0

    @property
    def ready(self) -> bool:
        """A prefill and a decode worker, or a colocated one, are connected."""
        return self._dispatcher is not None and self._dispatcher.ready

    def _door_certificates(self) -> DoorCertificates | None:
        if not self.config.tls:
            return None
        proof = self._credentials
        return DoorCertificates(self.config.tls, proof.identity.authority if proof else b"")

    async def _make_gate(self, model_id: str) -> Gate:
        config, registry = self.config, self.metrics.registry
        authenticator = await asyncio.to_thread(
            Authenticator, config.auth, registry, config.probe_key
        )
        watching = asyncio.get_running_loop().create_task(authenticator.watch())
        self._closing.callback(watching.cancel)
        file = usage_file(config.home, config.cluster) if config.cluster else None
        usage = Usage(file, model_id, registry)
        keeping = asyncio.get_running_loop().create_task(usage.keep())
        self._closing.push_async_callback(usage.flush)
        self._closing.callback(keeping.cancel)
        limiter = Limiter(time.monotonic, time.time, config.gateways, usage.spent)
        price = config.prices.get(model_id, Price())
        audit = None
        if config.audit.file:
            seed = config.audit_seed
            audit = await asyncio.to_thread(AuditLog, config.audit, config.name, seed, registry)
            audit.start()
            self._closing.push_async_callback(audit.close)

        def weights() -> str:
            return self.view.weights_digest

        return Gate(authenticator, limiter, self.metrics, model_id, price, usage, audit, weights)

    def _make_links(self) -> Links:
        config, dial = self.config, Dialer(self._credentials)
        links = Links(
            self.view,
            config.name,
            self._incarnation,
            config.block_size,
            dial=dial,
            timers=asyncio.get_running_loop(),
            clock=time.monotonic,
            settings=config.links,
        )
        self._closing.push_async_callback(dial.closed)
        self._closing.callback(links.close)
        return links

    def _make_dispatcher(self, text: TextModel, links: Links) -> Dispatcher:
        return Dispatcher(
            view=self.view,
            links=links,
            timers=asyncio.get_running_loop(),
            policy=POLICIES[self.config.policy],
            limits=self.config,
            metrics=self.metrics,
            hasher=BlockHasher(self.config.hash_key, self.config.block_size),
            eos_token_ids=text.eos_token_ids,
            detokenizer_of=lambda prompt, stop: IncrementalDetokenizer(text, prompt, stop),
            prefix=f"{self.config.name}-{self._incarnation.hex()[:8]}",
            on_ready=self._health_changed.set,
        )

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


def _load(model: str, home: Path) -> tuple[ModelFiles, TextModel, int]:
    """The model's files, its text side, and the length of its longest token. Takes a while: runs
    on a thread."""
    files = resolve(model, home)
    text = load_text(files)
    longest = max(len(text.token_text(token_id)) for token_id in range(text.vocab_size))
    return files, text, max(1, longest)
