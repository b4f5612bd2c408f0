"""Our engine, offline, as a peer among peers: options are those of EngineConfig."""

from typing import Any

from worker import Generate, serve

from cabochon.engine.llm import LLM
from cabochon.engine.sampling_params import SamplingParams


def load(options: dict[str, Any]) -> Generate:
    """No prefix cache: every engine computes every prompt."""
    llm = LLM(**options, dtype="bf16", kv_cache_gib=1.0, prefix_caching=False)

    def generate(prompts: list[list[int]], output_tokens: int) -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
        return [len(completion.token_ids) for completion in llm.generate(prompts, params)]

    return generate


if __name__ == "__main__":
    serve(load, ("torch",))
