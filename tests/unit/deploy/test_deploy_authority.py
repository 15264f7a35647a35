"""The cluster's authority, what it signs, and the operator's credential."""

from __future__ import annotations

import asyncio
import stat
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from trust_kit import credentials as proof_of

from crossdock.deploy import admin, members
from crossdock.deploy import credentials as operators
from crossdock.deploy.authority import (
    SKEW,
    Applicant,
    Authority,
    due,
    workers_key,
)
from crossdock.deploy.runtime import StartFailed, gateway_launch, worker_launch
from crossdock.proto.channels import open_channel
from crossdock.proto.errors import ConfigError, CrossdockError, Unavailable
from crossdock.proto.hashing import hash_key
from crossdock.proto.identity import Credentials, Peer
from crossdock.proto.v1 import admin_pb2, admin_pb2_grpc
from crossdock.router.config import probe_key
from crossdock.router.frontdoor.audit_chain import signing_key

KEY = bytes(range(32))
AUTHORITY = Authority(KEY, "c")


def accepted(authority: Authority = AUTHORITY, name: str = "decode-0"):
    member = Applicant()
    certificate = authority.sign(member.request(), "decode", name)
    return member, member.accept(certificate, authority.certificate)


def test_a_certificate_says_what_the_controller_says_of_its_holder():
    member, identity = accepted()
    assert identity.peer == Peer("c", "decode", "decode-0", member.incarnation)
    found = x509.load_pem_x509_certificate(identity.certificate)
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [
        f"crossdock://c/decode/decode-0/{member.incarnation}"
    ]
    assert names.get_values_for_type(x509.DNSName) == [
        f"{member.incarnation}.crossdock",
        "decode.crossdock",
    ]
    life = found.not_valid_after_utc - found.not_valid_before_utc
    assert life == timedelta(hours=24) + SKEW
    assert b"PRIVATE" not in member.request(), "the key stays with the member"


def test_the_next_controller_signs_what_members_of_the_last_trust():
    """Nothing but the cluster's key is kept: another machine's controller goes on signing."""
    before, after = (x509.load_pem_x509_certificate(a.certificate) for a in twice())
    assert before.public_key() == after.public_key() and before.subject == after.subject
    _, identity = accepted(twice()[1])
    x509.load_pem_x509_certificate(identity.certificate).verify_directly_issued_by(before)
    other = Authority(bytes(32), "c")  # of the same name, as after the next `up`
    with pytest.raises(InvalidSignature):
        x509.load_pem_x509_certificate(identity.certificate).verify_directly_issued_by(
            x509.load_pem_x509_certificate(other.certificate)
        )


def twice():
    return Authority(KEY, "c"), Authority(KEY, "c")


def test_workers_and_gateways_get_no_key_that_signs_certificates(cluster, controller, store):
    keys = [
        worker_launch(controller.spec, "decode", "d-0", controller._key).worker.cluster_key,
        gateway_launch(
            controller.spec, "g-0", 0, controller._key, controller._gateways_key
        ).gateway.hash_key,
    ]
    assert store.key() not in keys and keys[0] == workers_key(store.key())
    own = x509.load_pem_x509_certificate(controller.authority.certificate).public_key()
    for key in keys:
        theirs = x509.load_pem_x509_certificate(Authority(key, "test").certificate)
        assert theirs.public_key() != own


def test_what_workers_have_leads_to_no_key_of_gateways_alone(cluster, controller):
    """One that was taken over signs no audit log, and tries no gateway."""
    keys = controller._key, controller._gateways_key
    theirs = worker_launch(controller.spec, "decode", "d-0", keys[0]).worker.cluster_key
    gateway = gateway_launch(controller.spec, "g-0", 0, *keys).gateway
    assert gateway.hash_key == hash_key(theirs), "that is known to both"
    assert gateway.audit_seed != signing_key(theirs)
    assert gateway.probe_key != probe_key(theirs)


