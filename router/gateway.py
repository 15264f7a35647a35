"""One gateway: front doors, dispatcher and links, started and stopped together."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from crossdock.model.detokenizer import IncrementalDetokenizer
from crossdock.model.store import NOWHERE, resolve
from crossdock.model.text import load_text
from crossdock.proto.errors import ConfigError
from crossdock.proto.hashing import BlockHasher
from crossdock.proto.types import Role, WorkerEndpoint
from crossdock.router.dispatch.admission import Limits
from crossdock.router.dispatch.dispatcher import Dispatcher
from crossdock.router.dispatch.links import Links, LinkSettings
from crossdock.router.dispatch.metrics import GatewayMetrics, Slo
from crossdock.router.dispatch.sequence import Detokenizer
from crossdock.router.dispatch.streams import Dialer
from crossdock.router.frontdoor.frontend import Frontend, TextModel
from crossdock.router.frontdoor.grpc_server import GrpcServer
from crossdock.router.frontdoor.http_server import HttpServer
from crossdock.router.frontdoor.validate import ModelFacts, Validator
from crossdock.router.placement.policy import POLICIES
from crossdock.router.placement.view import ClusterView

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GatewayConfig:
    """Settings of one gateway. Addresses are host:port; port 0 takes a free one."""

    name: str
    model: str  # a known id, a folder, or a .gguf file
    hash_key: bytes = field(repr=False)  # of the cluster's block hashes
    home: Path = NOWHERE  # where fetched models and digests are
    grpc: str = "127.0.0.1:50051"
    http: str = "127.0.0.1:8000"
    policy: str = "least_latency"
    block_size: int = 16  # tokens; that of the workers' pools
    max_body_bytes: int = 8_000_000
    max_active: int = 1024  # sequences under way; more are refused
    max_active_per_tenant: int = 512
    request_timeout_s: float = 600.0  # deadline of a request that brings none
    worker_wait_s: float = 120.0  # a worker that is replaced is back within it
    slo: Slo = field(default_factory=Slo)
    links: LinkSettings = field(default_factory=LinkSettings)

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            known = ", ".join(POLICIES)
            raise ConfigError("gateway.policy", f"{self.policy!r} is not known; one of {known}")
        for name in ("grpc", "http"):
            _check_address(f"gateway.{name}", getattr(self, name))
        for name in ("block_size", "max_body_bytes", "max_active", "max_active_per_tenant"):
            if getattr(self, name) < 1:
                raise ConfigError(f"gateway.{name}", f"{getattr(self, name)}: at least 1")
        if not self.request_timeout_s > 0:
            raise ConfigError("gateway.request_timeout_s", f"{self.request_timeout_s}: above 0")

    @property
    def limits(self) -> Limits:
        """What admission counts with."""
        return replace(
            Limits(),
            max_active=self.max_active,
            max_active_per_tenant=min(self.max_active_per_tenant, self.max_active),
            worker_wait_s=self.worker_wait_s,
        )


class GatewayServer:
    """Serves a model's requests over the workers of the membership that it is told."""

    def __init__(self, config: GatewayConfig) -> None:
        self.config = config
        self.view = ClusterView()
        self.metrics = GatewayMetrics(config.slo)
        self._incarnation = os.urandom(16)
        self._health_changed = asyncio.Event()
        self._health_task: asyncio.Task[None] | None = None
        self._dial = Dialer(config.links)
        self._dispatcher: Dispatcher | None = None
        self._links: Links | None = None
        self._grpc: GrpcServer | None = None
        self._http: HttpServer | None = None

    async def start(self) -> None:
        """Loads the tokenizer and opens both ports.

        Raises ModelError for a model that cannot be read, ConfigError for a port that is in use.
        """
        config = self.config
        model_id, text, longest = await asyncio.to_thread(_load, config.model, config.home)
        facts = ModelFacts(model_id, text.vocab_size, text.context_length, longest)
        self._links = self._make_links()
        self._dispatcher = self._links.listener = dispatcher = self._make_dispatcher(
            text, self._links
        )
        validator = Validator(facts, lambda: self.view.pool_tokens(time.monotonic()))
        frontend = Frontend(text, validator, dispatcher, config.request_timeout_s)
        self._grpc = GrpcServer(frontend, config.grpc, config.max_body_bytes)
        self._http = HttpServer(frontend, config.http, config.max_body_bytes)
        try:
            await self._grpc.start()
            await self._http.start()
        except BaseException:
            await self.stop()
            raise
        self.metrics.watch(
            active=lambda: dispatcher.active_sequences,
            waiting=lambda: dispatcher.waiting_sequences,
            workers=self._connected,
            resyncs=lambda: self._links.resyncs if self._links else 0,
        )
        self._health_task = asyncio.get_running_loop().create_task(self._publish_health())
        log.info("gateway %s serves %s at grpc %s and http %s",
                 config.name, model_id, self.grpc_address, self.http_address)  # fmt: skip

    async def update_members(self, endpoints: Iterable[WorkerEndpoint]) -> None:
        """Follows the controller's membership: links to who is new, and to nobody who left."""
        assert self._links is not None, "start() comes first"
        self._links.update(endpoints)

    async def drain(self, timeout_s: float) -> bool:
        """Takes nothing new and waits for what runs. True when all of it ended."""
        if self._dispatcher is None:
            return True
        self._dispatcher.draining = True
        self._health_changed.set()
        deadline = time.monotonic() + timeout_s
        while self._dispatcher.active_requests and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return not self._dispatcher.active_requests

    async def stop(self) -> None:
        """Ends what still runs with a retriable error, and closes ports and streams."""
        if self._health_task is not None:
            self._health_task.cancel()
        if self._dispatcher is not None:
            self._dispatcher.draining = True
            self._dispatcher.close()
        if self._http is not None:
            await self._http.stop()
        if self._grpc is not None:
            await self._grpc.stop(grace_s=0.5)
        if self._links is not None:
            self._links.close()
            await self._dial.closed()

    @property
    def active_requests(self) -> int:
        """Requests under way."""
        return self._dispatcher.active_requests if self._dispatcher else 0

    @property
    def ready(self) -> bool:
        """A prefill and a decode worker, or a colocated one, are connected."""
        return self._dispatcher is not None and self._dispatcher.ready

    @property
    def grpc_address(self) -> str:
        """host:port, once started."""
        return self._grpc.address if self._grpc else self.config.grpc

    @property
    def http_address(self) -> str:
        """host:port, once started."""
        return self._http.address if self._http else self.config.http

    def _make_links(self) -> Links:
        config = self.config
        return Links(
            self.view,
            config.name,
            self._incarnation,
            config.block_size,
            dial=self._dial,
            timers=asyncio.get_running_loop(),
            clock=time.monotonic,
            settings=config.links,
        )

    def _make_dispatcher(self, text: TextModel, links: Links) -> Dispatcher:
        def detokenizer_of(prompt: list[int], stop: tuple[str, ...]) -> Detokenizer:
            return IncrementalDetokenizer(text, prompt, stop)  # type: ignore[arg-type]

        return Dispatcher(
            view=self.view,
            links=links,
            timers=asyncio.get_running_loop(),
            policy=POLICIES[self.config.policy],
            limits=self.config.limits,
            metrics=self.metrics,
            hasher=BlockHasher(self.config.hash_key, self.config.block_size),
            eos_token_ids=text.eos_token_ids,
            detokenizer_of=detokenizer_of,
            prefix=f"{self.config.name}-{self._incarnation.hex()[:8]}",
            on_ready=lambda ready: self._health_changed.set(),
        )

    def _connected(self, role: Role) -> int:
        return sum(worker.role is role for worker in self.view.workers.values())

    async def _publish_health(self) -> None:
        """Keeps grpc.health.v1 in step with `ready`."""
        assert self._grpc is not None
        told = False
        while True:
            await self._health_changed.wait()
            self._health_changed.clear()
            if self.ready != told:
                told = self.ready
                log.info("gateway %s is %s", self.config.name, "ready" if told else "not ready")
                await self._grpc.set_ready(told)


def _load(model: str, home: Path) -> tuple[str, TextModel, int]:
    """Model id, text side, and the length of its longest token. Takes a while: runs on a thread."""
    files = resolve(model, home)
    text = load_text(files)
    longest = max(len(text.token_text(token_id)) for token_id in range(text.vocab_size))
    return files.model_id, text, max(1, longest)


def _check_address(field_name: str, address: str) -> None:
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdigit() and int(port) <= 65535):
        raise ConfigError(field_name, f"{address!r} is not host:port with a port from 0 to 65535")
