"""One model of a gateway: its text side, and a dispatcher over the workers of this model alone.

Nothing of placement, prefix index or hand-off is shared between models, so none of it asks which
model a worker has.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from crossdock.model.detokenizer import IncrementalDetokenizer
from crossdock.model.store import ModelFiles, resolve
from crossdock.model.text import TextModel, load_text
from crossdock.proto.hashing import BlockHasher
from crossdock.proto.types import WorkerEndpoint
from crossdock.router.config import GatewayConfig
from crossdock.router.dispatch.admission import Admission
from crossdock.router.dispatch.dispatcher import Dispatcher
from crossdock.router.dispatch.links import Links
from crossdock.router.dispatch.metrics import GatewayMetrics, ModelMetrics
from crossdock.router.dispatch.recent import Recent
from crossdock.router.dispatch.streams import Dialer
from crossdock.router.frontdoor.frontend import Frontend
from crossdock.router.frontdoor.gate import Gate
from crossdock.router.frontdoor.grammar_check import GrammarChecker
from crossdock.router.frontdoor.text_process import TextProcess
from crossdock.router.frontdoor.tools.formats import format_of
from crossdock.router.frontdoor.validate import Validator
from crossdock.router.placement.view import ClusterView
from crossdock.router.serving import ServedModel

log = logging.getLogger(__name__)

ENDED_POLL_S = 0.1
CHOSEN_S = 1.0  # for requests that have chosen the model and are read yet to be refused


@dataclass(frozen=True)
class Shared:
    """What the models of one gateway have in common. `incarnation` is the gateway's."""

    config: GatewayConfig
    incarnation: bytes
    dial: Dialer
    admission: Admission
    recent: Recent
    metrics: GatewayMetrics
    gate: Gate
    on_ready: Callable[[], object]


@dataclass(frozen=True)
class LoadedText:
    """What is read of a model's files, which takes a while."""

    files: ModelFiles
    text: TextModel
    longest_token: int  # characters

    @classmethod
    def of(cls, source: str, home: Path) -> LoadedText:
        """Reads them; for a thread. Raises ModelError."""
        files = resolve(source, home, any_family=True)
        text = load_text(files)
        if text.template is not None:
            _ = text.template.takes_tools  # looked up once: parsing a template holds the loop
        longest = max(len(text.token_text(token_id)) for token_id in range(text.vocab_size))
        return cls(files, text, max(1, longest))


class Served:
    """A model from the moment that clients may ask for it. `key` is its name in the YAML's models;
    empty where there is but one, named by its files."""

    def __init__(
        self, key: str, model: ServedModel, loaded: LoadedText, shared: Shared, number: int
    ) -> None:
        config, files, text = shared.config, loaded.files, loaded.text
        self.key, self.source, self._text, self._config = key, model.source, text, config
        self.metrics = ModelMetrics(shared.metrics, key or files.model_id)
        self.view = view = ClusterView()
        self.links = links = Links(
            view,
            config.name,
            shared.incarnation,
            config.block_size,
            dial=shared.dial,
            timers=asyncio.get_running_loop(),
            clock=time.monotonic,
            settings=config.links,
        )
        prefix = f"{config.name}-{shared.incarnation.hex()[:8]}"
        self.dispatcher = links.listener = dispatcher = Dispatcher(
            view=view,
            links=links,
            timers=asyncio.get_running_loop(),
            policy=config.policies.named(config.policy),
            limits=config,
            admission=shared.admission,
            recent=shared.recent,
            metrics=self.metrics,
            hasher=BlockHasher(config.hash_key, config.block_size),
            eos_token_ids=text.eos_token_ids,
            detokenizer_of=lambda prompt, stop: IncrementalDetokenizer(text, prompt, stop),
            prefix=f"{prefix}-{number}" if number else prefix,
            ttft_aim_s=config.ttft_aim_s,
            tpot_aim_s=config.tpot_aim_s,
            on_ready=shared.on_ready,
        )
        self.aside = TextProcess(files)
        self.grammars = GrammarChecker(model.source, config.home)
        self.frontend = Frontend(
            text,
            Validator(
                key or files.model_id,
                text,
                loaded.longest_token,
                lambda: view.pool_tokens(time.monotonic()),
            ),
            dispatcher,
            self.aside,
            config.request_timeout_s,
            shared.gate,
            self.grammars,
            format_of(model.tool_parser or config.tool_parser, text),
            model.aliases,
        )

    @property
    def name(self) -> str:
        """What clients call it."""
        return self.frontend.model_id

    def become(self, model: ServedModel) -> None:
        """Takes other settings of the same model, also of one that was to go."""
        self.dispatcher.retired = ""
        parser = format_of(model.tool_parser or self._config.tool_parser, self._text)
        self.frontend = self.frontend.known_as(model.aliases, parser)

    def update(self, endpoints: Iterable[WorkerEndpoint]) -> None:
        """The cluster's workers, of which it takes those of this model."""
        self.links.update(each for each in endpoints if each.model == self.key)

    async def ended(self) -> None:
        """Ends what was not begun, and returns once what was is over. Nothing new comes."""
        self.dispatcher.retire(f"model: {self.name!r} is not served here any more")
        await asyncio.sleep(CHOSEN_S)
        while self.dispatcher.active_requests:
            await asyncio.sleep(ENDED_POLL_S)

    def close(self) -> None:
        """Ends what still runs, links and processes."""
        self.dispatcher.close()
        self.links.close()
        self.grammars.close()
        self.aside.close()
