"""A peer's worker without an engine: it makes the tokens that it is asked for, or fails as it is told."""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "peers"))

from worker import Generate, serve

TOKEN_S = 0.001  # without it, more tokens could take less time, and a rate be negative or infinite


def load(options: dict[str, Any]) -> Generate:
    print("a banner on standard output")
    if options.get("model") == "broken":
        raise ValueError("no such model")

    def generate(prompts: list[list[int]], output_tokens: int) -> list[int]:
        print("chatter")
        if len(prompts[0]) == options.get("dies_at"):
            sys.exit("out of memory")
        time.sleep(output_tokens * TOKEN_S)
        return [output_tokens - (len(ids) == options.get("short_at")) for ids in prompts]

    return generate


if __name__ == "__main__":
    serve(load, ("pip",))
