"""`cabochon verify`: agrees on good weights, and notices each of several ways in which we could be wrong."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cabochon.engine import load
from cabochon.engine.errors import ComputeError, ModelNotFound
from cabochon.engine.llm import LLM, Completion
from cabochon.engine.models import verify as module
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.models.verify import PROMPTS, main, verify

TOKENS = 4  # longer than a page would be slow; the window of 8 is passed by every prompt
Change = Callable[[ModelConfig], dict[str, Any]]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are tiny: on a busy machine two threads mostly wait for each other."""
    monkeypatch.setattr(load.os, "sched_getaffinity", lambda _: {0})


@pytest.fixture(params=["tiny_gemma2_dir", "tiny_gemma3_dir"])
def tiny_dir(request: pytest.FixtureRequest) -> Path:
    directory: Path = request.getfixturevalue(request.param)
    return directory


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_tiny_models_agree_with_transformers(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(str(tiny_dir), output_tokens=TOKENS)
    written = lines(capsys)
    assert len(written) == len(PROMPTS)
    for line, prompt in zip(written, PROMPTS, strict=True):
        assert line.startswith(f"ok   greedy tokens equal {TOKENS}/{TOKENS}  largest logit difference ")
        assert line.endswith(f"  {prompt[:24]!r}")


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROMPTS", PROMPTS[1:3])


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "hybrid", "eos_token_id": [1, 5]},  # as Gemma 2 was published
        {"do_sample": True, "top_k": 64, "top_p": 0.95, "temperature": 0.5},  # as Gemma 3 was
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1, "max_length": 20},
    ],
    ids=str,
)
def test_what_the_checkpoint_says_about_sampling_does_not_disturb_the_comparison(
    tiny_gemma2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    few(monkeypatch)
    directory = shutil.copytree(tiny_gemma2_dir, tmp_path / "model")
    (directory / "generation_config.json").write_text(json.dumps(settings))
    assert verify(str(directory), output_tokens=TOKENS)


CHANGES: dict[str, Change] = {
    "no attention softcap": lambda config: {"attention_softcap": None},
    "another final softcap": lambda config: {"final_softcap": 25.0},
    "a window of 7": lambda config: {"window": config.window - 1},
    "swapped layers": lambda config: {"is_sliding": tuple(not s for s in config.is_sliding)},
    "a scale from the head dimension": lambda config: {"attention_scale": config.head_dim**-0.5},
    "another theta": lambda config: {"rope_theta_sliding": 12_000.0},
    "another epsilon": lambda config: {"norm_eps": 1e-3},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_constant_on_our_side_is_noticed(
    tiny_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    few(monkeypatch)
    right = load.load_model_config

    def wrong(directory: Path) -> ModelConfig:
        config = right(directory)
        return dataclasses.replace(config, **CHANGES[name](config))

    monkeypatch.setattr(load, "load_model_config", wrong)
    assert not verify(str(tiny_gemma2_dir), output_tokens=TOKENS)
    assert any(line.startswith("FAIL greedy tokens equal ") for line in lines(capsys))


def spoil_oracle(monkeypatch: pytest.MonkeyPatch, name: str, spoil: Callable[[Tensor], object]) -> None:
    """Transformers computes with other weights than we do."""
    right = module.AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args: object, **kwargs: object) -> torch.nn.Module:
        model = right(*args, **kwargs)
        with torch.no_grad():
            spoil(model.get_parameter(name))
        return model

    monkeypatch.setattr(module.AutoModelForCausalLM, "from_pretrained", from_pretrained)


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.layers.1.self_attn.v_proj.weight"]
)
def test_other_weights_on_one_side_are_noticed(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    few(monkeypatch)
    spoil_oracle(monkeypatch, name, lambda weight: weight[0].neg_())  # one row: the norms undo a factor
    assert not verify(str(tiny_dir), output_tokens=TOKENS)


def test_logits_that_differ_are_noticed_even_if_the_tokens_are_equal(
    tiny_gemma3_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few(monkeypatch)
    spoil_oracle(monkeypatch, "model.embed_tokens.weight", lambda weight: weight.mul_(1.002))  # order is kept
    assert not verify(str(tiny_gemma3_dir), output_tokens=TOKENS)
    assert all(line.startswith(f"FAIL greedy tokens equal {TOKENS}/{TOKENS}") for line in lines(capsys))


def test_tokens_that_differ_are_noticed_even_if_the_logits_are_equal(
    tiny_gemma2_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few(monkeypatch)
    right = LLM.generate
    spoiled: list[Completion] = []

    def generate(self: LLM, *args: Any, **kwargs: Any) -> list[Completion]:
        (completion,) = right(self, *args, **kwargs)
        if not spoiled:  # the first prompt only
            completion.token_ids[2] += 1
            spoiled.append(completion)
        return [completion]

    monkeypatch.setattr(LLM, "generate", generate)
    assert not verify(str(tiny_gemma2_dir), output_tokens=TOKENS)
    first, second = lines(capsys)
    assert first.startswith(f"FAIL greedy tokens equal 2/{TOKENS}")
    assert second.startswith("ok ")


def test_weights_that_give_nan_are_an_error(tiny_gemma2_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_gemma2_dir, tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], torch.nan)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ComputeError, match="logits must be finite"):
        verify(str(directory), output_tokens=TOKENS)


def run_main(monkeypatch: pytest.MonkeyPatch, *args: str) -> object:
    monkeypatch.setattr(sys, "argv", ["verify", *args])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


@pytest.mark.parametrize(
    ("is_fine", "code", "verdict"),
    [(True, 0, "equal to transformers"), (False, 1, "DIFFERENT from transformers: please report it")],
)
def test_the_verdict_is_the_last_line_and_the_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_fine: bool,
    code: int,
    verdict: str,
) -> None:
    monkeypatch.setattr(module, "verify", lambda model: is_fine)
    assert run_main(monkeypatch, "google/gemma-2-2b-it") == code
    assert lines(capsys)[-1] == f"gemma-2-2b-it: {verdict}"


def test_without_an_argument_the_demo_is_verified(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models: list[str] = []
    monkeypatch.setattr(module, "verify", lambda model: models.append(model) or True)
    assert run_main(monkeypatch) == 0
    assert models == ["demo"]
    assert lines(capsys) == ["demo: equal to transformers"]


def test_a_model_that_cannot_be_loaded_ends_with_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFound) as error:
        verify("/no/such/directory")
    assert run_main(monkeypatch, "/no/such/directory") == f"cabochon: {error.value}"


def test_a_broken_checkpoint_ends_with_its_message(
    tiny_gemma2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = shutil.copytree(tiny_gemma2_dir, tmp_path / "model")
    (directory / "model.safetensors").write_bytes(b"cut off")
    end = run_main(monkeypatch, str(directory))
    assert str(end).startswith("cabochon: model.safetensors must be a whole safetensors file")


@pytest.mark.slow
@pytest.mark.usefixtures("demo_dir")
def test_the_demo_is_equal_to_transformers() -> None:
    command = [sys.executable, "-m", "cabochon.server.cli", "verify", "demo"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    *each, verdict = run.stdout.splitlines()
    assert verdict == "demo: equal to transformers"
    assert [line[:31] for line in each] == ["ok   greedy tokens equal 64/64 "] * len(PROMPTS)
