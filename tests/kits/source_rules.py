"""What the product's source may not say, found by reading it: waits without an end, pickles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from crossdock.proto.v1 import admin_pb2, inference_pb2, worker_pb2

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("crossdock", "proto", "kvcache", "engine", "kvtransfer", "worker", "prefill")
ROOMS += ("decode", "router", "deploy")
THAT_WAIT = {"wait", "join", "result", "get", "acquire", "recv", "communicate", "gone", "read"}
PROCESSES = {"run", "check_call", "check_output"}  # of subprocess
RPCS = {
    method.name
    for module in (admin_pb2, inference_pb2, worker_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if method.name not in ("Connect", "Generate")  # streams
}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def sources(*rooms: str) -> list[Path]:
    found = [path for room in rooms or ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    assert len(found) > 3
    return [path for path in found if "_pb2" not in path.name]


def unbounded_waits(path: Path) -> Iterator[str]:
    """file: source of each call or await that nothing ends but the event itself."""
    tree = ast.parse(path.read_text())
    name = str(path.relative_to(ROOT))
    for node in _outside_timeouts(tree):
        if _waits(node):
            yield f"{name}: {ast.unparse(node)}"


def pickles(path: Path) -> Iterator[str]:
    """file:line of whatever loads objects from bytes by running what the bytes say."""
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        if {name.split(".")[0] for name in names} & PICKLES:
            yield where
        if isinstance(node, ast.Call) and _runs_what_it_reads(node):
            yield where


def _outside_timeouts(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those inside `async with asyncio.timeout(…)` and `asyncio.wait_for(…)`."""
    if isinstance(node, ast.AsyncWith):
        calls = [item.context_expr for item in node.items]
        if any(isinstance(c, ast.Call) and _name(c) == "asyncio.timeout" for c in calls):
            return
    if isinstance(node, ast.Call) and _name(node) == "asyncio.wait_for":
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _outside_timeouts(child)


def _waits(node: ast.AST) -> bool:
    if isinstance(node, ast.Await):
        return isinstance(node.value, ast.Name | ast.Attribute)  # a task or a future
    return isinstance(node, ast.Call) and _call_waits(node)


def _call_waits(call: ast.Call) -> bool:
    keywords = {keyword.arg for keyword in call.keywords}
    name = _name(call)
    owner, _, method = name.rpartition(".")
    if "timeout" in keywords:
        return False
    if name in ("ray.get", "ray.wait", "asyncio.wait", "asyncio.shield"):
        return True
    if owner == "subprocess" and method in PROCESSES:
        return True
    if method in RPCS and "stub" in owner.lower():
        return True
    if method == "call" and owner in ("self", "server", "self._server"):
        return True  # WorkerServer.call: as long as the engine thread takes
    return bool(owner) and method in THAT_WAIT and not call.args and not keywords


def _runs_what_it_reads(call: ast.Call) -> bool:
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    name = _name(call)
    if name == "torch.load":
        return keywords.get("weights_only") != "True"
    if name in ("np.load", "numpy.load"):
        return keywords.get("allow_pickle", "False") != "False"
    if name == "yaml.load":
        return "Safe" not in ast.unparse(call)
    return name in ("eval", "exec", "yaml.unsafe_load", "yaml.full_load")


def _name(call: ast.Call) -> str:
    return ast.unparse(call.func)