def test_a_request_says_nothing_but_key_and_incarnation():
    member = Applicant()
    with pytest.raises(ValueError, match="is no incarnation"):
        member.incarnation = "not hexadecimal"
        AUTHORITY.sign(member.request(), "decode", "d")
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ab" * 16)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, SHA256())
    with pytest.raises(ValueError, match="of another kind"):
        AUTHORITY.sign(request.public_bytes(Encoding.PEM), "decode", "d")


def test_a_member_takes_the_answer_to_its_last_request_alone():
    member = Applicant()
    first = AUTHORITY.sign(member.request(), "decode", "d")
    second = AUTHORITY.sign(member.request(), "decode", "d")
    with pytest.raises(ValueError, match="not of the key that was asked for last"):
        member.accept(first, AUTHORITY.certificate)
    held = Credentials(member.accept(second, AUTHORITY.certificate))
    third = AUTHORITY.sign(member.request(), "prefill", "another")
    held.renew(member.accept(third, AUTHORITY.certificate))
    assert str(held.peer) == "prefill another", "a worker that changes its role stays the process"
    other = Applicant()
    fourth = AUTHORITY.sign(other.request(), "decode", "d")
    with pytest.raises(ValueError, match=f"{other.incarnation} is not"):
        held.renew(other.accept(fourth, AUTHORITY.certificate))


def test_half_a_life_is_when_to_renew():
    assert not due(AUTHORITY.issue("operator", "o", timedelta(hours=1)).certificate)
    assert due(AUTHORITY.issue("operator", "o", timedelta(seconds=-1)).certificate)
    short = Authority(KEY, "c", timedelta(seconds=1))
    before = short.controller.identity
    short.renew_own()
    assert short.controller.identity is before or due(before.certificate)


async def test_members_are_renewed_by_whichever_controller_there_is(cluster, controller):
    [decode] = cluster.alive("decode")
    assert len(decode.identities) == 1
    [watched] = [m for m in controller.members if m.process is decode]
    await watched.renew()
    assert len(decode.identities) == 1, "not before half of its life"
    watched._certified_at -= controller.authority.member_life.total_seconds() / 2
    await watched.renew()
    first, second = decode.identities
    assert first.peer == second.peer and first.key != second.key


async def test_an_adopting_controller_certifies_whom_it_finds(cluster, store):
    from controller_kit import running

    async with running(cluster, store) as first:
        assert await first.wait_converged(5)
    async with running(cluster, store) as second:
        assert await second.wait_converged(5)
    for process in cluster.processes:
        before, after = process.identities
        assert before.peer == after.peer and before.key != after.key


# -- the operator's credential ------------------------------------------------------------------


async def test_the_operators_credential_is_found_by_address(controller, store, address, tmp_path):
    path = store.folder / operators.FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    port = address.rpartition(":")[2]
    for written in (address, f"localhost:{port}"):
        status = await asyncio.to_thread(admin.status, written)
        assert status.name == "test"
    elsewhere = tmp_path / "copy.pem"
    elsewhere.write_bytes(path.read_bytes())
    path.unlink()
    with pytest.raises(ConfigError, match=f"none for a controller at {address}.*--credential"):
        admin.status(address)
    assert (await asyncio.to_thread(admin.status, address, credential=elsewhere)).converged


async def test_of_several_the_one_for_the_address_is_taken(controller, store, address, tmp_path):
    other = tmp_path / "clusters" / "other"
    other.mkdir()
    theirs = Authority(bytes(32), "other")
    (other / operators.FILE).write_bytes(operators.write(theirs, "127.0.0.1:9"))
    assert (await asyncio.to_thread(admin.status, address)).name == "test"
    with pytest.raises(ConfigError, match=r"for a controller at 127\.0\.0\.1:8, but for other at"):
        operators.find("127.0.0.1:8")
    with pytest.raises(Unavailable, match=r"no controller answers at 127\.0\.0\.1:8 "):
        admin.status("127.0.0.1:8")


