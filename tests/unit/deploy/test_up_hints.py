"""What `crossdock up` prints when the cluster serves: lines that work as they are."""

from __future__ import annotations

import shlex

from crossdock.deploy.spec_yaml import parse
from crossdock.deploy.up import how_to_ask

SPEC = """
apiVersion: crossdock/v1
kind: Cluster
metadata: {name: x}
model: {id: simulated}
pools:
  all: {role: colocated, engine: {kind: simulated}}
"""


def hints(more: str = "") -> list[str]:
    return how_to_ask(parse(SPEC + more, "c.yaml"), "127.0.0.1:1", "127.0.0.1:2", "m")


def test_an_open_door_is_asked_as_it_is() -> None:
    curl, generate = hints()
    assert shlex.split(curl)[:2] == ["curl", "http://127.0.0.1:2/v1/chat/completions"]
    assert "Authorization" not in curl and generate.startswith("crossdock generate --address")


def test_where_a_key_is_needed_both_lines_send_it() -> None:
    export, curl, _ = hints("auth: {keys: keys.yaml}\n")
    assert export.startswith("export CROSSDOCK_API_KEY=")
    assert "Authorization: Bearer $CROSSDOCK_API_KEY" in shlex.split(curl)
