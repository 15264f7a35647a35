"""The fence over vLLM's tensors: KV whose blocks its kernels wrote for somebody else is refused.

Two engines of this process, each with its real pool and transport; one offers, one pulls.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_contract import sequence

from crossdock.engine import registry
from crossdock.engine.contract import EngineConfig
from crossdock.kvcache.block_pool import BlockPool
from crossdock.kvcache.sequence import Chunk, StepPlan
from crossdock.kvtransfer.offers import Offers, OfferSettings
from crossdock.kvtransfer.pull import PullDone, Puller
from crossdock.kvtransfer.registry import allocate, create_transport
from crossdock.kvtransfer.ticket import new_incarnation
from crossdock.kvtransfer.transport import Handle
from crossdock.proto.v1.worker_pb2 import PromptProgress, Ticket

BLOCK, BLOCKS, WAIT_S, ROUNDS = 32, 16, 20.0, 200
TOKENS = 8
PROMPT = 3 * BLOCK - TOKENS  # with these tokens it fills its blocks


class Side:
    def __init__(self, model: Path) -> None:
        self.incarnation, self._free = new_incarnation(), []
        settings = registry.settings_of("vllm")(kind="vllm")
        config = EngineConfig(engine=settings, model=str(model), block_size=BLOCK, kv_blocks=BLOCKS)
        self.engine = registry.create(config, self._allocate)
        self.memory = self.engine.memory
        self.pool = BlockPool(BLOCKS, BLOCK, self.memory.generations)
        self.transport: Any = create_transport("local", self.incarnation, self.memory)

    def _allocate(self, nbytes: int, num_blocks: int) -> Any:
        buffer, generations, free = allocate("local", nbytes, num_blocks)
        self._free.append(free)
        return buffer, generations

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
        for free in self._free:
            free()


class Pair:
    """Offers of one side, pulled by the other."""

    def __init__(self, model: Path) -> None:
        self.prefill, self.decode = Side(model), Side(model)
        settings = OfferSettings("p", "", self.prefill.incarnation, b"layout", b"a test's key")
        self.offers = Offers(time.monotonic, settings, self.prefill.pool.release)
        self.decode.transport.add_peer(
            self.prefill.incarnation,
            self.prefill.transport.info(),
            BLOCKS,
            self.prefill.memory.block_bytes,
        )

    def round(self, rng: random.Random, *, late: bool, fenced: bool) -> tuple[PullDone, bool]:
        """A prompt is offered, its blocks are given to another one, which vLLM computes: before
        the blocks are read, or `late`: between them and the fence. What came of the pull, and
        whether the decode side draws the right tokens of what it has."""
        prompt, other = ([rng.randrange(5, 380) for _ in range(PROMPT)] for _ in range(2))
        blocks = self.prefill.pool.allocate(3)
        right = self.prefill.compute(prompt, blocks)
        generations = self.prefill.pool.generations[blocks].tolist()
        ticket = self.offers.announce(blocks, generations, len(prompt), b"p" * 16)
        self.offers.offer(ticket, "s", "gateway")
        rest = self.prefill.pool.allocate(BLOCKS - 3)  # so that these three go to the next owner

        def rewrite() -> None:
            self.offers.revoke_sequence("s", "gateway")
            again = self.prefill.pool.allocate(3)
            assert sorted(again) == sorted(blocks)
            self.prefill.compute(other, again)
            self.prefill.pool.release(again)

        if not late:
            rewrite()
        local = self.decode.pool.allocate(3)
        done = self._pull(ticket, local, rewrite if late else lambda: None, fenced)
        drawn = self.decode.compute(prompt, local, len(prompt) - 1)
        self.decode.pool.release(local)
        self.prefill.pool.release(rest)
        return done, drawn == right

    def _pull(
        self, ticket: Ticket, local: list[int], before_fence: Callable[[], None], fenced: bool
    ) -> PullDone:
        transport = self.decode.transport
        read_generations = type(transport).read_generations

        def fence(incarnation: bytes, remote_ids: Any, notify: bytes) -> Handle:
            before_fence()
            if fenced:
                return read_generations(transport, incarnation, remote_ids, notify)
            handle = Handle()
            handle.finish(np.array(ticket.generations, dtype=np.int64))
            return handle

        transport.read_generations = fence
        puller = Puller(transport, self.decode.memory, time.monotonic)
        offered = PromptProgress(ticket=ticket, ready_blocks=len(ticket.block_ids))
        puller.start("s", offered, list(ticket.block_ids), local, time.monotonic() + WAIT_S)
        end = time.monotonic() + WAIT_S + 1
        while not (done := puller.poll()):
            assert time.monotonic() < end, "the pull never ended"
            time.sleep(0.0005)  # the transport's thread needs the interpreter
        return done[0]


@pytest.fixture(scope="module")
def pair(small_llama: Path) -> Iterator[Pair]:
    pair = Pair(small_llama)
    yield pair
    pair.decode.close()
    pair.prefill.close()


def test_blocks_that_vllm_rewrote_are_refused_200_times_of_200(pair: Pair) -> None:
    rng = random.Random(1)
    rounds = [pair.round(rng, late=bool(number % 2), fenced=True) for number in range(ROUNDS)]
    refused = [done for done, _ in rounds if (done.error or "").startswith("fence refused: ")]
    assert len(refused) == ROUNDS


def test_without_the_fence_wrong_tokens_are_drawn(pair: Pair) -> None:
    rng = random.Random(2)
    early = [pair.round(rng, late=False, fenced=False) for _ in range(20)]
    assert all(done.error is None for done, _ in early)
    assert not any(right for _, right in early)
    late = [pair.round(rng, late=True, fenced=False) for _ in range(20)]
    assert all(right for _, right in late)  # read in time, by luck
