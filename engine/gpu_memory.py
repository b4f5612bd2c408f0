"""How many bytes a GPU has left for KV pages, after a real step has shown what the rest takes."""

from collections.abc import Callable

import torch

from cabochon.engine.core import EngineCore
from cabochon.engine.errors import ConfigError
from cabochon.engine.messages import GenerateRequest
from cabochon.engine.sampling_params import SamplingParams

GIB = 2**30
PROBE_TOKENS = 3  # a prefill, and decodes behind it


def run_probe(core: EngineCore, *, step_tokens: int, max_seqs: int, max_model_len: int) -> None:
    """Run the largest steps there can be: a full budget of prompts, then every row a decode that is sampled.

    core: idle; it is idle again afterwards. Its pool must hold the probe.
    """
    prompt_len = max(1, min(step_tokens // max_seqs, max_model_len - PROBE_TOKENS))
    params = SamplingParams(max_tokens=PROBE_TOKENS, temperature=1.0, top_p=0.9, ignore_eos=True)
    for index in range(max_seqs):
        name = f"probe-{index}"
        core.add(GenerateRequest(request_id=name, prompt_ids=[index % 8 + 1] * prompt_len, params=params))
    while core.has_work:
        _, refusals = core.step()
        assert not refusals, f"the probe was refused: {refusals[0].message}"


def measure_peak(run: Callable[[], None], device: torch.device) -> int:
    """Bytes that `run` allocates at its peak, beyond what is allocated before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def pool_bytes(*, total: int, used: int, peak: int, utilization: float) -> int:
    """Bytes for KV pages. used: by everybody, weights included; peak: of a step's activations.

    Raises ConfigError if nothing is left.
    """
    left = int(total * utilization) - used - peak
    if left <= 0:
        raise ConfigError(
            f"gpu_memory_utilization must leave room for KV pages: {utilization:g} of {total / GIB:.1f} GiB,"
            f" {used / GIB:.1f} are in use and a step takes {peak / GIB:.1f}: raise it, lower step_tokens, or"
            " take a larger GPU"
        )
    return left
