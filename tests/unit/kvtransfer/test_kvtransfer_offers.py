"""Offers: whatever ends a lease, its blocks come back once."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from crossdock.kvtransfer.offers import Exit, Offers, OfferSettings
from crossdock.kvtransfer.ticket import new_incarnation, verify
from crossdock.proto.v1.worker_pb2 import Ticket

KEY = b"key"


class Side:
    """A prefill side with a virtual clock and a list of what was freed."""

    def __init__(self, lease_s: float = 30.0) -> None:
        self.now = 1000.0
        self.freed: list[list[int]] = []
        self.settings = OfferSettings("p0", "h:1", new_incarnation(), b"l" * 16, KEY, lease_s)
        self.offers = Offers(lambda: self.now, self.settings, self.freed.append)

    def offer(self, first: int, sequence: str = "s", owner: str = "gateway") -> Ticket:
        ids = [first, first + 1]
        ticket = self.offers.announce(ids, [7, 8], num_tokens=20, prompt_hash=b"p" * 16)
        self.offers.offer(ticket, sequence, owner)
        return ticket


@pytest.fixture
def side() -> Side:
    return Side()


def test_an_offer_is_a_signed_ticket_and_an_open_lease(side: Side) -> None:
    ticket = side.offer(4)
    verify(ticket, KEY)
    assert (list(ticket.block_ids), list(ticket.generations)) == ([4, 5], [7, 8])
    assert (ticket.prefill_worker, ticket.incarnation) == ("p0", side.settings.incarnation)
    assert ticket.lease_ms == 30_000
    [lease] = side.offers.open()
    assert (lease.sequence_id, lease.owner, lease.deadline) == ("s", "gateway", 1030.0)
    assert side.offers.held() == [(4, 5)]
    assert side.freed == []


def test_release_frees_once_and_later_ones_are_no_error(side: Side) -> None:
    ticket = side.offer(4)
    assert side.offers.release([ticket.ticket_id, b"never given out"]) == 1
    assert side.offers.release([ticket.ticket_id]) == 0
    assert side.freed == [[4, 5]]
    assert side.offers.exits == {Exit.RELEASED: 1, Exit.EXPIRED: 0, Exit.REVOKED: 0}


def test_the_reaper_frees_what_is_over_and_nothing_else(side: Side) -> None:
    first = side.offer(0)
    side.now += 10.0
    second = side.offer(2)
    assert side.offers.next_deadline() == 1030.0
    side.now = 1029.999
    assert side.offers.reap() == []
    side.now = 1030.0
    assert [lease.ticket_id for lease in side.offers.reap()] == [first.ticket_id]
    assert side.freed == [[0, 1]]
    assert side.offers.next_deadline() == 1040.0
    assert side.offers.release([first.ticket_id]) == 0  # late: the blocks are somebody else's now
    assert side.freed == [[0, 1]]
    side.offers.release([second.ticket_id])
    assert side.offers.next_deadline() is None
    assert side.offers.exits[Exit.EXPIRED] == 1


def test_renewal_extends_but_never_shortens_and_is_bounded(side: Side) -> None:
    ticket = side.offer(0)
    side.now += 20.0
    assert side.offers.renew([ticket.ticket_id, b"?"], 25.0) == [b"?"]
    assert side.offers.next_deadline() == 1045.0
    side.offers.renew([ticket.ticket_id], 1.0)
    side.offers.renew([ticket.ticket_id], -5.0)
    assert side.offers.next_deadline() == 1045.0
    side.offers.renew([ticket.ticket_id], 1e9)
    assert side.offers.next_deadline() == 1020.0 + side.settings.max_renewal_s


def test_a_lost_owner_or_a_cancelled_sequence_gives_its_blocks_back(side: Side) -> None:
    side.offer(0, "a", "g1")
    side.offer(2, "b", "g1")
    side.offer(4, "c", "g2")
    assert side.offers.revoke_sequence("b", "g2") == 0
    assert side.offers.revoke_sequence("b", "g1") == 1
    assert side.offers.revoke_owner("g1") == 1
    assert side.offers.revoke_owner("g1") == 0
    assert side.freed == [[2, 3], [0, 1]]
    assert side.offers.revoke_owner("g2") == 1
    assert len(side.offers) == 0
    assert side.offers.exits[Exit.REVOKED] == 3


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_exits_frees_each_block_exactly_once(seed: int) -> None:
    rng = random.Random(seed)
    side = Side(lease_s=5.0)
    tickets = [side.offer(2 * index, f"s{index % 7}", f"g{index % 3}") for index in range(50)]
    while len(side.offers):
        side.now += rng.random()
        some = [ticket.ticket_id for ticket in rng.sample(tickets, 3)]
        act = rng.choice(["release", "renew", "reap", "sequence", "owner"])
        if act == "release":
            side.offers.release(some)
        elif act == "renew":
            side.offers.renew(some, rng.random() * 3)
        elif act == "reap":
            side.offers.reap()
        elif act == "sequence":
            side.offers.revoke_sequence(f"s{rng.randrange(9)}", f"g{rng.randrange(3)}")
        elif rng.random() < 0.1:
            side.offers.revoke_owner(f"g{rng.randrange(4)}")
        freed = Counter(block for blocks in side.freed for block in blocks)
        held = Counter(block for blocks in side.offers.held() for block in blocks)
        assert freed + held == Counter(range(100))
    assert sum(side.offers.exits.values()) == 50
