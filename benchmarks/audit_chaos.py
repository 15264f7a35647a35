"""The audit log of a cluster under chaos: one line for each request, whatever became of it.

Runs benchmarks/chaos.py's load and faults against a cluster with an audit log that keeps prompts.
Then each request must have exactly one line with the tokens that its client saw, or, where nothing
was started for it, be one of those that a line counts together; a log with one
byte changed, anywhere, must be found out; and what is in it must be computed again to the token.

    python benchmarks/audit_chaos.py --seed 1 --requests 1000 --model simulated
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chaos
from chaos_report import Asked, End, Outcome

from crossdock.audit_replay import replay
from crossdock.client import Client
from crossdock.router.frontdoor.audit_chain import in_order, verify

REPLAY_S = 60.0
CHANGED_BYTES = 100
OUTCOMES = {End.FINISHED: {"ok"}, End.ABORTED: {"ok", "cancelled"}}


def logs(folder: Path) -> list[Path]:
    """The log of each gateway, without what was rotated out of it."""
    return [path for path in sorted(folder.glob("audit.*")) if path.name.count(".") == 1]


def lines_of(folder: Path, kind: str = "request") -> Iterator[dict[str, Any]]:
    """Every line of this kind, in the order of each gateway."""
    for path in in_order(logs(folder)):
        with path.open("rb") as file:
            yield from (line for line in map(json.loads, file) if line["kind"] == kind)


def sums_of(folder: Path) -> Counter[str]:
    """How many requests have no line of their own, by what became of them."""
    sums: Counter[str] = Counter()
    for line in lines_of(folder, "refused"):
        sums[line["outcome"]] += line["count"]
    return sums


def miscounted(
    outcome: Outcome, lines: dict[str, list[dict[str, Any]]], sums: Counter[str]
) -> list[str]:
    """What is wrong with the lines of the requests that were asked. `sums` count those that ended
    before anything was started, and have none of their own. A client may go away before its request
    has reached the gateway; then it is nowhere."""
    found: list[str] = []
    without: list[Asked] = []
    for each in outcome.asked:
        own = lines[each.request]
        if len(own) == 1:
            found += told_otherwise(each, own[0])
        elif own or each.token_ids:
            found.append(f"{each.request} ({each.end}): {len(own)} lines")
        else:
            without.append(each)
    left, lives = Counter(sums), outcome.journal.lives
    for each in sorted(without, key=lambda each: each.request not in lives):
        counted_as = next((why for why in left if left[why] and may_be(each, why)), "")
        if counted_as:
            left[counted_as] -= 1
        elif each.request in lives:
            found.append(f"{each.request} ({each.end}): no line, and no sum counts it")
    if more := left.total():
        found.append(f"the sums count {more} more than were asked: {dict(left)}")
    return found


def may_be(asked: Asked, outcome: str) -> bool:
    """Whether a request that ended so for its client may be counted under this outcome."""
    return (outcome == "cancelled") == (asked.end is End.ABORTED) and asked.end is not End.FINISHED


def told_otherwise(asked: Asked, line: dict[str, Any]) -> list[str]:
    """What a line says and its client saw otherwise."""
    if line["outcome"] not in OUTCOMES.get(asked.end, {line["outcome"]}):
        return [f"{asked.request}: {asked.end} to its client, {line['outcome']} in the log"]
    told = [token for choice in line.get("choices", ()) for token in choice["token_ids"]]
    if told[: len(asked.token_ids)] != asked.token_ids:
        return [f"{asked.request}: its client got other tokens than the log says"]
    return []


def unnoticed(folder: Path, rng: random.Random) -> int:
    """How many of CHANGED_BYTES changed bytes, each in a copy of the log, were not found."""
    missed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for path in logs(folder):
            for each in folder.glob(f"{path.name}*"):
                shutil.copy(each, scratch)
            files = in_order([Path(scratch) / path.name])
            assert not verify(files).wrong
            for _ in range(CHANGED_BYTES):
                file = rng.choice(files)
                whole = file.read_bytes()
                at = rng.randrange(len(whole))
                other = whole[at] ^ rng.randrange(1, 256)
                file.write_bytes(whole[:at] + bytes([other]) + whole[at + 1 :])
                missed += not verify(files).wrong
                file.write_bytes(whole)
    return missed


def replayed(lines: list[dict[str, Any]], target: str) -> list[str]:
    """What came out otherwise."""
    with Client(target) as client:
        return [
            f"{line['id']}: {difference}"
            for line in lines
            for difference in replay(line, client, REPLAY_S)
        ]


def main() -> int:
    made = chaos.parser()
    made.description = (__doc__ or "").split("\n\n")[0]
    made.add_argument("--replays", type=int, default=50)
    made.set_defaults(requests=1000)
    options = made.parse_args()
    options.limit_s = options.limit_s or 1200.0 * options.rounds
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="audit-") as scratch:
        folder = Path(scratch)
        audit = f"audit: {{file: {folder}/audit, prompts: keep, rotate_mb: 1}}\n"
        with chaos.own_cluster(options, audit) as (wire, target, address):
            outcome = asyncio.run(chaos.chaos(options, wire, target, address))
            ended = [line for line in lines_of(folder) if line["outcome"] == "ok"]
            differing = replayed(rng.sample(ended, min(options.replays, len(ended))), target)
        lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for line in lines_of(folder):
            lines[line.get("id", "")].append(line)
        wrong = [text for path in logs(folder) for text in verify(in_order([path])).wrong]
        wrong += miscounted(outcome, lines, sums_of(folder))
        missed = unnoticed(folder, rng)
    report(outcome, options, len(lines), wrong, missed, differing)
    return 1 if wrong or missed or differing or outcome.failures() else 0


def report(
    outcome: Outcome,
    options: argparse.Namespace,
    lines: int,
    wrong: list[str],
    missed: int,
    differing: list[str],
) -> None:
    """Prints what was found."""
    ends = Counter(str(each.end) for each in outcome.asked)
    print(*outcome.lines(), sep="\n")
    print(f"asked {len(outcome.asked)}: {dict(ends)}; {lines} ids in the log")
    print(f"requests without exactly one true line: {len(wrong)}")
    print(f"changed bytes not found: {missed} of {CHANGED_BYTES}")
    print(f"replays that differ: {len(differing)} of {options.replays}")
    for line in [*wrong, *differing, *outcome.failures()][:30]:
        print(f"FAILED {line}")


if __name__ == "__main__":
    sys.exit(main())
