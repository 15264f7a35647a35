"""TLS at both front doors: real certificates in files, real clients."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import aiohttp
import openai
import pytest
from cli_kit import run
from gateway_rig import PROMPT, Rig, start_rig, until
from trust_kit import AUTHORITY, door

from crossdock.client import AsyncClient, Client, Tls
from crossdock.deploy.authority import Authority
from crossdock.deploy.spec import ClusterSpec
from crossdock.proto.errors import ConfigError, InvalidRequest, Unavailable
from crossdock.router.config import AuditSettings, GatewayConfig, TlsFiles
from crossdock.router.frontdoor import tls as doors
from crossdock.router.gateway import GatewayServer

COMPANY = Authority(b"whoever signs for the company", "company")
CLIENTS = Authority(b"whoever signs for its clients", "clients")


@dataclass(frozen=True)
class Files:
    """A door's files."""

    folder: Path

    @property
    def settings(self) -> TlsFiles:
        return TlsFiles(str(self.folder / "cert.pem"), str(self.folder / "key.pem"))

    def issue(self, authority: Authority = COMPANY, life: timedelta = timedelta(days=1)) -> bytes:
        """A new certificate in the files; returns it."""
        key, certificate = door(authority, life)
        self.write("key.pem", key)
        self.write("cert.pem", certificate)
        return certificate

    def write(self, name: str, data: bytes) -> Path:
        """As certificate tools do: another file takes the name."""
        fresh = self.folder / f"{name}.new"
        fresh.write_bytes(data)
        return fresh.replace(self.folder / name)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    made = Files(tmp_path)
    made.issue()
    made.write("ca.pem", COMPANY.certificate)
    return made


@pytest.fixture
async def rig(tiny_model: Path, files: Files) -> AsyncIterator[Rig]:
    async with start_rig(tiny_model, tls=files.settings) as made:
        yield made


async def over_grpc(rig: Rig, tls: Tls | None) -> str:
    """How a request over gRPC ends."""
    async with AsyncClient(rig.gateway.grpc_address, tls=tls) as client:
        try:
            result = await client.generate(PROMPT, max_tokens=2, ignore_eos=True, timeout=20)
        except Unavailable:
            return "refused"
    assert list(result.token_ids) == PROMPT[:2]
    return "served"


async def over_http(rig: Rig, context: ssl.SSLContext | None) -> str:
    """How a request over HTTP ends."""
    scheme = "http" if context is None else "https"
    url = f"{scheme}://{rig.gateway.http_address}/v1/completions"
    body = {"prompt": PROMPT, "max_tokens": 2, "ignore_eos": True}
    connector = aiohttp.TCPConnector(ssl=context or False)
    async with aiohttp.ClientSession(connector=connector) as session:
        try:
            async with session.post(url, json=body) as answer:
                assert answer.status == 200, await answer.text()
                await answer.read()
        except aiohttp.ClientError:
            return "refused"
    return "served"


def trusting(ca: Path, proof: Path | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca)
    if proof is not None:
        context.load_cert_chain(proof)
    return context


async def test_both_doors_serve_who_trusts_their_authority_and_nobody_in_plain(
    rig: Rig, files: Files
) -> None:
    ca = files.folder / "ca.pem"
    assert await over_grpc(rig, Tls(ca)) == "served"
    assert await over_http(rig, trusting(ca)) == "served"
    assert await over_grpc(rig, None) == "refused"
    assert await over_http(rig, None) == "refused"
    other = files.write("other.pem", AUTHORITY.certificate)
    assert await over_grpc(rig, Tls(other)) == "refused"
    assert await over_http(rig, trusting(other)) == "refused"


async def test_who_forgot_tls_is_told_where_it_would_be_given(rig: Rig) -> None:
    async with AsyncClient(rig.gateway.grpc_address) as client:
        with pytest.raises(Unavailable, match=r"TLS.*--ca FILE"):
            await client.generate(PROMPT, max_tokens=2, timeout=20)


def test_a_target_may_say_that_it_is_tls(rig_address: str = "localhost:1") -> None:
    with Client(f"grpcs://{rig_address}") as client:
        assert client.target == rig_address
        with pytest.raises(Unavailable):
            client.health(timeout=5)
    with pytest.raises(InvalidRequest, match="ca: '/nowhere' is not allowed; cannot be read"):
        Client(rig_address, tls=Tls("/nowhere"))


