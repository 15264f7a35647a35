"""What a worker tells those who connect to it."""

from __future__ import annotations

import os

from crossdock.engine.contract import Engine
from crossdock.kvtransfer.layout import layout_hash
from crossdock.kvtransfer.transport import Transport
from crossdock.proto.convert import ROLE_TO_PB
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.worker.config import WorkerConfig


def describe(
    config: WorkerConfig, engine: Engine, transport: Transport, incarnation: bytes, address: str
) -> pb.WorkerDescription:
    """Of this process, for its peers: with `transport_info`, the key to its pool's memory."""
    facts, layout, memory = engine.facts, engine.layout, engine.memory
    return pb.WorkerDescription(
        name=config.name,
        pool=config.pool,
        role=ROLE_TO_PB[config.role],
        incarnation=incarnation,
        layout=layout,
        layout_hash=layout_hash(layout),
        model_id=facts.model_id,
        context_length=min(facts.context_length, memory.num_blocks * config.block_size),
        num_blocks=memory.num_blocks,
        block_bytes=memory.block_bytes,
        transport=config.transport,
        transport_info=transport.info(),
        address=address,
        pid=os.getpid(),
        node_id=config.node_id,
        revision=config.revision,
        max_batch=config.max_batch,
        chunk_tokens=config.chunk_tokens,
        gpus=config.gpus,
    )


def public(description: pb.WorkerDescription) -> pb.WorkerDescription:
    """The same without that key, which is for those who read the pool."""
    told = pb.WorkerDescription()
    told.CopyFrom(description)
    told.ClearField("transport_info")
    return told
