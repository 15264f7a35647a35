"""What is decoded of a head, against hpack; what the largest head costs; heads in turns."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import hpack
import pytest
from raw_http2 import EMPTY, GRPC, HELLO, PSEUDO, data, head
from test_http2_calls import client_of, serving

from crossdock.proto.http2 import compression, huffman
from crossdock.proto.http2.compression import DECODED_BYTES, HEAD_LIST_BYTES
from crossdock.proto.http2.frames import Code, ConnectionFault, StreamFault
from crossdock.router.frontdoor.http2 import bounds, headers

NAMES = ("x-a", "x-bin", ":path", "content-type", "authorization", "grpc-timeout", "x-" + "n" * 200)


def some_text(rng: random.Random) -> bytes:
    size = rng.choice((0, 1, 3, 10, 60, 126, 127, 128, 400, 5000))
    if rng.random() < 0.3:
        return rng.randbytes(size)
    return bytes(rng.choices(b"abcdefghijklmnopqrstuvwxyz0123456789/-=", k=size))


def blocks(seed: int) -> list[bytes]:
    """Of one connection, as hpack encodes them: with and without Huffman's code, with fields that
    are not kept, and tables of other sizes."""
    rng, made, encoder = random.Random(seed), [], hpack.Encoder()
    for _ in range(12):
        if rng.random() < 0.2:
            encoder.header_table_size = rng.choice((0, 100, 1000, 4096))
        fields = [
            hpack.HeaderTuple(rng.choice(NAMES).encode(), some_text(rng))
            if rng.random() < 0.8
            else hpack.NeverIndexedHeaderTuple(b"x-secret", some_text(rng))
            for _ in range(rng.randrange(6))
        ]
        made.append(encoder.encode(fields, huffman=rng.random() < 0.7))
    return made


def both(block: bytes, theirs: hpack.Decoder, ours: compression.Table) -> tuple[Any, Any]:
    """What hpack says of a block and what we do; None where it is wrong."""
    expected: Any
    found: Any
    try:
        expected = [tuple(field) for field in theirs.decode(block, raw=True)]
    except (hpack.HPACKError, IndexError, ValueError):
        expected = None
    try:
        found = compression.decode(block, ours)[0]
    except ConnectionFault as fault:
        assert fault.code in (Code.COMPRESSION_ERROR, Code.ENHANCE_YOUR_CALM)
        found = None
    return expected, found


@pytest.mark.parametrize("seed", range(40))
def test_blocks_mean_what_they_mean_to_hpack(seed: int) -> None:
    theirs, ours = hpack.Decoder(max_header_list_size=DECODED_BYTES), compression.Table()
    for block in blocks(seed):
        expected, found = both(block, theirs, ours)
        assert expected is not None
        assert found == expected[: len(found)]
        kept = sum(len(name) + len(value) + 32 for name, value in found)
        assert len(found) == len(expected) or kept > HEAD_LIST_BYTES


@pytest.mark.parametrize("seed", range(40))
def test_blocks_that_are_wrong_are_wrong_to_both(seed: int) -> None:
    rng = random.Random(seed)
    wrong = 0
    for _ in range(60):
        theirs, ours = hpack.Decoder(max_header_list_size=DECODED_BYTES), compression.Table()
        block = bytearray(rng.choice(blocks(seed))[: rng.randrange(1, 300)] or b"\x80")
        for _ in range(rng.randrange(4)):
            block[rng.randrange(len(block))] = rng.randrange(256)
        expected, found = both(bytes(block), theirs, ours)
        wrong += expected is None
        assert found == expected
    assert wrong


def test_every_symbol() -> None:
    from hpack.huffman import HuffmanEncoder
    from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH

    encode = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH).encode
    rng = random.Random(1)
    for text in (bytes(range(256)), *(rng.randbytes(n) for n in range(50))):
        assert huffman.decode(encode(text)) == text
    for wrong in (b"\xff", b"\x1f\xff", b"\x18", b"\xff\xff\xff\xff", b"\xfe\xff\xff\xff\xff"):
        with pytest.raises(ValueError):
            huffman.decode(wrong)


def cost_s(call: Callable[[], object]) -> float:
    """Of the thread's time, the best of five."""
    found = []
    for _ in range(5):
        started = time.thread_time()
        call()
        found.append(time.thread_time() - started)
    return min(found)


def test_the_largest_head_costs_a_fraction_of_what_it_did() -> None:
    text = "".join(random.Random(2).choices("abcdefghijklmnopqrstuvwxyz-_~!#$", k=15_000))
    block = hpack.Encoder().encode([*PSEUDO, *GRPC, ("x-long", text)])

    def ours() -> None:
        assert headers.Decoder().head(block, 1).metadata[-1] == ("x-long", text)

    theirs = cost_s(lambda: hpack.Decoder().decode(block, raw=True))
    assert cost_s(ours) < theirs / 1.5


