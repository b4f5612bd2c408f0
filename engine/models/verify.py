"""`cabochon verify MODEL`: our logits and greedy tokens beside transformers', here and on these weights.

Eight prompts. fp32 for both: there a difference is a bug of ours or a broken checkpoint, not rounding. A
process of its own, because it needs torch and transformers, which the server never loads.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig

from cabochon.engine.errors import EngineError
from cabochon.engine.llm import LLM
from cabochon.engine.models.source import locate
from cabochon.engine.sampling_params import SamplingParams

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "La recette des crêpes : il faut",
    "1, 1, 2, 3, 5, 8, 13,",
    "私の名前は",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: Why is the sky blue?\nA:",
)
OUTPUT_TOKENS = 64
LOGITS_TOLERANCE = 1e-3  # fp32, real weights: 26 to 46 layers of rounding in another order


def verify(model: str, *, output_tokens: int = OUTPUT_TOKENS) -> bool:
    """Write a line per prompt to stdout. Returns whether all logits and tokens agree."""
    directory = locate(model)
    llm = LLM(str(directory), dtype="fp32", kv_cache_gib=0.5, max_seqs=len(PROMPTS))
    oracle = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    oracle.generation_config = GenerationConfig()  # not the checkpoint's: its penalties are no part of greedy
    params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
    is_fine = True
    for prompt in tqdm(PROMPTS, desc="Verifying", unit="prompt", delay=1):
        ids = llm.tokenizer.encode(prompt).ids
        ours = llm.generate([ids], params)[0].token_ids
        theirs = _greedy(oracle, ids, output_tokens)
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), output_tokens)
        error = float((llm.core.prompt_logits(ids) - _oracle_logits(oracle, ids)).abs().max())
        agrees = same == output_tokens and error <= LOGITS_TOLERANCE
        is_fine &= agrees
        verdict = "ok  " if agrees else "FAIL"
        tqdm.write(
            f"{verdict} greedy tokens equal {same}/{output_tokens}"
            f"  largest logit difference {error:.1e}  {prompt[:24]!r}"
        )
    return is_fine


@torch.inference_mode()
def _greedy(oracle: torch.nn.Module, ids: Sequence[int], output_tokens: int) -> list[int]:
    prompt = torch.tensor([list(ids)])
    out = oracle.generate(  # type: ignore[operator]  # transformers' generation mixin
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=output_tokens, do_sample=False
    )
    tokens: list[int] = out[0, len(ids) :].tolist()
    return tokens


@torch.inference_mode()
def _oracle_logits(oracle: torch.nn.Module, ids: Sequence[int]) -> Tensor:
    logits: Tensor = oracle(torch.tensor([list(ids)])).logits[0, -1]
    return logits


def main() -> None:
    """Exit code 0 if everything agrees."""
    parser = argparse.ArgumentParser(prog="cabochon verify", description=__doc__)
    parser.add_argument("model", nargs="?", default="demo", help="demo, a directory or a Hub id")
    model = parser.parse_args().model
    try:
        is_fine = verify(model)
    except EngineError as error:
        sys.exit(f"cabochon: {error}")
    name = Path(model).name
    print(
        f"{name}: {'equal to transformers' if is_fine else 'DIFFERENT from transformers: please report it'}"
    )
    sys.exit(0 if is_fine else 1)


if __name__ == "__main__":
    main()
