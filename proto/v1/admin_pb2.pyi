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
