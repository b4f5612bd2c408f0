"""Which policy an API key has: a YAML file, read again when it changes. No key is in a log or error.

    keys:
      - name: team-a                  # for logs and errors
        key_sha256: 5e88...           # of the key, in hex; or `key: sk-...` itself
        prompt_template: projects/p/locations/l/templates/strict
        response_template: null       # null: not checked; left out: as in the options
        mode: strict                  # as armor_mode
        on_unchecked: closed          # or open
        reveal: false
        optional_filters: [malicious_uris]

What an entry leaves out is as in the options, and so is a request whose key has no entry. So the options must
have a template for each stage that an entry checks: no key is a way round the checks.
"""

import hashlib
import hmac
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import yaml

from cabochon.engine.errors import ConfigError
from cabochon.server.armor.config import ArmorConfig, check_optional_filters, check_template
from cabochon.server.armor.templates import Use
from cabochon.server.armor.verdicts import Mode, Policy
from cabochon.server.auth import given_key

logger = logging.getLogger(__name__)

OPTIONS = {field.name for field in fields(Policy)}
ENTRY = {"name", "key", "key_sha256", *OPTIONS}
SHA256 = re.compile(r"[0-9a-f]{64}")
WORD = re.compile(r"[a-z_]{1,24}")
CHOICES = {"mode": get_args(Mode), "on_unchecked": ("closed", "open"), "reveal": (True, False)}


class Policies:
    """Without a file everybody has the policy of the options."""

    def __init__(self, config: ArmorConfig) -> None:
        """Raises ConfigError if the file cannot be read or is wrong."""
        self._config = config
        self._path = Path(config.armor_policy_file) if config.armor_policy_file is not None else None
        self._seen: tuple[int, int, int] | None = None
        self._of_key: dict[bytes, Policy] = {}  # by the SHA-256 of the key
        if self._path is not None:
            try:
                self._read(self._path)
            except OSError as error:
                raise ConfigError(
                    f"armor_policy_file must be a file with policies: {error}: write it"
                ) from None

    def policy_of(self, authorization: str | None) -> Policy:
        """That of the key in an Authorization header, or that of the options."""
        self._refresh()
        given = hashlib.sha256(given_key(authorization)).digest()
        found = self._config.default_policy
        for digest, policy in self._of_key.items():  # all, in constant time: how long it takes tells nothing
            found = policy if hmac.compare_digest(given, digest) else found
        return found

    def uses(self) -> set[Use]:
        """The templates of all policies, and what each is asked about."""
        self._refresh()
        found = set()
        for policy in (self._config.default_policy, *self._of_key.values()):
            if policy.prompt_template is not None:
                found.add(Use(policy.prompt_template, "prompt"))
            if policy.response_template is not None and policy.mode != "off":
                found.add(Use(policy.response_template, "response"))
        return found

    def _refresh(self) -> None:
        if self._path is None:
            return
        try:
            self._read(self._path)
        except Exception as error:  # gone for a moment, or wrong: those known so far hold
            shown = error if isinstance(error, OSError | ConfigError) else type(error).__name__  # no key
            logger.warning("armor policy file not taken, policies=%d hold error=%s", len(self._of_key), shown)

    def _read(self, path: Path) -> None:
        status = os.stat(path)
        seen = (status.st_ino, status.st_mtime_ns, status.st_size)
        if seen != self._seen:
            self._seen = seen  # first: a wrong version is complained of once
            self._of_key = _parse(path, self._config)


def _parse(path: Path, config: ArmorConfig) -> dict[bytes, Policy]:
    try:
        content = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # it quotes the file: show only the line
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path} must be YAML, it is not{where}: correct it") from None
    if not isinstance(content, dict) or set(content) != {"keys"} or not isinstance(content["keys"], list):
        raise ConfigError(f"{path} must hold `keys:` with a list, and nothing else: correct it")
    if not content["keys"]:
        raise ConfigError(
            f"{path} must have an entry for a key, it has none: add one, or leave the option out"
        )
    found: dict[bytes, Policy] = {}
    names: set[str] = set()
    for number, entry in enumerate(content["keys"], 1):
        name, digest, policy = _entry(f"entry {number} of {path}", entry, config)
        if digest in found or name in names:
            raise ConfigError(f"names and keys must be given once in {path}, {name} is not: remove one")
        found[digest] = policy
        names.add(name)
    return found


def _entry(where: str, entry: Any, config: ArmorConfig) -> tuple[str, bytes, Policy]:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"]:
        raise ConfigError(f"{where} must be a mapping with a name: add it")
    where = f"{entry['name']} in {config.armor_policy_file}"
    if unknown := [str(name) for name in entry if name not in ENTRY]:
        shown = unknown[0] if WORD.fullmatch(unknown[0]) else "another name"  # it might be a key
        raise ConfigError(f"{where} must have only {', '.join(sorted(ENTRY))}, got {shown}: correct it")
    options = _options(where, entry)
    # An answer's mode is the option's even if the option has no template to use it with
    policy = replace(replace(config.default_policy, mode=config.armor_mode), **options)
    if policy.response_template is None:
        policy = replace(policy, mode="off")
    _check_default(where, policy, config)
    return entry["name"], _digest(where, entry), policy


def _options(where: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in entry.items() if name in OPTIONS}
    if given.get("mode") is False:
        given["mode"] = "off"  # YAML reads the word off as no
    for name, allowed in CHOICES.items():
        if name in given and given[name] not in allowed:
            choices = ", ".join(str(choice).lower() for choice in allowed)
            raise ConfigError(f"{name} of {where} must be one of {choices}: correct it")
    for name in ("prompt_template", "response_template"):
        template = given.get(name)
        if template is not None and not isinstance(template, str):
            raise ConfigError(f"{name} of {where} must be a resource name or null: correct it")
        check_template(f"{name} of {where}", template)
    if "optional_filters" in given:
        filters = given["optional_filters"]
        if not isinstance(filters, list) or not all(isinstance(one, str) for one in filters):
            raise ConfigError(f"optional_filters of {where} must be a list of names: correct it")
        check_optional_filters(f"optional_filters of {where}", filters)
        given["optional_filters"] = tuple(filters)
    return given


def _digest(where: str, entry: Mapping[str, Any]) -> bytes:
    key, digest = entry.get("key"), entry.get("key_sha256")
    if isinstance(key, str) and key.strip() and digest is None:
        return hashlib.sha256(key.strip().encode()).digest()
    if isinstance(digest, str) and SHA256.fullmatch(digest.lower()) and key is None:
        return bytes.fromhex(digest)
    raise ConfigError(f"{where} must have either a key or a key_sha256 of 64 hex digits: correct it")


def _check_default(where: str, policy: Policy, config: ArmorConfig) -> None:
    for name in ("prompt_template", "response_template"):
        if getattr(policy, name) is not None and getattr(config.default_policy, name) is None:
            raise ConfigError(
                f"armor_{name} must be given, since {where} has a {name}:"
                " requests without a policy of their own would go unchecked"
            )
