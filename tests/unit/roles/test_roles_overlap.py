"""Blocks pulled while their prompt is still being computed, between the two roles."""

from __future__ import annotations

import pytest
from handoff_kit import PROMPT, all_free, hand_off, pair, prefill, tokens_of
from roles_kit import Site, Worker, job, undisturbed

from crossdock.kvcache.sequence import SampledToken, StepPlan
from crossdock.proto.types import Role
from crossdock.proto.v1 import worker_pb2
from crossdock.worker.job import Job


def announced(worker: Worker, prompt: list[int], **options: object) -> worker_pb2.SequenceOutput:
    """What a prefill worker says after the first chunk of a prompt."""
    worker.role.submit(job(prompt, **options))  # type: ignore[arg-type]
    worker.turn()
    (output,) = worker.take()
    assert not output.token_ids
    return output


def follow(decode: Worker, made: Job, output: worker_pb2.SequenceOutput) -> None:
    """Passes on what a prefill worker said, as a gateway does."""
    hand_off = worker_pb2.HandOff(sequence_id=made.id, progress=output.progress)
    hand_off.progress.ClearField("ticket")
    hand_off.first_tokens.extend(output.token_ids)
    decode.role.hand_off(hand_off, made.owner)


def test_blocks_are_pulled_while_the_prompt_is_computed(site: Site) -> None:
    p, d = pair(site, chunk_tokens=16)
    part = announced(p, PROMPT)
    assert (part.progress.ready_blocks, len(part.progress.ticket.block_ids)) == (2, 7)
    reader = job(PROMPT, progress=part.progress)
    d.role.submit(reader)
    moved = []
    while True:
        d.turn(3)
        moved.append(d.transport.stats.blocks)
        assert not d.take() and not d.role.waiting_tickets() and not p.role.leases()
        p.turn()
        (output,) = p.take()
        if output.token_ids:
            break
        assert not output.progress.HasField("ticket")
        follow(d, reader, output)
    assert moved == [2, 4, 6]
    assert len(p.role.leases()) == 1
    wrong = worker_pb2.HandOff(sequence_id=reader.id, first_tokens=[1])
    wrong.progress.ready_blocks = 7
    d.role.hand_off(wrong, "another gateway")
    follow(d, reader, output)
    d.turn(12)
    outputs = d.take()
    assert tokens_of([output, *outputs]) == undisturbed(PROMPT, 8)
    assert outputs[0].transfer.blocks == 7
    assert (
        outputs[0].transfer.late_bytes == p.transport.memory.block_bytes
    )  # the last chunk: one block
    assert d.transport.stats.reads == 4 and d.transport.stats.fences == 1
    all_free(p, d)


def test_a_prefix_found_by_prefill_is_pulled_before_the_rest_is_computed(site: Site) -> None:
    p = site.worker(Role.PREFILL)
    prefill(p, PROMPT)
    p.role.submit(job([*PROMPT, 5, 6, 7]))
    said_before_the_step: list[int] = []
    run = p.runner.run

    def noting_run(plan: StepPlan) -> list[SampledToken]:
        said_before_the_step.append(len(p.outputs))
        return run(plan)

    p.runner.run = noting_run  # type: ignore[method-assign]
    p.turn()
    part, last = p.take()
    assert said_before_the_step == [1]
    assert (part.progress.ready_blocks, list(part.token_ids)) == (6, [])
    assert (
        len(last.token_ids) == 1
        and last.progress.ready_blocks == 7
        and not last.progress.HasField("ticket")
    )


def test_reserve_late_says_nothing_before_token_0(site: Site) -> None:
    p = site.worker(Role.PREFILL, chunk_tokens=16, reserve="late")
    p.role.submit(job(PROMPT))
    p.turn(3)
    assert not p.take()
    p.turn()
    (output,) = p.take()
    assert (
        output.token_ids
        and output.progress.ready_blocks == 7
        and output.progress.HasField("ticket")
    )


def test_a_reader_that_hears_nothing_more_of_its_prompt_gives_up(site: Site) -> None:
    p, d = pair(site, chunk_tokens=16)
    part = announced(p, PROMPT)
    d.role.submit(job(PROMPT, progress=part.progress))
    d.turn(3)
    site.clock.now += 29.9
    d.turn()
    assert d.role.jobs
    site.clock.now += 0.1
    d.turn()
    (output,) = d.take()
    assert output.error.code == worker_pb2.ERROR_CODE_PULL_FAILED
    assert not d.releases, "the ticket may yet go to another reader"
    d.turn()
    all_free(d)


