"""The real flash-attn on an NVIDIA GPU, in the cases that its stand-in passes without one."""

import pytest
import torch
from attention_world import AttentionWorld

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("window", [1, 255, 256, 257, 640, 4096])
def test_chunks_decodes_and_both_in_one_step_equal_the_definition(
    head_dim: int, softcap: float | None, window: int
) -> None:
    pytest.importorskip("flash_attn", reason="flash-attn is an optional package")
    world = AttentionWorld(
        "flash-attn", 256, window=window, softcap=softcap, head_dim=head_dim, dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )  # fmt: skip
    world.step((3, 257), (0, 1), (1, 256), (4, 255))
    world.step((0, 1), (1, 1), (2, 515), (4, 1), (3, 256), num_decodes=2, padding=2)
    world.step((0, 1), (3, 1), (2, 256), num_decodes=2, padding=1)
    world.step((0, 1), (1, 1), (3, 1), (2, 1), (4, 1), num_decodes=5, padding=3)
