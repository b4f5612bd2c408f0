"""One copy for all that a step needs: contents, shapes and types arrive, and steps do not share a buffer."""

import numpy as np
import pytest
import torch

from cabochon.engine.packet import PacketRing
from cabochon.engine.streams import CpuStream

ARRAYS = [
    np.arange(5, dtype=np.int32),
    np.arange(6, dtype=np.int64).reshape(2, 3) << 40,
    np.array([], np.int32),
    np.array([True, False, True]),
    np.array([1.5, -2.5]),
    np.arange(3, dtype=np.int32),
    np.array([1 << 40]),  # behind an odd number of words
    np.arange(4, dtype=np.int32).reshape(2, 2).T,  # not contiguous
]


def ring(depth: int = 2, num_words: int = 64) -> PacketRing:
    return PacketRing(CpuStream(), torch.device("cpu"), depth, num_words)


def test_arrays_arrive_with_their_shapes_and_types() -> None:
    packet = ring().open()
    places = [packet.put(array) for array in ARRAYS]
    packet.send()
    for array, place in zip(ARRAYS, places, strict=True):
        assert place.shape == array.shape
        assert np.array_equal(place.numpy(), array)
        assert place.numpy().dtype == array.dtype
        assert place.numel() == 0 or place.is_contiguous()


def test_what_does_not_fit_arrives_by_itself() -> None:
    packet = ring(num_words=8).open()
    small, large = np.arange(6, dtype=np.int32), np.arange(100, dtype=np.int32)
    places = [packet.put(small), packet.put(large), packet.put(small[:2])]
    packet.send()
    for place, array in zip(places, (small, large, small[:2]), strict=True):
        assert np.array_equal(place.numpy(), array)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_packet_that_is_on_its_way_keeps_its_contents_while_the_next_is_filled(depth: int) -> None:
    packets = ring(depth)
    filled = []
    for step in range(depth):
        packet = packets.open()
        filled.append((packet, packet.put(np.full(4, step, np.int32))))
    for step, (packet, place) in enumerate(filled):  # the device runs them in order, later
        packet.send()
        assert place.tolist() == [step] * 4
