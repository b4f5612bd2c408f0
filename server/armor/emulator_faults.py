"""What goes wrong in the emulator, and how long it takes: which fault strikes which call. No protos here."""

import dataclasses
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from random import Random
from statistics import NormalDist
from typing import Any, Literal, get_args

from cabochon.engine.errors import ConfigError
from cabochon.server.armor.emulator_templates import FILTERS

Target = Literal["prompt", "response", "template"]
STATUSES = (
    "cancelled", "unknown", "invalid_argument", "deadline_exceeded", "not_found", "already_exists",
    "permission_denied", "resource_exhausted", "failed_precondition", "aborted", "out_of_range",
    "unimplemented", "internal", "unavailable", "data_loss", "unauthenticated",
)  # fmt: skip
TRANSPORT = ("slow", "hang", "malformed", "reset", "goaway", "drain")
CONTENT = ("empty", "partial", "failure", "missing", "unknown_enum", "unknown_filter")
KINDS = (*TRANSPORT, *CONTENT, *STATUSES)
MAX_LATENCY_S = 3600.0
_P99 = NormalDist().inv_cdf(0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """How long an answer is held: the median, or log-normal around it if there is a 99th percentile."""

    median_s: float = 0.0
    p99_s: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.median_s <= MAX_LATENCY_S:
            raise ConfigError(f"latency must be in [0, {MAX_LATENCY_S:g}] s, got {self.median_s}: change it")
        if self.p99_s is not None and not 0 < self.median_s < self.p99_s <= MAX_LATENCY_S:
            raise ConfigError(
                f"latency must have 0 < median < p99 <= {MAX_LATENCY_S:g} s,"
                f" got {self.median_s} and {self.p99_s}: change them"
            )

    def draw(self, random: Random) -> float:
        """Seconds of one call, at most MAX_LATENCY_S."""
        if self.p99_s is None:
            return self.median_s
        sigma = math.log(self.p99_s / self.median_s) / _P99
        return min(MAX_LATENCY_S, random.lognormvariate(math.log(self.median_s), sigma))

    def __str__(self) -> str:
        if self.p99_s is None:
            return f"{self.median_s:g}"
        return f"lognormal:median={self.median_s:g},p99={self.p99_s:g}"


NO_LATENCY = Latency()


def parse_latency(text: str) -> Latency:
    """text: seconds, or lognormal:median=SECONDS,p99=SECONDS. Raises ConfigError."""
    shape, _, rest = text.rpartition(":")
    try:
        if not shape:
            return Latency(median_s=float(text))
        fields = dict(word.split("=") for word in rest.split(","))
        if shape == "lognormal" and fields.keys() == {"median", "p99"}:
            return Latency(median_s=float(fields["median"]), p99_s=float(fields["p99"]))
    except ValueError:
        pass
    raise ConfigError(
        f"latency must be seconds or lognormal:median=SECONDS,p99=SECONDS, got {text!r}: write one of them"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong, and with which calls. Raises ConfigError."""

    kind: str  # of KINDS
    stage: Target | None = None  # None: prompts and answers
    containing: str = ""  # only texts with this in them
    after: int = 0  # so many calls that fit are let through first
    times: int | None = None  # then so many are struck; None: all
    probability: float = 1.0  # of each of those
    latency: Latency = NO_LATENCY  # before it strikes, beside that of every call
    filter: str = "pi_and_jailbreak"  # of partial, missing, unknown_enum; csam if the template lacks it

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("kind", self.kind, KINDS),
            ("stage", self.stage, (None, *get_args(Target))),
            ("filter", self.filter, FILTERS),
        ):
            if value not in choices:
                shown = ", ".join(choice for choice in choices if choice is not None)
                raise ConfigError(f"{name} of a fault must be one of {shown}, got {value!r}: correct it")
        if not _is_count(self.after, 0) or not (self.times is None or _is_count(self.times, 1)):
            raise ConfigError(
                f"a fault must have after >= 0 and times >= 1, got {self.after} and {self.times}: change them"
            )
        if not 0 < self.probability <= 1:
            raise ConfigError(f"probability of a fault must be in (0, 1], got {self.probability}: change it")
        if self.kind == "slow" and self.latency == NO_LATENCY:
            raise ConfigError("a slow fault must have a latency, got none: add latency=SECONDS")
        if self.stage == "template" and (self.kind in CONTENT or self.containing):
            raise ConfigError(
                f"a fault of templates must need no text, got {self.kind}: use another kind, no containing"
            )


def make_fault(given: "Fault | str | Mapping[str, Any]") -> Fault:
    """given: a fault, its fields, or `KIND NAME=VALUE ...`, quoted as in a shell. Raises ConfigError."""
    if isinstance(given, Fault):
        return given
    if isinstance(given, str):
        given = _split(given)
    if not isinstance(given, Mapping):
        raise ConfigError(f"a fault must be words or an object, got {type(given).__name__}: correct it")
    types = {field.name: field for field in dataclasses.fields(Fault)}
    if unknown := sorted(set(map(str, given)) - set(types)):
        raise ConfigError(f"a fault must have fields of {', '.join(types)}, got {unknown[0]!r}: correct it")
    if "kind" not in given:
        raise ConfigError(f"a fault must have a kind, one of {', '.join(KINDS)}, got none: add it")
    try:
        return Fault(**{name: _value(name, value) for name, value in given.items()})
    except (ValueError, TypeError):
        raise ConfigError(
            "a fault must have numbers for after, times, probability and else words, got another: correct it"
        ) from None


class Faults:
    """Decides which fault strikes a call: the first that does. Each counts all calls that fit it."""

    def __init__(self, faults: Iterable[Fault], random: Random) -> None:
        self._states = [_State(fault) for fault in faults]
        self._random = random

    def strike(self, stage: Target, text: str) -> Fault | None:
        """The fault of a call that begins now."""
        struck: _State | None = None
        for state in self._states:
            if not _fits(state.fault, stage, text):
                continue
            state.num_seen += 1
            if struck is None and state.is_due() and self._random.random() < state.fault.probability:
                struck = state
        if struck is None:
            return None
        struck.num_struck += 1
        return struck.fault

    def as_dicts(self) -> list[dict[str, Any]]:
        """Each fault, with how many calls fitted it and how many it struck."""
        return [
            {
                **dataclasses.asdict(state.fault),
                "latency": str(state.fault.latency),
                "seen": state.num_seen,
                "struck": state.num_struck,
            }
            for state in self._states
        ]


@dataclass(slots=True)
class _State:
    fault: Fault
    num_seen: int = 0
    num_struck: int = 0

    def is_due(self) -> bool:
        times = self.fault.times
        return self.num_seen > self.fault.after and (times is None or self.num_struck < times)


def _fits(fault: Fault, stage: Target, text: str) -> bool:
    is_of_stage = stage == fault.stage if fault.stage is not None else stage != "template"
    return is_of_stage and fault.containing in text


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _split(text: str) -> dict[str, str]:
    try:
        kind, *words = shlex.split(text)
        return {"kind": kind, **{name: value for name, value in (word.split("=", 1) for word in words)}}
    except ValueError:
        raise ConfigError(f"a fault must be `KIND NAME=VALUE ...`, got {text!r}: correct it") from None


def _value(name: str, value: Any) -> Any:
    if name == "containing" and not isinstance(value, str):
        raise TypeError
    if name == "latency" and not isinstance(value, Latency):
        return parse_latency(str(value))
    if isinstance(value, str) and name in ("after", "times"):
        return int(value)
    return float(value) if name == "probability" else value
