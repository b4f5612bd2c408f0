"""adapter_config.json of the peft library: what of it we follow, and by name what we refuse.

An option that is not known to change nothing after training is refused: an adapter is served as it was
trained, or not at all.
"""

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from cabochon.engine.errors import BadAdapter

FILE = "adapter_config.json"
MAX_BYTES = 1 << 20
MAX_PATTERN_CHARS = 512
MAX_PATTERNS = 1024  # 27B has 322 modules
# Names, alternatives, classes and single characters repeated. What else regular expressions know, such as
# groups repeated and recursion, lets a line of text take all memory
PATTERN = re.compile(
    r"(?:(?:[\w.:,-]|\\[.dwsDWS-]|\[\^?[\w.-]+\])[*+?]?|[|^$]|\((?:\?:|(?!\?))|\)(?![*+?{]))*+"
)
MATCHING_S = 1.0  # for all patterns on all modules: a regular expression may take for ever
SHOWN_CHARS = 100  # of a value from the file, in a message
MAX_PATH_CHARS = 1024  # of the base model's
HARMLESS = {  # of every version of peft up to 0.21: they say where it came from, or matter in training alone
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
    "velora_config",
}  # fmt: skip
FOLLOWED = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias",
    "init_lora_weights",
}  # fmt: skip
BASE_KEEPING_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
MERGE = "train without it, or merge it into a full checkpoint with peft's merge_and_unload"

Pattern = dict[str, float]


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What a LoRA adapter's scales and ranks follow from. Modules are named as in the base model."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Pattern
    alpha_pattern: Pattern
    base_model: str | None
    target_modules: str  # for people alone: the tensors tell

    def lookup(self, pattern: Pattern, default: float) -> Callable[[str], float]:
        """The value for a module, by peft's rule: the first key that matches its name or an end of it.

        Raises BadAdapter if a key is no regular expression, or matching takes too long.
        """
        try:
            compiled = [(regex.compile(rf"(.*\.)?({key})$"), value) for key, value in pattern.items()]
        except (regex.error, OverflowError, RecursionError) as error:
            raise refused(
                f"keys of rank_pattern and alpha_pattern in {FILE} must be names of modules or plain regular"
                " expressions, one is no valid one: correct it"
            ) from error
        ends_s = time.thread_time() + MATCHING_S  # not by the clock: others may have the cores

        def value_of(module: str) -> float:
            for expression, value in compiled:
                left_s = ends_s - time.thread_time()
                try:
                    if left_s <= 0:
                        raise TimeoutError
                    if expression.match(module, concurrent=True, timeout=left_s + MATCHING_S):
                        return value
                except TimeoutError:
                    raise refused(
                        f"rank_pattern and alpha_pattern in {FILE} must be matched within {MATCHING_S:g} s,"
                        " they take longer: use names of modules"
                    ) from None
            return default

        return value_of

    def scale(self, alpha: float, rank: int) -> float:
        """By which b · a is multiplied."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def refused(message: str) -> BadAdapter:
    """A BadAdapter whose param is the path."""
    return BadAdapter(message, "lora_path")


def shown(value: object, max_chars: int = SHOWN_CHARS) -> str:
    """What a file says, fit for a message: short, on one line, and nothing that UTF-8 does not have."""
    try:
        whole = str(value)
    except RecursionError:  # lists in lists, as deep as JSON is read
        whole = "[[…]]"
    text = "".join(char if char.isprintable() else "?" for char in whole[: max_chars + 1])
    return text if len(text) <= max_chars else f"{text[:max_chars]}…"


def read_config(directory: Path) -> PeftConfig:
    """Raises BadAdapter."""
    raw = _read_json(directory)
    if raw.get("peft_type") != "LORA":
        raise refused(
            f"peft_type in {FILE} must be LORA, got {shown(raw.get('peft_type'))}: train a LoRA adapter"
        )
    _refuse_what_we_do_not_run(raw)
    base_model, targets = raw.get("base_model_name_or_path"), raw.get("target_modules")
    return PeftConfig(
        rank=int(_number(raw, "r", is_rank=True)),
        alpha=_number(raw, "lora_alpha"),
        use_rslora=bool(raw.get("use_rslora")),
        rank_pattern=_pattern(raw, "rank_pattern", is_rank=True),
        alpha_pattern=_pattern(raw, "alpha_pattern"),
        base_model=shown(base_model, MAX_PATH_CHARS) if isinstance(base_model, str) and base_model else None,
        target_modules=shown(", ".join(map(str, targets)) if isinstance(targets, list) else targets),
    )


def _read_json(directory: Path) -> dict[str, Any]:
    path = directory / FILE
    if not path.is_file():
        raise refused(
            f"an adapter's directory must have {FILE}, {directory} has none: give one that peft saved"
        )
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        raw = json.loads(content) if len(content) <= MAX_BYTES else None
    except OSError as error:
        raise refused(f"{FILE} must be readable, it is not ({error.strerror}): correct its access") from error
    except (ValueError, RecursionError) as error:
        raise refused(f"{FILE} must be JSON, it is not: save it or copy it again") from error
    if not isinstance(raw, dict):
        raise refused(f"{FILE} must be a JSON object of at most {MAX_BYTES} bytes, it is not: save it again")
    return raw


def _refuse_what_we_do_not_run(raw: dict[str, Any]) -> None:
    bias = raw.get("bias")
    if bias not in ("none", None):
        raise refused(f"bias in {FILE} must be none, got {shown(bias)}: {MERGE}")
    init = raw.get("init_lora_weights")
    if init not in BASE_KEEPING_INITS:
        raise refused(
            f"init_lora_weights in {FILE} must leave the base model as it is, got {shown(init)}: save with"
            " peft's path_initial_model_for_weight_conversion, or merge it into a full checkpoint"
        )
    for name, value in raw.items():
        is_off = value is None or value is False or value in ("", [], {})
        if not is_off and name not in HARMLESS | FOLLOWED:
            raise refused(
                f"{FILE} must have no options beyond plain LoRA, got {shown(name)} = {shown(value)}: {MERGE}"
            )


def _number(raw: dict[str, Any], name: str, *, is_rank: bool = False, of: str = "") -> float:
    """A finite number, or a rank: a whole number of at least 1."""
    value = raw.get(name)
    if is_rank:
        if type(value) is int and 1 <= value < 1 << 31:
            return value
    elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30:  # not NaN
        return float(value)
    kind = "a whole number of at least 1" if is_rank else "a finite number"
    raise refused(f"{of or name} in {FILE} must be {kind}, got {shown(value)}: save it again")


def _pattern(raw: dict[str, Any], name: str, *, is_rank: bool = False) -> Pattern:
    pattern = raw.get(name) or {}
    is_map = isinstance(pattern, dict) and len(pattern) <= MAX_PATTERNS
    if not is_map or not all(_is_plain(key) for key in pattern):
        raise refused(
            f"{name} in {FILE} must map at most {MAX_PATTERNS} names of modules, or plain regular expressions"
            f" of at most {MAX_PATTERN_CHARS} characters, to numbers, it does not: use names of modules"
        )
    return {key: _number(pattern, key, is_rank=is_rank, of=f"each value of {name}") for key in pattern}


def _is_plain(pattern: str) -> bool:
    return len(pattern) <= MAX_PATTERN_CHARS and PATTERN.fullmatch(pattern) is not None
