"""Throughput at 8 concurrent requests of ~280 tokens with nothing in common, 32 tokens out.

Starts the default cluster (one core for each worker) unless told an endpoint. With --peer, an
OpenAI server is given the same token ids in the same run, round by round in turn, and the ratio is
printed: machines are noisy, ratios of one run less so.

    python benchmarks/throughput.py --peer http://127.0.0.1:8100 --json result.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from clusters import DEFAULT_MODEL, DISAGGREGATED, running, spec

from crossdock.bench.metrics import RequestRecord, Run, count_errors, summarize
from crossdock.bench.run import BenchConfig, describe_machine, run_bench

# What the default cluster must reach on 2 cores: (metric, its value, bound, at most or at least).
BOUNDS = (
    ("output tok/s", lambda r: r["output_throughput"], 16.25, "at least"),
    ("ITL p99, s", lambda r: r["itl_s"]["p99"], 0.25, "at most"),
    ("TTFT p50, s", lambda r: r["ttft_s"]["p50"], 13.8, "at most"),
)


def config(endpoint: str, options: argparse.Namespace, number: int) -> BenchConfig:
    return BenchConfig(
        endpoint=endpoint,
        style="ids",
        concurrency=options.concurrency,
        num_requests=options.requests,
        input_tokens=(options.input_len - 20, options.input_len + 20),
        output_tokens=(options.output_len, options.output_len),
        seed=options.seed + number,  # each round its own prompts, the same for every endpoint
    )


def measure(
    endpoints: dict[str, str],
    options: argparse.Namespace,
    turn: Callable[[str], AbstractContextManager[object]] = contextlib.nullcontext,
) -> dict[str, list[Run]]:
    """Each endpoint's rounds, by its name; a round is within its `turn`."""
    runs: dict[str, list[Run]] = {name: [] for name in endpoints}
    for number in range(options.rounds):
        for name, endpoint in endpoints.items():
            with turn(name):
                report = asyncio.run(run_bench(config(endpoint, options, number)))
            runs[name].append(report.run)
            rate = report.results["output_throughput"]
            print(
                f"round {number + 1}: {name} {rate:.1f} tok/s, {report.failed} failed", flush=True
            )
    return runs


def pooled(runs: list[Run]) -> dict[str, Any]:
    """The rounds as one run, laid end to end."""
    records: list[RequestRecord] = []
    offset = 0.0
    for run in runs:
        records += [_later(record, offset) for record in run.records]
        offset += run.duration_s
    return summarize(Run(tuple(records))) | {"errors": count_errors(records)}


def _later(record: RequestRecord, by: float) -> RequestRecord:
    moved = {
        "due_s": record.due_s + by,
        "sent_s": record.sent_s + by,
        "finished_s": record.finished_s + by,
        "arrivals_s": tuple(at + by for at in record.arrivals_s),
    }
    return RequestRecord(**(vars(record) | moved))


def main() -> int:
    options = arguments()
    with contextlib.ExitStack() as stack:
        endpoint = options.endpoint
        if not endpoint:
            yaml = spec("throughput", DISAGGREGATED, options.model)
            endpoint = "grpc://" + stack.enter_context(running(yaml)).grpc
        endpoints = {"crossdock": endpoint} | ({"peer": options.peer} if options.peer else {})
        runs = measure(endpoints, options)
    results = {name: pooled(each) for name, each in runs.items()}
    kept = show(results)
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        report = {"machine": describe_machine(), "config": settings, "results": results}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    failed = sum(each["failed"] for each in results.values())
    return 0 if kept and not failed else 1


def show(results: dict[str, dict[str, Any]]) -> bool:
    show_figures(results)
    kept = True
    for name, value_of, bound, kind in BOUNDS:
        value = value_of(results["crossdock"])
        holds = value >= bound if kind == "at least" else value <= bound
        kept = kept and holds
        print(f"{'ok  ' if holds else 'MISS'} {name}: {value:.3f}, {kind} {bound}")
    return kept


def show_figures(results: dict[str, dict[str, Any]]) -> None:
    for name, each in results.items():
        ttft, itl = each["ttft_s"], each["itl_s"]
        print(
            f"{name}: {each['output_throughput']:.2f} tok/s out, TTFT p50 {ttft['p50']:.2f} s, "
            f"ITL p50 {itl['p50']:.3f} s, p99 {itl['p99']:.3f} s, hit rate {each['hit_rate']:.3f}"
        )
    if "peer" in results:
        ours, theirs = results["crossdock"], results["peer"]
        print(
            f"tok/s ratio {ours['output_throughput'] / theirs['output_throughput']:.2f}, ", end=""
        )
        print(f"TTFT p50 ratio {ours['ttft_s']['p50'] / theirs['ttft_s']['p50']:.2f}, ", end="")
        print(f"ITL p99 ratio {ours['itl_s']['p99'] / theirs['itl_s']['p99']:.2f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--endpoint", default="", help="grpc://host:port of a running cluster")
    parser.add_argument("--peer", default="", help="http://host:port of an OpenAI server")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    add_load(parser)
    return parser.parse_args()


def add_load(parser: argparse.ArgumentParser) -> None:
    """What is sent, and where the figures go."""
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--requests", type=int, default=32, help="a round")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--input-len", type=int, default=280, help="± 20, uniform")
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31))
    parser.add_argument("--json", type=Path)


if __name__ == "__main__":
    raise SystemExit(main())
