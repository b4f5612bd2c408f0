"""transformers' continuous batching. Each call starts its manager anew: that is its interface."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from worker import Generate, serve


def load(options: dict[str, Any]) -> Generate:
    """In bf16."""
    torch.set_num_threads(options["threads"])
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.bfloat16).eval()
    cache = ContinuousBatchingConfig(max_memory_percent=0.1)  # of what is free: 0.9 leaves none to the others

    def generate(prompts: list[list[int]], output_tokens: int) -> list[int]:
        config = GenerationConfig(max_new_tokens=output_tokens, do_sample=False, eos_token_id=-1)
        outputs = model.generate_batch(
            inputs=prompts, generation_config=config, continuous_batching_config=cache, progress_bar=False
        )
        return [len(output.generated_tokens) for output in outputs.values()]

    return generate


if __name__ == "__main__":
    serve(load, ("transformers", "torch"))
