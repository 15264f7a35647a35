"""What each sequence's next token may be, worked out beside the step that computes its logits.

A mask is a function of the grammar and of the tokens generated so far, those of earlier attempts
and of other workers included. So nothing is handed over with a sequence: whoever goes on with it
feeds its tokens to a fresh matcher, and from then on one token a step.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from crossdock.kvcache.sequence import Sequence
from crossdock.model.grammar import GrammarCompiler
from crossdock.model.text import TextModel
from crossdock.proto.errors import CrossdockError, GrammarFailed
from crossdock.proto.types import Grammar

Mask = npt.NDArray[np.uint8]  # bit i % 8 of byte i // 8: token i may come next

# A sequence whose mask is not there when the logits are gets no token in this step and tries again
# with the next, so that a grammar that takes long holds up nobody but its own sequence. A step that
# has tokens for others waits for it for SHARED_S, else for ALONE_S.
SHARED_S, ALONE_S = 0.004, 0.1
LONGEST_MASK_S = 2.0  # of processor time; a grammar that takes longer ends its sequence


class Grammars:
    """The matchers of one engine's sequences. Called by the engine's thread; works on its own.

    `load_text` is called with the first grammar, on a thread.
    """

    def __init__(self, load_text: Callable[[], TextModel]) -> None:
        self._load_text = load_text
        self._loading = threading.Lock()
        self._matching: WeakKeyDictionary[Sequence, _Matching] = WeakKeyDictionary()
        # Compiling takes up to seconds, a mask less than one step: neither waits for the other.
        self._compiling = ThreadPoolExecutor(2, "grammar")
        self._masking = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "mask")

    def begin(self, sequences: list[Sequence]) -> StepMasks:
        """Starts on the masks of those that have a grammar, as they stand now."""
        return StepMasks(sequences, [self._begin(sequence) for sequence in sequences])

    def close(self) -> None:
        """Ends the threads; what they have not begun is dropped."""
        self._compiling.shutdown(wait=False, cancel_futures=True)
        self._masking.shutdown(wait=False, cancel_futures=True)

    def _begin(self, sequence: Sequence) -> Future[Mask] | None:
        if sequence.sampling.grammar is None:
            return None
        matching = self._matching.get(sequence)
        if matching is not None and matching.known == sequence.num_generated:
            return matching.mask  # begun by an earlier step, which did not wait for it
        pool = self._masking
        if matching is None:
            pool, matching = self._compiling, _Matching(sequence.sampling.grammar)
            self._matching[sequence] = matching
        # The mask before this one is done: its token was drawn. So no two threads share a matcher.
        new = sequence.token_ids[sequence.prompt_tokens + matching.known :]
        matching.known = sequence.num_generated
        matching.mask = pool.submit(matching.next_mask, self._compiler, new)
        return matching.mask

    def _compiler(self) -> GrammarCompiler:
        with self._loading:
            return self._loaded

    @cached_property
    def _loaded(self) -> GrammarCompiler:
        return GrammarCompiler(self._load_text())


@dataclass(frozen=True)
class StepMasks:
    """What one step's sampled sequences wait for, in their order; None: no grammar."""

    sequences: list[Sequence]
    masks: list[Future[Mask] | None]

    def collect(self) -> list[tuple[int, Mask | None]]:
        """The sequences that get a token in this step, by their place in it, with their mask.
        Raises GrammarFailed for those that can never get one."""
        waiting = [mask for mask in self.masks if mask is not None and not mask.done()]
        if waiting:
            wait(waiting, SHARED_S if len(waiting) < len(self.masks) else ALONE_S)
        ready: list[tuple[int, Mask | None]] = []
        failures: dict[str, str] = {}
        for place, mask in enumerate(self.masks):
            if mask is None:
                ready.append((place, None))
            elif mask.done():
                try:
                    ready.append((place, mask.result()))
                except CrossdockError as error:
                    failures[self.sequences[place].sequence_id] = str(error)
        if failures:
            why = "; ".join(sorted(set(failures.values())))
            raise GrammarFailed(f"the grammar cannot go on: {why}", list(failures))
        return ready


@dataclass(eq=False)
class _Matching:
    """How far one sequence's answer is in its grammar."""

    grammar: Grammar
    matcher: LLMatcher | None = None
    known: int = 0  # generated tokens that the matcher knows, or will before its next mask
    mask: Future[Mask] | None = None  # of what follows them

    def next_mask(self, compiler: Callable[[], GrammarCompiler], new: list[int]) -> Mask:
        """The tokens that may come after `new`. Raises CrossdockError where none may, or the
        grammar is beyond its limits."""
        if self.matcher is None:
            self.matcher = compiler().matcher(self.grammar)
        matcher, began = self.matcher, time.thread_time()
        mask: Mask = np.zeros(0, np.uint8)
        if matcher.consume_tokens(new):
            mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        took = time.thread_time() - began
        if took > LONGEST_MASK_S:
            raise CrossdockError(f"took {took:.1f} s for a token; at most {LONGEST_MASK_S:g} s")
        if matcher.is_error() or not mask.any():
            why = matcher.get_error().partition("\n")[0] or "nothing can follow"
            raise CrossdockError(f"after {self.known} tokens: {why}")
        return mask
