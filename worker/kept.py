"""What gateways keep on a worker, as they ask for it; a worker that drains hands it to others."""

from __future__ import annotations

import asyncio
import enum
import logging
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import grpc

from crossdock.proto.channels import Channels
from crossdock.proto.identity import Credentials
from crossdock.proto.types import WorkerEndpoint
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.proto.v1 import worker_pb2_grpc
from crossdock.worker.states import Bounds, Held, States

log = logging.getLogger(__name__)

AT_ONCE = 8  # entries on their way to others
CALL_TIMEOUT_S = 3.0
MAX_MESSAGE_BYTES = 64 << 20


class _Took(enum.Enum):
    """What became of an entry that was offered to another worker."""

    TAKEN = "taken"
    HERE_NOT = "not here"  # that one has it already, or does not answer
    DRAINS = "drains"  # that one takes nothing more
    NOWHERE = "nowhere"  # nobody takes it


class KeptStates:
    """The calls StoreState, FetchState and DropState, and the way of `states` to other workers."""

    def __init__(self, states: States, credentials: Credentials | None = None) -> None:
        self.states, self._credentials = states, credentials
        self._draining = False

    def store(self, request: pb.StoreStateRequest) -> pb.StoreStateResponse:
        """Nothing more is taken by one that drains."""
        tenant, id_ = request.tenant, request.id
        if self._draining:
            return pb.StoreStateResponse(draining=True)
        if request.handed_over and self.states.fetch(tenant, id_) is not None:
            return pb.StoreStateResponse()
        stored = self.states.store(tenant, id_, request.data, _bounds(request))
        return pb.StoreStateResponse(stored=stored, nowhere=not stored)

    def fetch(self, request: pb.FetchStateRequest) -> pb.FetchStateResponse:
        """What is here, or that it was dropped."""
        tenant, id_ = request.tenant, request.id
        data, dropped = self.states.fetch(tenant, id_), self.states.dropped(tenant, id_)
        return pb.FetchStateResponse(data=data, dropped=dropped)

    def drop(self, request: pb.DropStateRequest) -> pb.DropStateResponse:
        """Forgets it, and remembers that."""
        dropped = self.states.drop(request.tenant, request.id, _bounds(request))
        return pb.DropStateResponse(dropped=dropped, draining=self._draining)

    async def hand_over(self, others: Sequence[WorkerEndpoint]) -> None:
        """Gives each of `others` a part, two copies of one entry never to the same, and takes
        nothing more. What nobody takes stays here."""
        self._draining = True
        left, refused, draining = iter(self.states.all()), Counter[str](), set[str]()
        if not others:
            return
        channels = Channels(
            self._credentials,
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        )

        async def work() -> None:
            for held in left:
                shuffled = random.sample(others, len(others))
                for other in sorted(shuffled, key=lambda each: refused[each.name]):
                    if other.name in draining:
                        continue
                    channel = channels.get(other.address, other.incarnation)
                    took = await _offered(worker_pb2_grpc.WorkerStub(channel), held)
                    if took in (_Took.TAKEN, _Took.NOWHERE):
                        break
                    refused[other.name] += 1  # those that are gone are asked last
                    if took is _Took.DRAINS:
                        draining.add(other.name)

        try:
            await asyncio.gather(*(work() for _ in range(AT_ONCE)))
        finally:
            await channels.keep(())


async def _offered(worker: worker_pb2_grpc.WorkerStub, held: Held) -> _Took:
    about: dict[str, Any] = {
        "tenant": held.tenant,
        "id": held.id_,
        "ttl_ms": int(1000 * held.bounds.ttl_s),
        "most_tenant_bytes": held.bounds.most_tenant_bytes,
        "most_bytes": held.bounds.most_bytes,
    }
    try:
        if held.data is None:
            dropped = pb.DropStateRequest(**about)
            marked = await worker.DropState(dropped, timeout=CALL_TIMEOUT_S)
            return _Took.DRAINS if marked.draining else _Took.TAKEN
        request = pb.StoreStateRequest(data=held.data, handed_over=True, **about)
        answer = await worker.StoreState(request, timeout=CALL_TIMEOUT_S)
        if answer.draining or answer.nowhere:
            return _Took.DRAINS if answer.draining else _Took.NOWHERE
        return _Took.TAKEN if answer.stored else _Took.HERE_NOT
    except grpc.aio.AioRpcError as error:
        log.info("a kept state was not handed over: %s", error.code().name)
    except Exception:  # the others are
        log.exception("a kept state was not handed over")
    return _Took.HERE_NOT


def _bounds(request: pb.StoreStateRequest | pb.DropStateRequest) -> Bounds:
    return Bounds(request.ttl_ms / 1000, request.most_tenant_bytes, request.most_bytes)
