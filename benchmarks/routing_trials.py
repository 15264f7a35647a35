"""Trials of the router on a virtual clock: the real policy and view before simple queueing workers.

    python benchmarks/routing_trials.py            # all of them, some 30 s
    python benchmarks/routing_trials.py hung room  # these
    python benchmarks/routing_trials.py cached --policy kv_cost --policy predicted_latency

hung       one of four prefill workers hangs; who gets its work, and what it costs (also _light, and
           _silent: nothing is heard of it any more)
cached     prompts share prefixes; a queue counts what it has to compute
deadlines  short prompts tell little of long ones; what is refused wrongly (also _alike)
links      no pair's bandwidth is known at first; which pairs are used
room       one prefill worker's blocks are pinned by offers that nobody reads
batch      1,000 streams on 100 decode workers, 8 of which have the shared system prompt cached
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from routing_cluster import BLOCK, LOST_AFTER_S, Cluster, Prompt, Speed, arrivals, chain

from crossdock.router.placement.latency import predicted_latency as OURS
from crossdock.router.placement.policy import POLICIES, Policies, Policy
from crossdock.tables import console_of, table

Figures = dict[str, float]


def times_of(prompts: list[Prompt], share: float = 0.9) -> Figures:
    ttfts = sorted(prompt.ttft or 0.0 for prompt in prompts)
    tail = ttfts[min(len(ttfts) - 1, int(share * len(ttfts)))]
    return {"mean TTFT, s": statistics.mean(ttfts), f"p{100 * share:.0f}, s": tail}


def prompts_of(
    cluster: Cluster,
    tokens: tuple[int, int],
    prefixes: list[list[bytes]] | None = None,
    **more: Any,
) -> Callable[[], Prompt]:
    """Makes prompts of so many tokens of their own, after one of the prefixes."""
    rng = random.Random(5)

    def make() -> Prompt:
        prefix = rng.choice(prefixes) if prefixes else []
        length = len(prefix) * BLOCK + rng.randint(*tokens)
        return Prompt(length, chain(rng, length, prefix), cluster.clock.now, **more)

    return make


def hung(
    policy: Policy = OURS,
    load_of: int = 4,
    start: float = 20.0,
    seconds: float = 60.0,
    silent: bool = False,
    watched_s: float = LOST_AFTER_S,
) -> Figures:
    """At 80 % of what `load_of` workers can do. silent: the whole process hangs, not the engine
    alone, and says nothing any more. watched_s: for how long it is counted who gets requests."""
    speed = Speed(base=0.005, per_token=1 / 2000)
    of_one = 1 / (576 * (speed.per_token + speed.base / speed.chunk_tokens))
    tails, share = {}, 0.0
    for workers in (3, 4):
        cluster = Cluster(speed, policy=policy, prefills=workers, decodes=4)
        arrivals(cluster, 0.8 * load_of * of_one, start + seconds, prompts_of(cluster, (128, 1024)))
        if workers == 4:
            cluster.clock.after(start, lambda cluster=cluster: cluster.hang("p3", silent))
        cluster.clock.run(start + seconds + LOST_AFTER_S)
        after = [p for at, p in cluster.placed if start + 1 <= at < start + watched_s]
        share = sum(placement.prefill == "p3" for placement in after) / len(after)
        tails[workers] = times_of([p for p in cluster.prompts if p.arrived >= start])["p90, s"]
    return {"share of the hung one after 1 s, %": 100 * share, "TTFT p90, s": tails[4],
            "with three healthy ones, s": tails[3], "ratio": tails[4] / tails[3]}  # fmt: skip


def hung_light(policy: Policy = OURS) -> Figures:
    """The same at 80 % of what the three others can do."""
    return hung(policy, load_of=3)


def hung_silent(policy: Policy = OURS) -> Figures:
    """A process that was stopped; in the first 10 s."""
    return hung(policy, silent=True, watched_s=10.0)


def cached(policy: Policy = OURS) -> Figures:
    speed = Speed(base=0.005, per_token=1 / 5000, chunk_tokens=512)
    cluster = Cluster(speed, policy=policy, prefills=4, decodes=4, blocks=3000)
    prefixes = [chain(cluster.rng, 4000) for _ in range(12)]
    arrivals(cluster, 10.0, 60.0, prompts_of(cluster, (100, 1900), prefixes))
    cluster.clock.run(200)
    return times_of(cluster.prompts)


def deadlines(
    policy: Policy = OURS, short: tuple[int, int] = (5, 100), seconds: float = 120.0
) -> Figures:
    """Beside 10 short prompts a second, some of 16,000 tokens, which are 0.8 s of work."""
    speed = Speed(base=0.03, per_token=1 / 27_000, chunk_tokens=2048)
    cluster = Cluster(speed, policy=policy, prefills=1, decodes=1)
    asked: Counter[float] = Counter()

    def make() -> Prompt:
        now, rng = cluster.clock.now, cluster.rng
        if now < 10 or rng.random() > 0.05:
            length = rng.randint(*short)
            return Prompt(length, chain(rng, length), now)
        allowed = rng.choice([0.5, 5.0])
        asked[allowed] += 1
        return Prompt(16_000, chain(rng, 16_000), now, deadline=now + allowed)

    arrivals(cluster, 10.0, seconds, make)
    cluster.clock.run(seconds + 60)
    taken = Counter(round(p.deadline - p.arrived, 1) for p in cluster.prompts if p.deadline)
    return {f"taken with {s:g} s, %": 100 * taken[s] / asked[s] for s in (5.0, 0.5)}


def deadlines_alike(policy: Policy = OURS) -> Figures:
    """The short ones are all of 50 tokens: they do not tell a step's base from its slope."""
    return deadlines(policy, (50, 50))


