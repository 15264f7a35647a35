"""What clients may ask a gateway for by name: models, their aliases, and routes to them.

Names are looked up in one order: a route, a model, an alias. A route's rules are tried from the
first; the first whose conditions all hold names the model.
"""

# ruff: noqa: RUF009  (setting() is dataclasses.field with documentation)
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from crossdock.proto.errors import ConfigError
from crossdock.proto.settings import no_entries, setting

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")
MODEL_NAME_RULE = (
    "must be 1 to 128 of letters, digits and . _ : / @ -, beginning with one of the former"
)
TOOL_PARSERS = ("auto", "hermes", "llama3_json", "mistral", "mistral_args", "none")


def check_name(path: str, name: str) -> None:
    """Raises ConfigError for what no client could ask for by name."""
    if not MODEL_NAME.fullmatch(name):
        raise ConfigError(path, f"{name!r} is not a model's name; {MODEL_NAME_RULE}")


def _check_headers(path: str, headers: Mapping[str, str]) -> None:
    for name in headers:
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
            raise ConfigError(f"{path}.{name}", f"{name!r} is not the name of a header")


@dataclass(frozen=True)
class Range:
    """The YAML's `prompt_tokens` of a rule. Both ends are open; 0 is none."""

    above: int = setting(0, "More tokens than this; 0: any.", low=0, high=100_000_000)
    below: int = setting(0, "Fewer tokens than this; 0: any.", low=0, high=100_000_000)

    def __bool__(self) -> bool:
        return bool(self.above or self.below)

    def __contains__(self, tokens: float) -> bool:
        return tokens > self.above and (not self.below or tokens < self.below)


@dataclass(frozen=True)
class When:
    """The YAML's `when` of a rule: conditions that must all hold; with none it always does."""

    prompt_tokens: Range = setting(
        factory=Range, doc="Length of the longest prompt, by the tokenizer of the rule's model."
    )
    tenant: tuple[str, ...] = setting((), "Tenants, by their credential where there is auth.")
    header: Mapping[str, str] = setting(
        factory=no_entries,
        doc="HTTP headers (gRPC metadata) and their values. A client can send what it likes.",
        check=_check_headers,
    )
    budget_below: float = setting(
        0.0,
        "Less than this part of the credential's budget is left; 0: any.",
        low=0,
        high=1,
    )

    def __bool__(self) -> bool:
        return bool(self.prompt_tokens or self.tenant or self.header or self.budget_below)


@dataclass(frozen=True)
class Rule:
    """One entry of the YAML's `routes`: which model, when, and which in its place."""

    use: str = setting(doc="The model, by its name in models.", kind="text")
    when: When = setting(factory=When, doc="The last rule of a route has no conditions.")
    fallback: tuple[str, ...] = setting(
        (), "Models to take instead, in this order, where the one before is full."
    )
    max_wait_s: float = setting(
        0.0,
        "A model is full too where its first token is predicted later than this; 0: later than "
        "the request's deadline.",
        low=0,
        high=86_400,
    )


@dataclass(frozen=True)
class ServedModel:
    """One model of a gateway."""

    source: str  # a known id, a folder, or a .gguf file
    aliases: tuple[str, ...] = ()
    tool_parser: str = ""  # empty: the gateway's


@dataclass(frozen=True)
class Serving:
    """All that clients may ask for. Models are by name; the first is for who names none."""

    models: Mapping[str, ServedModel] = field(default_factory=dict)
    routes: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)
