"""Logits and tokens beside transformers on the same device and weights: 2B's shape with four layers.

    python benchmarks/gpu/check_parity.py

fp32 (TF32 off): logits within 1e-3, 64 greedy tokens equal; one prompt is longer than the window. bf16:
logits within the error budget, that is at most twice as far from fp32 as transformers' own in bf16. fp8,
of weights or of K and V: how far logits are from bf16's, at full depth. That is an error of logits and no
measure of quality.
"""

import gc
import sys
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from cases import Absent, Case, Row, arguments, need_options, run_cases
from device_rates import environment
from random_engine import generate, make_core, random_prompts
from random_weights import configuration, oracle
from torch import Tensor
from transformers import Gemma2Config

from cabochon.engine.sampling_params import SamplingParams
from cabochon.kernels.error_budget import assert_within_budget

LAYERS = 4
LENGTHS = (1, 7, 30, 90, 4200)
TINY_LENGTHS = (1, 7, 40)
NEW_TOKENS = 64
FP32_TOLERANCE = 1e-3
FP8: dict[str, dict[str, object]] = {
    "fp8 weights": {"quantization": "fp8"},
    "fp8 KV": {"kv_dtype": "fp8"},
    "fp8 weights and KV": {"quantization": "fp8", "kv_dtype": "fp8"},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Parity:
    """One shape and its prompts, under ours and transformers'."""

    def __init__(self, config: Gemma2Config, lengths: Sequence[int], device: str, new_tokens: int) -> None:
        self.config = config
        self.device = device
        self.new_tokens = new_tokens
        self.prompts = random_prompts(config.vocab_size, lengths)

    def ours(self, dtype: str, **options: object) -> tuple[list[Tensor], Any]:
        """[V] fp32 of each prompt's last token, and the engine."""
        longest = max(map(len, self.prompts)) + self.new_tokens + 1
        core, *_ = make_core(
            self.config, self.device, dtype, max_seqs=len(self.prompts), max_tokens=longest,
            step_tokens=4608, **options,
        )  # fmt: skip
        return [core.prompt_logits(prompt).float() for prompt in self.prompts], core

    @cache  # noqa: B019 - the program ends with it
    def theirs(self, dtype: str) -> tuple[list[Tensor], list[list[int]]]:
        """The same, and greedy tokens: recomputed from scratch for each, in fp32 alone."""
        model = oracle(self.config, DTYPES[dtype], torch.device(self.device))
        logits = [self._last(model, prompt) for prompt in self.prompts]
        tokens = [self._greedy(model, prompt) for prompt in self.prompts] if dtype == "fp32" else []
        return logits, tokens

    @torch.inference_mode()
    def _last(self, model: Any, ids: list[int]) -> Tensor:
        inputs = torch.tensor([ids], device=self.device)
        return model(input_ids=inputs, use_cache=False, logits_to_keep=1).logits[0, -1].float()

    def _greedy(self, model: Any, prompt: list[int]) -> list[int]:
        out = list(prompt)
        for _ in range(self.new_tokens):
            out.append(int(self._last(model, out).argmax()))
        return out[len(prompt) :]


def fp32(parity: Parity) -> Iterator[Row]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    logits, core = parity.ours("fp32")
    expected, expected_tokens = parity.theirs("fp32")
    error = max(float((a - b).abs().max()) for a, b in zip(logits, expected, strict=True))
    params = [SamplingParams(temperature=0, max_tokens=parity.new_tokens, ignore_eos=True)]
    tokens = generate(core, parity.prompts, params * len(parity.prompts))
    same = sum(
        a == b for ours, theirs in zip(tokens, expected_tokens, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )  # fmt: skip
    total = parity.new_tokens * len(parity.prompts)
    yield {
        "prompts": [len(one) for one in parity.prompts], "max_logit_error": error,
        "tolerance": FP32_TOLERANCE, "equal_tokens": same, "tokens": total,
    }  # fmt: skip
    assert error <= FP32_TOLERANCE, f"logits are {error:.2e} from transformers', at most {FP32_TOLERANCE}"
    assert same == total, f"{same} of {total} greedy tokens equal transformers'"


def bf16(parity: Parity) -> Iterator[Row]:
    logits, _ = parity.ours("bf16")
    low, truth = parity.theirs("bf16")[0], parity.theirs("fp32")[0]
    yield {
        "max_logit_error": max(float((a - b).abs().max()) for a, b in zip(logits, truth, strict=True)),
        "max_logit_error_transformers": max(
            float((a - b).abs().max()) for a, b in zip(low, truth, strict=True)
        ),
    }
    assert_within_budget(torch.cat(logits).bfloat16(), torch.cat(low), torch.cat(truth))


def fp8(parity: Parity, options: dict[str, object]) -> Iterator[Row]:
    need_options(*options)
    if parity.device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        raise Absent("this GPU multiplies no fp8")
    expected, core = parity.ours("bf16")
    del core
    gc.collect()  # an engine has cycles, and two of them need not fit
    logits, _ = parity.ours("bf16", **options)
    ours, bf16_ones = torch.stack(logits), torch.stack(expected)
    difference = ours - bf16_ones
    assert torch.isfinite(ours).all(), "logits are not finite"
    yield {
        "what": "logit error against bf16",
        "layers": parity.config.num_hidden_layers,
        "max_logit_error": float(difference.abs().max()),
        "relative_logit_error": float(difference.norm() / bf16_ones.norm()),
        "equal_argmax": int((ours.argmax(-1) == bf16_ones.argmax(-1)).sum()),
        "prompts": [len(one) for one in parity.prompts],
    }


def main() -> int:
    args = arguments(__doc__).parse_args()
    size, lengths = ("tiny", TINY_LENGTHS) if args.tiny else ("2b", LENGTHS)
    new_tokens = 8 if args.tiny else NEW_TOKENS
    parity = Parity(configuration(size, num_hidden_layers=LAYERS), lengths, args.device, new_tokens)
    deep = Parity(configuration(size), [length for length in lengths if length > 1], args.device, new_tokens)
    env = environment(args.device)

    def stamped(name: str, run: Any, *given: Any) -> Case:
        return f"parity {name}", lambda: ({"size": size, **row, **env} for row in run(*given))

    cases = [stamped("fp32", fp32, parity), stamped("bf16", bf16, parity)]
    cases += [stamped(name, partial(fp8, deep), options) for name, options in FP8.items()]
    return run_cases(cases)


if __name__ == "__main__":
    sys.exit(main())