def links(policy: Policy = OURS) -> Figures:
    speed = Speed(base=0.005, per_token=1 / 20_000, chunk_tokens=2048)
    cluster = Cluster(speed, policy=policy, prefills=8, decodes=8)
    arrivals(cluster, 20.0, 50.0, prompts_of(cluster, (2000, 2000), output=50))
    cluster.clock.run(120)
    pairs = {(p.prefill, p.decode) for _, p in cluster.placed}
    return {"pairs used, of 64": len(pairs)} | times_of(cluster.prompts)


def room(policy: Policy = OURS) -> Figures:
    speed = Speed(base=0.005, per_token=1 / 5000, chunk_tokens=512)
    cluster = Cluster(speed, policy=policy, prefills=4, decodes=4, blocks=1000)
    pinned = cluster.workers["p0"]
    held = pinned.pool.allocate(950)  # until leases end that nobody renews
    pinned.report()
    arrivals(cluster, 8.0, 30.0, prompts_of(cluster, (900, 1500)))
    cluster.clock.after(30.0, lambda: pinned.pool.release(held))
    cluster.clock.after(30.0, pinned.turn)
    cluster.clock.run(100)
    there = sum(placement.prefill == "p0" for _, placement in cluster.placed)
    return {f"of {len(cluster.placed)} prompts, sent there": there} | times_of(
        cluster.prompts, 0.99
    )


def batch(policy: Policy = OURS, streams: int = 1000, workers: int = 100) -> Figures:
    speed = Speed(base=0.002, per_token=1 / 200_000, chunk_tokens=4096)
    cluster = Cluster(speed, policy=policy, prefills=8, decodes=workers, blocks=16_384)
    system = chain(cluster.rng, 1024)
    for i in range(8):
        for block in system:
            cluster.view.index.add(cluster.view.workers[f"d{i}"].slot, block)
    decodes = [worker for name, worker in cluster.workers.items() if name.startswith("d")]
    over, idle = [0], [workers]

    def look() -> None:
        over.append(sum(len(worker.waiting) for worker in decodes))
        idle.append(sum(not worker.running for worker in decodes))
        cluster.clock.after(0.1, look)

    make = prompts_of(cluster, (176, 176), [system], output=400)
    for i in range(streams):
        cluster.clock.after(4 / streams * i, lambda: cluster.arrive(make()))
    look()
    cluster.clock.run(60)
    stalls = sorted(prompt.stall for prompt in cluster.prompts)
    return {"over max_batch": max(over), "idle workers": min(idle),
            "mean token 0 to 1, s": statistics.mean(stalls), "p99, s": stalls[-11]}  # fmt: skip


TRIALS: dict[str, Callable[[Policy], Figures]] = {
    trial.__name__: trial
    for trial in (
        hung,
        hung_light,
        hung_silent,
        cached,
        deadlines,
        deadlines_alike,
        links,
        room,
        batch,
    )
}


def compared(names: Sequence[str], policies: Sequence[str]) -> list[list[str]]:
    """One row a figure: the trial, what it is, and what it is with each of the policies."""
    rows = []
    for name in names:
        found = [TRIALS[name](Policies().named(policy)) for policy in policies]
        for what in found[0]:
            rows.append([name, what, *(f"{figures[what]:.3g}" for figures in found)])
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("trials", nargs="*", metavar="TRIAL", help=", ".join(TRIALS))
    parser.add_argument(
        "--policy", action="append", choices=POLICIES, help="to compare; may be said several times"
    )
    args = parser.parse_args(argv)
    if unknown := set(args.trials) - TRIALS.keys():
        parser.error(f"no trial is called {', '.join(sorted(unknown))}")
    policies = args.policy or ["predicted_latency"]
    rows = compared(args.trials or list(TRIALS), policies)
    console_of().print(table("", ["trial", "figure", *policies], rows, policies))


if __name__ == "__main__":
    main()
