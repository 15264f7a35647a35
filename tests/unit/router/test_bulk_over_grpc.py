"""What messages of gRPC's clients hold in bulk is refused before it is made objects of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from access_kit import generate, start_doors
from gateway_rig import Rig, ask, refusal

from crossdock.proto.errors import MOST_FIELD, MOST_LIMIT, InvalidRequest
from crossdock.proto.v1 import inference_pb2 as pb
from crossdock.proto.v1 import kserve_pb2
from crossdock.router.frontdoor.kserve_format import MAX_PARAMETERS, MAX_SAMPLING_MARKS, Ask
from crossdock.router.frontdoor.kserve_tensors import MAX_DIMENSIONS, MAX_INPUTS, MAX_TYPED
from crossdock.router.frontdoor.tools.conversation import Conversation
from crossdock.router.frontdoor.tools.grpc_chat import conversation_of_pb, offer_of_pb
from crossdock.router.frontdoor.tools.offer import MAX_TOOLS, Offer
from crossdock.router.frontdoor.validate import MAX_MESSAGES, MAX_PROMPTS


def infer(
    name: str = "input_ids", datatype: str = "INT32", shape: tuple[int, ...] = (1,), **contents: Any
) -> kserve_pb2.ModelInferRequest:
    request = kserve_pb2.ModelInferRequest()
    tensor = request.inputs.add(name=name, datatype=datatype, shape=shape)
    for field, values in contents.items():
        getattr(tensor.contents, field).extend(values)
    return request


def raw(data: bytes, *about: Any) -> kserve_pb2.ModelInferRequest:
    request = infer(*about)
    request.raw_input_contents.append(data)
    return request


def with_sampling(text: bytes) -> kserve_pb2.ModelInferRequest:
    request = infer("text_input", "BYTES", (1,), bytes_contents=[b"x"])
    given = request.inputs.add(name="sampling_parameters", datatype="BYTES", shape=(1,))
    given.contents.bytes_contents.append(text)
    return request


def many(field: str, count: int, **entry: Any) -> kserve_pb2.ModelInferRequest:
    request = infer(int_contents=[7])
    for _ in range(count):
        getattr(request, field).add(**entry)
    return request


def with_parameters(count: int) -> kserve_pb2.ModelInferRequest:
    request = infer(int_contents=[7])
    for i in range(count):
        request.parameters[f"p{i}"].int64_param = 1
    return request


@pytest.mark.parametrize(("request_", "field", "said"), [
    (infer(shape=(100_000, 0)), "input_ids", "100000 prompts"),  # which costs a few bytes
    (raw(b"\0\0\0\0" * 65, "input_ids", "INT32", (65, 1)), "input_ids", "65 prompts"),
    (infer(shape=(2,) * 9), "input_ids.shape", f"at most {MAX_DIMENSIONS}"),
    (infer("text_input", "BYTES", (65,), bytes_contents=[b"x"] * 65), "text_input", "65 elements"),
    (raw(b"\0\0\0\0" * 65, "text_input", "BYTES", (65,)), "text_input", f"at most {MAX_PROMPTS}"),
    (infer(shape=(MAX_TYPED + 1,), int_contents=[1] * (MAX_TYPED + 1)), "input_ids",
     f"at most {MAX_TYPED}, or raw_input_contents"),
    (many("inputs", MAX_INPUTS, name="x", datatype="BYTES", shape=(0,)), "inputs", "17 inputs"),
    (many("outputs", 2, name="output_ids"), "outputs", "is there twice"),
    (with_parameters(MAX_PARAMETERS + 1), "parameters", f"at most {MAX_PARAMETERS}"),
    (with_sampling(b'{"stop":[%b1]}' % (b"1," * MAX_SAMPLING_MARKS)), "sampling_parameters",
     f"at most {MAX_SAMPLING_MARKS} of"),
])  # fmt: skip
def test_tensors(request_: kserve_pb2.ModelInferRequest, field: str, said: str) -> None:
    with pytest.raises(InvalidRequest) as found:
        Ask.read(request_)
    assert found.value.field == field and said in str(found.value)


def test_raw_ids_are_not_made_objects_of() -> None:
    ids = np.arange(6, dtype="<i4")
    asked = Ask.read(raw(ids.tobytes(), "input_ids", "INT32", (2, 3)))
    assert all(isinstance(prompt, np.ndarray) for prompt in asked.prompts)
    assert [list(prompt) for prompt in asked.prompts] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(("chat", "said"), [
    (pb.Chat(messages=[pb.ChatMessage()] * (MAX_MESSAGES + 1)), f"{MAX_MESSAGES + 1} messages"),
    (pb.Chat(messages=[pb.ChatMessage(tool_calls=[pb.ToolCall()] * (MAX_MESSAGES + 1))]),
     f"{MAX_MESSAGES + 1} tool calls"),
    (pb.Chat(tools=[pb.Tool()] * (MAX_TOOLS + 1)), f"{MAX_TOOLS + 1} tools"),
])  # fmt: skip
def test_chats(chat: pb.Chat, said: str) -> None:
    def read() -> Conversation:
        return conversation_of_pb(chat, offer_of_pb(chat) if chat.tools else Offer())

    with pytest.raises(InvalidRequest, match=said):
        read()


async def test_ids_that_no_model_takes_are_counted_alone(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []
    kind = type(rig.only.frontend.validator)
    monkeypatch.setattr(kind, "check_prompt", lambda _, field, ids: checked.append(len(ids)))
    error = await refusal(rig, ask([7] * 99_999))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and "99999 tokens" in error.details()
    assert not checked


async def test_an_error_quotes_little_of_what_was_sent(tiny_model: Path, tmp_path: Path) -> None:
    error = InvalidRequest("f" * 5000, 1, "x" * 5000)
    assert len(error.field) <= MOST_FIELD + 1 and len(error.limit) <= MOST_LIMIT + 1
    async with start_doors(tiny_model, tmp_path) as doors:
        key = doors.key("acme")
        await doors.known(key)
        refused, trailers = await generate(doors.rig, key, tenant="t" * 100_000)
    assert refused.code() is grpc.StatusCode.PERMISSION_DENIED
    assert trailers["error-type"] == "Forbidden" and len(refused.details()) < 300
