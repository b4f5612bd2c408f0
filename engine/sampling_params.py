"""How the tokens of one request are chosen. Knows ranges, not vocabularies: the engine checks those."""

from dataclasses import dataclass, field
from typing import Literal

from cabochon.engine.errors import BadSampling

MAX_LOGIT_BIAS = 1024  # entries; OpenAI documents 300
MAX_STOP_TOKENS = 256
MAX_GRAMMAR_CHARS = 2**18
JSON_WHITESPACE = r"[ \n]{0,8}"  # in enforced JSON: bounded, or a model may write it until its tokens run out
MAX_LOGPROBS = 20  # alternatives per token; OpenAI's limit
MAX_SEED = 2**63 - 1
MAX_TOP_K = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What the output must be. lark: llguidance's dialect. `param`: the field that errors name."""

    kind: Literal["json_schema", "regex", "lark", "lark_or_gbnf"]
    text: str
    param: str = field(default="structured_outputs", compare=False)

    def __post_init__(self) -> None:
        size = len(self.text)
        _check(size <= MAX_GRAMMAR_CHARS, self.param, f"of at most {MAX_GRAMMAR_CHARS} characters", size)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Parameters of one request, validated. Raises BadSampling (with `param`) on a value out of range.

    In this order: final softcap, bias and penalties, temperature, top-k, top-p and min-p, Gumbel noise.
    """

    max_tokens: int | None = None  # output tokens at most; None: as many as the context holds
    min_tokens: int = 0  # no EOS or stop token before that many output tokens
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # (0, 1]; 1: off
    min_p: float = 0.0  # [0, 1]; 0: off; relative to the most likely token
    seed: int = 0  # the noise is a function of (seed, position, token id) alone
    repetition_penalty: float = 1.0  # > 0; divides positive logits of seen tokens (prompt and output)
    presence_penalty: float = 0.0  # [-2, 2]; subtracted once per token seen in the output
    frequency_penalty: float = 0.0  # [-2, 2]; subtracted per occurrence in the output
    logit_bias: dict[int, float] = field(
        default_factory=dict
    )  # token id -> [-100, 100], added after the softcap
    stop_token_ids: tuple[int, ...] = ()  # beside the model's EOS ids
    ignore_eos: bool = False  # the model's EOS ids do not end the request
    grammar: Grammar | None = None  # the output follows it, and ends where it must
    logprobs: int | None = None  # alternatives to report with each output token (0: itself alone); None: off
    prompt_logprobs: int | None = None  # the same for each prompt token; its prefix is computed anew

    def __post_init__(self) -> None:
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        _check(self.min_tokens >= 0, "min_tokens", "at least 0", self.min_tokens)
        if self.max_tokens is not None:
            _check(
                self.min_tokens <= self.max_tokens,
                "min_tokens",
                f"at most max_tokens = {self.max_tokens}",
                self.min_tokens,
            )
        _check(_in(self.temperature, 0, 100), "temperature", "in [0, 100]", self.temperature)
        _check(0 <= self.top_k <= MAX_TOP_K, "top_k", "0 (off) or more, below 2^31", self.top_k)
        _check(_in(self.top_p, 0, 1) and self.top_p > 0, "top_p", "in (0, 1]", self.top_p)
        _check(_in(self.min_p, 0, 1), "min_p", "in [0, 1]", self.min_p)
        _check(0 <= self.seed <= MAX_SEED, "seed", "in [0, 2^63)", self.seed)
        _check(
            _in(self.repetition_penalty, 0, 100) and self.repetition_penalty > 0,
            "repetition_penalty",
            "in (0, 100]",
            self.repetition_penalty,
        )
        _check(_in(self.presence_penalty, -2, 2), "presence_penalty", "in [-2, 2]", self.presence_penalty)
        _check(_in(self.frequency_penalty, -2, 2), "frequency_penalty", "in [-2, 2]", self.frequency_penalty)
        _check(
            len(self.logit_bias) <= MAX_LOGIT_BIAS,
            "logit_bias",
            f"of at most {MAX_LOGIT_BIAS} tokens",
            len(self.logit_bias),
        )
        for bias in self.logit_bias.values():
            _check(_in(bias, -100, 100), "logit_bias", "made of values in [-100, 100]", bias)
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            _check(count is None or 0 <= count <= MAX_LOGPROBS, name, f"in [0, {MAX_LOGPROBS}]", count)
        _check(
            len(self.stop_token_ids) <= MAX_STOP_TOKENS,
            "stop_token_ids",
            f"of at most {MAX_STOP_TOKENS} ids",
            len(self.stop_token_ids),
        )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5  # 0, or so small that logits / temperature could leave fp32

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _in(value: float, low: float, high: float) -> bool:
    return low <= value <= high  # NaN is in no range


def _check(is_valid: bool, param: str, must_be: str, given: object) -> None:
    if not is_valid:
        raise BadSampling(f"{param} must be {must_be}, got {given}: correct it or leave it out", param)