async def test_nobody_but_an_operator_gets_an_answer_from_admin(controller, address, tmp_path):
    requests = {
        "GetClusterStatus": admin_pb2.GetClusterStatusRequest(),
        "Explain": admin_pb2.ExplainRequest(request_id="any"),
        "Apply": admin_pb2.ApplyRequest(yaml="{}"),
        "Scale": admin_pb2.ScaleRequest(pool="decode", replicas=0),
        "Down": admin_pb2.DownRequest(),
    }
    service = admin_pb2.DESCRIPTOR.services_by_name["Admin"]
    assert {method.name for method in service.methods} == set(requests)
    ours, theirs = controller.authority, Authority(bytes(32), "test")
    callers = {
        "PERMISSION_DENIED": [
            proof_of(role, authority=ours) for role in ("gateway", "decode", "prefill", "monitor")
        ],
        "UNAVAILABLE": [
            None,
            proof_of("operator", authority=theirs),
            proof_of("operator", authority=ours, life=timedelta(seconds=-1)),
        ],
    }
    for status, proofs in callers.items():
        for proof in proofs:
            for name, request in requests.items():
                async with open_channel(address, proof, "controller") as channel:
                    with pytest.raises(grpc.aio.AioRpcError) as refused:
                        await getattr(admin_pb2_grpc.AdminStub(channel), name)(request, timeout=20)
                assert refused.value.code().name == status, (name, proof and proof.peer)
    path = tmp_path / "decode.pem"
    path.write_bytes(operators.write(theirs, address))
    with pytest.raises(Unavailable, match="no controller"):
        await asyncio.to_thread(admin.status, address, credential=path)
    assert controller.converged


def test_a_credential_that_is_over_or_none_is_named(tmp_path):
    path = tmp_path / "operator.pem"
    with pytest.raises(ConfigError, match=r"operator\.pem: No such file"):
        operators.read(path)
    for text in (b"", b"nonsense", AUTHORITY.certificate, operators.write(AUTHORITY, "h:1")[:300]):
        path.write_bytes(text)
        with pytest.raises(ConfigError, match="is no operator's credential"):
            operators.read(path)
    old = AUTHORITY.issue("operator", "operator", timedelta(seconds=-60))
    path.write_bytes(old.key + old.certificate + old.authority)
    year = datetime.now(UTC).year
    with pytest.raises(ConfigError, match=f"was good until {year}"):
        operators.read(path)


async def test_the_credential_is_renewed_while_the_controller_runs(controller, store, address):
    path = store.folder / operators.FILE
    tending = asyncio.create_task(operators.tend(controller, store, address))
    for spoiled in (b"", operators.write(controller.authority, address)[:100]):
        path.write_bytes(spoiled)
        assert operators.wanted(store)
        tending.cancel()
        tending = asyncio.create_task(operators.tend(controller, store, address))
        async with asyncio.timeout(5):
            while operators.wanted(store):
                await asyncio.sleep(0)
    tending.cancel()
    assert isinstance(await asyncio.to_thread(admin.status, address), admin_pb2.ClusterStatus)
    assert issubclass(ConfigError, CrossdockError)


async def test_a_request_of_the_controller_before_costs_a_member_nothing(cluster, controller):
    """Its call was under way when it died, and made the newer request void."""
    [decode] = cluster.alive("decode")
    answer, overtaken = decode.certify, [True]

    async def certify(certificate: bytes, authority: bytes) -> None:
        if overtaken:
            overtaken.pop()
            decode.applicant.request()
        try:
            await answer(certificate, authority)
        except ValueError as error:
            raise StartFailed(str(error)) from None  # as Ray has it

    decode.certify = certify
    await members.certify(decode, decode.launch, controller.authority)
    assert not overtaken and len(decode.identities) == 2
