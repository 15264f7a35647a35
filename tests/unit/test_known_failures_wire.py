"""Public failures that lie in the source, the wire or its library. See test_known_failures.py."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest
from doctor_kit import OK, D, P, facts, lines
from gateway_rig import start_rig
from rich.console import Console
from source_rules import pickles, sources, unbounded_waits
from transport_kit import BLOCK_BYTES, NUM_BLOCKS, Pool

from crossdock.doctor import Report, show
from crossdock.findings import PairFacts
from crossdock.kvtransfer import nixl
from crossdock.kvtransfer.transport import Handle, HandleState
from crossdock.proto.types import Role

WAIT_S = 20.0


def test_no_wait_is_unbounded() -> None:
    """TensorRT-LLM#14414, #15363: a future without a timeout wedged every rank."""
    rooms = ("kvtransfer", "worker", "prefill", "decode", "router", "deploy")
    found = {wait for path in sources(*rooms) for wait in unbounded_waits(path)}
    assert found - BOUNDED_OTHERWISE.keys() == set()
    assert BOUNDED_OTHERWISE.keys() - found == set(), "excuses that nobody needs any more"


_CALLER = "the caller's deadline, which every caller in the product sets"
_DRAIN = "the controller ends the worker at its drain deadline"
_WORKLESS = "has nothing to do until then; its stream's end or a cancel ends it"
_LIFE = "lasts as long as what it serves"
BOUNDED_OTHERWISE = {
    "router/frontdoor/pace.py: await turn": "the event loop's next turns give it, eight at a time",
    "worker/peer_calls.py: await call": "made with a timeout by each of its callers",
    "worker/peer_calls.py: await answered": "_introduce: each of its calls has a timeout",
    "worker/peer_calls.py: asyncio.shield(adding)": "_add: each of its calls has a timeout",
    "worker/probe.py: asyncio.shield(task)": "_link: each of its parts has a timeout",
    "worker/server.py: self.call(lambda role: setattr(role, 'draining', True))": _DRAIN,
    "worker/server.py: self.call(lambda role: role.idle)": _DRAIN,
    "worker/server.py: self.call(self._move_away)": _DRAIN,
    "worker/server.py: self.call(lambda role: self._status(role, check_integrity))": _CALLER,
    "worker/server.py: self.call(lambda role: role.waiting_tickets())": "the engine's progress: "
    "while it stands still nothing renews, and health says so",
    "worker/service.py: self._server.call(lambda role: role.renew_tickets(ids, lease_s))": _CALLER,
    "worker/service.py: self._server.call(lambda role: role.release_tickets(ids))": _CALLER,
    "worker/service.py: ready.wait()": _WORKLESS,
    "kvtransfer/rank_link.py: self._link.recv()": _LIFE,
    "router/gateway.py: self._health_changed.wait()": _LIFE,
    "router/dispatch/streams.py: await stream.over": "silence and keepalive break the stream",
    "router/dispatch/streams.py: stream.gone()": "it is aborted LINGER_S after its end",
    "router/dispatch/request.py: await self._waiter": "each request has a deadline",
    "router/frontdoor/audit.py: await self._writing": "goes on until it is told to stop",
    "router/frontdoor/grammar_check.py: asyncio.shield(asyncio.ensure_future(self._find_out(key, "
    "grammar, turn)))": "the process that it asks has PATIENCE_S for each answer",
    "router/frontdoor/grammar_check.py: await turn": "each answer before its own has as long",
    "router/frontdoor/grpc_health.py: changed.wait()": _LIFE,
    "router/frontdoor/grpc_kserve.py: room.acquire()": "its requests have deadlines",
    "router/frontdoor/grpc_kserve.py: answers.get()": _WORKLESS,
    "router/frontdoor/grpc_kserve.py: await getting": _WORKLESS,
    "router/frontdoor/grpc_kserve.py: await serving": "has ended",
    "router/frontdoor/grpc_kserve.py: asyncio.wait({getting, serving}, "
    "return_when=asyncio.FIRST_COMPLETED)": _WORKLESS,
    "router/frontdoor/in_turn.py: await mine": "whoever has the turn waits PATIENCE_S at the most",
    "router/frontdoor/http2/call.py: await answers": "the handler's own waits are here",
    "router/frontdoor/http2/stream.py: await self._arrived": "WHOLE_S, and in a stream of the "
    "client's its life: pings and the connection's end",
    "deploy/ray/member.py: self._stopped.wait()": _LIFE,
    "deploy/ray/control_plane.py: self._started.wait()": "Watched: start_timeout_s",
    "deploy/ray/control_plane.py: asyncio.Event().wait()": _LIFE,
    "deploy/ray/control_plane.py: ray.get(self._run)": "ray.wait has said that it is ready",
    "deploy/ray/calls.py: await reference": "timeouts of its callers: start, probe, stop, drain",
    "deploy/controller.py: asyncio.shield(self._ending)": "down: drain and stops are bounded",
    "deploy/controller.py: self._looping.acquire()": "the loop ends with the turn it is in",
    "deploy/members.py: self.process.gone()": _LIFE,
}


# -- the wire ------------------------------------------------------------------------------------


def test_no_source_loads_objects_from_bytes() -> None:
    """lmdeploy#4804, CVE-2026-3059, CVE-2026-3060, vllm#17192: code ran that came by socket.

    Ray pickles its own calls, among processes of one cluster; no request, token or KV goes there.
    """
    assert [where for path in sources() for where in pickles(path)] == []


