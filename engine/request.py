"""One request inside the engine: what was asked, and how far it is."""

from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cabochon.engine.adapters.slots import LoadedAdapter
from cabochon.engine.grammars import Matcher
from cabochon.engine.messages import FinishReason, GenerateRequest, RequestOutput, TokenLogprobs


@dataclass(slots=True, eq=False)
class Request:
    """`row` is None while it waits (new, or preempted): its known tokens then stand in `token_ids`.

    While it runs, the row's token_ids are the truth, and `token_ids` is what was known at admission.
    """

    message: GenerateRequest
    arrival_idx: int  # order of arrival, the tie-breaker of priorities
    max_tokens: int  # output tokens at most, settled against the context
    stop_ids: frozenset[int]  # ids that end it (EOS unless ignored, stop_token_ids)
    token_ids: NDArray[np.int32]
    row: int | None = None
    is_long: bool = False  # whether its prefill is rationed, since it got its row
    num_output: int = 0
    cached_tokens: int | None = None  # prompt tokens found in the prefix cache at first admission
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    page_hashes: list[bytes] = field(default_factory=list)  # root, then chain hashes of its full pages
    is_published: bool = True
    matcher: Matcher | None = None  # if a grammar binds the output
    adapter: LoadedAdapter | None = None  # None: the base model
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of its second token on

    @classmethod
    def of(
        cls,
        message: GenerateRequest,
        arrival_idx: int,
        max_tokens: int,
        eos_ids: frozenset[int],
        matcher: Matcher | None,
        adapter: LoadedAdapter | None,
    ) -> Self:
        """As it waits for the first time."""
        params = message.params
        return cls(
            message=message,
            arrival_idx=arrival_idx,
            max_tokens=max_tokens,
            stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids),
            token_ids=np.array(message.prompt_ids, np.int32),
            is_published=not message.is_private,
            matcher=matcher,
            adapter=adapter,
        )

    @property
    def request_id(self) -> str:
        return self.message.request_id

    @property
    def is_late(self) -> bool:
        """Whether its next token cannot be chosen yet."""
        return self.matcher is not None and self.matcher.is_late

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller is served first and preempted last."""
        return (self.message.priority, self.arrival_idx)

    def ends_with(self, token_id: int) -> FinishReason | None:
        """Why its newest token is its last, if it is; before min_tokens a stop token is a token."""
        if token_id in self.stop_ids and self.num_output > self.message.params.min_tokens:
            return "stop"
        return "length" if self.num_output >= self.max_tokens else None

    def newest(self, token_id: int) -> RequestOutput:
        """The message of a token that may be its last."""
        reason = self.ends_with(token_id)
        return self.output([token_id], reason, token_id if reason == "stop" else None)

    def output(
        self,
        token_ids: list[int],
        finish_reason: FinishReason | None = None,
        stop_token_id: int | None = None,
    ) -> RequestOutput:
        """Its message of a step."""
        return RequestOutput(
            request_id=self.request_id,
            token_ids=token_ids,
            finish_reason=finish_reason,
            stop_token_id=stop_token_id,
            cached_tokens=self.cached_tokens or 0,
            scheduled_s=self.scheduled_s,
            first_token_s=self.first_token_s,
        )
