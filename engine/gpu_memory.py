"""How many bytes a GPU has left for KV pages, after a real step has shown what the rest takes."""

from collections.abc import Callable
from itertools import pairwise

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
        # private: equal prompts would wait for each other's pages instead of filling the step
        ids = [index % 8 + 1] * prompt_len
        core.add(GenerateRequest(request_id=name, prompt_ids=ids, params=params, is_private=True))
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


def measure_graphs(core: EngineCore, device: torch.device) -> int:
    """Bytes that all decode graphs will take: the largest, whose memory the others share, and a bit for each.

    Captures two. core: idle; it is thrown away afterwards.
    """
    free = [_free_bytes(device)]
    num_left = core.num_unprepared
    for _ in range(min(2, num_left)):
        core.get_ready()
        free.append(_free_bytes(device))
    taken = [max(0, before - after) for before, after in pairwise(free)]
    return taken[0] + (num_left - 1) * taken[1] if len(taken) > 1 else sum(taken)


def _free_bytes(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


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
