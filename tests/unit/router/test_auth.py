"""Who is let in: keys and bearer tokens, over HTTP and gRPC, and what they may ask for."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from access_kit import Doors, Issuer, bearer, call, complete, generate, start_doors
from gateway_rig import Rig, start_rig
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from crossdock.client import AsyncClient
from crossdock.proto.errors import ConfigError, Forbidden, NotFound, Unauthenticated
from crossdock.router.config import AuthSettings, JwtSettings
from crossdock.router.frontdoor import keys as keyring
from crossdock.router.frontdoor.bearer import parse_jwks, verify
from crossdock.router.frontdoor.grpc_access import client_of

CODE = grpc.StatusCode


@pytest.fixture
async def doors(tiny_model: Path, tmp_path: Path) -> AsyncIterator[Doors]:
    async with start_doors(tiny_model, tmp_path) as made:
        yield made


async def test_a_key_opens_both_doors(doors: Doors) -> None:
    key = doors.key("acme")
    await doors.known(key)
    assert (await complete(doors.rig, key)).status == 200
    answer, _ = await generate(doors.rig, key)
    assert answer.completions[0].token_ids
    given = await call(doors.rig, "GET", "/v1/models", x_api_key=key)
    assert given.status == 200, "the other header that clients send"


async def test_the_client_brings_its_key(doors: Doors, monkeypatch: Any) -> None:
    key = doors.key("acme")
    await doors.known(key)
    target = doors.rig.gateway.grpc_address
    async with AsyncClient(target, api_key=key) as client:
        assert (await client.generate([1, 2, 3], max_tokens=1)).completions
    monkeypatch.setenv("CROSSDOCK_API_KEY", key)
    async with AsyncClient(target) as client:
        assert [model.id for model in await client.models()]
    async with AsyncClient(target, api_key="xd-0-nobody") as client:
        with pytest.raises(Unauthenticated):
            await client.generate([1, 2, 3], max_tokens=1)


BAD_KEYS = ["", "xd-unknown-" + "0" * 64, "sk-proj-something", "a.b.c"]


@pytest.mark.parametrize("key", BAD_KEYS)
async def test_strangers_are_refused_as_openai_does(doors: Doors, key: str) -> None:
    for method, path in (
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/nothing"),
    ):
        refused = await call(doors.rig, method, path, key, {} if method == "POST" else None)
        assert refused.status == 401, path
        assert refused.headers["WWW-Authenticate"] == 'Bearer realm="crossdock"'
        assert refused.error["type"] == "invalid_request_error"
        assert refused.error["code"] == ("invalid_api_key" if key else None)
    assert (await call(doors.rig, "GET", "/health", key)).status == 200
    error, trailers = await generate(doors.rig, key)
    assert error.code() is CODE.UNAUTHENTICATED
    assert trailers["error-type"] == "Unauthenticated"
    assert doors.rig.metric("requests_total", outcome="unauthenticated") == 6


async def test_a_wrong_secret_of_a_known_id(doors: Doors) -> None:
    key = doors.key("acme")
    await doors.known(key)
    assert (await complete(doors.rig, key[:-1] + ("0" if key[-1] != "0" else "1"))).status == 401


async def test_every_grpc_service_but_health_needs_a_credential(doors: Doors) -> None:
    channel = doors.rig.channel
    asked = health_pb2.HealthCheckRequest()
    assert (await health_pb2_grpc.HealthStub(channel).Check(asked)).status
    reflected = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async for _ in reflected:
            pass
    assert refused.value.code() is CODE.UNAUTHENTICATED


async def test_the_body_of_a_stranger_is_not_read(doors: Doors) -> None:
    """The answer comes while the body is yet to come."""
    host, port = doors.rig.gateway.http_address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 7000000\r\n\r\n"
    writer.write(head.encode())
    line = await asyncio.wait_for(reader.readline(), 10)
    assert line.startswith(b"HTTP/1.1 401")
    writer.close()


async def test_a_key_is_revoked_within_a_second_without_a_restart(doors: Doors) -> None:
    key, other = doors.key("acme"), doors.key("acme")
    await doors.known(other)
    keyring.revoke_key(doors.file, key.split("-")[1])
    assert await doors.answers(key, 401) < 1.0
    assert (await complete(doors.rig, other)).status == 200
    with pytest.raises(NotFound):
        keyring.revoke_key(doors.file, key.split("-")[1])


async def test_a_broken_or_missing_file_leaves_the_last_good_one(doors: Doors, caplog: Any) -> None:
    key = doors.key("acme")
    await doors.known(key)
    good = doors.file.read_text()

    def stale() -> float:
        return doors.rig.metric("credential_files_stale")

    for spoil in (lambda: doors.file.write_text("- id: [\n"), doors.file.unlink):
        spoil()
        while not stale():
            await asyncio.sleep(0.02)
        assert (await complete(doors.rig, key)).status == 200
        logged = [r for r in caplog.records if "stays in force" in r.message]
        assert len(logged) == 1, "one line, however often it is looked at"
        doors.file.write_text(good)
        while stale():
            await asyncio.sleep(0.02)
        caplog.clear()
    assert doors.rig.metric("credential_reads_total", result="failed") >= 2
    later = doors.key("acme")
    await doors.known(later)


async def test_an_expired_key(doors: Doors) -> None:
    key = doors.key("acme", expires="2998-01-31")
    doors.file.write_text(doors.file.read_text().replace("2998", "2020"))
    await doors.known(doors.key("acme", expires="2999-01-31"))
    refused = await complete(doors.rig, key)
    assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
    assert refused.error["message"].startswith("Incorrect API key provided: ")  # litellm looks
    assert "expired" in refused.error["message"]


def test_a_key_that_nobody_could_use_is_not_made(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    with pytest.raises(ConfigError, match=r"key\.expires.*2020-01-31.*has passed"):
        keyring.add_key(file, {"tenant": "acme", "expires": "2020-01-31"})
    with pytest.raises(ConfigError, match=r"key\.tenant.*257 characters, more than 256"):
        keyring.add_key(file, {"tenant": "a" * 257})
    assert not file.exists()


async def test_tenant_and_priority_come_from_the_credential(doors: Doors) -> None:
    key = doors.key("acme", max_priority=3)
    await doors.known(key)
    rig = doors.rig
    assert (await complete(rig, key)).status == 200
    assert (await complete(rig, key, priority=7)).status == 200
    assert (await complete(rig, key, {"X-Crossdock-Tenant": "acme"})).status == 200
    sent = [prefill.sequence.priority for prefill in rig.prefills[0].prefills]
    assert sent == [3, 7, 3], "it may be lowered, and is never above what the key says"
    raised = await complete(rig, key, priority=-1)
    assert (raised.status, raised.error["param"]) == (403, "priority")
    other = await complete(rig, key, {"X-Crossdock-Tenant": "other"})
    assert (other.status, other.error["param"]) == (403, "tenant")
    assert other.error["code"] == "permission_denied"
    for fields in ({"tenant": "other"}, {"priority": 2}):
        error, trailers = await generate(rig, key, **fields)
        assert error.code() is CODE.PERMISSION_DENIED
        assert trailers["error-type"] == "Forbidden"
    assert rig.metric("requests_total", outcome="forbidden") == 4


async def test_models_that_a_key_may_use(doors: Doors, model: str) -> None:
    mine, none = doors.key("acme", models=[model]), doors.key("acme", models=["another"])
    await doors.known(none)
    rig = doors.rig
    assert (await complete(rig, mine)).status == 200
    shown = await call(rig, "GET", "/v1/models", mine)
    assert [card["id"] for card in shown.body["data"]] == [model]
    refused = await complete(rig, none)
    assert (refused.status, refused.error["code"]) == (403, "model_not_found")
    assert (await call(rig, "GET", "/v1/models", none)).body["data"] == []
    assert (await call(rig, "GET", f"/v1/models/{model}", none)).status == 403
    error, _ = await generate(rig, none)
    assert error.code() is CODE.PERMISSION_DENIED
    async with AsyncClient(rig.gateway.grpc_address, api_key=none) as client:
        assert await client.models() == []
        with pytest.raises(Forbidden):
            await client.generate([1, 2], max_tokens=1)


async def test_figures_of_all_tenants_are_for_a_key_of_their_own(
    doors: Doors, tiny_model: Path, tmp_path: Path
) -> None:
    plain, scraper = doors.key("acme"), doors.key("ops", metrics=True)
    await doors.known(scraper)
    assert (await call(doors.rig, "GET", "/metrics", plain)).status == 403
    assert (await call(doors.rig, "GET", "/metrics", scraper)).status == 200
    folder = tmp_path / "open"
    folder.mkdir()
    async with start_doors(tiny_model, folder, metrics="all") as opened:
        assert (await call(opened.rig, "GET", "/metrics")).status == 200


async def test_without_auth_the_door_is_open(rig: Rig) -> None:
    assert (await complete(rig)).status == 200
    assert (await complete(rig, "any-key")).status == 200, "clients that must send one"
    assert (await complete(rig, headers={"X-Crossdock-Tenant": "a"}, priority=-5)).status == 200
    assert (await call(rig, "GET", "/metrics")).status == 200


# -- the prefix cache ------------------------------------------------------------------------------


async def test_tenants_share_no_block_unless_both_keys_say_so(doors: Doors) -> None:
    a, b = doors.key("a"), doors.key("b")
    shared = [doors.key(tenant, shared_cache=True) for tenant in ("a", "b")]
    await doors.known(shared[1])
    hashes, cached = {}, {}
    for name, key in (("a", a), ("b", b), ("a shared", shared[0]), ("b shared", shared[1])):
        answer = await complete(doors.rig, key)
        cached[name] = answer.body["usage"]["prompt_tokens_details"]["cached_tokens"]
        hashes[name] = set(doors.rig.prefills[0].prefills[-1].sequence.block_hashes)
    assert cached == {"a": 0, "b": 0, "a shared": 0, "b shared": 32}
    assert hashes["a shared"] == hashes["b shared"]
    assert not hashes["a"] & hashes["b"]
    assert not (hashes["a"] | hashes["b"]) & hashes["a shared"]


# -- bearer tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ES256", "EdDSA", "RS256"])
async def test_bearer_tokens(tiny_model: Path, tmp_path: Path, algorithm: str, model: str) -> None:
    issuer = Issuer(algorithm)
    async with start_doors(tiny_model, tmp_path, issuer.jwks(tmp_path / "jwks.json")) as doors:
        rig = doors.rig
        for _ in range(2):  # the second one is remembered
            assert (await complete(rig, issuer.token())).status == 200
        answer, _ = await generate(rig, issuer.token())
        assert answer.completions
        key = doors.key("acme")
        await doors.known(key)
        other = await complete(rig, issuer.token(models=["other"]))
        assert (other.status, other.error["code"]) == (403, "model_not_found")
        assert (await complete(rig, issuer.token(models=[model]))).status == 200
        assert (await complete(rig, issuer.token(models=[]))).status == 403
        wrong = {
            "expired": issuer.token(exp=time.time() - 60),
            "not yet": issuer.token(nbf=time.time() + 60),
            "of another issuer": issuer.token(iss="https://evil.example"),
            "for another": issuer.token(aud="another"),
            "without an end": issuer.token(exp=None),
            "without a tenant": issuer.token(tenant=None),
            "of a tenant with a long name": issuer.token(tenant="a" * 257),
            "of another key": Issuer(algorithm).token(),
            "of an unknown key": Issuer(algorithm, kid="k2").token(),
            "unsigned": forged(issuer, "none"),
            "signed with the public key": forged(issuer, "HS256"),
        }
        for name, token in wrong.items():
            refused = await complete(rig, token)
            assert refused.status == 401, name
            assert refused.error["code"] == "invalid_api_key", name


def forged(issuer: Issuer, algorithm: str) -> str:
    """A token that names another algorithm than the key's."""
    head, body, _ = issuer.token().split(".")
    del head
    made = base64.urlsafe_b64encode(
        json.dumps({"alg": algorithm, "typ": "JWT", "kid": issuer.kid}).encode()
    ).rstrip(b"=")
    signed = made + b"." + body.encode()
    if algorithm == "none":
        return signed.decode() + "."
    import hashlib
    import hmac

    public = json.dumps(issuer.public).encode()
    mac = base64.urlsafe_b64encode(hmac.digest(public, signed, hashlib.sha256)).rstrip(b"=")
    return (signed + b"." + mac).decode()


