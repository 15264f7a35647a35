"""Whether a worker would begin another sequence, and a cluster another request."""

from __future__ import annotations

import pytest

from crossdock.proto.types import Role
from crossdock.router.placement import room
from crossdock.router.placement.room import has_room, takes_more
from crossdock.router.placement.view import ClusterView
from crossdock.router.placement.workers import LoadReport, WorkerFacts


def facts(name: str, role: Role, **more: int) -> WorkerFacts:
    plain = {"num_blocks": 1000, "block_size": 16, "block_bytes": 1}
    return WorkerFacts(name=name, role=role, incarnation=name, **(plain | more))


@pytest.mark.parametrize(
    ("role", "load", "room"),
    [
        (Role.PREFILL, {"queued_tokens": 1023}, True),
        (Role.PREFILL, {"queued_tokens": 1024}, False),
        (Role.DECODE, {"running": 8, "waiting": 1}, True),
        (Role.DECODE, {"running": 8, "waiting": 2}, False),
        (Role.DECODE, {"running": 3, "waiting": 2}, False),
        (Role.COLOCATED, {"queued_tokens": 1024}, False),
        (Role.COLOCATED, {"running": 10}, False),
        (Role.COLOCATED, {"running": 9, "queued_tokens": 1023}, True),
    ],
)
def test_what_a_worker_takes(role: Role, load: dict[str, int], room: bool) -> None:
    view = ClusterView()
    worker = view.connected(facts("w", role, chunk_tokens=512, max_batch=8), 0.0)
    view.reported(worker, LoadReport(**load), 0.0)
    assert takes_more(worker, 0.0) is room


def test_room_is_on_a_whole_path() -> None:
    view = ClusterView()
    assert has_room(view, 0.0), "to wait for workers is not to wait for a turn"
    prefill = view.connected(facts("p", Role.PREFILL, chunk_tokens=512), 0.0)
    view.connected(facts("d", Role.DECODE, max_batch=8), 0.0)
    assert has_room(view, 0.0)
    view.place("p", "s1", 600, 4)
    assert has_room(view, 0.0)
    view.place("p", "s2", 600, 4)
    assert not has_room(view, 0.0), "what was sent since the last report counts"
    view.connected(facts("c", Role.COLOCATED, max_batch=8, chunk_tokens=512), 0.0)
    assert has_room(view, 0.0)
    assert prefill.queued_tokens == 1200


def test_of_many_workers_those_after_the_first_with_room_are_not_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    view, looked = ClusterView(), list[str]()
    for role in (Role.PREFILL, Role.DECODE):
        for number in range(200):
            view.connected(facts(f"{role}-{number}", role, chunk_tokens=512, max_batch=8), 0.0)
    view.place("prefill-0", "s", 2000, 4)
    real = room.takes_more
    monkeypatch.setattr(
        room, "takes_more", lambda worker, *how: looked.append(worker.name) or real(worker, *how)
    )
    assert has_room(view, 0.0)
    assert looked == ["prefill-0", "prefill-1", "decode-0"]


def test_stale_workers_count_where_there_are_no_others() -> None:
    view = ClusterView()
    view.connected(facts("p", Role.PREFILL, chunk_tokens=512), 0.0)
    view.connected(facts("d", Role.DECODE, max_batch=8), 0.0)
    view.place("p", "s", 2000, 4)
    assert not has_room(view, 1000.0)
    fresh = view.connected(facts("q", Role.PREFILL, chunk_tokens=512), 1000.0)
    assert has_room(view, 1000.0)
    view.reported(fresh, LoadReport(draining=True), 1000.0)
    assert not has_room(view, 1000.0)
