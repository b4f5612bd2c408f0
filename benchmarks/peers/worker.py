"""The child's side of `process.py`: an engine that stays loaded and answers commands, a JSON line each.

Runs in the peer's own venv: the standard library alone. What the engine prints goes to standard error, so
that nothing stands between the lines.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

Generate = Callable[[list[list[int]], int], list[int]]  # prompts, output tokens each -> tokens made of each
FIRST_PROMPT = [2, 651, 1024, 2048]


def serve(load: Callable[[dict[str, Any]], Generate], packages: tuple[str, ...]) -> None:
    """Load with the options of the command line, make a first token, then answer until standard input ends.

    packages: whose versions stand beside the figures.
    """
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(**fields: object) -> None:
        lines.write(json.dumps(fields) + "\n")

    try:
        generate = load(json.loads(sys.argv[1]))
        generate([FIRST_PROMPT], 1)
    except Exception as error:  # a border: whatever a peer's engine raises is why it is left out
        say(failed=f"{type(error).__name__}: {error}"[:300])
        raise
    say(versions={name: metadata.version(name) for name in packages})
    for line in sys.stdin:
        command = json.loads(line)
        started_s = time.perf_counter()
        made = generate(command["prompts"], command["output_tokens"])
        say(seconds=time.perf_counter() - started_s, made=made)
