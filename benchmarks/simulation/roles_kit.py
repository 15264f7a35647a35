"""Both roles without gRPC, Ray or a model: a real pool, real schedulers, a fake transport.

The simulated engine draws each token from all the KV it can reach, so that a token computed from a
wrong, missing or foreign block is a wrong token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from fake_transport import FakeNetwork, FakeTransport

from crossdock.decode.role import DecodeRole
from crossdock.engine.contract import EngineFacts
from crossdock.engine.profiles import Profile
from crossdock.engine.simulated import (
    POSITION_BYTES,
    SimulatedEngine,
    drawn,
    weights,
)
from crossdock.kvcache.block_pool import BlockPool
from crossdock.kvcache.sequence import SampledToken, StepPlan
from crossdock.kvtransfer.ticket import new_incarnation
from crossdock.kvtransfer.transport import PoolMemory
from crossdock.prefill.role import PrefillRole
from crossdock.proto.convert import sampling_to_pb
from crossdock.proto.hashing import BlockHasher, hash_key
from crossdock.proto.types import Role, SamplingParams
from crossdock.proto.v1 import worker_pb2
from crossdock.worker.config import WorkerConfig
from crossdock.worker.job import Job
from crossdock.worker.loop import EngineLoop, Turn
from crossdock.worker.role import WorkerRole, WorkerState

BLOCK = 8
VOCAB = 997
CONTEXT = 512
KEY = b"a key of this test cluster"
LAYOUT = b"l" * 16
HASHER = BlockHasher(hash_key(KEY), BLOCK)
ROOT = HASHER.root(LAYOUT)


def kv_of_tokens(token_ids: Sequence[int]) -> np.ndarray:
    """uint64 [tokens]: the KV of a sequence."""
    ids = np.array(token_ids, dtype=np.uint64) + np.uint64(1)
    return (ids * weights(0, len(token_ids))).cumsum(dtype=np.uint64)


def undisturbed(
    prompt: Sequence[int], tokens: int, drawn_ids: int = VOCAB, **sampling: object
) -> list[int]:
    """What a request must answer, whatever happens on the way."""
    params = SamplingParams(**({"temperature": 0.0} | sampling))  # type: ignore[arg-type]
    ids, kv, seen = list(prompt), 0, 0
    factors = weights(0, len(prompt) + tokens).tolist()
    for position in range(len(prompt) + tokens):
        if position == len(ids):
            ids.append(drawn(seen, position, params, drawn_ids))
        kv = (kv + (ids[position] + 1) * factors[position]) % 2**64
        seen = (seen + kv * factors[position]) % 2**64
    return ids[len(prompt) :]


class RecordingEngine(SimulatedEngine):
    """Remembers its steps."""

    buffer: np.ndarray

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.plans: list[StepPlan] = []

    def run(self, plan: StepPlan) -> list[list[SampledToken]]:
        self.plans.append(plan)
        return super().run(plan)


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass(eq=False)
class Worker:
    """One role with its loop; `turn` is one turn of the engine thread."""

    role: WorkerRole
    loop: EngineLoop
    runner: RecordingEngine
    transport: FakeTransport
    outputs: list[worker_pb2.SequenceOutput] = field(default_factory=list)
    releases: list[tuple[str, bytes]] = field(default_factory=list)
    on_turn: Callable[[Turn], None] | None = None  # takes what a turn made, by owner

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.loop.turn()

    def take(self) -> list[worker_pb2.SequenceOutput]:
        taken, self.outputs = self.outputs, []
        return taken

    def check(self) -> None:
        self.role.state.pool.check_integrity(self.role.held())


@dataclass
class Site:
    """A network and a clock that its workers share."""

    network: FakeNetwork = field(default_factory=FakeNetwork)
    clock: Clock = field(default_factory=Clock)
    wall_clock: Callable[[], float] = time.time
    pool_type: type[BlockPool] = BlockPool
    transport_type: type[FakeTransport] = FakeTransport
    engine_type: type[RecordingEngine] = RecordingEngine
    tokens_per_step: int = 1
    _names: count = field(default_factory=count)

    def worker(self, role: Role, blocks: int = 64, address: str = "", **settings: object) -> Worker:
        """`address`: of a restarted worker, its predecessor's; else one that nobody had."""
        settings = {"name": f"{role}-{next(self._names)}", "chunk_tokens": 32} | settings
        config = WorkerConfig(
            pool=str(role),
            role=role,
            model="toy",
            cluster_key=KEY,
            block_size=BLOCK,
            **settings,  # type: ignore[arg-type]
        )
        size = BLOCK * POSITION_BYTES
        kv, generations = np.zeros(blocks * size, np.uint8), np.zeros(blocks, np.int64)
        memory = PoolMemory.block_major(kv.ctypes.data, blocks, size, generations)
        facts = EngineFacts("simulated", "", VOCAB, CONTEXT, self.tokens_per_step)
        engine = self.engine_type(facts, memory, BLOCK, Profile(), VOCAB)
        engine.buffer = kv  # lives as long
        incarnation = new_incarnation()
        transport = self.transport_type(self.network, incarnation, memory)
        state = WorkerState(
            config=config,
            pool=self.pool_type(blocks, BLOCK, memory.generations),
            lookahead=facts.tokens_per_step - 1,
            hasher=HASHER,
            context_length=CONTEXT,
            layout_hash=LAYOUT,
            incarnation=incarnation,
            transport=transport,
            memory=memory,
            address=address or config.name,
            clock=self.clock,
            wall_clock=self.wall_clock,
        )
        made = (PrefillRole if role is Role.PREFILL else DecodeRole)(state)
        worker = Worker(made, None, engine, transport)  # type: ignore[arg-type]
        worker.loop = EngineLoop(made, engine, lambda turn: _collect(worker, turn))
        return worker

    def introduce(self, *workers: Worker) -> None:
        for one in workers:
            for other in workers:
                memory = other.transport.memory
                one.transport.add_peer(
                    other.role.state.incarnation,
                    other.transport.info(),
                    memory.num_blocks,
                    memory.block_bytes,
                )


