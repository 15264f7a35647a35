"""A worker in miniature: the real Worker service over real gRPC, with no engine behind it.

Generated token k of a sequence is prompt[k % len(prompt)] ("echo"), or script[k % len(script)]
where a script is set: a function of the sequence alone, as sampling is in a real worker, so that
a sequence prefilled again elsewhere goes on with the same tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from crossdock.proto.channels import listen
from crossdock.proto.convert import ROLE_TO_PB
from crossdock.proto.identity import Credentials
from crossdock.proto.types import Role, WorkerEndpoint
from crossdock.proto.v1 import inference_pb2, worker_pb2_grpc
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.worker.kept import KeptStates
from crossdock.worker.states import States

BLOCK_BYTES = 1000


class FakeWorker(worker_pb2_grpc.WorkerServicer):
    """`async with FakeWorker("prefill-0", Role.PREFILL) as worker: ... worker.endpoint`."""

    def __init__(
        self,
        name: str,
        role: Role,
        *,
        num_blocks: int = 1000,
        block_size: int = 16,
        port: int = 0,
        model: str = "",
        certified: Callable[[], Credentials] | None = None,  # for each of its lives
    ) -> None:
        self.name, self.role, self.port = name, role, port
        self.certified, self.model = certified, model
        self.num_blocks, self.block_size = num_blocks, block_size
        self.incarnation = os.urandom(16)
        self.layout_hash = b"a layout's hash."
        self.load = pb.Load(free_blocks=num_blocks, total_blocks=num_blocks)
        self.script: list[int] | None = None
        self.refusals: deque[int] = deque()  # ErrorCodes that the next sequences get at once
        self.fail_after: dict[int, int] = {}  # generated tokens -> ErrorCode, each used once
        self.gate = asyncio.Event()  # closed: sequences wait before each token
        self.gate.set()
        self.parts: list[int] = []  # ready blocks that a prefill tells of before token 0
        self.scored_early = 0  # prompt tokens whose scores a prefill tells before all else
        self.token_0 = asyncio.Event()  # closed: prefills wait before it, their parts told
        self.token_0.set()
        self.step_s = 0.0
        self.chunk_tokens = self.max_batch = 0  # it does not say
        self.silent = False
        self.prefills: list[pb.PrefillRequest] = []
        self.decodes: list[pb.DecodeRequest] = []
        self.hand_offs: list[pb.HandOff] = []
        self.cancels: list[pb.CancelRequest] = []
        self.resyncs = 0
        self.hellos: list[pb.GatewayHello] = []
        self.running: dict[str, asyncio.Task[None]] = {}
        self.cached: dict[bytes, None] = {}
        self.next_event = 0
        self.kept = KeptStates(States())
        self._reading: dict[str, asyncio.Future[int]] = {}
        self._streams: dict[asyncio.Queue[pb.WorkerFrame | None], None] = {}
        self._server: Any = None

    async def StoreState(self, request: pb.StoreStateRequest, context: Any) -> Any:
        return self.kept.store(request)

    async def FetchState(self, request: pb.FetchStateRequest, context: Any) -> Any:
        return self.kept.fetch(request)

    async def DropState(self, request: pb.DropStateRequest, context: Any) -> Any:
        return self.kept.drop(request)

    async def __aenter__(self) -> FakeWorker:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        proof = self.certified() if self.certified else None
        if proof is not None:
            self.incarnation = bytes.fromhex(proof.peer.incarnation)
        address = listen(self._server, f"127.0.0.1:{self.port}", proof, "port")
        self.port = int(address.rpartition(":")[2])
        await self._server.start()

    async def stop(self) -> None:
        self.break_streams()
        for task in list(self.running.values()):
            task.cancel()
        await self._server.stop(0)

    async def restart(self) -> None:
        """The same address, another incarnation, an empty cache."""
        await self.stop()
        self.incarnation = os.urandom(16)
        self.cached.clear()
        self.next_event = 0
        await self.start()

    @property
    def endpoint(self) -> WorkerEndpoint:
        return WorkerEndpoint(
            self.name,
            "pool",
            self.role,
            f"127.0.0.1:{self.port}",
            self.incarnation.hex(),
            model=self.model,
        )

    @property
    def states(self) -> States:
        return self.kept.states

    @property
    def connected(self) -> bool:
        return bool(self._streams)

    # -- on command ---------------------------------------------------------------------------

    def break_streams(self) -> None:
        for outbox in list(self._streams):
            outbox.put_nowait(None)

    def send(self, frame: pb.WorkerFrame) -> None:
        if not self.silent:
            for outbox in self._streams:
                outbox.put_nowait(frame)

    def report(self, **load: Any) -> None:
        """Changes the load and says so."""
        for name, value in load.items():
            setattr(self.load, name, value)
        self.send(pb.WorkerFrame(load=self.load))

    def store(self, hashes: list[bytes], *, lose: bool = False) -> None:
        """Caches blocks; `lose` drops the event on its way."""
        fresh = [name for name in hashes if name not in self.cached]
        events = [pb.BlockEvent(stored=True, block_hash=name) for name in fresh]
        first, self.next_event = self.next_event, self.next_event + len(events)
        self.cached.update(dict.fromkeys(fresh))
        if events and not lose:
            self.send(
                pb.WorkerFrame(block_events=pb.BlockEvents(first_sequence=first, events=events))
            )

    def evict(self, hashes: list[bytes]) -> None:
        for name in hashes:
            self.cached.pop(name, None)
        events = [pb.BlockEvent(stored=False, block_hash=name) for name in hashes]
        first, self.next_event = self.next_event, self.next_event + len(events)
        self.send(pb.WorkerFrame(block_events=pb.BlockEvents(first_sequence=first, events=events)))

    # -- the service --------------------------------------------------------------------------

    async def Connect(self, frames: Any, context: Any) -> AsyncIterator[pb.WorkerFrame]:
        first = await anext(aiter(frames))
        self.hellos.append(first.hello)
        outbox: asyncio.Queue[pb.WorkerFrame | None] = asyncio.Queue()
        self._streams[outbox] = None
        reader = asyncio.create_task(self._read(frames, outbox))
        beat = asyncio.create_task(self._beat())
        try:
            yield pb.WorkerFrame(
                hello=self.description(), load=self.load, block_events=self._snapshot()
            )
            while (frame := await outbox.get()) is not None:
                yield frame
        finally:
            self._streams.pop(outbox, None)
            reader.cancel()
            beat.cancel()
            for task in list(self.running.values()):
                task.cancel()

    def description(self) -> pb.WorkerDescription:
        return pb.WorkerDescription(
            name=self.name,
            role=ROLE_TO_PB[self.role],
            incarnation=self.incarnation,
            layout=pb.KVLayout(block_size=self.block_size),
            layout_hash=self.layout_hash,
            num_blocks=self.num_blocks,
            context_length=self.limit,
            block_bytes=BLOCK_BYTES,
            chunk_tokens=self.chunk_tokens,
            max_batch=self.max_batch,
        )

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(0.2)
            at = pb.BlockEvents(first_sequence=self.next_event)
            self.send(pb.WorkerFrame(load=self.load, block_events=at))

    async def _read(self, frames: Any, outbox: asyncio.Queue[pb.WorkerFrame | None]) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            async for together in frames:
                for frame in (together, *together.more):
                    self._take(frame, outbox)
        outbox.put_nowait(None)

    def _take(self, frame: pb.GatewayFrame, outbox: asyncio.Queue[pb.WorkerFrame | None]) -> None:
        kind = frame.WhichOneof("frame")
        if kind == "prefill":
            self.prefills.append(_copy(frame.prefill))
            self._begin(frame.prefill.sequence, self._prefill(frame.prefill.sequence))
        elif kind == "decode":
            self.decodes.append(_copy(frame.decode))
            self._begin(frame.decode.sequence, self._decode(frame.decode))
        elif kind == "hand_off":
            self.hand_offs.append(frame.hand_off)
            self._hand_off(frame.hand_off)
        elif kind == "cancel":
            self.cancels.append(frame.cancel)
            if task := self.running.get(frame.cancel.sequence_id):
                task.cancel()
        elif kind == "resync":
            self.resyncs += 1
            outbox.put_nowait(pb.WorkerFrame(block_events=self._snapshot()))

    def _snapshot(self) -> pb.BlockEvents:
        events = [pb.BlockEvent(stored=True, block_hash=name) for name in self.cached]
        first = self.next_event - len(events)
        return pb.BlockEvents(first_sequence=first, events=events, snapshot=True)

    # -- sequences ----------------------------------------------------------------------------

    def _begin(self, sequence: pb.SequenceRequest, work: Any) -> None:
        task = asyncio.create_task(work)
        self.running[sequence.sequence_id] = task
        task.add_done_callback(lambda _: self.running.pop(sequence.sequence_id, None))

    async def _prefill(self, sequence: pb.SequenceRequest) -> None:
        started = self._now_ms()
        if self._refused(sequence):
            return
        await self._pace()
        self._score(sequence, before=self.scored_early)
        hits = 0
        for name in sequence.block_hashes:
            if name not in self.cached or sequence.sampling.HasField("prompt_logprobs"):
                break
            hits += 1
        cached = min(hits * self.block_size, len(sequence.token_ids) - 1)
        self.store(list(sequence.block_hashes))
        blocks = -(-len(sequence.token_ids) // self.block_size)
        ticket = pb.Ticket(
            ticket_id=os.urandom(16),
            prefill_worker=self.name,
            incarnation=self.incarnation,
            block_ids=range(blocks),
            generations=[1] * blocks,
            num_tokens=len(sequence.token_ids),
        )
        for ready in self.parts:
            progress = pb.PromptProgress(ready_blocks=ready)
            if ready == self.parts[0]:
                progress.ticket.CopyFrom(ticket)
            self._emit(pb.SequenceOutput(sequence_id=sequence.sequence_id, progress=progress))
        await self.token_0.wait()
        self._score(sequence)
        output = self._token(sequence)
        output.cached_tokens = cached
        now = self._now_ms()
        output.times.CopyFrom(
            pb.SequenceTimes(prefill_queued=started, prefill_started=started, first_token=now)
        )
        if not output.finish_reason:
            output.times.ticket_offered = now
            output.progress.ready_blocks = blocks
            if not self.parts:
                output.progress.ticket.CopyFrom(ticket)
        self._emit(output)

    async def _decode(self, request: pb.DecodeRequest) -> None:
        sequence = request.sequence
        if self._refused(sequence):
            return
        arrived = self._now_ms()
        if request.progress.ready_blocks < len(request.progress.ticket.block_ids):
            self._reading[sequence.sequence_id] = token_0 = asyncio.Future[int]()
            sequence.token_ids.append(await token_0)
        first = True
        self._score(sequence)
        while True:
            await self._pace()
            code = self.fail_after.pop(len(sequence.token_ids) - sequence.prompt_tokens, None)
            if code is not None:
                self._emit(_failed(sequence, code))
                return
            output = self._token(sequence)
            if first and request.HasField("progress"):
                blocks = len(request.progress.ticket.block_ids)
                output.transfer.blocks = blocks
                output.transfer.bytes = blocks * BLOCK_BYTES
                now = self._now_ms()
                output.times.CopyFrom(
                    pb.SequenceTimes(
                        decode_queued=arrived, reserved=arrived, pulled=now, fenced=now, joined=now
                    )
                )
            elif first:
                now = self._now_ms()
                output.times.CopyFrom(
                    pb.SequenceTimes(
                        prefill_queued=arrived, prefill_started=arrived, first_token=now
                    )
                )
            first = False
            self._emit(output)
            if output.finish_reason:
                return

    def _hand_off(self, hand_off: pb.HandOff) -> None:
        if hand_off.first_tokens:
            self._reading.pop(hand_off.sequence_id).set_result(hand_off.first_tokens[0])

    async def _pace(self) -> None:
        await self.gate.wait()
        await asyncio.sleep(self.step_s)

    @property
    def limit(self) -> int:
        """Tokens of the longest sequence that it holds; a stream that gets there ends."""
        return self.num_blocks * self.block_size

    def _refused(self, sequence: pb.SequenceRequest) -> bool:
        if len(sequence.token_ids) >= self.limit:
            self._emit(_failed(sequence, pb.ERROR_CODE_INVALID))
            return True
        if not self.refusals:
            return False
        self._emit(_failed(sequence, self.refusals.popleft()))
        return True

    def _token(self, sequence: pb.SequenceRequest) -> pb.SequenceOutput:
        """The next token, appended to the request's own token_ids; none where none is asked for."""
        if not sequence.sampling.max_tokens:
            return pb.SequenceOutput(
                sequence_id=sequence.sequence_id, finish_reason=inference_pb2.FINISH_REASON_LENGTH
            )
        prompt = self.script or list(sequence.token_ids[: sequence.prompt_tokens])
        k = len(sequence.token_ids) - sequence.prompt_tokens
        token_id = prompt[k % len(prompt)]
        sequence.token_ids.append(token_id)
        output = pb.SequenceOutput(sequence_id=sequence.sequence_id, token_ids=[token_id])
        sampling = sequence.sampling
        if token_id in sequence.eos_token_ids and not sampling.ignore_eos:
            output.finish_reason = inference_pb2.FINISH_REASON_STOP
        elif token_id in sampling.stop_token_ids:
            output.finish_reason = inference_pb2.FINISH_REASON_STOP
            output.stop_reason = str(token_id)
        elif k + 1 >= sampling.max_tokens or len(sequence.token_ids) >= self.limit:
            output.finish_reason = inference_pb2.FINISH_REASON_LENGTH
        if sampling.HasField("logprobs"):
            chosen = inference_pb2.TokenLogprob(token_id=token_id, logprob=-0.25 - k)
            output.logprobs.add(chosen=chosen, top=[chosen] * sampling.logprobs)
        return output

    def _score(self, sequence: pb.SequenceRequest, before: int | None = None) -> None:
        """Log-probabilities of the prompt, where asked for and not told: see `score_of`."""
        if not sequence.sampling.HasField("prompt_logprobs"):
            return
        first, top = max(1, sequence.scored_tokens), sequence.sampling.prompt_logprobs
        end = sequence.prompt_tokens if before is None else min(before, sequence.prompt_tokens)
        if first >= end:
            return
        places = range(first, end)
        scores = pb.PromptLogprobs(
            first=first,
            logprobs=[score_of(sequence.token_ids[at], at) for at in places],
            ranks=[2] * len(places),
            top=top,
            top_ids=[(at + i) % 100 for at in places for i in range(top)],
            top_logprobs=[-0.125 * (i + 1) for _ in places for i in range(top)],
        )
        sequence.scored_tokens = end
        output = pb.SequenceOutput(sequence_id=sequence.sequence_id, prompt_logprobs=scores)
        self._emit(output)

    def _emit(self, output: pb.SequenceOutput) -> None:
        self.send(pb.WorkerFrame(outputs=[output], load=self.load))

    def _now_ms(self) -> float:
        return time.time() * 1000


def score_of(token_id: int, position: int) -> float:
    """The log-probability that a fake worker gives a prompt's token."""
    return -0.5 - token_id / 1024 - position / 16384


def _copy(message: Any) -> Any:
    """As it came: sequences grow while they run."""
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def _failed(sequence: pb.SequenceRequest, code: int) -> pb.SequenceOutput:
    return pb.SequenceOutput(
        sequence_id=sequence.sequence_id,
        finish_reason=inference_pb2.FINISH_REASON_ERROR,
        error=pb.SequenceError(code=code, message="scripted"),  # type: ignore[arg-type]
    )
