"""What the scripts of this folder share: whom they ask, and how they say what they found.

Each runs in an environment of its own, with the client that it checks and nothing of Crossdock, so
this needs the standard library alone. `run.py` starts a cluster and sets the variables; by hand:

    export OPENAI_BASE_URL=https://localhost:8000/v1 OPENAI_API_KEY=xd-… SSL_CERT_FILE=ca.pem
    export CROSSDOCK_MODEL=smollm2-135m-instruct CROSSDOCK_GRPC=localhost:50051
    python tools/clients/check_openai.py
"""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

Check = Callable[[], Any]
CHECKS: list[Check] = []

BASE_URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
ROOT_URL = BASE_URL.removesuffix("/v1")
API_KEY = os.environ.get("OPENAI_API_KEY", "none")
GRPC = os.environ.get("CROSSDOCK_GRPC", "127.0.0.1:50051")
CA = os.environ.get("SSL_CERT_FILE", "")
MODEL = os.environ.get("CROSSDOCK_MODEL", "smollm2-135m-instruct")
CONTEXT = 8192  # tokens, of the default model
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def check(function: Check) -> Check:
    """Marks a check. It passes by returning; its docstring is what the report calls it."""
    CHECKS.append(function)
    return function


def setting(name: str) -> str:
    """A variable that `run.py` sets. Raises LookupError where a script runs without it."""
    try:
        return os.environ[name]
    except KeyError:
        raise LookupError(f"the variable {name} is not set") from None


def command(*words: str, timeout_s: float = 300.0, stdin: str = "") -> str:
    """What the command wrote to stdout. Raises RuntimeError where it fails."""
    ran = subprocess.run(
        words, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if ran.returncode:
        said = (ran.stdout + ran.stderr)[-3000:]
        raise RuntimeError(f"{words[0]} ended with {ran.returncode}:\n{said}")
    return ran.stdout


def raises(kind: type[BaseException], call: Callable[[], Any]) -> Any:
    """The error that the call ends with, which must be of this kind."""
    try:
        answer = call()
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}, got {answer!r}")


def run() -> None:
    """Runs the checks in order, a line for each, and exits with 1 where one failed."""
    failed = 0
    for each in CHECKS:
        name = inspect.getdoc(each) or each.__name__
        started = time.monotonic()
        try:
            result = each()
            if inspect.iscoroutine(result):
                asyncio.run(result)
        except Exception:
            failed += 1
            print(f"FAILED {name}", flush=True)
            traceback.print_exc()
        else:
            print(f"ok     {name} ({time.monotonic() - started:.1f} s)", flush=True)
    sys.exit(1 if failed else 0)
