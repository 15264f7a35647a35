"""Readers of calls: what they find, however the text is cut."""

from __future__ import annotations

import json
import random

import pytest

from crossdock.router.frontdoor.tools.calls import CallArguments, CallBegun, Content, Event
from crossdock.router.frontdoor.tools.formats import (
    HERMES,
    LLAMA3_JSON,
    MISTRAL,
    MISTRAL_ARGS,
    ToolFormat,
)
from crossdock.router.frontdoor.tools.offer import Offer, offer_of

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("weather", "time")
]
OFFER = offer_of(TOOLS, None, None)
ARGS = {"city": 'Köln "am" Rhein } ]', "days": [1, {"a": None}]}
ONE = json.dumps({"name": "weather", "arguments": ARGS}, ensure_ascii=False)
TWO = json.dumps({"arguments": {}, "name": "time"})
LLAMA = json.dumps({"name": "weather", "parameters": ARGS})


def read(how: ToolFormat, text: str, cuts: list[int] = []) -> tuple[str, list[tuple[str, str]]]:  # noqa: B006
    """Content, and each call's name and arguments, of a text that comes in pieces."""
    parser, events = how.parser(OFFER), list[Event]()
    ends = [*sorted(cuts), len(text)]
    for start, end in zip([0, *ends], ends):
        events += parser.push(text[start:end])
    events += parser.finish()
    names = {e.index: e.name for e in events if isinstance(e, CallBegun)}
    assert list(names) == list(range(len(names))) and parser.calls == len(names)
    arguments = dict.fromkeys(names, "")
    for event in events:
        if isinstance(event, CallArguments):
            arguments[event.index] += event.text
    content = "".join(event.text for event in events if isinstance(event, Content))
    return content, [(names[i], arguments[i]) for i in names]


def args(call: str) -> str:
    start = call.index('"arguments": ' if '"arguments"' in call else '"parameters": ')
    return call[call.index("{", start) : -1]


