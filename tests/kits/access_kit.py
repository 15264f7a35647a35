"""Keys, tokens and calls of clients that have them, for the tests of the front door's gate."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from gateway_rig import Rig, ask, start_rig

from crossdock.router.config import AuthSettings, JwtSettings
from crossdock.router.frontdoor.keys import add_key

ISSUER, AUDIENCE = "https://id.example", "crossdock"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: Any

    @property
    def error(self) -> Any:
        return self.body["error"]


async def call(
    rig: Rig, method: str, path: str, key: str = "", body: Any = None, **headers: str
) -> Answer:
    """One HTTP call under a key."""
    given = (bearer(key) if key else {}) | {k.replace("_", "-"): v for k, v in headers.items()}
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, f"{rig.url}{path}", json=body, headers=given) as response,
    ):
        data = await response.read()
        is_json = response.content_type == "application/json"
        return Answer(
            response.status, response.headers, json.loads(data) if is_json else data.decode()
        )


async def complete(rig: Rig, key: str = "", headers: Any = None, **body: Any) -> Answer:
    """POST /v1/completions of 40 token ids, two tokens long."""
    given = {"prompt": list(range(10, 50)), "max_tokens": 2} | body
    return await call(rig, "POST", "/v1/completions", key, given, **(headers or {}))


async def generate(rig: Rig, key: str = "", **fields: Any) -> tuple[Any, dict[str, str]]:
    """The answer of GenerateUnary and its trailing metadata, or the error."""
    request = ask(max_tokens=2)
    for name, value in fields.items():
        setattr(request, name, value)
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    pending = rig.stub.GenerateUnary(request, metadata=metadata)
    try:
        answer: Any = await pending
    except grpc.aio.AioRpcError as error:
        answer = error
    return answer, dict(await pending.trailing_metadata() or ())


@dataclass
class Doors:
    """A gateway with a file of keys."""

    rig: Rig
    file: Path

    def key(self, tenant: str, **entry: Any) -> str:
        return add_key(self.file, {"tenant": tenant, **entry})

    async def known(self, key: str) -> None:
        """Returns once the gateway has read it."""
        await self.answers(key, 200)

    async def answers(self, key: str, status: int, within_s: float = 10.0) -> float:
        """Seconds until a call under this key gets this status."""
        began = time.monotonic()
        while (await call(self.rig, "GET", "/v1/models", key)).status != status:
            assert time.monotonic() - began < within_s, f"{status} did not come"
            await asyncio.sleep(0.02)
        return time.monotonic() - began


@asynccontextmanager
async def start_doors(
    model: Path, folder: Path, jwt: JwtSettings | None = None, metrics: str = "key", **config: Any
) -> AsyncIterator[Doors]:
    """A rig with auth. The file has one key at first, of the tenant "first"."""
    file = folder / "keys.yaml"
    add_key(file, {"tenant": "first"})
    auth = AuthSettings(keys=str(file), jwt=jwt or JwtSettings(), metrics=metrics)
    async with start_rig(model, auth=auth, **config) as rig:
        yield Doors(rig, file)


@dataclass
class Issuer:
    """An identity provider with a key of one kind."""

    algorithm: str = "ES256"
    kid: str = "k1"
    key: Any = field(init=False)

    def __post_init__(self) -> None:
        self.key = {
            "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
            "EdDSA": ed25519.Ed25519PrivateKey.generate,
            "RS256": lambda: rsa.generate_private_key(65537, 2048),
        }[self.algorithm]()

    @property
    def public(self) -> dict[str, Any]:
        algorithm = jwt.get_algorithm_by_name(self.algorithm)
        found = algorithm.to_jwk(self.key.public_key(), as_dict=True)
        return {**found, "kid": self.kid, "use": "sig", "alg": self.algorithm}

    def jwks(self, file: Path) -> JwtSettings:
        """Writes its public key; settings that take its tokens."""
        file.write_text(json.dumps({"keys": [self.public]}))
        return JwtSettings(jwks=str(file), issuer=ISSUER, audience=AUDIENCE)

    def token(self, tenant: str = "acme", /, **claims: Any) -> str:
        plain = {"iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 60, "tenant": tenant}
        given = {k: v for k, v in (plain | claims).items() if v is not None}
        return jwt.encode(given, self.key, self.algorithm, headers={"kid": self.kid})
