"""Prompts that are scored on workers: in chunks, beside others, never from a cache, once."""

from __future__ import annotations

import pytest
from roles_kit import VOCAB, Site, Worker, job, kv_of_tokens

from crossdock.engine.simulated import score, weights
from crossdock.proto.types import Role
from crossdock.proto.v1 import inference_pb2
from crossdock.proto.v1 import worker_pb2 as pb

PROMPT = [(7 * i) % 200 + 3 for i in range(75)]
ROLES = [Role.PREFILL, Role.COLOCATED]


def expected(ids: list[int], top: int) -> list[tuple[float, int, list[int]]]:
    seen = (kv_of_tokens(ids) * weights(0, len(ids))).cumsum(dtype="uint64").tolist()
    return [score(seen[at - 1], ids[at], top, VOCAB) for at in range(1, len(ids))]


def told(outputs: list[pb.SequenceOutput]) -> list[tuple[float, int, list[int]]]:
    found: list[tuple[float, int, list[int]]] = []
    first = None
    for output in outputs:
        if output.HasField("prompt_logprobs"):
            part = output.prompt_logprobs
            first = part.first if first is None else first
            assert part.first == first + len(found)
            for i, (logprob, rank) in enumerate(zip(part.logprobs, part.ranks)):
                found.append((logprob, rank, list(part.top_ids[i * part.top : (i + 1) * part.top])))
    return found


def settle(worker: Worker) -> list[pb.SequenceOutput]:
    worker.turn(8)
    worker.check()
    return worker.take()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_prompt_is_scored_in_chunks_and_ends_here(
    site: Site, role: Role, max_tokens: int
) -> None:
    worker = site.worker(role, chunk_tokens=32)
    worker.role.submit(job(PROMPT, max_tokens=max_tokens, prompt_logprobs=2))
    outputs = settle(worker)
    assert told(outputs) == expected(PROMPT, 2)
    assert [len(o.prompt_logprobs.logprobs) for o in outputs] == [32, 32, 10, 0]
    assert outputs[-1].finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert len(outputs[-1].token_ids) == max_tokens and outputs[-1].HasField("times")
    assert bool(outputs[-1].times.first_token) == bool(max_tokens)
    assert not any(output.HasField("progress") for output in outputs)
    assert worker.role.idle and worker.role.state.pool.num_used == 0
    assert worker.role.state.counters.prompt_tokens == len(PROMPT)


@pytest.mark.parametrize("role", ROLES)
def test_what_is_cached_is_computed_again_where_it_is_scored(site: Site, role: Role) -> None:
    """By the same tenant or another: neither numbers nor counts tell what others asked."""
    worker = site.worker(role)
    worker.role.submit(job(PROMPT, max_tokens=1))
    settle(worker)
    worker.role.submit(job(PROMPT, max_tokens=1, prompt_logprobs=1))
    outputs = settle(worker)
    assert told(outputs) == expected(PROMPT, 1) and outputs[-1].cached_tokens == 0
    worker.role.submit(job(PROMPT, max_tokens=1))
    assert settle(worker)[-1].cached_tokens == 72


@pytest.mark.parametrize("role", ROLES)
def test_what_the_gateway_has_already_is_not_told_again(site: Site, role: Role) -> None:
    """Blocks before it may come from the cache."""
    worker = site.worker(role)
    worker.role.submit(job(PROMPT, max_tokens=1))
    settle(worker)
    for scored, cached in ((1, 0), (44, 40), (41, 40), (40, 32), (len(PROMPT), 72)):
        again = job(PROMPT, max_tokens=0, prompt_logprobs=1)
        again.sequence.num_scored = scored
        worker.role.submit(again)
        outputs = settle(worker)
        assert told(outputs) == expected(PROMPT, 1)[scored - 1 :]
        assert outputs[-1].cached_tokens == cached


def test_others_in_the_step_are_not_scored(site: Site) -> None:
    worker = site.worker(Role.PREFILL, chunk_tokens=128)
    plain, asking = job(PROMPT[:40], max_tokens=1), job(PROMPT, max_tokens=0, prompt_logprobs=0)
    worker.role.submit(plain)
    worker.role.submit(asking)
    worker.turn()
    (plan,) = worker.runner.plans
    assert [chunk.scores is not None for chunk in plan.chunks] == [False, True]
    outputs = settle(worker)
    assert {o.sequence_id for o in outputs if o.HasField("prompt_logprobs")} == {asking.id}
    assert told(outputs) == expected(PROMPT, 0)


@pytest.mark.parametrize("role", ROLES)
def test_a_prompt_of_one_token_has_nothing_to_score(site: Site, role: Role) -> None:
    worker = site.worker(role)
    worker.role.submit(job([5], max_tokens=0, prompt_logprobs=3))
    (output,) = settle(worker)
    assert output.finish_reason == inference_pb2.FINISH_REASON_LENGTH and not output.token_ids
    assert worker.role.idle


def test_a_step_that_failed_is_scored_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = site.worker(Role.PREFILL)
    run, failures = worker.runner.run, iter([True, False])

    def run_at_second_try(plan: object) -> object:
        found = run(plan)  # type: ignore[arg-type]
        if next(failures, False):
            raise RuntimeError("scripted")
        return found

    monkeypatch.setattr(worker.runner, "run", run_at_second_try)
    worker.role.submit(job(PROMPT, max_tokens=0, prompt_logprobs=1))
    assert told(settle(worker)) == expected(PROMPT, 1)


def test_frames_of_scores_are_not_merged() -> None:
    from crossdock.worker.streams import GatewayStream

    stream = GatewayStream("g", lambda: None)
    scores = pb.SequenceOutput(sequence_id="s", prompt_logprobs=pb.PromptLogprobs(first=1))
    plain = pb.SequenceOutput(sequence_id="t", token_ids=[1])
    for output in (plain, plain, scores, scores, plain, plain):
        stream.send(pb.WorkerFrame(outputs=[output]))
    sizes = []
    while (frame := stream.take()) is not None:
        sizes.append(len(frame.outputs))
    assert sizes == [2, 1, 1, 2]
