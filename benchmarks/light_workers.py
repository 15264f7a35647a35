"""Workers that cost next to nothing: they speak to gateways as workers do, a frame a step, and
compute nothing. Hundreds fit into one process, whose clients then measure the gateway."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from crossdock.proto.channels import STREAMS, listen
from crossdock.proto.convert import ROLE_TO_PB
from crossdock.proto.types import Role, WorkerEndpoint
from crossdock.proto.v1 import inference_pb2, worker_pb2_grpc
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.worker.loop import STEADY_LOAD_S

BLOCKS, BLOCK_TOKENS, BLOCK_BYTES = 4096, 16, 1024
MAX_BATCH, CHUNK_TOKENS = 512, 2048
PREFILL_S = 0.002  # of all prompts that wait together
HEARTBEAT_S = 1.0  # without any other frame
TOKENS = range(32, 122)  # that answers are made of


class LightWorker(worker_pb2_grpc.WorkerServicer):
    """One worker with one gateway, which trusts it: tickets are not signed, prompts not kept."""

    def __init__(self, name: str, role: Role, step_s: float) -> None:
        self._name, self._role, self._step_s = name, role, step_s
        self._incarnation = os.urandom(16)
        self._outbox: asyncio.Queue[pb.WorkerFrame] = asyncio.Queue()
        self._prompts: list[pb.SequenceRequest] = []  # that wait for the next step
        self._joining: list[pb.SequenceRequest] = []
        self._left: dict[int, list[Any]] = {}  # by number: tokens to come, sequence id
        self._stepping, self._load_told = False, 0.0

    async def start(self) -> WorkerEndpoint:
        """Serves from now on, under this address."""
        self._server = grpc.aio.server(options=[*STREAMS, ("grpc.so_reuseport", 0)])
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        address = listen(self._server, "127.0.0.1:0", None, "port")
        await self._server.start()
        return WorkerEndpoint(
            self._name, str(self._role), self._role, address, self._incarnation.hex()
        )

    async def stop(self) -> None:
        """Ends its streams."""
        await self._server.stop(0)

    async def Connect(self, frames: Any, context: Any) -> AsyncIterator[pb.WorkerFrame]:
        await anext(aiter(frames))
        reading = asyncio.create_task(self._read(frames))
        try:
            nothing = pb.BlockEvents(snapshot=True)
            yield pb.WorkerFrame(hello=self._hello(), load=self._load(), block_events=nothing)
            while True:
                try:
                    async with asyncio.timeout(HEARTBEAT_S):
                        frame = await self._outbox.get()
                except TimeoutError:
                    frame = pb.WorkerFrame(load=self._load(), block_events=pb.BlockEvents())
                yield frame
        finally:
            reading.cancel()

    async def _read(self, frames: Any) -> None:
        async for together in frames:
            for frame in (together, *together.more):
                kind = frame.WhichOneof("frame")
                if kind == "prefill":
                    self._prompts.append(frame.prefill.sequence)
                    if len(self._prompts) == 1:
                        asyncio.get_running_loop().call_later(PREFILL_S, self._prefilled)
                elif kind == "decode":
                    self._joining.append(frame.decode.sequence)
                    if not self._stepping:
                        self._stepping = True
                        asyncio.get_running_loop().call_later(self._step_s, self._step)

    def _prefilled(self) -> None:
        """Token 0 of every prompt that has come, and its ticket."""
        prompts, self._prompts = self._prompts, []
        outputs = []
        for prompt in prompts:
            blocks = -(-len(prompt.token_ids) // BLOCK_TOKENS)
            ticket = pb.Ticket(
                ticket_id=prompt.sequence_id.encode(),
                prefill_worker=self._name,
                incarnation=self._incarnation,
                block_ids=range(blocks),
                num_tokens=len(prompt.token_ids),
            )
            progress = pb.PromptProgress(ticket=ticket, ready_blocks=blocks)
            about = {"sequence_id": prompt.sequence_id, "token_ids": [TOKENS[0]]}
            outputs.append(pb.SequenceOutput(progress=progress, **about))
        self._outbox.put_nowait(pb.WorkerFrame(outputs=outputs, load=self._load()))

    def _step(self) -> None:
        """A token of every stream: those between their first and last as two columns."""
        outputs, ended = [], []
        steady = pb.SequenceOutput()
        for number, stream in self._left.items():
            stream[0] -= 1
            if stream[0]:
                steady.numbers.append(number)
                steady.token_ids.append(TOKENS[stream[0] % len(TOKENS)])
            else:
                ended.append(number)
                reason = inference_pb2.FINISH_REASON_LENGTH
                about = {"sequence_id": stream[1], "token_ids": [TOKENS[1]]}
                outputs.append(pb.SequenceOutput(finish_reason=reason, **about))
        for number in ended:
            del self._left[number]
        joining, self._joining = self._joining, []
        for each in joining:
            blocks = -(-len(each.token_ids) // BLOCK_TOKENS)
            pulled = pb.TransferStats(blocks=blocks, bytes=blocks * BLOCK_BYTES, seconds=0.001)
            about = {"sequence_id": each.sequence_id, "token_ids": [TOKENS[2]]}
            outputs.append(pb.SequenceOutput(transfer=pulled, **about))
            gained = len(each.token_ids) - each.prompt_tokens
            self._left[each.number] = [each.sampling.max_tokens - gained - 1, each.sequence_id]
        frame = pb.WorkerFrame(outputs=[*outputs, steady] if steady.numbers else outputs)
        now = time.monotonic()
        if outputs or now - self._load_told >= STEADY_LOAD_S:
            frame.load.CopyFrom(self._load())
            self._load_told = now
        self._outbox.put_nowait(frame)
        self._stepping = bool(self._left)
        if self._stepping:
            asyncio.get_running_loop().call_later(self._step_s, self._step)

    def _hello(self) -> pb.WorkerDescription:
        return pb.WorkerDescription(
            name=self._name,
            role=ROLE_TO_PB[self._role],
            incarnation=self._incarnation,
            layout=pb.KVLayout(block_size=BLOCK_TOKENS),
            layout_hash=b"of light workers",
            num_blocks=BLOCKS,
            context_length=BLOCKS * BLOCK_TOKENS,
            block_bytes=BLOCK_BYTES,
            chunk_tokens=CHUNK_TOKENS,
            max_batch=MAX_BATCH,
        )

    def _load(self) -> pb.Load:
        running = len(self._left) + len(self._joining)
        return pb.Load(
            running=running,
            waiting=len(self._prompts),
            total_blocks=BLOCKS,
            free_blocks=max(0, BLOCKS - 8 * running),
            step_base_s=self._step_s,
        )
