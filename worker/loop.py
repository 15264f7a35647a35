"""The engine thread: takes commands, runs steps, hands what came of them to the gRPC side."""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from crossdock.engine.contract import Engine
from crossdock.kvcache.sequence import SampledToken, StepPlan
from crossdock.proto import ending
from crossdock.proto.errors import CrossdockError, GrammarFailed, NotFinite, OfSequences
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.worker.role import WorkerRole
from crossdock.worker.streams import block_events

log = logging.getLogger(__name__)
T = TypeVar("T")

STEADY_LOAD_S = 0.5  # how often the load is told while streams just go on
IDLE_WAIT_S = 0.5  # the reaper's own timer: an idle worker turns over at least this often
# A step is late once it has taken this many times what such steps take, and this much more.
LATE_FACTOR, LATE_S = 4.0, 0.25
UNMEASURED_STEP_S = 10.0
FAILED_STEPS_LIMIT = 3  # in a row, without a recovery: the device is broken, a fresh one is not


@dataclass(frozen=True)
class Failure:
    """A step that raised. Not the exception: its traceback would keep the step's tensors alive."""

    message: str
    code: pb.ErrorCode  # DEVICE: of the device as far as is known, else of its sequences
    suspects: frozenset[str]  # sequences

    @property
    def own(self) -> bool:
        """Whether it is its sequences' own."""
        return self.code != pb.ERROR_CODE_DEVICE


@dataclass
class Turn:
    """What one turn of the loop has for the other side."""

    outputs: dict[str, list[pb.SequenceOutput]] = field(default_factory=dict)
    load: pb.Load | None = None
    first_event: int = 0
    events: list[tuple[bool, bytes]] = field(default_factory=list)
    ticket_releases: list[tuple[str, bytes]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.outputs or self.events or self.ticket_releases)

    @property
    def steady(self) -> bool:
        """Nothing but more tokens of streams that go on."""
        outputs = (output for outputs in self.outputs.values() for output in outputs)
        return not self.events and all(output.numbers for output in outputs)


