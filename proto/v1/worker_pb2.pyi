from crossdock.proto.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]
    ROLE_COLOCATED: _ClassVar[Role]

class ErrorCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_CODE_UNSPECIFIED: _ClassVar[ErrorCode]
    ERROR_CODE_INVALID: _ClassVar[ErrorCode]
    ERROR_CODE_OVERLOADED: _ClassVar[ErrorCode]
    ERROR_CODE_PULL_FAILED: _ClassVar[ErrorCode]
    ERROR_CODE_PREEMPTED: _ClassVar[ErrorCode]
    ERROR_CODE_DEADLINE: _ClassVar[ErrorCode]
    ERROR_CODE_CANCELLED: _ClassVar[ErrorCode]
    ERROR_CODE_DRAINING: _ClassVar[ErrorCode]
    ERROR_CODE_INTERNAL: _ClassVar[ErrorCode]
    ERROR_CODE_DEVICE: _ClassVar[ErrorCode]
    ERROR_CODE_NOT_FINITE: _ClassVar[ErrorCode]
    ERROR_CODE_GRAMMAR: _ClassVar[ErrorCode]

class LinkOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LINK_OUTCOME_UNSPECIFIED: _ClassVar[LinkOutcome]
    LINK_OUTCOME_OK: _ClassVar[LinkOutcome]
    LINK_OUTCOME_UNREACHABLE: _ClassVar[LinkOutcome]
    LINK_OUTCOME_LAYOUT: _ClassVar[LinkOutcome]
    LINK_OUTCOME_READ_FAILED: _ClassVar[LinkOutcome]
    LINK_OUTCOME_BUSY: _ClassVar[LinkOutcome]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role
ROLE_COLOCATED: Role
ERROR_CODE_UNSPECIFIED: ErrorCode
ERROR_CODE_INVALID: ErrorCode
ERROR_CODE_OVERLOADED: ErrorCode
ERROR_CODE_PULL_FAILED: ErrorCode
ERROR_CODE_PREEMPTED: ErrorCode
ERROR_CODE_DEADLINE: ErrorCode
ERROR_CODE_CANCELLED: ErrorCode
ERROR_CODE_DRAINING: ErrorCode
ERROR_CODE_INTERNAL: ErrorCode
ERROR_CODE_DEVICE: ErrorCode
ERROR_CODE_NOT_FINITE: ErrorCode
ERROR_CODE_GRAMMAR: ErrorCode
LINK_OUTCOME_UNSPECIFIED: LinkOutcome
LINK_OUTCOME_OK: LinkOutcome
LINK_OUTCOME_UNREACHABLE: LinkOutcome
LINK_OUTCOME_LAYOUT: LinkOutcome
LINK_OUTCOME_READ_FAILED: LinkOutcome
LINK_OUTCOME_BUSY: LinkOutcome

class KVLayout(_message.Message):
    __slots__ = ("wire_version", "model_id", "weights_digest", "dtype", "block_size", "layers", "kv_heads", "head_dim", "tp_degree", "engine", "regions")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    TP_DEGREE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    model_id: str
    weights_digest: str
    dtype: str
    block_size: int
    layers: int
    kv_heads: int
    head_dim: int
    tp_degree: int
    engine: str
    regions: str
    def __init__(self, wire_version: _Optional[int] = ..., model_id: _Optional[str] = ..., weights_digest: _Optional[str] = ..., dtype: _Optional[str] = ..., block_size: _Optional[int] = ..., layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., tp_degree: _Optional[int] = ..., engine: _Optional[str] = ..., regions: _Optional[str] = ...) -> None: ...

