"""Where responses are kept: on two workers each, so that they outlive the gateway that made them.

An id names its workers by the first digits of a hash of their incarnations, so that any gateway
asks those two, whoever has joined since. Where one of them does not have it all the others are
asked too: a worker that drains has handed what it kept to one of them, and each knows what was
deleted while one that kept it was away. What workers hold is told apart by tenant. An id also
proves that a gateway of this cluster made it for its tenant: of any other no worker is asked, and
none remembers that it was deleted.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import random
import re
import secrets
import time
from array import array
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, NamedTuple

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
LEAVING_MS = 60_000.0  # that one which is no member any more may still be handing over
MAX_MESSAGE_BYTES = 64 << 20  # as workers take them
_TAG, _PROOF = 6, 12  # digits
_ID = re.compile(r"resp_(([0-9a-f]{12})[0-9a-f]{16}((?:[0-9a-f]{6}){0,2}))([0-9a-f]{12})")


class Kept(msgspec.Struct, array_like=True):
    """A response with all that the next turn needs of it."""

    response: bytes  # as the client got it
    items: list[dict[str, Any]]  # of the whole conversation, the response's own at the end
    first: int  # of them, where this turn's input begins
    answered: int  # and where the response's output does
    token_ids: bytes  # prompt and answer, 4 bytes each
    context: bytes  # what else the prompt was rendered from, hashed
    answered_by: str = ""  # the decode worker

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer as they were computed."""
        return array("I", self.token_ids).tolist()


class _Asked(NamedTuple):
    """Of the workers, those that an id names, the rest, and those that it names and that have just
    left. `sure`: nobody else can say of the response what the two do not know."""

    named: list[WorkerEndpoint]
    rest: list[WorkerEndpoint]
    left: list[WorkerEndpoint]
    sure: bool


