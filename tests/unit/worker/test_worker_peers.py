"""Whom a worker may pull from, without a network."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from crossdock.proto.errors import TransferFailed
from crossdock.proto.types import Role, WorkerEndpoint
from crossdock.proto.v1 import worker_pb2
from crossdock.worker.peers import Met, Peers, Renewed

ONE, OTHER = b"1" * 16, b"2" * 16
WELL = worker_pb2.WorkerDescription(name="p", incarnation=ONE)


class Calls:
    """Notes what is asked; the test answers."""

    def __init__(self) -> None:
        self.meetings: list[Callable[[Met], None]] = []
        self.forgotten: list[bytes] = []
        self.renewals: list[tuple[str, list[bytes], Callable[[Renewed], None]]] = []

    def introduce(self, incarnation: bytes, address: str, done: Callable[[Met], None]) -> None:
        self.meetings.append(done)

    def forget(self, incarnation: bytes) -> None:
        self.forgotten.append(incarnation)

    def renew(
        self, address: str, ids: list[bytes], lease_s: float, done: Callable[[Renewed], None]
    ) -> None:
        self.renewals.append((address, ids, done))

    def release(self, address: str, ids: list[bytes]) -> None:
        pass


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def peers(calls: Calls) -> Peers:
    return Peers(calls, lambda: 100.0)


def test_all_who_ask_at_once_share_a_meeting(peers: Peers, calls: Calls) -> None:
    told: list[Met] = []
    peers.ensure(ONE, "h:1", told.append)
    peers.ensure(ONE, "h:1", told.append)
    (done,) = calls.meetings
    done(WELL)
    peers.ensure(ONE, "h:1", told.append)  # known: no other call
    assert told == [WELL] * 3 and len(calls.meetings) == 1


def test_a_failed_meeting_is_not_held_against_the_peer(peers: Peers, calls: Calls) -> None:
    """Also where nobody waits for it any more; the next one finds the peer well."""
    told: list[Met] = []
    peers.ensure(ONE, "h:1", lambda met: None)
    calls.meetings[0](TransferFailed("busy"))
    peers.ensure(ONE, "h:1", told.append)
    calls.meetings[1](WELL)
    assert told == [WELL]


def test_who_leaves_while_it_is_met_fails_those_that_wait(peers: Peers, calls: Calls) -> None:
    told: list[Met] = []
    peers.ensure(ONE, "h:1", told.append)
    peers.update([WorkerEndpoint("p", "pool", Role.PREFILL, "h:2", OTHER.hex())])
    assert isinstance(told[0], TransferFailed) and calls.forgotten == [ONE]
    calls.meetings[0](WELL)  # too late
    peers.ensure(ONE, "h:1", told.append)
    assert len(told) == 1 and len(calls.meetings) == 3  # of one, of the other, of one again


def test_each_peer_answers_for_its_own_leases(peers: Peers, calls: Calls) -> None:
    """One that hangs keeps nobody else's answer back, and its tickets stay as they were."""
    told: list[tuple[set[bytes], set[bytes], float]] = []
    peers.renew(
        [("h:1", b"a"), ("h:2", b"b"), ("h:1", b"c")], 30.0, lambda *answer: told.append(answer)
    )
    (_, asked, first), (_, _, second) = calls.renewals
    assert asked == [b"a", b"c"] and not told
    first(worker_pb2.RenewLeasesResponse(unknown_ticket_ids=[b"c"]))
    second(TransferFailed("h:2 does not answer"))
    assert told == [({b"a"}, {b"c"}, 130.0)]
