"""Where responses are kept: on two workers each, so that they outlive the gateway that made them.

An id names its workers by the first digits of a hash of their incarnations, so that any gateway
asks those two and nobody else, whoever has joined since. What they hold is told apart by tenant.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import re
import secrets
from array import array
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import grpc
import msgspec

from crossdock.proto.channels import Channels
from crossdock.proto.errors import Unavailable
from crossdock.proto.identity import Credentials
from crossdock.proto.types import WorkerEndpoint
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.proto.v1 import worker_pb2_grpc
from crossdock.router.config import ResponsesSettings

log = logging.getLogger(__name__)

COPIES = 2
CALL_TIMEOUT_S = 3.0
MAX_MESSAGE_BYTES = 64 << 20  # as workers take them
_TAG = 6  # digits
_ID = re.compile(r"resp_[0-9a-f]{24}((?:[0-9a-f]{6})*)")


class Kept(msgspec.Struct, array_like=True):
    """A response with all that the next turn needs of it."""

    response: bytes  # as the client got it
    items: list[dict[str, Any]]  # of the whole conversation, the response's own at the end
    first: int  # of them, where this turn's input begins
    answered: int  # and where the response's output does
    token_ids: bytes  # prompt and answer, 4 bytes each
    context: bytes  # what else the prompt was rendered from, hashed

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer as they were computed."""
        return array("I", self.token_ids).tolist()


class ResponseStore:
    """`reached`: the workers that can be reached now; `members`: all that there are."""

    def __init__(
        self,
        reached: Callable[[], Sequence[WorkerEndpoint]],
        members: Callable[[], Sequence[WorkerEndpoint]],
        settings: ResponsesSettings,
        credentials: Credentials | None = None,
    ) -> None:
        self._reached, self._members, self._settings = reached, members, settings
        self._channels = Channels(
            credentials,
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        )

    def new_id(self) -> str:
        """Of a response that two of the workers will keep."""
        members = self._reached()
        chosen = random.sample(members, min(COPIES, len(members)))
        return "resp_" + secrets.token_hex(12) + "".join(map(_tag, chosen))

    async def put(self, tenant: str, id_: str, kept: Kept) -> bool:
        """Whether at least one worker keeps it now."""
        settings = self._settings
        request = pb.StoreStateRequest(
            tenant=tenant,
            id=id_,
            data=msgspec.msgpack.encode(kept),
            ttl_ms=int(1000 * settings.ttl_s),
            most_tenant_bytes=int(1_000_000 * settings.max_tenant_mb),
            most_bytes=int(1_000_000 * settings.max_mb),
        )
        if request.ByteSize() > MAX_MESSAGE_BYTES:
            return False
        answers = await self._ask(id_, "StoreState", request)
        return any(answer is not None and answer.stored for answer in answers)

    async def get(self, tenant: str, id_: str) -> Kept | None:
        """None: nobody has it, or not any more. Raises Unavailable where one who may have it did
        not answer."""
        if not _ID.fullmatch(id_):
            return None
        answers = await self._ask(id_, "FetchState", pb.FetchStateRequest(tenant=tenant, id=id_))
        for answer in answers:
            if answer is not None and answer.HasField("data"):
                return msgspec.msgpack.decode(answer.data, type=Kept)
        _check_answered(answers)
        return None

    async def drop(self, tenant: str, id_: str) -> bool:
        """Whether it was there. Raises Unavailable, as `get` does."""
        if not _ID.fullmatch(id_):
            return False
        answers = await self._ask(id_, "DropState", pb.DropStateRequest(tenant=tenant, id=id_))
        _check_answered(answers)
        return any(answer.dropped for answer in answers)

    async def close(self) -> None:
        """Ends the connections to the workers."""
        await self._channels.keep(())

    async def _ask(self, id_: str, call: str, request: Any) -> list[Any]:
        """What the workers that the id names answer; None of one that does not."""
        found = _ID.fullmatch(id_)
        tags = {found[1][at : at + _TAG] for at in range(0, len(found[1]), _TAG)} if found else ()
        members = self._members()
        self._channels.retire(member.address for member in members)
        named = [member for member in members if _tag(member) in tags]

        async def ask(member: WorkerEndpoint) -> Any:
            channel = self._channels.get(member.address, member.incarnation)
            stub = worker_pb2_grpc.WorkerStub(channel)
            try:
                return await getattr(stub, call)(request, timeout=CALL_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                log.warning("%s at %s: %s", call, member.name, error.code().name)
                return None

        asked: list[Coroutine[Any, Any, Any]] = [ask(member) for member in named]
        return await asyncio.gather(*asked)


def _tag(member: WorkerEndpoint) -> str:
    return hashlib.sha256(member.incarnation.encode()).hexdigest()[:_TAG]


def _check_answered(answers: Sequence[Any]) -> None:
    if None in answers:
        raise Unavailable("a worker that may keep this response does not answer; try again")
