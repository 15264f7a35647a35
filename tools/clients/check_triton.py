"""tritonclient over gRPC with TLS and a key: the Open Inference Protocol."""

from __future__ import annotations

import queue
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from checking import API_KEY, CA, GRPC, MODEL, check, raises, run
from tritonclient.utils import InferenceServerException

HEADERS = {"authorization": f"Bearer {API_KEY}"}
client = triton.InferenceServerClient(GRPC, ssl=bool(CA), root_certificates=CA or None)


def text(*prompts: str) -> triton.InferInput:
    tensor = triton.InferInput("text_input", [len(prompts)], "BYTES")
    tensor.set_data_from_numpy(np.array([each.encode() for each in prompts], dtype=np.object_))
    return tensor


@check
def health() -> None:
    """live, ready, metadata"""
    assert client.is_server_live(headers=HEADERS) and client.is_server_ready(headers=HEADERS)
    assert client.is_model_ready(MODEL, headers=HEADERS)
    assert client.get_server_metadata(headers=HEADERS).name
    assert client.get_model_metadata(MODEL, headers=HEADERS).name == MODEL
    assert client.get_model_config(MODEL, headers=HEADERS).config.name == MODEL
    assert client.get_model_repository_index(headers=HEADERS).models[0].name == MODEL


@check
def infer() -> None:
    """infer with texts and with ids"""
    asked: dict[str, Any] = {"parameters": {"max_tokens": 8, "temperature": 0}, "headers": HEADERS}
    answer = client.infer(MODEL, [text("The capital of France is", "One, two,")], **asked)
    texts = answer.as_numpy("text_output")
    assert len(texts) == 2 and b"Paris" in texts[0]
    ids = triton.InferInput("input_ids", [3], "INT32")
    ids.set_data_from_numpy(np.array([504, 3575, 282], dtype=np.int32))
    assert client.infer(MODEL, [ids], **asked).as_numpy("output_ids").shape == (8,)


@check
def stream() -> None:
    """a stream"""
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)), headers=HEADERS)
    streaming = triton.InferInput("stream", [1], "BOOL")
    streaming.set_data_from_numpy(np.array([True]))
    client.async_stream_infer(
        MODEL,
        [text("The capital of France is"), streaming],
        parameters={"max_tokens": 8, "temperature": 0},
    )
    pieces = []
    while True:
        result, error = answers.get(timeout=120)
        assert error is None, error
        pieces.append(result.as_numpy("text_output")[0])
        if result.get_response().parameters["triton_final_response"].bool_param:
            break
    client.stop_stream()
    assert len(pieces) > 1 and b"Paris" in b"".join(pieces)


@check
def errors() -> None:
    """errors by status"""
    prompt = [text("Hello")]
    for code, model, headers, parameters in (
        ("NOT_FOUND", "no", HEADERS, {}),
        ("INVALID_ARGUMENT", MODEL, HEADERS, {"top_p": 2.0}),
        ("UNAUTHENTICATED", MODEL, {"authorization": "Bearer xd-nobody"}, {}),
    ):
        error = raises(
            InferenceServerException,
            lambda model=model, headers=headers, parameters=parameters: client.infer(
                model, prompt, parameters=parameters, headers=headers
            ),
        )
        assert code in error.status(), (code, error)


if __name__ == "__main__":
    run()
