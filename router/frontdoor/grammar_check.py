"""Whether a grammar can be used, found out before any work starts and away from the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from crossdock.model.grammar_process import CPU_S, MEMORY_BYTES
from crossdock.proto.errors import InvalidRequest, Overloaded, Unavailable
from crossdock.proto.types import Grammar
from crossdock.router.frontdoor.child import ENDED_S, end
from crossdock.router.frontdoor.in_turn import InTurn

log = logging.getLogger(__name__)

MAX_WAITING = 64  # requests whose grammar is new
MAX_WAITING_EACH = 16  # of one party
MAX_VERDICTS = 2048  # that are remembered
PATIENCE_S = 60.0  # of the wall clock: the limits themselves are of processor time and memory
BEYOND = (
    f"is too complex: compiling it takes more than {CPU_S} s or {MEMORY_BYTES >> 20} MB of memory"
)
# How a process ends that ran into its limits: out of time, or out of memory in Rust or in Python.
_ENDS = {-signal.SIGXCPU, -signal.SIGABRT, -signal.SIGSEGV, 1}


class GrammarChecker:
    """Asks a process of its own, which is started with the first grammar and again after one that
    it did not survive. Verdicts are remembered: most requests bring a grammar that others had.
    Parties that wait take turns."""

    def __init__(self, model: str, home: Path) -> None:
        self._command = [sys.executable, "-m", "crossdock.model.grammar_process", model, str(home)]
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()  # why not, by the grammar's digest
        self._process: subprocess.Popen[str] | None = None
        self._turns = InTurn()

    async def check(self, field: str, grammar: Grammar, party: str) -> None:
        """Raises InvalidRequest, naming `field`, for a grammar that cannot be used; Overloaded
        where too many wait, of all or of this party."""
        key = hashlib.sha256(f"{grammar.kind}\0{grammar.text}".encode()).digest()
        why = self._verdicts.get(key)
        if why is None:
            turn = self._turn(party)
            # A client that goes away must not leave a question without its answer.
            why = await asyncio.shield(asyncio.ensure_future(self._find_out(key, grammar, turn)))
        if why:
            raise InvalidRequest(field, grammar.text, why)

    def close(self) -> None:
        """Ends the process."""
        end(self._process)
        self._process = None

    def _turn(self, party: str) -> asyncio.Future[None]:
        """Done when it is this one's. Raises Overloaded."""
        mine, all_ = self._turns.waiting(party), self._turns.waiting()
        if mine >= MAX_WAITING_EACH or all_ >= MAX_WAITING:
            raise Overloaded("too many grammars wait to be checked")
        return self._turns.join(party)

    async def _find_out(self, key: bytes, grammar: Grammar, turn: asyncio.Future[None]) -> str:
        await turn
        try:
            why = self._verdicts.get(key)
            if why is None:
                why = await asyncio.to_thread(self._ask, grammar)
            self._verdicts[key] = why
            while len(self._verdicts) > MAX_VERDICTS:
                self._verdicts.popitem(last=False)
            return why
        finally:
            self._turns.next()

    def _ask(self, grammar: Grammar) -> str:
        if self._process is None or self._process.poll() is not None:
            self._process = process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            if _answer(process) is None:
                self.close()
                raise Unavailable("the process that checks grammars does not start")
        process = self._process
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # then there is no answer either
            process.stdin.write(json.dumps([grammar.kind, grammar.text]) + "\n")
            process.stdin.flush()
        why = _answer(process)
        if isinstance(why, str):
            return why
        self.close()
        log.warning("a %s of %d characters: the process that checked it ended with %d",
                    grammar.kind, len(grammar.text), process.returncode)  # fmt: skip
        if process.returncode not in _ENDS:
            raise Unavailable("the process that checks grammars failed; send the request again")
        return BEYOND


def _answer(process: subprocess.Popen[str]) -> Any:
    """The next line; None where the process ends instead."""
    assert process.stdout is not None
    overdue = threading.Timer(PATIENCE_S, process.terminate)
    overdue.daemon = True
    overdue.start()
    try:
        line = process.stdout.readline()
    finally:
        overdue.cancel()
    if line:
        return json.loads(line)
    process.wait(ENDED_S)
    return None
