"""llama.cpp through llama-cpp-python, on the GGUF that the demo was made of: one request at a time."""

from typing import Any

import llama_cpp
from llama_cpp import Llama
from worker import Generate, serve


def load(options: dict[str, Any]) -> Generate:
    """Weights as the file has them (Q4_K_M), not repacked: products for AMX faulted on a virtual machine."""
    defaults = llama_cpp.llama_model_default_params

    def without_repacking() -> llama_cpp.llama_model_params:
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_model_default_params = llama_cpp.llama_cpp.llama_model_default_params = without_repacking
    threads = options["threads"]
    llama = Llama(
        model_path=options["model"], n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def one(ids: list[int], output_tokens: int) -> int:
        llama.reset()
        llama.eval(ids)
        for made in range(1, output_tokens + 1):
            token = llama.sample(temp=0)
            if made < output_tokens:
                llama.eval([token])
        return output_tokens

    def generate(prompts: list[list[int]], output_tokens: int) -> list[int]:
        return [one(ids, output_tokens) for ids in prompts]

    return generate


if __name__ == "__main__":
    serve(load, ("llama-cpp-python",))
