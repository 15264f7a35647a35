from crossdock.proto.v1 import inference_pb2 as _inference_pb2
from crossdock.proto.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetClusterStatusRequest(_message.Message):
    __slots__ = ("check_integrity", "listening")
    CHECK_INTEGRITY_FIELD_NUMBER: _ClassVar[int]
    LISTENING_FIELD_NUMBER: _ClassVar[int]
    check_integrity: bool
    listening: bool
    def __init__(self, check_integrity: _Optional[bool] = ..., listening: _Optional[bool] = ...) -> None: ...

class ListeningPort(_message.Message):
    __slots__ = ("process", "pid", "host", "port")
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    process: str
    pid: int
    host: str
    port: int
    def __init__(self, process: _Optional[str] = ..., pid: _Optional[int] = ..., host: _Optional[str] = ..., port: _Optional[int] = ...) -> None: ...

class NodePorts(_message.Message):
    __slots__ = ("node_id", "ports")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    ports: _containers.RepeatedCompositeFieldContainer[ListeningPort]
    def __init__(self, node_id: _Optional[str] = ..., ports: _Optional[_Iterable[_Union[ListeningPort, _Mapping]]] = ...) -> None: ...

class MemberStatus(_message.Message):
    __slots__ = ("name", "pool", "role", "state", "address", "pid", "node_id", "revision", "restarts", "worker", "error", "model", "start_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    pool: str
    role: _worker_pb2.Role
    state: str
    address: str
    pid: int
    node_id: str
    revision: str
    restarts: int
    worker: _worker_pb2.WorkerStatus
    error: str
    model: str
    start_s: float
    def __init__(self, name: _Optional[str] = ..., pool: _Optional[str] = ..., role: _Optional[_Union[_worker_pb2.Role, str]] = ..., state: _Optional[str] = ..., address: _Optional[str] = ..., pid: _Optional[int] = ..., node_id: _Optional[str] = ..., revision: _Optional[str] = ..., restarts: _Optional[int] = ..., worker: _Optional[_Union[_worker_pb2.WorkerStatus, _Mapping]] = ..., error: _Optional[str] = ..., model: _Optional[str] = ..., start_s: _Optional[float] = ...) -> None: ...

class GatewayStatus(_message.Message):
    __slots__ = ("name", "state", "grpc", "http", "pid", "active_requests", "revision", "restarts", "error")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    GRPC_FIELD_NUMBER: _ClassVar[int]
    HTTP_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: str
    grpc: str
    http: str
    pid: int
    active_requests: int
    revision: str
    restarts: int
    error: str
    def __init__(self, name: _Optional[str] = ..., state: _Optional[str] = ..., grpc: _Optional[str] = ..., http: _Optional[str] = ..., pid: _Optional[int] = ..., active_requests: _Optional[int] = ..., revision: _Optional[str] = ..., restarts: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("unix_s", "action", "reason")
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    unix_s: float
    action: str
    reason: str
    def __init__(self, unix_s: _Optional[float] = ..., action: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class PoolScale(_message.Message):
    __slots__ = ("pool", "least", "most", "target", "floor", "keep", "cause", "reason", "dry_run")
    POOL_FIELD_NUMBER: _ClassVar[int]
    LEAST_FIELD_NUMBER: _ClassVar[int]
    MOST_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    pool: str
    least: int
    most: int
    target: int
    floor: int
    keep: int
    cause: str
    reason: str
    dry_run: bool
    def __init__(self, pool: _Optional[str] = ..., least: _Optional[int] = ..., most: _Optional[int] = ..., target: _Optional[int] = ..., floor: _Optional[int] = ..., keep: _Optional[int] = ..., cause: _Optional[str] = ..., reason: _Optional[str] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class ClusterStatus(_message.Message):
    __slots__ = ("name", "model", "workers", "gateways", "decisions", "converged", "generation", "waiting_for", "local", "nodes", "autoscaled", "metrics_address")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    CONVERGED_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    AUTOSCALED_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    name: str
    model: str
    workers: _containers.RepeatedCompositeFieldContainer[MemberStatus]
    gateways: _containers.RepeatedCompositeFieldContainer[GatewayStatus]
    decisions: _containers.RepeatedCompositeFieldContainer[Decision]
    converged: bool
    generation: int
    waiting_for: _containers.RepeatedScalarFieldContainer[str]
    local: bool
    nodes: _containers.RepeatedCompositeFieldContainer[NodePorts]
    autoscaled: _containers.RepeatedCompositeFieldContainer[PoolScale]
    metrics_address: str
    def __init__(self, name: _Optional[str] = ..., model: _Optional[str] = ..., workers: _Optional[_Iterable[_Union[MemberStatus, _Mapping]]] = ..., gateways: _Optional[_Iterable[_Union[GatewayStatus, _Mapping]]] = ..., decisions: _Optional[_Iterable[_Union[Decision, _Mapping]]] = ..., converged: _Optional[bool] = ..., generation: _Optional[int] = ..., waiting_for: _Optional[_Iterable[str]] = ..., local: _Optional[bool] = ..., nodes: _Optional[_Iterable[_Union[NodePorts, _Mapping]]] = ..., autoscaled: _Optional[_Iterable[_Union[PoolScale, _Mapping]]] = ..., metrics_address: _Optional[str] = ...) -> None: ...

class ApplyRequest(_message.Message):
    __slots__ = ("yaml", "file", "dry_run", "wait", "timeout_s", "generation")
    YAML_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    yaml: str
    file: str
    dry_run: bool
    wait: bool
    timeout_s: float
    generation: int
    def __init__(self, yaml: _Optional[str] = ..., file: _Optional[str] = ..., dry_run: _Optional[bool] = ..., wait: _Optional[bool] = ..., timeout_s: _Optional[float] = ..., generation: _Optional[int] = ...) -> None: ...

class ApplyResponse(_message.Message):
    __slots__ = ("actions", "converged", "generation", "waiting_for", "hopeless")
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    CONVERGED_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    HOPELESS_FIELD_NUMBER: _ClassVar[int]
    actions: _containers.RepeatedScalarFieldContainer[str]
    converged: bool
    generation: int
    waiting_for: _containers.RepeatedScalarFieldContainer[str]
    hopeless: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, actions: _Optional[_Iterable[str]] = ..., converged: _Optional[bool] = ..., generation: _Optional[int] = ..., waiting_for: _Optional[_Iterable[str]] = ..., hopeless: _Optional[_Iterable[str]] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("pool", "replicas", "wait", "timeout_s", "generation")
    POOL_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    pool: str
    replicas: int
    wait: bool
    timeout_s: float
    generation: int
    def __init__(self, pool: _Optional[str] = ..., replicas: _Optional[int] = ..., wait: _Optional[bool] = ..., timeout_s: _Optional[float] = ..., generation: _Optional[int] = ...) -> None: ...

class DownRequest(_message.Message):
    __slots__ = ("drain_s",)
    DRAIN_S_FIELD_NUMBER: _ClassVar[int]
    drain_s: float
    def __init__(self, drain_s: _Optional[float] = ...) -> None: ...

class DownResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class ExplainedRequest(_message.Message):
    __slots__ = ("request_id", "gateway", "model", "policy", "received_unix_s", "seconds", "running", "error", "sequences")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    gateway: str
    model: str
    policy: str
    received_unix_s: float
    seconds: float
    running: bool
    error: str
    sequences: _containers.RepeatedCompositeFieldContainer[ExplainedSequence]
    def __init__(self, request_id: _Optional[str] = ..., gateway: _Optional[str] = ..., model: _Optional[str] = ..., policy: _Optional[str] = ..., received_unix_s: _Optional[float] = ..., seconds: _Optional[float] = ..., running: _Optional[bool] = ..., error: _Optional[str] = ..., sequences: _Optional[_Iterable[_Union[ExplainedSequence, _Mapping]]] = ...) -> None: ...

class ExplainedSequence(_message.Message):
    __slots__ = ("index", "prompt_tokens", "cached_tokens", "generated_tokens", "finish_reason", "placements", "timings", "stages", "transfer_s", "tpot_s")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    PLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    TPOT_S_FIELD_NUMBER: _ClassVar[int]
    index: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    finish_reason: str
    placements: _containers.RepeatedCompositeFieldContainer[ExplainedPlacement]
    timings: _inference_pb2.Timings
    stages: _containers.RepeatedCompositeFieldContainer[Stage]
    transfer_s: float
    tpot_s: float
    def __init__(self, index: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., finish_reason: _Optional[str] = ..., placements: _Optional[_Iterable[_Union[ExplainedPlacement, _Mapping]]] = ..., timings: _Optional[_Union[_inference_pb2.Timings, _Mapping]] = ..., stages: _Optional[_Iterable[_Union[Stage, _Mapping]]] = ..., transfer_s: _Optional[float] = ..., tpot_s: _Optional[float] = ...) -> None: ...

class Stage(_message.Message):
    __slots__ = ("name", "seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    seconds: float
    def __init__(self, name: _Optional[str] = ..., seconds: _Optional[float] = ...) -> None: ...

class PredictedParts(_message.Message):
    __slots__ = ("queue_s", "prompt_s", "eviction_s", "transfer_s", "stream_s")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_S_FIELD_NUMBER: _ClassVar[int]
    EVICTION_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    STREAM_S_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    prompt_s: float
    eviction_s: float
    transfer_s: float
    stream_s: float
    def __init__(self, queue_s: _Optional[float] = ..., prompt_s: _Optional[float] = ..., eviction_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., stream_s: _Optional[float] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("worker", "chosen", "parts", "cached_blocks", "all_s", "number")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ALL_S_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    worker: str
    chosen: bool
    parts: PredictedParts
    cached_blocks: int
    all_s: float
    number: float
    def __init__(self, worker: _Optional[str] = ..., chosen: _Optional[bool] = ..., parts: _Optional[_Union[PredictedParts, _Mapping]] = ..., cached_blocks: _Optional[int] = ..., all_s: _Optional[float] = ..., number: _Optional[float] = ...) -> None: ...

class ExplainedPlacement(_message.Message):
    __slots__ = ("at_s", "sequence_id", "reason", "prefill", "decode", "decoded_on", "cached_blocks", "uncached_tokens", "measured", "predicted", "computing", "decoding", "gave_up", "decode_reason")
    AT_S_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    DECODED_ON_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    UNCACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_FIELD_NUMBER: _ClassVar[int]
    COMPUTING_FIELD_NUMBER: _ClassVar[int]
    DECODING_FIELD_NUMBER: _ClassVar[int]
    GAVE_UP_FIELD_NUMBER: _ClassVar[int]
    DECODE_REASON_FIELD_NUMBER: _ClassVar[int]
    at_s: float
    sequence_id: str
    reason: str
    prefill: str
    decode: str
    decoded_on: str
    cached_blocks: int
    uncached_tokens: int
    measured: bool
    predicted: PredictedParts
    computing: _containers.RepeatedCompositeFieldContainer[Candidate]
    decoding: _containers.RepeatedCompositeFieldContainer[Candidate]
    gave_up: str
    decode_reason: str
    def __init__(self, at_s: _Optional[float] = ..., sequence_id: _Optional[str] = ..., reason: _Optional[str] = ..., prefill: _Optional[str] = ..., decode: _Optional[str] = ..., decoded_on: _Optional[str] = ..., cached_blocks: _Optional[int] = ..., uncached_tokens: _Optional[int] = ..., measured: _Optional[bool] = ..., predicted: _Optional[_Union[PredictedParts, _Mapping]] = ..., computing: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., decoding: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., gave_up: _Optional[str] = ..., decode_reason: _Optional[str] = ...) -> None: ...
