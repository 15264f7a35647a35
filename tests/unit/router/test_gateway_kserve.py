"""The Open Inference Protocol, asked by tritonclient over real gRPC, before fake workers."""

from __future__ import annotations

import asyncio
import json
import math
import queue
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as blocking
import tritonclient.grpc.aio as triton
from gateway_rig import PROMPT, Rig, until
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from crossdock.proto.v1 import kserve_pb2


@pytest.fixture
async def client(rig: Rig) -> AsyncIterator[Any]:
    async with triton.InferenceServerClient(rig.gateway.grpc_address) as made:
        yield made


def tensor(name: str, datatype: str, values: np.ndarray) -> Any:
    made = triton.InferInput(name, list(values.shape), datatype)
    return made.set_data_from_numpy(values)


def text_input(*texts: str) -> Any:
    return tensor("text_input", "BYTES", np.array([t.encode() for t in texts], dtype=np.object_))


def ids_input(*ids: int) -> Any:
    return tensor("input_ids", "INT32", np.array(ids, dtype=np.int32))


def sampling(**fields: Any) -> Any:
    text = json.dumps(fields).encode()
    return tensor("sampling_parameters", "BYTES", np.array([text], dtype=np.object_))


def outputs(*names: str) -> list[Any]:
    return [triton.InferRequestedOutput(name) for name in names]


async def refused(call: Any) -> InferenceServerException:
    with pytest.raises(InferenceServerException) as error:
        await call
    return error.value


# -- what is here ------------------------------------------------------------------------------


async def test_live_ready_and_metadata(rig: Rig, client: Any, model: str) -> None:
    assert await client.is_server_live() and await client.is_server_ready()
    assert await client.is_model_ready(model)
    server = await client.get_server_metadata()
    assert server.name == "crossdock" and server.version
    metadata = await client.get_model_metadata(model, as_json=True)
    assert {"text_input", "input_ids"} <= {each["name"] for each in metadata["inputs"]}
    assert "text_output" in {each["name"] for each in metadata["outputs"]}
    config = (await client.get_model_config(model)).config
    assert config.model_transaction_policy.decoupled and config.max_batch_size == 0
    index = await client.get_model_repository_index()
    assert [(each.name, each.state) for each in index.models] == [(model, "READY")]
    await rig.members(rig.prefills[0])  # the decode worker leaves
    assert not await client.is_server_ready() and not await client.is_model_ready(model)
    index = await client.get_model_repository_index()
    assert index.models[0].state == "UNAVAILABLE"


async def test_what_is_not_here_is_named(client: Any, model: str) -> None:
    error = await refused(client.get_model_metadata("nobody"))
    assert error.status() == "StatusCode.NOT_FOUND" and "nobody" in error.message()
    error = await refused(client.infer(model, [text_input("a")], model_version="7"))
    assert "model_version" in error.message()
    assert (await refused(client.get_inference_statistics())).status() == (
        "StatusCode.UNIMPLEMENTED"
    )


# -- one answer --------------------------------------------------------------------------------


async def test_ids_in_and_out(rig: Rig, client: Any, model: str) -> None:
    given = [ids_input(*PROMPT), sampling(max_tokens=5, ignore_eos=True)]
    wanted = outputs("output_ids", "finish_reason", "num_input_tokens", "num_output_tokens")
    answer = await client.infer(model, given, request_id="mine", outputs=wanted)
    assert answer.get_response().id == "mine"
    assert answer.as_numpy("output_ids").tolist() == PROMPT[:5]
    assert answer.as_numpy("finish_reason").tolist() == [b"length"]
    assert answer.as_numpy("num_input_tokens").tolist() == [len(PROMPT)]
    assert answer.as_numpy("num_output_tokens").tolist() == [5]
    await until(lambda: rig.idle)


async def test_texts_in_and_out(client: Any, model: str, text: Any) -> None:
    given = [text_input("hello world", "one two"), sampling(max_tokens=3, ignore_eos=True)]
    answer = await client.infer(model, given, parameters={"temperature": 0.5})
    expected = [text.decode(text.encode(t)[:3]) for t in ("hello world", "one two")]
    found = [value.decode() for value in answer.as_numpy("text_output")]
    assert len(found) == 2 and all(found)
    assert [f[:2] for f in found] == [e[:2] for e in expected]


async def test_a_form_of_the_answer(rig: Rig, client: Any, model: str) -> None:
    given = [text_input("hello"), sampling(max_tokens=2, guided_choice=["a", "b"])]
    await client.infer(model, given)
    assert rig.prefills[0].prefills[-1].sequence.sampling.grammar.text == '["a", "b"]'
    error = await refused(client.infer(model, given[:1], parameters={"guided_regex": "(a"}))
    assert error.status() == "StatusCode.INVALID_ARGUMENT" and "guided_regex" in error.message()


