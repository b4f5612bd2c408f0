"""The worked example of docs/fine-tunes.md, as a user runs it: trains, saves, and the adapter is served."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cabochon.engine.adapters.show import main
from cabochon.engine.llm import LLM, Completion
from cabochon.engine.sampling_params import SamplingParams

SCRIPT = Path(__file__).parents[1] / "docs" / "examples" / "finetune_demo.py"
TRAINING_S = 1800  # two minutes on two idle cores
ENOUGH = 24  # of 30
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """The script's names."""
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The adapter's directory, and what the script printed."""
    directory = tmp_path_factory.mktemp("example") / "tickets-adapter"
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(directory)],
        capture_output=True,
        text=True,
        timeout=TRAINING_S,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return directory, run.stdout


@pytest.mark.slow
def test_the_example_says_how_many_tickets_are_right(trained: tuple[Path, str]) -> None:
    counts = re.findall(r"(before|after): (\d+) of (\d+) held-out tickets", trained[1])
    assert [count[0] for count in counts] == ["before", "after"]
    assert [count[2] for count in counts] == ["30", "30"]
    assert int(counts[0][1]) <= 3, "the base model is none of the teams'"
    assert int(counts[1][1]) >= ENOUGH


@pytest.mark.slow
def test_the_served_adapter_changes_the_answers_to_right_ones(
    trained: tuple[Path, str], example: dict[str, Any]
) -> None:
    tickets = example["read_tickets"]("held_out")
    prompts = [example["PROMPT"].format(ticket.text) for ticket in tickets]

    def num_right(completions: list[Completion]) -> int:
        pairs = zip(completions, tickets, strict=True)
        return sum(one.text.strip() == ticket.team and one.finish_reason == "stop" for one, ticket in pairs)

    llm = LLM("demo", lora_modules=(f"tickets={trained[0]}",), kv_cache_gib=0.3)
    base = llm.generate(prompts, GREEDY)
    tuned = llm.generate(prompts, GREEDY, adapter="tickets")
    assert num_right(base) <= 3
    assert num_right(tuned) >= ENOUGH
    names = ["tickets" if index % 2 else None for index in range(len(prompts))]
    mixed = llm.generate(prompts, GREEDY, adapter=names)
    expected = [tuned[index] if name else base[index] for index, name in enumerate(names)]
    assert [one.text for one in mixed] == [one.text for one in expected]
    merged = LLM("demo", merge_lora=f"tickets={trained[0]}", kv_cache_gib=0.3)
    assert num_right(merged.generate(prompts, GREEDY)) >= ENOUGH


@pytest.mark.slow
def test_the_example_s_adapter_passes_the_check(
    trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = '{"model": "demo", "lora_modules": []}'
    monkeypatch.setattr(sys, "argv", ["show", config, str(trained[0])])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert "tickets-adapter: OK\n  rank        8\n  scaling     2 = 16 / 8\n" in capsys.readouterr().out


def test_no_held_out_ticket_was_trained_on_and_every_team_is_there(example: dict[str, Any]) -> None:
    train, held_out = example["read_tickets"]("train"), example["read_tickets"]("held_out")
    assert (len(train), len(held_out)) == (90, 30)
    assert not {ticket.text for ticket in train} & {ticket.text for ticket in held_out}
    for tickets, each in ((train, 18), (held_out, 6)):
        teams = [ticket.team for ticket in tickets]
        assert {team: teams.count(team) for team in teams} == dict.fromkeys(
            ("billing", "shipping", "account", "technical", "sales"), each
        )