class ResponseStore:
    """`reached`: the workers that can be reached now. `key`: a secret that all gateways of the
    cluster have. `clock`: of the day, milliseconds."""

    def __init__(
        self,
        reached: Callable[[], Sequence[WorkerEndpoint]],
        settings: ResponsesSettings,
        key: bytes,
        credentials: Credentials | None = None,
        clock: Callable[[], float] = lambda: 1000 * time.time(),
    ) -> None:
        self._reached, self._settings, self._clock = reached, settings, clock
        self._key = hmac.digest(key, b"crossdock.responses.v1", "sha256")
        self._members: dict[str, tuple[WorkerEndpoint, float]] = {}  # by incarnation, since when
        self._left: dict[str, tuple[WorkerEndpoint, float]] = {}  # who was one, until when asked
        self._channels = Channels(
            credentials,
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        )

    def update(self, members: Iterable[WorkerEndpoint]) -> None:
        """The cluster's workers from now on."""
        before, now = self._members, self._clock()
        left = {inc: (each, now + LEAVING_MS) for inc, (each, _) in before.items()}
        self._left = {inc: kept for inc, kept in (left | self._left).items() if kept[1] > now}
        self._members = {
            each.incarnation: (each, before.get(each.incarnation, (each, now))[1])
            for each in members
        }
        for incarnation in self._members:
            self._left.pop(incarnation, None)
        known = (*self._members.values(), *self._left.values())
        self._channels.retire(each.address for each, _ in known)

    def new_id(self, tenant: str) -> str:
        """Of a response of this tenant that two of the workers will keep."""
        members = self._reached()
        chosen = random.sample(members, min(COPIES, len(members)))
        made = f"{int(self._clock()):012x}{secrets.token_hex(8)}" + "".join(map(_tag, chosen))
        return f"resp_{made}{self._proof(tenant, made)}"

    async def put(self, tenant: str, id_: str, kept: Kept) -> bool:
        """Whether at least one worker keeps it now: others where those that the id names are
        gone."""
        data = msgspec.msgpack.encode(kept)
        request = pb.StoreStateRequest(tenant=tenant, id=id_, data=data, **self._bounds)
        if request.ByteSize() > MAX_MESSAGE_BYTES:
            return False
        asked = self._asked(tenant, id_)
        if asked is None:
            return False
        others = random.sample(asked.rest, min(len(asked.rest), COPIES - len(asked.named)))
        answers = await self._ask(asked.named + others, "StoreState", request)
        return any(answer is not None and answer.stored for answer in answers)

    async def get(self, tenant: str, id_: str) -> Kept | None:
        """None: nobody has it, or not any more. Raises Unavailable where one who may have it did
        not answer."""
        asked = self._asked(tenant, id_)
        if asked is None:
            return None
        request = pb.FetchStateRequest(tenant=tenant, id=id_)
        answers = await self._ask(asked.named, "FetchState", request)
        if any(answer and answer.dropped for answer in answers):
            return None
        if not asked.sure or not all(answer and answer.HasField("data") for answer in answers):
            answers += await self._ask(asked.rest, "FetchState", request)
        if any(answer and answer.dropped for answer in answers):
            return None
        if not any(answer and answer.HasField("data") for answer in answers):
            answers += await self._ask(asked.left, "FetchState", request)
        for answer in answers:
            if answer and answer.HasField("data"):
                return msgspec.msgpack.decode(answer.data, type=Kept)
        _check_answered(answers)
        return None

    async def drop(self, tenant: str, id_: str) -> bool:
        """Whether it was there. A copy that nobody can be asked for now is not good any more when
        it comes back. Raises Unavailable, as `get` does."""
        asked = self._asked(tenant, id_)
        if asked is None:
            return False
        request = pb.DropStateRequest(tenant=tenant, id=id_, **self._bounds)
        answers = await self._ask(asked.named, "DropState", request)
        if not asked.sure or not all(a and a.dropped and not a.draining for a in answers):
            answers += await self._ask(asked.rest, "DropState", request)
        _check_answered(answers)
        return any(answer.dropped for answer in answers)

    async def close(self) -> None:
        """Ends the connections to the workers."""
        await self._channels.keep(())

    @property
    def _bounds(self) -> dict[str, Any]:
        settings = self._settings
        return {
            "ttl_ms": int(1000 * settings.ttl_s),
            "most_tenant_bytes": int(1_000_000 * settings.max_tenant_mb),
            "most_bytes": int(1_000_000 * settings.max_mb),
        }

    def _proof(self, tenant: str, made: str) -> str:
        """The end of an id, of the rest of it."""
        told = hmac.digest(self._key, f"{made}{tenant}".encode(), "sha256")
        return told.hex()[:_PROOF]

    def _asked(self, tenant: str, id_: str) -> _Asked | None:
        """None where no gateway made this id for this tenant. A worker that was away since may have
        missed that the response was deleted."""
        found = _ID.fullmatch(id_)
        if found is None or not hmac.compare_digest(found[4], self._proof(tenant, found[1])):
            return None
        made, tags = int(found[2], 16), re.findall(f"[0-9a-f]{{{_TAG}}}", found[3])
        now = self._clock()
        left = [each for each, until in self._left.values() if until > now and _tag(each) in tags]
        asked = _Asked([], [], left, False)
        stayed = 0
        for member, since in self._members.values():
            is_named = _tag(member) in tags
            (asked.named if is_named else asked.rest).append(member)
            stayed += is_named and since <= made
        return asked._replace(sure=stayed == COPIES)

    async def _ask(self, members: Iterable[WorkerEndpoint], call: str, request: Any) -> list[Any]:
        """What these answer; None of one that does not."""

        async def ask(member: WorkerEndpoint) -> Any:
            channel = self._channels.get(member.address, member.incarnation)
            stub = worker_pb2_grpc.WorkerStub(channel)
            try:
                return await getattr(stub, call)(request, timeout=CALL_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                log.warning("%s at %s: %s", call, member.name, error.code().name)
                return None

        asked: list[Coroutine[Any, Any, Any]] = [ask(member) for member in members]
        return await asyncio.gather(*asked)


def _tag(member: WorkerEndpoint) -> str:
    return hashlib.sha256(member.incarnation.encode()).hexdigest()[:_TAG]


def _check_answered(answers: Sequence[Any]) -> None:
    if None in answers:
        raise Unavailable("a worker that may keep this response does not answer; try again")