def test_a_ticket_outlives_an_early_reservation(site: Site) -> None:
    """Its first reader is cancelled in mid-read; another takes the same ticket to its end."""
    p, d = pair(site, chunk_tokens=16)
    other = site.worker(Role.DECODE)
    site.introduce(p, d, other)
    part = announced(p, PROMPT)
    site.network.hold()
    first = job(PROMPT, progress=part.progress)
    d.role.submit(first)
    d.turn()
    d.role.cancel(first.id, "draining", first.owner)
    d.turn()
    site.network.deliver()
    d.turn(2)
    assert not d.releases
    while p.role.jobs:
        p.turn()
    last = p.take()[-1]
    assert len(p.role.leases()) == 1
    last.progress.ticket.CopyFrom(part.progress.ticket)
    hand_off(other, PROMPT, last)
    other.turn(12)
    assert tokens_of([last, *other.take()]) == undisturbed(PROMPT, 8)
    all_free(p, d, other)


def test_a_reader_makes_room_for_a_sequence_that_runs(site: Site) -> None:
    """It loses nothing: the ticket comes back at token 0, when there is room again."""
    p, d = site.worker(Role.PREFILL, chunk_tokens=16), site.worker(Role.DECODE, blocks=12)
    site.introduce(p, d)
    short = list(range(500, 520))
    first = prefill(p, short, max_tokens=40)
    running = hand_off(d, short, first, max_tokens=40)
    d.turn(3)
    part = announced(p, PROMPT)
    d.role.submit(job(PROMPT, progress=part.progress))
    d.turn(30)
    outputs = d.take()
    (given_up,) = [output for output in outputs if output.sequence_id != running]
    assert given_up.error.code == worker_pb2.ERROR_CODE_PREEMPTED
    while p.role.jobs:
        p.turn()
    last = p.take()[-1]
    assert len(p.role.leases()) == 1, "nobody has released what was given up while it was computed"
    last.progress.ticket.CopyFrom(part.progress.ticket)
    hand_off(d, PROMPT, last)
    d.turn(50)
    later = d.take()
    mine = [output for output in (*outputs, *later) if output.sequence_id == running]
    assert tokens_of([first, *mine]) == undisturbed(short, 40)
    theirs = [output for output in later if output.sequence_id != running]
    assert tokens_of([last, *theirs]) == undisturbed(PROMPT, 8)
    all_free(p, d)


def test_a_reader_leaves_its_place_in_the_batch_to_who_is_complete(site: Site) -> None:
    p, d = site.worker(Role.PREFILL, chunk_tokens=16), site.worker(Role.DECODE, max_batch=1)
    site.introduce(p, d)
    short = list(range(500, 520))
    first = prefill(p, short)
    part = announced(p, PROMPT)
    reader = job(PROMPT, progress=part.progress)
    d.role.submit(reader)
    d.turn(3)
    assert d.transport.stats.blocks == 2
    running = hand_off(d, short, first)
    d.turn(12)
    given_up, *rest = d.take()
    assert (given_up.sequence_id, given_up.error.code) == (
        reader.id,
        worker_pb2.ERROR_CODE_PREEMPTED,
    )
    assert {output.sequence_id for output in rest} == {running}
    assert tokens_of([first, *rest]) == undisturbed(short, 8)
    while p.role.jobs:
        p.turn()
    last = p.take()[-1]
    last.progress.ticket.CopyFrom(part.progress.ticket)
    hand_off(d, PROMPT, last)
    d.turn(12)
    assert tokens_of([last, *d.take()]) == undisturbed(PROMPT, 8)
    all_free(p, d)


def test_old_progress_of_a_prompt_changes_nothing(site: Site) -> None:
    p, d = pair(site, chunk_tokens=16)
    part = announced(p, PROMPT)
    reader = job(PROMPT, progress=part.progress)
    d.role.submit(reader)
    while p.role.jobs:
        p.turn()
    *parts, last = p.take()
    for output in (last, *parts, part, last):
        follow(d, reader, output)
    d.role.hand_off(
        worker_pb2.HandOff(
            sequence_id="nobody's", progress=worker_pb2.PromptProgress(ready_blocks=3)
        ),
        "gateway",
    )
    d.turn(12)
    assert tokens_of([last, *d.take()]) == undisturbed(PROMPT, 8)
    all_free(p, d)


@pytest.mark.parametrize("corrupt", [False, True])
def test_bytes_that_are_not_those_sent_are_refused(site: Site, corrupt: bool) -> None:
    p, d = pair(site, verify="checksum")
    first = prefill(p, PROMPT)
    assert len(first.progress.checksums) == 7
    made = job(PROMPT, emitted=list(first.token_ids), progress=first.progress)
    site.network.hold()
    d.role.submit(made)
    d.turn()
    site.network.deliver(1)
    if corrupt:
        d.transport.memory.views[0][made.sequence.block_table[3], 5] ^= 1
    site.network.deliver()
    d.turn(12)
    outputs = d.take()
    if corrupt:
        (failed,) = outputs
        assert failed.error.code == worker_pb2.ERROR_CODE_PULL_FAILED
        assert "checksum refused: block" in failed.error.message
    else:
        assert tokens_of([first, *outputs]) == undisturbed(PROMPT, 8)
    p.turn()
    all_free(p, d)
