"""Raw HTTP to a gateway of a rig."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
from gateway_rig import Rig

SAID = "The capital of France is Paris."


def say(rig: Rig, text: Any, said: str) -> int:
    """Lets the workers say this; the number of its tokens."""
    for worker in rig.workers:
        worker.script = text.encode(said)
    return len(text.encode(said))


async def post(rig: Rig, path: str, body: Any, **request: Any) -> tuple[int, Any, Any]:
    """Status, headers and decoded body of a raw request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | request.pop("headers", {})
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{rig.url}{path}", data=data, headers=headers, **request) as response,
    ):
        return response.status, response.headers, await response.json()


async def events(rig: Rig, path: str, body: Any) -> list[str]:
    """The data lines of a streamed answer."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{rig.url}{path}", json=body) as response,
    ):
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        raw = (await response.read()).decode()
    assert raw.endswith("\n\n")
    lines = raw.strip().split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def hello(**extra: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hello"}]} | extra


def chat(**extra: Any) -> tuple[str, Any]:
    return "/v1/chat/completions", hello(**extra)


def complete(**extra: Any) -> tuple[str, Any]:
    return "/v1/completions", {"prompt": "x"} | extra
