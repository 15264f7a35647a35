"""The incremental detokenizer: whole characters, stop strings, any grouping of tokens."""

from __future__ import annotations

import time
from itertools import chain
from pathlib import Path

import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from crossdock.model.detokenizer import IncrementalDetokenizer
from crossdock.model.store import resolve
from crossdock.model.text import TextModel, load_text


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> TextModel:
    return load_text(resolve(str(tiny_model)))


@pytest.fixture(scope="module")
def smol(smollm2: Path) -> TextModel:
    return load_text(resolve(str(smollm2)))


LETTERS = "aab b\n🙂é"
PIECES = ("abab", "ba", "aab", "b\n🙂", "", "é ab")


class Letters:
    """A text model whose ids are bytes: 0 … 255; 256 is a special token, later ones are PIECES."""

    strips_first_space = False

    def __init__(self) -> None:
        self.ascii: dict[int, str] = {}

    @property
    def pieces(self) -> Letters:
        return self

    def of(self, token_id: int, skip_special: bool) -> bytes:
        if token_id == 256:
            return b"" if skip_special else b"<eos>"
        return PIECES[token_id - 257].encode() if token_id > 256 else bytes([token_id])


letters = st.text(LETTERS, min_size=1, max_size=6).map(lambda text: list(text.encode()))
tokens = st.integers(257, 256 + len(PIECES)).map(lambda id_: [id_])
token_lists = st.lists(letters | tokens, max_size=10).map(
    lambda parts: [*chain.from_iterable(parts)]
)
stop_lists = st.lists(st.text(LETTERS, min_size=1, max_size=4), min_size=1, max_size=4)


def grouped(ids: list[int], cuts: list[int]) -> list[list[int]]:
    groups, rest = [], list(ids)
    for cut in cuts:
        groups.append(rest[:cut])
        rest = rest[cut:]
    return [*groups, rest]


def run(
    detokenizer: IncrementalDetokenizer, groups: list[list[int]]
) -> tuple[str, str | None, int]:
    """(text, stop string, tokens counted)."""
    text, count = "", 0
    for group in groups:
        delta = detokenizer.push(group)
        delta.text.encode("utf-8")
        text += delta.text
        count += delta.token_count
        if delta.stopped is not None:
            assert detokenizer.push([97]) == type(delta)("", delta.stopped, 0)
            assert detokenizer.finish() == ""
            return text, delta.stopped, count
    return text + detokenizer.finish(), None, count


def first_stop(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """(end, start, stop) of the stop string completed first; the longest of those."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            longest = max(hits, key=len)
            return end, end - len(longest), longest
    return None


groupings = st.lists(st.integers(0, 4), max_size=12)


@examples(300)
@given(st.binary(max_size=60).map(list) | token_lists, groupings)
def test_deltas_join_to_the_whole_text(ids, cuts):
    whole = b"".join(Letters().of(id_, True) for id_ in ids).decode("utf-8", "replace")
    text, stopped, count = run(IncrementalDetokenizer(Letters()), grouped(ids, cuts))
    assert (text, stopped, count) == (whole, None, len(ids))
    model = Letters()
    for _ in range(2):  # the second time what is ASCII is known
        steady = IncrementalDetokenizer(model)
        told = [steady.text_of(part) for part in grouped(ids, cuts)]
        assert "".join(told) + steady.finish() == whole


@examples(800)
@given(token_lists, stop_lists, groupings)
def test_text_is_cut_at_the_first_stop_string_however_it_is_grouped(ids, stops, cuts):
    ends = [b"".join(Letters().of(id_, True) for id_ in ids[:n]) for n in range(len(ids) + 1)]
    whole = ends[-1].decode()
    text, stopped, count = run(IncrementalDetokenizer(Letters(), (), stops), grouped(ids, cuts))
    found = first_stop(whole, stops)
    if found is None:
        assert (text, stopped, count) == (whole, None, len(ids))
    else:
        end, start, stop = found
        assert (text, stopped) == (whole[:start], stop)
        needed = len(whole[:end].encode())
        assert count == next(n for n, raw in enumerate(ends) if len(raw) >= needed)


@examples(100)
@given(st.lists(st.integers(0, 383), max_size=60), groupings)
def test_a_real_tokenizers_deltas_join_to_its_decoding(tiny, ids, cuts):
    text, _, _ = run(IncrementalDetokenizer(tiny, [5]), grouped(ids, cuts))
    assert text == tiny.decode(ids)


def test_no_character_is_emitted_before_its_last_byte(smol):
    ids = smol.encode("x🚚é")
    assert len(ids) > 3
    detokenizer = IncrementalDetokenizer(smol)
    deltas = [detokenizer.push([id_]).text for id_ in ids]
    assert "".join(deltas) == "x🚚é" and "\ufffd" not in "".join(deltas)
    assert "" in deltas and "🚚" in deltas


def test_text_that_may_begin_a_stop_string_is_held_back():
    detokenizer = IncrementalDetokenizer(Letters(), (), ("END", "\n\n"))
    said = [detokenizer.push([byte]).text for byte in b"an EN\nEND"]
    assert said == ["a", "n", " ", "", "", "EN", "\n", "", ""]
    held = IncrementalDetokenizer(Letters(), (), ("END",))
    assert held.push(list(b"xEN")).text == "x"
    assert held.finish() == "EN"
    assert held.finish() == ""


def test_tokens_after_the_stop_string_are_not_counted():
    detokenizer = IncrementalDetokenizer(Letters(), (), ("b",))
    delta = detokenizer.push(list(b"abc"))
    assert (delta.text, delta.stopped, delta.token_count) == ("a", "b", 2)


def test_special_tokens_are_skipped_or_shown():
    assert IncrementalDetokenizer(Letters()).push([97, 256, 98]).text == "ab"
    shown = IncrementalDetokenizer(Letters(), skip_special_tokens=False)
    assert shown.push([97, 256, 98]).text == "a<eos>b"


@pytest.mark.parametrize("step", [1, 2, 5])
def test_special_tokens_that_are_shown_have_text_wherever_they_come(step: int):
    detokenizer = IncrementalDetokenizer(Letters())
    detokenizer.show(frozenset({256}))
    ids = [256, 97, 256, 98, 256]
    cut = [ids[at : at + step] for at in range(0, len(ids), step)]
    assert "".join(detokenizer.push(part).text for part in cut) == "<eos>a<eos>b<eos>"


def test_a_character_that_the_prompt_began_is_finished():
    raw = list("🙂".encode())
    assert IncrementalDetokenizer(Letters(), [97, *raw[:2]]).push([*raw[2:], 98]).text == "🙂b"
    assert IncrementalDetokenizer(Letters(), raw).push([98]).text == "b"


def test_cost_does_not_grow_with_length():
    def per_token(detokenizer: IncrementalDetokenizer, count: int) -> float:
        times = []
        for _ in range(count // 100):
            start = time.thread_time()
            for _ in range(100):
                detokenizer.push([97])
            times.append(time.thread_time() - start)
        return sorted(times)[len(times) // 2] / 100

    detokenizer = IncrementalDetokenizer(Letters(), (), ("aab", "stop"))
    early = per_token(detokenizer, 2_000)
    per_token(detokenizer, 50_000)
    assert per_token(detokenizer, 2_000) < 5 * early + 1e-5
