"""Connections inside a cluster go to no proxy, whatever the environment says."""

from __future__ import annotations

import ast

import pytest
from fake_server import FakeServer
from source_rules import sources

from crossdock.client import Client
from crossdock.proto.channels import is_loopback

MAKERS = {"insecure_channel", "secure_channel"}


def test_every_channel_of_the_product_says_whether_a_proxy_may_be_in_it():
    """Through `internal`, whose options the call is given directly or by a name made of it."""
    found = []
    for path in sources():
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in MAKERS:
                found.append((path.name, "internal(" in text, len(node.args) + len(node.keywords)))
    assert len(found) >= 8
    assert [each for each in found if each[1:] != (True, 2)] == []


@pytest.mark.parametrize(
    "address, own",
    [
        *(("127.0.0.1:1", True), ("127.9.9.9:1", True), ("[::1]:1", True), ("localhost:1", True)),
        *(("10.0.0.1:1", False), ("gateway:1", False)),
    ],
)
def test_loopback_is_known(address, own):
    assert is_loopback(address) is own


@pytest.mark.parametrize("name", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_a_client_reaches_a_gateway_of_its_own_machine_past_a_proxy(name, monkeypatch):
    monkeypatch.setenv(name, "http://127.0.0.1:1")
    with FakeServer() as gateway, Client(gateway.target) as client:
        assert client.health(timeout=5)
