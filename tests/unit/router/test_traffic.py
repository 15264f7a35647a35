"""What a gateway counts for whoever sizes the pools."""

from __future__ import annotations

from gateway_rig import Rig, ask, collect, until

from crossdock.proto.v1 import worker_pb2 as wpb
from crossdock.router.dispatch.traffic import Traffic

PROMPT = list(range(10, 80))


async def test_a_gateway_counts_what_came_and_how_it_was_served(rig: Rig) -> None:
    for _ in range(2):
        await collect(rig.stub.Generate(ask(PROMPT, max_tokens=5)))
    await collect(rig.stub.Generate(ask(PROMPT, n=2, max_tokens=3)))
    await until(lambda: rig.idle)
    ((key, seen),) = rig.gateway.traffic.items()
    assert key == ""
    assert (seen.arrived, seen.refused, seen.started, seen.finished) == (4, 0, 4, 4)
    assert (seen.ttft_met, seen.tpot_met) == (4, 4)
    assert seen.generated_tokens == 5 + 5 + 3 + 3
    assert seen.prompt_tokens == 4 * len(PROMPT)
    assert 0 < seen.uncached_squares <= 4 * len(PROMPT) ** 2


async def test_a_restart_elsewhere_is_no_second_arrival(rig: Rig) -> None:
    rig.prefills[0].refusals.append(wpb.ERROR_CODE_DRAINING)
    await collect(rig.stub.Generate(ask(PROMPT, max_tokens=5)))
    seen = rig.gateway.traffic[""]
    assert (seen.arrived, seen.started, seen.finished) == (1, 1, 1)


async def test_what_has_no_token_yet_is_not_started(rig: Rig) -> None:
    for worker in rig.prefills:
        worker.token_0.clear()
    call = rig.stub.Generate(ask(PROMPT, max_tokens=5))
    await until(lambda: any(worker.prefills for worker in rig.prefills))
    seen = rig.gateway.traffic[""]
    assert (seen.arrived, seen.started) == (1, 0)
    call.cancel()
    await until(lambda: rig.idle)
    assert rig.gateway.traffic[""].refused == 0  # it was the client who gave up


async def test_a_deadline_that_passes_before_token_0_counts_as_refused(rig: Rig) -> None:
    for worker in rig.prefills:
        worker.token_0.clear()
    dispatcher = rig.only.dispatcher
    call = rig.stub.Generate(ask(PROMPT, max_tokens=5), timeout=60)
    await until(lambda: dispatcher._requests)
    (active,) = dispatcher._requests
    dispatcher._deadline_passed(active)
    seen = rig.gateway.traffic[""]
    assert (seen.arrived, seen.refused, seen.started) == (1, 1, 0)
    call.cancel()


def test_counts_are_added_and_taken_from_each_other() -> None:
    one, two = Traffic(arrived=3, started=2), Traffic(arrived=5, started=4, ttft_met=1)
    assert one + two == Traffic(arrived=8, started=6, ttft_met=1)
    assert two.since(one) == Traffic(arrived=2, started=2, ttft_met=1)
    assert one.since(two) == one  # counting has begun anew
