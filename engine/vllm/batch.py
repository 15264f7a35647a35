"""What vLLM's model runner is told of a step, and what it knows from the one before."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from crossdock.kvcache.sequence import Chunk, Sequence, StepPlan

_GREEDY = SamplingParams(temperature=0.0)  # tokens are not drawn by vLLM


@dataclass(frozen=True)
class Step:
    """What the model runner of each rank is told."""

    output: SchedulerOutput
    drawn: list[tuple[str, int, list[int]]]  # request, how many it had, the tokens that came since

    def tell(self, runner: Any) -> None:
        """Gives it the tokens that it would have drawn itself."""
        batch = runner.input_batch
        for request_id, start, more in self.drawn:
            row, end = batch.req_id_to_index[request_id], start + len(more)
            batch.token_ids_cpu[row, start:end] = more
            batch.is_token_ids[row, start:end] = True
            batch.num_tokens_no_spec[row] = end
            runner.requests[request_id].output_token_ids.extend(more)


@dataclass
class _Known:
    """How much of a sequence the runner has."""

    request_id: str
    sent: int  # tokens that it began with
    tokens: int
    blocks: list[int]


class RunnerBatch:
    """The sequences of the last step, which are rows of the runner's persistent batch. All others
    it has forgotten: to go on with them, or on other blocks, they are sent anew."""

    def __init__(self, runner: Any, block_size: int, num_blocks: int) -> None:
        self._runner, self._block_size, self._num_blocks = runner, block_size, num_blocks
        self._known: dict[Sequence, _Known] = {}
        self._gone: set[str] = set()  # that the runner has and this has not
        self._ids = count()

    def begin(self, plan: StepPlan) -> Step:
        """Each sequence has one chunk. Once the step is computed, `rows` says where. Raises
        ValueError for what the model's kernels would read or write without looking."""
        new: list[NewRequestData] = []
        cached = CachedRequestData.make_empty()
        last, self._known = self._known, {}
        drawn: list[tuple[str, int, list[int]]] = []
        scheduled: dict[str, int] = {}
        for chunk in plan.chunks:
            self._check_tokens(chunk)
            known = last.get(chunk.sequence)
            if known is not None and self._go_on(known, chunk, cached, drawn):
                del last[chunk.sequence]
            else:
                known = self._send(chunk, new)
            self._known[chunk.sequence] = known
            scheduled[known.request_id] = chunk.length
        self._gone.update(known.request_id for known in last.values())
        output = SchedulerOutput.make_empty()
        output.scheduled_new_reqs, output.scheduled_cached_reqs = new, cached
        output.num_scheduled_tokens = scheduled
        output.total_num_scheduled_tokens = plan.num_tokens
        output.finished_req_ids, self._gone = self._gone, set()
        return Step(output, drawn)

    def rows(self, plan: StepPlan) -> np.ndarray:
        """int64 [chunks]: the row of each in the runner's batch."""
        index, known = self._runner.input_batch.req_id_to_index, self._known
        return np.array([index[known[chunk.sequence].request_id] for chunk in plan.chunks])

    def forget(self) -> None:
        """After a step that raised: what the runner has may be half done."""
        self._gone = {*self._runner.requests, *self._runner.input_batch.req_id_to_index}
        self._known = {}

    def _check_tokens(self, chunk: Chunk) -> None:
        sequence, end = chunk.sequence, chunk.end
        if chunk.length < 1 or chunk.start < 0 or end > sequence.num_tokens:
            tokens = f"tokens {chunk.start} to {end} of {sequence.num_tokens}"
            raise ValueError(f"sequence {sequence.sequence_id}: {tokens}")
        if end > len(sequence.block_table) * self._block_size:
            held = f"{len(sequence.block_table)} blocks of {self._block_size} tokens"
            raise ValueError(f"sequence {sequence.sequence_id}: {held} do not hold {end} tokens")

    def _check_blocks(self, blocks: list[int]) -> None:
        if blocks and (min(blocks) < 0 or max(blocks) >= self._num_blocks):
            raise ValueError(f"block ids must be from 0 to {self._num_blocks - 1}")

    def _send(self, chunk: Chunk, new: list[NewRequestData]) -> _Known:
        sequence = chunk.sequence
        tokens, blocks = list(sequence.token_ids), list(sequence.block_table)
        self._check_blocks(blocks)
        known = _Known(str(next(self._ids)), len(tokens), len(tokens), blocks)
        new.append(
            NewRequestData(
                req_id=known.request_id,
                prompt_token_ids=tokens,
                mm_features=[],
                sampling_params=_GREEDY,
                pooling_params=None,
                block_ids=(list(blocks),),
                num_computed_tokens=chunk.start,
                lora_request=None,
            )
        )
        return known

    def _go_on(
        self,
        known: _Known,
        chunk: Chunk,
        cached: CachedRequestData,
        drawn: list[tuple[str, int, list[int]]],
    ) -> bool:
        """Tells the runner what is new. False: it cannot go on with what it has."""
        table, have = chunk.sequence.block_table, len(known.blocks)
        more: tuple[list[int], ...] | None = None
        if table != known.blocks:
            if table[:have] != known.blocks:
                return False
            more = (table[have:],)
            self._check_blocks(more[0])
            known.blocks.extend(more[0])
        if came := chunk.sequence.token_ids[known.tokens :]:
            drawn.append((known.request_id, known.tokens, came))
            known.tokens += len(came)
        cached.req_ids.append(known.request_id)
        cached.new_block_ids.append(more)
        cached.num_computed_tokens.append(chunk.start)
        cached.num_output_tokens.append(known.tokens - known.sent)
        return True
