"""What the nccl transport refuses: wrong questions, wrong answers, strangers."""

from __future__ import annotations

import socket

import numpy as np
import pytest
from nccl_kit import Reader, Worker, lie, link_of, post_and_hang, settled, until
from transport_kit import (
    BLOCK_BYTES,
    NUM_BLOCKS,
    WAIT_S,
    Pool,
)

from crossdock.kvtransfer.nccl import link as nccl_link
from crossdock.kvtransfer.nccl import messages
from crossdock.kvtransfer.nccl.channel import Channel, Kind
from crossdock.kvtransfer.ticket import new_incarnation
from crossdock.kvtransfer.transport import HandleState
from crossdock.proto.errors import TransferFailed


def runs(*pairs: tuple[int, int], region: int = 0) -> bytes:
    return np.array([(region, *pair) for pair in pairs], dtype="<i8").tobytes()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (runs((NUM_BLOCKS, 1)), "the pool has 64"),
        (runs((0, NUM_BLOCKS + 1)), "the pool has 64"),
        (runs((1, NUM_BLOCKS)), "64 blocks from 1"),
        (runs((-1, 2)), "2 blocks from -1"),
        (runs((0, 0)), "0 blocks"),
        (runs((0, 1), (5, -3)), "-3 blocks from 5"),
        (runs((2**63 - 1, 1)), "the pool has 64"),
        (runs((1, 2**63 - 1)), "the pool has 64"),
        (runs(*[(0, 1)] * (NUM_BLOCKS + 1)), "65 runs"),
        (runs((0, 1), region=1), "region 1, the pool has 1"),
        (runs((0, 1), region=-1), "region -1, the pool has 1"),
        (b"odd", "3 bytes"),
    ],
)
def test_a_read_outside_the_pool_is_refused_and_harms_nobody(
    pair: tuple[Worker, Worker], body: bytes, why: str
) -> None:
    reader, owner = pair
    wicked = Reader(owner)
    answer = wicked.ask(Kind.READ, body)
    assert answer.kind == Kind.REFUSED
    assert why in answer.body.decode()
    # The same connection is served, and so are others.
    assert wicked.ask(Kind.FENCE, messages.pack_fence(b"", [3])).kind == Kind.GENERATIONS
    assert reader.reads_again(owner)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x05abc",
        b"\x00\x01",
        messages.pack_fence(b"ticket", [NUM_BLOCKS]),
        messages.pack_fence(b"ticket", [-1]),
        messages.pack_fence(b"ticket", [2**62, 0]),
    ],
)
def test_a_fence_outside_the_pool_is_refused_and_releases_nothing(
    pair: tuple[Worker, Worker], body: bytes
) -> None:
    _, owner = pair
    wicked = Reader(owner)
    assert wicked.ask(Kind.FENCE, body).kind == Kind.REFUSED
    assert owner.transport.notifications() == []
    answer = wicked.ask(Kind.FENCE, messages.pack_fence(b"ticket", [3, 2]))
    assert messages.parse_generations(answer.body).tolist() == [103, 102]
    assert owner.transport.notifications() == [b"ticket"]


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.SENDING, Kind.GENERATIONS, 99, Kind.MEET])
def test_nonsense_ends_the_connection_that_it_came_on(
    pair: tuple[Worker, Worker], kind: int
) -> None:
    reader, owner = pair
    wicked = Reader(owner)
    with pytest.raises(TransferFailed, match=r"ended it|gone"):
        wicked.ask(kind, b"nonsense")
    assert reader.reads_again(owner)


def test_an_endless_message_is_not_waited_for(pair: tuple[Worker, Worker]) -> None:
    _, owner = pair
    wicked = Reader(owner)
    wicked.channel.socket.send(b"\x04" + b"\0" * 8 + b"\xff\xff\xff\xff")
    with pytest.raises(TransferFailed, match="4294967295 bytes"):
        until(lambda: wicked.frames())


