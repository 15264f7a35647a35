"""The hand-off between the two roles, every token checked against an undisturbed run."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest
from handoff_kit import PROMPT, all_free, hand_off, pair, prefill, tokens_of
from roles_kit import CONTEXT, Site, job, undisturbed

from crossdock.proto.types import Role
from crossdock.proto.v1 import inference_pb2, worker_pb2


def test_handed_off_tokens_are_the_undisturbed_ones(site: Site) -> None:
    p, d = pair(site)
    first = prefill(p, PROMPT)
    assert list(first.progress.ticket.block_ids) and first.progress.ticket.num_tokens == len(PROMPT)
    hand_off(d, PROMPT, first)
    d.turn(12)
    outputs = d.take()
    assert tokens_of([first, *outputs]) == undisturbed(PROMPT, 8)
    assert outputs[-1].finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert outputs[0].transfer.blocks == len(first.progress.ticket.block_ids) == 7
    assert outputs[0].transfer.bytes == 7 * p.transport.memory.block_bytes
    assert outputs[0].transfer.recomputed_tokens == d.role.state.counters.recomputed_tokens == 0
    events = [name for name, _ in outputs[0].times.ListFields()]
    assert [field.name for field in events] == [
        *("decode_queued", "reserved", "pulled", "fenced", "joined")
    ]
    all_free(p, d)


def test_a_second_turn_moves_only_what_decode_lacks(site: Site) -> None:
    p, d = pair(site)
    first = prefill(p, PROMPT)
    hand_off(d, PROMPT, first)
    d.turn(12)
    longer = PROMPT + tokens_of([first, *d.take()]) + [5] * 10
    first = prefill(p, longer)
    assert first.cached_tokens == 48
    hand_off(d, longer, first)
    d.turn(12)
    outputs = d.take()
    assert tokens_of([first, *outputs]) == undisturbed(longer, 8)
    # 57 tokens of the first turn had KV here: 7 full blocks of the 9.
    assert outputs[0].transfer.blocks == 9 - 7
    all_free(p, d)


def test_a_token_that_ends_the_sequence_needs_no_ticket(site: Site) -> None:
    p = site.worker(Role.PREFILL)
    first = prefill(p, PROMPT, max_tokens=1)
    assert first.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert not first.HasField("progress")
    all_free(p)


@pytest.mark.parametrize("failing", ["read", "fence"])
def test_a_ticket_that_failed_is_released_once(
    monkeypatch: pytest.MonkeyPatch, site: Site, failing: str
) -> None:
    """With the fence where that came through, else by a call."""
    p, d = pair(site)
    first = prefill(p, PROMPT)
    released, release = list[bytes](), p.role._offers.release

    def noting_release(ticket_ids: Iterable[bytes]) -> int:
        told = list(ticket_ids)
        released.extend(told)
        return release(told)

    monkeypatch.setattr(p.role._offers, "release", noting_release)
    site.network.hold()
    hand_off(d, PROMPT, first)
    d.turn()
    if failing == "read":
        site.network.fail_next_read()
    p.role.state.pool.generations[first.progress.ticket.block_ids[0]] += 1
    site.network.deliver()
    d.turn(2)
    (output,) = d.take()
    assert output.error.code == worker_pb2.ERROR_CODE_PULL_FAILED
    p.role.release_tickets([ticket_id for _, ticket_id in d.releases])
    assert len(d.releases) == (failing == "read")
    all_free(p, d)
    assert released == [first.progress.ticket.ticket_id]


def test_a_block_rewritten_after_the_offer_is_refused(site: Site) -> None:
    p, d = pair(site)
    first = prefill(p, PROMPT)
    site.network.hold()
    hand_off(d, PROMPT, first)
    d.turn()
    p.role.cancel(first.sequence_id, "another's", owner="another")
    assert p.role.leases()
    p.role.cancel(first.sequence_id, "the gateway gave up", owner="gateway")
    pool = p.role.state.pool
    taken = pool.allocate(pool.num_available)  # every block has a new owner
    site.network.deliver()
    d.turn(2)
    (output,) = d.take()
    assert output.error.code == worker_pb2.ERROR_CODE_PULL_FAILED
    assert "fence refused" in output.error.message
    assert not output.token_ids
    pool.release(taken)
    all_free(p, d)


def test_cancelled_while_pulling_keeps_its_blocks_until_the_read_is_terminal(site: Site) -> None:
    p, d = pair(site)
    first = prefill(p, PROMPT)
    site.network.hold()
    sequence_id = hand_off(d, PROMPT, first)
    d.turn()
    d.role.cancel(sequence_id, "another's", owner="another")
    assert sequence_id in d.role.jobs
    d.role.cancel(sequence_id, "client went away", owner="gateway")
    d.turn()
    assert d.role.state.pool.num_used == 7 and not d.role.jobs
    d.check()
    site.network.deliver()
    d.turn(2)
    assert not d.take() and not d.releases  # the ticket was released with the fence
    all_free(p, d)


def test_what_a_stop_string_ended_is_gone_on_from_to_its_last_token(site: Site) -> None:
    """The gateway finds it, and cancels."""
    d = site.worker(Role.COLOCATED)
    first = job(PROMPT, max_tokens=50)
    d.role.submit(first)
    d.turn(6)
    said = tokens_of(d.take())
    d.role.cancel(first.id, "finished", owner="gateway")
    d.role.submit(job([*PROMPT, *said, 7, 8]))
    d.turn(2)
    assert d.take()[0].cached_tokens == len(PROMPT) + len(said) - 1
    d.turn(40)
    all_free(d)


def test_an_expired_lease_frees_the_blocks_and_fails_the_pull(site: Site) -> None:
    p, d = pair(site)
    first = prefill(p, PROMPT)
    site.network.hold()
    hand_off(d, PROMPT, first)
    d.turn()
    site.clock.now += 31
    p.turn()
    assert p.role.idle
    d.turn()
    (output,) = d.take()
    assert output.error.code == worker_pb2.ERROR_CODE_PULL_FAILED
    site.network.deliver()
    d.turn()
    all_free(p, d)


def test_a_ticket_that_waits_for_blocks_is_renewed_or_fails(site: Site) -> None:
    p = site.worker(Role.PREFILL)
    d = site.worker(Role.DECODE, blocks=8)
    site.introduce(p, d)
    busy = job([9] * 40, max_tokens=20)
    d.role.submit(busy)
    d.turn(2)
    first = prefill(p, PROMPT)
    hand_off(d, PROMPT, first)
    d.turn()
    ((address, ticket_id),) = d.role.waiting_tickets()
    site.clock.now += 20
    assert (address, p.role.renew_tickets([ticket_id], 30.0)) == (p.role.state.address, [])
    d.role.leases_renewed(({ticket_id}, set()), site.clock.now + 30.0)
    site.clock.now += 20
    p.turn()
    d.turn(60)
    outputs = [output for output in d.take() if output.sequence_id != busy.id]
    assert tokens_of([first, *outputs]) == undisturbed(PROMPT, 8)
    all_free(p, d)


def test_a_lost_ticket_fails_its_sequence(site: Site) -> None:
    p = site.worker(Role.PREFILL)
    d = site.worker(Role.DECODE, blocks=8)
    site.introduce(p, d)
    d.role.submit(job([9] * 40, max_tokens=5))
    d.turn(2)
    first = prefill(p, PROMPT)
    waiting = hand_off(d, PROMPT, first)  # no room for it yet
    d.turn()
    d.role.leases_renewed((set(), {first.progress.ticket.ticket_id}), site.clock.now + 30.0)
    d.turn()
    (output,) = [output for output in d.take() if output.sequence_id == waiting]
    assert output.error.code == worker_pb2.ERROR_CODE_PULL_FAILED
    d.turn(10)
    p.role.release_tickets([ticket_id for _, ticket_id in d.releases])
    all_free(p, d)


def test_a_dead_peer_fails_only_its_own_pulls(site: Site) -> None:
    p, d = pair(site)
    other = site.worker(Role.PREFILL)
    site.introduce(other, d)
    lost, kept = prefill(p, PROMPT), prefill(other, PROMPT[::-1])
    site.network.kill(p.role.state.incarnation)
    hand_off(d, PROMPT, lost)
    hand_off(d, PROMPT[::-1], kept)
    d.turn(14)
    outputs = d.take()
    (failed,) = [output for output in outputs if output.HasField("error")]
    assert failed.error.code == worker_pb2.ERROR_CODE_PULL_FAILED
    finished = [output for output in outputs if not output.HasField("error")]
    assert tokens_of([kept, *finished]) == undisturbed(PROMPT[::-1], 8)
    all_free(other, d)


def test_a_lost_gateway_frees_everything_it_had(site: Site) -> None:
    p, d = pair(site)
    prefill(p, PROMPT, owner="dead")
    kept = prefill(p, PROMPT, owner="alive")
    p.role.submit(job(PROMPT, owner="dead"))
    d.role.submit(job([5] * 20, owner="dead"))
    d.turn(2)
    for worker in (p, d):
        worker.role.owner_gone("dead")
        worker.check()
    assert not p.role.jobs and len(p.role.leases()) == 1
    hand_off(d, PROMPT, kept)
    d.turn(12)
    p.turn()
    all_free(p, d)


def test_preempted_work_goes_back_and_continues_with_the_same_tokens(site: Site) -> None:
    d = site.worker(Role.COLOCATED, blocks=10)
    prompts = [[3 + i] * 30 for i in range(2)]
    made = [job(prompt, max_tokens=30) for prompt in prompts]
    for one in made:
        d.role.submit(one)
    emitted: dict[str, list[int]] = {one.id: [] for one in made}
    for _ in range(200):
        d.turn()
        for output in d.take():
            emitted[output.sequence_id] += output.token_ids
            if output.HasField("error"):
                assert output.error.code == worker_pb2.ERROR_CODE_PREEMPTED
                index = [one.id for one in made].index(output.sequence_id)
                again = job(
                    prompts[index],
                    emitted=emitted[output.sequence_id],
                    sequence_id=output.sequence_id,
                    max_tokens=30,
                )
                d.role.submit(again)
    assert d.role.state.counters.preemptions > 0
    assert [emitted[one.id] for one in made] == [undisturbed(prompt, 30) for prompt in prompts]
    all_free(d)


def test_who_came_back_from_preemption_is_not_the_next_to_be_preempted(site: Site) -> None:
    d = site.worker(Role.COLOCATED, blocks=10)
    newer = job([3] * 30, max_tokens=60, arrival_unix_s=0.5)
    returned = job([4] * 30, max_tokens=60, arrival_unix_s=0.25)  # it came before, and comes again
    for one in (newer, returned):
        d.role.submit(one)
        d.turn(2)
    while d.role.state.counters.preemptions == 0:
        d.turn()
    assert list(d.role.jobs) == [returned.id]


def test_an_arrival_lies_never_ahead_of_the_worker() -> None:
    skewed = job([3] * 30, arrival_unix_s=1e12)
    assert skewed.sequence.arrival < job([3] * 30).sequence.arrival


def test_the_engine_goes_on_after_a_preemption_without_a_step(site: Site) -> None:
    """The only one that ran gave its blocks back: whoever waits for them need not wait for an idle
    engine's next turn."""
    d = site.worker(Role.COLOCATED, blocks=6)
    first, second = job([3] * 30, max_tokens=30), job([4] * 20, max_tokens=2)
    d.role.submit(first)
    d.role.submit(second)
    while not any(output.HasField("error") for output in d.take()):
        assert d.loop.turn(), "it would sleep with a sequence waiting and blocks free"
    d.turn()
    assert [output.sequence_id for output in d.take()] == [second.id]


