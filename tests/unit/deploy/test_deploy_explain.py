"""What operators are told of a request, which any of the gateways may have had."""

from __future__ import annotations

import asyncio

import pytest
from controller_kit import until, with_gateway

from crossdock.deploy import admin, admin_service
from crossdock.proto.errors import NotFound
from crossdock.proto.v1 import admin_pb2


def known(gateway: str, received_unix_s: float) -> bytes:
    request = admin_pb2.ExplainedRequest(gateway=gateway, received_unix_s=received_unix_s)
    return request.SerializeToString()


@pytest.fixture
async def gateways(cluster, controller):
    controller.apply(with_gateway(controller.spec, replicas=2))
    assert await controller.wait_converged(5)
    return cluster.alive("gateway")


async def asked(request_id: str, address: str) -> admin_pb2.ExplainedRequest:
    return await asyncio.to_thread(admin.explain, request_id, address)


async def test_all_gateways_are_asked_and_the_newest_is_told(gateways, address):
    gateways[0].explained = {"a": known("gateway-0", 10.0), "b": known("gateway-0", 30.0)}
    gateways[1].explained = {"b": known("gateway-1", 20.0), "c": known("gateway-1", 20.0)}
    found = [(await asked(name, address)).gateway for name in "abc"]
    assert found == ["gateway-0", "gateway-0", "gateway-1"]


async def test_one_that_nobody_knows_is_an_error_that_says_who_was_asked(gateways, address):
    with pytest.raises(NotFound, match=r"'x' is not known to gateway-\d, gateway-\d: it"):
        await asked("x", address)
    gateways[0].deaf = True
    gateways[1].explained = {"a": known("gateway-1", 10.0)}
    assert (await asked("a", address)).gateway == "gateway-1"
    with pytest.raises(NotFound, match=r"to .*gateway-\d \(did not answer\)"):
        await asked("x", address)


async def test_one_gateway_that_hangs_does_not_keep_the_answer(
    gateways, controller, address, monkeypatch
):
    monkeypatch.setattr(admin_service, "EXPLAIN_S", 0.02)

    async def never(request_id: str) -> bytes:
        await asyncio.Event().wait()
        return b""

    monkeypatch.setattr(gateways[0], "explain", never)
    gateways[1].explained = {"a": known("gateway-1", 10.0)}
    assert (await asked("a", address)).gateway == "gateway-1"
    gateways[0].kill()
    await until(lambda: controller.converged)
    with pytest.raises(NotFound):
        await asked("x", address)