class Planted:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("service", ["gateway", "worker"])
async def test_a_pickle_on_the_wire_is_bytes_that_do_not_parse(
    tiny_model: Path, tmp_path: Path, service: str
) -> None:
    """CVE-2026-3059: the same from outside: what is no protobuf is refused and not looked into."""
    payload = pickle.dumps(Planted(tmp_path / "ran"))
    method = {
        "gateway": "/crossdock.v1.Inference/GenerateUnary",
        "worker": "/crossdock.v1.Worker/RenewLeases",
    }[service]
    async with start_rig(tiny_model) as rig:
        worker = rig.prefills[0].endpoint.address
        address = rig.gateway.grpc_address if service == "gateway" else worker
        async with grpc.aio.insecure_channel(address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary(method)(payload, timeout=WAIT_S)
    wanted = {"gateway": "INVALID_ARGUMENT", "worker": "UNKNOWN"}[service]
    assert refused.value.code().name == wanted
    assert not (tmp_path / "ran").exists()
    pickle.loads(payload)
    assert (tmp_path / "ran").exists()  # it would have


def test_preflight_names_the_pair_and_the_path(capsys: pytest.CaptureFixture[str]) -> None:
    """dynamo#1286, #2331, #11914: several nodes hung without a diagnosis."""
    other = facts("p-1", Role.PREFILL)
    broken = PairFacts("d", "p-1", "read_failed", "nothing in 5 s")
    (line,) = lines([P, other, D], OK, broken)
    assert line.startswith("d <- p-1: reading KV failed: nothing in 5 s; ")
    show(Report("c", (P, other, D), (OK, broken)), Console(width=200, highlight=False))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    by_pair = {(row[1], row[3]): row for row in rows if len(row) > 5 and row[3] in ("p", "p-1")}
    assert by_pair["d", "p"][-3:-1] == ["shared", "memory"]
    assert by_pair["d", "p-1"][5] == "read_failed"


# -- NIXL ----------------------------------------------------------------------------------------


class Recorded:
    """NIXL's agent, with who called what when."""

    made: list[Recorded]

    def __init__(self, agent: Any, name: str) -> None:
        self._agent, self.name = agent, name
        self.threads: set[int] = set()
        self.spans: list[tuple[str, float, float]] = []  # method, begin, end
        self.descriptors: list[int] = []  # rows of each list of one transfer's side

    def __getattr__(self, method: str) -> Any:
        found = getattr(self._agent, method)
        if not callable(found):
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return found(*arguments, **named)
            finally:
                self.threads.add(threading.get_ident())
                self.spans.append((method, begin, time.perf_counter()))
                if method == "get_xfer_descs":
                    self.descriptors.append(len(arguments[0]))

        return call


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """Every agent that is made from now on."""
    made: list[Recorded] = []
    real = nixl.api.nixl_agent

    def make(name: str, settings: Any) -> Recorded:
        made.append(Recorded(real(name, settings), name))
        return made[-1]

    monkeypatch.setattr(nixl.api, "nixl_agent", make)
    return made


@pytest.fixture
def pools(agents: list[Recorded]) -> Iterator[list[Pool]]:
    made = [Pool("nixl") for _ in range(3)]
    yield made
    for pool in made:
        pool.close()


def meet(pool: Pool, peer: Pool) -> None:
    pool.transport.add_peer(peer.incarnation, peer.transport.info(), NUM_BLOCKS, BLOCK_BYTES)


def settled(handle: Handle) -> Handle:
    end = time.monotonic() + WAIT_S
    while not handle.terminal:
        assert time.monotonic() < end, "the read never ended"
        time.sleep(0.001)
    return handle


def test_every_nixl_call_of_an_agent_is_made_by_one_thread(
    agents: list[Recorded], pools: list[Pool]
) -> None:
    """vllm#49238, LightLLM#1470: loading a restarted peer's metadata crashed, and two threads that
    added one agent aborted UCX: one owner, fresh names, one change of peers at a time."""
    reader, *peers = pools
    for each in peers:
        each.fill(1)
    failures: list[Exception] = []

    def churn(number: int) -> None:
        peer = peers[number % 2]
        try:
            for _ in range(5):
                meet(reader, peer)
                settled(reader.transport.read_blocks(peer.incarnation, [number], [number]))
                settled(reader.transport.read_generations(peer.incarnation, [number], b"t"))
                if number < 2:
                    reader.transport.remove_peer(peer.incarnation)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=churn, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not failures and not any(thread.is_alive() for thread in threads)
    agent = agents[0]
    assert agent.name == reader.incarnation.hex()
    assert len({each.name for each in agents}) == len(agents)
    assert len(agent.threads) == 1 and threading.get_ident() not in agent.threads
    changes = [span for span in agent.spans if span[0].endswith("_remote_agent")]
    assert len([span for span in changes if span[0] == "add_remote_agent"]) >= 2
    ordered = sorted(agent.spans, key=lambda span: span[1])
    assert all(one[2] <= other[1] for one, other in pairwise(ordered))


def test_a_run_of_consecutive_blocks_is_one_descriptor(
    agents: list[Recorded], pools: list[Pool]
) -> None:
    """vllm#55434, #53825, #30207: 120,000 descriptors a transfer; posting them took most of it."""
    reader, peer, _ = pools
    meet(reader, peer)

    def rows(remote: list[int], local: list[int]) -> list[int]:
        agents[0].descriptors.clear()
        handle = settled(reader.transport.read_blocks(peer.incarnation, remote, local))
        assert handle.state is HandleState.DONE
        return agents[0].descriptors

    whole = list(range(NUM_BLOCKS))
    assert rows(whole, whole) == [1, 1]  # the local side's and the peer's
    assert rows([0, 1, 2, 10, 11, 40], [20, 21, 22, 30, 31, 32]) == [3, 3]
    agents[0].descriptors.clear()
    settled(reader.transport.read_generations(peer.incarnation, whole, b""))
    assert agents[0].descriptors == [1, 1]  # nor does the fence take one for each block
