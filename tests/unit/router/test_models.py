"""A gateway of several models: names and aliases at every door, workers apart, changes while it
runs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from access_kit import call, complete, generate
from fake_worker import FakeWorker
from gateway_rig import PROMPT, Rig, ask, collect, ids_of, start_models, until

from crossdock.audit_replay import replay
from crossdock.client import Client
from crossdock.model.store import resolve
from crossdock.model.text import load_text
from crossdock.proto.errors import ModelError
from crossdock.proto.types import Role
from crossdock.proto.v1 import inference_pb2 as pb
from crossdock.router.config import AuditSettings, AuthSettings, Price
from crossdock.router.frontdoor.keys import add_key
from crossdock.router.serving import Rule, ServedModel, Serving

CODE = grpc.StatusCode


@pytest.fixture
def models(tiny_model: Path) -> dict[str, ServedModel]:
    return {
        "small": ServedModel(str(tiny_model), ("s", "gpt-4o-mini")),
        "large": ServedModel("simulated", ("l",)),
    }


@pytest.fixture
async def both(models: dict[str, ServedModel]) -> AsyncIterator[Rig]:
    async with start_models(models) as rig:
        yield rig


def prompts(rig: Rig, model: str) -> list[list[int]]:
    """What the workers of a model were given."""
    (worker,) = [each for each in rig.prefills if each.model == model]
    return [list(each.sequence.token_ids) for each in worker.prefills]


async def test_each_model_has_its_own_workers_and_tokenizer(both: Rig, tiny_model: Path) -> None:
    for model in ("small", "large"):
        answer = await complete(both, model=model, prompt="hello")
        assert (answer.status, answer.body["model"]) == (200, model)
        assert answer.headers["x-crossdock-model"] == model
    assert prompts(both, "small") == [load_text(resolve(str(tiny_model))).encode("hello")]
    assert prompts(both, "large") == [load_text(resolve("simulated")).encode("hello")]


async def test_an_alias_is_the_model_at_every_door(both: Rig) -> None:
    chat = {"model": "l", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    answer = await call(both, "POST", "/v1/chat/completions", body=chat)
    assert answer.body["model"] == "large"
    unary, trailers = await generate(both, model="gpt-4o-mini")
    assert (unary.model, trailers["x-crossdock-model"]) == ("small", "small")
    streamed = both.stub.Generate(replace_model(ask(max_tokens=3), "s"))
    assert ids_of(await collect(streamed)) == PROMPT[:3]
    for told in (await streamed.initial_metadata(), await streamed.trailing_metadata()):
        assert dict(told)["x-crossdock-model"] == "small"
    async with triton.InferenceServerClient(both.gateway.grpc_address) as kserve:
        given = triton.InferInput("text_input", [1], "BYTES")
        given.set_data_from_numpy(np.array([b"hi"], dtype=np.object_))
        assert (await kserve.infer("l", [given])).get_response().model_name == "large"
        assert (await kserve.get_model_metadata("s")).name == "small"
        index = await kserve.get_model_repository_index()
        assert [each.name for each in index.models] == ["small", "large"]
    small, large = [
        await call(both, "POST", "/tokenize", body={"model": name, "prompt": "hello"})
        for name in ("s", "large")
    ]
    assert small.body["tokens"] != large.body["tokens"]
    for name, found in (("s", small), ("l", large)):
        body = {"model": name, "tokens": found.body["tokens"]}
        assert (await call(both, "POST", "/detokenize", body=body)).body["prompt"] == "hello"


def replace_model(request: pb.GenerateRequest, model: str) -> pb.GenerateRequest:
    request.model = model
    return request


async def test_who_names_none_gets_the_first(both: Rig) -> None:
    assert (await complete(both)).body["model"] == "small"
    assert (await generate(both))[0].model == "small"


async def test_an_unknown_model_is_not_found_anywhere(both: Rig) -> None:
    answer = await complete(both, model="medium")
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")
    assert "the models of this cluster are 'small', 'large'" in answer.error["message"]
    assert (await call(both, "GET", "/v1/models/medium")).status == 404
    for path in ("/tokenize", "/detokenize"):
        body = {"model": "medium", "prompt": "x", "tokens": [1]}
        assert (await call(both, "POST", path, body=body)).status == 404
    error, _ = await generate(both, model="medium")
    assert error.code() is CODE.NOT_FOUND


async def test_models_are_listed_with_their_aliases(both: Rig) -> None:
    cards = (await call(both, "GET", "/v1/models")).body["data"]
    assert [(card["id"], card["aliases"]) for card in cards] == [
        ("small", ["s", "gpt-4o-mini"]),
        ("large", ["l"]),
    ]
    assert (await call(both, "GET", "/v1/models/l")).body["id"] == "large"
    listed = await both.stub.ListModels(pb.ListModelsRequest())
    assert [(m.id, list(m.aliases)) for m in listed.models] == [
        ("small", ["s", "gpt-4o-mini"]),
        ("large", ["l"]),
    ]


async def test_no_block_is_found_under_another_model(both: Rig) -> None:
    """Equal ids in equal layouts: the index of one model knows nothing of the other's workers."""
    for model in ("small", "large", "small"):
        await complete(both, model=model)
    cached = [list(each.sequence.block_hashes) for w in both.prefills for each in w.prefills]
    assert cached[0] == cached[1] == cached[2], "what would be found if they were one"
    small, large = both.gateway._served.values()
    assert small.view.workers.keys() == {"small-p", "small-d"}
    assert large.view.workers.keys() == {"large-p", "large-d"}
    demanded = cached[0]
    for served in (small, large):
        held = served.view.index.depths(demanded)
        assert set(held) <= {worker.slot for worker in served.view.workers.values()}