def _collect(worker: Worker, turn: Turn) -> None:
    if worker.on_turn is not None:
        worker.on_turn(turn)
        return
    for outputs in turn.outputs.values():
        worker.outputs.extend(outputs)
    worker.releases.extend(turn.ticket_releases)


_ids = count()


def job(
    prompt: list[int],
    *,
    emitted: list[int] | None = None,
    progress: worker_pb2.PromptProgress | None = None,
    owner: str = "gateway",
    sequence_id: str = "",
    deadline_unix_ms: int = 0,
    arrival_unix_s: float = 0.0,
    **sampling: object,
) -> Job:
    """A request as a gateway would send it, with what it has emitted so far.

    progress: of its ticket; where all blocks are ready, `emitted` has token 0.
    """
    params = SamplingParams(**({"temperature": 0.0, "max_tokens": 8} | sampling))  # type: ignore[arg-type]
    ids = prompt + (emitted or [])
    request = worker_pb2.SequenceRequest(
        sequence_id=sequence_id or f"s{next(_ids)}",
        token_ids=ids,
        block_hashes=HASHER.chain(ids, ROOT),
        root_hash=ROOT,
        sampling=sampling_to_pb(params),
        prompt_tokens=len(prompt),
        deadline_unix_ms=deadline_unix_ms,
        arrival_unix_s=arrival_unix_s,
    )
    made = Job.from_pb(
        request,
        owner,
        arrival=float(next(_ids)),
        vocab_size=VOCAB,
        context_length=CONTEXT,
        hasher=HASHER,
    )
    if progress is not None:
        made.progress.CopyFrom(progress)
    return made
