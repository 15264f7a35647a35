"""Answers that must match a grammar, on the engine: what is drawn, when it ends, how it goes on."""

from __future__ import annotations

import gc
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
from offline import LLM
from schemas import random_schema

from crossdock.engine import grammars
from crossdock.kvcache.block_tables import grow, release
from crossdock.kvcache.sequence import Chunk, SampledToken, Sequence, StepPlan, take_tokens
from crossdock.model.grammar import GrammarCompiler
from crossdock.proto.errors import GrammarFailed
from crossdock.proto.types import FinishReason, Grammar, GrammarKind, SamplingParams

K = GrammarKind
SCHEMAS = 200
PROMPT = "Some words before the answer"


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(str(tiny_model), num_blocks=800, device="cpu", chunk_tokens=64, threads=1)


def params(grammar: Grammar | None, **given) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 200, "temperature": 1.0} | given), grammar=grammar)


def of_schema(schema: object) -> Grammar:
    return Grammar(K.JSON_SCHEMA, json.dumps(schema))


def test_every_finished_answer_validates_against_its_schema(llm: LLM) -> None:
    schemas = [random_schema(seed) for seed in range(SCHEMAS)]
    asked = [params(of_schema(schema), seed=seed) for seed, schema in enumerate(schemas)]
    answers = llm.generate([PROMPT] * SCHEMAS, asked)
    finished = [
        (schema, answer)
        for schema, answer in zip(schemas, answers)
        if answer.finish_reason is FinishReason.STOP
    ]
    assert len(finished) > 0.8 * SCHEMAS
    for schema, answer in finished:
        jsonschema.Draft202012Validator(schema).validate(json.loads(answer.text))
    llm.pool.check_integrity()


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.0},
        {"top_k": 3},
        {"top_p": 0.1},
        {"min_p": 0.5},
        {"repetition_penalty": 5.0, "presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"logprobs": 3},
    ],
)
def test_with_every_way_of_drawing(llm: LLM, given: dict) -> None:
    grammar = Grammar(K.REGEX, "([a-f]{2}-){3}[0-9]")
    answers = llm.generate([PROMPT] * 4, [params(grammar, seed=s, **given) for s in range(4)])
    for answer in answers:
        assert answer.finish_reason is FinishReason.STOP
        assert re.fullmatch("([a-f]{2}-){3}[0-9]", answer.text)


def test_a_bias_chooses_among_what_is_allowed_and_adds_nothing_to_it(llm: LLM) -> None:
    wanted, forbidden = (llm.text.encode(letter)[0] for letter in "bz")
    grammar = Grammar(K.REGEX, "[abc]{3}")
    bias = {wanted: 100.0, forbidden: 100.0}
    [answer] = llm.generate([PROMPT], params(grammar, logit_bias=bias))
    assert answer.text == "bbb"


def test_log_probabilities_are_of_the_model_not_of_the_grammar(llm: LLM) -> None:
    [free] = llm.generate([PROMPT], params(None, max_tokens=1, temperature=0.0, logprobs=5))
    grammar = Grammar(K.REGEX, "[0-9]")
    [bound] = llm.generate([PROMPT], params(grammar, temperature=0.0, logprobs=5))
    first, same = bound.logprobs[0].top_logprobs, free.logprobs[0].top_logprobs
    assert dict(first) == pytest.approx(dict(same), abs=1e-5)
    assert bound.token_ids[0] not in dict(bound.logprobs[0].top_logprobs)


def test_a_complete_answer_ends_before_min_tokens(llm: LLM) -> None:
    [answer] = llm.generate([PROMPT], params(Grammar(K.REGEX, "yes"), min_tokens=50))
    assert (answer.text, answer.finish_reason) == ("yes", FinishReason.STOP)


def test_min_tokens_draws_an_answer_out_where_the_grammar_lets_it(llm: LLM) -> None:
    [answer] = llm.generate([PROMPT], params(Grammar(K.REGEX, "a*"), min_tokens=30, max_tokens=40))
    assert len(answer.token_ids) >= 30
    assert set(answer.text) == {"a"}


def test_max_tokens_ends_an_answer_early(llm: LLM) -> None:
    grammar = Grammar(K.REGEX, "[a-z]{500}")
    [answer] = llm.generate([PROMPT], params(grammar, max_tokens=7))
    assert (answer.finish_reason, len(answer.token_ids)) == (FinishReason.LENGTH, 7)
    assert re.fullmatch("[a-z]+", answer.text)


