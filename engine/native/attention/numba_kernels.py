"""CPU kernels over the paged pool, compiled by numba for this machine and cached on disk.

The pool comes flat (float32); a row of it is head_dim numbers at
`(((block * layers + layer) * 2 + kv) * kv_heads + head) * block_size + offset`.
Sizes that inner loops run over are compile-time constants (`paged_attention`, `rope_and_store`
are made for one head_dim), which lets LLVM keep sums in registers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

compiled = functools.partial(numba.njit, cache=True, nogil=True, fastmath=True, error_model="numpy")

LOG2_E = np.float32(1.4426950408889634)
LOWEST, HIGHEST = np.float32(-87.0), np.float32(88.0)  # e** them is still an ordinary float32
TILE = 64  # tokens of context that chunk_attention works on at a time
UNROLL = 8
LOWEST_SCORE = np.float32(-1e30)  # finite: the kernels are compiled for finite numbers


@compiled(inline="always")
def _exp(x: Any) -> Any:
    """e**x to 2e-7 for x from -87 to 88, and beyond as there, in operations that LLVM vectorizes:
    2**n by the exponent's bits times 2**f, |f| <= 1/2, by its Taylor polynomial."""
    scaled = min(max(x, LOWEST), HIGHEST) * LOG2_E
    whole = np.floor(scaled + np.float32(0.5))
    f = scaled - whole
    p = np.float32(1.5403530e-4)
    p = p * f + np.float32(1.3333558e-3)
    p = p * f + np.float32(9.6181291e-3)
    p = p * f + np.float32(5.5504109e-2)
    p = p * f + np.float32(2.4022651e-1)
    p = p * f + np.float32(6.9314718e-1)
    p = p * f + np.float32(1.0)
    power = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23))
    return p * power.view(np.float32)


@compiled(inline="always")
def _normalize(source: Any, weight: Any, eps: Any, size: Any, target: Any) -> None:
    total = np.float32(0.0)
    for i in range(size):
        total += source[i] * source[i]
    scale = np.float32(1.0) / np.sqrt(total / np.float32(size) + eps)
    for i in range(size):
        target[i] = source[i] * scale * weight[i]


@compiled()
def rms_norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    """x, out [rows, size]"""
    for row in range(x.shape[0]):
        _normalize(x[row], weight, eps, x.shape[1], out[row])


@compiled()
def swiglu(gate_up: Any, out: Any) -> None:
    """gate_up [rows, 2 * size] → out [rows, size]"""
    size = out.shape[1]
    for row in range(out.shape[0]):
        gate, up, target = gate_up[row, :size], gate_up[row, size:], out[row]
        for i in range(size):
            target[i] = gate[i] * up[i] / (np.float32(1.0) + _exp(-gate[i]))


@functools.cache
def rope_and_store(head_dim: int) -> Callable[..., None]:
    """A kernel that rotates queries in place and writes keys and values into the pool's blocks."""
    half = head_dim // 2

    @compiled()
    def kernel(
        qkv: Any,  # [rows, (heads + 2 kv_heads) * head_dim], queries are treated in place
        rope: Any,  # [context, head_dim]
        positions: Any,  # [rows]
        blocks: Any,  # [rows]
        offsets: Any,  # [rows]
        q_norm: Any,  # [head_dim], or [0]: none
        k_norm: Any,
        eps: Any,
        pool: Any,
        layout: Any,  # (layers, layer, kv_heads, block_size)
        sums: Any,  # [rows], to which all that is stored is added: finite as long as it is
    ) -> None:
        layers, layer, kv_heads, block_size = layout
        heads = qkv.shape[1] // head_dim - 2 * kv_heads
        for row in range(qkv.shape[0]):
            angles = rope[positions[row]]
            cos, sin = angles[:half], angles[half:]
            place = blocks[row] * layers + layer
            for head in range(heads + kv_heads):
                x = qkv[row, head * head_dim : (head + 1) * head_dim]
                if len(q_norm):
                    _normalize(x, q_norm if head < heads else k_norm, eps, head_dim, x)
                for i in range(half):
                    first, second = x[i], x[i + half]
                    x[i] = first * cos[i] - second * sin[i]
                    x[i + half] = second * cos[i] + first * sin[i]
            for side in range(2):
                start = (heads + side * kv_heads) * head_dim
                for head in range(kv_heads):
                    at = (((place * 2 + side) * kv_heads + head) * block_size) + offsets[row]
                    target = pool[at * head_dim : (at + 1) * head_dim]
                    source = qkv[row, start + head * head_dim : start + (head + 1) * head_dim]
                    total = np.float32(0.0)
                    for i in range(head_dim):
                        target[i] = source[i]
                        total += source[i]
                    sums[row] += total

    return kernel


