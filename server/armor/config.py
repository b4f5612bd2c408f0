"""Options of Model Armor: frozen, flat, each with its unit. Policies of single API keys are in a file."""

import re
from dataclasses import dataclass

from cabochon.engine.errors import ConfigError
from cabochon.server.armor.verdicts import Mode, Policy

TEMPLATE = re.compile(r"projects/[^/]+/locations/[a-z0-9-]+/templates/[^/]+")


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
            value = getattr(self, name)
            if value is not None and not TEMPLATE.fullmatch(value):
                raise ConfigError(
                    f"{name} must be projects/PROJECT/locations/LOCATION/templates/TEMPLATE, got {value!r}:"
                    " copy its resource name"
                )

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
