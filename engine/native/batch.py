"""One step's work as arrays: every token of every chunk is one row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crossdock.kvcache.sequence import StepPlan


@dataclass(frozen=True)
class Batch:
    """Rows of the step, T of them, of S chunks; N rows are sampled, M scored.

    All arrays are int64, except the block tables (int32, padded with 0 to the longest).
    """

    token_ids: np.ndarray  # [T]
    positions: np.ndarray  # [T]
    blocks: np.ndarray  # [T] the block that takes the row's KV
    offsets: np.ndarray  # [T] and the place in it
    chunk_of_row: np.ndarray  # [T]
    block_tables: np.ndarray  # [S, longest]
    chunk_start: np.ndarray  # [S] first row
    chunk_length: np.ndarray  # [S] rows
    sampled: np.ndarray  # [N] rows, ascending
    scored: np.ndarray  # [M] rows whose logits score the token after them, ascending
    successors: np.ndarray  # [M] those tokens

    @property
    def num_rows(self) -> int:
        """Tokens of the step, one row each."""
        return len(self.token_ids)


def make_batch(
    plan: StepPlan, block_size: int, num_blocks: int, every_token: bool = False
) -> Batch:
    """Raises ValueError for a chunk without tokens or whose block table does not reach its end,
    and for a block that is not of the pool: kernels write without looking."""
    chunks = plan.chunks
    if not chunks:
        raise ValueError("a step needs at least one chunk")
    tables = [chunk.sequence.block_table for chunk in chunks]
    for chunk, table in zip(chunks, tables):
        where, start, end = f"sequence {chunk.sequence.sequence_id}", chunk.start, chunk.end
        if chunk.length < 1 or start < 0 or end > chunk.sequence.num_tokens:
            raise ValueError(f"{where}: tokens {start} to {end} of {chunk.sequence.num_tokens}")
        if end > len(table) * block_size:
            blocks = f"{len(table)} blocks of {block_size} tokens"
            raise ValueError(f"{where}: {blocks} do not hold {end} tokens")
    used = [-(-chunk.end // block_size) for chunk in chunks]
    block_tables = np.zeros((len(chunks), max(used)), dtype=np.int32)
    for row, table, count in zip(block_tables, tables, used):
        row[:count] = table[:count]
    if block_tables.min() < 0 or block_tables.max() >= num_blocks:
        raise ValueError(f"block ids must be from 0 to {num_blocks - 1}")

    lengths = np.array([chunk.length for chunk in chunks], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    chunk_of_row = np.repeat(np.arange(len(chunks)), lengths)
    first = np.array([chunk.start for chunk in chunks], dtype=np.int64)
    positions = np.arange(int(lengths.sum())) - np.repeat(starts - first, lengths)
    token_ids = [chunk.sequence.token_ids[chunk.start : chunk.end] for chunk in chunks]
    scored, successors = _scored(plan, starts)
    wanted = np.array([chunk.sample for chunk in chunks])
    sampled = np.arange(len(positions)) if every_token else (starts + lengths - 1)[wanted]
    return Batch(
        token_ids=np.concatenate(token_ids, dtype=np.int64),
        positions=positions,
        blocks=block_tables[chunk_of_row, positions // block_size].astype(np.int64),
        offsets=positions % block_size,
        chunk_of_row=chunk_of_row,
        block_tables=block_tables,
        chunk_start=starts,
        chunk_length=lengths,
        sampled=sampled,
        scored=scored,
        successors=successors,
    )


def _scored(plan: StepPlan, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows, tokens = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for chunk, start in zip(plan.chunks, starts):
        if (scores := chunk.scores) is not None:
            first, end = scores.first, scores.first + scores.count
            rows.append(start + np.arange(first - 1, end - 1) - chunk.start)
            tokens.append(np.array(chunk.sequence.token_ids[first:end], np.int64))
    return np.concatenate(rows), np.concatenate(tokens)
