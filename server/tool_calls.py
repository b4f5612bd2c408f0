"""Finds function calls in an answer as it comes: text, the start of a call, pieces of its arguments.

An answer that begins like a call of a known function is one; any other is text. White space, a code fence,
<tool_call> tags and a list around it are skipped, for models write them. Nothing is taken back.
"""

from collections.abc import Collection, Iterator
from enum import Enum
from typing import NamedTuple

import regex  # partial matches, which `re` lacks: what may still become a call is held back

from cabochon.server.tools import CALL_OPENING

MAX_HELD = 512  # characters; more white space than that is text, and no feed looks at more than that again
CLOSE = r"(?:```|</tool_call>)?"
CALL = (
    r'\{\s*"name"\s*:\s*"(?P<name>[A-Za-z0-9_-]{1,64})"\s*'
    r'(?:,\s*"(?:parameters|arguments)"\s*:\s*(?P<arguments>\{)|(?P<none>\}))'
)


def _pattern(text: str) -> regex.Pattern[str]:
    """Possessive stars: nothing is tried twice, or a flood of white space would take its square."""
    return regex.compile(text.replace("*", "*+"))


FIRST = _pattern(rf"\s*{CALL_OPENING}\[?\s*{CALL}")
NEXT = _pattern(rf"\s*\}}\s*{CLOSE}\s*,?\s*{CALL_OPENING}{CALL}")
END = _pattern(rf"\s*\}}\s*\]?\s*{CLOSE}\s*")


class Text(NamedTuple):
    """What is no call."""

    text: str


class CallStart(NamedTuple):
    """A call, before its arguments."""

    name: str


class Arguments(NamedTuple):
    """More of the arguments of the last call, in JSON."""

    text: str


Part = Text | CallStart | Arguments


class _State(Enum):
    START = "nothing is decided"
    TEXT = "no call will come"
    ARGUMENTS = "within the arguments of a call"
    AFTER = "behind arguments"


class CallParser:
    """One answer."""

    def __init__(self, names: Collection[str]) -> None:
        """names: of the functions that may be called."""
        self._names = names
        self._state = _State.START
        self._held = ""
        self._depth = 0
        self._is_string = self._is_escape = False

    @property
    def is_open(self) -> bool:
        """Whether the arguments of the last call are not whole yet."""
        return self._state is _State.ARGUMENTS

    def feed(self, text: str) -> list[Part]:
        """Take more of the answer. Returns what is certain now."""
        self._held += text
        return list(self._parts())

    def flush(self) -> list[Part]:
        """The rest, when no more comes. The beginning of a further call, cut off, is dropped."""
        held, self._held = self._held, ""
        if not held or self._state is _State.AFTER:
            return []
        return [Text(held)]

    def _parts(self) -> Iterator[Part]:
        while self._held:
            match self._state:
                case _State.TEXT:
                    yield Text(self._take(len(self._held)))
                case _State.ARGUMENTS:
                    yield Arguments(self._take(self._end_of_arguments()))
                case _State.START | _State.AFTER:
                    parts = self._look_for_call()
                    if not parts:
                        return
                    yield from parts

    def _look_for_call(self) -> list[Part]:
        is_first = self._state is _State.START
        head = self._held[: MAX_HELD + 1]
        may_grow = len(head) <= MAX_HELD
        found = (FIRST if is_first else NEXT).match(head, partial=True)
        if found is not None and found.partial:
            if may_grow:
                return []
            found = None
        if found is None or found["name"] not in self._names:
            if not is_first:
                if may_grow and END.fullmatch(head, partial=True):
                    return []  # so far nothing but what closes calls
                end = END.match(head)
                self._take(0 if end is None else end.end())
            self._state = _State.TEXT
            return [Text(self._take(len(self._held)))] if self._held else []
        if found["none"] is not None:
            self._take(found.start("none"))
            self._state = _State.AFTER
            return [CallStart(found["name"]), Arguments("{}")]
        self._take(found.start("arguments"))
        self._state = _State.ARGUMENTS
        self._depth, self._is_string = 0, False
        return [CallStart(found["name"])]

    def _end_of_arguments(self) -> int:
        """Where they end in what is held, or its length."""
        for index, char in enumerate(self._held):
            if self._is_escape:
                self._is_escape = False
            elif self._is_string:
                self._is_escape = char == "\\"
                self._is_string = char != '"'
            elif char == '"':
                self._is_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._state = _State.AFTER
                    return index + 1
        return len(self._held)

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken
