"""Clients of a gateway over gRPC: `Client` blocks, `AsyncClient` awaits; otherwise they are alike.

Errors are those of `crossdock.proto.errors`: a retriable one may be sent again as it was, after
`retry_after_s` where it has one. No token of a retriable error's request is lost or charged.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, Unpack

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from crossdock.chat_request import CHAT_FIELDS, set_chat
from crossdock.proto import errors
from crossdock.proto.channels import internal
from crossdock.proto.convert import grammar_to_pb, sampling_to_pb, wire_seed
from crossdock.proto.settings import GATEWAY_ADDRESS, is_loopback
from crossdock.proto.types import Grammar, SamplingParams
from crossdock.proto.v1 import inference_pb2 as pb
from crossdock.proto.v1 import inference_pb2_grpc
from crossdock.results import Chunk, ModelInfo, Result, read_chunk, read_models, read_result

# A long-lived stream through a silent network is noticed; replies may be as long as they are.
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)

InferenceStub: Any = inference_pb2_grpc.InferenceStub  # generated code has no types

API_KEY = "CROSSDOCK_API_KEY"  # of the environment
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


class RequestFields(TypedDict, total=False):
    """Keywords of generate() and stream(). Whatever is not given, the gateway decides."""

    token_ids: Sequence[int]
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]  # of a chat, as OpenAI's clients write them
    tool_choice: str | Mapping[str, Any]
    parallel_tool_calls: bool
    template_kwargs: Mapping[str, Any]
    continue_final_message: bool
    model: str
    request_id: str
    n: int
    tenant: str
    priority: int
    cache_salt: str
    sampling: SamplingParams  # sets every field of it; keywords beside it win
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    stop_token_ids: Sequence[int]
    stop: str | Sequence[str]
    seed: int
    max_tokens: int
    min_tokens: int
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: int
    best_of: int
    grammar: Grammar  # that the answer must match


_PLAIN = frozenset({"model", "request_id", "n", "tenant", "priority", "cache_salt", "best_of"})


@dataclass(frozen=True)
class Tls:
    """How a client trusts and proves itself: PEM files, each of them where it is needed."""

    ca: str | Path = ""  # of the gateway's authority; empty: those that the machine trusts
    cert: str | Path = ""  # the client's own, where the gateway asks for one
    key: str | Path = ""  # of `cert`; empty: it is in the same file

    def credentials(self) -> grpc.ChannelCredentials:
        """As gRPC takes them. Raises InvalidRequest naming a file that cannot be read."""
        files = {"ca": self.ca, "cert": self.cert, "key": self.key or self.cert}
        ca, cert, key = (_pem(name, str(path)) for name, path in files.items())
        return grpc.ssl_channel_credentials(ca or _system_authorities(), key, cert)

    def context(self) -> ssl.SSLContext:
        """The same for HTTP."""
        made = ssl.create_default_context(cafile=str(self.ca) or None)
        if self.cert:
            made.load_cert_chain(self.cert, self.key or None)
        return made


def _pem(name: str, path: str) -> bytes | None:
    try:
        return Path(path).read_bytes() if path else None
    except OSError as error:
        raise errors.InvalidRequest(name, path, f"cannot be read: {error.strerror}") from None


def _system_authorities() -> bytes | None:
    """What the machine trusts, as other programs on it do; gRPC brings a list of its own."""
    file = ssl.get_default_verify_paths().cafile
    return Path(file).read_bytes() if file else None


class Client:
    """Blocking client of the gateway at `target`, host:port; with TLS where `tls` is given or the
    target begins with grpcs://. Safe to share between threads. `api_key` is a key or a bearer
    token, by default $CROSSDOCK_API_KEY."""

    def __init__(
        self,
        target: str = GATEWAY_ADDRESS,
        api_key: str | None = None,
        *,
        tls: Tls | None = None,
    ) -> None:
        self.target, options = _address(target), _options(target)
        self._metadata = _metadata(api_key)
        tls = tls or _tls_of(target)
        if tls is None:
            self._channel = grpc.insecure_channel(self.target, options)
        else:
            self._channel = grpc.secure_channel(self.target, tls.credentials(), options)
        self._stub = InferenceStub(self._channel)

    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        timeout: float | None = None,
        **fields: Unpack[RequestFields],
    ) -> Result:
        """The whole continuation at once. `timeout` in seconds is the request's deadline.

        `prompt` is text, a list of token ids, or a list of messages, {"role", "content"} and, of
        chats with tools, "tool_calls" and "tool_call_id" as OpenAI has them.
        """
        request = build_request(prompt, **fields)
        with _translated():
            return read_result(
                self._stub.GenerateUnary(request, timeout=timeout, metadata=self._metadata)
            )

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        timeout: float | None = None,
        **fields: Unpack[RequestFields],
    ) -> Iterator[Chunk]:
        """Chunks as they are made. Closing the iterator, or leaving it, cancels the request."""
        request = build_request(prompt, **fields)
        return self._chunks(request, timeout)

    def _chunks(self, request: pb.GenerateRequest, timeout: float | None) -> Iterator[Chunk]:
        call = self._stub.Generate(request, timeout=timeout, metadata=self._metadata)
        try:
            with _translated():
                for message in call:
                    yield read_chunk(message)
        finally:
            call.cancel()

    def models(self, timeout: float | None = 10.0) -> list[ModelInfo]:
        """What the cluster serves. Raises as `generate`."""
        with _translated():
            request = pb.ListModelsRequest()
            return read_models(
                self._stub.ListModels(request, timeout=timeout, metadata=self._metadata)
            )

    def health(self, timeout: float | None = 10.0) -> bool:
        """Whether the gateway can serve now. Raises Unavailable where there is no gateway."""
        stub = health_pb2_grpc.HealthStub(self._channel)
        with _translated():
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Ends the connection; requests under way fail."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """Client of the gateway at `target` for asyncio; belongs to the loop that first uses it.
    `api_key` as for Client."""

    def __init__(
        self,
        target: str = GATEWAY_ADDRESS,
        api_key: str | None = None,
        *,
        tls: Tls | None = None,
    ) -> None:
        self.target, self._options = _address(target), _options(target)
        self._metadata = _metadata(api_key)
        self._tls = tls or _tls_of(target)

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(self.target, self._options)
        return grpc.aio.secure_channel(self.target, self._tls.credentials(), self._options)

    async def generate(
        self,
        prompt: Prompt | None = None,
        *,
        timeout: float | None = None,
        **fields: Unpack[RequestFields],
    ) -> Result:
        """As Client.generate. Cancelling the awaiting task cancels the request."""
        request = build_request(prompt, **fields)
        with _translated():
            stub = InferenceStub(self._channel)
            return read_result(
                await stub.GenerateUnary(request, timeout=timeout, metadata=self._metadata)
            )

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        timeout: float | None = None,
        **fields: Unpack[RequestFields],
    ) -> AsyncIterator[Chunk]:
        """As Client.stream: `aclose()` of the iterator, or cancelling its reader, cancels."""
        request = build_request(prompt, **fields)
        return self._chunks(request, timeout)

    async def _chunks(
        self, request: pb.GenerateRequest, timeout: float | None
    ) -> AsyncIterator[Chunk]:
        stub = InferenceStub(self._channel)
        call = stub.Generate(request, timeout=timeout, metadata=self._metadata)
        try:
            with _translated():
                async for message in call:
                    yield read_chunk(message)
        finally:
            call.cancel()

    async def models(self, timeout: float | None = 10.0) -> list[ModelInfo]:
        """What the cluster serves. Raises as `generate`."""
        with _translated():
            stub = InferenceStub(self._channel)
            request = pb.ListModelsRequest()
            return read_models(
                await stub.ListModels(request, timeout=timeout, metadata=self._metadata)
            )

    async def health(self, timeout: float | None = 10.0) -> bool:
        """As Client.health."""
        stub = health_pb2_grpc.HealthStub(self._channel)
        with _translated():
            reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        """Ends the connection; requests under way fail."""
        if "_channel" in vars(self):  # it was used
            await self._channel.close(grace=None)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def build_request(prompt: Prompt | None = None, **fields: Unpack[RequestFields]) -> Any:
    """The GenerateRequest of these keywords.

    Raises TypeError for an unknown keyword, InvalidRequest for a value that no request can carry.
    """
    unknown = sorted(fields.keys() - RequestFields.__annotations__.keys())
    if unknown:
        raise TypeError(f"no request field is called {', '.join(unknown)}")
    given: dict[str, Any] = dict(fields)
    request = pb.GenerateRequest()
    chat = {name: given.pop(name) for name in CHAT_FIELDS if name in given}
    _set_input(request, prompt, given.pop("token_ids", None), given.pop("messages", None), chat)
    if (sampling := given.pop("sampling", None)) is not None:
        request.sampling.CopyFrom(sampling_to_pb(sampling))
    for name, value in given.items():
        if value is not None:
            _set_field(request if name in _PLAIN else request.sampling, name, value)
    return request


def _set_input(
    request: pb.GenerateRequest,
    prompt: Prompt | None,
    token_ids: Sequence[int] | None,
    messages: Sequence[Mapping[str, Any]] | None,
    more: Mapping[str, Any],  # of a chat
) -> None:
    if sum(each is not None for each in (prompt, token_ids, messages)) != 1:
        raise TypeError("give exactly one of prompt, token_ids and messages")
    if prompt is not None and not isinstance(prompt, str):
        chat = len(prompt) > 0 and isinstance(prompt[0], Mapping)
        messages, token_ids = (prompt, None) if chat else (None, prompt)  # type: ignore[assignment]
        prompt = None
    if messages is not None:
        set_chat(request.chat, messages, more)
    elif more:
        raise TypeError(f"{', '.join(more)}: only of a chat, a list of messages")
    elif prompt is not None:
        _set_field(request, "text", prompt)
    else:
        request.token_ids.SetInParent()
        _set_field(request.token_ids, "ids", token_ids)


def _set_field(message: Any, name: str, value: Any) -> None:
    try:
        if name == "stop" and isinstance(value, str):
            value = [value]
        if name == "seed":
            value = wire_seed(value)
        if isinstance(value, Grammar):
            value = grammar_to_pb(value)
        given = type(message)(**{name: value})
    except (TypeError, ValueError, UnicodeError) as error:
        field = "token_ids" if name == "ids" else name
        raise errors.InvalidRequest(field, value, str(error)) from None
    message.ClearField(name)  # a list replaces that of the sampling parameters
    message.MergeFrom(given)


def _address(target: str) -> str:
    address = target.removeprefix("grpc://").removeprefix("grpcs://").rstrip("/")
    if not re.fullmatch(r"(\S+:\d+|unix:\S+)", address) or "//" in address:
        raise errors.InvalidRequest("target", target, f"must be host:port, as {GATEWAY_ADDRESS}")
    return address


def _tls_of(target: str) -> Tls | None:
    return Tls() if target.startswith("grpcs://") else None


def _metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    key = os.environ.get(API_KEY, "") if api_key is None else api_key
    return (("authorization", f"Bearer {key}"),) if key else ()


def _options(target: str) -> list[tuple[str, int | str]]:
    own = is_loopback(_address(target))
    return internal(*CHANNEL_OPTIONS) if own else list(CHANNEL_OPTIONS)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise translate(error) from None


_BY_STATUS: dict[str, type[errors.CrossdockError]] = {
    kind.grpc_status: kind
    for kind in (
        *(errors.NotFound, errors.DeadlineExceeded, errors.Cancelled, errors.Unavailable),
        *(errors.Overloaded, errors.InvalidRequest, errors.ModelError),
    )
}
_BY_NAME = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type)
    and issubclass(kind, errors.CrossdockError)
    and not issubclass(kind, errors.ConfigError)
}


def translate(error: Any) -> errors.CrossdockError:
    """The error of the tree in crossdock.proto.errors that a failed call stands for.

    The gateway names it in the trailer `error-type`; without one the status code decides.
    """
    code, message = error.code(), error.details() or ""
    trailers = dict(error.trailing_metadata() or ())
    kind = _BY_STATUS.get(code.name, errors.CrossdockError)
    named = _BY_NAME.get(str(trailers.get("error-type")), kind)
    if named.grpc_status == code.name:
        kind = named
    if issubclass(kind, errors.Overloaded):
        return kind(message, _seconds(trailers.get("retry-after"), default=1.0))
    if issubclass(kind, errors.InvalidRequest):
        return _invalid(kind, message)
    if kind is errors.CrossdockError:
        return kind(f"{code.name}: {message}")
    if "failed to connect" in message and "Socket closed" in message:
        message += "; if it speaks TLS: --ca FILE, and --cert FILE where it asks for one (Tls(…))"
    return kind(message or code.name)


def _seconds(text: Any, default: float) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return default


def _invalid(kind: type[errors.InvalidRequest], message: str) -> errors.InvalidRequest:
    """The gateway's own words, not reworded; the field is what stands before the first colon."""
    error = errors.InvalidRequest.__new__(kind)
    Exception.__init__(error, message)
    field, _, rest = message.partition(": ")
    value, _, limit = rest.partition(" is not allowed; ")
    error.field, error.value, error.limit = (field, value, limit) if limit else ("", "", message)
    return error
