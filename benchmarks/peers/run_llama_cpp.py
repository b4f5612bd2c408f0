"""llama.cpp through llama-cpp-python, on the GGUF that the demo was made of: one request at a time."""

from typing import Any

from llama_cpp import Llama
from worker import Generate, serve


def load(options: dict[str, Any]) -> Generate:
    """Weights as they are in the file (Q4_K_M)."""
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
