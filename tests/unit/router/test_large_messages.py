"""Large gRPC messages are parsed beside the loop, and their parts bounded there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from gateway_rig import PROMPT, Rig, ask, refusal
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from crossdock.proto.errors import InvalidRequest, Overloaded
from crossdock.proto.v1 import inference_pb2 as pb
from crossdock.router.frontdoor import grpc_calls, large_messages
from crossdock.router.frontdoor.http2 import bounds
from crossdock.router.frontdoor.large_messages import KINDS, condensed
from crossdock.router.frontdoor.shares import Shares

GENERATE = "/crossdock.v1.Inference/GenerateUnary"
AGAIN = b"\x2a\x02\x0a\x00"  # a chat of an empty message; said again it is merged with the first
UNKNOWN = b"\xf8\x07\x01"


def lists(message: Message, path: str = "") -> Iterator[tuple[str, FieldDescriptor]]:
    """All repeated fields in a message, by their paths from it."""
    for field in message.DESCRIPTOR.fields:
        where, inner = f"{path}.{field.name}", field.message_type
        if field.is_repeated:
            yield where, field
        if inner is not None and not inner.GetOptions().map_entry:
            value = getattr(message, field.name)
            yield from lists(value.add() if field.is_repeated else value, where)


def of_many(kind: Any, path: str, field: FieldDescriptor, count: int) -> bytes:
    """A message with one list of so many elements."""
    message = owner = kind()
    *outer, _ = path.removeprefix(".").split(".")
    for name in outer:
        value = getattr(owner, name)
        owner = value.add() if hasattr(value, "add") else value
    made = getattr(owner, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        text = field.message_type.fields_by_name["key"].cpp_type == FieldDescriptor.CPPTYPE_STRING
        for i in range(count):
            made[str(i) if text else i]  # which makes it
    elif field.message_type is not None:
        for _ in range(count):
            made.add()
    elif field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        made.extend([b"" if field.type == FieldDescriptor.TYPE_BYTES else ""] * count)
    else:
        made.extend([1] * count)
    return message.SerializeToString()


LISTS = [(kind, *found) for kind in KINDS.values() for found in lists(kind())]


@pytest.mark.parametrize(
    ("kind", "path", "field"), LISTS, ids=[f"{k.__name__}{path}" for k, path, _ in LISTS]
)
def test_every_list_is_bounded(
    kind: Any, path: str, field: FieldDescriptor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_messages, "MAX_VALUES", 40)
    monkeypatch.setattr(large_messages, "MAX_NUMBERS", 40)
    outer = path.count(".") - 1  # elements that hold it, at the most
    condensed(of_many(kind, path, field, 40 - outer), kind)
    with pytest.raises(InvalidRequest, match=r"message: '\d+ \w+ and more' is not allowed"):
        condensed(of_many(kind, path, field, 41), kind)


def test_what_is_condensed_says_the_same_in_as_many_parts_as_it_has() -> None:
    plain = ask(PROMPT, max_tokens=5, logit_bias={3: 1.0}).SerializeToString()
    assert pb.GenerateRequest.FromString(condensed(plain, pb.GenerateRequest)) == ask(
        PROMPT, max_tokens=5, logit_bias={3: 1.0}
    )
    assert condensed(AGAIN * 9 + UNKNOWN * 9, pb.GenerateRequest) == b"\x2a\x12" + b"\x0a\x00" * 9
    instead = (AGAIN + b"\x22\x00") * 99_999  # token_ids in its place, and again a chat
    assert condensed(instead + AGAIN, pb.GenerateRequest) == AGAIN
    biases = b"\x32\x02\x42\x00" * 99_999  # of one token
    assert len(condensed(biases, pb.GenerateRequest)) < 20


async def test_a_large_message_says_what_a_small_one_does(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the loop, and through the process."""
    stub = service_pb2_grpc.GRPCInferenceServiceStub(rig.channel)
    kserve = service_pb2.ModelInferRequest(id="mine")
    kserve.inputs.add(name="input_ids", datatype="INT32", shape=[40])
    kserve.inputs[0].contents.int_contents.extend(PROMPT)
    wrong = service_pb2.ModelInferRequest(id="wrong", inputs=[{"name": "x", "datatype": "y"}])
    said = list[Any]()
    join, parties = rig.only.aside._turns.join, list[str]()
    monkeypatch.setattr(rig.only.aside._turns, "join", lambda p: parties.append(p) or join(p))
    for limit in (10**9, 1):
        monkeypatch.setattr(grpc_calls, "INLINE_BYTES", limit)
        unary = await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=5))
        refused = await refusal(rig, ask(PROMPT, top_p=7.0))
        with pytest.raises(grpc.aio.AioRpcError) as broken:
            await rig.channel.unary_unary(GENERATE)(b"\x1a\x03a\xff\xfe")
        inferred = await stub.ModelInfer(kserve)
        streamed = [each async for each in stub.ModelStreamInfer(iter((kserve,)))]
        failed = [each async for each in stub.ModelStreamInfer(iter((wrong,)))]
        said.append((
            unary.completions[0].token_ids, refused.details(), broken.value.details(),
            inferred.outputs, [each.infer_response.outputs for each in streamed],
            failed[0].error_message, failed[0].infer_response.id,
        ))  # fmt: skip
    assert said[0] == said[1]
    assert said[0][-1] == "wrong"
    assert len(parties) == 7 and set(parties) == {"address 127.0.0.1"}


async def test_methods_that_need_no_large_message_take_none(rig: Rig) -> None:
    """Health needs no credential either."""
    health = health_pb2_grpc.HealthStub(rig.channel)
    for size, code in ((bounds.MESSAGE_BYTES - 9, "NOT_FOUND"), (10**5, "RESOURCE_EXHAUSTED")):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await health.Check(health_pb2.HealthCheckRequest(service="x" * size))
        assert refused.value.code().name == code


def test_a_party_has_its_share_of_the_room() -> None:
    room = Shares(100)
    with room.taken("flood", 150), pytest.raises(Overloaded, match="150 bytes of this client's"):
        room.taken("flood", 1).__enter__()
    with room.taken("flood", 60), room.taken("flood", 40), room.taken("little", 30):
        with room.taken("little", 20), pytest.raises(Overloaded):
            room.taken("little", 1).__enter__()
        with pytest.raises(Overloaded):
            room.taken("flood", 1).__enter__()
    with room.taken("flood", 60), room.taken("flood", 40):
        pass
    assert not room._held


async def test_what_waits_for_the_process_is_bounded(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = rig.only.aside
    monkeypatch.setattr(aside, "_asked", Shares(1000))
    async with aside._turns.turn("other"):
        data = ask(PROMPT).SerializeToString() + UNKNOWN * 200
        read = [aside.read_message("a", data, pb.GenerateRequest) for _ in range(2)]
        first, second = map(asyncio.create_task, read)
        with pytest.raises(Overloaded):
            await second
        assert not first.done()
    assert await first == ask(PROMPT)
