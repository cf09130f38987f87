"""A stretch of a tensor's elements as boxes."""

import itertools
import math

import pytest
import torch

from molmo2_nemo.training.optimizer_shards import boxes


@pytest.mark.parametrize("shape", [(7,), (4, 3), (1, 5), (3, 1), (3, 2, 4), (2, 3, 1, 2)])
def test_boxes_are_the_stretch_and_nothing_else(shape):
    """Every stretch of small tensors: the boxes hold its elements, one after the other."""
    numbers = torch.arange(math.prod(shape)).view(shape)
    for first, end in itertools.combinations(range(numbers.numel() + 1), 2):
        found = boxes(shape, first, end)
        parts = [numbers[tuple(slice(at, at + n) for at, n in zip(offset, size))] for offset, size in found]
        assert torch.cat([part.flatten() for part in parts]).tolist() == list(range(first, end))
        assert len(found) <= 2 * len(shape) - 1
    assert boxes(shape, 0, numbers.numel()) == [((0,) * len(shape), shape)]
    assert boxes(shape, 2, 2) == []
