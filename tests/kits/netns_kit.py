"""Hosts that lose each other: network namespaces on one switch, and Crossdock processes in them.

Each host is a namespace with an interface `eth0`; the switch is a bridge in a namespace of its own.
Namespaces are held by a process each and have no names: they end with it, and the interfaces with
them, also when the tests are killed. Nothing outside of them is touched.

Run as a program, this file is one worker or gateway inside a host. It takes commands as JSON lines
on stdin, and offers its gRPC on a unix socket, which does not care about namespaces: so the tests
can talk to it whatever became of its links.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEMBER_START_S = 180.0
COMMAND_S = 20.0
KEY = b"a key of this test cluster"
# ip and tc are often where only an administrator's PATH leads.
TOOLS = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
ENVIRONMENT = os.environ | {"PATH": TOOLS}


class NotPermitted(Exception):
    """No network namespaces for us here; the text says why."""


@dataclasses.dataclass(frozen=True)
class Host:
    name: str
    ip: str
    pid: int  # of the process that holds its namespace

    @property
    def port(self) -> str:
        """The switch's end of its cable."""
        return f"to-{self.name}"


class Network:
    """Hosts on one switch. Raises NotPermitted where the kernel does not let us have them."""

    def __init__(self) -> None:
        self._holders: list[subprocess.Popen[bytes]] = []
        self._slowed: set[str] = set()
        self.hosts: dict[str, Host] = {}
        for tool in ("ip", "unshare", "nsenter"):
            if shutil.which(tool, path=TOOLS) is None:
                raise NotPermitted(f"no network namespaces: {tool} is not installed")
        try:
            self._switch = self._hold([] if os.geteuid() == 0 else ["--user", "--map-root-user"])
            self._ip(self._switch, "link add switch type bridge")
            self._ip(self._switch, "link set switch up")
        except BaseException:
            self.close()
            raise

    def host(self, name: str) -> Host:
        ip = f"10.77.0.{len(self.hosts) + 1}"
        host = Host(name, ip, self._hold([], inside=self._switch))
        self._ip(host.pid, "link set lo up")
        self._ip(self._switch, f"link add {host.port} type veth peer name eth0 netns {host.pid}")
        self._ip(self._switch, f"link set {host.port} master switch up")
        self._ip(host.pid, f"addr add {ip}/24 dev eth0")
        self._ip(host.pid, "link set eth0 up")
        self.hosts[name] = host
        return host

    def cut(self, one: str, other: str) -> None:
        """These two hear nothing of each other any more, in silence; all other links stay whole."""
        self._isolate(one, "on")
        self._isolate(other, "on")

    def unplug(self, name: str) -> None:
        """The host's cable is pulled out."""
        self._ip(self._switch, f"link set {self.hosts[name].port} down")

    def repair(self) -> None:
        """Every cut and unplugged link is whole, and as fast as the kernel."""
        for name, host in self.hosts.items():
            self._isolate(name, "off")
            self._ip(self._switch, f"link set {host.port} up")
            self.unslow(name)

    def slow(self, name: str, mbit: float) -> str:
        """What the host sends goes no faster than this. Returns why not, or nothing."""
        shape = f"tbf rate {int(mbit * 1000)}kbit burst 64kb latency 200ms"
        try:
            self._run(self.hosts[name].pid, f"tc qdisc replace dev eth0 root {shape}")
        except (RuntimeError, FileNotFoundError) as error:
            return f"links cannot be slowed here: {error}"
        self._slowed.add(name)
        return ""

    def unslow(self, name: str) -> None:
        if name in self._slowed:
            self._run(self.hosts[name].pid, "tc qdisc del dev eth0 root")
            self._slowed.remove(name)

    def inside(self, host: Host, *command: str) -> list[str]:
        """The command line that runs `command` in the host."""
        return [*_enter(host.pid), *command]

    def close(self) -> None:
        """Ends the holders; whatever they held goes with them once the members have ended."""
        for holder in reversed(self._holders):
            assert holder.stdin is not None
            holder.stdin.close()
            holder.wait(10)
        self._holders.clear()

    def _isolate(self, name: str, state: str) -> None:
        # Bridge ports that are both isolated do not reach each other, but everybody else.
        port = self.hosts[name].port
        self._ip(self._switch, f"link set dev {port} type bridge_slave isolated {state}")

    def _hold(self, options: list[str], inside: int | None = None) -> int:
        """A process that holds a new namespace until its stdin, or this process, ends."""
        where = _enter(inside) if inside is not None else []
        holder = subprocess.Popen(
            [*where, "unshare", "--net", *options, "sh", "-c", "echo; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
        )
        self._holders.append(holder)
        assert holder.stdout is not None and holder.stderr is not None
        if holder.stdout.readline() != b"\n":
            raise NotPermitted(
                f"no network namespaces here: {holder.stderr.read().decode().strip()}"
            )
        return holder.pid

    def _ip(self, pid: int, arguments: str) -> None:
        self._run(pid, f"ip {arguments}")

    def _run(self, pid: int, command: str) -> None:
        done = subprocess.run(
            [*_enter(pid), *command.split()],
            capture_output=True,
            text=True,
            timeout=20,
            env=ENVIRONMENT,
        )
        if done.returncode:
            raise RuntimeError(f"{command}: {done.stderr.strip()}")


def _enter(pid: int) -> list[str]:
    user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
    return ["nsenter", "--target", str(pid), *user, "--net"]


class Member:
    """A worker or gateway process on a host, as the tests hold it."""

    def __init__(
        self, network: Network, host: Host, kind: str, folder: Path, **settings: Any
    ) -> None:
        self.name = settings["name"]
        self.host = host
        self.target = f"unix:{folder}/{self.name}.sock"
        arguments = [__file__, kind, host.ip, self.target, json.dumps(settings)]
        self._log = (folder / f"{self.name}.log").open("wb")
        self._process = subprocess.Popen(
            network.inside(host, sys.executable, *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self.endpoint: dict[str, Any] = {}

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    def wait_started(self) -> None:
        self.endpoint = self._answer(MEMBER_START_S)

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer(COMMAND_S)

    def close(self) -> None:
        self._process.kill()
        self._process.wait(10)
        self._log.close()

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], timeout_s)[0]:
            raise TimeoutError(f"{self.name}: nothing in {timeout_s:g} s\n{self.log[-4000:]}")
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended\n{self.log[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Cluster:
    """Workers and one gateway on the hosts of a network, told of each other as a controller does.

    workers: (host, name, role). Owns network, processes and folder.
    """

    def __init__(
        self, model: Path, hosts: list[str], workers: list[tuple[str, str, str]], **settings: Any
    ) -> None:
        self.network = Network()
        self._folder = Path(tempfile.mkdtemp(prefix="xd-net-"))
        self.workers: dict[str, Member] = {}
        self._members: list[Member] = []
        try:
            for name in hosts:
                self.network.host(name)
            common = {"model": str(model), **settings}
            for host, name, role in workers:
                options = {**common, "name": name, "pool": role, "role": role}
                self.workers[name] = self._start(host, "worker", options)
            self.gateway = self._start(hosts[-1], "gateway", {"name": "g", "model": str(model)})
            for member in self._members:
                member.wait_started()
            for worker in self.workers.values():
                worker.ask(peers=self.endpoints())
        except BaseException:
            self.close()
            raise

    def _start(self, host: str, kind: str, settings: dict[str, Any]) -> Member:
        host_ = self.network.hosts[host]
        member = Member(self.network, host_, kind, self._folder, **settings)
        self._members.append(member)
        return member

    def endpoints(self, *names: str) -> list[dict[str, Any]]:
        """Of the named workers, or all."""
        return [self.workers[name].endpoint for name in names or self.workers]

    def close(self) -> None:
        for member in self._members:
            member.close()
        self.network.close()
        shutil.rmtree(self._folder, ignore_errors=True)


# -- inside a host ---------------------------------------------------------------------------------


async def _worker(ip: str, settings: dict[str, Any]) -> tuple[str, dict[str, Any], Callable]:
    from crossdock.decode import role as decode_worker
    from crossdock.deploy.authority import Authority
    from crossdock.prefill import role as prefill_worker
    from crossdock.proto.types import Role, WorkerEndpoint
    from crossdock.worker.config import WorkerConfig

    role = Role(settings.pop("role"))
    config = WorkerConfig(
        host=ip,
        role=role,
        cluster_key=KEY,
        transport="nixl",
        transport_options={"TLS": "tcp", "NET_DEVICES": "eth0"},
        **settings,
    )
    proof = Authority(KEY, "test").credentials(str(role), config.name)
    server = (prefill_worker if role is Role.PREFILL else decode_worker).create(config, proof)
    endpoint = await server.start()

    async def command(peers: list[dict[str, Any]]) -> dict[str, Any]:
        await server.update_peers(WorkerEndpoint(**peer) for peer in peers)
        return {}

    return endpoint.address, dataclasses.asdict(endpoint), command


async def _gateway(ip: str, settings: dict[str, Any]) -> tuple[str, dict[str, Any], Callable]:
    from crossdock.deploy.authority import Authority
    from crossdock.proto.hashing import hash_key
    from crossdock.proto.types import WorkerEndpoint
    from crossdock.router.gateway import GatewayConfig, GatewayServer

    gateway = GatewayServer(
        GatewayConfig(hash_key=hash_key(KEY), grpc=f"{ip}:0", http=f"{ip}:0", **settings),
        Authority(KEY, "test").credentials("gateway", settings["name"]),
    )
    await gateway.start()

    async def command(members: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        if members is not None:
            await gateway.update_members(WorkerEndpoint(**each) for each in members)
        return {"connected": sorted(gateway.view.workers)}

    return gateway.grpc_address, {}, command


async def _relay(path: str, address: str) -> None:
    """Carries bytes between the unix socket and the member's own port."""
    host, _, port = address.rpartition(":")

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))
        await asyncio.gather(copy(reader, back), copy(there, writer))

    await asyncio.start_unix_server(connected, path)


async def _member(kind: str, ip: str, target: str, settings: dict[str, Any]) -> None:
    start = _worker if kind == "worker" else _gateway
    address, about, command = await start(ip, settings)
    await _relay(target.removeprefix("unix:"), address)
    lines = asyncio.StreamReader(limit=1 << 20)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # stdout is for answers alone
    answers.write(json.dumps(about) + "\n")
    answers.flush()
    while line := await lines.readline():
        answers.write(json.dumps(await command(**json.loads(line))) + "\n")
        answers.flush()
    os._exit(0)  # the tests have ended, however they did


if __name__ == "__main__":
    import logging

    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s {time.strftime('%Z')} %(name)s: %(message)s"
    )
    asyncio.run(_member(*sys.argv[1:4], json.loads(sys.argv[4])))
