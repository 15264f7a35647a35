"""The end of a history: no more faults, and everything must come to its end, by work or by time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protocol_front import Gateway

if TYPE_CHECKING:
    from protocol_sim import Simulation

LEASE_S = 30.0
TURNS = 4  # of a worker, before the others hear of it


def settle(sim: Simulation) -> None:
    """No more faults: everything must come to its end, by work or by time."""
    sim.network.calm = sim.calls.calm = sim.front.calm = True
    sim.network._failures.clear()
    sim.network._drops = 0
    sim.paused.clear()
    for worker in sim.workers:  # or a cluster that drains as a whole never ends
        worker.host.post(lambda role: setattr(role, "draining", False))
    for gateway in sim.front.gateways:
        sim.front.tell(gateway)
    sim.log("the faults stop")
    settle_now(sim)
    for worker in sim.workers:
        worker.host.beat()
    for _ in range(200):
        settle_now(sim)
        if over(sim):
            break
        for worker in sim.workers:
            worker.host.renew()
        pass_time(sim)
    for client in sim.front.clients:
        assert len(client.ends) == 1, f"a request ended so: {client.ends}"
    for gateway in sim.front.gateways:
        check_gateway(sim, gateway)
    for worker in sim.workers:
        role = worker.role
        assert role.idle and not role.leases(), f"{role.state.config.name} still holds work"
        used = role.state.pool.num_used
        assert not used, f"{role.state.config.name} still holds {used} blocks"


def check_gateway(sim: Simulation, gateway: Gateway) -> None:
    assert gateway.idle, f"{gateway.name} still holds something of a request"
    for wire in gateway.wires:
        assert not wire.link.sequences, f"{wire.link.name} still has a sequence"
        if not wire.link.usable:
            continue  # it retires with the worker's next frame
        found = gateway.view.workers[wire.link.name]
        pool = sim.front.resident(wire.link.endpoint.address).role.state.pool
        told = gateway.view.index.held(found.slot)
        assert told == {name for _, name in pool.snapshot()[1]}, "the prefix index is wrong"


def pass_time(sim: Simulation) -> None:
    """To the next moment at which something happens by itself."""
    ends = [worker.role.next_deadline() for worker in sim.workers]
    ends += [gateway.timers.next_at() for gateway in sim.front.gateways]
    now = sim.clock.now
    next_end = min((end for end in ends if end is not None), default=1e9)
    sim.clock.now = min(max(next_end, now + 0.1), now + LEASE_S / 3)
    sim.front.fire_due(everybody=True)


def settle_now(sim: Simulation) -> None:
    """All that can happen at this time."""
    for turn in range(400):
        if not settle_once(sim):
            break
        if turn % 4 == 0:
            sim.check()
    for worker in sim.workers:
        sim.turn_of(worker, slept=True)  # so nothing may come of it
    sim.check()


def settle_once(sim: Simulation) -> bool:
    """All that can happen at this time, once. False: nothing did."""
    front = sim.front
    moved = sim.network.deliver() > 0
    while sim.network.deliver_late():
        moved = True
    while sim.calls.meetings:
        sim.calls.meetings.pop(0)[2]()
        moved = True
    for gateway in front.gateways:
        for wire in front.undialled(gateway):
            wire.dial()
            moved = True
    for stream in list(front.streams):
        while stream.inbox:
            sim.receive(stream)
            moved = True
    nothing_forgotten(sim)
    for worker in sim.workers:
        for _ in range(TURNS):
            if not worker.host.awake:
                break
            sim.turn_of(worker)
            moved = True
    for call in sim.calls.take_all():
        sim.calls.arrives(call)
        moved = True
    for stream in front.audible():
        while stream.audible:
            front.hear(stream)
            moved = True
    moved |= front.fire_due()
    front.prune()
    return moved


def nothing_forgotten(sim: Simulation) -> None:
    """All that gateways have sent has arrived: no worker goes on with what is over."""
    streams = {s.side.owner: s for s in sim.front.streams if s.side is not None}
    for worker in sim.workers:
        if worker.loop._commands:
            continue
        for job in worker.role.jobs.values():
            assert job.owner in worker.host.gateways._streams, "a job outlived its stream"
            stream = streams[job.owner]
            sequences = stream.wire.gateway.dispatcher._sequences
            known = job.id in sequences or stream.outbox or stream.ended
            assert known, "a worker was not told of an end"


def over(sim: Simulation) -> bool:
    return all(client.ends for client in sim.front.clients) and all(
        worker.role.idle for worker in sim.workers
    )
