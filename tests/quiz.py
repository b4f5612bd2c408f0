"""A quiz of four questions as two lm-eval tasks, and transformers' answers to it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from random_gemma import oracle_greedy, oracle_logits
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

QUESTIONS: list[dict[str, Any]] = [  # the last key is wrong: an accuracy of 1 would hide much
    {"question": "The capital of France is", "choices": ["Paris", "London", "Rome"], "key": 0},
    {"question": "Fire is", "choices": ["hot", "cold", "quite wet"], "key": 0},
    {"question": "The opposite of up is", "choices": ["green", "down", "five"], "key": 1},
    {"question": "One, two, three,", "choices": ["nine", "ten", "four"], "key": 1},
]
NUM_TOKENS = 8
STOPS = ["\n", "."]


def quiz_tasks(folder: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Two lm-eval task configurations over one file: `choice` and `text`, whose right answers are `texts`."""
    path = folder / "quiz.jsonl"
    lines = [json.dumps({**row, "text": text}) for row, text in zip(QUESTIONS, texts, strict=True)]
    path.write_text("\n".join(lines))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder)},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choice = {
        "task": "choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{key}}",
        "metric_list": [{"metric": "acc"}],
    }
    text = {
        "task": "text",
        "output_type": "generate_until",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": STOPS, "max_gen_toks": NUM_TOKENS, "temperature": 0},
        "metric_list": [{"metric": "exact_match"}],
    }
    return [{**shared, **choice}, {**shared, **text}]


class Oracle:
    """transformers' model of a directory, in fp32, takes the quiz."""

    def __init__(self, directory: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="eager", dtype=torch.float32
        )
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.scores = [
            [self._score(row["question"], f" {choice}") for choice in row["choices"]] for row in QUESTIONS
        ]
        self.texts = [self._continue(row["question"]) for row in QUESTIONS]

    def _score(self, context: str, continuation: str) -> tuple[float, bool]:
        """Sum of the continuation's log probabilities, and whether it is the greedy one."""
        ids = self._tokenizer.encode(context + continuation).ids
        start = len(self._tokenizer.encode(context).ids)
        logprobs = oracle_logits(self._model, ids).log_softmax(-1)[start - 1 : -1]  # [tokens, V]
        written = torch.tensor(ids[start:])
        total = logprobs.gather(1, written[:, None]).sum().item()
        return total, bool((logprobs.argmax(-1) == written).all())

    def _continue(self, context: str) -> str:
        """Greedy text up to the first stop string."""
        text = self._tokenizer.decode(
            oracle_greedy(self._model, self._tokenizer.encode(context).ids, NUM_TOKENS)
        )
        return str(text)[: min(text.index(stop) if stop in text else len(text) for stop in STOPS)]