class WorkerDescription(_message.Message):
    __slots__ = ("name", "pool", "role", "incarnation", "layout", "layout_hash", "model_id", "context_length", "num_blocks", "block_bytes", "transport", "transport_info", "address", "pid", "node_id", "revision", "metrics_address", "max_batch", "chunk_tokens", "gpus")
    NAME_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_HASH_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_INFO_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    name: str
    pool: str
    role: Role
    incarnation: bytes
    layout: KVLayout
    layout_hash: bytes
    model_id: str
    context_length: int
    num_blocks: int
    block_bytes: int
    transport: str
    transport_info: bytes
    address: str
    pid: int
    node_id: str
    revision: str
    metrics_address: str
    max_batch: int
    chunk_tokens: int
    gpus: float
    def __init__(self, name: _Optional[str] = ..., pool: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., incarnation: _Optional[bytes] = ..., layout: _Optional[_Union[KVLayout, _Mapping]] = ..., layout_hash: _Optional[bytes] = ..., model_id: _Optional[str] = ..., context_length: _Optional[int] = ..., num_blocks: _Optional[int] = ..., block_bytes: _Optional[int] = ..., transport: _Optional[str] = ..., transport_info: _Optional[bytes] = ..., address: _Optional[str] = ..., pid: _Optional[int] = ..., node_id: _Optional[str] = ..., revision: _Optional[str] = ..., metrics_address: _Optional[str] = ..., max_batch: _Optional[int] = ..., chunk_tokens: _Optional[int] = ..., gpus: _Optional[float] = ...) -> None: ...

class Ticket(_message.Message):
    __slots__ = ("ticket_id", "prefill_worker", "prefill_address", "incarnation", "block_ids", "generations", "num_tokens", "layout_hash", "lease_ms", "mac", "prompt_hash")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_HASH_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    PROMPT_HASH_FIELD_NUMBER: _ClassVar[int]
    ticket_id: bytes
    prefill_worker: str
    prefill_address: str
    incarnation: bytes
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    num_tokens: int
    layout_hash: bytes
    lease_ms: int
    mac: bytes
    prompt_hash: bytes
    def __init__(self, ticket_id: _Optional[bytes] = ..., prefill_worker: _Optional[str] = ..., prefill_address: _Optional[str] = ..., incarnation: _Optional[bytes] = ..., block_ids: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., num_tokens: _Optional[int] = ..., layout_hash: _Optional[bytes] = ..., lease_ms: _Optional[int] = ..., mac: _Optional[bytes] = ..., prompt_hash: _Optional[bytes] = ...) -> None: ...

class PromptProgress(_message.Message):
    __slots__ = ("ticket", "ready_blocks", "checksums")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    READY_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    ready_blocks: int
    checksums: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., ready_blocks: _Optional[int] = ..., checksums: _Optional[_Iterable[int]] = ...) -> None: ...

