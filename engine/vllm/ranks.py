"""The ranks of an engine (tensor parallelism): the first in the worker's process, each other one in
a process of its own, which does what it is told over a pipe.

They live and die together. In a step they wait for each other, so one that is gone, or that raised,
would leave the others waiting for ever: then the worker's process ends, and the controller starts
another. The processes end with the worker's, whose end of their standard input closes.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from multiprocessing.connection import Connection
from typing import Any

from vllm.config import VllmConfig

from crossdock.engine.contract import Allocate, EngineConfig
from crossdock.engine.vllm.meeting import Meeting
from crossdock.engine.vllm.options import vllm_config
from crossdock.engine.vllm.rank import Place, Rank
from crossdock.model.store import resolve
from crossdock.proto import ending
from crossdock.proto.errors import ModelError
from crossdock.proto.memory import PoolMemory

log = logging.getLogger(__name__)

_MAIN = "from crossdock.engine.vllm.ranks import main; main({}, {})"
_SET_DEATH_SIGNAL = 1  # of prctl: what comes when the thread that started this process has ended
_CLOSE_S = 5.0
# From the end of a rank to that of the worker: what its streams have goes out; while it starts, the
# first rank may be about to say the same itself, with the reason.
_GRACE_S, _START_GRACE_S = 1.0, 10.0

Service = Callable[[PoolMemory, Connection], None]


class Ranks:
    """All ranks of one engine. Called by one thread."""

    def __init__(self, config: EngineConfig, options: VllmConfig, allocate: Allocate) -> None:
        """Raises ModelError or ConfigError for what vLLM cannot run."""
        ranks, self._meeting = config.engine.ranks, Meeting()
        places = [Place(number, ranks, self._meeting.method) for number in range(ranks)]
        self.others = [RankProcess(config, allocate, place) for place in places[1:]]
        try:
            self.first = Rank(config, options, allocate, places[0])
            for other in self.others:
                other.ready(self.first.memory.num_blocks)
        except BaseException:
            self._end()
            self._meeting.close()
            raise
        self._meeting.unlink_segments()

    def call(self, method: str, *args: Any) -> Any:
        """Calls this method of every Rank at once; returns what the first one's gives, when all
        have done it. Where it raises and there are others, the worker's process is about to end."""
        if not self.others:
            return getattr(self.first, method)(*args)
        try:
            for other in self.others:
                other.tell(method, *args)
            result = getattr(self.first, method)(*args)
            for other in self.others:
                other.done()
            return result
        except BaseException as error:
            told = not isinstance(error, (EOFError, ConnectionError))  # else one ended by itself
            for other in self.others:
                other.kill(f"its first rank raised {type(error).__name__}: {error}" if told else "")
            raise

    def close(self) -> None:
        """Ends the processes and the first rank's worker."""
        self._end()
        self.first.close()
        self._meeting.close()

    def _end(self) -> None:
        for other in self.others:
            other.end()


class RankProcess:
    """A rank in a process of its own, as the first one sees it."""

    def __init__(self, config: EngineConfig, allocate: Allocate, place: Place) -> None:
        self._place = place
        self._ready, self._ending = False, False
        self._killed = ""  # why
        self._commands, commands = multiprocessing.Pipe()
        self._service, service = multiprocessing.Pipe()
        ends = (commands.fileno(), service.fileno())
        self._process = subprocess.Popen(
            [sys.executable, "-c", _MAIN.format(*ends)],
            stdin=subprocess.PIPE,
            pass_fds=ends,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # what a terminal sends its group is the worker's to handle
        )
        commands.close()
        service.close()
        threading.Thread(target=self._watch, name="rank-watch", daemon=True).start()
        own = {each.name: getattr(config, each.name) for each in fields(EngineConfig)}
        self._commands.send((EngineConfig(**own), allocate, place))  # nothing of its worker's

    @property
    def pid(self) -> int:
        return self._process.pid

    def ready(self, num_blocks: int) -> None:
        """Waits until it is. Raises ModelError where it ended before, or has a longer or shorter
        pool than the first one."""
        number = self._place.number
        try:
            found = self._commands.recv()
        except (EOFError, OSError):
            message = f"rank {number} did not start; its reason is in the worker's log"
            raise ModelError(message) from None
        if found != num_blocks:
            ranks = f"rank {number} has {found} KV blocks, the first {num_blocks}"
            raise ModelError(f"the ranks of the model differ: {ranks}")
        self._ready = True

    def tell(self, method: str, *args: Any) -> None:
        """Begins a call of its Rank."""
        self._commands.send((method, args))

    def done(self) -> None:
        """Waits for its end."""
        self._commands.recv()

    def host(self, service: Service) -> Connection:
        """See engine.contract.Host: once, before its first step."""
        self.tell("host", service)
        self.done()
        return self._service

    def kill(self, why: str) -> None:
        """At once, and with it the worker."""
        self._killed = why
        self._process.kill()

    def end(self) -> None:
        """In order, within seconds."""
        self._ending = True
        with contextlib.suppress(OSError):
            self._commands.close()
        assert self._process.stdin is not None
        try:
            self._process.wait(_CLOSE_S if self._ready else 0.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_CLOSE_S)
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _watch(self) -> None:
        code = self._process.wait()
        time.sleep(_GRACE_S if self._ready else _START_GRACE_S)
        if not self._ending:
            how = signal.Signals(-code).name if code < 0 else f"status {code}"
            why = self._killed or f"rank {self._place.number} ended with {how}"
            log.critical("%s: the process ends", why)
            ending.end(why)


def main(commands: int, service: int) -> None:
    """The process of a rank after the first."""
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)  # also while it stands still
    threading.Thread(target=_end_with_the_worker, daemon=True).start()
    told, link = Connection(commands), Connection(service)
    config, allocate, place = told.recv()
    options = vllm_config(config, resolve(config.model, config.home, any_family=True))
    rank = Rank(config, options, allocate, place)
    told.send(rank.memory.num_blocks)
    with contextlib.suppress(EOFError):
        while True:
            method, args = told.recv()
            if method == "host":
                (hosted,) = args
                threading.Thread(target=hosted, args=(rank.memory.part, link), daemon=True).start()
            else:
                getattr(rank, method)(*args)
                rank.wait()
            told.send(None)
    rank.close()


def _end_with_the_worker() -> None:
    os.read(0, 1)  # not by sys.stdin, whose lock the interpreter wants at its end
    os._exit(1)
