"""Calls as they come out of a model's text, piece by piece."""

from __future__ import annotations

import json
from dataclasses import dataclass

ARGUMENT_KEYS = frozenset({"arguments", "parameters"})


@dataclass(frozen=True)
class Content:
    """Text that is no call."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """The first of a call: its name."""

    index: int  # of the answer's calls
    name: str


@dataclass(frozen=True)
class CallArguments:
    """What a call's arguments gained: their JSON, joined."""

    index: int
    text: str


Event = Content | CallBegun | CallArguments


class CallReader:
    """Reads one JSON object that is a call, {"name": …, "arguments": {…}} in whatever order, as its
    text comes; the arguments are passed on as they are written.

    `known`: names that may be called; empty: any. `name`: where it is known, the object is its
    arguments alone.
    """

    def __init__(
        self, index: int, known: frozenset[str] = frozenset(), name: str | None = None
    ) -> None:
        self.index, self.done, self.failed = index, False, False
        self.text = ""  # all that was read
        self.name, self._named = name, name is not None
        self._known = known
        self._at = 0  # read so far
        self._depth = 0
        self._in_string = self._escaped = False
        self._string_at = 0
        self._last_string = ""  # at depth 1: a key until its value has come
        self._key = ""
        self._expects_value = False
        self._arguments_at: int | None = None
        self._arguments_end: int | None = None
        self._given = 0  # of the arguments, characters passed on

    def push(self, text: str) -> tuple[list[Event], str]:
        """What the text adds, and what of it comes after the object."""
        self.text += text
        while self._at < len(self.text) and not self.done and not self.failed:
            self._take(self.text[self._at])
            self._at += 1
        rest, self.text = self.text[self._at :], self.text[: self._at]
        return ([] if self.failed else self._news()), rest

    def _news(self) -> list[Event]:
        events: list[Event] = []
        if self.name is None or (self._arguments_at is None and not self.done):
            self.failed = self.failed or (self.done and self.name is None)
            return events
        if self._given == 0:
            events.append(CallBegun(self.index, self.name))
        given = self._arguments()
        if len(given) > self._given:
            events.append(CallArguments(self.index, given[self._given :]))
            self._given = len(given)
        return events

    def _arguments(self) -> str:
        """The JSON of the arguments so far; a call without any has none."""
        if self._arguments_at is None:
            return "{}"
        end = len(self.text) if self._arguments_end is None else self._arguments_end
        return self.text[self._arguments_at : end]

    @property
    def _of_call(self) -> bool:
        """Whether what stands here is the call's, and not its arguments'."""
        return self._depth == 1 and not self._named

    def _take(self, character: str) -> None:
        if self._in_string:
            self._take_of_string(character)
        elif character == '"':
            self._in_string, self._string_at = True, self._at
            self.failed |= self._depth == 0
            if self._of_call and self._expects_value and self._key in ARGUMENT_KEYS:
                self.failed = True  # arguments are an object
        elif character in "{[":
            self._opened(character)
        elif character in "}]":
            self._closed()
        elif character == ":" and self._of_call:
            self._key, self._expects_value = self._last_string, True
        elif character == "," and self._of_call:
            self._key, self._expects_value = "", False
        elif not character.isspace():
            self.failed |= self._depth == 0

    def _take_of_string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
            if self._of_call:
                self._string_ended()

    def _string_ended(self) -> None:
        try:
            value = str(json.loads(self.text[self._string_at : self._at + 1], strict=False))
        except ValueError:
            self.failed = True
            return
        if not self._expects_value:
            self._last_string = value
        elif self._key == "name" and self.name is None:
            self.name = value
            self.failed |= bool(self._known) and value not in self._known

    def _opened(self, bracket: str) -> None:
        self.failed |= self._depth == 0 and bracket != "{"
        begins = self._depth == 0 if self._named else self._key in ARGUMENT_KEYS and self._of_call
        if begins and self._arguments_at is None:
            self._arguments_at = self._at
            self.failed |= bracket != "{"
        self._depth += 1

    def _closed(self) -> None:
        self._depth -= 1
        ends = self._depth == (0 if self._named else 1)
        if ends and self._arguments_at is not None and self._arguments_end is None:
            self._arguments_end = self._at + 1
        self.done = self._depth == 0
        self.failed |= self._depth < 0
