"""OpenTelemetry's SDK and exporters, set up once in each process as the spec says."""

from __future__ import annotations

import logging
import os
import pkgutil
from collections.abc import Mapping

from crossdock.proto.errors import ConfigError
from crossdock.proto.events import Listener

log = logging.getLogger(__name__)
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
EVENT_LISTENER = "CROSSDOCK_EVENT_LISTENER"


def log_level() -> str:
    """What CROSSDOCK_LOG asks for. Raises ConfigError."""
    level = os.environ.get("CROSSDOCK_LOG") or "info"
    if level.lower() not in LOG_LEVELS:
        known = ", ".join(LOG_LEVELS)
        raise ConfigError("CROSSDOCK_LOG", f"{level!r} is not allowed; one of {known}")
    return level.upper()


def event_listener() -> Listener | None:
    """Whom CROSSDOCK_EVENT_LISTENER names as module:function, if it is set. Raises ConfigError."""
    named = os.environ.get(EVENT_LISTENER)
    try:
        return pkgutil.resolve_name(named) if named else None
    except (ValueError, ImportError, AttributeError) as error:
        raise ConfigError(EVENT_LISTENER, f"{named!r} is not module:function: {error}") from None


def configure(telemetry: Mapping[str, str], service_name: str, instance: str = "") -> None:
    """Sends this process's spans where `telemetry`, a TelemetrySpec as a dict, says."""
    if telemetry["exporter"] == "none":
        return
    # Imported here: processes without telemetry don't pay for the SDK.
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider, export

    attributes = {"service.name": service_name, "service.instance.id": instance or service_name}
    provider = TracerProvider(resource=Resource.create(attributes))
    if telemetry["exporter"] == "console":
        provider.add_span_processor(export.SimpleSpanProcessor(export.ConsoleSpanExporter()))
    else:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        endpoint = telemetry["endpoint"]
        insecure = not endpoint.startswith("https://")
        exporter = OTLPSpanExporter(endpoint, insecure=insecure)
        provider.add_span_processor(export.BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)


def flush() -> None:
    """Sends what is still held back; called before a process ends."""
    from opentelemetry import trace

    provider = trace.get_tracer_provider()
    if hasattr(provider, "force_flush"):  # the SDK's
        provider.force_flush(2000)
