"""What gateways keep on a worker: how long, and how much of whom."""

from __future__ import annotations

import random
from pathlib import Path
from unittest.mock import Mock

from worker_kit import config

from crossdock.kvcache.block_pool import BlockPool
from crossdock.proto.types import Role
from crossdock.worker.metrics import WorkerCollector
from crossdock.worker.role import Counters
from crossdock.worker.states import EXPIRE_S, OVERHEAD_BYTES, Bounds, States

EACH = 100 + OVERHEAD_BYTES
DATA = b"x" * 100


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def bounds(ttl_s: float = 60.0, tenant: int = 10, all_: int = 100) -> Bounds:
    """Room in entries of DATA."""
    return Bounds(ttl_s, tenant * EACH, all_ * EACH)


def test_an_entry_is_its_tenants_alone() -> None:
    states = States()
    assert states.store("a", "resp_1", DATA, bounds())
    assert states.fetch("a", "resp_1") == DATA
    assert states.fetch("b", "resp_1") is None
    assert not states.drop("b", "resp_1", bounds())
    assert states.fetch("a", "resp_1") == DATA
    assert states.drop("a", "resp_1", bounds()) and not states.drop("a", "resp_1", bounds())
    assert states.fetch("a", "resp_1") is None


def test_what_was_dropped_stays_so_for_its_time() -> None:
    states = States(clock := Clock())
    assert not states.dropped("a", "1")
    states.drop("a", "1", bounds(ttl_s=10))
    assert states.dropped("a", "1") and not states.dropped("b", "1")
    assert not states.store("a", "1", DATA, bounds()) and states.fetch("a", "1") is None
    assert states.held == OVERHEAD_BYTES
    clock.now = 10
    assert not states.dropped("a", "1")
    assert states.store("a", "1", DATA, bounds()) and states.fetch("a", "1") == DATA
    assert states.held == EACH


def test_what_was_dropped_is_remembered_longer_than_anything_is_kept() -> None:
    states = States()
    states.drop("a", "gone", bounds(tenant=2))
    for i in range(9):
        states.store("a", str(i), DATA, bounds(tenant=2))
    assert states.dropped("a", "gone") and states.fetch("a", "8") == DATA
    for i in range(9):
        states.drop("a", f"gone {i}", bounds(tenant=2))
    assert not states.dropped("a", "gone") and states.dropped("a", "gone 8")
    assert states.held <= 2 * EACH


def test_it_is_forgotten_also_where_there_is_no_room_to_remember_that() -> None:
    states = States()
    states.store("a", "1", DATA, bounds())
    assert states.drop("a", "1", Bounds(0.0, 0, 0))
    assert states.fetch("a", "1") is None and states.held == 0


def test_all_that_is_held_can_be_kept_on_elsewhere() -> None:
    states, other = States(clock := Clock()), States()
    states.store("a", "1", DATA, bounds(ttl_s=10))
    states.store("b", "over", DATA, bounds(ttl_s=3))
    states.drop("b", "2", bounds(ttl_s=20))
    clock.now = 4
    held = {(each.tenant, each.id_): each for each in states.all()}
    assert {key: each.data for key, each in held.items()} == {("a", "1"): DATA, ("b", "2"): None}
    assert [each.bounds.ttl_s for each in held.values()] == [6, 16]
    assert other.store("a", "1", DATA, held["a", "1"].bounds)


def test_who_holds_the_most_is_known_without_a_look_at_all() -> None:
    states, draw = States(), random.Random(1)
    for i in range(3000):
        tenant = f"t{draw.randrange(300)}"
        data = b"x" * draw.randrange(200)
        states.store(tenant, str(i), data, Bounds(60.0, 20 * EACH, 400 * EACH))
        states.drop(f"t{draw.randrange(300)}", str(draw.randrange(i + 1)), Bounds(0.0, 0, 0))
        largest = states._shelves[states._largest()]
        assert largest.size == max(shelf.size for shelf in states._shelves.values())
        assert len(states._by_size) <= 2 * len(states._shelves) + 101
    assert 390 * EACH < states.held <= 400 * EACH


def test_an_entry_is_kept_for_its_time() -> None:
    states = States(clock := Clock())
    states.store("a", "short", DATA, bounds(ttl_s=10))
    states.store("a", "long", DATA, bounds(ttl_s=20))
    clock.now = 9.9
    assert states.fetch("a", "short") == DATA
    clock.now = 10.0
    assert states.fetch("a", "short") is None
    clock.now = 9.9 + EXPIRE_S
    assert states.fetch("a", "long") == DATA and states.held == EACH
    clock.now = 20.0
    assert states.fetch("a", "long") is None and states.held == 0


def test_what_is_stored_again_counts_once() -> None:
    states = States()
    states.store("a", "1", DATA, bounds())
    states.store("a", "1", b"new", bounds())
    assert states.fetch("a", "1") == b"new" and states.held == 3 + OVERHEAD_BYTES


def test_a_tenants_oldest_make_room_for_its_own() -> None:
    states = States()
    states.store("b", "0", DATA, bounds(tenant=2))
    for i in range(4):
        assert states.store("a", str(i), DATA, bounds(tenant=2))
    assert [states.fetch("a", str(i)) is not None for i in range(4)] == [False, False, True, True]
    assert states.fetch("b", "0") == DATA and states.held == 3 * EACH


def test_who_holds_the_most_makes_room_where_all_is_taken() -> None:
    states = States()
    for i in range(3):
        states.store("a", str(i), DATA, bounds(all_=4))
    for i in range(2):
        assert states.store("b", str(i), DATA, bounds(all_=4))
    assert states.fetch("a", "0") is None and states.fetch("a", "1") == DATA
    assert states.fetch("b", "0") == states.fetch("b", "1") == DATA and states.held == 4 * EACH


def test_what_no_room_is_ever_large_enough_for_is_not_kept() -> None:
    states = States()
    assert not states.store("a", "1", DATA * 20, bounds(tenant=2))
    assert states.fetch("a", "1") is None and states.held == 0


def test_the_page_of_metrics_says_how_much_is_kept(tiny_model: Path) -> None:
    role = Mock(jobs={})
    role.state.counters, role.state.config = Counters(), config("p", Role.PREFILL, tiny_model)
    role.state.pool = BlockPool(4, 16)
    states = States()
    states.store("a", "1", DATA, bounds())
    found = {
        metric.name: metric
        for metric in WorkerCollector(lambda: role, lambda: states.held).collect()
    }
    assert found["crossdock_worker_kept_bytes"].samples[0].value == EACH


def test_what_is_remembered_of_deletions_leaves_room_for_what_is_kept() -> None:
    states = States()
    room = Bounds(60.0, 64 * EACH, 1000 * EACH)
    for i in range(500):
        states.drop("a", f"never_{i}", room)
    assert states.store("a", "resp", DATA, room) and states.fetch("a", "resp") == DATA
    assert states.dropped("a", "never_499") and not states.dropped("a", "never_0")
    assert states.held <= 64 * EACH // 8 + EACH
