"""How fast KV moves between two processes that share one GPU, beside that GPU's own copy.

    python benchmarks/vram_hand_off.py [--blocks 64] [--json out.json]

Both pools are GPU memory, read over NIXL. `pull` is Puller.start to its READ's end, through the
product; `copy` is the same number of bytes within the device, on it alone; `fence` is from the
READ's end to joined. `post` is what the calling thread spends on describing and posting a READ with
the bare library: `runs` and `blocks` of this project's block-major pool (one descriptor for each
run, or for each block), `layer_major` where every layer's K and V lie apart (2 x layers for each
block). Rounds alternate and ratios are of medians. Every byte that was pulled is compared.

Without a GPU or nixl it says so in one line. `--device cpu` runs the script itself on host memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from crossdock.kvtransfer.nixl_info import parse_info
from crossdock.kvtransfer.pull import Puller
from crossdock.kvtransfer.regions import merge_runs
from crossdock.kvtransfer.registry import create_transport
from crossdock.kvtransfer.ticket import new_incarnation
from crossdock.kvtransfer.transport import PoolMemory


@dataclass(frozen=True)
class Shape:
    """A pool. The default is that of an 8B model in bfloat16: 2 MiB a block."""

    pool: int = 512  # blocks
    layers: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    element_bytes: int = 2

    @property
    def plane_bytes(self) -> int:
        """K or V of one layer of one block."""
        return self.kv_heads * self.block_size * self.head_dim * self.element_bytes

    @property
    def block_bytes(self) -> int:
        return 2 * self.layers * self.plane_bytes


def missing(device: str) -> str | None:
    """What keeps this machine from measuring."""
    if importlib.util.find_spec("nixl") is None:
        return "nixl is not installed"
    if device == "cuda" and not torch.cuda.is_available():
        return f"no GPU that torch {torch.__version__} can use"
    return None


def pattern(ids: list[int], shape: Shape, device: str) -> torch.Tensor:
    """uint8 [len(ids), block_bytes]: what those blocks of the peer hold."""
    places = torch.arange(shape.block_bytes, dtype=torch.int32, device=device) * 31
    firsts = torch.tensor(ids, dtype=torch.int32, device=device) * 7
    return ((places + firsts[:, None]) % 251).to(torch.uint8)


class Pool:
    def __init__(self, shape: Shape, device: str) -> None:
        self.incarnation = new_incarnation()
        self.blocks = torch.zeros((shape.pool, shape.block_bytes), dtype=torch.uint8, device=device)
        synchronize(device)
        self.memory = PoolMemory.block_major(
            self.blocks.data_ptr(),
            num_blocks=shape.pool,
            block_bytes=shape.block_bytes,
            generations=np.zeros(shape.pool, dtype=np.int64),
            memory_type="VRAM" if device == "cuda" else "DRAM",
        )
        self.transport = create_transport("nixl", self.incarnation, self.memory)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def serve(shape: Shape, device: str) -> None:
    """The prefill side, until its input ends."""
    pool = Pool(shape, device)
    for block_id in range(shape.pool):
        pool.blocks[block_id] = pattern([block_id], shape, device)[0]
    synchronize(device)
    described = {
        "incarnation": pool.incarnation.hex(),
        "info": pool.transport.info().hex(),
    }
    print("> " + json.dumps(described), flush=True)
    sys.stdin.read()
    pool.transport.close()


class Peer:
    def __init__(self, shape: Shape, device: str) -> None:
        command = [sys.executable, __file__, "--serve", json.dumps(asdict(shape))]
        self._process = subprocess.Popen(
            [*command, "--device", device], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("> "):
                described = json.loads(line[2:])
                self.incarnation = bytes.fromhex(described["incarnation"])
                self.info = bytes.fromhex(described["info"])
                return
        raise RuntimeError("the serving process ended")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)


@dataclass(frozen=True)
class Pieces:
    """What one READ is described as, in bytes from the beginning of each pool: int64 [pieces]."""

    remote: npt.NDArray[np.int64]
    local: npt.NDArray[np.int64]
    nbytes: npt.NDArray[np.int64]


def runs(remote: list[int], local: list[int], shape: Shape) -> Pieces:
    merged, size = merge_runs(remote, local), shape.block_bytes
    return Pieces(merged.remote * size, merged.local * size, merged.length * size)


def blocks(remote: list[int], local: list[int], shape: Shape) -> Pieces:
    size = shape.block_bytes
    return Pieces(np.array(remote) * size, np.array(local) * size, np.full(len(remote), size))


def layer_major(remote: list[int], local: list[int], shape: Shape) -> Pieces:
    """As if the same memory were [layers, 2, blocks, ...]."""
    planes, size = np.arange(2 * shape.layers)[:, None] * shape.pool, shape.plane_bytes
    theirs, ours = (((planes + ids) * size).reshape(-1) for ids in map(np.array, (remote, local)))
    return Pieces(theirs, ours, np.full(len(theirs), size))


WAYS = {"runs": runs, "blocks": blocks, "layer_major": layer_major}


class BareNixl:
    """The library alone, on an agent of its own in this process."""

    def __init__(self, peer: Peer, shape: Shape, device: str) -> None:
        from crossdock.kvtransfer import nixl as ours

        self._peer, self._shape = peer, shape
        info = parse_info(peer.info, peer.incarnation)
        self._remote_ptr = info.regions[0].address
        self._kind = "VRAM" if device == "cuda" else "DRAM"
        self._pool = torch.zeros(shape.pool * shape.block_bytes, dtype=torch.uint8, device=device)
        synchronize(device)
        with ours._sleeping_progress_thread():
            self._agent: Any = ours.api.nixl_agent("bare", ours.api.nixl_agent_config())
        region = [(self._pool.data_ptr(), self._pool.nbytes, 0, "")]
        self._registered = self._agent.register_memory(region, self._kind)
        self._agent.add_remote_agent(info.metadata)

    def read(
        self,
        describe: Callable[[list[int], list[int], Shape], Pieces],
        remote: list[int],
        local: list[int],
    ) -> tuple[float, float]:
        """Seconds until it was posted, and until it had ended."""
        start = time.perf_counter()
        pieces = describe(remote, local, self._shape)
        request = self._agent.initialize_xfer(
            "READ",
            self._listed(self._pool.data_ptr() + pieces.local, pieces.nbytes),
            self._listed(self._remote_ptr + pieces.remote, pieces.nbytes),
            self._peer.incarnation.hex(),
        )
        state = self._agent.transfer(request)
        posted = time.perf_counter() - start
        while state == "PROC":
            state = self._agent.check_xfer_state(request)
        assert state == "DONE", state
        ended = time.perf_counter() - start
        self._agent.release_xfer_handle(request)
        return posted, ended

    def close(self) -> None:
        self._agent.remove_remote_agent(self._peer.incarnation.hex())
        self._agent.deregister_memory(self._registered)

    def _listed(self, address: npt.NDArray[np.int64], nbytes: npt.NDArray[np.int64]) -> Any:
        rows = np.zeros((len(address), 3), dtype=np.uint64)  # address, bytes, device
        rows[:, 0], rows[:, 1] = address, nbytes
        return self._agent.get_xfer_descs(rows, self._kind)


def measure(shape: Shape, device: str, count: int, rounds: int) -> dict[str, Any]:
    from kv_pull import layouts, pull

    peer, mine = Peer(shape, device), Pool(shape, device)
    news = threading.Event()
    mine.transport.set_wakeup(news.set)
    mine.transport.add_peer(peer.incarnation, peer.info, shape.pool, shape.block_bytes)
    mine.transport.warm(peer.incarnation)
    puller = Puller(mine.transport, mine.memory, time.perf_counter)
    bare = BareNixl(peer, shape, device)
    rng = np.random.default_rng(0)
    seconds: dict[str, dict[str, list[float]]] = {}
    wrong = 0
    for _ in range(rounds):
        for layout, (remote, local) in layouts(count, shape.pool, rng).items():
            rows = seconds.setdefault(layout, {})
            mine.blocks[local] = 255
            synchronize(device)
            done = pull(puller, news, peer, remote, local)
            wrong += int((mine.blocks[local] != pattern(remote, shape, device)).sum())
            rows.setdefault("pull", []).append(done.pulled_at - done.started_at)
            rows.setdefault("fence", []).append(done.fenced_at - done.pulled_at)
            rows.setdefault("copy", []).append(_copy(mine.blocks, count, device))
            for name, describe in WAYS.items():
                posted, ended = bare.read(describe, remote, local)
                rows.setdefault(f"post_{name}", []).append(posted)
                rows.setdefault(f"read_{name}", []).append(ended)
    nbytes, one_run = count * shape.block_bytes, list(range(count))
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "host memory",
        "blocks": count,
        "block_bytes": shape.block_bytes,
        "descriptors_of_one_run": {
            name: len(describe(one_run, one_run, shape).nbytes) for name, describe in WAYS.items()
        },
        "wrong_bytes": wrong,
        **{layout: summary(rows, nbytes) for layout, rows in seconds.items()},
    }
    bare.close()
    mine.transport.close()
    peer.close()
    return report


def _copy(pool: torch.Tensor, count: int, device: str) -> float:
    """Seconds of one copy of so many blocks to a buffer of its own."""
    source, target = pool[:count], torch.empty_like(pool[:count])
    times = 10 if device == "cuda" else 1  # so that launching and waiting weigh little
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        target.copy_(source)
    synchronize(device)
    return (time.perf_counter() - start) / times


def summary(rows: dict[str, list[float]], nbytes: int) -> dict[str, float]:
    """Medians, without the first two rounds where there are more."""
    kept = {name: values[2:] if len(values) > 2 else values for name, values in rows.items()}
    middle = {name: statistics.median(values) for name, values in kept.items()}
    shown = {f"{name}_ms_p50": round(value * 1e3, 4) for name, value in middle.items()}
    shown["fence_ms_max"] = round(max(kept["fence"]) * 1e3, 4)
    shown["pull_gb_s"] = round(nbytes / middle["pull"] / 1e9, 2)
    shown["copy_gb_s"] = round(nbytes / middle["copy"] / 1e9, 2)
    shown["pull_rate_over_copy"] = round(middle["copy"] / middle["pull"], 3)
    shown["post_layer_major_over_blocks"] = round(
        middle["post_layer_major"] / middle["post_blocks"], 2
    )
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--blocks", type=int, default=64, help="of one pull")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--pool", type=int, default=Shape.pool, help="blocks of each pool")
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--kv-heads", type=int, default=Shape.kv_heads)
    parser.add_argument("--head-dim", type=int, default=Shape.head_dim)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(Shape(**json.loads(options.serve)), options.device)
        return 0
    if (why := missing(options.device)) is not None:
        print(f"vram_hand_off: nothing measured: {why}")
        return 0
    shape = Shape(options.pool, options.layers, options.kv_heads, options.head_dim)
    report = measure(shape, options.device, options.blocks, options.rounds)
    text = json.dumps(report, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    print("bytes equal" if report["wrong_bytes"] == 0 else "BYTES DIFFER")
    return int(report["wrong_bytes"] > 0)


if __name__ == "__main__":
    sys.exit(main())
