"""Micro-batches from the loader of each data-parallel replica to the ranks that need them."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from molmo2_nemo.data.packing import Batch
from molmo2_nemo.model.mask import ROOT_SEGMENT, SEGMENTS_PER_EXAMPLE

# Needed on the first pipeline stage only, and most of a batch's bytes.
VISION_FIELDS = ("crops", "pooling")
FIELDS = (
    "input_ids",
    "labels",
    "loss_weights",
    "position_ids",
    "segment_ids",
    "vision_mask",
    "source_ids",
    *VISION_FIELDS,
)
# Stays on the host, on every rank: the model reads its numbers, and would wait for a GPU.
HOST_FIELD = "vision_units"


# What a micro-batch costs, in the order of `work_of`: arguments of flops.forward_flops.
WORK = ("crops", "visual_tokens", "pooled_patches", "tokens", "attended", "loss_tokens")


def work_of(batch: Batch) -> Tensor:
    """Counts of a micro-batch, float64 [len(WORK)]."""
    return torch.tensor(
        [
            len(batch.crops),
            len(batch.pooling),
            (batch.pooling >= 0).sum(),
            (batch.segment_ids >= 0).sum(),
            attended_pairs(batch.segment_ids, batch.vision_mask),
            (batch.loss_weights > 0).sum(),
        ],
        dtype=torch.float64,
    )


def attended_pairs(segment_ids: Tensor, vision_mask: Tensor) -> int:
    """How many pairs of query and key the mask lets through in packed rows (model/mask.py), without padding.

    segment_ids: int64 [B, S]; vision_mask: bool [B, S], true in roots or plain conversations alone.
    """
    pairs = 0
    for segments, vision in zip(segment_ids, vision_mask):
        numbers, lengths = torch.unique(segments[segments >= 0], return_counts=True)
        examples = numbers // SEGMENTS_PER_EXAMPLE
        is_root = numbers % SEGMENTS_PER_EXAMPLE == ROOT_SEGMENT
        pairs += int((lengths * (lengths + 1) // 2).sum())
        # Branches see their root as well.
        roots = torch.zeros(int(examples[-1]) + 1 if len(examples) else 0, dtype=torch.int64)
        roots[examples[is_root]] = lengths[is_root]
        pairs += int((lengths * roots[examples])[~is_root].sum())
        # Vision tokens see later ones of their example, too.
        _, visual = torch.unique(segments[vision] // SEGMENTS_PER_EXAMPLE, return_counts=True)
        pairs += int((visual * (visual - 1) // 2).sum())
    return pairs


class BatchSource:
    """Hands every rank of a replica the same micro-batch. One rank of the replica holds the loader.

    loader: an iterator of Batch on that rank, None elsewhere. group: the replica's ranks.
    """

    def __init__(self, loader, group: dist.ProcessGroup, device: str):
        self.loader, self.group, self.device = loader, group, device
        self.source = dist.get_process_group_ranks(group)[0]
        self.is_source = dist.get_rank() == self.source
        self.first_stage = parallel_state.is_pipeline_first_stage()
        self.vision_group = parallel_state.get_tensor_and_context_parallel_group()

    def next(self) -> dict | None:
        """The next micro-batch as a dict of FIELDS and HOST_FIELD; None when the loader has ended. Collective.

        On the loader's rank also `counters` and `errors`, which metrics.DataReport sums over all ranks, `work`,
        and the samples' `keys`, `examples` and `outcomes`.
        """
        batch = next(self.loader, None) if self.is_source else None
        told, result = [None, None], {}
        if self.is_source and batch is not None:
            shapes = {name: (tuple(getattr(batch, name).shape), getattr(batch, name).dtype) for name in FIELDS}
            told = [shapes, getattr(batch, HOST_FIELD)]
            result = {"counters": batch.counters, "errors": batch.errors, "work": work_of(batch)}
            result |= {"keys": batch.__key__, "examples": batch.examples, "outcomes": batch.outcomes}
        if self.group.size() > 1:
            dist.broadcast_object_list(told, self.source, group=self.group)
        shapes, result[HOST_FIELD] = told
        if shapes is None:
            return None
        for name, (shape, dtype) in shapes.items():
            vision = name in VISION_FIELDS
            if vision and not self.first_stage:
                continue
            if self.is_source:
                tensor = getattr(batch, name).to(self.device)
            else:
                tensor = torch.empty(shape, dtype=dtype, device=self.device)
            if self.group.size() > 1:
                # The loader's rank is the first of the replica, hence of its first stage too.
                dist.broadcast(tensor, self.source, group=self.vision_group if vision else self.group)
            # Pixels wait in host memory for their forward pass: a step's would fill a GPU (step.forward_backward).
            result[name] = tensor.cpu() if name == "crops" else tensor
        return result
