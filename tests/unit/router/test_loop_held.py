"""What clients send never holds the gateway's loop for long."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time

import msgspec
import pytest
from gateway_rig import Rig, until
from http_kit import complete, post
from loop_probe import loop_watched, post_from_afar

from crossdock.proto.errors import ContextLengthExceeded, InvalidRequest, Unavailable
from crossdock.proto.v1 import inference_pb2 as pb
from crossdock.router.frontdoor import frontend as frontend_file
from crossdock.router.frontdoor import text_process
from crossdock.router.frontdoor.openai_schemas import ChatBody, CompletionBody, read_body

BODIES = {
    "ids": ("/v1/completions", b'{"prompt":[%b]}' % b",".join([b"217"] * 1_500_000)),
    "lists": ("/v1/completions", b'{"prompt":[%b]}' % b",".join([b"[1]"] * 400_000)),
    "parts": (
        "/v1/chat/completions",
        b'{"messages":[{"role":"user","content":[%b]}]}' % b",".join([b'{"type":"text"}'] * 99_000),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BODIES)
async def test_a_large_body_is_parsed_beside_the_loop(rig: Rig, name: str) -> None:
    path, body = BODIES[name]
    started = b'{"messages":[]}' + b" " * 99_999
    await rig.only.aside.read_body("", [started], ChatBody, False)
    begun = time.process_time()
    read_body(body, CompletionBody if "chat" not in path else ChatBody)
    alone_s = time.process_time() - begun
    async with loop_watched() as held:
        assert await post_from_afar(rig, path, body) == 400
    assert held.turns > 10
    assert held.longest < alone_s / 3, (held, alone_s)


async def test_a_large_body_says_what_a_small_one_does(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the process, and on the loop."""
    calls = [
        complete(max_tokens=2), complete(prompt=["a", "b"], max_tokens=1, seed=7, stop=["x"]),
        complete(prompt=[[3, 4], [5]], max_tokens=1), complete(prompt=[7, 8, 9], max_tokens=1),
        complete(prompt=[10**30]), complete(prompt=[1, -1]), complete(prompt=[1, True]),
        complete(n="x"), complete(model="no"), complete(prompt=["x"] * 65), complete(seed=10**30),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "n": 2}),
    ]  # fmt: skip
    answers = []
    for limit in (10**9, 1):
        monkeypatch.setattr(text_process, "INLINE_BYTES", limit)
        found = [await post(rig, *call) for call in calls]
        answers.append(
            [(status, answer.get("error", answer.get("choices"))) for status, _, answer in found]
        )
    for inline, beside in zip(*answers):
        assert inline[0] == beside[0]
        if inline[0] == 200:
            assert inline == beside
        else:
            assert inline[1]["type"] == beside[1]["type"]


async def test_long_texts_are_tokenized_as_short_ones_are(
    rig: Rig, text: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontend_file, "INLINE_CHARACTERS", 3)
    status, _, answer = await post(rig, *complete(prompt="The capital of France", max_tokens=1))
    assert status == 200
    assert answer["usage"]["prompt_tokens"] == len(text.encode("The capital of France"))  # type: ignore[attr-defined]
    body = {"messages": [{"role": "user", "content": "The capital"}], "max_tokens": 1}
    assert (await post(rig, "/v1/chat/completions", body))[0] == 200


async def test_the_process_is_started_again_where_it_ended(rig: Rig) -> None:
    aside = rig.only.aside
    assert await aside.call("", "encode", "x")
    os.kill(aside._child.pid, signal.SIGSTOP)
    asked = asyncio.create_task(aside.call("", "encode", "y"))
    await asyncio.sleep(0)  # it is given to the thread
    await until(lambda: aside._thread._work_queue.empty())
    os.kill(aside._child.pid, signal.SIGKILL)
    with pytest.raises(Unavailable):
        await asked
    assert await aside.call("", "encode", "x")


async def test_parties_take_turns_at_the_process(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    aside, asked, go = rig.only.aside, list[str](), threading.Event()

    def answer(head: bytes, large: object) -> tuple[list[str], bytearray]:
        go.wait(20)
        asked.append(msgspec.msgpack.decode(head)[1][1][0])
        return [], bytearray(4)

    monkeypatch.setattr(aside, "_answer", answer)
    calls = [asyncio.create_task(aside.call("flood", "encode", f"{i}")) for i in range(6)]
    calls.append(asyncio.create_task(aside.call("little", "encode", "little")))
    await asyncio.sleep(0)
    calls[3].cancel()
    go.set()
    await asyncio.gather(*calls, return_exceptions=True)
    assert asked == ["0", "1", "little", "2", "4", "5"]
    assert await aside.call("flood", "encode", "6") == [0]


async def test_the_process_is_asked_for_who_asks(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend_file, "INLINE_CHARACTERS", 3)
    monkeypatch.setattr(text_process, "INLINE_BYTES", 1)
    join, parties = rig.only.aside._turns.join, list[str]()
    monkeypatch.setattr(rig.only.aside._turns, "join", lambda p: parties.append(p) or join(p))
    acme = {"headers": {"X-Crossdock-Tenant": "acme"}}
    assert (await post(rig, *complete(prompt="some text", max_tokens=1), **acme))[0] == 200
    assert parties == ["address 127.0.0.1", "acme"]  # before the body is read nobody is named
    parties.clear()
    assert (await post(rig, "/tokenize", {"prompt": "some text"}))[0] == 200
    assert set(parties) == {"address 127.0.0.1"}
    parties.clear()
    await rig.stub.GenerateUnary(pb.GenerateRequest(text="some text", tenant="acme"))
    assert parties == ["acme"]


async def test_who_waits_for_a_process_that_is_closed_may_come_again(rig: Rig) -> None:
    aside = rig.only.aside
    await aside._turns.join("a")
    asked = asyncio.create_task(aside.call("b", "encode", "x"))
    await asyncio.sleep(0)
    aside.close()
    aside._turns.next()
    with pytest.raises(Unavailable):
        await asked


async def test_what_the_process_refuses_is_raised_as_it_was(rig: Rig) -> None:
    large = json.dumps({"prompt": "x", "n": "7", "user": "x" * 20_000}).encode()
    with pytest.raises(InvalidRequest, match="n: '7' is not allowed; must be an integer") as found:
        await rig.only.aside.read_body("", [large], CompletionBody, False)
    assert found.value.field == "n"


async def test_chains_hashed_in_slices_are_those_hashed_at_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontend_file, "SLICE_TOKENS", 48)
    for size in (1, 15, 16, 47, 48, 49, 300):
        prompt = [7] * size
        assert (await post(rig, *complete(prompt=prompt, max_tokens=1)))[0] == 200
        sent = rig.prefills[0].prefills[-1].sequence
        assert list(sent.block_hashes) == rig.hashes(prompt)


async def test_ids_are_checked_all_at_once(rig: Rig) -> None:
    validator = rig.only.frontend.validator
    with pytest.raises(InvalidRequest, match="prompt: 900 is not allowed"):
        validator.check_prompt("prompt", [1, 2, 900, -1])
    with pytest.raises(InvalidRequest, match=str(10**30)):
        validator.check_prompt("prompt", [1, 10**30])
    with pytest.raises(ContextLengthExceeded):
        validator.check_prompt("prompt", [1] * 99_999)
