"""A request of the audit log, computed again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from google.protobuf.json_format import ParseDict

from crossdock.client import Client
from crossdock.proto.convert import sampling_from_pb
from crossdock.proto.errors import InvalidRequest
from crossdock.proto.v1 import inference_pb2


def replay(line: Mapping[str, Any], client: Client, timeout_s: float) -> list[str]:
    """How the tokens of a request's line differ from those that the cluster computes now; empty
    where they are the same. Choices that did not get to their end are compared as far as they came.
    Raises InvalidRequest for a line that cannot be repeated, and as `Client.generate`."""
    if "choices" not in line:
        raise InvalidRequest("id", line.get("id"), f"it was refused: {line.get('error')}")
    if any("token_ids" not in prompt for prompt in line["prompts"]):
        raise InvalidRequest("id", line["id"], "its prompt was not kept; see audit.prompts")
    found: list[str] = []
    for i in range(len(line["prompts"])):
        found += _of(line, i, client, timeout_s)
    return found


def _of(line: Mapping[str, Any], i: int, client: Client, timeout_s: float) -> Iterator[str]:
    """Of the choices of one prompt."""
    n = line["choices_per_prompt"]
    message = ParseDict(dict(line["parameters"]), inference_pb2.SamplingParams())
    sampling = sampling_from_pb(message, max_tokens=message.max_tokens, seed=message.seed)
    sampling = replace(sampling, prompt_logprobs=None if sampling.max_tokens else 0)
    again = client.generate(
        token_ids=line["prompts"][i]["token_ids"],
        model=line["model"],
        n=n,
        sampling=sampling,
        timeout=timeout_s,
    )
    if again.model != line["model"]:
        yield f"{line['model']!r} is a route now, which led to {again.model!r}"
        return
    told = {choice["index"]: choice for choice in line["choices"]}
    for completion in again.completions:
        choice = told[i * n + completion.index]
        before, now = choice["token_ids"], list(completion.token_ids)
        if choice["finish_reason"] is None:
            now = now[: len(before)]
        if before != now:
            same = next((k for k, (a, b) in enumerate(zip(before, now)) if a != b), None)
            at = min(len(before), len(now)) if same is None else same
            yield f"choice {choice['index']}: differs from token {at} on"