async def test_a_signer_that_is_withdrawn(tiny_model: Path, tmp_path: Path) -> None:
    """Also for tokens that were verified before."""
    issuer, next_one = Issuer(), Issuer(kid="k2")
    file = tmp_path / "jwks.json"
    async with start_doors(tiny_model, tmp_path, issuer.jwks(file)) as doors:
        token = issuer.token()
        assert (await complete(doors.rig, token)).status == 200
        next_one.jwks(file)
        assert await doors.answers(token, 401) < 1.0
        assert (await complete(doors.rig, next_one.token())).status == 200


@pytest.mark.parametrize("token", ["a.b.c\udce9", "ä.b.c", "a.b.c\x80"])
def test_a_token_that_is_not_ascii_is_refused(token: str) -> None:
    """As any other that is none, and not by an error of the gateway's own."""
    with pytest.raises(Unauthenticated, match="ASCII"):
        verify(token, (), JwtSettings())


def test_what_a_set_of_public_keys_may_hold() -> None:
    good = Issuer().public
    assert len(parse_jwks(json.dumps({"keys": [good, {"kty": "oct", "k": "AA"}]}).encode())) == 1
    private = jwt.get_algorithm_by_name("ES256").to_jwk(Issuer().key, as_dict=True)
    for keys in ([], [{"kty": "oct", "k": "AA"}], [private], [{**good, "x": "!"}], "no"):
        with pytest.raises(ConfigError):
            parse_jwks(json.dumps({"keys": keys}).encode())
    with pytest.raises(ConfigError):
        parse_jwks(b"{")


