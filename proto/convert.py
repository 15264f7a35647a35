"""Plain types to protobuf messages and back."""

from __future__ import annotations

from crossdock.proto.types import FinishReason, Role, SamplingParams
from crossdock.proto.v1 import inference_pb2, worker_pb2

ROLE_TO_PB = {
    Role.PREFILL: worker_pb2.ROLE_PREFILL,
    Role.DECODE: worker_pb2.ROLE_DECODE,
    Role.COLOCATED: worker_pb2.ROLE_COLOCATED,
}
ROLE_FROM_PB = {number: role for role, number in ROLE_TO_PB.items()}

FINISH_TO_PB = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: inference_pb2.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: inference_pb2.FINISH_REASON_ERROR,
}
FINISH_FROM_PB = {number: reason for reason, number in FINISH_TO_PB.items()}

_SCALARS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "max_tokens",
    "min_tokens",
    "logprobs",
)


def wire_seed(seed: int) -> int:
    """A seed's 64 bits: the API knows signed ones, the wire and the sampler unsigned ones."""
    return seed + 2**64 if -(2**63) <= seed < 0 else seed


def sampling_to_pb(params: SamplingParams) -> inference_pb2.SamplingParams:
    """Every field set, so that the reader needs no defaults."""
    scalars = {name: getattr(params, name) for name in _SCALARS}
    return inference_pb2.SamplingParams(
        **scalars | {"seed": wire_seed(params.seed)},
        logit_bias=dict(params.logit_bias),
        stop_token_ids=params.stop_token_ids,
        stop=params.stop,
        ignore_eos=params.ignore_eos,
    )


def sampling_from_pb(message: inference_pb2.SamplingParams, **defaults: int) -> SamplingParams:
    """Unset fields take `defaults`, then those of SamplingParams. Validates nothing."""
    given: dict[str, object] = dict(defaults)
    given |= {name: getattr(message, name) for name in _SCALARS if message.HasField(name)}
    return SamplingParams(
        **given,  # type: ignore[arg-type]
        logit_bias=dict(message.logit_bias),
        stop_token_ids=tuple(message.stop_token_ids),
        stop=tuple(message.stop),
        ignore_eos=message.ignore_eos,
    )
