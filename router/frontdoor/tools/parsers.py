"""Readers of an answer's text, by the format in which its model writes calls."""

from __future__ import annotations

from typing import Protocol

from crossdock.router.frontdoor.tools.calls import CallReader, Content, Event


class Parser(Protocol):
    """One answer's. The events of all texts are the same however the text is cut."""

    calls: int  # that have begun

    def push(self, text: str) -> list[Event]:
        """What the text settles; what may be the beginning of a marker is held back."""

    def finish(self) -> list[Event]:
        """What was held back, at the end of the text."""


class MarkedParser:
    """Calls that stand between two markers, one or several in a list; text may come before.

    Hermes and Qwen write <tool_call>{…}</tool_call>, Mistral [TOOL_CALLS][{…}, {…}].
    """

    def __init__(self, begin: str, end: str = "") -> None:
        self.calls = 0
        self._begin, self._end = begin, end
        self._lead = begin  # what stood before what a reader has
        self._reader: CallReader | None = None
        self._inside = False
        self._held = ""

    def push(self, text: str) -> list[Event]:
        """See Parser.push."""
        events: list[Event] = []
        self._held += text
        while self._held and self._step(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """See Parser.finish. A call that was begun and cut short stays as it is."""
        reader, self._reader = self._reader, None
        if reader is not None:
            held = "" if self._has_begun(reader) else reader.text
        else:
            held = "" if self._inside else self._held
        self._held = ""
        if reader is not None and held:
            held = self._lead + held
        return [Content(held)] if held.strip() or (held and not self.calls) else []

    def _step(self, events: list[Event]) -> bool:
        """Takes something of what is held; False where more has to come first."""
        if self._reader is not None:
            return self._read(self._reader, events)
        return self._between(events) if self._inside else self._outside(events)

    def _outside(self, events: list[Event]) -> bool:
        at = self._held.find(self._begin)
        if at >= 0:
            before, self._held = self._held[:at].rstrip(), self._held[at + len(self._begin) :]
            if before:
                events.append(Content(before))
            self._inside = True
            return True
        keep = _begins_at(self._held, self._begin)
        keep = len(self._held[:keep].rstrip())  # blanks before a marker are no text
        if keep:
            events.append(Content(self._held[:keep]))
            self._held = self._held[keep:]
        return False

    def _between(self, events: list[Event]) -> bool:
        """After the marker, or after a call: another one, or the end."""
        self._held = self._held.lstrip(" \n\r\t,[" + ("]" if self._end else ""))
        if self._held.startswith("{"):
            self._reader = CallReader(self.calls)
            return True
        end = self._end or "]"
        if self._held.startswith(end):
            self._held, self._inside = self._held[len(end) :], False
            return True
        if end.startswith(self._held):
            return False
        self._inside = False  # no call after all, or text after one
        if not self.calls:
            events.append(Content(self._begin))
        return True

    def _read(self, reader: CallReader, events: list[Event]) -> bool:
        news, rest = reader.push(self._held)
        self._held = ""
        self.calls += bool(news) and reader.index == self.calls
        events += news
        if reader.failed and not self._has_begun(reader):
            events.append(Content(self._lead + reader.text))
            self._reader, self._inside, self._held = None, False, rest
        elif reader.done or reader.failed:
            self._reader, self._held = None, rest
        return bool(self._held)

    def _has_begun(self, reader: CallReader) -> bool:
        return self.calls > reader.index


class NamedParser(MarkedParser):
    """Calls that begin with a marker and a name, one after another, as newer models of Mistral do:
    [TOOL_CALLS]name[ARGS]{…}. Some put [CALL_ID] and an id, which nobody needs, before [ARGS].
    """

    ID = "[CALL_ID]"
    LONGEST = 256  # characters of a name and an id

    def __init__(self, begin: str, between: str) -> None:
        super().__init__(begin)
        self._before_arguments = between

    def _between(self, events: list[Event]) -> bool:
        """After the marker: a name."""
        head, found, rest = self._held.partition(self._before_arguments)
        name = head.partition(self.ID)[0].strip()
        if found and name and len(head) <= self.LONGEST:
            self._reader = CallReader(self.calls, name=name)
            self._lead, self._held = f"{self._begin}{head}{found}", rest
            return bool(rest)
        if not found and len(head) < self.LONGEST + len(self._before_arguments):
            return False
        self._inside = False  # no call after all
        events.append(Content(self._begin))
        return True

    def _read(self, reader: CallReader, events: list[Event]) -> bool:
        more = super()._read(reader, events)
        self._inside = self._reader is not None
        return more


class BareParser:
    """An answer that is nothing but calls, as Llama 3 writes them: {"name": …, "parameters": {…}},
    further ones after a semicolon, after <|python_tag|> or without it.

    Anything else is text: an answer that does not begin with an object, and an object that names
    none of the `names`.
    """

    MARKER = "<|python_tag|>"

    def __init__(self, names: frozenset[str]) -> None:
        self.calls = 0
        self._names = names
        self._reader: CallReader | None = None
        self._held = ""
        self._text = False  # the rest is text

    def push(self, text: str) -> list[Event]:
        """See Parser.push."""
        events: list[Event] = []
        self._held += text
        while self._held and not self._text and self._step(events):
            pass
        if self._text and self._held:
            events.append(Content(self._held))
            self._held = ""
        return events

    def finish(self) -> list[Event]:
        """See Parser.finish."""
        reader, self._reader = self._reader, None
        held = reader.text if reader is not None and self.calls <= reader.index else self._held
        self._held = ""
        return [Content(held)] if held.strip() or (held and not self.calls) else []

    def _step(self, events: list[Event]) -> bool:
        if self._reader is not None:
            return self._read(self._reader, events)
        start = self._held.lstrip(" \n\r\t;" if self.calls else " \n\r\t")
        if start.startswith(self.MARKER):
            self._held = start[len(self.MARKER) :]
            return True
        if start.startswith("{"):
            self._reader, self._held = CallReader(self.calls, self._names), start
            return True
        self._text = not self.MARKER.startswith(start)
        return False

    def _read(self, reader: CallReader, events: list[Event]) -> bool:
        news, rest = reader.push(self._held)
        self._held = ""
        self.calls += bool(news) and reader.index == self.calls
        events += news
        if reader.failed and self.calls <= reader.index:
            self._reader, self._held, self._text = None, reader.text + rest, True
        elif reader.done or reader.failed:
            self._reader, self._held = None, rest
        return bool(self._held)


class NoParser:
    """All is text."""

    calls = 0

    def push(self, text: str) -> list[Event]:
        """See Parser.push."""
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        """See Parser.finish."""
        return []


def _begins_at(text: str, marker: str) -> int:
    """Where the longest end of `text` starts that is the beginning of the marker."""
    for at in range(max(0, len(text) - len(marker) + 1), len(text)):
        if marker.startswith(text[at:]):
            return at
    return len(text)
