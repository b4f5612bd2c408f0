"""Offline use: the same engine in this process, without a server.

from cabochon.engine.llm import LLM
print(LLM("demo").generate(["The capital of France is"])[0].text)
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cabochon.engine.config import EngineConfig
from cabochon.engine.detokenizer import Detokenizer, TokenBytes
from cabochon.engine.errors import ComputeError
from cabochon.engine.load import load_engine
from cabochon.engine.messages import AdapterInfo, FinishReason, GenerateRequest, RequestOutput, TokenLogprobs
from cabochon.engine.models.source import locate
from cabochon.engine.sampling_params import SamplingParams


@dataclass(slots=True)
class Completion:
    """One answer. token_ids end with the stop token, if one ended it; text does not show it."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of token_ids, if asked for
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of prompt_ids[1:], if asked for


class LLM:
    """A loaded model. Options are those of EngineConfig: LLM("demo", dtype="fp32", max_seqs=8)."""

    def __init__(self, model: str = "demo", **options: Any) -> None:
        """Raises ModelError or ConfigError."""
        config = EngineConfig(model=model, **options)
        directory = locate(config.model, revision=config.revision, cache_dir=config.cache_dir)
        self.tokenizer = Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
        self._token_bytes = TokenBytes(self.tokenizer)
        self.core, self.info = load_engine(config, directory)
        while self.core.get_ready():  # a server does this while it waits, a script may never be idle
            pass
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stop: Sequence[str] = (),
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[Completion]:
        """Continue every prompt (text, or token ids). One SamplingParams for all or one each; default greedy.

        adapter: the name of a loaded one, None for the base model; for all, or one each. Raises RequestError
        if a prompt or its parameters are refused: then nothing is generated. ComputeError
        if the model gives NaN.
        """
        each = self._params(params, len(prompts))
        adapters = [adapter] * len(prompts) if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(adapters) != len(prompts):
            raise ValueError(f"adapter must be one for all or one per prompt ({len(prompts)}): correct it")
        open_ones: dict[str, tuple[Completion, Detokenizer]] = {}
        try:
            for prompt, one, name in zip(prompts, each, adapters, strict=True):
                ids = self.tokenizer.encode(prompt).ids if isinstance(prompt, str) else list(prompt)
                request_id = str(next(self._ids))
                request = GenerateRequest(request_id=request_id, prompt_ids=ids, params=one, adapter=name)
                self.core.add(request)
                open_ones[request_id] = Completion(ids), Detokenizer(self._token_bytes, stop=stop)
        except BaseException:
            self._abort(open_ones)
            raise
        completions = [completion for completion, _ in open_ones.values()]
        self._run(open_ones)
        return completions

    def load_adapter(self, name: str, path: str | Path) -> AdapterInfo:
        """Read a PEFT directory; `generate` may then name it. Raises BadAdapter."""
        return self.core.adapters.load(name, str(path))

    def unload_adapter(self, name: str) -> None:
        """Raises UnknownAdapter."""
        self.core.drop_adapter(name)
        while self.core.has_work:  # nothing runs between two calls of `generate`
            self.core.step()

    def _run(self, open_ones: dict[str, tuple[Completion, Detokenizer]]) -> None:
        try:
            while open_ones:
                outputs, refusals = self.core.step()
                for output in outputs:
                    if self._take(*open_ones[output.request_id], output):
                        del open_ones[output.request_id]
                if refusals:
                    raise ComputeError(refusals[0].message)
        finally:
            self._abort(open_ones)

    def _take(self, completion: Completion, detokenizer: Detokenizer, output: RequestOutput) -> bool:
        """Add an output. Returns whether the completion is finished."""
        completion.token_ids += output.token_ids
        completion.logprobs += output.logprobs or ()
        completion.prompt_logprobs += output.prompt_logprobs or ()
        completion.cached_tokens = output.cached_tokens
        shown = output.token_ids[:-1] if output.stop_token_id is not None else output.token_ids
        completion.text += detokenizer.feed(shown)
        completion.finish_reason = output.finish_reason
        if output.finish_reason is not None:
            completion.text += detokenizer.flush()
        if detokenizer.stop_string is not None:
            completion.finish_reason = "stop"
            self.core.abort(output.request_id)
        return completion.finish_reason is not None

    def _abort(self, open_ones: dict[str, tuple[Completion, Detokenizer]]) -> None:
        for request_id in open_ones:
            self.core.abort(request_id)

    @staticmethod
    def _params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or SamplingParams(temperature=0)] * count
        if len(params) != count:
            raise ValueError(f"params must be one for all or one per prompt ({count}), got {len(params)}")
        return list(params)
