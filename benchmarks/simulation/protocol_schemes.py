"""Conjunctions that chance makes too rarely, brought about where a history is ready for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protocol_settle import LEASE_S
from roles_kit import Worker

from crossdock.proto.types import Role

if TYPE_CHECKING:
    from protocol_sim import Simulation


def work(sim: Simulation, worker: Worker, turns: int) -> None:
    """It takes all that was sent to it and turns over, and what it says is heard."""
    streams = [stream for stream in sim.front.streams if stream.worker is worker]
    for stream in streams:
        while stream.inbox:
            sim.receive(stream)
    for _ in range(turns):
        if not sim.turn_of(worker):
            break
    for stream in streams:
        while stream.audible:
            sim.front.hear(stream)


def slow_reads(sim: Simulation) -> None:
    """A prompt comes in and is computed, and decode workers go on, while nothing is read."""
    able = [worker for worker in sim.workers if worker not in sim.paused]
    decodes = [worker for worker in able if worker.host.config.role is Role.DECODE]
    busy = any(worker.role.load().running for worker in decodes)
    if len(sim.front.clients) > 6 or not (busy or sim.rng.random() < 0.3):
        return
    sim.network.hold()
    sim.front.new_request(anyway=True)
    for _ in range(sim.rng.choice([1, 2, 4])):
        for worker in able:
            if worker not in decodes:
                work(sim, worker, turns=1)
        for worker in decodes:
            work(sim, worker, turns=40)
    what = sim.rng.random()
    if what < 0.5:
        sim.network.deliver()
    elif what < 0.6:
        sim.advance(LEASE_S + 1)


def blocks_reused(sim: Simulation) -> None:
    """What a prefill worker has offered is gone, by its death or its gateway's, and others are
    in those blocks before its readers have come to read, or have read."""
    prefills = [seat for seat in sim.seats if seat.role is Role.PREFILL]
    offering = [
        seat for seat in prefills if seat.worker.role.leases() and seat.worker not in sim.paused
    ]
    if not offering:
        return
    seat = sim.rng.choice(offering)
    if sim.rng.random() < 0.5:
        sim.kill(seat, same=True)
    else:
        sim.network.hold()
        for worker in sim.workers:
            if worker.host.config.role is Role.DECODE and worker not in sim.paused:
                work(sim, worker, turns=2)
        for stream in sim.front.streams:
            if stream.worker is seat.worker:
                stream.end()
        work(sim, seat.worker, turns=1)
        welcome(sim, seat.worker)
    sim.front.new_request(anyway=True)
    work(sim, seat.worker, turns=16)


def welcome(sim: Simulation, worker: Worker) -> None:
    """All gateways learn of it, and connect, at once."""
    for gateway in sim.front.gateways:
        sim.front.tell(gateway)
        for wire in sim.front.undialled(gateway):
            if wire.link.endpoint == worker.host.endpoint:
                wire.dial()
    work(sim, worker, turns=1)
