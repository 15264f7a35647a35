"""How models write calls: what is read of them, and the grammar of an answer that must be calls."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from crossdock.model.grammar import WHITESPACE, rule_of
from crossdock.model.text import TextModel
from crossdock.proto.types import Grammar, GrammarKind
from crossdock.router.frontdoor.tools.offer import Offer, Tool
from crossdock.router.frontdoor.tools.parsers import (
    BareParser,
    MarkedParser,
    NamedParser,
    NoParser,
    Parser,
)

_ALPHABET = string.ascii_letters + string.digits
MOST_CALLS = 16  # of an answer that must be calls


@dataclass(frozen=True)
class ToolFormat:
    """One way of writing calls."""

    name: str
    arguments_key: str
    parser: Callable[[Offer], Parser]
    begin: str = ""  # of a call, or of all where `listed`
    end: str = ""
    between: str = ""  # a name and its arguments, where no object has both
    listed: bool = False  # all calls stand in one list
    several: bool = True  # an answer may hold more than one call
    id_characters: int = 24  # of a call's id
    markers: tuple[str, ...] = ()  # shown to the parser also where they are special tokens

    def new_id(self) -> str:
        """Of a call that a model made."""
        length = self.id_characters
        drawn = "".join(secrets.choice(_ALPHABET) for _ in range(length))
        return drawn if length < 20 else f"call_{drawn}"

    def written(self, calls: Iterable[Mapping[str, Any]]) -> str:
        """Calls ({"name", "arguments"}) as the model itself would write them."""
        if self.listed:
            return self.begin + json.dumps([dict(call) for call in calls], ensure_ascii=False)
        if self.between:
            return "".join(
                self.begin + call["name"] + self.between
                + json.dumps(call[self.arguments_key], ensure_ascii=False)
                for call in calls
            )  # fmt: skip
        return "\n".join(
            f"{self.begin}\n{json.dumps(dict(call), ensure_ascii=False)}\n{self.end}".strip()
            for call in calls
        )

    def grammar(self, offer: Offer, text: TextModel, instead: Grammar | None = None) -> Grammar:
        """Of an answer that calls at least one of the tools and says nothing else, or else is what
        `instead` describes. Raises InvalidRequest for the field "grammar" where that cannot be."""
        begin, end = (_marker(marker, text) for marker in (self.begin, self.end))
        joint, more = '", "' if self.listed else '"\\n"' * (not self.between), ""
        if offer.parallel and self.several:
            more = f" ({joint} call){{0,{MOST_CALLS - 1}}}"
        rules = ["start: calls"]
        if instead is not None:
            rules = ["start: calls | answer", f"answer: {rule_of(instead)}"]
        if self.listed:
            rules += [f'calls: {begin} "[" call{more} "]"', "call: function"]
        else:
            one = f'{begin} "\\n" function "\\n" {end}' if end else f"{begin} function"
            rules += [f"calls: call{more}", f"call: {one}"]
        functions = " | ".join(f"function_{i}" for i in range(len(offer.tools)))
        rules.append(f"function: {functions}")
        rules += [self._function(i, tool, text) for i, tool in enumerate(offer.tools)]
        return Grammar(GrammarKind.LARK, "\n".join(rules))

    def _function(self, number: int, tool: Tool, text: TextModel) -> str:
        own = {"whitespace_pattern": WHITESPACE, "lenient": not tool.strict}
        schema = json.dumps(dict(tool.parameters) | {"x-guidance": own})
        if self.between:
            between = _marker(self.between, text)
            return f"function_{number}: {json.dumps(tool.name)} {between} %json {schema}"
        head = f'{{"name": {json.dumps(tool.name)}, "{self.arguments_key}": '
        return f'function_{number}: {json.dumps(head)} %json {schema} "}}"'


def _marker(marker: str, text: TextModel) -> str:
    """In Lark: a special token by its id, else the text."""
    token_id = text.tokenizer.token_to_id(marker) if marker else None
    if token_id is not None and token_id in text.pieces.special_ids:
        return f"<[{token_id}]>"
    return json.dumps(marker) if marker else ""


HERMES = ToolFormat(
    "hermes",
    "arguments",
    lambda offer: MarkedParser("<tool_call>", "</tool_call>"),
    begin="<tool_call>",
    end="</tool_call>",
    markers=("<tool_call>", "</tool_call>"),
)
LLAMA3_JSON = ToolFormat(
    "llama3_json",
    "parameters",
    lambda offer: BareParser(frozenset(tool.name for tool in offer.tools)),
    several=False,
    markers=(BareParser.MARKER,),
)
MISTRAL = ToolFormat(
    "mistral",
    "arguments",
    lambda offer: MarkedParser("[TOOL_CALLS]"),
    begin="[TOOL_CALLS]",
    listed=True,
    id_characters=9,
    markers=("[TOOL_CALLS]",),
)
MISTRAL_ARGS = ToolFormat(
    "mistral_args",
    "arguments",
    lambda offer: NamedParser("[TOOL_CALLS]", "[ARGS]"),
    begin="[TOOL_CALLS]",
    between="[ARGS]",
    id_characters=9,
    markers=("[TOOL_CALLS]", NamedParser.ID, "[ARGS]"),
)
NONE = ToolFormat("none", "arguments", lambda offer: NoParser())
FORMATS = {each.name: each for each in (HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_ARGS, NONE)}


def format_of(setting: str, text: TextModel) -> ToolFormat:
    """By its name; `auto`: by what the model's chat template writes, and Hermes' where it says
    nothing of tools."""
    if setting != "auto":
        return FORMATS[setting]
    source = text.template.source if text.template else ""
    if "[TOOL_CALLS]" in source:
        return MISTRAL_ARGS if "[ARGS]" in source else MISTRAL
    if "<tool_call>" not in source and ("<|python_tag|>" in source or '"parameters": ' in source):
        return LLAMA3_JSON
    return HERMES
