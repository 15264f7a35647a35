"""Routes: which rule holds, which fallback is taken, and what is told of the choice."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from access_kit import call, complete, generate
from gateway_rig import Rig, start_models, until
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tiny import make_tiny_model

from crossdock.model.text import TextModel
from crossdock.proto.errors import ContextLengthExceeded, Forbidden
from crossdock.proto.v1 import inference_pb2 as pb
from crossdock.router.config import AuditSettings, AuthSettings, KeyLimits, Price
from crossdock.router.dispatch import tracing
from crossdock.router.frontdoor.keys import add_key
from crossdock.router.frontdoor.limits import Limiter, Work
from crossdock.router.frontdoor.principal import Principal
from crossdock.router.frontdoor.routes import Asked, Candidate, route
from crossdock.router.serving import Range, Rule, ServedModel, When

ANYBODY = Principal("acme")


class Model(Candidate):
    """One whose prompt has so many tokens, and that says why it is full."""

    def __init__(self, tokens: float = 10, full: str = "") -> None:
        self._tokens, self._full = tokens, full

    async def tokens(self) -> float:
        return self._tokens

    async def why_full(self, rule: Rule, asked: Asked) -> str:
        return self._full


async def chosen(
    rules: list[Rule],
    candidates: dict[str, Any] | None = None,
    *,
    principal: Principal = ANYBODY,
    headers: dict[str, str] | None = None,
    budget: float = 1.0,
) -> tuple[str, str]:
    models = {"small": Model(), "large": Model(), "tiny": Model()} | (candidates or {})
    asked = Asked(principal, headers or {}, lambda: budget, 100.0)
    return await route("auto", rules, models, asked)


DEFAULT = Rule("small")


@pytest.mark.parametrize(
    ("when", "holds", "fails"),
    [
        (When(tenant=("acme", "beta")), {}, {"principal": Principal("gamma")}),
        (When(header={"X-Tier": "gold"}), {"headers": {"x-tier": "gold"}}, {}),
        (When(header={"x-tier": "gold"}), {"headers": {"X-Tier": "gold"}},
         {"headers": {"X-Tier": "Gold"}}),
        (When(budget_below=0.5), {"budget": 0.49}, {"budget": 0.5}),
        (When(Range(above=9)), {}, {"candidates": {"large": Model(9)}}),
        (When(Range(below=11)), {}, {"candidates": {"large": Model(11)}}),
        (When(Range(above=9, below=11)), {}, {"candidates": {"large": Model(float("inf"))}}),
        (When(Range(above=9), ("acme",)), {}, {"principal": Principal("gamma")}),
    ],
)  # fmt: skip
async def test_a_rule_holds_where_all_its_conditions_do(
    when: When, holds: dict[str, Any], fails: dict[str, Any]
) -> None:
    rules = [Rule("large", when), DEFAULT]
    assert await chosen(rules, **holds) == ("large", "auto[0]")
    assert await chosen(rules, **fails) == ("small", "auto[1]")


async def test_length_is_by_the_rules_own_model() -> None:
    rules = [Rule("tiny", When(Range(below=20))), Rule("large", When(Range(below=20))), DEFAULT]
    model, _ = await chosen(rules, {"tiny": Model(20), "large": Model(19)})
    assert model == "large"


async def test_the_first_that_is_not_full_serves() -> None:
    rules = [Rule("large", fallback=("tiny", "small"))]
    busy = {"large": Model(full="no worker"), "tiny": Model(full="late")}
    told = "auto[0], large is full: no worker, tiny is full: late"
    assert await chosen(rules, busy) == ("small", told)
    model, _ = await chosen(rules, busy | {"small": Model(full="so is this")})
    assert model == "large", "where all are full it waits for the one that was wanted"


async def test_models_that_a_credential_may_not_use_are_passed_over() -> None:
    rules = [Rule("large", When(Range(above=5))), Rule("tiny", fallback=("small",))]
    only = Principal("acme", models=frozenset({"small"}))
    assert await chosen(rules, principal=only) == ("small", "auto[1]")
    with pytest.raises(Forbidden, match="leads to no model of this credential"):
        await chosen(rules, principal=Principal("acme", models=frozenset({"other"})))


def test_the_part_of_a_budget_that_is_left() -> None:
    now = [1_795_348_800.0]
    limiter = Limiter(lambda: now[0], lambda: now[0], 2, spent=lambda account, since: 40.0)
    rich, poor = (
        Principal("a", account="a"),
        Principal("b", account="b", limits=KeyLimits(budget=100)),
    )
    assert limiter.budget_left(rich) == 1.0
    assert limiter.budget_left(poor) == pytest.approx(0.6)
    grant = limiter.admit(poor, Work(0, 1, 10), Price(output=10**6))
    assert limiter.budget_left(poor) == pytest.approx(0.4), "what is set aside counts as spent"
    limiter.settle(grant, 0, 0, 5)
    assert limiter.budget_left(poor) == pytest.approx(0.5)
    limiter.settle(limiter.admit(poor, Work(0, 1, 1), Price()), 0, 0, 10**9)
    assert 0 <= limiter.budget_left(poor) <= 0.5


# -- at the doors --------------------------------------------------------------------------------


@pytest.fixture
def models(tiny_model: Path) -> dict[str, ServedModel]:
    return {"small": ServedModel(str(tiny_model)), "large": ServedModel("simulated", ("l",))}


BY_LENGTH = {
    "auto": (
        Rule("large", When(Range(above=100)), fallback=("small",)),
        Rule("small", fallback=("large",)),
    )
}


def count(rig: Rig, model: str) -> int:
    return sum(len(w.prefills) for w in rig.prefills if w.model == model)


async def test_by_length_over_http_and_grpc(models: Any) -> None:
    async with start_models(models, BY_LENGTH) as rig:
        short, long = list(range(10, 50)), list(range(10, 200))
        for prompt, model in ((short, "small"), (long, "large")):
            answer = await complete(rig, model="auto", prompt=prompt)
            assert (answer.body["model"], answer.headers["x-crossdock-model"]) == (model, model)
        text = "x" * 101  # as many tokens for the tokenizer of bytes
        chat = {"model": "auto", "messages": [{"role": "user", "content": text}], "max_tokens": 1}
        assert (await call(rig, "POST", "/v1/chat/completions", body=chat)).body["model"] == "large"
        answer, trailers = await generate(rig, model="auto")
        assert (answer.model, trailers["x-crossdock-model"]) == ("small", "small")
        assert rig.metric("routed_requests_total", route="auto", model="large") == 2
        assert rig.metric("routed_requests_total", route="auto", model="small") == 2
        listed = (await call(rig, "GET", "/v1/models")).body["data"]
        assert [card["id"] for card in listed] == ["small", "large", "auto"]
        assert (await call(rig, "GET", "/v1/models/auto")).body["id"] == "auto"


async def test_a_header_and_the_tenant_of_open_doors(models: Any) -> None:
    rules = (
        Rule("large", When(header={"X-Tier": "gold"})),
        Rule("large", When(tenant=("acme",))),
        Rule("small"),
    )
    async with start_models(models, {"auto": rules}) as rig:
        assert (await complete(rig, model="auto")).body["model"] == "small"
        gold = {"headers": {"x_tier": "gold"}}
        assert (await complete(rig, model="auto", **gold)).body["model"] == "large"
        acme = {"headers": {"X_Crossdock_Tenant": "acme"}}
        assert (await complete(rig, model="auto", **acme)).body["model"] == "large"
        assert (await generate(rig, model="auto", tenant="acme"))[0].model == "large"


async def test_a_route_may_have_a_models_own_name(models: Any) -> None:
    async with start_models(models, {"small": (Rule("large"),)}) as rig:
        assert (await complete(rig, model="small")).body["model"] == "large"


async def test_a_model_without_workers_is_full(models: Any) -> None:
    async with start_models(models, BY_LENGTH) as rig:
        large = [worker.endpoint for worker in rig.workers if worker.model == "large"]
        await rig.gateway.update_members(large)
        await until(lambda: not rig.gateway.view.workers)
        assert (await complete(rig, model="auto")).body["model"] == "large"


async def test_a_model_whose_batches_are_full_is_full(models: Any) -> None:
    async with start_models(models, BY_LENGTH) as rig:
        (decode,) = [worker for worker in rig.decodes if worker.model == "small"]
        view = rig.gateway._served["small"].view
        decode.max_batch = 4
        await decode.restart()
        await rig.members()
        decode.report(running=4, waiting=1)
        await until(lambda: view.workers["small-d"].load.waiting)
        assert (await complete(rig, model="auto")).body["model"] == "large"
        decode.report(running=4, waiting=0)
        await until(lambda: not view.workers["small-d"].load.waiting)
        assert (await complete(rig, model="auto")).body["model"] == "small"


async def test_a_first_token_that_would_be_late_is_full(models: Any) -> None:
    """One in a queue of 1000 tokens, at 100 tokens/s."""
    late = {"auto": (Rule("small", fallback=("large",), max_wait_s=5.0),)}
    patient = {"auto": (Rule("small", fallback=("large",), max_wait_s=60.0),)}
    for routes, model in ((late, "large"), (patient, "small")):
        async with start_models(models, routes) as rig:
            (prefill,) = [worker for worker in rig.prefills if worker.model == "small"]
            view = rig.gateway._served["small"].view
            prefill.report(prefill_tokens_per_s=100.0, queued_tokens=1000, prefill_step_tokens=256)
            await until(lambda view=view: view.workers["small-p"].load.queued_tokens)
            assert (await complete(rig, model="auto")).body["model"] == model


async def test_a_prompt_that_the_fallback_cannot_hold_waits(models: Any) -> None:
    routes = {"auto": (Rule("large", fallback=("small",)),)}
    async with start_models(models, routes) as rig:
        small = [worker.endpoint for worker in rig.workers if worker.model == "small"]
        await rig.gateway.update_members(small)
        large = rig.gateway._served["large"]
        await until(lambda: not large.view.workers)
        long = list(range(10, 250)) * 10  # 2400 tokens; the small model has a context of 2048
        waiting = asyncio.create_task(complete(rig, model="auto", prompt=long))
        await until(lambda: large.dispatcher.waiting_sequences)
        await rig.members()
        assert (await waiting).body["model"] == "large"


async def test_the_choice_is_told_to_span_and_audit(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    audit = AuditSettings(file=str(tmp_path / "audit"))
    async with start_models(models, BY_LENGTH, audit=audit) as rig:
        await complete(rig, model="auto")
        await complete(rig, model="l")
    attributes = [dict(s.attributes) for s in spans.get_finished_spans() if s.parent is None]
    told = [[each.get(f"crossdock.{key}") for key in ("model", "asked_model", "route")]
            for each in attributes]  # fmt: skip
    assert told == [["small", "auto", "auto[1]"], ["large", "l", None]]
    lines = map(json.loads, (tmp_path / "audit.gateway-0").read_text().splitlines())
    requests = [line for line in lines if line["kind"] == "request"]
    assert [(line["model"], line["asked_model"], line["route"]) for line in requests] == [
        ("small", "auto", "auto[1]"),
        ("large", "l", ""),
    ]


async def test_little_budget_leads_to_the_cheap_model(models: Any, tmp_path: Path) -> None:
    routes = {"auto": (Rule("small", When(budget_below=0.5)), Rule("large"))}
    file = tmp_path / "keys.yaml"
    key = add_key(file, {"tenant": "acme", "limits": {"budget": 10}})
    auth, prices = AuthSettings(keys=str(file)), {"large": Price(output=10**6)}
    async with start_models(models, routes, auth=auth, prices=prices) as rig:
        served = [(await complete(rig, key, model="auto", max_tokens=3)).body for _ in range(3)]
    assert [body["model"] for body in served] == ["large", "large", "small"]


def test_too_long_for_a_model_counts_as_longer_than_anything() -> None:
    async def refuse(frontend: Any) -> Any:
        raise ContextLengthExceeded("prompt", "9 tokens", "at most 8")

    candidate = Candidate(None, refuse)  # type: ignore[arg-type]
    assert asyncio.run(candidate.tokens()) == float("inf")


async def test_a_prompt_that_fits_with_what_is_asked_only_elsewhere_goes_there(
    tiny_model: Path,
) -> None:
    models = {"small": ServedModel(str(tiny_model)), "large": ServedModel("simulated")}
    async with start_models(models, {"auto": (Rule("small", fallback=("large",)),)}) as rig:
        prompt = [5] * 2000  # of 2048
        answer = await complete(rig, model="auto", prompt=prompt, max_tokens=40)
        assert answer.headers["x-crossdock-model"] == "small"
        answer = await complete(rig, model="auto", prompt=prompt, max_tokens=49)
        assert answer.headers["x-crossdock-model"] == "large"


async def test_a_name_that_is_none_tells_only_what_the_key_may_use(
    tiny_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys.yaml"
    key = add_key(file, {"tenant": "acme", "models": ["small"]})
    models = {"small": ServedModel(str(tiny_model)), "hidden": ServedModel("simulated")}
    async with start_models(models, auth=AuthSettings(keys=str(file))) as rig:
        answer = await complete(rig, key, model="nothing", prompt="x")
    assert answer.status == 404
    assert "small" in answer.error["message"] and "hidden" not in answer.error["message"]


@pytest.mark.parametrize("door", ["completions", "chat", "grpc"])
async def test_a_prompt_is_tokenized_once_by_each_tokenizer(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, door: str
) -> None:
    """Two models of one family differ in their vocabulary's size alone; a third has its own."""
    folder = make_tiny_model(tmp_path / "wide", layers=1, vocab_size=500)
    models = {
        "small": ServedModel(str(tiny_model)),
        "wide": ServedModel(str(folder)),
        "other": ServedModel("simulated"),
    }
    asked: list[str] = []
    for name in ("encode", "apply_chat_template"):
        real = getattr(TextModel, name)

        def counted(self: TextModel, *given: Any, real: Any = real) -> list[int]:
            asked.append(self.pieces.digest.hex())
            return list(real(self, *given))

        monkeypatch.setattr(TextModel, name, counted)
    routes = {"auto": (Rule("small", fallback=("wide", "other")),)}
    async with start_models(models, routes) as rig:
        ready = [worker.endpoint for worker in rig.workers if worker.model == "other"]
        await rig.gateway.update_members(ready)
        await until(lambda: not rig.gateway._served["wide"].view.workers)
        await until(lambda: not rig.gateway._served["small"].view.workers)
        if door == "chat":
            body = {"model": "auto", "messages": [{"role": "user", "content": "hello"}]}
            answer = await call(rig, "POST", "/v1/chat/completions", body=body | {"max_tokens": 1})
            chosen = answer.body["model"]
        elif door == "completions":
            chosen = (await complete(rig, model="auto", prompt=["hello", "you"])).body["model"]
        else:
            request = pb.GenerateRequest(model="auto", text="hello")
            chosen = (await rig.stub.GenerateUnary(request)).model
    assert chosen == "other"
    assert len(asked) == len(set(asked)) * (2 if door == "completions" else 1)
    assert len(set(asked)) == 2
