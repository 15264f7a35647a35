"""Tensors of the Open Inference Protocol: their values, raw or typed, and what is wrong with them.

Raw contents are little-endian; an element of BYTES is four bytes of length and that many bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crossdock.proto.errors import InvalidRequest
from crossdock.proto.v1 import kserve_pb2 as pb
from crossdock.router.frontdoor.validate import MAX_PROMPTS

MAX_INPUTS = 16
MAX_DIMENSIONS = 8
MAX_TYPED = 262_144  # numbers of a tensor that is not raw, of which each becomes an object

# Datatype -> field of InferTensorContents, format of an element as struct and numpy have it.
NUMBERS = {
    "BOOL": ("bool_contents", "?"),
    "INT32": ("int_contents", "i"),
    "INT64": ("int64_contents", "q"),
    "UINT32": ("uint_contents", "I"),
    "UINT64": ("uint64_contents", "Q"),
    "FP32": ("fp32_contents", "f"),
    "FP64": ("fp64_contents", "d"),
}
BYTES = "BYTES"


@dataclass(frozen=True)
class Tensor:
    """A tensor's values in row-major order. `values` are numbers, numpy's where they came raw, or
    bytes for BYTES."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Sequence[Any] | np.ndarray

    def one(self) -> Any:
        """The only element. Raises InvalidRequest."""
        if len(self.values) != 1:
            raise InvalidRequest(self.name, list(self.shape), "must hold one element")
        return self.values[0]

    def texts(self) -> list[str]:
        """The elements of a BYTES tensor as text. Raises InvalidRequest."""
        if self.datatype != BYTES:
            raise InvalidRequest(f"{self.name}.datatype", self.datatype, "must be BYTES")
        try:
            return [value.decode() for value in self.values]
        except UnicodeDecodeError:
            raise InvalidRequest(self.name, "bytes", "must be UTF-8") from None


def read_inputs(request: pb.ModelInferRequest) -> dict[str, Tensor]:
    """The request's inputs by name. Raises InvalidRequest."""
    if len(request.inputs) > MAX_INPUTS:
        raise InvalidRequest("inputs", f"{len(request.inputs)} inputs", f"at most {MAX_INPUTS}")
    raw: Sequence[bytes] = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        counts = f"{len(raw)} for {len(request.inputs)} inputs"
        raise InvalidRequest("raw_input_contents", counts, "must hold one entry an input, or none")
    found: dict[str, Tensor] = {}
    for index, given in enumerate(request.inputs):
        if given.name in found:
            raise InvalidRequest(f"inputs[{index}].name", given.name, "is there twice")
        found[given.name] = _read(given, raw[index] if raw else None)
    return found


def _read(given: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> Tensor:
    name, datatype = given.name, given.datatype
    if datatype != BYTES and datatype not in NUMBERS:
        known = ", ".join((BYTES, *NUMBERS))
        raise InvalidRequest(f"{name}.datatype", datatype, f"must be one of {known}")
    if len(given.shape) > MAX_DIMENSIONS:
        dimensions = f"{len(given.shape)} dimensions"
        raise InvalidRequest(f"{name}.shape", dimensions, f"at most {MAX_DIMENSIONS}")
    values: Sequence[Any] | np.ndarray
    if raw is None:
        values = _typed(name, datatype, given.contents)
    else:
        values = _split(name, raw) if datatype == BYTES else _unpack(name, datatype, raw)
    shape = tuple(given.shape)
    if any(size < 0 for size in shape) or math.prod(shape) != len(values):
        limit = f"must be the shape of its {len(values)} elements"
        raise InvalidRequest(f"{name}.shape", list(shape), limit)
    return Tensor(name, datatype, shape, values)


def _typed(name: str, datatype: str, contents: pb.InferTensorContents) -> Sequence[Any]:
    field = "bytes_contents" if datatype == BYTES else NUMBERS[datatype][0]
    values, most = getattr(contents, field), MAX_PROMPTS if datatype == BYTES else MAX_TYPED
    if len(values) > most:
        limit = f"at most {most}" + ("" if datatype == BYTES else ", or raw_input_contents")
        raise InvalidRequest(name, f"{len(values)} elements", limit)
    return list(values)


def _split(name: str, raw: bytes) -> list[bytes]:
    values, at = list[bytes](), 0
    while at < len(raw):
        start = at + 4
        at = start + int.from_bytes(raw[at:start], "little")
        if start > len(raw) or at > len(raw):
            limit = "each element must be its length in four bytes, and then so many bytes"
            raise InvalidRequest(name, f"{len(raw)} raw bytes", limit)
        if len(values) == MAX_PROMPTS:
            raise InvalidRequest(name, "more elements", f"at most {MAX_PROMPTS}")
        values.append(raw[start:at])
    return values


def _unpack(name: str, datatype: str, raw: bytes) -> np.ndarray:
    element = NUMBERS[datatype][1]
    if len(raw) % struct.calcsize(element):
        limit = f"must be whole elements of {datatype}"
        raise InvalidRequest(name, f"{len(raw)} raw bytes", limit)
    return np.frombuffer(raw, f"<{element}")


def add_output(answer: pb.ModelInferResponse, tensor: Tensor, raw: bool) -> None:
    """Appends a tensor to an answer's outputs, its values raw or typed."""
    made = answer.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    values, numeric = tensor.values, tensor.datatype != BYTES
    if not raw:
        field = NUMBERS[tensor.datatype][0] if numeric else "bytes_contents"
        getattr(made.contents, field).extend(values)
    elif numeric:
        packed = struct.pack(f"<{len(values)}{NUMBERS[tensor.datatype][1]}", *values)
        answer.raw_output_contents.append(packed)
    else:
        packed = b"".join(struct.pack("<I", len(value)) + value for value in values)
        answer.raw_output_contents.append(packed)
