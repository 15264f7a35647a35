"""Who may call a worker: real gRPC servers and certificates."""

from __future__ import annotations

import asyncio
import ssl
import tempfile
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from gateway_rig import PROMPT as RIG_PROMPT
from gateway_rig import ask, collect, ids_of, start_rig
from trust_kit import AUTHORITY, CLUSTER, credentials
from worker_kit import PROMPT, config, sequence, settled

from crossdock.decode import role as decode_worker
from crossdock.deploy.authority import Authority
from crossdock.prefill import role as prefill_worker
from crossdock.proto.channels import internal, open_channel
from crossdock.proto.errors import ConfigError
from crossdock.proto.identity import Credentials, host_name
from crossdock.proto.types import Role
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.proto.v1 import worker_pb2_grpc
from crossdock.worker.server import WorkerServer
from crossdock.worker.service import CALLERS

SERVICE = pb.DESCRIPTOR.services_by_name["Worker"]
CALLS = [method.name for method in SERVICE.methods]
ROLES = ("controller", "gateway", "operator", "monitor", "prefill", "decode", "colocated")
REQUESTS = {
    "Describe": pb.DescribeRequest(),
    "RenewLeases": pb.RenewLeasesRequest(),
    "ReleaseTickets": pb.ReleaseTicketsRequest(),
    "GetStatus": pb.GetStatusRequest(),
    "Probe": pb.ProbeRequest(),
    "StoreState": pb.StoreStateRequest(),
    "FetchState": pb.FetchStateRequest(),
    "DropState": pb.DropStateRequest(),
}


@pytest.fixture
async def worker(tiny_model: Path) -> AsyncIterator[WorkerServer]:
    made = prefill_worker.create(config("p", Role.PREFILL, tiny_model), credentials("prefill", "p"))
    await made.start()
    yield made
    await made.stop()


class Stream:
    """A gateway's end of one stream."""

    def __init__(self, worker: WorkerServer, proof: Credentials, **hello: object) -> None:
        self._channel = open_channel(
            worker.description.address, proof, worker.description.incarnation.hex()
        )
        self._call = worker_pb2_grpc.WorkerStub(self._channel).Connect()
        own = {"gateway": proof.peer.name, "incarnation": bytes.fromhex(proof.peer.incarnation)}
        self._hello = pb.GatewayFrame(hello=pb.GatewayHello(**(own | hello)))  # type: ignore[arg-type]

    async def open(self) -> pb.WorkerFrame:
        await self._call.write(self._hello)
        return await self.read()

    async def read(self) -> pb.WorkerFrame:
        async with asyncio.timeout(20):
            return await self._call.read()

    async def send(self, **frame: object) -> None:
        await self._call.write(pb.GatewayFrame(**frame))  # type: ignore[arg-type]

    async def token(self, sequence_id: str) -> pb.SequenceOutput:
        while True:
            for output in (await self.read()).outputs:
                if output.sequence_id == sequence_id and (output.token_ids or output.error.code):
                    return output

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close()


async def made(call: str, channel: grpc.aio.Channel, *, hello: bool = False) -> str:
    """The status that a call gets; OK where it was served. Who is refused says no hello: gRPC's
    client gives a write that meets the refusal a status of its own."""
    stub = worker_pb2_grpc.WorkerStub(channel)
    try:
        async with channel:
            if call == "Connect":
                stream = stub.Connect()
                if hello:
                    await stream.write(pb.GatewayFrame(hello=pb.GatewayHello(gateway="g")))
                await asyncio.wait_for(stream.read(), 20)
            else:
                await getattr(stub, call)(REQUESTS[call], timeout=20)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


def to(worker: WorkerServer, proof: Credentials | None, whom: str = "") -> grpc.aio.Channel:
    incarnation = whom or worker.description.incarnation.hex()
    return open_channel(worker.description.address, proof, incarnation)


def test_every_call_says_who_may_make_it() -> None:
    assert set(CALLERS) == set(CALLS)


@pytest.mark.parametrize("call", CALLS)
async def test_each_role_makes_its_own_calls(worker: WorkerServer, call: str) -> None:
    for role in ROLES:
        allowed = role in CALLERS[call]
        found = await made(call, to(worker, credentials(role)), hello=allowed)
        # A gateway that says it is "g" and no more is none.
        assert found == ("OK" if allowed and call != "Connect" else "PERMISSION_DENIED"), role


