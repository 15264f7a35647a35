"""Offline generation in this process: the oracle of the tests. No network, no other worker."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass

from crossdock.deploy.home import crossdock_home
from crossdock.engine.native.runner import ModelRunner
from crossdock.kvcache.block_pool import BlockPool
from crossdock.kvcache.block_tables import attach_prefix, blocks_for, grow, release, seal_full
from crossdock.kvcache.sequence import Chunk, SampledToken, Sequence, StepPlan, finish_of
from crossdock.model.detokenizer import IncrementalDetokenizer
from crossdock.model.store import resolve
from crossdock.model.text import TextModel, load_text
from crossdock.proto.errors import InvalidRequest
from crossdock.proto.hashing import BlockHasher
from crossdock.proto.types import FinishReason, SamplingParams


@dataclass(frozen=True)
class Generation:
    """What followed one prompt. `token_ids` holds the stop token, `text` no stop string."""

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    logprobs: list[SampledToken]  # one for each token where sampling.logprobs is set, else empty
    cached_tokens: int  # of the prompt, found in the prefix cache


class LLM:
    """A model with a pool of its own. Options go to ModelRunner."""

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        num_blocks: int = 512,
        block_size: int = 16,
        max_batch: int = 32,
        chunk_tokens: int = 256,
        device: str = "auto",
        threads: int | None = None,
    ) -> None:
        files = resolve(model, crossdock_home())
        self.text: TextModel = load_text(files)
        self.runner = ModelRunner(
            files,
            dtype=dtype,
            num_blocks=num_blocks,
            block_size=block_size,
            device=device,
            threads=threads,
        )
        self.hasher = BlockHasher(secrets.token_bytes(32), block_size)  # its pool is its own
        self._root = self.hasher.root(files.digest.encode())
        self.pool = BlockPool(num_blocks, block_size, self.runner.kv.generations)
        self._max_batch, self._chunk_tokens = max_batch, chunk_tokens
        self._room = min(self.text.context_length, num_blocks * block_size)

    def generate(
        self,
        prompts: Items[str | Items[int]],
        sampling: SamplingParams | Items[SamplingParams] | None = None,
        *,
        chat: bool = False,
    ) -> list[Generation]:
        """Continues every prompt (text or token ids), in order. With `chat` each text is put into
        the model's chat template as a user's message. Raises InvalidRequest, before any work, for
        a prompt that is empty, out of the vocabulary or too long."""
        if sampling is None or isinstance(sampling, SamplingParams):
            sampling = [sampling or SamplingParams()] * len(prompts)
        if len(sampling) != len(prompts):
            limit = f"must be one, or one for each of {len(prompts)} prompts"
            raise InvalidRequest("sampling", len(sampling), limit)
        sequences = [
            self._sequence(index, prompt, params, chat)
            for index, (prompt, params) in enumerate(zip(prompts, sampling))
        ]
        jobs = [_Job(sequence, self.text, self._room) for sequence in sequences]
        waiting, running = deque(jobs), list[_Job]()
        try:
            while waiting or running:
                while (
                    waiting and len(running) < self._max_batch and self._fits(waiting[0], running)
                ):
                    job = waiting.popleft()
                    attach_prefix(self.pool, job.sequence, job.sequence.num_tokens - 1)
                    job.cached_tokens = job.sequence.num_cached
                    running.append(job)
                self._step(running)
                running = [job for job in running if not job.finish]
        finally:
            for job in running:
                release(self.pool, job.sequence)
        return [job.generation() for job in jobs]

    def _step(self, running: list[_Job]) -> None:
        budget, chunks, stepped = self._chunk_tokens, [], []
        for job in running:
            sequence = job.sequence
            length = min(sequence.num_uncomputed, budget)
            if length:
                start, budget = sequence.num_computed, budget - length
                grow(self.pool, sequence, start + length)
                last = start + length == sequence.num_tokens
                chunks.append(Chunk(sequence, start, length, sample=last))
                stepped.append(job)
        drawn = self.runner.run(StepPlan(tuple(chunks)))
        for chunk, job, tokens in zip(chunks, stepped, drawn):
            sequence = chunk.sequence
            again = chunk.sample and not tokens  # its mask was not there yet
            sequence.num_computed += chunk.length - again
            self.hasher.extend(sequence.block_hashes, sequence.token_ids, self._root)
            seal_full(self.pool, sequence)
            if tokens and job.take(tokens[0]):
                release(self.pool, sequence)

    def _fits(self, job: _Job, running: list[_Job]) -> bool:
        """Room for everything that each may still become, so that none is ever preempted."""
        size = self.pool.block_size
        promised = sum(blocks_for(j.most_tokens, size) for j in [*running, job])
        return promised <= self.pool.num_blocks

    def _sequence(
        self, index: int, prompt: str | Items[int], sampling: SamplingParams, chat: bool
    ) -> Sequence:
        sampling.validate(self.text.vocab_size)
        if isinstance(prompt, str):
            message = [{"role": "user", "content": prompt}]
            ids = self.text.apply_chat_template(message) if chat else self.text.encode(prompt)
        else:
            ids = list(prompt)
        if not 0 < len(ids) < self._room:
            limit = f"must have 1 to {self._room - 1} tokens"
            raise InvalidRequest(f"prompts[{index}]", f"{len(ids)} tokens", limit)
        if not 0 <= min(ids) <= max(ids) < self.text.vocab_size:
            limit = f"token ids must be from 0 to {self.text.vocab_size - 1}"
            raise InvalidRequest(f"prompts[{index}]", [min(ids), max(ids)], limit)
        return Sequence(
            sequence_id=str(index),
            token_ids=ids,
            prompt_tokens=len(ids),
            sampling=sampling,
            eos_token_ids=self.text.eos_token_ids,
            block_hashes=self.hasher.chain(ids, self._root),
            root_hash=self._root,
        )


class _Job:
    def __init__(self, sequence: Sequence, text: TextModel, room: int) -> None:
        self.sequence, self._room = sequence, room
        self.most_tokens = min(sequence.num_tokens + sequence.sampling.max_tokens, room)
        self.finish: FinishReason | None = None
        self.cached_tokens = 0
        self._words, self._logprobs = "", list[SampledToken]()
        prompt, stop = sequence.token_ids[: sequence.prompt_tokens], sequence.sampling.stop
        self._detokenizer = IncrementalDetokenizer(text, prompt, stop)

    def take(self, token: SampledToken) -> bool:
        """Adds a token; True if it was the last."""
        sequence = self.sequence
        sequence.token_ids.append(token.token_id)
        if sequence.sampling.logprobs is not None:
            self._logprobs.append(token)
        end = finish_of(sequence, self._room)
        delta = self._detokenizer.push([token.token_id])
        self._words += delta.text
        if delta.stopped is not None:
            self.finish = FinishReason.STOP
        elif end is not None:
            self.finish = end[0]
            self._words += self._detokenizer.finish()
        return self.finish is not None

    def generation(self) -> Generation:
        assert self.finish is not None
        return Generation(
            token_ids=self.sequence.token_ids[self.sequence.prompt_tokens :],
            text=self._words,
            finish_reason=self.finish,
            logprobs=self._logprobs,
            cached_tokens=self.cached_tokens,
        )