async def test_a_key_may_use_the_models_that_it_names(
    models: dict[str, ServedModel], tmp_path: Path
) -> None:
    file = tmp_path / "keys.yaml"
    key = add_key(file, {"tenant": "acme", "models": ["large"]})
    audit = AuditSettings(file=str(tmp_path / "audit"))
    prices = {"small": Price(output=10**6), "large": Price(output=2 * 10**6)}
    options: dict[str, Any] = {"auth": AuthSettings(keys=str(file)), "audit": audit}
    async with start_models(models, prices=prices, **options) as rig:
        allowed = await complete(rig, key, model="l")
        assert allowed.body["model"] == "large", "an alias is resolved before"
        refused = await complete(rig, key, model="gpt-4o-mini")
        assert (refused.status, "'small'" in refused.error["message"]) == (403, True)
        assert (await call(rig, "GET", "/v1/models/s", key)).status == 403
        listed = (await call(rig, "GET", "/v1/models", key)).body["data"]
        assert [card["id"] for card in listed] == ["large"]
        assert rig.metric("tenant_cost_total", tenant="acme", model="large") == 4
        assert rig.metric("model_requests_total", outcome="ok", model="large") == 1
        for timed in ("ttft", "e2e", "router_decision"):
            counted = [rig.metric(f"{timed}_seconds_count", model=m) for m in ("large", "small")]
            assert counted == [1, 0], timed
        assert rig.metric("stage_seconds_count", stage="prefill", model="large") == 1
        assert rig.metric("sequences_by_slo_total", met="true", model="large") == 1
        assert not rig.metric("tenant_cost_total", tenant="acme", model="small")
    log = tmp_path / "audit.gateway-0"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    told = [line for line in lines if line["kind"] == "request" and line["asked_model"]]
    assert [(line["outcome"], line["model"], line["asked_model"]) for line in told] == [
        ("ok", "large", "l"),
        ("forbidden", "small", "gpt-4o-mini"),
    ]


async def test_a_replay_is_by_the_model_that_served(
    models: dict[str, ServedModel], tmp_path: Path
) -> None:
    audit = AuditSettings(file=str(tmp_path / "audit"), prompts="keep")
    async with start_models(models, audit=audit) as rig:
        await complete(rig, model="l")
        await until(lambda: "large" in (tmp_path / "audit.gateway-0").read_text())
        lines = map(json.loads, (tmp_path / "audit.gateway-0").read_text().splitlines())
        (line,) = [line for line in lines if line.get("model") == "large"]
        with Client(rig.gateway.grpc_address) as client:
            assert await asyncio.to_thread(replay, line, client, 10.0) == []
            routes = {"large": (Rule("small"),)}
            await rig.gateway.update_serving(Serving(models, routes))
            differences = await asyncio.to_thread(replay, line, client, 10.0)
        assert differences == ["'large' is a route now, which led to 'small'"]
        assert (len(prompts(rig, "large")), len(prompts(rig, "small"))) == (2, 1)


async def test_one_model_without_workers_does_not_hold_up_the_other(both: Rig) -> None:
    await both.gateway.update_members([w.endpoint for w in both.workers if w.model == "large"])
    small = next(iter(both.gateway._served.values()))
    await until(lambda: not small.view.workers)
    assert both.gateway.ready
    workers = [both.metric("model_workers", model=m, role="decode") for m in ("small", "large")]
    assert workers == [0, 1]
    assert (await complete(both, model="large")).status == 200
    async with triton.InferenceServerClient(both.gateway.grpc_address) as kserve:
        ready = [await kserve.is_model_ready(name) for name in ("small", "large")]
    assert ready == [False, True]