def test_a_deadline_ends_a_sequence_wherever_it_is(site: Site) -> None:
    p = site.worker(Role.PREFILL)
    p.role.submit(job(PROMPT, deadline_unix_ms=int(1000 * time.time()) - 1))
    p.turn()
    (output,) = p.take()
    assert output.error.code == worker_pb2.ERROR_CODE_DEADLINE
    all_free(p)


def test_draining_refuses_new_work_and_finishes_what_runs(site: Site) -> None:
    d = site.worker(Role.COLOCATED)
    running = job(PROMPT)
    d.role.submit(running)
    d.turn(2)
    d.role.draining = True
    refused = job(PROMPT)
    d.role.submit(refused)
    d.turn(12)
    outputs = d.take()
    (no,) = [output for output in outputs if output.sequence_id == refused.id]
    assert no.error.code == worker_pb2.ERROR_CODE_DRAINING
    done = [output for output in outputs if output.sequence_id == running.id]
    assert tokens_of(done) == undisturbed(PROMPT, 8)
    all_free(d)


def test_a_peer_that_hangs_does_not_take_the_turns_of_others(site: Site) -> None:
    """32 reads of a frozen peer never end; a healthy peer's pulls go on."""
    frozen, healthy = site.worker(Role.PREFILL, blocks=256), site.worker(Role.PREFILL)
    d = site.worker(Role.DECODE, blocks=512)
    site.introduce(frozen, healthy, d)
    site.network.hold()
    for i in range(32):
        hand_off(d, [i + 3] * 9, prefill(frozen, [i + 3] * 9))
    d.turn()
    site.clock.now += 11
    d.turn()
    assert {o.error.code for o in d.take()} == {worker_pb2.ERROR_CODE_PULL_FAILED}
    first = prefill(healthy, PROMPT)
    site.network.holding = False
    hand_off(d, PROMPT, first)
    d.turn(12)
    assert tokens_of([first, *d.take()]) == undisturbed(PROMPT, 8)
    d.check()


