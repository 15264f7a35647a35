"""How fast KV blocks are pulled, fenced and released, beside the bare library in the same run.

    python benchmarks/kv_pull.py [--transport nixl] [--blocks 64] [--regions 1] [--json out.json]

Two processes. `bare` posts one NIXL READ of the same runs with nothing around it; `prepared` posts
the same blocks by index from prepared lists of one descriptor a block and region; `pull` is
Puller.start to its READ's end, `fence` from there to joined, with the release notification on its
way. Their rounds alternate, and ratios are of medians: such machines are noisy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from crossdock.kvtransfer.nixl_info import descriptors, parse_info
from crossdock.kvtransfer.pull import Puller
from crossdock.kvtransfer.regions import Ints, RegionTable, merge_runs
from crossdock.kvtransfer.registry import allocate, create_transport
from crossdock.kvtransfer.ticket import make_ticket, new_incarnation
from crossdock.kvtransfer.transport import PoolMemory, Region
from crossdock.proto.v1.worker_pb2 import PromptProgress

BLOCK_BYTES = 30 * 2 * 3 * 16 * 64 * 4  # SmolLM2-135M in float32, 16 tokens a block


def regions_at(address: int, num_blocks: int, count: int) -> tuple[Region, ...]:
    """As many equal parts of a block, each for all blocks end to end: as one tensor a layer."""
    size = BLOCK_BYTES // count
    return tuple(Region(address + i * num_blocks * size, size, size) for i in range(count))


class Pool:
    def __init__(self, transport: str, num_blocks: int, regions: int) -> None:
        self.incarnation = new_incarnation()
        buffer, generations, self._free = allocate(transport, num_blocks * BLOCK_BYTES, num_blocks)
        buffer[:] = 1
        laid_out = regions_at(buffer.ctypes.data, num_blocks, regions)
        self.memory = PoolMemory(laid_out, num_blocks, generations)
        self.transport = create_transport(transport, self.incarnation, self.memory)

    def close(self) -> None:
        self.transport.close()
        del self.memory
        self._free()


def serve(transport: str, num_blocks: int, regions: int) -> None:
    """The prefill side: answers `released COUNT` when so many releases came, since start."""
    pool = Pool(transport, num_blocks, regions)
    for view in pool.memory.views:
        view[:] = np.arange(view.shape[1]).astype(np.uint8)
    news = threading.Event()
    pool.transport.set_wakeup(news.set)
    pool.transport.expect_notifications(True)
    described = {
        "incarnation": pool.incarnation.hex(),
        "info": pool.transport.info().hex(),
    }
    print("> " + json.dumps(described), flush=True)
    count = 0
    for line in sys.stdin:
        while count < int(line):
            news.wait(1.0)
            news.clear()
            count += len(pool.transport.notifications())
        print("> " + json.dumps({"released": count}), flush=True)
    pool.close()


class Peer:
    def __init__(self, transport: str, num_blocks: int, regions: int) -> None:
        command = [sys.executable, __file__, "--serve", transport, "--pool", str(num_blocks)]
        command += ["--regions", str(regions)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        described = self.answer()
        self.incarnation = bytes.fromhex(str(described["incarnation"]))
        self.info = bytes.fromhex(str(described["info"]))

    @property
    def pid(self) -> int:
        return self._process.pid

    def answer(self) -> dict[str, object]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("> "):
                return dict(json.loads(line[2:]))
        raise RuntimeError("the serving process ended")

    def await_released(self, count: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        self.answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


class BareNixl:
    """The same blocks with the library alone, on an agent of its own in this process."""

    def __init__(self, peer: Peer, num_blocks: int, regions: int) -> None:
        from crossdock.kvtransfer import nixl as ours

        buffer, _, self._free = allocate("nixl", num_blocks * BLOCK_BYTES, num_blocks)
        buffer[:] = 1
        self._buffer = buffer
        self._regions, self._num_blocks = regions, num_blocks
        self._local = RegionTable(regions_at(buffer.ctypes.data, num_blocks, regions))
        with ours._sleeping_progress_thread():
            self._agent = ours.api.nixl_agent("bare", ours.api.nixl_agent_config())
        self._agent.register_memory([(buffer.ctypes.data, buffer.nbytes, 0, "")], "DRAM")
        info = parse_info(peer.info, peer.incarnation)
        self._agent.add_remote_agent(info.metadata)
        self._remote = RegionTable(info.regions)
        self._name = peer.incarnation.hex()
        region, ids = map(np.ravel, np.indices((regions, num_blocks)))
        each = (region, ids, np.ones_like(ids))
        self._prepared_local = self._agent.prep_xfer_dlist(
            "NIXL_INIT_AGENT", self._describe(self._local.spans(*each))
        )
        self._prepared_remote = self._agent.prep_xfer_dlist(
            self._name, self._describe(self._remote.spans(*each))
        )

    def _describe(self, spans: tuple[Ints, Ints]) -> object:
        return self._agent.get_xfer_descs(descriptors(*spans, 0), "DRAM")

    def _places(self, ids: list[int]) -> npt.NDArray[np.int32]:
        firsts = np.arange(self._regions)[:, None] * self._num_blocks
        return (firsts + np.array(ids)).ravel().astype(np.int32)

    def runs(self, remote: list[int], local: list[int]) -> float:
        start = time.perf_counter()
        runs = merge_runs(remote, local, [True] * self._regions)
        request = self._agent.initialize_xfer(
            "READ",
            self._describe(self._local.spans(runs.region, runs.local, runs.length)),
            self._describe(self._remote.spans(runs.region, runs.remote, runs.length)),
            self._name,
        )
        return self._finish(request, start)

    def prepared(self, remote: list[int], local: list[int]) -> float:
        start = time.perf_counter()
        request = self._agent.make_prepped_xfer(
            "READ",
            self._prepared_local,
            self._places(local),
            self._prepared_remote,
            self._places(remote),
        )
        return self._finish(request, start)

    def _finish(self, request: object, start: float) -> float:
        state = self._agent.transfer(request)
        while state == "PROC":
            state = self._agent.check_xfer_state(request)
        took = time.perf_counter() - start
        assert state == "DONE", state
        self._agent.release_xfer_handle(request)
        return took


def pull(puller: Puller, news: threading.Event, peer: Peer, remote: list[int], local: list[int]):  # type: ignore[no-untyped-def]
    ticket = make_ticket(
        key=b"bench",
        prefill_worker="p",
        prefill_address="",
        incarnation=peer.incarnation,
        block_ids=remote,
        generations=[0] * len(remote),
        num_tokens=16 * len(remote),
        prompt_hash=b"",
        layout_hash=b"",
        lease_s=30.0,
    )
    progress = PromptProgress(ticket=ticket, ready_blocks=len(remote))
    puller.start("s", progress, remote, local, time.perf_counter() + 30.0)
    while True:
        for done in puller.poll():
            assert done.error is None, done.error
            return done
        news.wait(1.0)
        news.clear()


def layouts(num_blocks: int, pool: int, rng: np.random.Generator) -> dict[str, list[list[int]]]:
    start = int(rng.integers(0, pool - num_blocks))
    one = list(range(start, start + num_blocks))
    return {
        "one run": [one, one],
        "scattered": [
            rng.permutation(pool)[:num_blocks].tolist(),
            rng.permutation(pool)[:num_blocks].tolist(),
        ],
    }


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--transport", default="nixl", choices=["nixl", "local"])
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--pool", type=int, default=512, help="blocks of each pool")
    parser.add_argument("--regions", type=int, default=1, help="parts of a block: 1, 30, …")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.pool, options.regions)
        return
    sizes = (options.blocks, options.rounds, options.pool, options.regions)
    report = measure(options.transport, *sizes)
    text = json.dumps(report, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


def measure(
    transport: str, num_blocks: int, rounds: int, pool_blocks: int, regions: int
) -> dict[str, object]:
    peer = Peer(transport, pool_blocks, regions)
    mine = Pool(transport, pool_blocks, regions)
    news = threading.Event()
    mine.transport.set_wakeup(news.set)
    mine.transport.add_peer(peer.incarnation, peer.info, pool_blocks, BLOCK_BYTES)
    warm_s = mine.transport.warm(peer.incarnation)
    puller = Puller(mine.transport, mine.memory, time.perf_counter)
    bare = BareNixl(peer, pool_blocks, regions) if transport == "nixl" else None
    rng = np.random.default_rng(0)
    times: dict[str, dict[str, list[float]]] = {}
    pulls = 0
    for turn in range(rounds):
        for layout, (remote, local) in layouts(num_blocks, pool_blocks, rng).items():
            rows = times.setdefault(layout, {})
            ways = ["pull", "bare", "prepared"] if bare is not None else ["pull"]
            for way in (
                ways[turn % len(ways) :] + ways[: turn % len(ways)]
            ):  # caches favour the later
                if way != "pull":
                    read = bare.runs if way == "bare" else bare.prepared
                    rows.setdefault(way, []).append(read(remote, local))
                    continue
                done = pull(puller, news, peer, remote, local)
                rows.setdefault("pull", []).append(done.pulled_at - done.started_at)
                rows.setdefault("fence", []).append(done.fenced_at - done.pulled_at)
                pulls += 1
                peer.await_released(pulls)
    mine.transport.expect_notifications(False)
    before = (cpu_seconds(peer.pid), time.process_time(), time.perf_counter())
    time.sleep(2.0)
    span = time.perf_counter() - before[2]
    idle = (time.process_time() - before[1]) / span
    expecting = (cpu_seconds(peer.pid) - before[0]) / span
    stats = mine.transport.stats
    report: dict[str, object] = {
        "transport": transport,
        "blocks": num_blocks,
        "block_bytes": BLOCK_BYTES,
        "regions": regions,
        "warm_ms": round(warm_s * 1e3, 3),
        "descriptors_a_pull": stats.descriptors / stats.reads,
        "cpu_idle": round(idle, 4),
        "cpu_expecting_releases": round(expecting, 4),
    }
    for layout, rows in times.items():
        report[layout] = summary(rows, num_blocks)
    mine.close()
    peer.close()
    return report


def summary(rows: dict[str, list[float]], num_blocks: int) -> dict[str, object]:
    middle = {name: statistics.median(values[2:]) for name, values in rows.items()}
    shown: dict[str, object] = {
        f"{name}_ms_p50": round(seconds * 1e3, 3) for name, seconds in middle.items()
    }
    shown["pull_gb_s"] = round(num_blocks * BLOCK_BYTES / middle["pull"] / 1e9, 2)
    if "bare" in middle:
        shown["pull_rate_over_bare"] = round(middle["bare"] / middle["pull"], 3)
        shown["bare_runs_rate_over_prepared"] = round(middle["prepared"] / middle["bare"], 3)
    return shown


if __name__ == "__main__":
    main()
