"""Text generation in the terms of the Open Inference Protocol: which tensors go in and out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from crossdock.proto.errors import InvalidRequest
from crossdock.proto.v1 import kserve_pb2 as pb
from crossdock.router.dispatch.request import Delta
from crossdock.router.frontdoor.json_body import parse_object
from crossdock.router.frontdoor.kserve_tensors import BYTES, Tensor, add_output, read_inputs
from crossdock.router.frontdoor.openai_schemas import CompletionBody, read_fields
from crossdock.router.frontdoor.tools.conversation import check_json
from crossdock.router.frontdoor.validate import check_prompts

# Tensor -> datatype, shape, as the metadata tell them.
INPUTS: dict[str, tuple[str, list[int]]] = {
    "text_input": (BYTES, [-1]),
    "input_ids": ("INT32", [-1]),
    "stream": ("BOOL", [1]),
    "sampling_parameters": (BYTES, [1]),
    "exclude_input_in_output": ("BOOL", [1]),
}
OUTPUTS: dict[str, tuple[str, list[int]]] = {
    "text_output": (BYTES, [-1]),
    "output_ids": ("INT32", [-1]),
    "sequence_length": ("INT32", [-1]),
    "finish_reason": (BYTES, [-1]),
    "num_input_tokens": ("INT32", [-1]),
    "num_output_tokens": ("INT32", [-1]),
}
TOKEN_TYPES = ("INT32", "INT64", "UINT32")
MAX_PARAMETERS = 64
MAX_SAMPLING_MARKS = 16_384  # in the JSON of sampling_parameters: as many values at the most
EMPTY_FINAL = "triton_enable_empty_final_response"
FINAL = "triton_final_response"
ELSEWHERE = {  # sampling parameters that this protocol has another place for, or none
    "prompt": "comes as text_input or input_ids",
    "model": "comes as model_name",
    "stream": "comes as the input of that name",
    "stream_options": "is not offered over this protocol",
    "echo": "comes as exclude_input_in_output",
    "logprobs": "is not offered over this protocol",
    "prompt_logprobs": "is not offered over this protocol",
    "best_of": "is not offered over this protocol",
}


@dataclass(frozen=True)
class Ask:
    """What one ModelInferRequest wants."""

    prompts: Sequence[str | Sequence[int] | np.ndarray]
    field: str  # that the prompts came in
    body: CompletionBody  # its sampling parameters
    stream: bool
    echo: bool
    outputs: tuple[str, ...]
    raw: bool  # whether the answer's tensors are raw
    empty_final: bool  # a stream's end comes as a response of its own
    timeout_s: float | None
    priority: int
    model: str = ""  # that serves it, once it is chosen

    @property
    def n(self) -> int:
        """Answers to each prompt."""
        return 1 if self.body.n is None else self.body.n

    @classmethod
    def read(cls, request: pb.ModelInferRequest, streams: bool = True) -> Ask:
        """`streams`: it came where an answer may be several responses. Raises InvalidRequest naming
        the tensor or parameter that is wrong."""
        inputs = read_inputs(request)
        for name in inputs:
            if name not in INPUTS:
                raise InvalidRequest("inputs", name, f"the inputs are {', '.join(INPUTS)}")
        if len(request.parameters) > MAX_PARAMETERS:
            given = f"{len(request.parameters)} parameters"
            raise InvalidRequest("parameters", given, f"at most {MAX_PARAMETERS}")
        parameters = {name: _value(given) for name, given in request.parameters.items()}
        empty_final = bool(parameters.pop(EMPTY_FINAL, False))
        if empty_final and not streams:
            raise InvalidRequest(EMPTY_FINAL, True, "may be true only over ModelStreamInfer")
        timeout_us, priority = parameters.pop("timeout", 0), parameters.pop("priority", 0)
        for name, value in (("timeout", timeout_us), ("priority", priority)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                limit = "must be an integer of at least 0"
                raise InvalidRequest(f"parameters.{name}", value, limit)
        field, prompts = _prompts(inputs)
        outputs = _outputs(request)
        by_default = ("text_output",) if field == "text_input" else ("output_ids",)
        stream = _flag(inputs, "stream", False)
        if stream and not streams:
            raise InvalidRequest("stream", True, "may be true only over ModelStreamInfer")
        echo = not _flag(inputs, "exclude_input_in_output", True)
        if echo and (stream or field != "text_input"):
            limit = "may be false only for text_input, without stream"
            raise InvalidRequest("exclude_input_in_output", False, limit)
        return cls(
            prompts=prompts,
            field=field,
            body=_sampling(inputs, parameters),
            stream=stream,
            echo=echo,
            outputs=outputs or by_default,
            raw=bool(request.raw_input_contents),
            empty_final=empty_final,
            timeout_s=timeout_us / 1e6 if timeout_us else None,
            priority=priority,
        )

    def answer(self, request: pb.ModelInferRequest, deltas: Sequence[Delta]) -> Any:
        """What these sequences gained, one element of each tensor a delta."""
        answer = pb.ModelInferResponse(model_name=self.model, model_version="1", id=request.id)
        for name in self.outputs:
            values: list[Any] = [_output(name, delta) for delta in deltas]
            if name == "output_ids":
                values = list(chain.from_iterable(values))
            elif name == "text_output" and self.echo:
                texts = [str(self.prompts[delta.index // self.n]).encode() for delta in deltas]
                values = [text + value for text, value in zip(texts, values)]
            tensor = Tensor(name, OUTPUTS[name][0], (len(values),), values)
            add_output(answer, tensor, self.raw)
        return answer


def _outputs(request: pb.ModelInferRequest) -> tuple[str, ...]:
    """Names of those that are asked for, each once."""
    found: dict[str, None] = {}
    for output in request.outputs:
        if output.name not in OUTPUTS:
            raise InvalidRequest("outputs", output.name, f"the outputs are {', '.join(OUTPUTS)}")
        if output.name in found:
            raise InvalidRequest("outputs", output.name, "is there twice")
        found[output.name] = None
    return tuple(found)


def _output(name: str, delta: Delta) -> Any:
    if name == "text_output":
        return delta.text.encode()
    if name == "output_ids":
        return delta.token_ids
    if name == "sequence_length":
        return len(delta.token_ids)
    if name == "finish_reason":
        return (delta.finish_reason or "").encode()
    usage = delta.usage  # known at the end of a sequence
    if usage is None:
        return 0
    return usage.prompt_tokens if name == "num_input_tokens" else usage.completion_tokens


def _prompts(inputs: dict[str, Tensor]) -> tuple[str, list[Any]]:
    given = [inputs[name] for name in ("text_input", "input_ids") if name in inputs]
    if len(given) != 1:
        found = [tensor.name for tensor in given]
        raise InvalidRequest("inputs", found, "one of text_input and input_ids must be given")
    tensor = given[0]
    if tensor.name == "text_input":
        check_prompts(tensor.name, len(tensor.values))
        return tensor.name, tensor.texts()
    if tensor.datatype not in TOKEN_TYPES:
        limit = f"must be one of {', '.join(TOKEN_TYPES)}"
        raise InvalidRequest("input_ids.datatype", tensor.datatype, limit)
    if len(tensor.shape) not in (1, 2):
        raise InvalidRequest(
            "input_ids.shape", list(tensor.shape), "must be [tokens] or [n, tokens]"
        )
    length = tensor.shape[-1]
    count = tensor.shape[0] if len(tensor.shape) == 2 else 1
    check_prompts(tensor.name, count)
    return tensor.name, [tensor.values[i * length : (i + 1) * length] for i in range(count)]


def _flag(inputs: dict[str, Tensor], name: str, default: bool) -> bool:
    if name not in inputs:
        return default
    if inputs[name].datatype != "BOOL":
        raise InvalidRequest(f"{name}.datatype", inputs[name].datatype, "must be BOOL")
    return bool(inputs[name].one())


def _sampling(inputs: dict[str, Tensor], parameters: dict[str, Any]) -> CompletionBody:
    """The request's parameters, and those of the JSON object in `sampling_parameters`."""
    fields = dict(parameters)
    if "sampling_parameters" in inputs:
        inputs["sampling_parameters"].one()
        (text,) = inputs["sampling_parameters"].texts()
        check_json("sampling_parameters", [text], MAX_SAMPLING_MARKS)
        for name, value in parse_object(text.encode() or b"{}").items():
            if name in fields:
                limit = "is given in parameters as well"
                raise InvalidRequest(f"sampling_parameters.{name}", value, limit)
            fields[name] = value
    for name, limit in ELSEWHERE.items():
        if name in fields:
            raise InvalidRequest(name, fields[name], limit)
    for name in fields:
        if name not in KNOWN:
            raise InvalidRequest(name, fields[name], "is no sampling parameter")
    return read_fields(fields, CompletionBody)


KNOWN = frozenset(CompletionBody.__struct_fields__)


def _value(given: pb.InferParameter) -> Any:
    kind = given.WhichOneof("parameter_choice")
    return None if kind is None else getattr(given, kind)
