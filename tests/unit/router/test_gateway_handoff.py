"""What a gateway tells decode workers of prompts that are still being computed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gateway_rig import Rig, ask, collect, ids_of, start_rig, until

from crossdock.proto.v1 import worker_pb2 as wpb

PROMPT = list(range(10, 80))  # 5 blocks


@pytest.fixture
async def rig(tiny_model: Path) -> AsyncIterator[Rig]:
    async with start_rig(tiny_model, decodes=2) as made:
        made.prefills[0].parts = [1, 3]
        made.prefills[0].token_0.clear()
        yield made


def told(rig: Rig) -> list[tuple[str, wpb.DecodeRequest]]:
    return [(worker.name, request) for worker in rig.decodes for request in worker.decodes]


def nobody_reads(rig: Rig) -> bool:
    (sequence,) = rig.only.dispatcher._sequences.values()
    return not sequence.decode_worker


async def test_the_decode_worker_reserves_early(rig: Rig) -> None:
    call = rig.stub.Generate(ask(PROMPT, max_tokens=5))
    await until(lambda: told(rig))
    ((name, request),) = told(rig)
    worker = next(worker for worker in rig.decodes if worker.name == name)
    await until(lambda: worker.hand_offs)
    assert rig.prefills[0].prefills[0].decode_worker == name
    assert (request.progress.ready_blocks, len(request.progress.ticket.block_ids)) == (1, 5)
    assert list(request.sequence.token_ids) == PROMPT
    rig.prefills[0].token_0.set()
    responses = await collect(call)
    assert ids_of(responses) == PROMPT[:5]
    assert [(h.progress.ready_blocks, *h.first_tokens) for h in worker.hand_offs] == [
        (3,),
        (5, PROMPT[0]),
    ]
    assert len(told(rig)) == 1 and rig.metric("restarted_sequences_total", cause="worker lost") == 0
    assert responses[-1].timings.decode_worker == name
    await until(lambda: rig.idle)


@pytest.mark.parametrize(
    "code", [wpb.ERROR_CODE_OVERLOADED, wpb.ERROR_CODE_PULL_FAILED, wpb.ERROR_CODE_DRAINING]
)
async def test_an_early_reservation_given_back_is_replaced_at_token_0(rig: Rig, code: int) -> None:
    rig.decodes[0].refusals.append(code)
    rig.decodes[1].refusals.append(code)
    call = rig.stub.Generate(ask(PROMPT, max_tokens=5))
    await until(lambda: told(rig))
    ((first, _),) = told(rig)
    for worker in rig.decodes:
        if worker.name != first:
            worker.refusals.clear()
    await until(lambda: nobody_reads(rig))
    rig.prefills[0].token_0.set()
    responses = await collect(call)
    assert ids_of(responses) == PROMPT[:5]
    (second,) = [request for name, request in told(rig) if name != first]
    assert (second.progress.ready_blocks, list(second.sequence.token_ids)) == (
        5,
        PROMPT + PROMPT[:1],
    )
    assert len(rig.prefills[0].prefills) == 1, "the prompt was not computed twice"
    await until(lambda: rig.idle)


async def test_a_lost_early_reservation_is_replaced_at_token_0(rig: Rig) -> None:
    call = rig.stub.Generate(ask(PROMPT, max_tokens=5))
    await until(lambda: told(rig))
    ((first, _),) = told(rig)
    lost, other = sorted(rig.decodes, key=lambda worker: worker.name != first)
    await lost.stop()
    await until(lambda: first not in rig.gateway.view.workers)
    rig.prefills[0].token_0.set()
    assert ids_of(await collect(call)) == PROMPT[:5]
    assert len(other.decodes) == 1 and len(rig.prefills[0].prefills) == 1
    await lost.start()


async def test_the_only_reader_may_be_asked_again(tiny_model: Path) -> None:
    async with start_rig(tiny_model) as rig:
        rig.prefills[0].parts = [1]
        rig.prefills[0].token_0.clear()
        rig.decodes[0].refusals.append(wpb.ERROR_CODE_OVERLOADED)
        call = rig.stub.Generate(ask(PROMPT, max_tokens=5))
        await until(lambda: not rig.decodes[0].refusals and nobody_reads(rig))
        rig.prefills[0].token_0.set()
        assert ids_of(await collect(call)) == PROMPT[:5]
        assert len(rig.prefills[0].prefills) == 1


async def test_the_only_reader_lost_meanwhile_gets_the_prompt_anew(tiny_model: Path) -> None:
    """It may still have the sequence, so it gets it under another id, with another ticket."""
    async with start_rig(tiny_model) as rig:
        rig.prefills[0].parts = [1]
        rig.prefills[0].token_0.clear()
        call = rig.stub.Generate(ask(PROMPT, max_tokens=5))
        await until(lambda: rig.decodes[0].decodes)
        rig.decodes[0].break_streams()
        await until(lambda: nobody_reads(rig) and rig.decodes[0].connected)
        rig.prefills[0].token_0.set()
        assert ids_of(await collect(call)) == PROMPT[:5]
        ids = [request.sequence.sequence_id for request in rig.decodes[0].decodes]
        assert len(set(ids)) == len(ids) == 2 == len(rig.prefills[0].prefills)
        assert rig.metric("restarted_sequences_total", cause="worker lost") == 1
        await until(lambda: rig.idle)


async def test_token_0_that_ends_the_sequence_sends_the_reader_away(rig: Rig) -> None:
    call = rig.stub.Generate(ask(PROMPT, max_tokens=5, stop_token_ids=[PROMPT[0]]))
    await until(lambda: told(rig))
    ((name, request),) = told(rig)
    rig.prefills[0].token_0.set()
    assert ids_of(await collect(call)) == PROMPT[:1]
    worker = next(worker for worker in rig.decodes if worker.name == name)
    await until(lambda: worker.cancels)
    assert worker.cancels[0].sequence_id == request.sequence.sequence_id
    await until(lambda: rig.idle)


async def test_a_prefill_worker_lost_meanwhile_takes_the_reader_with_it(rig: Rig) -> None:
    call = rig.stub.Generate(ask(PROMPT, max_tokens=5))
    await until(lambda: told(rig))
    ((name, request),) = told(rig)
    worker = next(worker for worker in rig.decodes if worker.name == name)
    rig.prefills[0].break_streams()
    await until(lambda: worker.cancels)
    assert worker.cancels[0].sequence_id == request.sequence.sequence_id
    rig.prefills[0].token_0.set()
    assert ids_of(await collect(call)) == PROMPT[:5]
    assert rig.metric("restarted_sequences_total", cause="worker lost") == 1
    await until(lambda: rig.idle)


async def test_a_client_that_goes_away_meanwhile_frees_both(rig: Rig) -> None:
    call = rig.stub.Generate(ask(PROMPT, max_tokens=5))
    await until(lambda: told(rig))
    call.cancel()
    await until(lambda: rig.idle)
    assert rig.prefills[0].cancels
    assert [worker for worker in rig.decodes if worker.cancels]


@pytest.mark.parametrize("parts", [[], [1]])
async def test_a_decode_worker_that_drains_by_token_0_is_not_asked(
    rig: Rig, parts: list[int]
) -> None:
    """Refusing it would have the prompt computed twice. One that reserved early goes on."""
    prefill = rig.prefills[0]
    prefill.parts = parts
    call = rig.stub.Generate(ask(PROMPT, max_tokens=5))
    await until(lambda: prefill.prefills and len(told(rig)) == len(parts))
    meant = prefill.prefills[0].decode_worker
    leaver = next(worker for worker in rig.decodes if worker.name == meant)
    leaver.report(draining=True)
    await until(lambda: rig.gateway.view.workers[meant].load.draining)
    prefill.token_0.set()
    assert ids_of(await collect(call)) == PROMPT[:5]
    ((name, _),) = told(rig)
    assert (name == meant) == bool(parts)
    assert len(prefill.prefills) == 1
    await until(lambda: rig.idle)


async def test_what_was_pulled_counts_though_its_prefill_worker_is_gone(rig: Rig) -> None:
    for worker in rig.decodes:
        worker.gate.clear()
    prefill = rig.prefills[0]
    prefill.token_0.set()
    call = rig.stub.Generate(ask(PROMPT, max_tokens=5))
    await until(lambda: any(hand_off.first_tokens for w in rig.decodes for hand_off in w.hand_offs))
    await prefill.stop()
    await until(lambda: prefill.name not in rig.gateway.view.workers)
    for worker in rig.decodes:
        worker.gate.set()
    responses = await collect(call)
    assert ids_of(responses) == PROMPT[:5]
    assert responses[-1].timings.transferred_blocks == 5
    assert rig.metric("transferred_blocks_total") == 5
    await prefill.start()