def test_an_owner_that_answers_what_nobody_asked_loses_its_reader(
    pair: tuple[Worker, Worker],
) -> None:
    reader, owner = pair
    for kind in (Kind.SENDING, Kind.GENERATIONS, Kind.REFUSED, Kind.FENCE):
        until(lambda: reader.reads_again(owner))
        before = link_of(reader, owner)
        lie(owner, kind, 10_000)
        until(lambda before=before: before not in reader.transport._links)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("kind", "body"), [(Kind.GENERATIONS, b""), (Kind.REFUSED, b"late"), (Kind.SENDING, b"")]
)
def test_an_answer_that_does_not_fit_its_question_fails_the_handle(
    pair: tuple[Worker, Worker], kind: Kind, body: bytes
) -> None:
    """To a read whose receives are posted."""
    reader, owner = pair
    read = post_and_hang(reader, owner)
    number = next(iter(link_of(reader, owner).requests))
    lie(owner, kind, number, body)
    assert settled(read) == [HandleState.FAILED]
    assert f"request {number}" in str(read.error)
    assert reader.nccl.made[-1].aborted


@pytest.mark.parametrize(
    ("body", "why"), [(bytes(9), "9 bytes"), (bytes(16), "other generations than asked for")]
)
def test_generations_of_another_number_fail_the_fence(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[Worker, Worker], body: bytes, why: str
) -> None:
    reader, owner = pair
    monkeypatch.setattr(messages, "pack_generations", lambda generations: body)
    fence = reader.transport.read_generations(owner.incarnation, [1], b"")
    assert settled(fence) == [HandleState.FAILED]
    assert why in str(fence.error)


def test_another_clusters_key_is_refused_by_both(pair: tuple[Worker, Worker]) -> None:
    _, owner = pair
    with pytest.raises(TransferFailed, match="does not know this cluster's key"):
        Reader(owner, key=b"another cluster's")
    stranger = Pool("nccl", key=b"another cluster's")
    with pytest.raises(TransferFailed, match="does not know this cluster's key"):
        stranger.transport.add_peer(
            owner.incarnation, owner.transport.info(), NUM_BLOCKS, BLOCK_BYTES
        )
    stranger.close()
    until(lambda: owner.links == 1)


def test_a_listener_asks_for_the_proof(pair: tuple[Worker, Worker]) -> None:
    """A dialer that skips it, or sends a wrong one, gets nothing."""
    _, owner = pair

    class Trusting(Channel):
        def _proves(self, mac: bytes, role: bytes) -> bool:
            return True

    (_, address), *_ = messages.parse_info(owner.transport.info(), owner.incarnation)
    sock = socket.create_connection(address[:2], timeout=WAIT_S)
    sock.setblocking(False)
    wicked = Trusting(sock, b"a guess", new_incarnation(), owner.incarnation)
    wicked.send(Kind.FENCE, 7, messages.pack_fence(b"ticket", [3]))
    with pytest.raises(TransferFailed, match="does not know this cluster's key"):
        until(lambda: wicked.pump())
    assert owner.transport.notifications() == []


def test_an_address_that_is_another_workers_now_is_refused(pair: tuple[Worker, Worker]) -> None:
    reader, owner = pair
    gone = new_incarnation()
    info = owner.transport.info().replace(owner.incarnation, gone)
    with pytest.raises(TransferFailed, match=f"now that of {owner.incarnation.hex()}"):
        reader.transport.add_peer(gone, info, NUM_BLOCKS, BLOCK_BYTES)
    assert settled(reader.transport.read_blocks(gone, [0], [0])) == [HandleState.FAILED]


def test_strangers_are_few_and_do_not_stay(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[Worker, Worker]
) -> None:
    monkeypatch.setattr(nccl_link, "HANDSHAKE_S", 1.5)
    reader, owner = pair
    (_, address), *_ = messages.parse_info(owner.transport.info(), owner.incarnation)
    silent = [socket.create_connection(address[:2]) for _ in range(80)]
    noisy = socket.create_connection(address[:2])
    noisy.send(b"GET / HTTP/1.1\r\n\r\n" * 100)
    until(lambda: owner.links > 30)
    assert owner.links <= 65
    assert reader.reads_again(owner)
    until(lambda: owner.links == 1)
    for each in (*silent, noisy):
        each.close()


def test_a_key_is_needed() -> None:
    with pytest.raises(TransferFailed, match="key"):
        Pool("nccl", key=b"")
