"""Just enough of a Dockerfile's and a .dockerignore's rules for tests that have no Docker."""

import json
import re
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction: its keyword and the rest, continuation lines joined."""

    keyword: str
    value: str

    def words(self) -> list[str]:
        """Of a JSON array, or of plain words without flags."""
        if self.value.startswith("["):
            return [str(word) for word in json.loads(self.value)]
        return [word for word in self.value.split() if not word.startswith("--")]

    def flag(self, name: str) -> str | None:
        found = re.search(rf"(?:^|\s)--{name}=(\S+)", self.value)
        return found[1] if found else None


class Stage(NamedTuple):
    """What stands between one FROM and the next."""

    name: str
    base: str
    instructions: list[Instruction]

    def of(self, keyword: str) -> list[Instruction]:
        return [one for one in self.instructions if one.keyword == keyword]

    def variables(self, keyword: str) -> dict[str, str]:
        """NAME=VALUE of each ENV, ARG or LABEL; an ARG without a value has ''."""
        text = " ".join(one.value for one in self.of(keyword))
        pairs = re.findall(r"([\w.]+)(?:=(\"[^\"]*\"|\S*))?(?:\s+|$)", text)
        return {name: value.strip('"') for name, value in pairs}


def read(file: Path) -> tuple[Stage, list[Stage]]:
    """What stands before the first FROM, as a stage without a name, and the stages."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    head, stages = Stage("", "", []), []
    for line in filter(str.strip, text.splitlines()):
        keyword, _, value = line.partition(" ")
        if keyword == "FROM":
            base, _, name = value.partition(" AS ")
            stages.append(Stage(name, base, []))
        else:
            (stages[-1] if stages else head).instructions.append(Instruction(keyword, value.strip()))
    return head, stages


def lineage(stage: Stage, stages: list[Stage]) -> list[Stage]:
    """The stage and those that it is built on, the oldest first."""
    parent = next((one for one in stages if one.name == stage.base), None)
    return [*lineage(parent, stages), stage] if parent else [stage]


def is_ignored(path: str, patterns: list[str]) -> bool:
    """Whether a .dockerignore keeps the file out: the last pattern that fits it or a folder above decides."""
    parts = path.split("/")
    above = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    ignored = False
    for pattern in patterns:
        regex = _regex(pattern.removeprefix("!").strip("/"))
        if any(regex.fullmatch(candidate) for candidate in above):
            ignored = not pattern.startswith("!")
    return ignored


def _regex(pattern: str) -> re.Pattern[str]:
    text = re.escape(pattern).replace(r"\*\*/", "(?:.*/)?").replace(r"\*\*", ".*")
    return re.compile(text.replace(r"\*", "[^/]*").replace(r"\?", "[^/]"))
