"""Connections inside a cluster go to no proxy, whatever the environment says."""

from __future__ import annotations

import ast

import pytest
from fake_server import FakeServer
from source_rules import sources

from crossdock.client import Client
from crossdock.proto.settings import is_loopback

MAKERS = {"insecure_channel", "secure_channel"}


def test_channels_inside_a_cluster_are_opened_in_one_file():
    """They go to no proxy, and to nobody but whom they mean. The others are of clients."""
    found = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in MAKERS:
                found.setdefault(path.name, []).append(ast.unparse(node))
    assert set(found) == {"channels.py", "client.py", "first_request.py"}
    assert len(found["channels.py"]) == 4
    for call in found["channels.py"] + found["first_request.py"]:
        assert "internal(" in call or "_to(whom" in call or call.endswith(", options)")


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