# -- the file of keys ------------------------------------------------------------------------------


def test_a_changed_file_keeps_its_mode_and_its_link(tmp_path: Path) -> None:
    """Else root, who revokes a key, takes the file from the gateway's user."""
    (tmp_path / "there").mkdir()
    file, link = tmp_path / "there" / "keys.yaml", tmp_path / "keys.yaml"
    link.symlink_to(file)
    key = keyring.add_key(link, {"tenant": "a"})
    file.chmod(0o640)
    keyring.revoke_key(link, key.split("-")[1])
    assert file.stat().st_mode & 0o777 == 0o640
    assert link.is_symlink() and not keyring.list_keys(file)


def test_the_file_holds_hashes_and_is_private(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    made = [keyring.add_key(file, {"tenant": t, "limits": {"budget": 2}}) for t in ("a", "b")]
    text = file.read_text()
    assert os.stat(file).st_mode & 0o777 == 0o600
    for key in made:
        assert key.split("-")[2] not in text
    found = keyring.parse_keys(file.read_bytes())
    assert [found.find(key).tenant for key in made] == ["a", "b"]  # type: ignore[union-attr]
    assert found.find(made[0] + "0") is None
    assert [each.limits.budget for each in keyring.list_keys(file)] == [2, 2]


GOOD = {"id": "one", "hash": "sha256:" + "0" * 64, "tenant": "t"}
BAD_ENTRIES = [
    ({"tenant": ""}, "tenant"),
    ({"hash": "0" * 64}, "hash"),
    ({"id": "a-b"}, "id"),
    ({"request_per_minute": 3}, "request_per_minute"),
    ({"limits": {"requests_per_minutes": 3}}, "limits.requests_per_minutes"),
    ({"limits": {"requests_per_minute": -3}}, "limits.requests_per_minute"),
    ({"limits": {"requests_per_minute": "3"}}, "limits.requests_per_minute"),
    ({"limits": {"budget_per": "week"}}, "limits.budget_per"),
    ({"shared_cache": "yes"}, "shared_cache"),
    ({"max_priority": True}, "max_priority"),
    ({"max_priority": 2**40}, "max_priority"),
    ({"models": [3]}, "models"),
    ({"expires": "soon"}, "expires"),
]


@pytest.mark.parametrize(("change", "field"), BAD_ENTRIES)
def test_an_entry_that_cannot_be_names_its_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        keyring.parse_keys(json.dumps([GOOD | change]).encode())
    assert refused.value.field == f"keys[0].{field}"


def test_ids_are_there_once() -> None:
    with pytest.raises(ConfigError, match="twice"):
        keyring.parse_keys(json.dumps([GOOD, GOOD]).encode())


async def test_a_gateway_does_not_start_without_its_files(tiny_model: Path, tmp_path: Path) -> None:
    for auth in (AuthSettings(keys=str(tmp_path / "none")),):
        with pytest.raises(ConfigError, match="cannot be read"):
            async with start_rig(tiny_model, auth=auth):
                pass


def test_addresses_of_grpc_peers() -> None:
    assert client_of("ipv4:10.0.0.1:5") == "10.0.0.1"
    assert client_of("ipv6:%5B2001:db8::1%5D:5") == "2001:db8::1"
    assert client_of("unix:/run/x") == "unix"
    assert bearer("k") == {"Authorization": "Bearer k"}


def odd_header(issuer: Issuer) -> str:
    """A token that anybody can make: its error quotes half a character, many times."""
    header = {"alg": "ES256", "kid": issuer.kid, "crit": ["\ud800" * 500]}
    encoded = base64.urlsafe_b64encode(json.dumps(header).encode()).rstrip(b"=").decode()
    return ".".join([encoded, *issuer.token().split(".")[1:]])


@pytest.mark.parametrize(
    "make", [odd_header, lambda issuer: issuer.token(exp=10**400)], ids=["crit", "exp"]
)
async def test_an_odd_token_is_a_401_and_no_error_of_the_gateway(
    tiny_model: Path, tmp_path: Path, make: Any
) -> None:
    issuer = Issuer()
    async with start_doors(tiny_model, tmp_path, issuer.jwks(tmp_path / "jwks.json")) as doors:
        refused = await call(doors.rig, "GET", "/v1/models", make(issuer))
        assert refused.status == 401
        assert len(refused.error["message"]) < 500
        error, _ = await generate(doors.rig, make(issuer))
        assert error.code() is CODE.UNAUTHENTICATED