@compiled(inline="always")
def _highest(bits: Any, begin: Any, end: Any) -> Any:
    """The maximum of floats, given as their bits: LLVM vectorizes the maximum of integers, which
    order as the floats do once the negative ones are turned about."""
    top = np.int32(-(2**31))
    for t in range(begin, end):
        bit = bits[t]
        bit ^= (bit >> np.int32(31)) & np.int32(0x7FFFFFFF)
        top = max(top, bit)
    top ^= (top >> np.int32(31)) & np.int32(0x7FFFFFFF)
    return np.int32(top).view(np.float32)


@compiled()
def _softmax(line: Any, low: Any, begin: Any, end: Any, high: Any) -> Any:
    """line[begin:end] becomes exp(line - max), the rest of line[low:high] 0; returns the sum."""
    top = _highest(line.view(np.int32), begin, end)
    total = np.float32(0.0)
    for t in range(begin, end):
        weight = _exp(line[t] - top)
        line[t] = weight
        total += weight
    line[low:begin] = np.float32(0.0)
    line[end:high] = np.float32(0.0)
    return total


@compiled(inline="always")
def _add_values(sums: Any, line: Any, values: Any, tokens: Any, head_dim: Any) -> None:
    """sums [head_dim] += weights line [tokens] times values [tokens * head_dim]"""
    for t in range(tokens):
        weight = line[t]
        for i in range(head_dim):
            sums[i] += weight * values[t * head_dim + i]


@functools.cache
def paged_attention(head_dim: int, group: int, block_size: int) -> Callable[..., None]:
    """Attention of single rows, each over its own context; `group` query heads a KV head.

    Three passes: scores of all heads, block by block; softmax; weighted values, block by block.
    So memory is read in runs of all KV heads of a block. Of the last block only values up to `end`
    are read: what lies beyond is another sequence's and maybe not finite, and 0 times it is not 0.
    """
    scale = np.float32(head_dim**-0.5)
    per_head = block_size * head_dim

    @compiled()
    def kernel(
        qkv: Any,  # [T, (heads + 2 kv_heads) * head_dim]
        rows: Any,  # [n] which of the T
        positions: Any,  # [T]
        chunk_of_row: Any,  # [T]
        tables: Any,  # [S, blocks]
        window: Any,  # tokens seen; 0: all
        pool: Any,
        layout: Any,  # (layers, layer, kv_heads)
        scores: Any,  # scratch [heads, blocks * block_size]
        out: Any,  # [n, heads * head_dim]
    ) -> None:
        layers, layer, kv_heads = layout
        for index in range(len(rows)):
            row = rows[index]
            table = tables[chunk_of_row[row]]
            end = positions[row] + 1
            begin = max(0, end - window) if window else 0
            first, last = begin // block_size, (end - 1) // block_size + 1
            for b in range(first, last):
                place = (table[b] * layers + layer) * 2 * kv_heads
                for head in range(kv_heads):
                    start = head * group * head_dim
                    query = qkv[row, start : start + group * head_dim]
                    keys = pool[(place + head) * per_head : (place + head + 1) * per_head]
                    for g in range(group):
                        line = scores[head * group + g, b * block_size : (b + 1) * block_size]
                        for t in range(block_size):
                            dot = np.float32(0.0)
                            for i in range(head_dim):
                                dot += query[g * head_dim + i] * keys[t * head_dim + i]
                            line[t] = dot * scale
            for h in range(kv_heads * group):
                line = scores[h]
                total = _softmax(line, first * block_size, begin, end, last * block_size)
                inverse = np.float32(1.0) / total
                for t in range(begin, end):
                    line[t] *= inverse
            target = out[index]
            target[:] = np.float32(0.0)
            for b in range(first, last):
                tokens = min(block_size, end - b * block_size)
                place = ((table[b] * layers + layer) * 2 + 1) * kv_heads
                for head in range(kv_heads):
                    values = pool[(place + head) * per_head : (place + head + 1) * per_head]
                    for g in range(group):
                        h = head * group + g
                        line = scores[h, b * block_size : (b + 1) * block_size]
                        sums = target[h * head_dim : (h + 1) * head_dim]
                        if tokens < block_size:
                            _add_values(sums, line, values, tokens, head_dim)
                            continue
                        for i in range(head_dim):
                            total = sums[i]
                            for t in range(block_size):
                                total += line[t] * values[t * head_dim + i]
                            sums[i] = total

    return kernel


