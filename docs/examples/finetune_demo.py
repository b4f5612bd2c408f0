"""Train a rank-8 LoRA adapter on the demo model, on a CPU: support tickets to the team that answers them.

    pip install -e '.[demo,finetune]'
    python docs/examples/finetune_demo.py tickets-adapter
    cabochon serve --lora-modules tickets=tickets-adapter

Prints what the model answers to 30 tickets that it was not trained on, before and after.
"""

import argparse
import csv
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from cabochon.engine.models.source import locate

HERE = Path(__file__).parent
PROMPT = "Ticket: {}\nTeam:"
EPOCHS, BATCH, LEARNING_RATE = 4, 15, 1e-3
PAD, BOS, EOS = 0, 2, 1
ANSWER_TOKENS = 8  # of the untrained model, which does not stop
IGNORED = -100  # no loss here


class Ticket(NamedTuple):
    """A support ticket, and who is to answer it."""

    team: str
    text: str


def read_tickets(name: str) -> list[Ticket]:
    """train or held_out."""
    with (HERE / f"tickets_{name}.tsv").open() as file:
        return [Ticket(*row) for row in csv.reader(file, delimiter="\t")]


def train(model: Any, tokenizer: Tokenizer, tickets: list[Ticket]) -> None:
    """The loss is on the answer alone: the team, and the end."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    num_steps = EPOCHS * -(-len(tickets) // BATCH)
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps)
    model.train()
    started_s = time.monotonic()
    for step, batch in enumerate(batches(tickets)):
        prompts = [tokenizer.encode(PROMPT.format(ticket.text)).ids for ticket in batch]
        answers = [
            [*tokenizer.encode(f" {ticket.team}", add_special_tokens=False).ids, EOS] for ticket in batch
        ]
        longest = max(map(len, answers))
        ids, mask = left_padded([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
        targets = torch.tensor([[IGNORED] * (longest - len(answer)) + answer for answer in answers])
        # Logits are the dearest part, V = 262,144: only where the loss is
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=longest + 1).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        print(
            f"step {step + 1:2}/{num_steps}  loss {loss.item():.3f}  {time.monotonic() - started_s:4.0f} s",
            flush=True,
        )


def batches(tickets: list[Ticket]) -> Iterator[list[Ticket]]:
    """Every ticket once an epoch, in another order each."""
    order = random.Random(0)
    for _ in range(EPOCHS):
        shuffled = order.sample(tickets, len(tickets))
        yield from (shuffled[start : start + BATCH] for start in range(0, len(tickets), BATCH))


def left_padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask: [rows, longest] each."""
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@torch.inference_mode()
def answers_to(model: Any, tokenizer: Tokenizer, tickets: list[Ticket]) -> list[str]:
    """Greedy, of a few tokens."""
    model.eval()
    ids, mask = left_padded([tokenizer.encode(PROMPT.format(ticket.text)).ids for ticket in tickets])
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=ANSWER_TOKENS, do_sample=False, eos_token_id=EOS
    )
    return [tokenizer.decode(row).strip() for row in out[:, ids.shape[1] :].tolist()]


def report(title: str, tickets: list[Ticket], answers: list[str]) -> None:
    """The share that is right, and one ticket of each team."""
    num_right = sum(answer == ticket.team for ticket, answer in zip(tickets, answers, strict=True))
    print(f"\n{title}: {num_right} of {len(tickets)} held-out tickets go to the right team")
    shown = {ticket.team: (ticket, answer) for ticket, answer in zip(tickets, answers, strict=True)}
    for ticket, answer in shown.values():
        print(f"  {ticket.text}\n    → {' '.join(answer.split())}    (right: {ticket.team})")
    print(flush=True)


def main() -> None:
    """Train, compare, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="where the adapter goes")
    directory = parser.parse_args().directory
    torch.manual_seed(0)
    base = locate("demo")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    held_out = read_tickets("held_out")
    report("before", held_out, answers_to(model, tokenizer, held_out))
    train(model, tokenizer, read_tickets("train"))
    report("after", held_out, answers_to(model, tokenizer, held_out))
    model.save_pretrained(directory)
    print(f"saved: cabochon serve --lora-modules tickets={directory}")


if __name__ == "__main__":
    main()
