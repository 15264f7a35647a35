"""grpc.health.v1, and reflection under its two names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any, TypeAlias

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer

HEALTH = "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1.ServerReflection"
REFLECTION_ALPHA = "grpc.reflection.v1alpha.ServerReflection"

MAX_WATCHES = 4096  # at once, which nobody needs a credential for, some 5 kB each

Status: TypeAlias = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):
    """Check, List and Watch of the services' one common status.

    grpcio's own servicer knows no List, and of several watchers of a service it forgets all when
    one leaves.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(services) | {""}
        self._serving = False
        self._changed = asyncio.Event()  # a new one for each change
        self._watches = 0

    def set(self, serving: bool) -> None:
        """What every check answers from now on, and what watchers are told."""
        self._serving = serving
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Status:
        """NOT_FOUND for a service that is not offered."""
        if request.service not in self._services:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"no service {request.service!r:.200} here"
            )
        return self._status(request.service)

    async def List(
        self, request: health_pb2.HealthListRequest, context: Any
    ) -> health_pb2.HealthListResponse:
        """All services."""
        statuses = {service: self._status(service) for service in self._services}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> AsyncIterator[Status]:
        """The status now and whenever it changes; SERVICE_UNKNOWN for what is not offered.
        RESOURCE_EXHAUSTED where MAX_WATCHES are open."""
        if self._watches >= MAX_WATCHES:
            why = f"{MAX_WATCHES} watches are open, which is the limit; Check is answered"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, why)
        told = None
        self._watches += 1
        try:
            while True:
                changed, status = self._changed, self._status(request.service)
                if status != told:
                    told = status
                    yield status
                await changed.wait()
        finally:
            self._watches -= 1

    def _status(self, service: str) -> Status:
        if service not in self._services:
            return Status(status=Status.SERVICE_UNKNOWN)
        return Status(status=Status.SERVING if self._serving else Status.NOT_SERVING)


def add_reflection(
    server: Any,
    services: Iterable[str],
    files: Iterable[FileDescriptor],
    foreign: Iterable[descriptor_pb2.FileDescriptorProto] = (),
) -> None:
    """Has `server` describe `services`, and itself. `files` define them, in the order of their
    imports; `foreign` those that have another package on the wire than in Python."""
    pool = descriptor_pool.DescriptorPool()
    for file in (*files, reflection_pb2.DESCRIPTOR):
        pool.AddSerializedFile(file.serialized_pb)
    for made in (*foreign, renamed(reflection_pb2.DESCRIPTOR, "grpc.reflection.v1")):
        pool.AddSerializedFile(made.SerializeToString())
    servicer = ReflectionServicer((*services, REFLECTION, REFLECTION_ALPHA), pool)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handler = grpc.method_handlers_generic_handler(REFLECTION, {"ServerReflectionInfo": method})
    server.add_generic_rpc_handlers((handler,))


def renamed(file: FileDescriptor, package: str) -> descriptor_pb2.FileDescriptorProto:
    """The same definitions under another package, whose messages are equal on the wire."""
    made = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(made)
    made.name, made.package = f"{package.replace('.', '/')}/{file.name.rpartition('/')[2]}", package
    old, new = f".{file.package}.", f".{package}."

    def rename(message: descriptor_pb2.DescriptorProto) -> None:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(old, new, 1)
        for nested in message.nested_type:
            rename(nested)

    for message in made.message_type:
        rename(message)
    for service in made.service:
        for method in service.method:
            method.input_type = method.input_type.replace(old, new, 1)
            method.output_type = method.output_type.replace(old, new, 1)
    return made
