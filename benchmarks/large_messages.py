"""How long a large gRPC message holds a gateway's loop, whatever it is made of.

PYTHONPATH=tests/kits python benchmarks/large_messages.py --bytes 8000000
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
from served_rig import ServedRig
from tiny import make_tiny_model

GENERATE = "/crossdock.v1.Inference/GenerateUnary"
INFER = "/inference.GRPCInferenceService/ModelInfer"
CHECK = "/grpc.health.v1.Health/Check"
VALUES = 32_768  # that are let through
OVERHEAD = 64  # bytes of keys and lengths


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes((*found, value))


def field(number: int, data: bytes = b"") -> bytes:
    """One with a length: a message, text, bytes or packed numbers."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def inside(path: tuple[int, ...], data: bytes) -> bytes:
    """In the fields of these numbers, the outermost first."""
    for number in reversed(path):
        data = field(number, data)
    return data


def messages(size: int) -> Iterator[tuple[str, str, bytes]]:
    """What is in a message, whom it is for, and the message."""

    def many(part: bytes, *path: int) -> bytes:
        return inside(path, part * ((size - OVERHEAD) // len(part)))

    def keys(count: int, *path: int) -> bytes:
        return inside(path, b"".join(field(4, field(1, b"%x" % i)) for i in range(count)))

    ids = b"".join(field(8, b"\x08" + varint(i)) for i in range(size // 7))
    yield "chat.messages", GENERATE, many(field(1), 5)
    yield "chat.tools", GENERATE, many(field(2), 5)
    yield "tool_calls of one message", GENERATE, many(field(4), 5, 1)
    yield "messages with a tool call each", GENERATE, many(field(1, field(4)), 5)
    yield "chat and token_ids in turn", GENERATE, many(field(5, field(3)) + field(4))
    yield "logit_bias, one key", GENERATE, many(field(8), 6)
    yield "logit_bias, many keys", GENERATE, field(6, ids)
    yield "stop", GENERATE, many(field(10), 6)
    yield "token_ids, packed", GENERATE, many(b"\x01", 4, 1)
    yield "token_ids, not packed", GENERATE, many(b"\x08\x01", 4)
    yield "stop_token_ids, not packed", GENERATE, many(b"\x48\x01", 6)
    yield "text, again and again", GENERATE, many(field(3))
    yield "one text", GENERATE, many("€".encode(), 3)
    yield "unknown fields", GENERATE, many(b"\xf8\x07\x01")
    yield "unknown groups, nested", GENERATE, many(b"\xfb\x07")
    yield "inputs", INFER, many(field(5))
    yield "inputs with contents", INFER, many(field(5, field(5)))
    yield "outputs", INFER, many(field(6))
    yield "raw_input_contents", INFER, many(field(7))
    yield "parameters, one key", INFER, many(field(4))
    yield "parameters, many keys", INFER, keys(size // 12)
    yield "parameters of an input", INFER, keys(size // 12, 5)
    yield "shape, packed", INFER, many(b"\x01", 5, 3)
    yield "bytes_contents", INFER, many(field(8), 5, 5)
    yield "bool_contents, packed", INFER, many(b"\x01", 5, 5, 1)
    yield "as many parameters as are let through", INFER, keys(VALUES)
    yield "a health check's service, 8 times the size", CHECK, field(1) * (4 * size)


async def run(served: ServedRig, size: int) -> None:
    unlimited = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(served.grpc, unlimited) as channel:

        async def held_ms(path: str, message: bytes) -> tuple[float, str]:
            try:
                await channel.unary_unary(path)(message, timeout=120)
                said = "OK"
            except grpc.aio.AioRpcError as refused:
                said = f"{refused.code().name}: {refused.details()}"
            return 1000 * served.stats()["held_s"], said

        for _, path, message in messages(100_000):  # what is made once is made
            await held_ms(path, message)
        for what, path, message in messages(size):
            held, said = await held_ms(path, message)
            print(f"{what:44}{len(message):10,} bytes {held:7.1f} ms  {said[:90]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=8_000_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "tiny", "llama")
        with ServedRig.start(model) as served:
            asyncio.run(run(served, given.bytes))


if __name__ == "__main__":
    main()