class TransferStats(_message.Message):
    __slots__ = ("bytes", "blocks", "late_bytes", "recomputed_tokens", "seconds")
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    blocks: int
    late_bytes: int
    recomputed_tokens: int
    seconds: float
    def __init__(self, bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., late_bytes: _Optional[int] = ..., recomputed_tokens: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class SequenceRequest(_message.Message):
    __slots__ = ("sequence_id", "token_ids", "block_hashes", "sampling", "prompt_tokens", "root_hash", "deadline_unix_ms", "priority", "traceparent", "eos_token_ids", "arrival_unix_s", "uncached_tokens", "yields", "scored_tokens", "number")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROOT_HASH_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    UNCACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    YIELDS_FIELD_NUMBER: _ClassVar[int]
    SCORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    block_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    sampling: _inference_pb2.SamplingParams
    prompt_tokens: int
    root_hash: bytes
    deadline_unix_ms: int
    priority: int
    traceparent: str
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    arrival_unix_s: float
    uncached_tokens: int
    yields: int
    scored_tokens: int
    number: int
    def __init__(self, sequence_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., block_hashes: _Optional[_Iterable[bytes]] = ..., sampling: _Optional[_Union[_inference_pb2.SamplingParams, _Mapping]] = ..., prompt_tokens: _Optional[int] = ..., root_hash: _Optional[bytes] = ..., deadline_unix_ms: _Optional[int] = ..., priority: _Optional[int] = ..., traceparent: _Optional[str] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., arrival_unix_s: _Optional[float] = ..., uncached_tokens: _Optional[int] = ..., yields: _Optional[int] = ..., scored_tokens: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("sequence", "decode_worker")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    sequence: SequenceRequest
    decode_worker: str
    def __init__(self, sequence: _Optional[_Union[SequenceRequest, _Mapping]] = ..., decode_worker: _Optional[str] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("sequence", "progress")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    sequence: SequenceRequest
    progress: PromptProgress
    def __init__(self, sequence: _Optional[_Union[SequenceRequest, _Mapping]] = ..., progress: _Optional[_Union[PromptProgress, _Mapping]] = ...) -> None: ...

class HandOff(_message.Message):
    __slots__ = ("sequence_id", "progress", "first_tokens")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    progress: PromptProgress
    first_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequence_id: _Optional[str] = ..., progress: _Optional[_Union[PromptProgress, _Mapping]] = ..., first_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("sequence_id", "reason")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    reason: str
    def __init__(self, sequence_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class GatewayHello(_message.Message):
    __slots__ = ("gateway", "incarnation")
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    gateway: str
    incarnation: bytes
    def __init__(self, gateway: _Optional[str] = ..., incarnation: _Optional[bytes] = ...) -> None: ...

class ResyncBlocks(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GatewayFrame(_message.Message):
    __slots__ = ("hello", "prefill", "decode", "cancel", "resync", "hand_off", "more")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RESYNC_FIELD_NUMBER: _ClassVar[int]
    HAND_OFF_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    hello: GatewayHello
    prefill: PrefillRequest
    decode: DecodeRequest
    cancel: CancelRequest
    resync: ResyncBlocks
    hand_off: HandOff
    more: _containers.RepeatedCompositeFieldContainer[GatewayFrame]
    def __init__(self, hello: _Optional[_Union[GatewayHello, _Mapping]] = ..., prefill: _Optional[_Union[PrefillRequest, _Mapping]] = ..., decode: _Optional[_Union[DecodeRequest, _Mapping]] = ..., cancel: _Optional[_Union[CancelRequest, _Mapping]] = ..., resync: _Optional[_Union[ResyncBlocks, _Mapping]] = ..., hand_off: _Optional[_Union[HandOff, _Mapping]] = ..., more: _Optional[_Iterable[_Union[GatewayFrame, _Mapping]]] = ...) -> None: ...

class SequenceError(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: ErrorCode
    message: str
    def __init__(self, code: _Optional[_Union[ErrorCode, str]] = ..., message: _Optional[str] = ...) -> None: ...

class SequenceTimes(_message.Message):
    __slots__ = ("prefill_queued", "prefill_started", "first_token", "ticket_offered", "decode_queued", "reserved", "pulled", "fenced", "joined")
    PREFILL_QUEUED_FIELD_NUMBER: _ClassVar[int]
    PREFILL_STARTED_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TICKET_OFFERED_FIELD_NUMBER: _ClassVar[int]
    DECODE_QUEUED_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    PULLED_FIELD_NUMBER: _ClassVar[int]
    FENCED_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    prefill_queued: float
    prefill_started: float
    first_token: float
    ticket_offered: float
    decode_queued: float
    reserved: float
    pulled: float
    fenced: float
    joined: float
    def __init__(self, prefill_queued: _Optional[float] = ..., prefill_started: _Optional[float] = ..., first_token: _Optional[float] = ..., ticket_offered: _Optional[float] = ..., decode_queued: _Optional[float] = ..., reserved: _Optional[float] = ..., pulled: _Optional[float] = ..., fenced: _Optional[float] = ..., joined: _Optional[float] = ...) -> None: ...

class PromptLogprobs(_message.Message):
    __slots__ = ("first", "logprobs", "ranks", "top", "top_ids", "top_logprobs")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    first: int
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    ranks: _containers.RepeatedScalarFieldContainer[int]
    top: int
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, first: _Optional[int] = ..., logprobs: _Optional[_Iterable[float]] = ..., ranks: _Optional[_Iterable[int]] = ..., top: _Optional[int] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class SequenceOutput(_message.Message):
    __slots__ = ("sequence_id", "token_ids", "logprobs", "finish_reason", "stop_reason", "progress", "error", "times", "cached_tokens", "transfer", "prompt_logprobs", "numbers")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenLogprobs]
    finish_reason: _inference_pb2.FinishReason
    stop_reason: str
    progress: PromptProgress
    error: SequenceError
    times: SequenceTimes
    cached_tokens: int
    transfer: TransferStats
    prompt_logprobs: PromptLogprobs
    numbers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequence_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_inference_pb2.TokenLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ..., stop_reason: _Optional[str] = ..., progress: _Optional[_Union[PromptProgress, _Mapping]] = ..., error: _Optional[_Union[SequenceError, _Mapping]] = ..., times: _Optional[_Union[SequenceTimes, _Mapping]] = ..., cached_tokens: _Optional[int] = ..., transfer: _Optional[_Union[TransferStats, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[PromptLogprobs, _Mapping]] = ..., numbers: _Optional[_Iterable[int]] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("waiting", "running", "queued_tokens", "queued_attention", "yielding_tokens", "yielding_attention", "late_tokens", "late_attention", "context_tokens", "free_blocks", "cached_blocks", "total_blocks", "prefill_tokens_per_s", "step_base_s", "step_per_sequence_s", "step_context_s", "draining", "prefill_base_s", "prefill_alike", "prefill_attention_s", "prefill_step_tokens", "age_s", "late")
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_ATTENTION_FIELD_NUMBER: _ClassVar[int]
    YIELDING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    YIELDING_ATTENTION_FIELD_NUMBER: _ClassVar[int]
    LATE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LATE_ATTENTION_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    STEP_BASE_S_FIELD_NUMBER: _ClassVar[int]
    STEP_PER_SEQUENCE_S_FIELD_NUMBER: _ClassVar[int]
    STEP_CONTEXT_S_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    PREFILL_BASE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ALIKE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ATTENTION_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    waiting: int
    running: int
    queued_tokens: int
    queued_attention: int
    yielding_tokens: int
    yielding_attention: int
    late_tokens: int
    late_attention: int
    context_tokens: int
    free_blocks: int
    cached_blocks: int
    total_blocks: int
    prefill_tokens_per_s: float
    step_base_s: float
    step_per_sequence_s: float
    step_context_s: float
    draining: bool
    prefill_base_s: float
    prefill_alike: bool
    prefill_attention_s: float
    prefill_step_tokens: int
    age_s: float
    late: bool
    def __init__(self, waiting: _Optional[int] = ..., running: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., queued_attention: _Optional[int] = ..., yielding_tokens: _Optional[int] = ..., yielding_attention: _Optional[int] = ..., late_tokens: _Optional[int] = ..., late_attention: _Optional[int] = ..., context_tokens: _Optional[int] = ..., free_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., total_blocks: _Optional[int] = ..., prefill_tokens_per_s: _Optional[float] = ..., step_base_s: _Optional[float] = ..., step_per_sequence_s: _Optional[float] = ..., step_context_s: _Optional[float] = ..., draining: _Optional[bool] = ..., prefill_base_s: _Optional[float] = ..., prefill_alike: _Optional[bool] = ..., prefill_attention_s: _Optional[float] = ..., prefill_step_tokens: _Optional[int] = ..., age_s: _Optional[float] = ..., late: _Optional[bool] = ...) -> None: ...

class BlockEvents(_message.Message):
    __slots__ = ("first_sequence", "events", "snapshot")
    FIRST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    first_sequence: int
    events: _containers.RepeatedCompositeFieldContainer[BlockEvent]
    snapshot: bool
    def __init__(self, first_sequence: _Optional[int] = ..., events: _Optional[_Iterable[_Union[BlockEvent, _Mapping]]] = ..., snapshot: _Optional[bool] = ...) -> None: ...

class BlockEvent(_message.Message):
    __slots__ = ("stored", "block_hash")
    STORED_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASH_FIELD_NUMBER: _ClassVar[int]
    stored: bool
    block_hash: bytes
    def __init__(self, stored: _Optional[bool] = ..., block_hash: _Optional[bytes] = ...) -> None: ...

class PlacedPrompt(_message.Message):
    __slots__ = ("sequence_id", "num_tokens", "uncached_tokens", "yields")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    UNCACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    YIELDS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    num_tokens: int
    uncached_tokens: int
    yields: int
    def __init__(self, sequence_id: _Optional[str] = ..., num_tokens: _Optional[int] = ..., uncached_tokens: _Optional[int] = ..., yields: _Optional[int] = ...) -> None: ...

class WorkerFrame(_message.Message):
    __slots__ = ("hello", "outputs", "load", "block_events", "placed", "computed")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    BLOCK_EVENTS_FIELD_NUMBER: _ClassVar[int]
    PLACED_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_FIELD_NUMBER: _ClassVar[int]
    hello: WorkerDescription
    outputs: _containers.RepeatedCompositeFieldContainer[SequenceOutput]
    load: Load
    block_events: BlockEvents
    placed: _containers.RepeatedCompositeFieldContainer[PlacedPrompt]
    computed: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, hello: _Optional[_Union[WorkerDescription, _Mapping]] = ..., outputs: _Optional[_Iterable[_Union[SequenceOutput, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., block_events: _Optional[_Union[BlockEvents, _Mapping]] = ..., placed: _Optional[_Iterable[_Union[PlacedPrompt, _Mapping]]] = ..., computed: _Optional[_Iterable[str]] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RenewLeasesRequest(_message.Message):
    __slots__ = ("ticket_ids", "lease_ms")
    TICKET_IDS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    ticket_ids: _containers.RepeatedScalarFieldContainer[bytes]
    lease_ms: int
    def __init__(self, ticket_ids: _Optional[_Iterable[bytes]] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class RenewLeasesResponse(_message.Message):
    __slots__ = ("unknown_ticket_ids",)
    UNKNOWN_TICKET_IDS_FIELD_NUMBER: _ClassVar[int]
    unknown_ticket_ids: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, unknown_ticket_ids: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ReleaseTicketsRequest(_message.Message):
    __slots__ = ("ticket_ids",)
    TICKET_IDS_FIELD_NUMBER: _ClassVar[int]
    ticket_ids: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, ticket_ids: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ReleaseTicketsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ("check_integrity",)
    CHECK_INTEGRITY_FIELD_NUMBER: _ClassVar[int]
    check_integrity: bool
    def __init__(self, check_integrity: _Optional[bool] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("ticket_id", "sequence_id", "owner", "blocks", "age_s", "remaining_s")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    REMAINING_S_FIELD_NUMBER: _ClassVar[int]
    ticket_id: bytes
    sequence_id: str
    owner: str
    blocks: int
    age_s: float
    remaining_s: float
    def __init__(self, ticket_id: _Optional[bytes] = ..., sequence_id: _Optional[str] = ..., owner: _Optional[str] = ..., blocks: _Optional[int] = ..., age_s: _Optional[float] = ..., remaining_s: _Optional[float] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("description", "load", "leases", "uptime_s", "prompt_tokens", "cached_tokens", "generated_tokens", "transferred_bytes", "transferred_blocks", "recomputed_tokens", "integrity_error", "used_blocks", "last_step_age_s")
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERRED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSFERRED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INTEGRITY_ERROR_FIELD_NUMBER: _ClassVar[int]
    USED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_AGE_S_FIELD_NUMBER: _ClassVar[int]
    description: WorkerDescription
    load: Load
    leases: _containers.RepeatedCompositeFieldContainer[Lease]
    uptime_s: float
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    transferred_bytes: int
    transferred_blocks: int
    recomputed_tokens: int
    integrity_error: str
    used_blocks: int
    last_step_age_s: float
    def __init__(self, description: _Optional[_Union[WorkerDescription, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., leases: _Optional[_Iterable[_Union[Lease, _Mapping]]] = ..., uptime_s: _Optional[float] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., transferred_bytes: _Optional[int] = ..., transferred_blocks: _Optional[int] = ..., recomputed_tokens: _Optional[int] = ..., integrity_error: _Optional[str] = ..., used_blocks: _Optional[int] = ..., last_step_age_s: _Optional[float] = ...) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ("peer_address", "peer_incarnation")
    PEER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PEER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    peer_address: str
    peer_incarnation: bytes
    def __init__(self, peer_address: _Optional[str] = ..., peer_incarnation: _Optional[bytes] = ...) -> None: ...

class ProbeResponse(_message.Message):
    __slots__ = ("unix_s", "versions", "ucx", "rdma_devices", "host_id", "memory_type", "link")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class UcxEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    UCX_FIELD_NUMBER: _ClassVar[int]
    RDMA_DEVICES_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_TYPE_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    unix_s: float
    versions: _containers.ScalarMap[str, str]
    ucx: _containers.ScalarMap[str, str]
    rdma_devices: _containers.RepeatedScalarFieldContainer[str]
    host_id: str
    memory_type: str
    link: LinkProbe
    def __init__(self, unix_s: _Optional[float] = ..., versions: _Optional[_Mapping[str, str]] = ..., ucx: _Optional[_Mapping[str, str]] = ..., rdma_devices: _Optional[_Iterable[str]] = ..., host_id: _Optional[str] = ..., memory_type: _Optional[str] = ..., link: _Optional[_Union[LinkProbe, _Mapping]] = ...) -> None: ...

class LinkProbe(_message.Message):
    __slots__ = ("outcome", "message", "handshake_s", "latency_s", "bytes_per_s", "blocks", "bytes", "tcp_bytes", "rdma_bytes")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HANDSHAKE_S_FIELD_NUMBER: _ClassVar[int]
    LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TCP_BYTES_FIELD_NUMBER: _ClassVar[int]
    RDMA_BYTES_FIELD_NUMBER: _ClassVar[int]
    outcome: LinkOutcome
    message: str
    handshake_s: float
    latency_s: float
    bytes_per_s: float
    blocks: int
    bytes: int
    tcp_bytes: int
    rdma_bytes: int
    def __init__(self, outcome: _Optional[_Union[LinkOutcome, str]] = ..., message: _Optional[str] = ..., handshake_s: _Optional[float] = ..., latency_s: _Optional[float] = ..., bytes_per_s: _Optional[float] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., tcp_bytes: _Optional[int] = ..., rdma_bytes: _Optional[int] = ...) -> None: ...

class StoreStateRequest(_message.Message):
    __slots__ = ("tenant", "id", "data", "ttl_ms", "most_tenant_bytes", "most_bytes", "handed_over")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    MOST_TENANT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    HANDED_OVER_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    id: str
    data: bytes
    ttl_ms: int
    most_tenant_bytes: int
    most_bytes: int
    handed_over: bool
    def __init__(self, tenant: _Optional[str] = ..., id: _Optional[str] = ..., data: _Optional[bytes] = ..., ttl_ms: _Optional[int] = ..., most_tenant_bytes: _Optional[int] = ..., most_bytes: _Optional[int] = ..., handed_over: _Optional[bool] = ...) -> None: ...

class StoreStateResponse(_message.Message):
    __slots__ = ("stored", "draining", "nowhere")
    STORED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    NOWHERE_FIELD_NUMBER: _ClassVar[int]
    stored: bool
    draining: bool
    nowhere: bool
    def __init__(self, stored: _Optional[bool] = ..., draining: _Optional[bool] = ..., nowhere: _Optional[bool] = ...) -> None: ...

class FetchStateRequest(_message.Message):
    __slots__ = ("tenant", "id")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    id: str
    def __init__(self, tenant: _Optional[str] = ..., id: _Optional[str] = ...) -> None: ...

class FetchStateResponse(_message.Message):
    __slots__ = ("data", "dropped")
    DATA_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    dropped: bool
    def __init__(self, data: _Optional[bytes] = ..., dropped: _Optional[bool] = ...) -> None: ...

class DropStateRequest(_message.Message):
    __slots__ = ("tenant", "id", "ttl_ms", "most_tenant_bytes", "most_bytes")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    MOST_TENANT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    id: str
    ttl_ms: int
    most_tenant_bytes: int
    most_bytes: int
    def __init__(self, tenant: _Optional[str] = ..., id: _Optional[str] = ..., ttl_ms: _Optional[int] = ..., most_tenant_bytes: _Optional[int] = ..., most_bytes: _Optional[int] = ...) -> None: ...

class DropStateResponse(_message.Message):
    __slots__ = ("dropped", "draining")
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    dropped: bool
    draining: bool
    def __init__(self, dropped: _Optional[bool] = ..., draining: _Optional[bool] = ...) -> None: ...
