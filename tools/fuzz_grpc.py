"""Throws messages at every method of a gRPC front door: random ones, and bytes that are none.

python tools/fuzz_grpc.py 127.0.0.1:50051 --cases 100000 --seed 1
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections import Counter
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from crossdock.proto.channels import internal
from crossdock.proto.v1 import inference_pb2, kserve_pb2

AT_ONCE = 32
HANG_S = 20.0
SERVED_AS = {"crossdock.v1.kserve.GRPCInferenceService": "inference.GRPCInferenceService"}
WRONG = {"INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED", "DATA_LOSS"}
ENDLESS = {"Watch"}  # streams that are left after their first message
OTHERS = (health_pb2, reflection_pb2)  # whose parsers are grpcio's: they get messages alone
TEXTS = ["", "x", "hello", "é🙂", "a" * 300, "\x00", "text_input", "BYTES", "INT32", "input_ids"]
NUMBERS = [0, 1, 2, 3, 5, 17, 255, 2**31 - 1]


def methods() -> list[Any]:
    """The descriptors of all methods that a gateway serves."""
    files = [inference_pb2, kserve_pb2, *OTHERS]
    services = [s for file in files for s in file.DESCRIPTOR.services_by_name.values()]
    return [method for service in services for method in service.methods]


def fill(rng: random.Random, message: Any, depth: int = 0) -> Any:
    """Sets some of a message's fields, at random."""
    for field in message.DESCRIPTOR.fields:
        if rng.random() < 0.5 or depth > 4:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        if _repeated(field):
            for _ in range(rng.choice([1, 1, 2, 3, 70])):
                if field.message_type is not None:
                    fill(rng, getattr(message, field.name).add(), depth + 1)
                else:
                    getattr(message, field.name).append(value(rng, field))
        elif field.message_type is not None:
            fill(rng, getattr(message, field.name), depth + 1)
            getattr(message, field.name).SetInParent()
        else:
            setattr(message, field.name, value(rng, field))
    return message


def _repeated(field: Any) -> bool:
    repeated = field.is_repeated
    return bool(repeated() if callable(repeated) else repeated)


def value(rng: random.Random, field: Any) -> Any:
    """One of this field's type."""
    if field.cpp_type == Field.CPPTYPE_STRING:
        text = rng.choice(TEXTS)
        return rng.randbytes(rng.randrange(40)) if field.type == Field.TYPE_BYTES else text
    if field.cpp_type in (Field.CPPTYPE_DOUBLE, Field.CPPTYPE_FLOAT):
        return rng.choice([0.0, 0.5, 1.0, -1.0, 1e30, float("nan"), float("inf")])
    if field.cpp_type == Field.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if field.cpp_type == Field.CPPTYPE_ENUM:
        return rng.choice(field.enum_type.values).number
    number = rng.choice(NUMBERS)
    signed = field.cpp_type in (Field.CPPTYPE_INT32, Field.CPPTYPE_INT64)
    return -number if signed and rng.random() < 0.3 else number


def asked(rng: random.Random, method: Any) -> bytes:
    """A message for a method, or what is nearly one."""
    message = fill(rng, GetMessageClass(method.input_type)())
    if method.name in ("Generate", "GenerateUnary") and rng.random() < 0.7:
        message.text, message.sampling.max_tokens = "hello", rng.randrange(1, 5)
    data = bytearray(message.SerializeToString())
    ours = method.containing_service.full_name.startswith("crossdock.")
    if ours and rng.random() < 0.4:
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
    return bytes(data)


async def one(channel: Any, seed: int) -> str:
    """The status of a case, or "left"."""
    rng = random.Random(seed)
    method = rng.choice(methods())
    service = SERVED_AS.get(service := method.containing_service.full_name, service)
    path = f"/{service}/{method.name}"
    messages = [asked(rng, method) for _ in range(rng.randrange(1, 4))]
    leaves = rng.random() < 0.1 or method.name in ENDLESS
    arity = ("stream" if method.client_streaming else "unary") + "_" + (
        "stream" if method.server_streaming else "unary"
    )  # fmt: skip
    given = iter_of(messages) if method.client_streaming else messages[0]
    call = getattr(channel, arity)(path)(given, timeout=HANG_S)
    try:
        if method.server_streaming:
            async for _ in call:
                if leaves:
                    call.cancel()
                    return "left"
        else:
            await call
    except grpc.aio.AioRpcError as error:
        if error.code().name in WRONG:
            print(path, seed, error.code().name, error.details(), file=sys.stderr)
        return str(error.code().name)
    except asyncio.CancelledError:
        return "left"
    return "OK"


async def iter_of(messages: list[bytes]) -> Any:
    for message in messages:
        yield message


async def run(address: str, cases: int, seed: int) -> tuple[Counter[str], list[int]]:
    """How often each status came, and the seeds of the cases that are wrong."""
    found: Counter[str] = Counter()
    wrong: list[int] = []
    seeds = iter(range(seed * 10**9, seed * 10**9 + cases))
    async with grpc.aio.insecure_channel(address, internal()) as channel:

        async def some() -> None:
            for each in seeds:
                status = await one(channel, each)
                found[status] += 1
                if status in WRONG:
                    wrong.append(each)

        await asyncio.gather(*(some() for _ in range(AT_ONCE)))
    return found, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="host:port of gRPC")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found, wrong = asyncio.run(run(given.address, given.cases, given.seed))
    print(dict(found.most_common()), "wrong:", wrong[:20])
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
