"""Every error of the tree, as clients of both doors get it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from gateway_rig import Rig, ask, refusal
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from http_kit import complete, post

from crossdock.client import translate
from crossdock.proto import errors
from crossdock.proto.v1 import worker_pb2 as wpb

# Where `code` is another word than the class: what OpenAI's clients look for.
CODES = {
    errors.NotFound: "model_not_found",
    errors.Unauthenticated: "invalid_api_key",
    errors.Forbidden: "permission_denied",
    errors.RateLimited: "rate_limit_exceeded",
    errors.BudgetSpent: "insufficient_quota",
}


def tree(kind: type[errors.CrossdockError]) -> Iterator[type[errors.CrossdockError]]:
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child)


def snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def made(kind: type[errors.CrossdockError]) -> errors.CrossdockError:
    if issubclass(kind, errors.InvalidRequest):
        return kind("top_p", 2.0, "must be in (0, 1]")
    return kind("top_p", "is wrong") if kind is errors.ConfigError else kind("it is wrong")


@pytest.mark.parametrize("kind", list(tree(errors.CrossdockError)), ids=lambda kind: kind.__name__)
async def test_each_class_has_its_status_its_name_and_its_advice_at_both_doors(
    rig: Rig, kind: type[errors.CrossdockError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(request: Any) -> Any:
        raise made(kind)

    monkeypatch.setattr(rig.only.dispatcher, "submit", submit)
    status, headers, body = await post(rig, *complete())
    assert status == kind.http_status
    assert body["error"]["code"] == CODES.get(kind, snake(kind.__name__))
    openais = "Incorrect API key provided: " if kind is errors.Unauthenticated else ""
    assert body["error"]["message"] == openais + str(made(kind))
    assert headers["X-Should-Retry"] == ("true" if kind.retriable else "false")
    error = await refusal(rig, ask())
    assert error.code() is grpc.StatusCode[kind.grpc_status]
    assert reason(error) == kind.__name__
    if kind is not errors.ConfigError:  # of files, which clients have none of
        assert type(translate(error)) is kind


def reason(error: grpc.aio.AioRpcError) -> str:
    """What google.rpc.ErrorInfo says."""
    info, status = error_details_pb2.ErrorInfo(), rpc_status.from_call(error)
    assert status is not None and status.details[0].Unpack(info)
    return info.reason


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (wpb.ERROR_CODE_GRAMMAR, errors.GrammarFailed),
        (wpb.ERROR_CODE_NOT_FINITE, errors.NotFinite),
    ],
)
async def test_what_ends_a_sequence_on_its_worker_is_told_by_its_name(
    rig: Rig, code: int, kind: type[errors.CrossdockError]
) -> None:
    rig.prefills[0].refusals += [code, code, code]
    status, _, body = await post(rig, *complete())
    assert (status, body["error"]["code"]) == (kind.http_status, snake(kind.__name__))
    error = await refusal(rig, ask())
    assert (error.code().name, reason(error)) == (kind.grpc_status, kind.__name__)
    assert rig.metric("requests_total", outcome=kind.outcome) == 3
