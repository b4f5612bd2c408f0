"""Reading safetensors: one file or shards, each tensor once, a message for each thing that can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cabochon.engine.errors import BadCheckpoint
from cabochon.engine.models.checkpoint import Checkpoint

Write = Callable[[Path], Path]
INDEX = "model.safetensors.index.json"
SHARDS = {"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}
SHARDS |= {"c": "model-00002-of-00002.safetensors"}


def tensors() -> dict[str, Tensor]:
    """Values that bf16 holds exactly."""
    a = torch.arange(6, dtype=torch.float32).view(2, 3)
    return {"a": a, "b": torch.tensor([1.5, -2.0]), "c": torch.full((1, 2, 2), 7.0)}


def write_one(directory: Path, **extra: Tensor) -> Path:
    save_file({**tensors(), **extra}, directory / "model.safetensors")
    return directory


def write_shards(directory: Path) -> Path:
    for shard in set(SHARDS.values()):
        save_file({n: t for n, t in tensors().items() if SHARDS[n] == shard}, directory / shard)
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 48}, "weight_map": SHARDS}))
    return directory


def load_all(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: checkpoint.load(name, tuple(t.shape), dtype) for name, t in tensors().items()}


@pytest.mark.parametrize("write", [write_one, write_shards])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_comes_out_as_it_was_written(tmp_path: Path, write: Write, dtype: torch.dtype) -> None:
    checkpoint = Checkpoint(write(tmp_path))
    loaded = load_all(checkpoint, dtype)
    checkpoint.close()
    assert {t.dtype for t in loaded.values()} == {dtype}
    for name, expected in tensors().items():
        assert torch.equal(loaded[name].float(), expected)


@pytest.mark.parametrize("write", [write_one, write_shards])
def test_the_elements_are_counted_for_the_progress_bar(tmp_path: Path, write: Write) -> None:
    assert Checkpoint(write(tmp_path)).num_elements == 6 + 2 + 4


def test_tensors_stay_valid_after_the_files_are_closed(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_one(tmp_path))
    loaded = load_all(checkpoint)
    checkpoint.close()
    (tmp_path / "model.safetensors").unlink()
    assert loaded["a"].sum().item() == 15


def test_files_beside_the_shards_that_the_index_does_not_name_are_not_read(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file({"lora": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    load_all(checkpoint)
    checkpoint.close()


def test_a_tied_output_head_in_the_file_is_ignored(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_one(tmp_path, **{"lm_head.weight": torch.ones(100)}))
    load_all(checkpoint)
    checkpoint.close()
    assert checkpoint.num_elements == 12


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / SHARDS["c"]).unlink()
    message = f"the shard {SHARDS['c']} must exist, it does not: download it again"
    with pytest.raises(BadCheckpoint, match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("bytes_left", [0, 4, 60, -1], ids=str)
def test_a_truncated_file_is_named(tmp_path: Path, bytes_left: int) -> None:
    write_one(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:bytes_left])
    message = r"model\.safetensors must be a whole safetensors file \(.+\): download it again"
    with pytest.raises(BadCheckpoint, match=message):
        Checkpoint(tmp_path)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    path = tmp_path / SHARDS["c"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadCheckpoint, match=f"{SHARDS['c']} must be a whole safetensors file"):
        Checkpoint(tmp_path)


def test_a_pickle_that_calls_itself_safetensors_is_refused_and_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (ran,)

    torch.save({"a": Bomb()}, tmp_path / "model.safetensors")
    with pytest.raises(BadCheckpoint, match="must be a whole safetensors file"):
        Checkpoint(tmp_path)
    assert not ran.exists()


def test_pickles_in_the_directory_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    checkpoint = Checkpoint(write_one(tmp_path))
    load_all(checkpoint)
    checkpoint.close()


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_one(tmp_path))
    message = r"tensor a must be \[3, 2\] by config\.json, got \[2, 3\]: configuration and weights are of"
    with pytest.raises(BadCheckpoint, match=message):
        checkpoint.load("a", (3, 2), torch.float32)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_one(tmp_path))
    message = f"the checkpoint must have a tensor d, {tmp_path} has none: download it again"
    with pytest.raises(BadCheckpoint, match=message):
        checkpoint.load("d", (1,), torch.float32)


def test_a_directory_without_weights_lacks_every_tensor(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.num_elements == 0
    with pytest.raises(BadCheckpoint, match="must have a tensor a"):
        checkpoint.load("a", (2, 3), torch.float32)


def test_tensors_that_nobody_asked_for_are_refused_at_the_end(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_one(tmp_path, z=torch.zeros(1), y=torch.zeros(1)))
    load_all(checkpoint)
    message = "every tensor must belong to the model, 2 do not, such as y: configuration and weights are of"
    with pytest.raises(BadCheckpoint, match=message):
        checkpoint.close()


@pytest.mark.parametrize(
    "index",
    [
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"weight_map": null}',
        b'{"weight_map": ["a"]}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a": 1, "b": "model.safetensors"}}',
        b"{}",
    ],
    ids=str,
)
def test_an_index_that_maps_nothing_to_files_is_refused(tmp_path: Path, index: bytes) -> None:
    write_one(tmp_path)
    (tmp_path / INDEX).write_bytes(index)
    message = f"{INDEX} must map tensors to files, it does not: download it again"
    with pytest.raises(BadCheckpoint, match=message):
        Checkpoint(tmp_path)