def test_a_head_is_known_until_the_table_changes() -> None:
    encoder, decoder = hpack.Encoder(), headers.Decoder()
    fields = (*PSEUDO, *GRPC, ("authorization", "Bearer x"))
    decoder.head(encoder.encode(fields), 1)
    again = encoder.encode(fields)
    known = decoder.head(again, 3)
    assert decoder.head(again, 5) is known
    timed = headers.block([*PSEUDO, *GRPC, ("grpc-timeout", "5S")])  # which touches no table
    assert decoder.head(timed, 7).timeout_s == 5
    assert decoder.head(again, 9) is known
    other = decoder.head(encoder.encode((*fields, ("x-new", "1"))), 11)
    assert other.metadata[-1] == ("x-new", "1")
    assert decoder.head(encoder.encode(fields), 13) == known


async def test_heads_that_come_together_are_read_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no time at all, one in each turn of the loop: others run in between."""
    monkeypatch.setattr(bounds, "TURN_S", -1.0)
    turn, seen = 0, []

    async def counted() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    async def answer(request: bytes, context: Any) -> bytes:
        seen.append(turn)
        return b""

    async with serving("unary_unary", answer) as (_, port), client_of(port) as client:
        counting = asyncio.create_task(counted())
        calls = [head("/t.T/M", stream_id=i) + data(EMPTY, i) for i in range(1, 101, 2)]
        client.say(HELLO, *calls)
        for i in range(1, 101, 2):
            assert (await client.trailers(i))["grpc-status"] == "0"
        counting.cancel()
    assert len(set(seen)) == len(seen) == 50


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        *(("1H", 3600.0), ("2M", 120.0), ("3S", 3.0), ("4m", 0.004), ("5u", 5e-6), ("6n", 6e-9)),
        *(("0S", 0.0), ("99999999H", 99_999_999 * 3600.0), ("00000001S", 1.0)),
    ],
)
def test_timeouts(said: str, seconds: float) -> None:
    assert headers.timeout_s(said) == pytest.approx(seconds)


@pytest.mark.parametrize("said", ["", "1", "S", "-1S", "+1S", "1.5S", "1 S", "1s", "123456789S"])
def test_timeouts_that_are_none(said: str) -> None:
    with pytest.raises(headers.BadHead):
        headers.timeout_s(said)


def fields_of(*more: tuple[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in (*PSEUDO, *more)]


@pytest.mark.parametrize(
    ("said", "taken"),
    [
        *(("application/grpc", True), ("application/grpc+proto", True)),
        *(("application/grpc;charset=utf-8", True), ("application/grpc-web", False)),
        *(("application/grpcx", False), ("application/json", False), ("", False)),
    ],
)
def test_content_types(said: str, taken: bool) -> None:
    fields = fields_of(("content-type", said))
    if taken:
        assert headers.parse_head(fields, 0, 1).path
    else:
        with pytest.raises(headers.BadHead) as refused:
            headers.parse_head(fields, 0, 1)
        assert refused.value.status == 415


def test_metadata_of_bytes() -> None:
    """Padded or not, several in one field, in order with others of the name."""
    fields = fields_of(*GRPC, ("x-bin", "AAE=, AAE,/w"), ("x-bin", ""), ("y", " a, b "))
    found = headers.parse_head(fields, 0, 1).metadata
    assert found == (
        *(("x-bin", b"\0\1"), ("x-bin", b"\0\1"), ("x-bin", b"\xff")),
        *(("x-bin", b""), ("y", "a, b")),
    )


def test_te_is_no_more_than_trailers() -> None:
    head_ = ("content-type", "application/grpc")
    assert headers.parse_head(fields_of(head_), 0, 1).encoding == "identity"
    with pytest.raises(StreamFault):
        headers.parse_head(fields_of(head_, ("te", "trailers, deflate")), 0, 1)


def test_a_block_changes_the_tables_size_twice_at_the_most() -> None:
    table = compression.Table()
    assert compression.decode(b"\x20\x3f\xe1\x1f\x82", table)[0] == [(b":method", b"GET")]
    with pytest.raises(ConnectionFault, match="again and again"):
        compression.decode(b"\x20" * 3 + b"\x82", table)


def test_heads_that_are_kept_are_bounded_by_their_bytes() -> None:
    encoder, decoder = hpack.Encoder(), headers.Decoder()
    fields = [*PSEUDO, *GRPC, *((f"x-{i}", "v" * 300) for i in range(9))]
    decoder.head(encoder.encode(fields), 1)
    blocks = [encoder.encode(fields[:-n]) for n in range(1, 9)]
    for block in blocks * 2:
        decoder.head(block, 3)
    kept = decoder._known.values()
    assert kept and sum(head.size for head in kept) <= headers.KNOWN_BYTES
