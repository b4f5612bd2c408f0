"""What passes between the server and the engine: dataclasses, and a Struct for what comes with every token.

Times are time.monotonic() seconds, which on Linux all processes of a machine share. Imports no torch.
"""

from dataclasses import dataclass, field
from typing import Literal, Self

from cabochon.engine.config import EngineConfig
from cabochon.engine.errors import EngineError
from cabochon.engine.sampling_params import SamplingParams

try:
    from msgspec import Struct
except ModuleNotFoundError:  # without it a machine computes (benchmarks/gpu), and sends nothing

    class Struct:  # type: ignore[no-redef]
        def __init_subclass__(cls, **options: object) -> None:
            dataclass(kw_only=True)(cls)


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One prompt and how to continue it. Smaller `priority` is served first; ties by arrival."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    priority: int = 0
    adapter: str | None = None
    cache_salt: str | None = None  # requests share cached pages only with those of the same salt
    is_private: bool = False  # its pages are offered to no other request until publish(request_id)
    arrival_s: float = 0.0


@dataclass(slots=True)
class TokenLogprobs:
    """Log probability of a token after the final softcap, before bias, penalties and temperature.

    top_ids, top_logprobs: the likeliest tokens in descending order, as many as were asked for.
    """

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class RequestOutput(Struct, kw_only=True, array_like=True, gc=False):
    """New tokens of one request. The last one has a finish_reason; its token_ids may be empty.

    No dataclass: one is made, sent and read for every token, which takes a third of the time, in a quarter of
    the bytes. In no cycle, and so unknown to the collector.

    A stop token (EOS, stop_token_ids) is part of token_ids and is named in `stop_token_id`.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    cached_tokens: int = 0  # prompt tokens that came from the prefix cache; the same in every output
    scheduled_s: float = 0.0  # when it was first scheduled
    first_token_s: float = 0.0  # when its first token was sampled
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids, if asked for
    prompt_logprobs: list[TokenLogprobs] | None = None  # of the second prompt token on; with the first output


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The engine's gauges and counters (since start) after a step. Pages are those of the one pool."""

    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0  # prompt tokens of accepted requests that are not computed yet
    prefill_tokens_per_s: float = 0.0  # measured, smoothed; 0 before the first prefill
    pages_total: int = 0
    pages_used: int = 0  # referenced by running requests
    pages_cached: int = 0  # evictable, kept for prefix hits
    steps: int = 0
    step_tokens: int = 0  # tokens of the last step
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits: int = 0  # prompt tokens found there
    preemptions: int = 0
    resident_adapters: list[str] = field(default_factory=list)  # in a slot of the device, in use or not
    waiting_adapters: list[str] = field(
        default_factory=list
    )  # of waiting requests; names may be in both, and twice

    @property
    def kv_usage(self) -> float:
        """Pages referenced by live requests over all pages, 0..1: evictable cached pages count as free."""
        return self.pages_used / self.pages_total if self.pages_total else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """A loaded LoRA adapter."""

    name: str
    path: str
    rank: int
    num_bytes: int  # of its weights, in host memory and in a slot
    base_model: str | None  # what its configuration says it was trained on


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What the server must know of a loaded model."""

    model: str  # as given: demo, a directory or a Hub id
    architecture: str  # "Gemma2ForCausalLM", ...
    model_dir: str
    dtype: str  # "bf16" or "fp32"
    device: str
    attention_backend: str
    vocab_size: int
    max_model_len: int  # prompt and output tokens of one request together, at most
    max_seqs: int
    eos_token_ids: list[int]
    page_tokens: int
    num_pages: int
    num_groups: int  # layer groups: num_pages / num_groups · page_tokens is the capacity in tokens
    kv_bytes: int
    weight_bytes: int
    load_s: float
    quantization: str = "none"  # of weights: "none", "fp8" or "int8"
    max_loras: int = 0  # adapters in one batch; 0: it takes none
    adapters: list[AdapterInfo] = field(default_factory=list)  # those of lora_modules

    @property
    def kv_capacity_tokens(self) -> int:
        return self.num_pages // self.num_groups * self.page_tokens


# Server to engine.


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The first message: what to load."""

    config: EngineConfig
    model_dir: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Start a request."""

    request: GenerateRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """End a request."""

    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """Let others share the pages of a private request."""

    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadAdapter:
    """Read an adapter and serve it under its name; answered by AdapterReply.

    replace: it may take the name of a loaded one, which its running requests keep until they end.
    """

    reply_to: int
    name: str
    path: str
    replace: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadAdapter:
    """Serve an adapter no more, and forget it when its running requests have ended."""

    reply_to: int
    name: str


# Engine to server.


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """Progress of loading the weights."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The model is loaded."""

    info: EngineInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """A line for the server's log, which knows the format and the level that are wanted."""

    level: int
    logger: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The engine could not start: class name in engine/errors.py, and message."""

    error: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A request the engine did not accept or could not finish: class name in engine/errors.py."""

    request_id: str
    error: str
    message: str
    param: str | None = None

    @classmethod
    def of(cls, request_id: str, error: EngineError) -> Self:
        """The error as a message."""
        return cls(
            request_id=request_id,
            error=type(error).__name__,
            message=str(error),
            param=getattr(error, "param", None),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReply:
    """What became of a LoadAdapter (info) or UnloadAdapter (no info); refusal: it changed nothing."""

    reply_to: int
    info: AdapterInfo | None = None
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """All that one step produced, and the gauges after it."""

    outputs: list[RequestOutput] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    stats: EngineStats = field(default_factory=EngineStats)
