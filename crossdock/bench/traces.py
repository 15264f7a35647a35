"""Workloads: recorded traces, synthetic ones of the same shape, and the token ids of their prompts.

A prompt is made from names of its blocks: equal names give equal token ids, so two requests that
share leading names share that prefix. Nothing is random but by `seed`.
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from crossdock.proto.errors import ConfigError

COMMON_BLOCK_SIZES = (512, 16)  # tokens a block: as published, and of the derived trace
AZURE_BLOCK_SIZE = 16


@dataclass(frozen=True)
class TraceRequest:
    """One request of a workload: when, how long, and what it shares."""

    at_s: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...]  # one name for each block of the prompt, the last maybe partial
    tenant: str = ""
    priority: int = 0  # 0 is the most urgent
    deadline_s: float | None = None  # after its arrival; None: it has none


@dataclass(frozen=True)
class Trace:
    """Requests with their times of arrival."""

    requests: tuple[TraceRequest, ...]
    block_size: int  # tokens a block

    @property
    def hit_rate(self) -> float:
        """Tokens in whole blocks seen before / prompt tokens: the best any prefix cache can do."""
        seen: set[int] = set()
        hit = total = 0
        for request in self.requests:
            whole = request.block_ids[: request.input_tokens // self.block_size]
            known = itertools.takewhile(seen.__contains__, whole)
            hit += sum(1 for _ in known) * self.block_size
            seen.update(whole)
            total += request.input_tokens
        return hit / total if total else 0.0


@dataclass(frozen=True)
class TraceOptions:
    """How a trace is replayed. Rows are taken in file order."""

    limit: int = 0  # rows; 0 = all
    time_scale: float = 1.0  # multiplies the times between requests: 0.5 is twice as fast
    jitter_s: float = 0.0  # each request is sent up to this much later, uniformly
    max_input: int = 0  # longer prompts are cut to this many tokens; 0 = no cut
    max_output: int = 0
    seed: int = 0


def load_trace(path: Path, options: TraceOptions = TraceOptions()) -> Trace:
    """Mooncake .jsonl, whose rows may have `tenant`, `priority` and `deadline_ms` besides, or Azure
    .csv. Raises ConfigError naming file, line and column."""
    if not path.is_file():
        raise ConfigError("trace", "no such file", str(path))
    azure = path.suffix.lower() == ".csv"
    read: Callable[[Any], TraceRequest | None] = _mooncake_row
    if azure:
        read = functools.partial(_azure_row, itertools.count())
    requests = []
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        rows: Iterable[Any] = csv.DictReader(lines) if azure else lines
        for number, row in enumerate(rows, 2 if azure else 1):
            try:
                request = read(row)
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                raise ConfigError("row", f"not a request: {error!r}", f"{path}:{number}") from None
            if request is None:
                continue
            if not math.isfinite(request.at_s):
                raise ConfigError("timestamp", "must be a finite number", f"{path}:{number}")
            if request.input_tokens < 1 or request.output_tokens < 1:
                raise ConfigError("input_length", "lengths must be 1 or more", f"{path}:{number}")
            if request.deadline_s is not None and not 0 < request.deadline_s < math.inf:
                raise ConfigError("deadline_ms", "must be above 0", f"{path}:{number}")
            requests.append(request)
    if not requests:
        raise ConfigError("trace", "holds no requests", str(path))
    size = AZURE_BLOCK_SIZE if azure else infer_block_size(requests, str(path))
    return replay(Trace(tuple(requests), size), options)


def _mooncake_row(line: str) -> TraceRequest | None:
    """None for an empty line."""
    if not line.strip():
        return None
    row = dict(json.loads(line))
    deadline_ms = row.get("deadline_ms")
    return TraceRequest(
        at_s=float(row["timestamp"]) / 1000,
        input_tokens=int(row["input_length"]),
        output_tokens=int(row["output_length"]),
        block_ids=tuple(int(name) for name in row["hash_ids"]),
        tenant=str(row.get("tenant", "")),
        priority=int(row.get("priority", 0)),
        deadline_s=None if deadline_ms is None else float(deadline_ms) / 1000,
    )


def _azure_row(names: Iterator[int], row: Mapping[str, str]) -> TraceRequest:
    """Without names of its prefix: every block is its own."""
    tokens = max(1, int(row["ContextTokens"]))
    stamp = row["TIMESTAMP"][:26]  # seven decimals are one more than Python reads
    return TraceRequest(
        at_s=datetime.fromisoformat(stamp).timestamp(),
        input_tokens=tokens,
        output_tokens=max(1, int(row["GeneratedTokens"])),
        block_ids=tuple(itertools.islice(names, math.ceil(tokens / AZURE_BLOCK_SIZE))),
    )


def replay(trace: Trace, options: TraceOptions) -> Trace:
    """The trace as the options want it, starting at time 0 and sorted by time."""
    rows = trace.requests[: options.limit or None]
    rng = np.random.default_rng([options.seed, 1])
    start = min(row.at_s for row in rows)
    made = []
    for row in rows:
        at = (row.at_s - start) * options.time_scale + rng.uniform() * options.jitter_s
        tokens = min(row.input_tokens, options.max_input or row.input_tokens)
        output = min(row.output_tokens, options.max_output or row.output_tokens)
        blocks = row.block_ids[: math.ceil(tokens / trace.block_size)]
        made.append(
            replace(row, at_s=at, input_tokens=tokens, output_tokens=output, block_ids=blocks)
        )
    return replace(trace, requests=tuple(sorted(made, key=lambda row: row.at_s)))


def infer_block_size(requests: Sequence[TraceRequest], where: str = "") -> int:
    """The block size for which every row has ceil(input / size) names."""
    low, high = 1, 1 << 31
    for row in requests:
        count = len(row.block_ids)
        if count == 0:
            raise ConfigError("hash_ids", "must not be empty", where)
        low = max(low, math.ceil(row.input_tokens / count))
        if count > 1:
            high = min(high, math.ceil(row.input_tokens / (count - 1)) - 1)
    if low > high:
        raise ConfigError("hash_ids", "no block size fits the number of ids in every row", where)
    return next((size for size in COMMON_BLOCK_SIZES if low <= size <= high), low)


@dataclass(frozen=True)
class SyntheticOptions:
    """A workload with the shape of the published conversation traces: bursts, long-tailed lengths,
    one block that all share, and conversations whose turns extend each other."""

    requests: int = 1000
    rate: float = 3.0  # requests a second, on average
    burst_s: float = 3.0  # arrivals come in steps of this length; 0 = Poisson
    mean_input: float = 420.0  # new tokens a turn, before what it inherits
    mean_output: float = 11.0
    sigma: float = 0.9  # of the logarithm of both lengths
    continued: float = 0.3  # share of requests that are a later turn of a conversation
    max_input: int = 4000
    block_size: int = 16
    seed: int = 0


def synthesize(options: SyntheticOptions) -> Trace:
    """A trace of the shape asked for; the same for the same seed."""
    rng = np.random.default_rng([options.seed, 2])
    names = itertools.count(1)
    conversations: list[TraceRequest] = []
    requests = []
    now = 0.0
    for _ in range(options.requests):
        now += rng.exponential(1 / options.rate)
        at = math.floor(now / options.burst_s) * options.burst_s if options.burst_s else now
        continues = bool(conversations) and rng.uniform() < options.continued
        slot = int(rng.integers(len(conversations))) if continues else len(conversations)
        earlier = conversations[slot].block_ids if continues else (0,)
        # A later turn keeps the whole blocks of the earlier one: its partial last block changes.
        kept = earlier[:-1] if len(earlier) > 1 else earlier
        fresh = _long_tailed(rng, options.mean_input, options.sigma)
        tokens = min(len(kept) * options.block_size + fresh, options.max_input)
        count = math.ceil(tokens / options.block_size)
        blocks = (*kept, *itertools.islice(names, max(0, count - len(kept))))[:count]
        request = TraceRequest(
            at, tokens, _long_tailed(rng, options.mean_output, options.sigma), tuple(blocks)
        )
        requests.append(request)
        conversations[slot : slot + 1] = [request]
    return Trace(tuple(requests), options.block_size)


def _long_tailed(rng: np.random.Generator, mean: float, sigma: float) -> int:
    """Log-normal with this mean, 1 at least."""
    return max(1, round(rng.lognormal(math.log(mean) - sigma * sigma / 2, sigma)))


def write_mooncake(trace: Trace, path: Path) -> None:
    """Writes a trace as JSON lines in Mooncake's format, and what load_trace reads besides."""
    with path.open("w", encoding="utf-8") as out:
        for row in trace.requests:
            line: dict[str, Any] = {
                "timestamp": round(row.at_s * 1000),
                "input_length": row.input_tokens,
                "output_length": row.output_tokens,
                "hash_ids": list(row.block_ids),
            }
            if row.tenant:
                line["tenant"] = row.tenant
            if row.priority:
                line["priority"] = row.priority
            if row.deadline_s is not None:
                line["deadline_ms"] = 1000 * row.deadline_s
            out.write(json.dumps(line) + "\n")


