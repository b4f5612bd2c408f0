"""--merge-lora: the sum equals what peft's merge_and_unload makes, in every form of the linear layers."""

from pathlib import Path

import pytest
import torch
from lora_maker import make_adapter
from peft import PeftModel
from random_gemma import oracle_logits
from transformers import AutoModelForCausalLM

from cabochon.engine.adapters.merge import MergedWeights
from cabochon.engine.adapters.peft_format import read_adapter
from cabochon.engine.errors import BadAdapter, BadCheckpoint
from cabochon.engine.llm import LLM
from cabochon.engine.models.checkpoint import Checkpoint
from cabochon.engine.models.hf_config import load_model_config

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

IDS = [7, 90, 33, 120, 8, 61, 5, 99, 42, 17, 301, 256]


def llm(directory: Path, **options: object) -> LLM:
    given = {"dtype": "fp32", "page_tokens": 4, "kv_cache_gib": 0.002, "max_seqs": 4, "threads": 1, **options}
    return LLM(str(directory), **given)


@pytest.fixture(params=["tiny_gemma2_dir", "tiny_gemma3_dir"])
def tiny_dir(request: pytest.FixtureRequest) -> Path:
    directory: Path = request.getfixturevalue(request.param)
    return directory


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 8},
        {"rank": 64, "rslora": True},
        {"rank": 16, "targets": ("k_proj", "up_proj"), "layers": (1, 3)},
    ],
    ids=str,
)
def test_logits_equal_those_of_merge_and_unload(
    tiny_dir: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    adapter = make_adapter(tmp_path, load_model_config(tiny_dir), **options)
    base = AutoModelForCausalLM.from_pretrained(tiny_dir, attn_implementation="eager")
    plain = oracle_logits(base, IDS)[-1]
    expected = oracle_logits(PeftModel.from_pretrained(base, adapter).merge_and_unload(), IDS)[-1]
    ours = llm(tiny_dir, merge_lora=f"tickets={adapter}").core.prompt_logits(IDS)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    assert (ours - plain).abs().max() > 0.1, "the adapter does something"


def test_a_rank_that_no_slot_would_hold_can_be_merged(tiny_gemma2_dir: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, load_model_config(tiny_gemma2_dir), 16)
    llm(tiny_gemma2_dir, merge_lora=f"x={adapter}", max_lora_rank=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_made_in_fp32_and_rounded_once(
    tiny_gemma2_dir: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = load_model_config(tiny_gemma2_dir)
    adapter = read_adapter(make_adapter(tmp_path, model, 4), model, torch.float32, max_rank=4)
    shape, name = (
        (model.num_kv_heads * model.head_dim, model.hidden_size),
        "model.layers.2.self_attn.v_proj.weight",
    )
    weight = Checkpoint(tiny_gemma2_dir).load(name, shape, torch.float32)
    a, b = adapter.layers[2]["qkv"]
    expected = (weight.double() + b[-shape[0] :].double() @ a[-4:].double()).to(dtype)
    merged = MergedWeights(Checkpoint(tiny_gemma2_dir), adapter, model).load(name, shape, dtype)
    assert merged.dtype == dtype
    torch.testing.assert_close(merged, expected, atol=1e-6, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6)
    assert (merged == expected).float().mean() > 0.99 or dtype == torch.float32


def test_quantized_layers_are_those_of_the_sum(tiny_gemma2_dir: Path, tmp_path: Path) -> None:
    """Beside a checkpoint that was merged and saved by peft."""
    adapter = make_adapter(tmp_path / "adapter", load_model_config(tiny_gemma2_dir), 8)
    base = AutoModelForCausalLM.from_pretrained(tiny_gemma2_dir)
    whole = tmp_path / "whole"
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(whole)
    (whole / "tokenizer.json").write_bytes((tiny_gemma2_dir / "tokenizer.json").read_bytes())
    saved = llm(whole, quantization="fp8").core.prompt_logits(IDS)
    merged = llm(tiny_gemma2_dir, quantization="fp8", merge_lora=f"x={adapter}").core.prompt_logits(IDS)
    torch.testing.assert_close(merged, saved, atol=0.1, rtol=0)  # a sum that rounds elsewhere is another e4m3
    assert (merged - llm(tiny_gemma2_dir, quantization="fp8").core.prompt_logits(IDS)).abs().max() > 0.5


def test_a_bad_adapter_stops_the_start(tiny_gemma2_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(BadAdapter, match=r"an adapter.s directory must have adapter_config\.json"):
        llm(tiny_gemma2_dir, merge_lora=f"x={tmp_path}")


def test_the_checkpoint_is_checked_as_ever(tiny_gemma2_dir: Path, tmp_path: Path) -> None:
    model = load_model_config(tiny_gemma2_dir)
    adapter = read_adapter(make_adapter(tmp_path, model, 4), model, torch.float32, max_rank=4)
    weights = MergedWeights(Checkpoint(tiny_gemma2_dir), adapter, model)
    assert weights.num_elements == Checkpoint(tiny_gemma2_dir).num_elements
    with pytest.raises(BadCheckpoint, match="every tensor must belong to the model"):
        weights.close()