async def test_a_model_is_added_while_it_runs(both: Rig, models: dict[str, ServedModel]) -> None:
    await both.gateway.update_serving(Serving(models | {"third": ServedModel("simulated")}))
    async with FakeWorker("third-c", Role.COLOCATED, model="third") as worker:
        both.colocated.append(worker)
        await both.members()
        assert (await complete(both, model="third")).body["model"] == "third"
        assert (await complete(both, model="small")).status == 200


async def test_an_alias_moves_while_it_runs(both: Rig, models: dict[str, ServedModel]) -> None:
    links = [served.links for served in both.gateway._served.values()]
    moved = {
        "small": replace(models["small"], aliases=()),
        "large": replace(models["large"], aliases=("l", "s")),
    }
    await both.gateway.update_serving(Serving(moved))
    assert (await complete(both, model="s")).body["model"] == "large"
    assert (await complete(both, model="gpt-4o-mini")).status == 404
    assert [served.links for served in both.gateway._served.values()] == links, "workers stay"


async def test_a_model_that_goes_finishes_what_it_has(
    both: Rig, models: dict[str, ServedModel]
) -> None:
    (decode,) = [worker for worker in both.decodes if worker.model == "large"]
    decode.gate.clear()
    running = asyncio.create_task(complete(both, model="large", max_tokens=5))
    await until(lambda: decode.decodes)
    await both.gateway.update_serving(Serving({"small": models["small"]}))
    assert (await complete(both, model="large")).status == 404
    assert b'model_workers{model="large"' not in both.gateway.metrics.exposition()
    assert both.gateway.active_requests == 1
    decode.gate.set()
    answer = await running
    assert (answer.status, answer.body["usage"]["completion_tokens"]) == (200, 5)
    await until(lambda: not both.gateway._leaving)
    await until(lambda: not decode.connected)


async def test_what_no_worker_has_begun_ends_with_its_model(
    both: Rig, models: dict[str, ServedModel]
) -> None:
    small_alone = [worker.endpoint for worker in both.workers if worker.model == "small"]
    await both.gateway.update_members(small_alone)
    large = both.gateway._served["large"]
    await until(lambda: not large.view.workers)
    waiting = asyncio.create_task(complete(both, model="large"))
    await until(lambda: large.dispatcher.waiting_sequences)
    await both.gateway.update_serving(Serving({"small": models["small"]}))
    answer = await waiting
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")


async def test_a_model_that_comes_back_goes_on(both: Rig, models: dict[str, ServedModel]) -> None:
    (decode,) = [worker for worker in both.decodes if worker.model == "large"]
    decode.gate.clear()
    running = asyncio.create_task(complete(both, model="large", max_tokens=3))
    await until(lambda: decode.decodes)
    await both.gateway.update_serving(Serving({"small": models["small"]}))
    await both.gateway.update_serving(Serving(models))
    decode.gate.set()
    assert (await running).status == 200
    assert (await complete(both, model="large")).status == 200
    assert len(decode.hellos) == 1, "over the link that it had"


async def test_a_gateway_that_drains_takes_no_work_for_new_models(
    both: Rig, models: dict[str, ServedModel]
) -> None:
    assert await both.gateway.drain(0.0)
    await both.gateway.update_serving(Serving(models | {"third": ServedModel("simulated")}))
    for model in ("small", "third"):
        assert (await complete(both, model=model)).status == 503


async def test_a_model_that_cannot_be_read_changes_nothing(
    both: Rig, models: dict[str, ServedModel], tmp_path: Path
) -> None:
    broken = {"large": models["large"], "third": ServedModel(str(tmp_path))}
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        await both.gateway.update_serving(Serving(broken))
    assert (await complete(both, model="small")).status == 200


async def test_a_name_beyond_ascii_can_be_read_in_headers_and_metadata() -> None:
    name = "größe 7%"
    async with start_models({name: ServedModel("simulated")}) as rig:
        answer = await complete(rig, model=name, prompt="hello")
        assert (answer.status, answer.body["model"]) == (200, name)
        assert unquote(answer.headers["x-crossdock-model"]) == name
        call = rig.stub.Generate(replace_model(ask([40, 41], max_tokens=2), name))
        leading = dict(await call.initial_metadata())
        assert leading["x-crossdock-model"] == "gr%C3%B6%C3%9Fe%207%25"
        await collect(call)
        trailing = dict(await call.trailing_metadata())
        assert trailing["x-crossdock-model"] == leading["x-crossdock-model"]
