"""A front of two vLLM servers that hand KV over with NixlConnector: one prompt through both.

python benchmarks/vllm_proxy.py --port 8100 --prefill http://127.0.0.1:8101 --decode http://127.0.0.1:8102

As vLLM's documentation describes it: the prompt goes to the prefill server for one token, and with
the kv_transfer_params that it answers the request goes to the decode server, whose answer is passed
on as it comes. Completions alone.
"""

from __future__ import annotations

import argparse
from typing import Any
from uuid import uuid4

from aiohttp import ClientSession, ClientTimeout, web

TIMEOUT = ClientTimeout(total=600)
TO_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def prefill_body(body: dict[str, Any]) -> dict[str, Any]:
    """What the prefill server is asked: the same for one token, whose KV is kept for another."""
    without = {name: value for name, value in body.items() if name != "stream_options"}
    return without | {"stream": False, "max_tokens": 1, "kv_transfer_params": TO_DECODE}


class Proxy:
    """Its two servers, by their URLs."""

    def __init__(self, prefill: str, decode: str) -> None:
        self._prefill, self._decode = prefill, decode

    def app(self) -> web.Application:
        app = web.Application()
        app.cleanup_ctx.append(self._with_session)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        return app

    async def _with_session(self, app: web.Application) -> Any:
        async with ClientSession(timeout=TIMEOUT, raise_for_status=True) as self._session:
            yield

    async def _models(self, request: web.Request) -> web.Response:
        async with self._session.get(f"{self._decode}/v1/models") as answer:
            return web.json_response(await answer.json())

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body, headers = await request.json(), {"X-Request-Id": uuid4().hex}
        url = f"{self._prefill}/v1/completions"
        async with self._session.post(url, json=prefill_body(body), headers=headers) as answer:
            told = await answer.json()
        body["kv_transfer_params"] = told["kv_transfer_params"]
        url = f"{self._decode}/v1/completions"
        async with self._session.post(url, json=body, headers=headers) as answer:
            passed_on = web.StreamResponse(headers={"Content-Type": answer.content_type})
            await passed_on.prepare(request)
            async for piece in answer.content.iter_any():
                await passed_on.write(piece)
        await passed_on.write_eof()
        return passed_on


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prefill", required=True, help="URL of a vLLM server")
    parser.add_argument("--decode", required=True, help="URL of another")
    options = parser.parse_args()
    proxy = Proxy(options.prefill, options.decode)
    web.run_app(proxy.app(), host="127.0.0.1", port=options.port, print=None)
