"""The command line and the Python client of Crossdock itself, with TLS and a key."""

from __future__ import annotations

import json
import os

from checking import API_KEY, BASE_URL, CA, GRPC, check, command, run, setting

os.environ["CROSSDOCK_API_KEY"] = API_KEY
TARGET = ("--target", GRPC, "--ca", CA)


@check
def generate() -> None:
    """generate"""
    words = ("crossdock", "generate", *TARGET, "--raw", "The capital of France is", "--json")
    answer = json.loads(command(*words, "--temperature", "0", "--max-tokens", "8"))
    assert "Paris" in answer["completions"][0]["text"]


@check
def chat() -> None:
    """chat"""
    words = ("crossdock", "chat", *TARGET, "--max-tokens", "8")
    assert command(*words, stdin="Hello!\n/exit\n").strip()


@check
def bench() -> None:
    """bench, over gRPC and HTTP"""
    for endpoint in (f"grpcs://{GRPC}", BASE_URL.removesuffix("/v1")):
        words = ("--num-requests", "2", "--input-len", "16", "--output-len", "4", "--ca", CA)
        command("crossdock", "bench", "--endpoint", endpoint, *words, "--token-range", "100:250")


@check
def python() -> None:
    """crossdock.Client"""
    from crossdock import Client, Tls

    with Client(GRPC, tls=Tls(CA), api_key=API_KEY) as client:
        assert client.models()[0].id == setting("CROSSDOCK_MODEL")


if __name__ == "__main__":
    run()
