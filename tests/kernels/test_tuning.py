"""The committed table of tile sizes: complete, within its GPUs, and found by name or by shared memory."""

import pytest
import torch

from cabochon.kernels.ahead_of_time import SHARED_BYTES
from cabochon.kernels.tuning import gpus, match_gpu, rows, tuned

KERNELS = ["prefill_attention", "decode_attention"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_gpu_has_every_head_dim_and_element_size_once(kernel: str) -> None:
    found = sorted((row.gpu, row.keys["head_dim"], row.keys["kv_bits"]) for row in rows(kernel))
    assert found == sorted(
        (gpu.name, dim, bits) for gpu in gpus() for dim in (64, 128, 256) for bits in (8, 16, 32)
    )


def test_shared_memory_is_what_cuda_allows_the_architecture() -> None:
    assert {gpu.sm: gpu.shared_bytes for gpu in gpus()} == SHARED_BYTES


def test_splits_hold_whole_tiles() -> None:
    for row in rows("decode_attention"):
        assert row.config["split_tokens"] % row.config["block_n"] == 0


def test_a_gpu_is_found_by_the_start_of_its_name() -> None:
    assert match_gpu("NVIDIA H100 80GB HBM3", 0).name == "NVIDIA H100"
    assert match_gpu("NVIDIA A100-SXM4-40GB", 0).name == "NVIDIA A100"
    assert match_gpu("NVIDIA L4", 0).name == "NVIDIA L4"


def test_an_unknown_gpu_gets_the_largest_tiles_that_fit() -> None:
    assert match_gpu("NVIDIA B200", 227 * 1024).sm == 90
    assert match_gpu("NVIDIA A30", 163 * 1024).name == "NVIDIA A100"
    assert match_gpu("NVIDIA GeForce RTX 4090", 99 * 1024).name == "NVIDIA L4"
    with pytest.raises(ValueError, match="no tile sizes for Tesla T4 with 65536 bytes of shared memory"):
        match_gpu("Tesla T4", 65536)


def test_a_small_head_takes_the_row_of_64() -> None:
    small, row = (
        tuned("prefill_attention", torch.device("cpu"), head_dim=dim, kv_bits=16) for dim in (16, 64)
    )
    assert small == row


def test_a_head_dim_without_a_row_is_named() -> None:
    with pytest.raises(ValueError, match=r"_tune.json has no row of decode_attention .*'head_dim': 512"):
        tuned("decode_attention", torch.device("cpu"), head_dim=512, kv_bits=16)
