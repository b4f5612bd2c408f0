"""Prometheus' text format 0.0.4, as strict as the endpoint picker's parser: Go's expfmt with legacy names.

What it refuses fails the whole scrape: a name in UTF-8, a second TYPE line, a last line without its end.
Not known here: which metrics matter (`endpoint_metrics`).
"""

import re
from dataclasses import dataclass, field

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r"[a-zA-Z_][a-zA-Z0-9_]*"
_VALUE = r'(?:[^"\\\n]|\\[\\n"])*'
_ONE = rf'{_LABEL}[ \t]*=[ \t]*"{_VALUE}"[ \t]*'
_LABELS = rf"\{{[ \t]*((?:{_ONE}(?:,[ \t]*{_ONE})*,?)?)[ \t]*\}}"
_SAMPLE = re.compile(rf"[ \t]*({_NAME})[ \t]*(?:{_LABELS})?[ \t]*(?<=[ \t}}])(\S+)(?:[ \t]+(-?\d+))?[ \t]*")
_ABOUT = re.compile(r"[ \t]*#[ \t]*(HELP|TYPE)[ \t]+(\S+)(?:[ \t]+(.*))?")
_PAIR = re.compile(rf'({_LABEL})[ \t]*=[ \t]*"({_VALUE})"')
_TYPES = ("counter", "gauge", "histogram", "summary", "untyped")
_SUFFIXES = {"histogram": ("_bucket", "_count", "_sum"), "summary": ("_count", "_sum")}
_ESCAPED = {"\\\\": "\\", "\\n": "\n", '\\"': '"'}


class FormatError(ValueError):
    """The text is not in format 0.0.4: the whole scrape fails."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One line: value, time in ms since 1970 (0: none given), labels as written."""

    value: float
    timestamp_ms: int
    label_text: str

    def labels(self) -> dict[str, str]:
        """Names and values, escapes resolved."""
        return {
            name: re.sub(r"\\.", lambda found: _ESCAPED[found[0]], value)
            for name, value in _PAIR.findall(self.label_text)
        }


@dataclass(slots=True)
class Family:
    """All samples under one name, in the order of the text."""

    kind: str = "untyped"
    samples: list[Sample] = field(default_factory=list)
    has_type_line: bool = False


def parse(text: str) -> dict[str, Family]:
    """Families with at least one sample, by name. Raises FormatError with the number of the line."""
    families: dict[str, Family] = {}
    lines = text.split("\n")
    if lines.pop():
        raise FormatError(f"the last line must end with a line feed, line {len(lines) + 1} does not: add one")
    for number, line in enumerate(lines, 1):
        if found := _SAMPLE.fullmatch(line):
            name, labels, value, timestamp = found.groups()
            family = families.setdefault(_family_name(name, families), Family())
            family.samples.append(Sample(_number(value, number), int(timestamp or 0), labels or ""))
        elif found := _ABOUT.fullmatch(line):
            keyword, name, rest = found.groups()
            _describe(families, keyword, name, rest, number)
        elif line.strip() and not line.lstrip(" \t").startswith("#"):
            raise FormatError(
                f"a line must be a sample or a comment, line {number} is neither: see format 0.0.4"
            )
    return {name: family for name, family in families.items() if family.samples}


def _describe(families: dict[str, Family], keyword: str, name: str, rest: str | None, number: int) -> None:
    """A HELP or TYPE line; one that says nothing is a comment."""
    if not re.fullmatch(_NAME, name):
        raise FormatError(f"{keyword} must name a metric in ASCII, line {number} does not: see format 0.0.4")
    kind = (rest or "").strip(" \t")
    if keyword == "HELP" or not kind:
        return
    if kind not in _TYPES:
        raise FormatError(f"a type must be one of {_TYPES}, line {number} has another: see format 0.0.4")
    family = families.setdefault(name, Family())
    if family.has_type_line or family.samples:
        raise FormatError(f"TYPE must come once and before samples, line {number} does not: merge the family")
    family.kind, family.has_type_line = kind, True


def _family_name(name: str, families: dict[str, Family]) -> str:
    """Parts of a histogram or summary belong to it; every other name is its own family."""
    for suffix in ("_bucket", "_count", "_sum"):
        whole = name.removesuffix(suffix)
        if whole != name and whole in families and suffix in _SUFFIXES.get(families[whole].kind, ()):
            return whole
    return name


def _number(text: str, number: int) -> float:
    try:
        return float(text)
    except ValueError:
        raise FormatError(f"a value must be a number, line {number} has another: see format 0.0.4") from None