@pytest.mark.parametrize("call", CALLS)
async def test_strangers_do_not_get_through_the_handshake(worker: WorkerServer, call: str) -> None:
    """Whatever role they give themselves."""
    role = CALLERS[call][0]
    theirs = Authority(b"the key of another cluster", CLUSTER)
    address = worker.description.address
    anonymous = grpc.ssl_channel_credentials(AUTHORITY.certificate)
    name = ("grpc.ssl_target_name_override", host_name(worker.description.incarnation.hex()))
    # With another authority's certificate, but the knowledge of this one's.
    forged = credentials(role, authority=theirs).identity
    proof = grpc.ssl_channel_credentials(AUTHORITY.certificate, forged.key, forged.certificate)
    strangers = {
        "plain": grpc.aio.insecure_channel(address, internal()),
        "no certificate": grpc.aio.secure_channel(address, anonymous, internal(name)),
        "another cluster": to(worker, credentials(role, authority=theirs)),
        "forged": grpc.aio.secure_channel(address, proof, internal(name)),
        "expired": to(worker, credentials(role, life=timedelta(seconds=-1))),
    }
    for who, channel in strangers.items():
        assert await made(call, channel) == "UNAVAILABLE", who
    assert await made("GetStatus", to(worker, credentials("controller"))) == "OK"


async def test_another_incarnation_than_the_one_meant_gets_no_byte(worker: WorkerServer) -> None:
    expected = {"ab" * 16: "UNAVAILABLE", "decode": "UNAVAILABLE", "prefill": "OK"}
    for whom, status in expected.items():
        channel = to(worker, credentials("controller"), whom)
        assert await made("GetStatus", channel) == status, whom


async def test_the_key_to_the_pool_goes_to_decode_workers_alone(worker: WorkerServer) -> None:
    assert worker.description.transport_info
    gateway = Stream(worker, credentials("gateway", "g"))
    hello = (await gateway.open()).hello
    assert hello.incarnation == worker.description.incarnation and not hello.transport_info
    await gateway.close()
    async with to(worker, credentials("controller")) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        status = await stub.GetStatus(pb.GetStatusRequest(), timeout=20)
        assert status.description.layout == hello.layout
        assert not status.description.transport_info
    async with to(worker, credentials("decode")) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        told = await stub.Describe(pb.DescribeRequest(), timeout=20)
        assert told.transport_info == worker.description.transport_info


@pytest.mark.parametrize("hello", [{"gateway": "other"}, {"incarnation": b"o" * 16}])
async def test_a_gateway_cannot_say_that_it_is_another(
    worker: WorkerServer, hello: dict[str, object]
) -> None:
    stream = Stream(worker, credentials("gateway", "g"), **hello)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stream.open()
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    await stream.close()


async def test_no_gateway_cancels_or_pushes_out_what_another_has(worker: WorkerServer) -> None:
    """Nor one that has the same name, as after a restart, nor a second stream of the same."""
    mine, theirs = credentials("gateway", "g"), credentials("gateway", "g")
    owner, again, other = (Stream(worker, proof) for proof in (mine, mine, theirs))
    for stream in (owner, again, other):
        await stream.open()
    await owner.send(prefill=pb.PrefillRequest(sequence=sequence("s", PROMPT)))
    assert (await owner.token("s")).token_ids
    for stream in (again, other):
        await stream.send(cancel=pb.CancelRequest(sequence_id="s", reason="not mine"))
        await stream.send(prefill=pb.PrefillRequest(sequence=sequence("after", [])))
        assert (await stream.token("after")).error.code  # both were taken
        await stream.close()
    assert [lease.sequence_id for lease in (await worker.status()).leases] == ["s"]
    await owner.send(cancel=pb.CancelRequest(sequence_id="s"))
    await settled(worker)
    await owner.close()


async def test_a_stream_outlives_the_certificates_that_it_was_opened_with(
    worker: WorkerServer,
) -> None:
    """And connections made later are made with the new ones, at both ends."""
    assert worker.credentials is not None
    gateway = credentials("gateway", "g")
    stream = Stream(worker, gateway)
    await stream.open()
    before = worker.credentials.identity
    for proof in (worker.credentials, gateway):
        proof.renew(AUTHORITY.renewed(proof.peer, timedelta(hours=1)))
    assert worker.credentials.identity.certificate != before.certificate
    assert await served(worker) == worker.credentials.identity.certificate
    await stream.send(prefill=pb.PrefillRequest(sequence=sequence("s", PROMPT)))
    assert (await stream.token("s")).token_ids
    later = Stream(worker, gateway)
    await later.open()
    for each in (stream, later):
        await each.close()
    await settled(worker)


async def served(worker: WorkerServer) -> bytes:
    """The certificate (PEM) that a handshake with this worker shows now."""
    proof = credentials("controller").identity
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=proof.authority.decode())
    with tempfile.NamedTemporaryFile() as file:
        file.write(proof.key + proof.certificate)
        file.flush()
        context.load_cert_chain(file.name)
    context.set_alpn_protocols(["h2"])
    host, _, port = worker.description.address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return ssl.DER_cert_to_PEM_cert(shown).encode()


async def test_a_worker_without_a_certificate_serves_the_loopback_alone(tiny_model: Path) -> None:
    alone = prefill_worker.create(config("p", Role.PREFILL, tiny_model, host="0.0.0.0"))
    with pytest.raises(ConfigError, match=r"port: 0\.0\.0\.0:0: without a certificate"):
        await alone.start()
    await alone.stop()


async def test_a_decode_worker_meets_its_peers_and_renews_across_renewals(
    tiny_model: Path, worker: WorkerServer
) -> None:
    proof = credentials("decode", "d")
    decode = decode_worker.create(config("d", Role.DECODE, tiny_model), proof)
    await decode.start()
    await decode.update_peers([worker.endpoint])
    assert worker.description.incarnation in decode.peers._known
    answered: asyncio.Queue[object] = asyncio.Queue()
    ticket = [(worker.description.address, b"?" * 16)]
    for _ in range(2):
        decode.peers.renew(ticket, 30.0, lambda *answer: answered.put_nowait(answer))
        async with asyncio.timeout(20):
            renewed_ids, lost, _ = await answered.get()  # type: ignore[misc]
        assert (renewed_ids, lost) == (set(), {b"?" * 16})
        proof.renew(AUTHORITY.renewed(proof.peer, timedelta(hours=1)))
    await decode.stop()


async def test_a_gateway_speaks_to_the_incarnation_it_was_told_of_alone(tiny_model: Path) -> None:
    """Under TLS itself: who took the place of a worker hears nothing."""
    async with start_rig(tiny_model, certified=True) as rig:
        responses = await collect(rig.stub.Generate(ask(max_tokens=3, ignore_eos=True)))
        assert ids_of(responses) == RIG_PROMPT[:3]
        [worker] = rig.decodes
        await worker.restart()
        heard = len(worker.hellos)
        await asyncio.sleep(0.5)
        assert len(worker.hellos) == heard
        await rig.members()
        assert len(worker.hellos) == heard + 1


async def test_one_that_drains_hands_what_gateways_keep_to_another(
    worker: WorkerServer, tiny_model: Path
) -> None:
    other = prefill_worker.create(
        config("q", Role.PREFILL, tiny_model), credentials("prefill", "q")
    )
    await other.start()
    try:
        bounds = {"ttl_ms": 10**6, "most_tenant_bytes": 10**6, "most_bytes": 10**6}
        about = {"tenant": "a", "id": "1"} | bounds
        assert worker.kept.store(pb.StoreStateRequest(data=b"x", **about)).stored  # type: ignore[arg-type]
        worker.kept.drop(pb.DropStateRequest(**about | {"id": "2"}))  # type: ignore[arg-type]
        for each in (worker, other):
            await each.update_peers([worker.endpoint, other.endpoint])
        assert await worker.drain(20)
        assert other.kept.states.fetch("a", "1") == b"x" and other.kept.states.dropped("a", "2")
        assert not worker.kept.store(pb.StoreStateRequest(data=b"x", **about)).stored  # type: ignore[arg-type]
    finally:
        await other.stop()