def random_workload(
    requests: int,
    input_tokens: tuple[int, int],
    output_tokens: tuple[int, int],
    prefix_tokens: int,
    seed: int,
) -> Trace:
    """Prompts with nothing in common beyond a prefix that all share; lengths are inclusive ranges.
    Block size 1: each token has an id of its own, so that the shared prefix has any length."""
    rng = np.random.default_rng([seed, 3])
    names = itertools.count(prefix_tokens)
    made = []
    for _ in range(requests):
        tokens = int(rng.integers(*input_tokens, endpoint=True))
        output = int(rng.integers(*output_tokens, endpoint=True))
        shared = min(prefix_tokens, tokens)
        blocks = (*range(shared), *itertools.islice(names, tokens - shared))
        made.append(TraceRequest(0.0, tokens, output, blocks))
    return Trace(tuple(made), 1)


def arrival_times(count: int, rate: float, poisson: bool, seed: int) -> list[float]:
    """Seconds from the start at which an open loop sends its requests."""
    if not poisson:
        return [index / rate for index in range(count)]
    gaps = np.random.default_rng([seed, 4]).exponential(1 / rate, count)
    return [float(at) for at in np.cumsum(gaps) - gaps[0]]


@dataclass(frozen=True)
class PromptMaker:
    """Token ids of a prompt from the names of its blocks, uniform in [low, high)."""

    block_size: int
    low: int = 1000
    high: int = 30000
    seed: int = 0

    def token_ids(self, request: TraceRequest) -> list[int]:
        """A prompt whose blocks are those of its hashes: equal hashes, equal tokens."""
        if self.block_size == 1:
            made = self._tokens_by_name(request.block_ids)
        else:
            about = (self.block_size, self.low, self.high)
            made = [t for name in request.block_ids for t in _block_tokens(self.seed, name, *about)]
        return made[: request.input_tokens]

    def text(self, request: TraceRequest) -> str:
        """About as many tokens of plain English: one common word for each."""
        return " ".join(WORDS[token % len(WORDS)] for token in self.token_ids(request))

    def _tokens_by_name(self, names: Iterable[int]) -> list[int]:
        keys = np.fromiter(names, dtype=np.uint64) + np.uint64((self.seed << 32) % (1 << 64))
        return [int(each) for each in self.low + _mix(keys) % np.uint64(self.high - self.low)]


@functools.lru_cache(maxsize=8192)
def _block_tokens(seed: int, name: int, size: int, low: int, high: int) -> tuple[int, ...]:
    rng = np.random.default_rng([seed, 5, name])
    return tuple(int(each) for each in rng.integers(low, high, size))


def _mix(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014): neighbours become unrelated."""
    with np.errstate(over="ignore"):
        keys = keys + np.uint64(0x9E3779B97F4A7C15)
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        keys ^= keys >> np.uint64(31)
    return keys


_COMMON = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city community name president team minute idea body information back "
    "parent face others level office door health person art war history party result change "
    "morning reason research girl guy moment air teacher force education foot boy age policy music "
    "market sense nation plan college interest death experience effect use class control field "
    "development role effort rate heart drug show leader light voice wife police mind price report"
)
WORDS = _COMMON.split()
