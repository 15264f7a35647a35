"""What separating the phases buys: inter-token latency of chats while long prompts storm in.

Clusters of the same cores, one after another and interleaved over rounds: one prefill and one
decode worker, and two workers that do both. Each sees the same load: chats that decode steadily,
then bursts of long prompts. The figure is the p99 of the chats' inter-token latency during the
storm, disaggregated over co-located; below 1 is better. Co-located workers trade that latency
against the storm's TTFT by the size of their prefill chunks, so several sizes can be compared.
What each pays (the storm's own TTFT, the chats' throughput) is printed beside it.

    python benchmarks/compare_colocated.py --rounds 2 --json result.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from clusters import DEFAULT_MODEL, DISAGGREGATED, colocated, running, spec

from crossdock.bench.load import GrpcEndpoint, Job, closed_loop, open_loop, send
from crossdock.bench.metrics import RequestRecord, count_errors, distribution
from crossdock.bench.run import describe_machine
from crossdock.bench.traces import PromptMaker, random_workload


@dataclass
class Seen:
    """What all rounds of one variant measured."""

    calm: list[float] = field(default_factory=list)  # inter-token gaps before the storm, s
    storm: list[float] = field(default_factory=list)  # and during it
    storm_ttft: list[float] = field(default_factory=list)
    chat_tokens_per_s: list[float] = field(default_factory=list)
    records: list[RequestRecord] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        return {
            "itl_calm_s": distribution(self.calm),
            "itl_storm_s": distribution(self.storm),
            "storm_ttft_s": distribution(self.storm_ttft),
            "chat_tokens_per_s": sum(self.chat_tokens_per_s) / len(self.chat_tokens_per_s),
            "errors": count_errors(self.records),
        }


def made_up(count: int, tokens: int, output: int, seed: int) -> list[Job]:
    workload = random_workload(count, (tokens, tokens), (output, output), 0, seed)
    maker = PromptMaker(workload.block_size, seed=seed)
    return [
        Job(index, 0.0, tuple(maker.token_ids(row)), "", row.output_tokens)
        for index, row in enumerate(workload.requests)
    ]


def storm_jobs(options: argparse.Namespace, seed: int) -> list[Job]:
    jobs = made_up(options.bursts * options.burst, options.storm_tokens, 2, seed)
    return [
        Job(
            job.index,
            options.calm_s + (job.index // options.burst) * options.burst_every_s,
            job.token_ids,
            "",
            job.output_tokens,
        )
        for job in jobs
    ]


async def one_round(target: str, options: argparse.Namespace, seed: int, seen: Seen) -> None:
    endpoint = GrpcEndpoint(target, "", 600.0)
    length = options.calm_s + options.bursts * options.burst_every_s
    chats = made_up(2000, options.chat_tokens, options.chat_output, 2 * seed)
    storm = storm_jobs(options, 2 * seed + 1)
    try:
        for job in made_up(2, 64, 4, 1_000_003 + seed):
            await send(endpoint, job, 0.0)
        talked, stormed = await asyncio.gather(
            closed_loop(endpoint, chats, options.chats, duration_s=length),
            open_loop(endpoint, storm),
        )
    finally:
        await endpoint.close()
    begin = options.calm_s
    end = max((record.finished_s for record in stormed), default=begin)
    for record in talked:
        for earlier, later in pairwise(record.arrivals_s):
            if later < begin:
                seen.calm.append(later - earlier)
            elif earlier < end:
                seen.storm.append(later - earlier)
    seen.storm_ttft += [record.ttft for record in stormed if record.ttft is not None]
    during = [t for record in talked for t in record.arrivals_s if begin <= t < end]
    seen.chat_tokens_per_s.append(len(during) / (end - begin))
    seen.records += talked + stormed


def main() -> int:
    options = arguments()
    pools_of = {"disaggregated": DISAGGREGATED}
    pools_of |= {f"colocated-{size}": colocated(size) for size in options.colocated_chunks}
    seen = {name: Seen() for name in pools_of}
    for number in range(options.rounds):
        for name, pools in pools_of.items():
            with running(spec(name, pools, options.model), verbose=options.verbose) as cluster:
                asyncio.run(one_round(cluster.grpc, options, number, seen[name]))
            print(f"round {number + 1} of {options.rounds}: {name} done", flush=True)
    variants = {name: each.report() for name, each in seen.items()}
    p99 = {name: each["itl_storm_s"]["p99"] for name, each in variants.items()}
    ours = p99.pop("disaggregated")
    ratios = {name: ours / theirs for name, theirs in p99.items()}
    show(variants, ratios)
    if options.json:
        report = {
            "machine": describe_machine(),
            "config": {name: value for name, value in vars(options).items() if name != "json"},
            "variants": variants,
            "p99_itl_ratio": ratios,
        }
        options.json.write_text(json.dumps(report, indent=2, default=str) + "\n")
    return 1 if any(each["errors"] for each in variants.values()) else 0


def show(variants: dict[str, dict[str, Any]], ratios: dict[str, float]) -> None:
    print(
        f"{'':<15} {'ITL calm p50':>13} {'storm p50':>10} {'storm p99':>10} {'storm max':>10}",
        end="",
    )
    print(f" {'storm TTFT p50':>15} {'chat tok/s':>11}")
    for name, each in variants.items():
        calm, storm = each["itl_calm_s"], each["itl_storm_s"]
        print(
            f"{name:<15} {calm['p50']:>11.3f} s {storm['p50']:>8.3f} s {storm['p99']:>8.3f} s",
            end="",
        )
        print(f" {storm['max']:>8.3f} s {each['storm_ttft_s']['p50']:>13.2f} s", end="")
        print(f" {each['chat_tokens_per_s']:>11.1f}")
        for kind, count in each["errors"].items():
            print(f"  {count['count']} × {kind}: {count['example']}")
    for name, ratio in ratios.items():
        print(f"p99 ITL under the storm, disaggregated over {name}: {ratio:.3f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument(
        "--colocated-chunks",
        type=int,
        nargs="+",
        default=[256],
        metavar="TOKENS",
        help="prefill chunk of the co-located workers; one cluster for each",
    )
    parser.add_argument("--rounds", type=int, default=2, help="of both clusters, interleaved")
    parser.add_argument("--chats", type=int, default=4, help="that decode at any time")
    parser.add_argument("--chat-tokens", type=int, default=64, help="prompt tokens of a chat")
    parser.add_argument("--chat-output", type=int, default=200)
    parser.add_argument("--calm-s", type=float, default=15.0, help="before the first burst")
    parser.add_argument("--bursts", type=int, default=3)
    parser.add_argument("--burst", type=int, default=4, help="prompts in a burst")
    parser.add_argument("--burst-every-s", type=float, default=12.0)
    parser.add_argument("--storm-tokens", type=int, default=1000, help="of a storming prompt")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--verbose", action="store_true", help="show what the clusters print")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