WEATHER = ("weather", args(ONE))
PLAIN = json.dumps(ARGS, ensure_ascii=False)
CASES = [
    (HERMES, "plain text", "plain text", []),
    (HERMES, "a <b> and <tool_cal", "a <b> and <tool_cal", []),
    (HERMES, "  \n", "  \n", []),
    (HERMES, "", "", []),
    (HERMES, f"<tool_call>\n{ONE}\n</tool_call>", "", [WEATHER]),
    (HERMES, f"<tool_call>{ONE}</tool_call>", "", [WEATHER]),
    (HERMES, f"Let me see.\n\n<tool_call>\n{ONE}\n</tool_call>\n", "Let me see.", [WEATHER]),
    (HERMES, f"<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n{TWO}\n</tool_call>", "",
     [WEATHER, ("time", "{}")]),
    (HERMES, f"<tool_call>\n{ONE}", "", [WEATHER]),
    (HERMES, '<tool_call>\n{"name": "time"}\n</tool_call>', "", [("time", "{}")]),
    (HERMES, '<tool_call>\n{"name": "time", "arguments": {"a', "", [("time", '{"a')]),
    (HERMES, '<tool_call>{"x": 1}</tool_call>', '<tool_call>{"x": 1}</tool_call>', []),
    (HERMES, "<tool_call>no call</tool_call>", "<tool_call>no call</tool_call>", []),
    (HERMES, f'<tool_call>{{"name": "time", "arguments": 1, "arguments": ""}}</tool_call>\n'
     f"<tool_call>{ONE}</tool_call>",
     '<tool_call>{"name": "time", "arguments": 1, "arguments": ""}</tool_call>', [WEATHER]),
    (HERMES, 'So: <tool_call>{"name": "time"', 'So:<tool_call>{"name": "time"', []),
    (HERMES, '{"name": "weather"}', '{"name": "weather"}', []),
    (MISTRAL, f"[TOOL_CALLS][{ONE}, {TWO}]", "", [WEATHER, ("time", "{}")]),
    (MISTRAL, f"[TOOL_CALLS] [{ONE}]", "", [WEATHER]),
    (MISTRAL, f"Sure. [TOOL_CALLS][{ONE}]", "Sure.", [WEATHER]),
    (MISTRAL, "[TOOL] [1, 2]", "[TOOL] [1, 2]", []),
    (MISTRAL_ARGS, f"Sure. [TOOL_CALLS]weather[ARGS]{PLAIN}", "Sure.", [("weather", PLAIN)]),
    (MISTRAL_ARGS, f"[TOOL_CALLS]weather[CALL_ID]a1[ARGS] {PLAIN}\n[TOOL_CALLS]time[ARGS]{{}}", "",
     [("weather", PLAIN), ("time", "{}")]),
    (MISTRAL_ARGS, '[TOOL_CALLS]time[ARGS]{"name": "x", "arguments": "y"}', "",
     [("time", '{"name": "x", "arguments": "y"}')]),
    (MISTRAL_ARGS, '[TOOL_CALLS]time[ARGS]{"a', "", [("time", '{"a')]),
    (MISTRAL_ARGS, "[TOOL_CALLS]time[ARGS]{} so", " so", [("time", "{}")]),
    (MISTRAL_ARGS, "So [TOOL_CALLS]time[ARGS]no", "So[TOOL_CALLS]time[ARGS]no", []),
    (MISTRAL_ARGS, f"[TOOL_CALLS]{'x' * 400}[ARGS]", f"[TOOL_CALLS]{'x' * 400}[ARGS]", []),
    (LLAMA3_JSON, LLAMA, "", [("weather", args(LLAMA))]),
    (LLAMA3_JSON, f"<|python_tag|>{LLAMA}", "", [("weather", args(LLAMA))]),
    (LLAMA3_JSON, f"{LLAMA}; {LLAMA}", "", [("weather", args(LLAMA))] * 2),
    (LLAMA3_JSON, '{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
    (LLAMA3_JSON, '{"answer": 42}', '{"answer": 42}', []),
    (LLAMA3_JSON, "It is {fine}.", "It is {fine}.", []),
    (LLAMA3_JSON, "<|python", "<|python", []),
]  # fmt: skip


@pytest.mark.parametrize(("how", "text", "content", "calls"), CASES)
def test_what_is_read(how: ToolFormat, text: str, content: str, calls: list) -> None:
    assert read(how, text) == (content, calls)


@pytest.mark.parametrize(("how", "text", "content", "calls"), CASES)
def test_the_same_however_it_is_cut(how: ToolFormat, text: str, content: str, calls: list) -> None:
    assert read(how, text, list(range(len(text)))) == (content, calls)
    rng = random.Random(text)
    for _ in range(20):
        cuts = [rng.randrange(len(text) + 1) for _ in range(rng.randrange(6))]
        assert read(how, text, cuts) == (content, calls)


@pytest.mark.parametrize("how", [HERMES, MISTRAL, LLAMA3_JSON])
def test_arguments_come_as_they_are_written(how: ToolFormat) -> None:
    key = how.arguments_key
    call = f'{how.begin}{"[" if how.listed else ""}{{"name": "time", "{key}": {{"zone": "Europe/'
    parser = how.parser(OFFER)
    assert parser.push(call) == [CallBegun(0, "time"), CallArguments(0, '{"zone": "Europe/')]
    assert parser.push('Berlin"') == [CallArguments(0, 'Berlin"')]
    assert parser.push("}") == [CallArguments(0, "}")]
    assert parser.push("}") == []


@pytest.mark.parametrize("how", [HERMES, MISTRAL, MISTRAL_ARGS, LLAMA3_JSON])
def test_what_a_format_writes_it_reads(how: ToolFormat) -> None:
    written = how.written([{"name": "weather", how.arguments_key: ARGS}])
    content, [(name, arguments)] = read(how, written)
    assert (content, name, json.loads(arguments)) == ("", "weather", ARGS)


def test_an_offer_is_what_tool_choice_leaves_of_the_tools() -> None:
    assert offer_of(TOOLS, "none", None) == Offer()
    assert [tool.name for tool in offer_of(TOOLS, "required", False).tools] == ["weather", "time"]
    named = offer_of(TOOLS, {"type": "function", "function": {"name": "time"}}, None)
    assert ([tool.name for tool in named.tools], named.must) == (["time"], True)
