"""Plain types to protobuf messages and back."""

from __future__ import annotations

from crossdock.proto.errors import InvalidRequest
from crossdock.proto.types import FinishReason, Grammar, GrammarKind, Role, SamplingParams
from crossdock.proto.v1 import inference_pb2, worker_pb2

ROLE_TO_PB = {role: getattr(worker_pb2, f"ROLE_{role.name}") for role in Role}
ROLE_FROM_PB = {number: role for role, number in ROLE_TO_PB.items()}

FINISH_TO_PB = {each: getattr(inference_pb2, f"FINISH_REASON_{each.name}") for each in FinishReason}
FINISH_FROM_PB = {number: reason for reason, number in FINISH_TO_PB.items()}

GRAMMAR_TO_PB = {each: getattr(inference_pb2, f"GRAMMAR_KIND_{each.name}") for each in GrammarKind}
GRAMMAR_FROM_PB = {number: kind for kind, number in GRAMMAR_TO_PB.items()}

# The numbers that a request may leave unset.
SAMPLING_SCALARS = tuple(
    field.name
    for field in inference_pb2.SamplingParams.DESCRIPTOR.fields
    if field.has_presence and field.message_type is None
)


def wire_seed(seed: int) -> int:
    """A seed's 64 bits: the API knows signed ones, the wire and the sampler unsigned ones."""
    return seed + 2**64 if -(2**63) <= seed < 0 else seed


def sampling_to_pb(params: SamplingParams) -> inference_pb2.SamplingParams:
    """Every field set, so that the reader needs no defaults."""
    scalars = {name: getattr(params, name) for name in SAMPLING_SCALARS}
    return inference_pb2.SamplingParams(
        **scalars | {"seed": wire_seed(params.seed)},
        logit_bias=dict(params.logit_bias),
        stop_token_ids=params.stop_token_ids,
        stop=params.stop,
        ignore_eos=params.ignore_eos,
        grammar=grammar_to_pb(params.grammar) if params.grammar is not None else None,
    )


def sampling_from_pb(message: inference_pb2.SamplingParams, **defaults: int) -> SamplingParams:
    """Unset fields take `defaults`, then those of SamplingParams. Validates nothing but that a
    grammar's kind is known: raises InvalidRequest."""
    given: dict[str, object] = dict(defaults)
    given |= {name: getattr(message, name) for name in SAMPLING_SCALARS if message.HasField(name)}
    return SamplingParams(
        **given,  # type: ignore[arg-type]
        logit_bias=dict(message.logit_bias),
        stop_token_ids=tuple(message.stop_token_ids),
        stop=tuple(message.stop),
        ignore_eos=message.ignore_eos,
        grammar=_grammar_from_pb(message.grammar) if message.HasField("grammar") else None,
    )


def grammar_to_pb(grammar: Grammar) -> inference_pb2.Grammar:
    """What an answer must match, as requests carry it."""
    return inference_pb2.Grammar(kind=GRAMMAR_TO_PB[grammar.kind], text=grammar.text)


def _grammar_from_pb(message: inference_pb2.Grammar) -> Grammar:
    kind = GRAMMAR_FROM_PB.get(message.kind)
    if kind is None:
        names = ", ".join(f"GRAMMAR_KIND_{each.name}" for each in GrammarKind)
        raise InvalidRequest("sampling.grammar.kind", message.kind, f"must be one of {names}")
    return Grammar(kind, message.text)