class EngineLoop:
    """Owns the thread on which the role, its pool and the engine live. `publish` is called there
    after every turn that made something."""

    def __init__(self, role: WorkerRole, runner: Engine, publish: Callable[[Turn], None]) -> None:
        self._role = role
        self._runner = runner
        self._publish = publish
        self._commands: deque[Callable[[], None]] = deque()
        self._wakeup = threading.Event()
        self._stopping = False
        self._failed_steps = 0  # since the device last ran anything
        self._load_told = -math.inf
        self.last_turn = time.monotonic()
        self._due = math.inf  # when the turn under way is late
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread; commands posted before are its first."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ends the thread after its turn; waits up to `timeout_s` seconds for it."""
        self._stopping = True
        self.wake()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def wake(self) -> None:
        """Callable from any thread: something arrived."""
        self._wakeup.set()

    def post(self, command: Callable[[], None]) -> None:
        """Runs a command on the engine thread between two steps."""
        self._commands.append(command)
        self._wakeup.set()

    def call(self, command: Callable[[], T]) -> Future[T]:
        """The same, with its result or exception as a future."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(command())
            except Exception as error:
                future.set_exception(error)

        self.post(run)
        return future

    @property
    def late(self) -> bool:
        """The engine hangs, as far as the lengths of steps can tell."""
        return time.monotonic() > self._due

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wakeup.clear()
                worked = self.turn()
                if not worked and not self._commands:
                    self._wakeup.wait(self._idle_wait())
        except Exception:
            # A defect in the bookkeeping: what this worker holds can be trusted no more.
            log.critical("the engine thread failed; the process ends", exc_info=True)
            _exit_soon("its engine thread failed")

    def turn(self) -> bool:
        """Commands, transfers and leases, one step, what came of it. True if anything did: a
        sequence that was preempted without a step may have made room for another."""
        plan = self.begin()
        if plan is not None:
            self.step(plan)
        return self.end() or plan is not None

    def begin(self) -> StepPlan | None:
        """A turn as far as its step, if there is something to compute."""
        self._take_commands()
        self._role.poll()
        self._role.check_deadlines()
        plan = self._role.schedule()
        if plan is not None and self._role.state.outbox:
            self.flush()  # what others can begin with while the step runs
        return plan

    def end(self) -> bool:
        """The end of a turn. Returns whether there is news of it: the load counts what was sent
        while the step ran, as who reads it presumes."""
        self._take_commands()
        self.last_turn = time.monotonic()
        self._expect(IDLE_WAIT_S)
        return self.flush()

    def _expect(self, seconds: float) -> None:
        """What comes next should take so long."""
        self._due = time.monotonic() + LATE_FACTOR * seconds + LATE_S

    def become(self, role: WorkerRole) -> None:
        """Goes on with another role, once what the one before said is handed over. On the engine
        thread, when that one is idle."""
        self.flush()
        self._role = role

    def flush(self) -> bool:
        """Hands over what has come up so far, if anything has. On the engine thread."""
        state = self._role.state
        first_event, events = state.pool.drain_events()
        releases, state.ticket_releases = state.ticket_releases, []
        turn = Turn(state.outbox.take(), None, first_event, events, releases)
        if turn:
            now = state.clock()
            if not turn.steady or now - self._load_told >= STEADY_LOAD_S:
                turn.load, self._load_told = self._role.load(), now
            self._publish(turn)
        return bool(turn)

    def snapshot(self, hello: pb.WorkerDescription | None = None) -> pb.WorkerFrame:
        """The whole prefix cache and the load. On the engine thread."""
        self.flush()  # it begins after the events that were handed over
        first, events = self._role.state.pool.snapshot()
        return pb.WorkerFrame(
            hello=hello,
            load=self._role.load(),
            block_events=block_events(first, events, snapshot=True),
        )

    def _take_commands(self) -> None:
        while self._commands:
            try:
                self._commands.popleft()()
            except Exception:
                log.exception("a command to the engine failed")

    def step(self, plan: StepPlan) -> None:
        """Computes what was planned, and takes what came of it."""
        clock = self._role.state.clock
        started = clock()
        self._expect(self._role.expected_s(plan) or UNMEASURED_STEP_S)
        outcome = self._try(plan)
        if isinstance(outcome, Failure):
            self._step_failed(plan, outcome)
            return
        if all(drawn or not chunk.sample for chunk, drawn in zip(plan.chunks, outcome)):
            self._role.observe_step(plan, clock() - started)  # else it waited for a grammar
        self._role.apply(plan, outcome)

    def _try(self, plan: StepPlan) -> list[list[SampledToken]] | Failure:
        """Runs a step. One that failed has left nothing behind, and a small one was tried."""
        try:
            tokens = self._runner.run(plan)
            self._failed_steps = 0
            return tokens
        except Exception as error:
            log.error("an engine step failed:\n%s", traceback.format_exc())
            all_of_them = frozenset(chunk.sequence.sequence_id for chunk in plan.chunks)
            suspects = error.sequence_ids if isinstance(error, OfSequences) else all_of_them
            message = f"an engine step failed: {type(error).__name__}: {error}"
            failure = Failure(message, _code_of(error), suspects)
        try:
            if not failure.own:
                self._runner.recover()
            self._failed_steps = 0
        except Exception:
            log.error("and a small one after it:\n%s", traceback.format_exc())
            self._failed_steps += 1
        return failure

    def _step_failed(self, plan: StepPlan, failure: Failure) -> None:
        """Runs each suspect alone and the others without them. One that fails alone while the
        device serves others is at fault itself; what is nobody's fault goes on elsewhere."""
        alone = [c for c in plan.chunks if c.sequence.sequence_id in failure.suspects]
        rest = tuple(chunk for chunk in plan.chunks if chunk not in alone)
        parts = [StepPlan((chunk,)) for chunk in alone] + ([StepPlan(rest)] if rest else [])
        outcomes = [self._try(part) for part in parts]
        failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        works = len(failures) < len(parts) and self._failed_steps == 0
        for part, outcome in zip(parts, outcomes):
            if isinstance(outcome, Failure):
                shown = works and len(part.chunks) == 1 and not outcome.own
                code = pb.ERROR_CODE_INTERNAL if shown else outcome.code
                self._role.step_failed(part, code, outcome.message)
            else:
                self._role.apply(part, outcome)
        if self._failed_steps >= FAILED_STEPS_LIMIT:
            why = f"{self._failed_steps} engine steps failed in a row"
            log.critical("%s: the process ends", why)
            self.flush()
            _exit_soon(why)

    def _idle_wait(self) -> float:
        deadline = self._role.next_deadline()
        if deadline is None:
            return IDLE_WAIT_S
        return min(IDLE_WAIT_S, max(0.0, deadline - self._role.state.clock()))


def _code_of(error: Exception) -> pb.ErrorCode:
    """Of a step that raised this, as far as the error itself says whose it is."""
    if isinstance(error, NotFinite):
        return pb.ERROR_CODE_NOT_FINITE
    if isinstance(error, GrammarFailed):
        return pb.ERROR_CODE_GRAMMAR
    own = isinstance(error, CrossdockError)
    return pb.ERROR_CODE_INTERNAL if own else pb.ERROR_CODE_DEVICE


def _exit_soon(why: str) -> None:
    """Ends the process once its last outputs are out; its gateways and the controller know how to
    go on without it."""
    threading.Timer(1.0, ending.end, (why,)).start()
