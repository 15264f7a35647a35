"""What a process does with its spans is what the spec's telemetry says."""

from __future__ import annotations

import subprocess
import sys
from concurrent import futures

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

SPAN = """
import sys
from crossdock.deploy.telemetry import configure, flush
configure(%r, "crossdock.prefill", "prefill-0")
from opentelemetry import trace
trace.get_tracer("t").start_span("request").end()
flush()
print("sdk" if "opentelemetry.sdk" in sys.modules else "no sdk")
"""


def run(telemetry) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SPAN % (telemetry,)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_off_costs_nothing():
    assert run({"exporter": "none", "endpoint": ""}).strip() == "no sdk"


def test_console_prints_spans():
    output = run({"exporter": "console", "endpoint": ""})
    assert '"name": "request"' in output and '"service.name": "crossdock.prefill"' in output


def test_otlp_sends_spans_to_the_collector():
    received = futures.Future()

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request, context):
            received.set_result(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        run({"exporter": "otlp", "endpoint": f"http://127.0.0.1:{port}"})
        resource = received.result(timeout=10).resource_spans[0]
    finally:
        server.stop(0)
    names = {a.key: a.value.string_value for a in resource.resource.attributes}
    assert names["service.name"] == "crossdock.prefill"
    assert names["service.instance.id"] == "prefill-0"
    assert resource.scope_spans[0].spans[0].name == "request"