def test_free_sequences_beside_it_are_not_touched(llm: LLM) -> None:
    free = params(None, max_tokens=20, temperature=0.0, ignore_eos=True)
    [alone] = llm.generate([PROMPT], free)
    bound = params(of_schema(random_schema(3)))
    together = llm.generate([PROMPT] * 3, [bound, free, bound])
    assert together[1].token_ids == alone.token_ids


def test_a_sequence_goes_on_elsewhere_with_the_same_tokens(llm: LLM) -> None:
    """Whoever has its tokens draws the next: after a hand-off, a preemption, a lost worker."""
    asked = [params(of_schema(random_schema(seed)), seed=seed) for seed in range(8)]
    undisturbed = [answer.token_ids for answer in llm.generate([PROMPT] * 8, asked)]
    prompt, going_on, expected = llm.text.encode(PROMPT), [], []
    for given, whole in zip(asked, undisturbed):
        for known in {1, 2, len(whole) // 2, len(whole) - 1} & set(range(1, len(whole))):
            ids = [*prompt, *whole[:known]]
            going_on.append(Sequence("s", ids, len(prompt), given, llm.text.eos_token_ids))
            expected.append(whole)
    assert len(expected) > 16
    assert finish(llm, *going_on) == expected


def finish(llm: LLM, *sequences: Sequence) -> list[list[int]]:
    """Their generated tokens, once all have ended."""
    running = list(sequences)
    while running:
        for sequence, drawn in zip(list(running), step(llm, *running)):
            if take_tokens(sequence, drawn, 2048)[1] is not None:
                release(llm.pool, sequence)
                running.remove(sequence)
    return [sequence.token_ids[sequence.prompt_tokens :] for sequence in sequences]


def step(llm: LLM, *sequences: Sequence) -> list[list[SampledToken]]:
    """What one step draws for each of them."""
    chunks = []
    for sequence in sequences:
        grow(llm.pool, sequence, sequence.num_tokens)
        chunks.append(Chunk(sequence, sequence.num_computed, sequence.num_uncomputed, True))
    drawn = llm.runner.run(StepPlan(tuple(chunks)))
    for sequence, tokens in zip(sequences, drawn):
        sequence.num_computed = sequence.num_tokens - (not tokens)
    return drawn


def make(llm: LLM, name: str, grammar: Grammar | None, **given) -> Sequence:
    ids = llm.text.encode(PROMPT)
    return Sequence(name, ids, len(ids), params(grammar, **given), llm.text.eos_token_ids)


def test_a_grammar_that_takes_long_to_compile_holds_up_only_its_own(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, compile_ = threading.Event(), GrammarCompiler.matcher

    def slowly(self: GrammarCompiler, grammar: Grammar) -> object:
        assert compiled.wait(60)
        return compile_(self, grammar)

    monkeypatch.setattr(GrammarCompiler, "matcher", slowly)
    bound, free = make(llm, "bound", Grammar(K.REGEX, "ab")), make(llm, "free", None)
    for _ in range(5):
        none, some = step(llm, bound, free)
        assert (none, len(some)) == ([], 1)
        take_tokens(free, some, 2048)
    compiled.set()
    [generated] = finish(llm, bound)
    assert llm.text.decode(generated) == "ab"
    release(llm.pool, free)


def test_a_grammar_that_fails_ends_its_own_sequence_alone(llm: LLM) -> None:
    bad = make(llm, "bad", Grammar(K.REGEX, "ab"))
    bad.token_ids += llm.text.encode("xyz")  # nothing that its grammar knows
    good, free = make(llm, "good", Grammar(K.REGEX, "ab")), make(llm, "free", None)
    with pytest.raises(GrammarFailed, match="after 3 tokens") as failed:
        for _ in range(100):  # its mask may not be there with the first
            step(llm, bad, good, free)
    assert failed.value.sequence_ids == {"bad"}
    release(llm.pool, bad)
    release(llm.pool, free)
    assert llm.text.decode(finish(llm, good)[0]) == "ab"


def test_a_mask_beyond_its_time_ends_the_sequence(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "LONGEST_MASK_S", -1.0)
    sequence = make(llm, "slow", Grammar(K.REGEX, "ab"))
    with pytest.raises(GrammarFailed, match="for a token"):
        until(lambda: step(llm, sequence)[0])
    release(llm.pool, sequence)


def test_what_is_known_of_a_sequence_goes_with_it(llm: LLM) -> None:
    def kept() -> int:
        gc.collect()
        return len(llm.runner._grammars._matching)

    before = kept()
    llm.generate([PROMPT] * 5, params(Grammar(K.CHOICE, '["one","two"]')))
    assert kept() == before


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
