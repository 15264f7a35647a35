"""A model's chat template, rendered by sandboxed jinja2. Imports no torch."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from crossdock.proto.errors import InvalidRequest, ModelError

Message = Mapping[str, Any]

_OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_END = "\U000f0001"  # of private use: after it a final message goes on
_DEVELOPER = "developer"


@dataclass(frozen=True)
class Rendering:
    """How a conversation is put into a template, beside its messages."""

    tools: Sequence[Mapping[str, Any]] = ()  # as OpenAI has them: {"type": "function", …}
    options: Mapping[str, Any] = field(default_factory=dict)  # variables of the template's own
    add_generation_prompt: bool = True
    continue_final_message: bool = False  # the prompt ends within the last message


class ChatTemplate:
    """Templates by name, of which "default" is rendered, or "tool_use" where there are tools.

    What templates may call follows the Hugging Face convention: raise_exception, strftime_now,
    the tojson filter, loop controls, and the special tokens as variables.
    Raises ModelError where a template is no jinja2.
    """

    def __init__(
        self, templates: Mapping[str, str], special: Mapping[str, str], where: str
    ) -> None:
        environment = _environment()
        self._special = dict(special)
        self._sources = dict(templates)
        self._templates: dict[str, jinja2.Template] = {}
        for name, source in templates.items():
            try:
                self._templates[name] = environment.from_string(source)
            except jinja2.TemplateError as error:
                raise ModelError(f"{where}: chat template {name!r}: {error}") from error

    @property
    def source(self) -> str:
        """Of the template that is rendered where there are tools."""
        return self._sources.get("tool_use", self._sources.get("default", ""))

    @cached_property
    def identity(self) -> tuple[frozenset[tuple[str, str]], ...]:
        """Equal where templates are."""
        return frozenset(self._sources.items()), frozenset(self._special.items())

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template shows the model its tools, and what came of calling them."""
        return "tools" in jinja2.meta.find_undeclared_variables(_environment().parse(self.source))

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **more: Any
    ) -> str:
        """Text of the prompt; `more`: other fields of Rendering. Raises InvalidRequest where the
        template does not accept the messages."""
        how = Rendering(add_generation_prompt=add_generation_prompt, **more)
        shown = f"{len(messages)} messages"
        name = "tool_use" if how.tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise InvalidRequest("messages", shown, "this model has no default chat template")
        plain = [_plain(i, message) for i, message in enumerate(messages)]
        if _DEVELOPER not in self._sources[name]:
            plain = [_from_system(message) for message in plain]
        if how.continue_final_message:
            plain[-1]["content"] = (plain[-1].get("content") or "") + _END
        given = {name: value for name, value in how.options.items() if name not in _OURS}
        try:
            text = self._templates[name].render(
                **self._special
                | given
                | {
                    "messages": plain,
                    "tools": list(how.tools) or None,
                    "documents": None,
                    "add_generation_prompt": how.add_generation_prompt,
                },
            )
        except Exception as error:  # a template may fail in any way on what a client sent
            limit = f"the model's chat template does not accept them: {error}"
            raise InvalidRequest("messages", shown, limit) from error
        if not how.continue_final_message:
            return text
        before, found, _ = text.rpartition(_END)
        if not found:
            limit = "the model's chat template does not show the final message"
            raise InvalidRequest("continue_final_message", True, limit)
        return before


def _plain(index: int, message: Message) -> dict[str, Any]:
    """Content given as a list of text parts becomes one text, which every template takes."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            where = f"messages[{index}].content"
            raise InvalidRequest(where, part, "each part must be a text: this model takes no other")
        texts.append(text)
    return {**message, "content": "".join(texts)}


def _from_system(message: dict[str, Any]) -> dict[str, Any]:
    """What a template that knows no developer is shown of one: the role that it had before."""
    return message | {"role": "system"} if message.get("role") == _DEVELOPER else message


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda how: datetime.datetime.now().strftime(how)
    return environment


class _Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %} marks what the model said; it renders as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _tojson(value: object, indent: int | None = None, **options: Any) -> str:
    """Plain JSON: jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
