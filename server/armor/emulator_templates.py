"""Templates of the emulator: which filters one has, and what it does with what they find. No protos here."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cabochon.engine.errors import ConfigError
from cabochon.server.armor.config import TEMPLATE

FILTERS = ("rai", "csam", "malicious_uris", "pi_and_jailbreak", "sdp")  # the keys of a reply's filter_results
ALWAYS = "csam"  # no template can leave it out: its configuration has no such field
FLAGS = ("deidentify", "inspect_only", "log_sanitize", "ignore_partial")
ANY = "*"
_FLAG = re.compile(r"(\*|projects/[^/]+/locations/[^/]+/templates/[^/:]+)(?::(.*))?", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateSpec:
    """One template, or with the name `*` each that has no other."""

    name: str = ANY  # projects/P/locations/L/templates/T
    filters: frozenset[str] = frozenset(FILTERS)
    has_deidentify: bool = False  # SDP replaces what it finds instead of reporting it
    is_inspect_only: bool = False  # its owner wants findings to be counted, not to block
    logs_sanitize: bool = False  # the service would write texts to Cloud Logging
    ignores_partial: bool = False  # replies say so; the caller decides


def parse_template(text: str) -> TemplateSpec:
    """text: NAME, or NAME:WORD,WORD... with words of FILTERS and FLAGS. Raises ConfigError."""
    match = _FLAG.fullmatch(text)
    if match is None or not (match[1] == ANY or TEMPLATE.fullmatch(match[1])):
        raise ConfigError(
            f"a template must be projects/P/locations/L/templates/T[:WORD,...] or *[:WORD,...], got {text!r}:"
            " correct its name"
        )
    name, words = match.groups()
    return _spec(name, words.split(",") if words else ())


def read_templates(path: Path) -> list[TemplateSpec]:
    """path: YAML, a list of words by each template's name. Raises ConfigError."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"template_file must be a YAML file, {path} is none: {error}: write it") from None
    if not isinstance(content, Mapping) or not all(_is_words(words) for words in content.values()):
        raise ConfigError(
            f"template_file must have a list of words for each template, {path} has not:"
            " write lines such as `projects/P/locations/L/templates/T: [sdp, deidentify]`"
        )
    return [parse_template(f"{name}:{','.join(words or ())}") for name, words in content.items()]


def _is_words(words: Any) -> bool:
    return words is None or (isinstance(words, list) and all(isinstance(word, str) for word in words))


def _spec(name: str, words: Iterable[str]) -> TemplateSpec:
    given = {word.strip() for word in words}
    if unknown := sorted(given - {*FILTERS, *FLAGS}):
        raise ConfigError(
            f"words of a template must be of {', '.join((*FILTERS, *FLAGS))}, got {unknown[0]!r}: correct it"
        )
    filters = given & set(FILTERS) or set(FILTERS)
    if "deidentify" in given:
        filters |= {"sdp"}
    return TemplateSpec(
        name=name,
        filters=frozenset(filters | {ALWAYS}),
        has_deidentify="deidentify" in given,
        is_inspect_only="inspect_only" in given,
        logs_sanitize="log_sanitize" in given,
        ignores_partial="ignore_partial" in given,
    )
