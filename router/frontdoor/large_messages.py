"""Protobuf messages that are large: parsing 8 MB of them takes up to 0.3 s and 400 MB where all of
it is empty sub-messages, and holds the interpreter for as long.

They are parsed in the process beside the gateway (text_process.py), which gives back those that
have few enough parts, in as few bytes as say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from crossdock.proto.errors import InvalidRequest
from crossdock.proto.v1.inference_pb2 import GenerateRequest
from crossdock.proto.v1.kserve_pb2 import ModelInferRequest

Kind: TypeAlias = type[GenerateRequest] | type[ModelInferRequest]

INLINE_BYTES = 65_536  # a larger message is parsed by the process: this takes up to 1.5 ms
MAX_VALUES = 32_768  # messages, texts and entries of maps in a large message, together
MAX_NUMBERS = 1_048_576  # in its lists, as token ids are

KINDS: dict[str, Kind] = {
    kind.DESCRIPTOR.full_name: kind for kind in (GenerateRequest, ModelInferRequest)
}
_OBJECTS = (FieldDescriptor.CPPTYPE_MESSAGE, FieldDescriptor.CPPTYPE_STRING)  # bytes too


def condensed(data: bytes, kind: Kind) -> bytes:
    """A message without what is unknown in it or said again. Raises InvalidRequest."""
    try:
        message = kind.FromString(data)
    except DecodeError as error:
        raise undecodable(data, error) from None
    _check_size(message)
    message.DiscardUnknownFields()
    return message.SerializeToString()


def undecodable(data: bytes, error: DecodeError) -> InvalidRequest:
    """What is raised where data are no message."""
    limit = f"must be a valid message with strings in UTF-8: {error}"
    return InvalidRequest("message", f"{len(data)} bytes", limit)


def _check_size(message: Message) -> None:
    """Bounds what parsing it again makes."""
    todo, values, numbers = [message], 0, 0
    while todo:
        for field, value in todo.pop().ListFields():
            if isinstance(value, Message):
                todo.append(value)
            elif field.is_repeated and field.cpp_type in _OBJECTS:
                values += len(value)
                _check("values", values, MAX_VALUES)
                inner = value.values() if isinstance(value, Mapping) else value
                todo += [each for each in inner if isinstance(each, Message)]
            elif field.is_repeated:
                numbers += len(value)
                _check("numbers", numbers, MAX_NUMBERS)


def _check(what: str, found: int, most: int) -> None:
    if found > most:
        raise InvalidRequest("message", f"{found} {what} and more", f"at most {most} in all")