@functools.cache
def gather_context(head_dim: int, block_size: int) -> Callable[..., None]:
    """Copies one sequence's keys, transposed, and values out of the pool: whole tiles, with zeros
    where no token of the sequence has been. `block_size` is a power of two, so that a tile is
    whole blocks or a block whole tiles."""
    per_head, run = block_size * head_dim, min(block_size, TILE)

    @compiled()
    def kernel(
        table: Any,  # [blocks]
        first: Any,  # tile to copy
        end: Any,  # tokens of the sequence
        pool: Any,
        layout: Any,  # (layers, layer, kv_heads)
        keys: Any,  # [kv_heads, tiles, head_dim * TILE]
        values: Any,  # [kv_heads, tiles, TILE * head_dim]
    ) -> None:
        layers, layer, kv_heads = layout
        for b in range(first * TILE // block_size, (end - 1) // block_size + 1):
            place = (table[b] * layers + layer) * 2 * kv_heads
            for part in range(0, block_size, run):
                tile, inside = divmod(b * block_size + part, TILE)
                for head in range(kv_heads):
                    start = (place + head) * per_head + part * head_dim
                    source = pool[start : start + run * head_dim]
                    target = keys[head, tile]
                    for i in range(head_dim):
                        for t in range(run):
                            target[i * TILE + inside + t] = source[t * head_dim + i]
                    start += kv_heads * per_head
                    source = pool[start : start + run * head_dim]
                    target = values[head, tile, inside * head_dim : (inside + run) * head_dim]
                    for i in range(run * head_dim):
                        target[i] = source[i]
        tile, inside = (end - 1) // TILE, (end - 1) % TILE + 1
        for head in range(kv_heads):
            values[head, tile, inside * head_dim :] = np.float32(0.0)
            for i in range(head_dim):
                keys[head, tile, i * TILE + inside : (i + 1) * TILE] = np.float32(0.0)

    return kernel


@compiled(inline="always")
def _scores(queries: Any, keys: Any, one: Any, two: Any, head_dim: Any) -> None:
    """one, two [TILE]: the products of queries [2 * head_dim] and keys [head_dim * TILE]"""
    one[:] = np.float32(0.0)
    two[:] = np.float32(0.0)
    for part in range(0, head_dim, UNROLL):
        k = keys[part * TILE : (part + UNROLL) * TILE]
        q = queries[part : part + UNROLL]
        r = queries[head_dim + part : head_dim + part + UNROLL]
        for t in range(TILE):
            a, b = one[t], two[t]
            for i in range(UNROLL):
                a += q[i] * k[i * TILE + t]
                b += r[i] * k[i * TILE + t]
            one[t] = a
            two[t] = b


@compiled(inline="always")
def _weights(scores: Any, begin: Any, end: Any, top: Any) -> Any:
    """exp(score - new top) of those in begin:end, nearly 0 for others; new top and sum."""
    scores[:begin] = LOWEST_SCORE
    scores[end:] = LOWEST_SCORE
    top = max(top, _highest(scores.view(np.int32), 0, TILE))
    total = np.float32(0.0)
    for t in range(TILE):
        weight = _exp(scores[t] - top)
        scores[t] = weight
        total += weight
    return top, total


@compiled(inline="always")
def _add_weighted(
    one: Any, two: Any, values: Any, first: Any, second: Any, shrinks: Any, head_dim: Any, end: Any
) -> None:
    """first, second [head_dim] = themselves * shrinks + weights one, two [end] times values
    [TILE * head_dim]"""
    for i in range(head_dim):
        first[i] *= shrinks[0]
        second[i] *= shrinks[1]
    for part in range(0, end, UNROLL):
        w, x = one[part : part + UNROLL], two[part : part + UNROLL]
        v = values[part * head_dim : (part + UNROLL) * head_dim]
        for i in range(head_dim):
            a, b = first[i], second[i]
            for t in range(UNROLL):
                a += w[t] * v[t * head_dim + i]
                b += x[t] * v[t * head_dim + i]
            first[i] = a
            second[i] = b


@functools.cache
def chunk_attention(head_dim: int, group: int) -> Callable[..., None]:
    """Causal attention of one chunk's rows over gathered context, tile by tile with a running
    softmax (FlashAttention, arXiv:2205.14135): a tile of keys and values stays in the L1 cache
    while all rows of the chunk pass it, two at a time so that each load serves both."""
    scale = np.float32(head_dim**-0.5)

    @compiled()
    def kernel(
        qkv: Any,  # [rows, (heads + 2 kv_heads) * head_dim]
        start: Any,  # position of the first row
        window: Any,  # tokens seen; 0: all
        keys: Any,  # [kv_heads, tiles, head_dim * TILE]
        values: Any,  # [kv_heads, tiles, TILE * head_dim]
        tops: Any,  # scratch [rows rounded up to even]
        sums: Any,  # the same
        out: Any,  # [rows, heads * head_dim]
    ) -> None:
        rows, kv_heads = qkv.shape[0], keys.shape[0]
        queries, unused = np.empty(2 * head_dim, np.float32), np.empty(head_dim, np.float32)
        one, two = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
        first_tile = max(0, start + 1 - window) // TILE if window else 0
        for head in range(kv_heads * group):
            left, right = head * head_dim, (head + 1) * head_dim
            tops[:] = LOWEST_SCORE
            sums[:] = np.float32(0.0)
            for row in range(rows):
                out[row, left:right] = np.float32(0.0)
            for tile in range(first_tile, (start + rows - 1) // TILE + 1):
                keys_tile, values_tile = keys[head // group, tile], values[head // group, tile]
                first_row = max(0, tile * TILE - start) // 2 * 2
                for row in range(first_row, rows, 2):
                    other = min(row + 1, rows - 1)
                    source, beside = qkv[row, left:right], qkv[other, left:right]
                    for i in range(head_dim):
                        queries[i] = source[i] * scale
                        queries[head_dim + i] = beside[i] * scale
                    _scores(queries, keys_tile, one, two, head_dim)
                    seen = start + row + 1 - tile * TILE  # of the tile, by `row`
                    begin = seen - window if window else 0
                    top, total = _weights(one, _inside(begin), _inside(seen), tops[row])
                    begin = seen + 1 - window if window else 0
                    top2, total2 = _weights(two, _inside(begin), _inside(seen + 1), tops[row + 1])
                    shrinks = (_exp(tops[row] - top), _exp(tops[row + 1] - top2))
                    sums[row] = sums[row] * shrinks[0] + total
                    sums[row + 1] = sums[row + 1] * shrinks[1] + total2
                    tops[row], tops[row + 1] = top, top2
                    target = out[other, left:right] if other > row else unused
                    end = _inside(seen + 1)
                    _add_weighted(
                        one, two, values_tile, out[row, left:right], target, shrinks, head_dim, end
                    )
            for row in range(rows):
                inverse = np.float32(1.0) / sums[row]
                target = out[row, left:right]
                for i in range(head_dim):
                    target[i] *= inverse

    return kernel


@compiled(inline="always")
def _inside(place: Any) -> Any:
    return min(max(place, 0), TILE)
