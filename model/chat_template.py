"""A model's chat template, rendered by sandboxed jinja2. Imports no torch."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from crossdock.proto.errors import InvalidRequest, ModelError

Message = Mapping[str, Any]


class ChatTemplate:
    """Templates by name, of which "default" is rendered.

    What templates may call follows the Hugging Face convention: raise_exception, strftime_now,
    the tojson filter, loop controls, and the special tokens as variables.
    Raises ModelError where a template is no jinja2.
    """

    def __init__(
        self, templates: Mapping[str, str], special: Mapping[str, str], where: str
    ) -> None:
        environment = _environment()
        self._special = dict(special)
        self._templates: dict[str, jinja2.Template] = {}
        for name, source in templates.items():
            try:
                self._templates[name] = environment.from_string(source)
            except jinja2.TemplateError as error:
                raise ModelError(f"{where}: chat template {name!r}: {error}") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Raises InvalidRequest where the template does not accept the messages."""
        shown = f"{len(messages)} messages"
        if "default" not in self._templates:
            raise InvalidRequest("messages", shown, "this model has no default chat template")
        plain = [_plain(i, message) for i, message in enumerate(messages)]
        try:
            return self._templates["default"].render(
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special,
            )
        except Exception as error:  # a template may fail in any way on what a client sent
            limit = f"the model's chat template does not accept them: {error}"
            raise InvalidRequest("messages", shown, limit) from error


def _plain(index: int, message: Message) -> dict[str, Any]:
    """Content given as a list of text parts becomes one text, which every template takes."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            field = f"messages[{index}].content"
            raise InvalidRequest(field, part, "each part must be a text: this model takes no other")
        texts.append(text)
    return {**message, "content": "".join(texts)}


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
