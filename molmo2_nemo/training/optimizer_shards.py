"""The state of a distributed optimizer in a checkpoint: each rank writes and reads its own shards, and no others.

Megatron's `fully_reshardable` form gathers the state on every data-parallel rank (or on the first, with another
setting) before it is saved, and makes room for all of it on every rank before it is loaded. Its forms without a gather
cannot change tensor and pipeline parallelism, or are refused by megatron-core 0.19 (`fully_sharded_model_space`).

Here the checkpoint is the same as that of `fully_reshardable`, with the same keys and shapes, so that each can read the
other's. A rank's shard of a parameter is a stretch of its elements in memory. Such a stretch is a few boxes of the
tensor (part of a row, whole rows, part of a row), and torch's distributed checkpoints read and write boxes of any
place and size. Nothing is gathered or copied: the boxes are views of the optimizer's tensors.
"""

import math
from dataclasses import replace
from functools import partial

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from molmo2_nemo import compat

PREFIX = "optimizer.state."  # what the keys of an optimizer's tensors begin with, in Megatron's checkpoints


def save_shards(part: DistributedOptimizer) -> None:
    """Let this optimizer's `fully_reshardable` sharded state dict consist of its own shards."""
    part.sharded_param_state_fully_reshardable = partial(_sharded_state, part)
    part.load_parameter_state_from_fully_reshardable = partial(_load, part)


def boxes(shape: tuple[int, ...], first: int, end: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offset and size of the boxes that are elements first to end of a tensor in memory's order, in that order."""
    if first >= end:
        return []
    if (first, end) == (0, math.prod(shape)):
        return [((0,) * len(shape), tuple(shape))]
    row, rest = math.prod(shape[1:]), tuple(shape[1:])

    def inside(number: int, begins: int, ends: int) -> list:
        """Boxes of elements of one row."""
        return [((number, *offset), (1, *size)) for offset, size in boxes(rest, begins, ends)]

    number, last = first // row, (end - 1) // row
    if number == last:
        return inside(number, first - number * row, end - number * row)
    found = []
    if first % row:
        found += inside(number, first % row, row)
        number += 1
    whole = end // row
    if number < whole:
        found.append(((number,) + (0,) * len(rest), (whole - number, *rest)))
    return found + (inside(whole, 0, end % row) if end % row else [])


def _sharded_state(part: DistributedOptimizer, model_sharded_state_dict: dict, is_loading=False, metadata=None) -> dict:
    """Number of a shard on this rank -> name of a state -> number of a box -> ShardedTensor."""
    tensors = {
        tensor.data: tensor
        for tensor in nested_values(model_sharded_state_dict)
        if isinstance(tensor, ShardedTensor | ShardedTensorFactory)
    }
    found = {}
    for number, (parameter, first, end, states) in enumerate(compat.optimizer_shards(part)):
        parts = _parts(tensors[parameter])
        found[number] = {
            kind: dict(enumerate(_boxes_of(part, parts, f"{PREFIX}{kind}.", first, end, states[kind].float())))
            for kind in ("param", *part.optimizer_state_keys)
        }
    return found


def _parts(tensor: ShardedTensor | ShardedTensorFactory) -> list[tuple[int, ShardedTensor]]:
    """The tensors as which a parameter is saved, each with its first element's place in the parameter.

    A matrix that holds gate and up projection is saved as these two.
    """
    if isinstance(tensor, ShardedTensor):
        return [(0, tensor)]
    # Views of a tensor without memory say where they begin.
    empty = torch.empty(tensor.data.shape, dtype=tensor.data.dtype, device="meta")
    views = list(nested_values(replace(tensor, data=empty).build()))
    assert all(view.data.is_contiguous() for view in views), tensor.key
    return [(view.data.storage_offset(), view) for view in views]


def _boxes_of(part, parts: list, prefix: str, first: int, end: int, state: Tensor) -> list[ShardedTensor]:
    """The boxes of a state, flat, that belongs to elements first to end of a parameter."""
    found = []
    for begins, tensor in parts:
        low, high = max(first, begins), min(end, begins + math.prod(tensor.local_shape))
        at = low - first
        assert not tensor.prepend_axis_num, tensor.key  # each layer has keys of its own
        for offset, size in boxes(tensor.local_shape, low - begins, high - begins):
            count = math.prod(size)
            box = replace(
                tensor,
                key=prefix + tensor.key,
                data=state[at : at + count].view(size),
                dtype=state.dtype,
                local_shape=size,
                global_offset=tuple(a + b for a, b in zip(tensor.global_offset, offset)),
                axis_fragmentations=None,  # boxes lie on no grid
                # Of data-parallel ranks each has shards of its own.
                replica_id=(*tensor.replica_id[:2], part.distributed_optimizer_instance_id),
            )
            found.append(box)
            at += count
    return found


@torch.no_grad()
def _load(part: DistributedOptimizer, state: dict) -> None:
    """Put what was loaded into a `_sharded_state` into the optimizer, a parameter at a time."""

    def all_states():
        for number, (*_, states) in enumerate(compat.optimizer_shards(part)):
            for kind in ("param", *part.optimizer_state_keys):
                loaded = state[number][kind]
                states[kind] = torch.cat([loaded[box].flatten() for box in range(len(loaded))])
            yield states

    compat.load_optimizer_shards(part, all_states())
