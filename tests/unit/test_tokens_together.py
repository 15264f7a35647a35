"""A step's tokens, one each of many sequences, as one output from a worker to a gateway."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

from engines_kit import expected, start_engines
from gateway_rig import ask, collect, ids_of, start_rig, text_of, until

from crossdock.proto.types import Role
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.worker.loop import Turn

PAIR = (Role.PREFILL, Role.DECODE)
PROMPTS = [list(range(40 + i, 90 + i)) for i in range(4)]
GREEDY = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True}


async def test_every_stream_gets_its_own_tokens() -> None:
    """Those that nothing but text is asked of, one that looks for a stop string, and one that wants
    log-probabilities, whose tokens travel by themselves."""
    together: Counter[int] = Counter()
    alone: Counter[str] = Counter()
    async with start_engines(*PAIR) as rig:
        publish = rig.workers[1]._gateways.publish

        def seen(turn: Turn) -> None:
            for output in (output for outputs in turn.outputs.values() for output in outputs):
                together.update(output.numbers)
                alone.update([output.sequence_id] * bool(output.sequence_id))
            publish(turn)

        rig.workers[1]._gateways.publish = seen  # type: ignore[method-assign]
        asked: list[dict[str, object]] = [{}, {"stop": ["\x00never"]}, {"logprobs": 0}, {}]
        answers = await asyncio.gather(
            *(
                collect(rig.stub.Generate(ask(prompt, **GREEDY, **more)))
                for prompt, more in zip(PROMPTS, asked, strict=True)
            )
        )
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            right = expected(prompt, 24)
            assert ids_of(answer) == right and text_of(answer) == rig.text.decode(right)
        await rig.settled()
    # Of 23 tokens after token 0, the first brings the hand-off's figures and the last the end.
    assert sorted(together.values()) == [21, 21, 21]
    assert sorted(alone.values()) == [2, 2, 2, 23]


async def test_a_number_of_nobody_is_passed_over_and_one_without_token_ends_the_stream(
    tiny_model: Path,
) -> None:
    async with start_rig(str(tiny_model)) as rig:
        worker = next(w for w in rig.workers if w.role is Role.DECODE)
        for numbers in ([], [10**12], [1, 10**12]):
            stray = pb.SequenceOutput(numbers=numbers, token_ids=[7] * len(numbers))
            worker.send(pb.WorkerFrame(outputs=[stray]))
        answer = await collect(rig.stub.Generate(ask(PROMPTS[0], **GREEDY)))
        assert len(ids_of(answer)) == 24 and 7 not in ids_of(answer)
        assert rig.metric("worker_streams_lost_total") == 0
        worker.send(pb.WorkerFrame(outputs=[pb.SequenceOutput(numbers=[1, 2], token_ids=[7])]))
        await until(lambda: rig.metric("worker_streams_lost_total") == 1)
        await until(lambda: len(rig.gateway.view.workers) == len(rig.workers))
        assert ids_of(await collect(rig.stub.Generate(ask(PROMPTS[0], **GREEDY)))) == ids_of(answer)
