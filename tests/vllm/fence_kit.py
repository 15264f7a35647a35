"""Offers of one vLLM engine that another one pulls, whose blocks are given to somebody else and
computed anew in between."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from engine_contract import sequence
from engines_kit import simulated

from crossdock.engine import registry
from crossdock.engine.contract import EngineConfig
from crossdock.kvcache.block_pool import BlockPool
from crossdock.kvcache.sequence import Chunk, StepPlan
from crossdock.kvtransfer.offers import Offers, OfferSettings
from crossdock.kvtransfer.pull import PullDone, Puller
from crossdock.kvtransfer.registry import Allocator, create_transport
from crossdock.kvtransfer.ticket import new_incarnation
from crossdock.kvtransfer.transport import Handle
from crossdock.proto.v1.worker_pb2 import PromptProgress, Ticket

BLOCK, BLOCKS, WAIT_S = 32, 16, 20.0
TOKENS = 8
PROMPT = 3 * BLOCK - TOKENS  # with these tokens it fills its blocks


@dataclass(frozen=True)
class Made:
    """What a side is made of."""

    model: Path
    ranks: int = 1
    transport: str = "local"


class Peer(NamedTuple):
    """What another side needs to read from one."""

    incarnation: bytes
    info: bytes
    num_blocks: int
    block_bytes: int


class Side:
    """An engine with its real pool and transport."""

    def __init__(self, made: Made) -> None:
        self._allocator = Allocator(made.transport)
        config = EngineConfig(
            engine=simulated("vllm", args={"tensor_parallel_size": made.ranks}),
            model=str(made.model),
            block_size=BLOCK,
            kv_blocks=BLOCKS,
        )
        self.engine = registry.create(config, self._allocator)
        self.pool = BlockPool(BLOCKS, BLOCK, self.engine.memory.generations)
        self.incarnation = new_incarnation()
        self.transport: Any = create_transport(
            made.transport, self.incarnation, self.engine.memory, hosts=self.engine.hosts
        )

    def compute(self, prompt: list[int], blocks: list[int], start: int = 0) -> list[int]:
        """The tokens after a prompt, whose KV before `start` is there."""
        one = sequence(prompt, *blocks)
        for _ in range(TOKENS):
            chunk = Chunk(one, start, one.num_tokens - start, True)
            ((token,),) = self.engine.run(StepPlan((chunk,)))
            start = one.num_tokens
            one.token_ids.append(token.token_id)
        return one.token_ids[-TOKENS:]

    def close(self) -> None:
        self.transport.close()
        self.engine.close()
        self._allocator.close()


class Prefill(Side):
    """Has at most one offer at a time."""

    def __init__(self, made: Made) -> None:
        super().__init__(made)
        settings = OfferSettings("p", "", self.incarnation, b"layout", b"a test's key")
        self._offers = Offers(time.monotonic, settings, self.pool.release)
        self._blocks: list[int] = []
        self._rest: list[int] = []

    def peer(self) -> Peer:
        block_bytes = self.engine.memory.block_bytes
        return Peer(self.incarnation, self.transport.info(), BLOCKS, block_bytes)

    def offer(self, prompt: list[int]) -> tuple[bytes, list[int]]:
        """The ticket of the prompt's KV, and the tokens that come after it."""
        self.pool.release(self._rest)
        self._blocks = self.pool.allocate(3)
        right = self.compute(prompt, self._blocks)
        generations = self.pool.generations[self._blocks].tolist()
        ticket = self._offers.announce(self._blocks, generations, len(prompt), b"p" * 16)
        self._offers.offer(ticket, "s", "gateway")
        self._rest = self.pool.allocate(BLOCKS - 3)  # so that these three go to the next owner
        return ticket.SerializeToString(), right

    def rewrite(self, other: list[int]) -> None:
        """The offer is taken back, and its blocks get another prompt's KV."""
        self._offers.revoke_sequence("s", "gateway")
        again = self.pool.allocate(3)
        assert sorted(again) == sorted(self._blocks)
        self.compute(other, again)
        self.pool.release(again)


def serve_prefill(made: Made, link: Connection) -> None:
    """A Prefill in a process of its own, until the link's other end is closed."""
    prefill = Prefill(made)
    try:
        while True:
            method, args = link.recv()
            link.send(getattr(prefill, method)(*args))
    except EOFError:
        prefill.close()


class Far:
    """A Prefill in another process."""

    def __init__(self, link: Connection) -> None:
        self._link = link

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*args: object) -> Any:
            self._link.send((method, args))
            return self._link.recv()

        return call


class Pair:
    """Offers of one side, pulled by the other."""

    def __init__(self, prefill: Prefill | Far, decode: Side) -> None:
        self._prefill, self._decode = prefill, decode
        decode.transport.add_peer(*prefill.peer())
        self._read_generations = decode.transport.read_generations

    def round(self, rng: random.Random, *, late: bool, fenced: bool) -> tuple[PullDone, bool]:
        """A prompt is offered, its blocks are given to another one, which vLLM computes: before
        the blocks are read, or `late`: between them and the fence. What came of the pull, and
        whether the decode side draws the right tokens of what it has."""
        prompt, other = ([rng.randrange(5, 380) for _ in range(PROMPT)] for _ in range(2))
        packed, right = self._prefill.offer(prompt)
        if not late:
            self._prefill.rewrite(other)
        local = self._decode.pool.allocate(3)
        rewrite = (lambda: self._prefill.rewrite(other)) if late else lambda: None
        done = self._pull(Ticket.FromString(packed), local, rewrite, fenced)
        drawn = self._decode.compute(prompt, local, len(prompt) - 1)
        self._decode.pool.release(local)
        return done, drawn == right

    def _pull(
        self, ticket: Ticket, local: list[int], before_fence: Callable[[], None], fenced: bool
    ) -> PullDone:
        def fence(incarnation: bytes, remote_ids: Any, notify: bytes) -> Handle:
            before_fence()
            if fenced:
                return self._read_generations(incarnation, remote_ids, notify)
            handle = Handle()
            handle.finish(np.array(ticket.generations, dtype=np.int64))
            return handle

        self._decode.transport.read_generations = fence
        puller = Puller(self._decode.transport, self._decode.engine.memory, time.monotonic)
        offered = PromptProgress(ticket=ticket, ready_blocks=len(ticket.block_ids))
        puller.start("s", offered, list(ticket.block_ids), local, time.monotonic() + WAIT_S)
        end = time.monotonic() + WAIT_S + 1
        while not (done := puller.poll()):
            assert time.monotonic() < end, "the pull never ended"
            time.sleep(0.0005)  # the transport's thread needs the interpreter
        return done[0]


def check_refused(pair: Pair, rounds: int) -> None:
    """All offers whose blocks were rewritten, early or late, are refused."""
    rng = random.Random(1)
    came = [pair.round(rng, late=bool(number % 2), fenced=True) for number in range(rounds)]
    refused = [done for done, _ in came if (done.error or "").startswith("fence refused: ")]
    assert len(refused) == rounds


def check_unfenced(pair: Pair, rounds: int) -> None:
    """Without the fence they are taken, and wrong tokens drawn."""
    rng = random.Random(2)
    early = [pair.round(rng, late=False, fenced=False) for _ in range(rounds)]
    assert all(done.error is None for done, _ in early)
    assert not any(right for _, right in early)
    late = [pair.round(rng, late=True, fenced=False) for _ in range(rounds)]
    assert all(right for _, right in late)  # read in time, by luck