def test_a_renewal_that_comes_after_the_fence_changes_nothing(site: Site) -> None:
    p, d = pair(site)
    first = prefill(p, PROMPT)
    site.network.hold()
    hand_off(d, PROMPT, first)
    d.turn()
    site.network.deliver()  # the fence's notification has released the ticket
    d.role.leases_renewed((set(), {first.progress.ticket.ticket_id}), site.clock.now + 30.0)
    d.turn(12)
    assert tokens_of([first, *d.take()]) == undisturbed(PROMPT, 8)


def test_a_worker_that_is_full_says_so(site: Site) -> None:
    d = site.worker(Role.COLOCATED, max_waiting=1, max_batch=1)
    for _ in range(3):
        d.role.submit(job(PROMPT))
    d.turn()
    (output,) = d.take()
    assert output.error.code == worker_pb2.ERROR_CODE_OVERLOADED
    d.turn(40)
    all_free(d)


def test_the_context_ends_a_sequence(site: Site) -> None:
    d = site.worker(Role.COLOCATED, blocks=80)
    d.role.submit(job([5] * (CONTEXT - 3), max_tokens=50))
    d.turn(30)
    outputs = d.take()
    assert len(tokens_of(outputs)) == 3
    assert outputs[-1].finish_reason == inference_pb2.FINISH_REASON_LENGTH
    all_free(d)
