"""Two whole workers in this process, and the gateway's end of their streams."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from crossdock.decode import role as decode_worker
from crossdock.prefill import role as prefill_worker
from crossdock.proto.convert import sampling_to_pb
from crossdock.proto.hashing import BlockHasher, hash_key
from crossdock.proto.types import Role, SamplingParams
from crossdock.proto.v1 import worker_pb2, worker_pb2_grpc
from crossdock.worker.config import WorkerConfig
from crossdock.worker.server import WorkerServer

BLOCK = 16
KEY = b"a key of this test cluster"
HASHER = BlockHasher(hash_key(KEY), BLOCK)
ROOT = HASHER.root(b"any layout")
PROMPT = [(5 * i) % 200 + 3 for i in range(70)]


def config(name: str, role: Role, model: Path, **settings: object) -> WorkerConfig:
    options = {"kv_memory_mb": 16, "transport": "local", "cluster_key": KEY, "chunk_tokens": 32}
    return WorkerConfig(
        name=name, pool=str(role), role=role, model=str(model), **(options | settings)
    )  # type: ignore[arg-type]


class Gateway:
    """The gateway's end of one stream."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self.stub = worker_pb2_grpc.WorkerStub(self._channel)
        self._call = self.stub.Connect()
        self.hello: worker_pb2.WorkerFrame

    async def connect(self) -> None:
        hello = worker_pb2.GatewayHello(gateway="g", incarnation=b"i" * 16)
        await self._call.write(worker_pb2.GatewayFrame(hello=hello))
        self.hello = await self._call.read()

    async def send(self, **frame: object) -> None:
        await self._call.write(worker_pb2.GatewayFrame(**frame))  # type: ignore[arg-type]

    async def outputs(self, sequence_id: str) -> AsyncIterator[worker_pb2.SequenceOutput]:
        """Those of one sequence, to its last."""
        while True:
            frame = await asyncio.wait_for(self._call.read(), 20)
            for output in frame.outputs:
                if output.sequence_id == sequence_id:
                    yield output
                    offered = output.token_ids and output.HasField("progress")
                    if output.finish_reason or offered:
                        return

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close()


class Pair:
    def __init__(self, prefill: WorkerServer, decode: WorkerServer) -> None:
        self.prefill, self.decode = prefill, decode
        self.p, self.d = (Gateway(w.description.address) for w in (prefill, decode))

    async def first(self, sequence_id: str, prompt: list[int]) -> worker_pb2.SequenceOutput:
        request = worker_pb2.PrefillRequest(sequence=sequence(sequence_id, prompt))
        await self.p.send(prefill=request)
        *announced, first = [output async for output in self.p.outputs(sequence_id)]
        for earlier in announced:
            if earlier.progress.HasField("ticket"):
                first.progress.ticket.CopyFrom(earlier.progress.ticket)
        return first

    async def rest(
        self, sequence_id: str, prompt: list[int], first: worker_pb2.SequenceOutput
    ) -> list[worker_pb2.SequenceOutput]:
        request = sequence(sequence_id, prompt, list(first.token_ids))
        await self.d.send(
            decode=worker_pb2.DecodeRequest(sequence=request, progress=first.progress)
        )
        return [output async for output in self.d.outputs(sequence_id)]


def sequence(
    sequence_id: str, prompt: list[int], emitted: list[int] | None = None
) -> worker_pb2.SequenceRequest:
    ids = prompt + (emitted or [])
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=1)
    return worker_pb2.SequenceRequest(
        sequence_id=sequence_id,
        token_ids=ids,
        block_hashes=HASHER.chain(ids, ROOT),
        root_hash=ROOT,
        sampling=sampling_to_pb(sampling),
        prompt_tokens=len(prompt),
    )


async def settled(*workers: WorkerServer) -> None:
    """Returns once nothing is held; fails when that takes too long or a block is unaccounted."""
    for worker in workers:
        async with asyncio.timeout(5):
            while (status := await worker.status(check_integrity=True)).used_blocks:
                assert status.integrity_error == ""
                await asyncio.sleep(0.01)
        assert (status.integrity_error, list(status.leases)) == ("", [])


@contextlib.asynccontextmanager
async def connected(prefill: WorkerConfig, decode: WorkerConfig) -> AsyncIterator[Pair]:
    """Both workers, which know each other, with a gateway's streams to them."""
    workers = prefill_worker.create(prefill), decode_worker.create(decode)
    streams: tuple[Gateway, ...] = ()
    try:
        await workers[1].update_peers([await worker.start() for worker in workers])
        made = Pair(*workers)
        streams = made.p, made.d
        for stream in streams:
            await stream.connect()
        yield made
    finally:
        for stream in streams:
            await stream.close()
        for worker in workers:
            await worker.stop()