async def test_the_prompt_before_its_answer(client: Any, model: str) -> None:
    whole = tensor("exclude_input_in_output", "BOOL", np.array([False]))
    parameters = sampling(max_tokens=2, seed=3)
    (alone,) = (await client.infer(model, [text_input("hello"), parameters])).as_numpy(
        "text_output"
    )
    answer = await client.infer(model, [text_input("hello"), parameters, whole])
    assert answer.as_numpy("text_output").tolist() == [b"hello" + alone]


async def test_typed_contents_are_answered_in_kind(rig: Rig, model: str) -> None:
    request = kserve_pb2.ModelInferRequest(model_name=model)
    request.parameters["max_tokens"].int64_param = 4
    request.inputs.add(name="input_ids", datatype="INT64", shape=[1, len(PROMPT)])
    request.inputs[0].contents.int64_contents.extend(PROMPT)
    call = rig.channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=kserve_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=service_pb2.ModelInferResponse.FromString,
    )
    answer = await call(request)
    assert list(answer.outputs[0].contents.int_contents) == PROMPT[:4]
    assert not answer.raw_output_contents


async def test_the_wire_is_the_protocol_s() -> None:
    """The same fields under the same numbers and types as the protocol's own messages."""

    def shape(message: Any) -> Any:
        return {
            f.name: (f.number, f.type, f.is_repeated, f.message_type and f.message_type.name)
            for f in message.fields
        }

    for name, ours in kserve_pb2.DESCRIPTOR.message_types_by_name.items():
        pool = service_pb2.DESCRIPTOR.pool
        theirs = pool.FindMessageTypeByName(f"inference.{name}")
        assert shape(ours).items() <= shape(theirs).items(), name
        for nested, mine in ours.nested_types_by_name.items():
            assert shape(mine) == shape(theirs.nested_types_by_name[nested]), nested


@pytest.mark.parametrize(
    ("inputs", "parameters", "named"),
    [
        ([], {}, "text_input"),
        ([text_input("a"), ids_input(1)], {}, "text_input"),
        ([text_input("")], {}, "text_input"),
        ([ids_input(10**6)], {}, "input_ids"),
        ([tensor("other", "INT32", np.zeros(1, np.int32))], {}, "other"),
        ([tensor("text_input", "INT32", np.zeros(1, np.int32))], {}, "text_input.datatype"),
        ([tensor("input_ids", "FP32", np.zeros(1, np.float32))], {}, "input_ids.datatype"),
        ([text_input("a"), sampling(temperature=-1)], {}, "temperature"),
        ([text_input("a"), sampling(temperature="hot")], {}, "temperature"),
        ([text_input("a"), sampling(temperature=math.nan)], {}, "temperature: NaN"),
        ([text_input("a"), sampling(top_p=math.inf)], {}, "top_p: Infinity"),
        ([text_input("a")], {"temperature": math.nan}, "temperature: NaN"),
        ([text_input("a"), sampling(colour="red")], {}, "colour"),
        ([text_input("a"), sampling(logprobs=2)], {}, "logprobs"),
        ([text_input("a"), sampling(n=0)], {}, "n: 0"),
        ([text_input("a"), sampling(seed=1)], {"seed": 2}, "seed"),
        ([text_input("a")], {"max_tokens": 10**9}, "max_tokens"),
        ([text_input("a"), tensor("stream", "BOOL", np.array([True]))], {}, "ModelStreamInfer"),
    ],
)
async def test_bad_input_is_refused_by_name(
    client: Any, model: str, inputs: list[Any], parameters: dict[str, Any], named: str
) -> None:
    error = await refused(client.infer(model, inputs, parameters=parameters))
    assert error.status() == "StatusCode.INVALID_ARGUMENT"
    assert named in error.message()


@pytest.mark.parametrize(
    ("shape", "raw", "named"),
    [
        ([2], [b"\x01\0\0\0a"], "shape"),
        ([1], [b"\x09\0\0\0a"], "text_input"),
        ([1], [b"\x01\0"], "text_input"),
        ([1], [b"\x01\0\0\0a", b""], "raw_input_contents"),
        ([-1], [b"\x01\0\0\0a"], "shape"),
        ([1], [b"\x01\0\0\0\xff"], "UTF-8"),
    ],
)
async def test_broken_tensors_are_refused_by_name(
    rig: Rig, model: str, shape: list[int], raw: list[bytes], named: str
) -> None:
    request = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=raw)
    request.inputs.add(name="text_input", datatype="BYTES", shape=shape)
    call = rig.channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=service_pb2.ModelInferRequest.SerializeToString,
    )
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call(request)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert named in str(error.value.details())


