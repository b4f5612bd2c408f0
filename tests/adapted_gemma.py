"""A tiny random Gemma with three adapters, by transformers and peft as the oracle, and the same for ours."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from lora_maker import make_adapter
from peft import PeftModel
from random_gemma import model_config, oracle_greedy, oracle_logits

from cabochon.engine.adapters.adapter import Adapter
from cabochon.engine.adapters.peft_format import read_adapter

Value = TypeVar("Value")

RANKS = {"eight": 8, "sixteen": 16, "sixtyfour": 64}
SOME = ("q_proj", "v_proj", "down_proj")  # the adapter of rank 16 has no other modules


class AdaptedGemma:
    """Names of adapters are those of RANKS; None is the base model."""

    def __init__(self, make: Callable[..., torch.nn.Module], directory: Path) -> None:
        base = make()
        self.config = model_config(base.config)
        self.weights = {name: weight.clone() for name, weight in base.state_dict().items()}
        self.paths = {
            name: make_adapter(
                directory / name, self.config, rank, seed=rank, std=0.1 / rank**0.5,
                targets=SOME if name == "sixteen" else (*SOME, "k_proj", "o_proj", "gate_proj", "up_proj"),
                rslora=name == "sixtyfour",
            )
            for name, rank in RANKS.items()
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's own, about transformers
            first, *others = self.paths
            self._peft = PeftModel.from_pretrained(base, self.paths[first], adapter_name=first).eval()
            for name in others:
                self._peft.load_adapter(self.paths[name], adapter_name=name)

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> Adapter:
        """By our own reader."""
        return read_adapter(self.paths[name], self.config, dtype, max_rank=64)

    def logits(self, name: str | None, ids: Sequence[int]) -> torch.Tensor:
        """[len(ids), V] by transformers and peft, softcapped."""
        return self._with(name, lambda: oracle_logits(self._peft, ids))

    def greedy(self, name: str | None, ids: Sequence[int], num_tokens: int) -> list[int]:
        """By transformers and peft."""
        return self._with(name, lambda: oracle_greedy(self._peft, ids, num_tokens))

    def _with(self, name: str | None, what: Callable[[], Value]) -> Value:
        if name is None:
            with self._peft.disable_adapter():
                return what()
        self._peft.set_adapter(name)
        return what()
