"""Throws bytes at an HTTP front door that no client would send: bodies, heads, chunks, halves.

    python tools/fuzz_http.py 127.0.0.1:8000 --cases 100000 --seed 1

Every case is one connection, and what came of it is a status, a close or, after 20 s, a hang.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import random
import re
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

AT_ONCE = 32
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
HANG_S = 20.0
FIELDS: dict[str, Any] = {
    "model": "x", "stream": True, "n": 2, "max_tokens": 3, "min_tokens": 1, "temperature": 0.5,
    "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 1,
    "frequency_penalty": -1, "logit_bias": {"5": 1.5}, "seed": 7, "stop": ["a", "b"],
    "stop_token_ids": [3], "ignore_eos": True, "priority": 1, "cache_salt": "s", "logprobs": 2,
    "echo": True, "top_logprobs": 3, "max_completion_tokens": 2, "user": "u",
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "stream_options": {"include_usage": True}, "best_of": 1, "suffix": None, "unknown": {"a": [1]},
    "response_format": {"type": "json_object"}, "guided_regex": "a+", "tool_choice": "auto",
    "chat_template_kwargs": {"a": 1}, "guided_json": {}, "add_special_tokens": True,
    "prompt_logprobs": 2, "max_output_tokens": 2, "include": ["message.output_text.logprobs"],
    "text": {"format": {"type": "text"}}, "reasoning": {"effort": "low"}, "store": False,
    "instructions": "be brief", "metadata": {"a": "b"}, "return_token_strs": True,
}  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, -(2**63), 2**64, 10**30, 1e308, -0.0, float("nan"),
    float("inf"), "", "x", "\ud800", "\udfff", "\x00", "é🙂", "a" * 5000, [], [[]], {}, {"a": 1},
    [None], [1, "a"], [[1], "b"], {"\ud800": 1}, [1] * 300, ["x"] * 70, [[5] * 40] * 3,
]  # fmt: skip
ROUTES = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"]
OTHERS = ["/health", "/metrics", "/v1/models", "/v1/models/x", "/openapi.json", "/v1/embeddings",
          "/v2/models/x/infer", "/nothing", "/%ff", "/" + "a" * 9000, "*"]  # fmt: skip

HEADERS = [b"X", b"Expect", b"Host", b"Transfer-Encoding", b"Content-Length", b"Upgrade", b"Origin",
           b"X-Request-Id", b"Content-Type", b"Connection", b"traceparent"]  # fmt: skip


def body_of(rng: random.Random) -> tuple[str, bytes]:
    """A route, and a request for it with some of its fields as they should not be."""
    path = rng.choice(ROUTES)
    body: dict[Any, Any] = {
        "/v1/completions": {"prompt": "hello"},
        "/v1/responses": {"input": "hello"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
        "/tokenize": {"prompt": "hello"},
        "/detokenize": {"tokens": [1, 2, 3]},
    }[path]
    if rng.random() < 0.7:
        body["max_tokens"] = rng.randrange(1, 6)
    for name in rng.sample(sorted(FIELDS), rng.randrange(0, 5)):
        body[name] = FIELDS[name] if rng.random() < 0.5 else rng.choice(ODD)
    if rng.random() < 0.3:
        body[rng.choice(list(body))] = rng.choice(ODD)
    if "messages" in body and isinstance(body["messages"], list) and rng.random() < 0.4:
        role, name = rng.choice(["tool", "assistant", 5]), rng.choice(["tool_calls", "name", "x"])
        added = {"role": role, "content": rng.choice(ODD), name: rng.choice(ODD)}
        body["messages"] = [*body["messages"], added]
    return path, json.dumps(body).encode("utf-8", "surrogatepass")


def mutated(rng: random.Random, data: bytes) -> bytes:
    """The same with bytes changed, cut, doubled or put in."""
    found = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(found) + 1)
        kind = rng.randrange(4)
        if kind == 0 and at < len(found):
            found[at] = rng.randrange(256)
        elif kind == 1:
            del found[at : at + rng.randrange(1, 20)]
        elif kind == 2:
            found[at:at] = rng.choice(
                [b"\xff", b'"', b"{", b"]", b"\\u", b"\\ud83d", b"1e999", b"\0"]
            )
        else:
            found[at:at] = found[at : at + 30]
    return bytes(found)


def post(path: str, body: bytes, *headers: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    lines = [b"POST %b HTTP/1.1" % path.encode(), b"Host: x", b"Content-Type: application/json"]
    return b"\r\n".join([*lines, *headers, b"Content-Length: %d" % size, b"", b""]) + body


def chunked(rng: random.Random, body: bytes) -> bytes:
    sizes = [b"5", b"zz", b"-1", b"0", b"ffffffffffffffffff", b"", b"5;a=b", b" 5"]
    chunks = b""
    while body and rng.random() < 0.9:
        size = rng.randrange(1, 40)
        part, body = body[:size], body[size:]
        said = rng.choice(sizes) if rng.random() < 0.2 else b"%x" % len(part)
        chunks += said + b"\r\n" + part + rng.choice([b"\r\n", b"\r\n", b"\r\n", b"\n", b""])
    return chunks + rng.choice([b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"", b"\r\n"])


def _plain(rng: random.Random) -> list[bytes]:
    return [post(*body_of(rng))]


def _mutated_body(rng: random.Random) -> list[bytes]:
    path, body = body_of(rng)
    return [post(path, mutated(rng, body))]


def _mutated_all(rng: random.Random) -> list[bytes]:
    return [mutated(rng, post(*body_of(rng)))]


def _deep(rng: random.Random) -> list[bytes]:
    depth, opening = rng.choice([10, 500, 5000]), rng.choice([b"[", b'{"a":'])
    body = b'{"prompt":%b1%b}' % (opening * depth, {b"[": b"]"}.get(opening, b"}") * depth)
    return [post("/v1/completions", body)]


def _chunks(rng: random.Random) -> list[bytes]:
    path, body = body_of(rng)
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" % path.encode()
    data = chunked(rng, body)
    cut = rng.randrange(len(data) + 1)
    return [head + data[:cut], data[cut:]]


def _compressed(rng: random.Random) -> list[bytes]:
    path, body = body_of(rng)
    if rng.random() < 0.02:
        body = bytes(20_000_000)
    packed = rng.choice([gzip.compress, zlib.compress])(body)
    packed = mutated(rng, packed) if rng.random() < 0.5 else packed
    said = rng.choice([b"gzip", b"deflate", b"br", b"zstd", b"gzip, gzip", b"\xff", b""])
    return [post(path, packed, b"Content-Encoding: " + said)]


def _heads(rng: random.Random) -> list[bytes]:
    name = rng.choice(HEADERS)
    odd = [b"", b"\xff\xfe", b"100-continue", b"chunked", b"close", b"h2c", b"\x01", b"-1"]
    value = rng.choice([*odd, b"a" * 10, b"a" * 9000, b"9" * 30])
    many = rng.choice([1, 2, 200])
    path, body = body_of(rng)
    return [post(path, body, *[name + b": " + value] * many)]


def _pipelined(rng: random.Random) -> list[bytes]:
    return [b"".join(post(*body_of(rng)) for _ in range(rng.randrange(2, 8)))]


def _routes(rng: random.Random) -> list[bytes]:
    method = rng.choice([b"GET", b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"TRACE", b"FOO", b"POST"])
    version = rng.choice([b"1.1", b"1.1", b"1.0", b"2.0", b"9.9"])
    path = rng.choice(OTHERS + ROUTES).encode()
    return [b"%b %b HTTP/%b\r\nHost: x\r\n\r\n" % (method, path, version)]


def _binary(rng: random.Random) -> list[bytes]:
    return [struct.pack(">I", rng.getrandbits(32)) + rng.randbytes(rng.randrange(200))]


def _slow(rng: random.Random) -> list[bytes]:
    data = post(*body_of(rng))
    cuts = sorted(rng.randrange(len(data)) for _ in range(4))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]


def _short(rng: random.Random) -> list[bytes]:
    path, body = body_of(rng)
    return [post(path, body, length=len(body) + rng.choice([-3, 5, 10**9, 10**20]))]


KINDS: list[Callable[[random.Random], list[bytes]]] = [
    _plain, _plain, _plain, _mutated_body, _mutated_body, _mutated_all, _deep, _chunks, _compressed,
    _heads, _pipelined, _routes, _binary, _slow, _short,
]  # fmt: skip


async def one(address: str, seed: int) -> list[str]:
    """What came of a case: statuses, "closed", or "hang"."""
    rng = random.Random(seed)
    parts = rng.choice(KINDS)(rng)
    leaves = rng.random()
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(HANG_S):
            for part in parts:
                writer.write(part)
                await asyncio.sleep(0)
            await writer.drain()
            if leaves < 0.1:
                return ["left"]
            writer.write_eof()
            answer = await reader.read()
    except TimeoutError:
        return ["hang"]
    except OSError:
        return ["closed"]
    finally:
        writer.transport.abort()
    return _statuses(answer) or ["closed"]


def _statuses(answer: bytes) -> list[str]:
    return [status.decode() for status in STATUS.findall(answer) if status != b"100"]


async def run(address: str, cases: int, seed: int) -> tuple[Counter[str], list[int]]:
    """How often each outcome came, and the seeds of the cases that are wrong."""
    found: Counter[str] = Counter()
    wrong: list[int] = []
    seeds = iter(range(seed * 10**9, seed * 10**9 + cases))

    async def some() -> None:
        for each in seeds:
            outcomes = await one(address, each)
            found.update(outcomes)
            if any(o == "hang" or (o[:1] == "5" and o != "503") for o in outcomes):
                wrong.append(each)

    await asyncio.gather(*(some() for _ in range(AT_ONCE)))
    return found, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="host:port of HTTP")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="one case again, by the seed that was printed")
    given = parser.parse_args()
    if given.case is not None:
        rng = random.Random(given.case)
        print(*rng.choice(KINDS)(rng), sep="\n")
        print(asyncio.run(one(given.address, given.case)))
        return 0
    found, wrong = asyncio.run(run(given.address, given.cases, given.seed))
    print(dict(found.most_common()), "wrong:", wrong[:20])
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