@pytest.mark.parametrize("of_streams", ["stream", "triton_enable_empty_final_response"])
async def test_what_is_for_streams_is_refused_elsewhere_before_anything_starts(
    rig: Rig, model: str, of_streams: str
) -> None:
    request = kserve_pb2.ModelInferRequest(model_name=model)
    given = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    given.contents.bytes_contents.append(b"hello")
    if of_streams == "stream":
        flag = request.inputs.add(name=of_streams, datatype="BOOL", shape=[1])
        flag.contents.bool_contents.append(True)
    else:
        request.parameters[of_streams].bool_param = True
    call = rig.channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=kserve_pb2.ModelInferRequest.SerializeToString,
    )
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call(request)
    said = str(error.value.details())
    assert f"{of_streams}: true" in said and "ModelStreamInfer" in said
    assert not any(worker.prefills or worker.decodes for worker in rig.workers)
    assert rig.metric("requests_total", outcome="invalid") == 1


# -- streams -----------------------------------------------------------------------------------


async def test_the_error_of_a_request_of_a_stream_is_its_last_response(
    rig: Rig, model: str
) -> None:
    call = rig.channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        request_serializer=kserve_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=kserve_pb2.ModelStreamInferResponse.FromString,
    )([kserve_pb2.ModelInferRequest(model_name=model, id="bad")])
    [answer] = [each async for each in call]
    assert "text_input" in answer.error_message and answer.infer_response.id == "bad"
    assert answer.infer_response.parameters["triton_final_response"].bool_param


async def replies(client: Any, *requests: dict[str, Any]) -> list[tuple[Any, Any]]:
    async def given() -> AsyncIterator[dict[str, Any]]:
        for request in requests:
            yield request

    return [answer async for answer in client.stream_infer(given())]


def final(result: Any) -> bool:
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


async def test_a_stream_of_several_requests(rig: Rig, client: Any, model: str) -> None:
    stream = tensor("stream", "BOOL", np.array([True]))
    common = {"model_name": model}
    ids = [ids_input(*PROMPT), stream, sampling(max_tokens=6, ignore_eos=True)]
    found = await replies(
        client,
        common | {"inputs": ids, "request_id": "a"},
        common | {"inputs": [text_input("hello")], "request_id": "b"},
        common | {"inputs": [sampling(max_tokens=1)], "request_id": "bad"},
    )
    errors = [str(error) for _, error in found if error is not None]
    assert len(errors) == 1 and "text_input" in errors[0]
    by_id: dict[str, list[Any]] = {}
    for result, error in found:
        if error is None:
            by_id.setdefault(result.get_response().id, []).append(result)
    assert set(by_id) == {"a", "b"}
    gained = [int(token) for result in by_id["a"] for token in result.as_numpy("output_ids")]
    assert gained == PROMPT[:6]
    assert [final(result) for result in by_id["a"]] == [False] * (len(by_id["a"]) - 1) + [True]
    assert len(by_id["b"]) == 1 and final(by_id["b"][0])
    await until(lambda: rig.idle)


async def test_an_empty_final_response_where_asked_for(rig: Rig, model: str) -> None:
    def ask() -> list[Any]:
        found: queue.Queue[Any] = queue.Queue()
        with blocking.InferenceServerClient(rig.gateway.grpc_address) as client:
            client.start_stream(lambda result, error: found.put(error or result))
            stream = blocking.InferInput("stream", [1], "BOOL")
            given = blocking.InferInput("text_input", [1], "BYTES")
            stream.set_data_from_numpy(np.array([True]))
            given.set_data_from_numpy(np.array([b"hello"], dtype=np.object_))
            client.async_stream_infer(model, [given, stream], enable_empty_final_response=True)
            results = [found.get(timeout=60)]
            while not final(results[-1]):
                results.append(found.get(timeout=60))
            client.stop_stream()
        return results

    *gained, last = await asyncio.to_thread(ask)
    assert gained and not any(final(result) for result in gained)
    assert not last.get_response().outputs


async def test_a_stream_that_is_left_frees_everything(rig: Rig, client: Any, model: str) -> None:
    rig.decodes[0].gate.clear()
    stream = tensor("stream", "BOOL", np.array([True]))

    async def given() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": model, "inputs": [ids_input(*PROMPT), stream]}
        await asyncio.Event().wait()

    answers = client.stream_infer(given())
    await anext(aiter(answers))
    await until(lambda: rig.decodes[0].running)
    answers.cancel()
    await until(lambda: rig.idle)
