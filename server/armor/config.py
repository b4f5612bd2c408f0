"""Options of Model Armor: frozen, flat, each with its unit. Policies of single API keys are in a file."""

import ipaddress
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from cabochon.engine.errors import ConfigError
from cabochon.server.armor.verdicts import Mode, Policy

TEMPLATE = re.compile(r"projects/[^/\s]+/locations/([a-z0-9-]+)/templates/[^/\s]+")
ENDPOINT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:\d{1,5})?")  # HOST[:PORT]
MAY_BE_OPTIONAL = ("rai", "sdp", "malicious_uris")  # never csam, nor pi_and_jailbreak
AT_LEAST_ONE = (
    "armor_quota_per_min",
    "armor_max_replicas",
    "armor_first_window_chars",
    "armor_max_window_chars",
    "armor_hold_back_chars",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmorConfig:
    """What the guard is told. Without a template and a policy file it is off. Raises ConfigError."""

    armor_prompt_template: str | None = None  # projects/P/locations/L/templates/T; None: prompts go unchecked
    armor_response_template: str | None = None  # the same for answers; better another than that of prompts
    armor_mode: Mode = "window"  # answers: whole (strict), held back a little, cut late (optimistic), or off
    armor_fail_open: bool = False  # let text pass that could not be checked, instead of a 503
    armor_reveal: bool = False  # tell clients which family of filters blocked
    armor_optional_filters: tuple[str, ...] = ()  # that the service may skip; csam, pi_and_jailbreak never
    armor_policy_file: str | None = None  # YAML: policies of single API keys, read again when it changes
    armor_endpoint: str | None = None  # HOST[:PORT] instead of modelarmor.LOCATION.rep.googleapis.com
    armor_insecure: bool = False  # plain text to the emulator; only to a loopback address
    armor_prompt_timeout_s: float = 0.8  # of a call on a prompt
    armor_window_timeout_s: float = 1.0  # of a call on an answer
    armor_total_timeout_s: float = 1.5  # of a check with its one retry
    armor_quota_per_min: int = 1200  # calls of the whole project
    armor_max_replicas: int = 1  # that share the quota in equal parts
    armor_first_window_chars: int = 160  # of an answer in window mode; each next one is twice as long, up to
    armor_max_window_chars: int = 512  # this many
    armor_hold_back_chars: int = 64  # at the end of a window that are not released: the longest that may leak
    armor_context_chars: int = 256  # of the released text that are checked again with each window
    armor_max_hold_s: float = 2.0  # text waits no longer for a window to fill
    armor_cache_s: float = 600.0  # the verdict on a prompt's text is kept that long; 0: not at all
    armor_serial_queue_s: float = 5.0  # predicted wait above it: a prompt is checked before the engine has it

    def __post_init__(self) -> None:
        for name in ("armor_prompt_template", "armor_response_template"):
            check_template(name, getattr(self, name))
        check_optional_filters("armor_optional_filters", self.armor_optional_filters)
        if self.armor_policy_file == "":
            raise ConfigError("armor_policy_file must name a file, got an empty name: leave it out")
        self._check_endpoint()
        self._check_times()
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}: raise it")
        if self.armor_context_chars < 0:
            raise ConfigError(
                f"armor_context_chars must be 0 or more, got {self.armor_context_chars}: raise it"
            )
        if self.armor_max_window_chars < self.armor_first_window_chars:
            raise ConfigError(
                f"armor_max_window_chars must be at least armor_first_window_chars,"
                f" got {self.armor_max_window_chars} and {self.armor_first_window_chars}: raise it"
            )

    def _check_endpoint(self) -> None:
        endpoint = self.armor_endpoint
        if endpoint is not None and not ENDPOINT.fullmatch(endpoint):
            raise ConfigError(f"armor_endpoint must be HOST or HOST:PORT, got {endpoint!r}: correct it")
        if self.armor_insecure and not (endpoint is not None and is_loopback(endpoint)):
            raise ConfigError(
                "armor_insecure must go with an armor_endpoint on this machine, such as 127.0.0.1:8100,"
                f" got {endpoint or 'none'}: leave it out, or prompts would travel as plain text"
            )

    def _check_times(self) -> None:
        for name in (
            "armor_prompt_timeout_s",
            "armor_window_timeout_s",
            "armor_total_timeout_s",
            "armor_max_hold_s",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a positive number, got {getattr(self, name)}: correct it")
        for name in ("armor_prompt_timeout_s", "armor_window_timeout_s"):
            if getattr(self, name) > self.armor_total_timeout_s:
                raise ConfigError(
                    f"{name} must be at most armor_total_timeout_s,"
                    f" got {getattr(self, name)} and {self.armor_total_timeout_s}: lower it"
                )
        for name in ("armor_cache_s", "armor_serial_queue_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be 0 or more seconds, got {getattr(self, name)}: correct it")

    @property
    def is_on(self) -> bool:
        """Whether anything is to be checked."""
        return bool(self.armor_prompt_template or self.armor_response_template or self.armor_policy_file)

    @property
    def default_policy(self) -> Policy:
        """Of requests without a policy of their own."""
        return Policy(
            prompt_template=self.armor_prompt_template,
            response_template=self.armor_response_template,
            mode=self.armor_mode if self.armor_response_template is not None else "off",
            on_unchecked="open" if self.armor_fail_open else "closed",
            reveal=self.armor_reveal,
            optional_filters=self.armor_optional_filters,
        )


def check_template(name: str, template: str | None) -> None:
    """Raises ConfigError if it is not a full resource name. name: of the option, for the message."""
    if template is not None and not TEMPLATE.fullmatch(template):
        raise ConfigError(
            f"{name} must be projects/PROJECT/locations/LOCATION/templates/TEMPLATE, got {template!r}:"
            " copy its resource name"
        )


def check_optional_filters(name: str, filters: Iterable[str]) -> None:
    """Raises ConfigError on one that is unknown or must never be skipped. name: of the option."""
    for given in filters:
        if given not in MAY_BE_OPTIONAL:
            raise ConfigError(
                f"{name} must be among {', '.join(MAY_BE_OPTIONAL)}, got {given!r}: leave it out"
                " (csam and pi_and_jailbreak are never optional)"
            )


def is_loopback(endpoint: str) -> bool:
    """Whether HOST[:PORT] is this machine: an address of its own loopback, or localhost."""
    matched = ENDPOINT.fullmatch(endpoint)
    host = matched[1].strip("[]") if matched else ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
