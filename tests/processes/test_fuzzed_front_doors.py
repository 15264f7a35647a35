"""Clients that send anything: no crash, no hang, no loop held, no memory kept."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz_grpc
import fuzz_http
import fuzz_http2
import hypothesis
import pytest
import requests
import schemathesis
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks
from served_rig import ServedRig

from crossdock.proto.types import MAX_LOGPROBS

pytestmark = pytest.mark.slow

HTTP_CASES, GRPC_CASES, FRAME_CASES, EXAMPLES = 12_000, 8_000, 1_500, 40
USUAL = (
    {"200", "400", "413", "404", "405"},
    {"OK", "INVALID_ARGUMENT"},
    {"answered", "ended by the server"},
)
HELD_S = 0.05  # of the loop thread's CPU at a stretch, on a machine as fast as that
HELD_UNITS = 2.5  # and where it is slower: so many times what a million turns of a loop take
CYCLES = 40  # objects of a case that are freed by the garbage collector alone, asyncio's included
ASKED = {"prompt", "messages", "input", "tokens"}
NAMES = {"model", "previous_response_id"}
MESSAGE = {"role": "user", "content": "hello"}
SCORES = ("logprobs", "prompt_logprobs")
CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]


def plausible(body: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The same with few of its other fields, which together are hardly ever allowed, and by names
    that are here. Half the texts to complete are scored, half the chats are one message, and no
    chat is empty."""
    others = sorted(body.keys() - ASKED)
    kept = ASKED | set(rng.sample(others, rng.randint(0, min(2, len(others)))))
    found = {name: None if name in NAMES else body[name] for name in body if name in kept}
    if "prompt" in body and rng.random() < 0.5:
        found |= {"echo": True} | {name: rng.randint(0, MAX_LOGPROBS) for name in SCORES}
    if isinstance(messages := found.get("messages"), list):
        found["messages"] = [*(messages if rng.random() < 0.5 else ()), MESSAGE]
    return found


@pytest.fixture(scope="module")
def served(tiny_model: Path) -> Iterator[ServedRig]:
    with ServedRig.start(tiny_model) as made:
        made.stats()  # of its start
        yield made


def was_held(stats: dict[str, Any]) -> bool:
    return bool(stats["held_s"] >= max(HELD_S, HELD_UNITS * stats["unit_s"]))


def still_well(served: ServedRig, before: dict[str, Any], after: dict[str, Any]) -> None:
    """It answers, has no error of its own, and no more memory than before."""
    assert after["outcomes"].get("internal", 0) == 0, after
    assert after["connections"] == 0
    assert after["rss"] < 1.05 * before["rss"], (before, after)
    body = {"prompt": "x", "max_tokens": 1}
    assert requests.post(f"http://{served.http}/v1/completions", json=body, timeout=20).ok


@pytest.mark.parametrize(("fuzz", "door", "cases"), [
    (fuzz_http, "http", HTTP_CASES), (fuzz_grpc, "grpc", GRPC_CASES),
    (fuzz_http2, "grpc", FRAME_CASES),
])  # fmt: skip
def test_bytes_and_messages(served: ServedRig, fuzz: Any, door: str, cases: int) -> None:
    def after(*seeds: int) -> dict[str, Any]:
        for seed in seeds:
            found, wrong = asyncio.run(fuzz.run(getattr(served, door), cases // 2, seed=seed))
            assert not wrong, (found, wrong[:10])
            assert any(usual <= set(found) for usual in USUAL), found
        return served.stats()

    # What is made once, and kept, comes up late: memory settles after as many cases.
    first, then = (1, 3), (2,)
    told = {first: after(*first), then: after(*then)}
    still_well(served, told[first], told[then])
    assert told[then]["garbage"] - told[first]["garbage"] < CYCLES * (cases // 2)
    # What holds the loop does so again; a halt of the machine does not.
    for seeds, stats in told.items():
        assert not was_held(stats) or not was_held(again := after(*seeds)), (stats, again)


def test_what_the_description_allows_and_what_it_does_not(served: ServedRig) -> None:
    url = f"http://{served.http}"
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    before = served.stats()
    answered: Counter[tuple[str, int]] = Counter()
    fields: Counter[str] = Counter()  # of completions that were answered
    rng = random.Random(1)
    with requests.Session() as session:
        for found in schema.get_all_operations():
            operation = found.ok()
            for mode in schemathesis.GenerationMode:

                @hypothesis.settings(
                    max_examples=EXAMPLES if operation.method == "post" else 5,
                    deadline=None,
                    database=None,
                    suppress_health_check=list(hypothesis.HealthCheck),
                    phases=[hypothesis.Phase.generate],
                )
                @hypothesis.seed(1)
                @hypothesis.given(case=operation.as_strategy(mode))
                def ask(case: schemathesis.Case) -> None:
                    path = case.operation.path
                    if case.meta.generation.mode.is_positive and isinstance(case.body, dict):
                        case.body = plausible(case.body, rng)
                    answer = case.call(base_url=url, session=session, timeout=20)
                    answered[path, answer.status_code] += 1
                    if path == "/v1/completions" and answer.status_code == 200:
                        fields.update(case.body.keys())
                    assert answer.status_code < 500 or answer.status_code == 503
                    case.validate_response(answer, checks=CHECKS)

                try:
                    ask()
                except hypothesis.errors.Unsatisfiable:
                    continue  # nothing is wrong for a GET without parameters
    assert answered.total() > 4 * EXAMPLES
    for path in ("chat/completions", "completions", "responses"):
        assert answered[f"/v1/{path}", 200] and answered[f"/v1/{path}", 400], answered
    for path in ("/tokenize", "/detokenize"):
        assert answered[path, 200] and answered[path, 400], answered
    assert fields.keys() >= {"echo", *SCORES}, fields
    after = served.stats()
    assert after["outcomes"].get("internal", 0) == 0
    assert after["rss"] < 1.1 * before["rss"]