async def test_a_new_certificate_is_used_without_a_restart(
    rig: Rig, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    before = await shown(rig)
    with_old = AsyncClient(rig.gateway.grpc_address, tls=Tls(files.folder / "ca.pem"))
    assert await with_old.health()
    renewed = files.issue(AUTHORITY)
    after = await shown(rig)
    assert before != after and set(after) == {renewed}
    assert await with_old.health(), "connections that are open live on"
    await with_old.close()
    ca = files.write("other.pem", AUTHORITY.certificate)
    assert (await over_grpc(rig, Tls(ca)), await over_http(rig, trusting(ca))) == ("served",) * 2
    assert sum("is in force" in line for line in caplog.messages) == 1


@pytest.mark.parametrize("broken", ["another key", "nonsense", "missing"])
async def test_files_that_cannot_be_used_leave_the_last_in_force(
    rig: Rig, files: Files, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    before = await shown(rig)
    if broken == "another key":
        files.write("key.pem", door(COMPANY)[0])
    elif broken == "nonsense":
        files.write("cert.pem", b"-----BEGIN CERTIFICATE-----\nnonsense\n")
    else:
        (files.folder / "cert.pem").unlink()
    for _ in range(3):
        assert await shown(rig) == before
    said = [line for line in caplog.messages if "cannot be used" in line]
    assert len(said) == 1 and str(files.folder / "cert.pem") in said[0]
    renewed = files.issue()
    assert set(await shown(rig)) == {renewed}


async def test_only_clients_of_the_authority_that_is_asked_for_get_through(
    tiny_model: Path, files: Files
) -> None:
    ca = files.folder / "ca.pem"
    client_ca = str(files.write("clients.pem", CLIENTS.certificate))
    settings = TlsFiles(files.settings.cert, files.settings.key, client_ca)
    proofs: dict[str, Path | None] = {"none": None}
    for name, authority in (("good", CLIENTS), ("other", COMPANY), ("operator", AUTHORITY)):
        identity = authority.issue("operator", name, timedelta(days=1))
        proofs[name] = files.write(f"{name}.pem", identity.key + identity.certificate)
    async with start_rig(tiny_model, certified=True, tls=settings) as rig:
        for name, proof in proofs.items():
            expected = "served" if name in ("good", "operator") else "refused"
            own = {"cert": proof, "key": proof} if proof else {}
            assert await over_grpc(rig, Tls(ca, **own)) == expected, name
            assert await over_http(rig, trusting(ca, proof)) == expected, name


def test_no_session_outlives_the_authority_of_its_client(files: Files) -> None:
    """Who takes up an earlier session shows no certificate again."""
    client_ca = files.write("clients.pem", CLIENTS.certificate)
    settings = TlsFiles(files.settings.cert, files.settings.key, str(client_ca))
    certificates = doors.DoorCertificates(settings)
    key, certificate = door(CLIENTS)
    proof = files.write("client.pem", key + certificate)
    client = trusting(files.folder / "ca.pem", proof)
    for at in (certificates.http(), certificates.grpc()):
        files.write("clients.pem", CLIENTS.certificate)
        session = exchange(client, at)
        files.write("clients.pem", COMPANY.certificate)
        with pytest.raises(ssl.SSLError, match="certificate verify failed"):
            exchange(client, at, session)


def exchange(
    client: ssl.SSLContext, server: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> ssl.SSLSession | None:
    """The client's session after a handshake, which takes up `session`, and a byte each way."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    there = server.wrap_bio(to_server, to_client, server_side=True)
    here = client.wrap_bio(to_client, to_server, server_hostname="localhost", session=session)
    for end in (here, there, here, there):
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
    for one, other in ((there, here), (here, there)):
        one.write(b"x")
        assert other.read(1) == b"x"
    return here.session


async def test_a_handshake_that_does_not_come_ends(
    tiny_model: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doors, "HEAD_S", 0.2)
    async with start_rig(tiny_model, tls=files.settings) as rig:
        host, _, port = rig.gateway.http_address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        began = time.monotonic()
        async with asyncio.timeout(20):
            assert await reader.read() == b""
        assert time.monotonic() - began < 10
        writer.close()


async def test_a_gateway_without_usable_files_does_not_start(
    tiny_model: Path, files: Files
) -> None:
    (files.folder / "key.pem").write_bytes(b"")
    config = GatewayConfig("g", str(tiny_model), bytes(32), tls=files.settings)
    gateway = GatewayServer(config)
    with pytest.raises(ConfigError, match=r"gateway\.tls: .*cert\.pem, .*key\.pem cannot be used"):
        await gateway.start()
    await gateway.stop()


async def shown(rig: Rig) -> list[bytes]:
    """The certificates (PEM) that gRPC and HTTP show in a handshake now."""
    return [
        await asyncio.to_thread(_shown, address)
        for address in (rig.gateway.grpc_address, rig.gateway.http_address)
    ]


def _shown(address: str) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=20) as raw,
        context.wrap_socket(raw) as s,
    ):
        der = s.getpeercert(binary_form=True)
    return ssl.DER_cert_to_PEM_cert(der or b"").encode()


def test_the_yaml_names_both_files_or_none(tmp_path: Path) -> None:
    text = """
metadata: {name: c}
model: {id: simulated}
gateway: {tls: {%s}}
pools: {both: {role: colocated, engine: {kind: simulated}}}
"""
    file = tmp_path / "c.yaml"
    file.write_text(text % "cert: ./a.pem, key: ../b.pem")
    tls = ClusterSpec.load(file).gateway.tls
    assert (tls.cert, tls.key) == (str(tmp_path / "a.pem"), str(tmp_path.parent / "b.pem"))
    for given, missing in (("cert: /a", "key"), ("key: /a", "cert"), ("client_ca: /a", "cert")):
        with pytest.raises(ConfigError, match=rf"<text>:4: gateway\.tls\.{missing}: is missing"):
            ClusterSpec.parse(text % given)


async def test_clients_need_no_more_than_the_authority(
    rig: Rig, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/api.md has them."""
    ca, url = str(files.folder / "ca.pem"), f"https://{rig.gateway.http_address}/v1"

    def curl(*options: str) -> int:
        command = ["curl", "-sS", "--noproxy", "*", *options, f"{url}/models"]
        return subprocess.run(command, capture_output=True, timeout=60).returncode

    assert await asyncio.to_thread(curl, "--cacert", ca) == 0
    assert await asyncio.to_thread(curl) == 60, "an authority that it does not trust"
    monkeypatch.setenv("SSL_CERT_FILE", ca)
    async with openai.AsyncOpenAI(base_url=url, api_key="any") as client:
        models = await client.models.list()
        assert models.data
    context = ssl.create_default_context()  # as a program that trusts what the machine does
    assert await over_http(rig, context) == "served"
    assert await over_grpc(rig, Tls()) == "served"


async def test_what_was_written_down_is_repeated_over_tls(
    tiny_model: Path,
    files: Files,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    audit = AuditSettings(file=str(files.folder / "audit"), prompts="keep")
    async with start_rig(tiny_model, tls=files.settings, audit=audit) as rig:
        ca, log = files.folder / "ca.pem", f"{audit.file}.gateway-0"
        async with AsyncClient(rig.gateway.grpc_address, tls=Tls(ca)) as client:
            done = await client.generate(PROMPT, max_tokens=2)
        await until(lambda: done.request_id in Path(log).read_text())
        again = ("audit", "replay", done.request_id, log, "--target", rig.gateway.grpc_address)
        code, out, err = await asyncio.to_thread(run, capsys, *again, "--ca", str(ca))
        assert code == 0 and "the same 2 tokens" in out, err
        monkeypatch.setenv("CROSSDOCK_CA", str(ca))
        assert (await asyncio.to_thread(run, capsys, *again))[0] == 0


async def test_the_command_line_speaks_tls(
    rig: Rig, files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ca, address = str(files.folder / "ca.pem"), rig.gateway.grpc_address
    generate = ("generate", "hello", "--raw", "--max-tokens", "2", "--target", address)
    code, _, _ = await asyncio.to_thread(run, capsys, *generate, "--ca", ca)
    assert code == 0
    code, _, err = await asyncio.to_thread(run, capsys, *generate, "--ca", "/nowhere.pem")
    assert code == 2 and "ca: '/nowhere.pem' is not allowed; cannot be read" in err
    report = files.folder / "report.json"
    bench = (
        "bench",
        "--num-requests",
        "2",
        "--warmup",
        "0",
        "--output-len",
        "2",
        "--input-len",
        "8",
    )
    tokens = ("--token-range", "5:200", "--json", str(report), "--ca", ca)
    for endpoint in (f"grpc://{address}", f"grpcs://{address}"):
        code, _, err = await asyncio.to_thread(run, capsys, *bench, *tokens, "--endpoint", endpoint)
        assert code == 0, err
